"""The optimal partition of sorted rows into K intervals, by dynamic programmes over few cuts.

An interval's squared error is Σ w x² − S²/n, with n its weight and S its weighted sum, so a partition is optimal if it
makes Σ S²/n greatest. Programmes find it over the cuts that the one before leaves open:

1. *dense* (rows of few distinct values, or fewer than 16 levels): some hundred cuts spread over the whole row by rank,
   value and density; every partition of them. If the row has no more distinct values than that, this is all, and exact.
2. *priced* (16 levels and more): the shortest path through the cuts at a price per interval at which it has K of them
   (`fit_knq_path`); first over cuts spread as above, then twice over the intervals found, parted evenly into cells.
3. *windows*: each boundary may move by a few steps of its own; every combination. Steps shrink to single values, and a
   boundary at the end of its window moves on, until nothing moves.

No product is followed by a sum that XLA could contract, so host and device, eager and jitted, decide alike.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax.fit_knq_path import shortest_paths
from nuqjax.fit_knq_rows import SortedRows
from nuqjax.rows import namespace

_PRICED_LEVELS = 16  # from here on the dense programme's cells are too coarse
_SPREAD = 12  # cells of an interval, on average, when nothing is known
_CELLS = 32  # when a partition is
_BAND = 4  # times the mean number of cells of an interval
_REDISTRIBUTIONS = 2
_TRIALS = 12  # of a price
_ROOMS = tuple(2**e for e in range(9, 40, 2))  # of the arrays of cells: few shapes to compile
_HALF = 16  # steps of a window to each side
_ROUNDS = 64
_LANES = 64  # rows that the dense programme handles at once


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


@functools.partial(jax.jit, static_argnames="num_levels")
def _dense_rows(count, total, above, penalty, reach, *, num_levels: int):
    """The best partition by `cuts [R, M + 1]`, and minus its Σ S²/n.

    `count`, `total` and `above` are `[R, M + 1]`: the running weights and sums at the cuts, and whether a cut lies
    above the pinned zero. For a lower bound, `penalty [R, M + 1]` is what a boundary at a cut can save per unit of the
    extent of the intervals beside it, and `reach`, two `[R, M + 1]`, how high and low the intervals beside it extend.
    """
    arrays = [x for x in (count, total, above, penalty, *(reach or ())) if x is not None]
    number = arrays[0].shape[0]
    lanes = min(_LANES, number)
    missing = -number % lanes

    def some(arrays):
        count, total, above, *rest = (x.T for x in arrays)
        return _dense(count, total, above, *((rest[0], rest[1:]) if rest else (None, None)), num_levels)

    padded = [jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x for x in arrays]
    cuts, best = lax.map(some, [x.reshape(-1, lanes, x.shape[1]) for x in padded])
    cuts = cuts.transpose(0, 2, 1).reshape(number + missing, num_levels - 1)
    return cuts[:number], best.reshape(-1)[:number]


def _dense(count, total, above, penalty, reach, num_levels: int):
    """As `_dense_rows`, with the rows last, `[M + 1, R]`: they fill the processor's lanes."""
    size, number = count.shape
    place = jnp.arange(size, dtype=jnp.int32)[:, None]

    def cost(begin, end):  # of intervals; the first or the last cut of each is the same
        n, s = (end[0] - begin[0]).astype(jnp.float64), (end[1] - begin[1]).astype(jnp.float64)
        pinned = ~begin[2] & end[2]
        gain = jnp.where(pinned, 0.0, _gain(n, s))
        if penalty is not None:
            least, most = begin[5], end[4]  # the value above the first cut, below the last
            extent = jnp.where(pinned, jnp.maximum(most, 0.0) - jnp.minimum(least, 0.0), most - least)
            gain = gain + jnp.maximum(extent, 0.0) * (begin[3] + end[3])
        return -gain

    every = [x for x in (count, total, above, penalty, *(reach or ())) if x is not None]
    best = jnp.full((num_levels, size, number), jnp.inf)  # by the layer and the cut that its interval ends at
    best = best.at[0].set(cost([x[:1] for x in every], every))

    def reach_from(cut, best):
        begin = [lax.dynamic_index_in_dim(x, cut, 0) for x in every]
        costs = jnp.where(place >= cut, cost(begin, every), jnp.inf)
        before = lax.dynamic_index_in_dim(best[:-1], cut, 1)
        return best.at[1:].set(jnp.minimum(best[1:], before + costs))

    best = lax.fori_loop(jnp.int32(0), jnp.int32(size), reach_from, best)

    def back(cut, layer):
        end = [jnp.take_along_axis(x, cut[None], axis=0) for x in every]
        costs = jnp.where(place <= cut, cost(every, end), jnp.inf)
        reached = lax.dynamic_index_in_dim(best, layer, 0, keepdims=False) + costs
        before = jnp.min(jnp.where(reached == jnp.min(reached, axis=0), place, size - 1), axis=0)
        return before, before

    last = jnp.full(number, size - 1, jnp.int32)
    _, cuts = lax.scan(back, last, jnp.arange(num_levels - 1, dtype=jnp.int32), reverse=True)
    return cuts, best[-1, -1]


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


