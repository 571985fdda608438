"""The optimal partition of sorted rows into K intervals, by dynamic programmes over few cuts.

An interval's squared error is Σ w x² − S²/n, with n its weight and S its weighted sum, so a partition is optimal if it
makes Σ S²/n greatest. Three programmes find it, each over the cuts that the one before leaves open:

1. *dense*: some hundred cuts spread over the whole row by rank, value and density; every partition of them.
   If the row has no more distinct values than that, this is all, and exact.
2. *banded* (16 levels and more): the intervals found so far parted evenly into cells, and every partition of those
   with no interval longer than four times the mean one: levels move from where they are too dense to where they are too
   few.
3. *windows*: each boundary may move by a few steps of its own; every combination. Steps shrink to single values, and a
   boundary at the end of its window moves on, until nothing moves. Where rows are few and levels many, once more with
   windows of 257 places that reach to the neighbouring boundaries, where levels can still be redistributed.

Every decision is made in float64 on differences of exact integer sums, and no product is followed by a sum that XLA
could contract, so host and device, eager and jitted, decide alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax.fit_knq_rows import SortedRows
from nuqjax.rows import namespace

_BAND_LEVELS = 16  # from here on the dense programme's cells are too coarse
_CELLS = 32  # of an interval in the banded programme
_BAND = 4  # times the mean number of cells of an interval
_NARROW, _WIDE = 16, 128  # steps of a window to each side
_WIDE_FROM = 512  # cuts of the dense programme: with fewer, rows are many and windows stay narrow
_PIN = 2.0**80  # the weight of the level that is pinned to zero: S²/(n + 2^80) is nothing beside S²/n
_ROUNDS = 64
_REDISTRIBUTIONS = 3


def take(array, index):
    """`array[r, index[r, …]]` for `array [R, D]` and `index [R, …]`."""
    flat = index.reshape(index.shape[0], -1)
    if namespace(array) is np:
        return np.take_along_axis(array, flat, 1).reshape(index.shape)
    taken = jnp.take_along_axis(array, flat.astype(jnp.int32), axis=1, mode="promise_in_bounds")
    return taken.reshape(index.shape)


def _rounded(product):
    """A product that is rounded before it is added to anything."""
    return product if isinstance(product, np.ndarray) else lax.optimization_barrier(product)


def _search(rows: SortedRows, wanted):
    """`[R, m]` the number of distinct values below each of `wanted [R, m]`."""
    xp = namespace(rows.values)
    low = xp.zeros(wanted.shape, xp.int64)
    high = xp.broadcast_to(rows.distinct[:, None], wanted.shape)
    last = rows.values.shape[1] - 1
    for _ in range(rows.values.shape[1].bit_length()):
        middle = (low + high) >> 1
        below = (take(rows.values, xp.minimum(middle, last)) < wanted) & (low < high)
        low, high = xp.where(below, middle + 1, low), xp.where(below, high, middle)
    return low


def coarse_cuts(rows: SortedRows, count: int):
    """`[R, count + 1]` ascending cuts from 0 to the last: all where they are few, else spread in four ways.

    A quarter is even in rank, a quarter even in value, a quarter follows the density's cube root (Panter and Dite
    1951), and a quarter lies in the tails, by rank from either end in a geometric series.
    """
    xp = namespace(rows.values)
    distinct = rows.distinct[:, None]
    quarter = count // 4
    share = xp.arange(1, quarter, dtype=xp.int64)
    even = share * distinct // quarter
    low, high = rows.values[:, :1], take(rows.values, xp.maximum(distinct - 1, 0))
    grid = _search(rows, low + _rounded((high - low) * (share / quarter)))
    edges = xp.arange(4 * count + 1, dtype=xp.int64) * distinct // (4 * count)
    ends = take(rows.values, xp.minimum(edges, xp.maximum(distinct - 1, 0)))
    gaps = ends[:, 1:] - ends[:, :-1]
    root = xp.sqrt(gaps)
    pull = _rounded(root * xp.sqrt(xp.sqrt(xp.sqrt(gaps))))  # gap^(5/8), by correctly rounded steps
    pull = (pull * 2.0**30).astype(xp.int64) + 1
    running = xp.cumsum(pull, axis=1)
    place = xp.sum(running[:, None, :] <= (share * running[:, -1:] // quarter)[:, :, None], axis=2)
    density = take(edges, place)
    eighth = quarter // 2
    series = np.concatenate(
        [np.arange(1, eighth // 4 + 1), np.geomspace(eighth // 4 + 1, 2.0**40, eighth - eighth // 4)]
    )
    ratio = xp.asarray(np.rint(np.minimum(series, 2.0**40)).astype(np.int64))
    tail = xp.minimum(ratio, distinct)
    chosen = xp.concatenate([even, grid, density, tail, distinct - tail], axis=1)
    chosen = xp.sort(xp.clip(chosen, 0, distinct), axis=1)
    missing = count - 1 - chosen.shape[1]
    if missing > 0:
        chosen = xp.concatenate([chosen, xp.broadcast_to(distinct, (chosen.shape[0], missing))], axis=1)
    spread = xp.concatenate([xp.zeros_like(distinct), chosen[:, : count - 1], distinct], axis=1)
    every = xp.minimum(xp.arange(count + 1, dtype=xp.int64), distinct)
    return xp.where(distinct <= count, every, spread)


def even_cuts(rows: SortedRows, cuts, cells: int):
    """Each interval between `cuts [R, K − 1]` parted into `cells`, half of them even in rank and half in value."""
    xp = namespace(rows.values)
    distinct = rows.distinct[:, None]
    full = xp.concatenate([xp.zeros_like(distinct), cuts, distinct], axis=1)
    low, high = full[:, :-1, None], full[:, 1:, None]
    half = xp.arange(cells // 2, dtype=xp.int64)
    ranks = low + (high - low) * half // (cells // 2)
    last = xp.maximum(distinct[:, :, None] - 1, 0)
    least, most = take(rows.values, xp.minimum(low, last)), take(rows.values, xp.clip(high - 1, 0, last))
    wanted = least + _rounded((most - least) * ((half + 0.5) / (cells // 2)))
    count = wanted.shape[0]
    by_value = _search(rows, wanted.reshape(count, -1))
    return xp.concatenate(
        [xp.sort(xp.concatenate([ranks.reshape(count, -1), by_value], axis=1), axis=1), distinct], axis=1
    )


def _first_least(costs, places):
    """The first place of the least cost."""
    return jnp.min(jnp.where(costs == jnp.min(costs), places, places.shape[0] - 1))


def _gain(n, s):
    """S²/n, 0 for an empty interval."""
    return s * s / jnp.where(n > 0, n, 1.0)


def _dense(count, total, above, penalty, reach, num_levels: int):
    """The best partition by `cuts [M + 1]`, and minus its Σ S²/n.

    `count`, `total` and `above` are `[M + 1]`: the running weights and sums at the cuts, and whether a cut lies above
    the pinned zero. For a lower bound, `penalty [M + 1]` is what a boundary at a cut can save per unit of the extent of
    the intervals beside it, and `reach`, two `[M + 1]`, how high and how low the intervals beside a cut may extend.
    """
    size = count.shape[0]
    n = (count[None, :] - count[:, None]).astype(jnp.float64)
    s = (total[None, :] - total[:, None]).astype(jnp.float64)
    pinned = ~above[:, None] & above[None, :]
    gain = jnp.where(pinned, 0.0, _gain(n, s))
    if penalty is not None:
        low, high = reach
        least, most = high[:, None], low[None, :]  # of the interval: the value above its first cut, below its last
        extent = jnp.where(pinned, jnp.maximum(most, 0.0) - jnp.minimum(least, 0.0), most - least)
        gain = gain + jnp.maximum(extent, 0.0) * (penalty[:, None] + penalty[None, :])
    place = jnp.arange(size, dtype=jnp.int32)
    cost = jnp.where(place[:, None] <= place[None, :], -gain, jnp.inf)

    def layer(best, _):
        return jnp.min(best[:, None] + cost, axis=0), best

    last, bests = lax.scan(layer, cost[0], None, length=num_levels - 1)

    def back(cut, best):
        before = _first_least(best + lax.dynamic_index_in_dim(cost, cut, 1, keepdims=False), place)
        return before, before

    _, cuts = lax.scan(back, jnp.int32(size - 1), bests, reverse=True)
    return cuts, last[-1]


def _banded(count, total, above, end, num_levels: int, band: int):
    """As `_dense`, but no interval holds more than `band` cells, and the row ends at the cut number `end`."""
    size = count.shape[0]

    def pad(array, fill):
        return jnp.concatenate([jnp.full(band, fill, array.dtype), array])

    def earlier(array, by):  # of a padded array
        return lax.dynamic_slice(array, (band - by,), (size,))

    place, steps = jnp.arange(size, dtype=jnp.int32), jnp.arange(band + 1, dtype=jnp.int32)
    padded = pad(count, 0), pad(total, 0), pad(above, False)

    def costs(by):
        n = (count - earlier(padded[0], by)).astype(jnp.float64)
        s = (total - earlier(padded[1], by)).astype(jnp.float64)
        pinned = ~earlier(padded[2], by) & above
        return jnp.where(place >= by, -jnp.where(pinned, 0.0, _gain(n, s)), jnp.inf)

    cost = lax.map(costs, steps)

    def layer(best, _):
        before = pad(best, jnp.inf)

        def shorter(by, least):
            return jnp.minimum(least, earlier(before, by) + lax.dynamic_index_in_dim(cost, by, 0, keepdims=False))

        return lax.fori_loop(jnp.int32(0), jnp.int32(band + 1), shorter, jnp.full(size, jnp.inf)), best

    _, bests = lax.scan(layer, jnp.where(place == 0, 0.0, jnp.inf), None, length=num_levels)

    def back(cut, best):
        before = jnp.flip(lax.dynamic_slice(pad(best, jnp.inf), (cut,), (band + 1,)))
        by = _first_least(before + lax.dynamic_index_in_dim(cost, cut, 1, keepdims=False), steps)
        return cut - by, cut - by

    _, cuts = lax.scan(back, end, bests, reverse=True)
    return cuts[1:]


def _windows(count, total, above, end_count, end_total, end_above, reference, spacing):
    """The best combination of one place in each boundary's window.

    Costs are counted from a reference, so that nothing large cancels: against boundaries in the middle of their windows
    and levels a, a boundary elsewhere costs Σ ((x − a_{j−1})² − (x − a_j)²) over the values between, and each interval
    gains s²/n, s = Σ (x − a_j), by moving its level to its mean.

    `count`, `total` and `above` are `[K − 1, W]` at the places of the windows, `end_…` the same at the end of the row;
    `reference [K]` is a, in the units of `total`, and `spacing [K − 1]` its differences in float64. The result is the
    place for each boundary, `[K − 1]`.
    """
    size = count.shape[1]
    middle = size // 2
    both = reference[1:] + reference[:-1]
    moved = 2 * (total - total[:, middle : middle + 1]) - (count - count[:, middle : middle + 1]) * both[:, None]
    shift = _rounded(spacing[:, None] * moved.astype(jnp.float64))
    place = jnp.arange(size, dtype=jnp.int32)

    def cost(left, right, level):
        n, s = right[0] - left[0], right[1] - left[1]
        rest = (s - n * level).astype(jnp.float64)
        to_zero = _rounded(level.astype(jnp.float64) * (s + rest.astype(s.dtype)).astype(jnp.float64))
        gain = jnp.where(~left[2] & right[2], -to_zero, _gain(n.astype(jnp.float64), rest))
        return jnp.where(n < 0, jnp.inf, -gain)

    begin = jnp.zeros((), count.dtype), jnp.zeros((), total.dtype), jnp.zeros((), bool)
    here = count, total, above
    first = cost(begin, tuple(x[0] for x in here), reference[0]) + shift[0]
    lefts, rights = tuple(x[:-1] for x in here), tuple(x[1:] for x in here)

    def step(best, inputs):
        left, right, level, move = inputs
        left, right = tuple(x[:, None] for x in left), tuple(x[None, :] for x in right)
        return jnp.min(best[:, None] + cost(left, right, level), axis=0) + move, best

    last, bests = lax.scan(step, first, (lefts, rights, reference[1:-1], shift[1:]))
    end = end_count, end_total, end_above
    chosen = _first_least(last + cost(tuple(x[-1] for x in here), end, reference[-1]), place)

    def back(chosen, inputs):
        best, left, right, level = inputs
        right = tuple(lax.dynamic_index_in_dim(x, chosen, 0, keepdims=False) for x in right)
        before = _first_least(best + cost(left, right, level), place)
        return before, before

    _, before = lax.scan(back, chosen, (bests, lefts, rights, reference[1:-1]), reverse=True)
    return jnp.concatenate([before, chosen[None]])


_dense_rows = jax.jit(jax.vmap(_dense, (0, 0, 0, 0, 0, None)), static_argnums=5)
_banded_rows = jax.jit(jax.vmap(_banded, (0, 0, 0, 0, None, None)), static_argnums=(4, 5))
_windows_rows = jax.jit(jax.vmap(_windows))


def _above(rows: SortedRows, cuts, keep_zero: bool):
    """Whether cuts `[R, …]` lie above the pinned zero; False everywhere if there is none."""
    xp = namespace(rows.values)
    if not keep_zero:
        return xp.zeros(cuts.shape, bool)
    return cuts > rows.zero.reshape(-1, *[1] * (cuts.ndim - 1))


def partition(rows: SortedRows, num_levels: int, keep_zero: bool, dense_cuts: int):
    """`[R, K − 1]` the cuts of the best partition of each row into K intervals, some empty where values are few.

    Runs on NumPy or JAX arrays, where 64-bit types are enabled.
    """
    xp = namespace(rows.values)
    count = min(dense_cuts, rows.values.shape[1])
    few = rows.values.shape[1] <= num_levels or (xp is np and (rows.distinct <= num_levels).all())
    if num_levels == 1 or few:  # every value its own level
        return xp.minimum(xp.arange(1, num_levels, dtype=xp.int64), rows.distinct[:, None])
    cuts = coarse_cuts(rows, count)
    found, _ = _dense_rows(
        take(rows.count, cuts), take(rows.total, cuts), _above(rows, cuts, keep_zero), None, None, num_levels
    )
    best = take(cuts, _like(found, xp))
    if rows.values.shape[1] <= count:
        return best
    if num_levels >= _BAND_LEVELS:
        cells = _CELLS
        for _ in range(_REDISTRIBUTIONS):
            cuts = even_cuts(rows, best, cells)
            end = xp.sum(cuts < rows.distinct[:, None], axis=1).astype(xp.int32)
            above = _above(rows, cuts, keep_zero)
            found = _banded_rows(take(rows.count, cuts), take(rows.total, cuts), above, end, num_levels, _BAND * cells)
            best = take(cuts, _like(found, xp))
    best = polish(rows, best, keep_zero)
    if num_levels < _BAND_LEVELS or dense_cuts < _WIDE_FROM:
        return best
    best = _refine(rows, best, keep_zero, _WIDE, 1)
    return polish(rows, best, keep_zero)


def polish(rows: SortedRows, cuts, keep_zero: bool):
    """Cuts `[R, K − 1]` moved by single values until no combination of small moves is better."""
    return _refine(rows, cuts, keep_zero, _NARROW, _ROUNDS)


def _like(array: Any, xp):
    return np.asarray(array).astype(np.int64) if xp is np else array.astype(jnp.int64)


def _refine(rows: SortedRows, cuts, keep_zero: bool, half: int, rounds: int):
    """Moves the boundaries until no combination of moves is better; wide windows reach the neighbours."""
    xp = namespace(rows.values)
    distinct = rows.distinct[:, None]
    whole = xp.concatenate([xp.zeros_like(distinct), cuts, distinct], axis=1)
    sizes = whole[:, 1:] - whole[:, :-1]
    step = xp.maximum(1, xp.maximum(sizes[:, 1:], sizes[:, :-1]) // (2 * _NARROW if half == _NARROW else half))
    offsets = xp.arange(-half, half + 1, dtype=xp.int64)
    end_count, end_total = take(rows.count, distinct)[:, 0], take(rows.total, distinct)[:, 0]
    end_above = _above(rows, rows.distinct, keep_zero)
    if keep_zero:
        end_above = xp.ones_like(end_above)

    def move(cuts, step):
        places = xp.clip(cuts[:, :, None] + step[:, :, None] * offsets, 0, distinct[:, :, None])
        whole = xp.concatenate([xp.zeros_like(distinct), cuts, distinct], axis=1)
        n, s = take(rows.count, whole), take(rows.total, whole)
        n, s = n[:, 1:] - n[:, :-1], s[:, 1:] - s[:, :-1]
        reference = s.astype(xp.float64) / xp.where(n > 0, n, 1)
        if rows.total.dtype == xp.int64:
            reference = xp.rint(reference).astype(xp.int64)
        spacing = (reference[:, 1:] - reference[:, :-1]).astype(xp.float64)
        chosen = _windows_rows(
            take(rows.count, places), take(rows.total, places), _above(rows, places, keep_zero),
            end_count, end_total, end_above, reference, spacing,
        )  # fmt: skip
        chosen = _like(chosen, xp)
        new = xp.take_along_axis(places, chosen[:, :, None], axis=2)[:, :, 0]
        at_end = ((chosen == 0) | (chosen == 2 * half)) & (new != cuts)
        settled = xp.all((new == cuts) & (step == 1))
        return new, xp.where(at_end, step, xp.maximum(1, step // 4)), settled

    if xp is np:
        for _ in range(rounds):
            cuts, step, settled = move(cuts, step)
            if settled:
                break
        return cuts

    def again(state):
        *_, settled, number = state
        return ~settled & (number < rounds)

    def once(state):
        cuts, step, _, number = state
        return (*move(cuts, step), number + 1)

    return lax.while_loop(again, once, (cuts, step, jnp.zeros((), bool), jnp.int32(0)))[0]


def squared_error_bound(rows: SortedRows, num_levels: int, keep_zero: bool, dense_cuts: int):
    """`[R]` a lower bound on the least squared error of K levels; exact but for rounding where cells are single values.

    Let c be the optimal levels and f(x) = min_j (x − c_j)². A cell b of weight n, mean μ and standard deviation σ
    that holds no midpoint of neighbouring levels costs n f(μ) + n σ²; one that holds the midpoint of c_j and
    c_{j+1} costs at least that less n σ (c_{j+1} − c_j), since E max(0, x − t) exceeds max(0, μ − t) by at most
    σ/2. A level lies inside its interval, so c_{j+1} − c_j is at most the extents of the two intervals together. So
    no partition costs less than Σ w x² − Σ (S²/n + extent · (n σ at its first cut + n σ at its last)) at its best,
    found by the dense programme over the cells. For σ stands its bound √((max − μ)(μ − min)) (Bhatia and Davis
    2000). What rounding can do is subtracted.
    """
    xp = namespace(rows.values)
    count = min(dense_cuts, rows.values.shape[1])
    cuts = coarse_cuts(rows, count)
    n, s = take(rows.count, cuts), take(rows.total, cuts)
    weight, mean = (n[:, 1:] - n[:, :-1]).astype(xp.float64), (s[:, 1:] - s[:, :-1]).astype(xp.float64)
    unit = 2.0**-rows.frac
    mean = mean / xp.where(weight > 0, weight, 1.0) * unit
    last = xp.maximum(rows.distinct[:, None] - 1, 0)
    above = take(rows.values, xp.minimum(cuts, last))  # the value above each cut, and the one below
    below = take(rows.values, xp.clip(cuts - 1, 0, last))
    several = cuts[:, 1:] - cuts[:, :-1] > 1
    variance = xp.maximum(below[:, 1:] - mean, 0.0) * xp.maximum(mean - above[:, :-1], 0.0)
    loss = xp.where(several, weight * xp.sqrt(variance), 0.0) * (1 + 2.0**-40)
    # A boundary is rounded to a cut from either side; the cell it lay in is one of the two beside the cut.
    zero = xp.zeros_like(loss[:, :1])
    penalty = xp.concatenate([zero, xp.maximum(loss[:, 1:], loss[:, :-1]), zero], axis=1)
    lowest = take(rows.values, xp.clip(_shift(cuts, -1), 0, last))
    highest = take(rows.values, xp.clip(_shift(cuts, 1) - 1, 0, last))
    # An interval that a midpoint's rounding made shorter may reach into the cells beside its cuts.
    reach = highest, lowest
    _, best = _dense_rows(n.astype(xp.float64), s * unit, _above(rows, cuts, keep_zero), penalty, reach, num_levels)
    best = np.asarray(best) if xp is np else best
    rounding = rows.square * (rows.values.shape[1] + num_levels + 64) * 2.0**-51 + rows.slack
    return xp.maximum(rows.square + best - rounding, 0.0)


def _shift(cuts, by: int):
    """The cut before (−1) or after (+1) each cut."""
    xp = namespace(cuts)
    if by < 0:
        return xp.concatenate([cuts[:, :1], cuts[:, :-1]], axis=1)
    return xp.concatenate([cuts[:, 1:], cuts[:, -1:]], axis=1)