_windows_rows = jax.jit(jax.vmap(_windows))


def _above(rows: SortedRows, cuts, keep_zero: bool):
    """Whether cuts `[R, …]` lie above the pinned zero; False everywhere if there is none."""
    xp = namespace(rows.values)
    if not keep_zero:
        return xp.zeros(cuts.shape, bool)
    return cuts > rows.zero.reshape(-1, *[1] * (cuts.ndim - 1))


def partition(rows: SortedRows, num_levels: int, keep_zero: bool, dense_cuts: int) -> tuple[Any, Any]:
    """`[R, K − 1]` the cuts of the best partition of each row into K intervals, some empty where values are few.

    With them comes minus Σ S²/n, `[R]`, where the dense programme held every value, so that it is the least; else None.
    Runs on NumPy or JAX arrays, where 64-bit types are enabled.
    """
    xp = namespace(rows.values)
    count = min(dense_cuts, rows.values.shape[1])
    few = rows.values.shape[1] <= num_levels or (xp is np and (rows.distinct <= num_levels).all())
    if num_levels == 1 or few:  # every value its own level
        return xp.minimum(xp.arange(1, num_levels, dtype=xp.int64), rows.distinct[:, None]), None
    if num_levels >= _PRICED_LEVELS and rows.values.shape[1] > count:
        return polish(rows, _priced(rows, num_levels, keep_zero), keep_zero), None
    cuts = coarse_cuts(rows, count)
    found, least = _dense_rows(
        take(rows.count, cuts), take(rows.total, cuts), _above(rows, cuts, keep_zero), None, None, num_levels=num_levels
    )
    best = take(cuts, _like(found, xp))
    if rows.values.shape[1] > count:
        return polish(rows, best, keep_zero), None
    return best, (np.asarray(least) if xp is np else least) * 2.0 ** (-2 * rows.frac)


def _priced(rows: SortedRows, num_levels: int, keep_zero: bool):
    """`[R, K − 1]` the cuts of a path of K intervals through cells of ever more even share in the error."""
    xp = namespace(rows.values)
    length = rows.values.shape[1]
    cuts = coarse_cuts(rows, min(_SPREAD * num_levels, length))
    price = _first_price(rows, cuts, num_levels)
    if length <= _CELLS * num_levels:  # room for every value
        cuts = xp.minimum(xp.arange(length + 1, dtype=xp.int64), rows.distinct[:, None])
        return _path(rows, cuts, price, num_levels, keep_zero, 2 * _BAND * -(-length // num_levels))[0]
    best, price = _path(rows, cuts, price, num_levels, keep_zero, 4 * _BAND * _SPREAD)
    for _ in range(_REDISTRIBUTIONS):
        cuts = even_cuts(rows, best, _CELLS)
        best, price = _path(rows, cuts, price, num_levels, keep_zero, _BAND * _CELLS)
    return best


def _first_price(rows: SortedRows, cuts, num_levels: int):
    """`[R]` twice the error of an interval, by Panter and Dite (1951): (Σ (weight · width²)^⅓)³ / 12 K² in all."""
    xp = namespace(rows.values)
    edge = take(rows.values, xp.minimum(cuts, xp.maximum(rows.distinct[:, None] - 1, 0)))
    n = take(rows.count, cuts).astype(xp.float64)
    share = xp.sum(xp.cbrt((n[:, 1:] - n[:, :-1]) * (edge[:, 1:] - edge[:, :-1]) ** 2), axis=1)
    price = share**3 / (6.0 * num_levels**3)
    # NumPy's and XLA's roots and sums may differ in the last bit: a first guess does not need it.
    return xp.maximum(price.astype(xp.float32).astype(xp.float64), 2.0**-1000)


def _path(rows: SortedRows, cuts, price, num_levels: int, keep_zero: bool, band: int):
    """The cuts `[R, K − 1]` of the shortest path with K intervals, and its price `[R]`, searched from `price`."""
    xp = namespace(rows.values)
    n, s = take(rows.count, cuts), take(rows.total, cuts)
    n, s = (n[:, 1:] - n[:, :-1]).astype(xp.float64), (s[:, 1:] - s[:, :-1]).astype(xp.float64)
    mean = s / xp.where(n > 0, n, 1.0) * 2.0**-rows.frac
    zero = xp.sum(~_above(rows, cuts, True), axis=1).astype(xp.int32) - 1
    size = n.shape[1]
    room = next(room for room in _ROOMS if room >= size)
    heavy, centre = (xp.pad(x, ((0, 0), (0, room - size))) for x in (n, mean))
    nothing = xp.zeros_like(heavy)
    free = num_levels - keep_zero
    band = max(128, 1 << (band - 1).bit_length())

    def attempt(price):
        _, number, (_, before, _, _) = shortest_paths(
            heavy, centre, nothing, nothing, price[:, None], np.int32(size), zero, band=band, tables=True, pin=keep_zero
        )
        return _like(number, xp)[:, 0], _like(before, xp)

    def next_price(price, low, high, number):
        low, high = xp.where(number > free, price, low), xp.where(number < free, price, high)
        guess = price * (xp.maximum(number, 1) / free) ** 3
        bracketed = (low > 0) & (high < xp.inf)
        middle = xp.sqrt(xp.where(bracketed, low * xp.where(bracketed, high, 1.0), 1.0))
        between = xp.where(bracketed & ((guess <= low) | (guess >= high)), middle, guess)
        return xp.where(number == free, price, between), low, high

    number, before = attempt(price)
    low, high = xp.zeros_like(price), xp.full_like(price, xp.inf)
    if xp is np:
        for _ in range(_TRIALS):
            if (number == free).all():
                break
            price, low, high = next_price(price, low, high, number)
            number, before = attempt(price)
    else:

        def wrong(state):
            *_, number, _, trial = state
            return jnp.any(number != free) & (trial < _TRIALS)

        def again(state):
            price, low, high, number, _, trial = state
            price, low, high = next_price(price, low, high, number)
            return price, low, high, *attempt(price), trial + 1

        state = lax.while_loop(wrong, again, (price, low, high, number, before, jnp.int32(0)))
        price, _, _, number, before, _ = state

    # The path from its end; where no price gives K intervals, K of those that there are, evenly by rank.
    chain = [xp.full_like(number, size)]
    for _ in range(num_levels + num_levels // 4 + 1):
        chain.append(take(before, chain[-1][:, None])[:, 0])
    chain = xp.stack(chain, axis=1)
    rank = xp.arange(num_levels - 1, 0, -1, dtype=xp.int64) * (number[:, None] + keep_zero) // num_levels
    return take(cuts, take(chain, xp.minimum(rank, chain.shape[1] - 1))), price


def _like(array: Any, xp):
    return np.asarray(array).astype(np.int64) if xp is np else array.astype(jnp.int64)


def polish(rows: SortedRows, cuts, keep_zero: bool):
    """Cuts `[R, K − 1]` moved by single values until no combination of small moves is better."""
    xp = namespace(rows.values)
    distinct = rows.distinct[:, None]
    whole = xp.concatenate([xp.zeros_like(distinct), cuts, distinct], axis=1)
    sizes = whole[:, 1:] - whole[:, :-1]
    step = xp.maximum(1, xp.maximum(sizes[:, 1:], sizes[:, :-1]) // (2 * _HALF))
    offsets = xp.arange(-_HALF, _HALF + 1, dtype=xp.int64)
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
        at_end = ((chosen == 0) | (chosen == 2 * _HALF)) & (new != cuts)
        settled = xp.all((new == cuts) & (step == 1))
        return new, xp.where(at_end, step, xp.maximum(1, step // 4)), settled

    if xp is np:
        for _ in range(_ROUNDS):
            cuts, step, settled = move(cuts, step)
            if settled:
                break
        return cuts

    def again(state):
        *_, settled, number = state
        return ~settled & (number < _ROUNDS)

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
    _, best = _dense_rows(
        n.astype(xp.float64), s * unit, _above(rows, cuts, keep_zero), penalty, reach, num_levels=num_levels
    )
    return bound_of_sum(rows, np.asarray(best) if xp is np else best, num_levels)


def bound_of_sum(rows: SortedRows, least, num_levels: int):
    """`[R]` Σ w x² plus the least −Σ S²/n, less what rounding can do."""
    xp = namespace(rows.values)
    rounding = rows.square * (rows.values.shape[1] + num_levels + 64) * 2.0**-51 + rows.slack
    return xp.maximum(rows.square + least - rounding, 0.0)


def _shift(cuts, by: int):
    """The cut before (−1) or after (+1) each cut."""
    xp = namespace(cuts)
    if by < 0:
        return xp.concatenate([cuts[:, :1], cuts[:, :-1]], axis=1)
    return xp.concatenate([cuts[:, 1:], cuts[:, -1:]], axis=1)
