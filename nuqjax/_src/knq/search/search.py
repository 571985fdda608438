"""The search for the optimal partition of sorted rows into K intervals, by dynamic programmes over few cuts.

An interval's squared error is Σ w x² − S²/n, with n its weight and S its weighted sum, so a partition is optimal if it
makes Σ S²/n greatest. Three programmes search for it, each over the cuts that the one before leaves possible:

1. *dense*, for rows of few distinct values, compares every partition (`search.dense`). It is exact, and 2 and 3 are
   not needed.
2. *priced*, for other rows, finds the shortest path through cuts at a price per interval at which it has K intervals
   (`search.priced`). The cuts are first spread over the whole row by rank, value and density. Next each interval found
   is split evenly into cells. Then the cells that the best paths pass are split further and the others are joined.
3. *windows* compares every combination in which each boundary moves by a few steps, at first as far as the cells next
   to it reach. Steps shrink to single values, and a boundary at the end of its window moves on, until none moves.

No product is followed by a sum that XLA could contract, so host and device, eager and jitted, decide alike.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.knq.rows.long import LongRows, ShardedRows
from nuqjax._src.knq.rows.sorted import LONG, SortedRows, first_least, take
from nuqjax._src.knq.search import dense_host as fit_knq_dense_host
from nuqjax._src.knq.search import priced_host as fit_knq_priced_host
from nuqjax._src.knq.search.dense import dense_rows
from nuqjax._src.knq.search.priced import priced_paths
from nuqjax._src.knq.search.windows_host import windows_rows
from nuqjax._src.leaf.rows import namespace
from nuqjax._src.platform.rounding import rounded_first

_FEW_LEVELS = 12  # for fewer levels there are as many cells as for these
_SPREAD = 12  # cells per interval, on average, before a partition is known
_CELLS, _CELLS_OF_LONG = 48, 32  # cells per interval once one is; the second in long rows, where every cell is narrow
_PARTS = 8  # parts of a cell that the best paths pass
_KEPT = 64  # such parts for each level
_NARROWINGS = 2  # splits of the cells, at most
_NEARLY_SINGLE = 6  # cells of up to so many values, on average, are split into single values
_FINEST_PARTS = 32  # parts of such a cell, at most: where the row is dense it has more values than the average
_TRIALS = 24  # prices to try, at most
_EVERY = 1280  # in rows of up to so many values the path is searched through every cut at once
_ROOMS = (2**10 + 2, _EVERY + 2, *(2**e + 2 for e in range(12, 40, 2)))  # sizes of arrays of cuts: few to compile
COMPILED = 10**6  # on the host, rows this long and longer use compiled kernels: compiling costs less than it saves
_HALF = 16  # steps of a window to each side
_ROUNDS = 64  # moves of all boundaries, at most
_LANES = 16  # rows handled at once

Rows = SortedRows | LongRows | ShardedRows


def coarse_cuts(rows: Rows, count: int) -> Any:
    """Returns `[R, count + 1]` ascending cuts from 0 to the last: all if they are few, else spread in four ways.

    A quarter is even in rank, a quarter is even in value, a quarter follows the cube root of the density (Panter and
    Dite 1951), and a quarter lies in the tails, at ranks in a geometric series from either end.
    """
    xp = namespace(rows.size)
    if rows.length <= count:
        return rows.every_cut(count)[0]
    size = rows.size[:, None]
    quarter = count // 4
    share = xp.arange(1, quarter, dtype=xp.int64)
    even = share * size // quarter
    low, high = rows.value_at(xp.zeros_like(size)), rows.value_at(size)
    parts = np.arange(1, quarter) / quarter  # by NumPy: XLA multiplies by the reciprocal of a constant
    grid = rows.cut_below(low + rounded_first((high - low) * parts))
    edges = xp.arange(4 * count + 1, dtype=xp.int64) * size // (4 * count)
    ends = rows.value_at(edges)
    gaps = xp.minimum(ends[:, 1:] - ends[:, :-1], 4.0)  # wider ones lie beside values of next to no weight
    root = xp.sqrt(gaps)
    pull = rounded_first(root * xp.sqrt(xp.sqrt(xp.sqrt(gaps))))  # gap^(5/8), by correctly rounded steps
    pull = (pull * 2.0**30).astype(xp.int64) + 1
    running = xp.cumsum(pull, axis=1)
    place = xp.sum(running[:, None, :] <= (share * running[:, -1:] // quarter)[:, :, None], axis=2)
    density = take(edges, place)
    eighth = quarter // 2
    series = np.concatenate(
        [np.arange(1, eighth // 4 + 1), np.geomspace(eighth // 4 + 1, 2.0**40, eighth - eighth // 4)]
    )
    ratio = xp.asarray(np.rint(np.minimum(series, 2.0**40)).astype(np.int64))
    tail = xp.minimum(ratio, size)
    chosen = xp.concatenate([even, grid, density, tail, size - tail], axis=1)
    chosen = xp.sort(rows.before_ties(xp.clip(chosen, 0, size)), axis=1)
    missing = count - 1 - chosen.shape[1]
    if missing > 0:
        chosen = xp.concatenate([chosen, xp.broadcast_to(size, (chosen.shape[0], missing))], axis=1)
    spread = xp.concatenate([xp.zeros_like(size), chosen[:, : count - 1], size], axis=1)
    every, few = rows.every_cut(count)
    return xp.where(few[:, None], every, spread)


def even_cuts(rows: Rows, cuts, cells: int) -> Any:
    """Splits each interval between `cuts [R, K − 1]` into `cells` cells, half even in rank and half even in value."""
    xp = namespace(rows.size)
    size = rows.size[:, None]
    full = xp.concatenate([xp.zeros_like(size), cuts, size], axis=1)
    low, high = full[:, :-1, None], full[:, 1:, None]
    half = xp.arange(cells // 2, dtype=xp.int64)
    ranks = low + (high - low) * half // (cells // 2)
    least, most = rows.value_at(low), rows.value_at(xp.maximum(high - 1, 0))
    parts = (np.arange(cells // 2) + 0.5) / (cells // 2)  # by NumPy, as in `coarse_cuts`
    wanted = least + rounded_first((most - least) * parts)
    count = wanted.shape[0]
    by_value = rows.cut_below(wanted.reshape(count, -1))
    chosen = xp.concatenate([rows.before_ties(ranks.reshape(count, -1)), by_value, size], axis=1)
    every, few = rows.every_cut(chosen.shape[1] - 1)
    return xp.where(few[:, None], every, xp.sort(chosen, axis=1))


def _gain(n, s) -> Any:
    """Returns S²/n, and 0 for an empty interval."""
    return s * s / jnp.where(n > 0, n, 1.0)


@jax.jit
def _windows_rows(count, total, above, end_count, end_total, end_above, reference, spacing) -> jax.Array:
    """Returns the best combination of one place in each boundary's window, as places `[R, K − 1]`.

    Costs are relative to a reference, so that no large terms cancel: levels a, and every boundary in the middle of its
    window. A boundary elsewhere costs Σ ((x − a_{j−1})² − (x − a_j)²) over the values between the two places. An
    interval gains s²/n, s = Σ (x − a_j), when its level moves to its mean.

    `count`, `total` and `above` are `[R, K − 1, W]` at the places of the windows, and `end_…` are `[R]` at the ends of
    the rows. `reference [R, K]` is a, in the units of `total`, and `spacing [R, K − 1]` has its differences in float64.
    """
    number = count.shape[0]
    lanes = min(_LANES, number)
    missing = -number % lanes

    def grouped(x) -> jax.Array:
        padded = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return jnp.moveaxis(padded.reshape(-1, lanes, *x.shape[1:]), 1, -1)

    arrays = count, total, above, end_count, end_total, end_above, reference, spacing
    chosen = lax.map(lambda group: _windows(*group), tuple(map(grouped, arrays)))
    return jnp.moveaxis(chosen, -1, 1).reshape(number + missing, -1)[:number]


def _windows(count, total, above, end_count, end_total, end_above, reference, spacing) -> jax.Array:
    """Computes `_windows_rows` with the rows on the last axis, where they fill the processor's lanes."""
    size = count.shape[1]
    middle = size // 2
    both = reference[1:] + reference[:-1]
    moved = 2 * (total - total[:, middle : middle + 1]) - (count - count[:, middle : middle + 1]) * both[:, None]
    shift = rounded_first(spacing[:, None] * moved.astype(jnp.float64))
    place = jnp.arange(size, dtype=jnp.int32)[:, None]

    def cost(left, right, level) -> jax.Array:
        n, s = right[0] - left[0], right[1] - left[1]
        rest = (s - n * level).astype(jnp.float64)
        to_zero = rounded_first(level.astype(jnp.float64) * (s + rest.astype(s.dtype)).astype(jnp.float64))
        gain = jnp.where(~left[2] & right[2], -to_zero, _gain(n.astype(jnp.float64), rest))
        return jnp.where(n < 0, jnp.inf, -gain)

    begin = jnp.zeros((), count.dtype), jnp.zeros((), total.dtype), jnp.zeros((), bool)
    here = count, total, above
    first = cost(begin, tuple(x[0] for x in here), reference[0]) + shift[0]
    lefts, rights = tuple(x[:-1] for x in here), tuple(x[1:] for x in here)

    def step(best, inputs) -> tuple[Any, Any]:
        left, right, level, move = inputs
        left, right = tuple(x[:, None] for x in left), tuple(x[None, :] for x in right)
        return jnp.min(best[:, None] + cost(left, right, level), axis=0) + move, best

    last, bests = lax.scan(step, first, (lefts, rights, reference[1:-1], shift[1:]))
    end = end_count, end_total, end_above
    chosen = first_least(last + cost(tuple(x[-1] for x in here), end, reference[-1]), place, 0)[1][0]

    def back(chosen, inputs) -> tuple[jax.Array, jax.Array]:
        best, left, right, level = inputs
        right = tuple(jnp.take_along_axis(x, chosen[None], axis=0) for x in right)
        before = first_least(best + cost(left, right, level), place, 0)[1][0]
        return before, before

    _, before = lax.scan(back, chosen, (bests, lefts, rights, reference[1:-1]), reverse=True)
    return jnp.concatenate([before, chosen[None]])


def _above(rows: Rows, cuts, keep_zero: bool) -> Any:
    """Returns whether cuts `[R, …]` lie above the held zero; False everywhere if there is none."""
    xp = namespace(rows.size)
    if not keep_zero:
        return xp.zeros(cuts.shape, bool)
    return cuts > rows.zero.reshape(-1, *[1] * (cuts.ndim - 1))


class Partition(NamedTuple):
    """The best partition of rows into K intervals.

    Attributes:
      cuts: `[R, K − 1]` its boundaries, some of them equal if values are few.
      least: `[R]` a lower bound on −Σ S²/n of any partition into K intervals; None if not every cut was considered.
      price: `[R]` price per interval at which the shortest path has K intervals; None if no path was searched.
    """

    cuts: Any
    least: Any = None
    price: Any = None


def some_rows(rows: Rows, which: np.ndarray) -> Rows:
    """Returns the rows at the places `which`, of rows on the host."""
    return rows._replace(**{name: x[which] for name, x in rows._asdict().items() if isinstance(x, np.ndarray)})


def cost(rows: Rows, cuts, keep_zero: bool) -> np.ndarray:
    """Returns `[R]` −Σ S²/n of partitions of rows on the host."""
    size = rows.size[:, None]
    whole = np.concatenate([np.zeros_like(size), cuts, size], axis=1)
    n, s = (np.diff(x, axis=1).astype(np.float64) for x in rows.sums_below(whole))
    gain = s * s / np.where(n > 0, n, 1.0)
    if keep_zero:
        above = _above(rows, whole, True)
        above[:, -1] = True
        gain[~above[:, :-1] & above[:, 1:]] = 0.0
    return -gain.sum(axis=1) * 2.0 ** (-2 * rows.frac)


def partition_of_every_cut(rows: Rows, num_levels: int, keep_zero: bool, price) -> Partition:
    """Searches the best partition of rows on the host through every cut at once; the price starts at `price [R]`."""
    path = _path(rows, rows.every_cut(rows.length)[0], price, num_levels, keep_zero)
    return Partition(path.cuts, path.least, path.price)


def partition(rows: Rows, num_levels: int, keep_zero: bool, dense_cuts: int) -> Partition:
    """Searches the best partition of NumPy or JAX rows; call or trace it where 64-bit types are enabled."""
    xp = namespace(rows.size)
    most = min(dense_cuts, rows.length)
    if num_levels == 1 or rows.length <= num_levels:
        return Partition(rows.every_cut(num_levels)[0][:, 1:-1])  # every value its own level
    if rows.length > most:
        path = _priced(rows, num_levels, keep_zero)
        return Partition(polish(rows, path.cuts, keep_zero, path.reach, path.best), path.least, path.price)
    cuts = coarse_cuts(rows, most)
    count, total = rows.sums_below(cuts)
    if xp is np:
        unit = 2.0 ** (2 * rows.frac)
        zero = rows.zero if keep_zero else None
        price = _first_price(rows, cuts, num_levels) * unit
        found, least = fit_knq_dense_host.dense_rows(count, total, rows.size, zero, price, num_levels=num_levels)
    else:
        found, least = dense_rows(count, total, _above(rows, cuts, keep_zero), None, None, num_levels=num_levels)
        found = found.astype(jnp.int64)
    return Partition(take(cuts, found), least * 2.0 ** (-2 * rows.frac))


class _Path(NamedTuple):
    """The shortest path of K intervals through given cuts.

    Attributes:
      cuts: `[R, K − 1]` its boundaries.
      reach: `[R, K − 1]` values from each boundary to the next given cut, on the side where that is further; half of
        the longer interval next to it where no path has K intervals.
      price: `[R]` price per interval.
      excess: `[R, m + 1]` cost of the best path through each given cut, −∞ at the path's own boundaries; 0 at other
        cuts for a final path.
      best: `[R]` whether the path is the best one of K intervals through all cuts of the row.
      least: `[R]` a lower bound on the cost, without prices, of any path of K intervals; only for rows on the host.
    """

    cuts: Any
    reach: Any
    price: Any
    excess: Any
    best: Any
    least: Any


def _priced(rows: Rows, num_levels: int, keep_zero: bool) -> _Path:
    """Searches the shortest path through cells that are made narrower, step by step, where the best paths pass."""
    xp = namespace(rows.size)
    length, levels = rows.nominal + keep_zero, max(num_levels, _FEW_LEVELS)  # a held zero is a value too
    cuts = coarse_cuts(rows, min(_SPREAD * levels, length))
    price = _first_price(rows, cuts, num_levels)
    cells = _CELLS if length <= LONG else _CELLS_OF_LONG
    if length <= max(cells * levels, _EVERY):
        return _path(rows, rows.every_cut(min(length, rows.length))[0], price, num_levels, keep_zero)
    stages, cells = _narrowings(length / (cells * levels)), cells * -(-levels // num_levels)
    search = _in_stages if xp is np else _in_one_loop
    path = search(rows, cuts, price, num_levels, keep_zero, cells, stages)
    return path._replace(best=xp.zeros_like(path.best), least=None)  # the cuts were not all


def _in_stages(rows: Rows, cuts, price, num_levels: int, keep_zero: bool, cells: int, stages: tuple[int, ...]) -> _Path:
    """Searches the path through `cuts`, through `cells` even cells per interval, then through narrower ones."""
    path = _path(rows, cuts, price, num_levels, keep_zero)
    cuts = even_cuts(rows, path.cuts, cells)
    for parts in stages:
        path = _path(rows, cuts, path.price, num_levels, keep_zero, through=True)
        cuts = _narrower(rows, cuts, path.excess, parts, _kept(num_levels))
    return _path(rows, cuts, path.price, num_levels, keep_zero)


def _in_one_loop(
    rows: Rows, cuts, price, num_levels: int, keep_zero: bool, cells: int, stages: tuple[int, ...]
) -> _Path:
    """Does what `_in_stages` does, for JAX rows, with one program for all stages, which is compiled once."""
    kept, last = _kept(num_levels), len(stages) + 1
    sizes = cuts.shape[1] - 1, cells * num_levels, *[kept + 1] * len(stages)
    room = _room(max(sizes), num_levels)
    parts = jnp.asarray([0, *stages, 0])

    def turn(stage, state) -> tuple[Any, _Path]:
        cuts, path = state
        size = jnp.asarray(sizes)[stage]
        path = _path(rows, cuts, path.price, num_levels, keep_zero, (stage > 0) & (stage < last), size)
        following = (
            lambda: _extended(even_cuts(rows, path.cuts, cells), room),
            lambda: _extended(_narrower(rows, cuts, path.excess, parts[stage], kept, size), room),
            lambda: cuts,
        )
        which = jnp.where(stage == 0, 0, jnp.where(stage < last, 1, 2))
        return lax.switch(which, following), path

    cuts = _extended(cuts, room)
    shapes = jax.eval_shape(lambda: _path(rows, cuts, price, num_levels, keep_zero, jnp.bool_(False), jnp.int64(1)))
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return lax.fori_loop(0, last + 1, turn, (cuts, nothing._replace(price=price)))[1]


def _kept(num_levels: int) -> int:
    """Returns how many parts of cells are kept when cells are made narrower."""
    return _KEPT * max(num_levels, _FEW_LEVELS)


def _room(size: int, num_levels: int) -> int:
    """Returns the size of arrays of cuts, one for all paths of as many levels, of which the last is number `size`."""
    return next(room for room in _ROOMS if room >= max(size, _kept(num_levels) + 2))


def _extended(cuts, room: int) -> Any:
    return namespace(cuts).pad(cuts, ((0, 0), (0, room - cuts.shape[1] + 1)), mode="edge")


def _narrowings(values: float) -> tuple[int, ...]:
    """Returns into how many parts, at most, cells are split each time; at first they hold so many `values` on average.

    The last split is into single values if two splits or fewer lead to them.
    """
    few = next((n for n in range(_NARROWINGS) if values <= _NEARLY_SINGLE * _PARTS**n), None)
    return (_PARTS,) * _NARROWINGS if few is None else (_PARTS,) * few + (_FINEST_PARTS,)


def _narrower(rows: Rows, cuts, excess, most_parts, room: int, size=None) -> Any:
    """Returns `room + 2` cuts, some maybe equal: cells nearest to the best paths are split, the others joined.

    Only the cuts up to number `size` count, if it is given.
    """
    xp = namespace(rows.size)
    low, high = cuts[:, :-1], cuts[:, 1:]
    beside = xp.minimum(excess[:, 1:], excess[:, :-1])
    nearest = xp.argsort(xp.where(high > low, beside, xp.inf), axis=1, stable=True)
    low, high = take(low, nearest), take(high, nearest)
    parts = xp.minimum(high - low, most_parts)
    used = xp.cumsum(parts + 1, axis=1)  # cuts of each cell, its ends included
    if size is not None:  # cells that do not count are the last, since they are empty
        used = xp.where(xp.arange(used.shape[1], dtype=xp.int64) < size, used, room + 1)
    slot = xp.arange(room, dtype=xp.int64)
    cell = xp.cumsum(_marked(xp.minimum(used, room), room), axis=1)
    fits = take(xp.concatenate([used, xp.full_like(used[:, :1], room + 1)], axis=1), cell) <= room
    cell = xp.minimum(cell, low.shape[1] - 1)
    low, high, parts, used = (take(x, cell) for x in (low, high, parts, used))
    inner = low + (high - low) * (slot - (used - parts - 1)) // xp.maximum(parts, 1)
    spare = slot * rows.size[:, None] // room  # slots left over: cuts spread evenly, as equal ones would be of no use
    inner = rows.before_ties(xp.where(fits, xp.clip(inner, low, high), spare))
    return xp.sort(xp.concatenate([xp.zeros_like(cuts[:, :1]), inner, rows.size[:, None]], axis=1), axis=1)


def _marked(places, room: int) -> np.ndarray | jax.Array:
    """Returns `[R, room]`, 1 at the given places and 0 elsewhere; places from `room` on are ignored."""
    if isinstance(places, np.ndarray):
        marks = np.zeros((len(places), room + 1), np.int64)
        np.put_along_axis(marks, places, 1, axis=1)
        return marks[:, :room]
    row = jnp.broadcast_to(jnp.arange(places.shape[0], dtype=jnp.int32)[:, None], places.shape)
    return jnp.zeros((places.shape[0], room), jnp.int64).at[row, places.astype(jnp.int32)].set(1, mode="drop")


def _first_price(rows: Rows, cuts, num_levels: int) -> Any:
    """Returns `[R]` twice an interval's error: the row's is (Σ (weight · width²)^⅓)³ / 12 K² (Panter and Dite 1951)."""
    xp = namespace(rows.size)
    edge, n = rows.value_at(cuts), rows.sums_below(cuts)[0].astype(xp.float64)
    share = xp.sum(xp.cbrt((n[:, 1:] - n[:, :-1]) * (edge[:, 1:] - edge[:, :-1]) ** 2), axis=1)
    price = share**3 / (6.0 * num_levels**3)
    # NumPy's and XLA's roots and sums may differ in the last bits, so these are rounded away: it is a first guess.
    return xp.maximum(price.astype(xp.float32).astype(xp.float64), 2.0**-1000)


def _path(rows: Rows, cuts, price, num_levels: int, keep_zero: bool, through: Any = False, size: Any = None) -> _Path:
    """Searches the shortest path through `cuts [R, m + 1]`; the price starts at `price [R]`.

    With `through` the costs of the best paths through each cut are computed. In JAX rows both it and `size`, the number
    of the last cut that counts, may be traced.
    """
    xp = namespace(rows.size)
    whole = cuts.shape[1] - 1
    size = whole if size is None else size
    zero = xp.minimum(xp.sum(~_above(rows, cuts, True), axis=1) - 1, size).astype(xp.int32)
    unit, least = 2.0 ** (2 * rows.frac), None
    if xp is np and rows.length < COMPILED:
        count, total = rows.sums_below(cuts)
        places, found, exact, excess, bound = fit_knq_priced_host.priced_paths(
            count, total, size, zero, price * unit, _TRIALS, through, num_levels=num_levels, keep_zero=keep_zero
        )
        least = (bound - (num_levels - keep_zero) * found) / unit
    else:
        count, total = rows.sums_below(_extended(cuts, _room(whole, num_levels)))
        last = np.int32(size) if isinstance(size, int) else size.astype(jnp.int32)
        places, found, exact, excess = priced_paths(
            count,
            total,
            last,
            zero,
            price * unit,
            np.int32(_TRIALS),
            through,
            num_levels=num_levels,
            keep_zero=keep_zero,
        )
        places, excess = _like(places, xp), excess[:, : whole + 1]
        if xp is np:
            found, exact, excess = np.asarray(found), np.asarray(exact), np.asarray(excess)
    # The path's own cuts come first, whatever rounding makes of their excess.
    excess = xp.where(_marked(places, whole + 1) > 0, -xp.inf, excess)
    here = take(cuts, places)
    before, after = take(cuts, xp.maximum(places - 1, 0)), take(cuts, xp.minimum(places + 1, size))
    reach = xp.where(exact[:, None], xp.maximum(here - before, after - here), _half_of_longer(rows, here))
    return _Path(here, reach, found / unit, excess, exact, least)


def _like(array: Any, xp) -> Any:
    return np.asarray(array).astype(np.int64) if xp is np else array.astype(jnp.int64)


def _half_of_longer(rows: Rows, cuts) -> Any:
    """Returns `[R, K − 1]` half the number of values in the longer of the two intervals next to each cut."""
    xp = namespace(rows.size)
    size = rows.size[:, None]
    whole = xp.concatenate([xp.zeros_like(size), cuts, size], axis=1)
    sizes = whole[:, 1:] - whole[:, :-1]
    return xp.maximum(sizes[:, 1:], sizes[:, :-1]) // 2


def polish(rows: Rows, cuts, keep_zero: bool, reach=None, best=None) -> Any:
    """Returns cuts `[R, K − 1]` moved until no combination of moves by a few single values is better.

    The first steps are so long that windows extend `reach [R, K − 1]` values to each side, or half of the longer
    interval if it is None. Rows for which `best [R]` is true are already optimal and do not change.
    """
    xp = namespace(rows.size)
    reach = _half_of_longer(rows, cuts) if reach is None else reach
    step = xp.maximum(1, -(-reach // _HALF))
    if xp is np:
        moving = np.arange(len(cuts)) if best is None else np.flatnonzero(~best)
        cuts, step = cuts.copy(), step[moving]
        for _ in range(_ROUNDS if len(moving) else 0):
            some = rows if len(moving) == len(cuts) else some_rows(rows, moving)
            cuts[moving], step, settled = _moved(some, cuts[moving], step, keep_zero)
            moving, step = moving[~settled], step[~settled]
            if not len(moving):
                break
        return cuts

    def again(state) -> Any:
        *_, settled, number = state
        return ~settled & (number < _ROUNDS)

    def once(state) -> tuple[Any, Any, jax.Array, Any]:
        cuts, step, _, number = state
        new, step, settled = _moved(rows, cuts, step, keep_zero)
        if best is None:
            return new, step, jnp.all(settled), number + 1
        return jnp.where(best[:, None], cuts, new), step, jnp.all(settled | best), number + 1

    done = jnp.zeros((), bool) if best is None else jnp.all(best)
    return lax.while_loop(again, once, (cuts, step, done, jnp.int32(0)))[0]


def _moved(rows: Rows, cuts, step, keep_zero: bool) -> tuple[Any, Any, Any]:
    """Returns the cuts moved once, by at most 16 steps each, the next steps, and `[R]` whether all cuts are settled."""
    xp = namespace(rows.size)
    size = rows.size[:, None]
    offsets = xp.arange(-_HALF, _HALF + 1, dtype=xp.int64)
    end_count, end_total = (x[:, 0] for x in rows.sums_below(size))
    end_above = _above(rows, rows.size, keep_zero)
    if keep_zero:
        end_above = xp.ones_like(end_above)
    places = xp.clip(cuts[:, :, None] + step[:, :, None] * offsets, 0, size[:, :, None])
    lower, higher = rows.before_ties(places[:, :, :_HALF]), rows.after_ties(places[:, :, _HALF + 1 :])
    places = xp.concatenate([lower, cuts[:, :, None], higher], axis=2)
    count, total = rows.sums_below(places)
    whole = xp.concatenate([xp.zeros_like(size), cuts, size], axis=1)
    n, s = rows.sums_below(whole)
    n, s = n[:, 1:] - n[:, :-1], s[:, 1:] - s[:, :-1]
    reference = s.astype(xp.float64) / xp.where(n > 0, n, 1)
    if total.dtype == xp.int64:
        reference = xp.rint(reference).astype(xp.int64)
    spacing = (reference[:, 1:] - reference[:, :-1]).astype(xp.float64)
    best_of = windows_rows if xp is np and rows.length < COMPILED else _windows_rows
    chosen = best_of(
        count, total, _above(rows, places, keep_zero), end_count, end_total, end_above, reference, spacing
    )  # fmt: skip
    chosen = _like(chosen, xp)
    new = xp.take_along_axis(places, chosen[:, :, None], axis=2)[:, :, 0]
    at_end = ((chosen == 0) | (chosen == 2 * _HALF)) & (new != cuts)
    settled = xp.all((new == cuts) & (step == 1), axis=1)
    return new, xp.where(at_end, step, xp.maximum(1, step // 4)), settled


def squared_error_bound(rows: Rows, num_levels: int, keep_zero: bool, dense_cuts: int) -> Any:
    """Returns `[R]` a lower bound on the least squared error of K levels, exact but for rounding if cells are values.

    Let c be the optimal levels and f(x) = min_j (x − c_j)². A cell of weight n, mean μ and standard deviation σ that
    holds no midpoint of neighbouring levels costs n f(μ) + n σ². One that holds the midpoint of c_j and c_{j+1} costs
    at least that less n σ (c_{j+1} − c_j), since E max(0, x − t) exceeds max(0, μ − t) by at most σ/2. A level lies
    inside its interval, so c_{j+1} − c_j is at most the sum of the extents of the two intervals. Hence no partition
    costs less than the minimum of Σ w x² − Σ (S²/n + extent · (n σ at its first cut + n σ at its last)), which the
    dense programme finds over the cells. σ is replaced by its upper bound √((max − μ)(μ − min)) (Bhatia and Davis
    2000). A bound on the effect of rounding is subtracted.
    """
    xp = namespace(rows.size)
    count = min(dense_cuts, rows.length)
    cuts = coarse_cuts(rows, count)
    n, s = rows.sums_below(cuts)
    weight, mean = (n[:, 1:] - n[:, :-1]).astype(xp.float64), (s[:, 1:] - s[:, :-1]).astype(xp.float64)
    unit = 2.0**-rows.frac
    mean = mean / xp.where(weight > 0, weight, 1.0) * unit
    above, below = rows.value_at(cuts), rows.value_at(cuts - 1)
    several = cuts[:, 1:] - cuts[:, :-1] > 1
    variance = xp.maximum(below[:, 1:] - mean, 0.0) * xp.maximum(mean - above[:, :-1], 0.0)
    loss = xp.where(several, weight * xp.sqrt(variance), 0.0) * (1 + 2.0**-40)
    # A boundary inside a cell is moved to a cut at either end of it, so its cell is one of the two next to the cut.
    zero = xp.zeros_like(loss[:, :1])
    penalty = xp.concatenate([zero, xp.maximum(loss[:, 1:], loss[:, :-1]), zero], axis=1)
    lowest, highest = rows.value_at(_shift(cuts, -1)), rows.value_at(_shift(cuts, 1) - 1)
    # An interval that became shorter when its boundaries were moved to cuts may extend into the cells next to these.
    reach = highest, lowest
    _, best = dense_rows(
        n.astype(xp.float64), s * unit, _above(rows, cuts, keep_zero), penalty, reach, num_levels=num_levels
    )
    return bound_of_sum(rows, np.asarray(best) if xp is np else best, num_levels)


def bound_of_sum(rows: Rows, least, num_levels: int) -> Any:
    """Returns `[R]` Σ w x² plus the least −Σ S²/n, minus a bound on the effect of rounding; at least 0."""
    return namespace(rows.size).maximum(rows.square + least - rounding_of_sum(rows, num_levels), 0.0)


def rounding_of_sum(rows: Rows, num_levels: int) -> Any:
    """Returns `[R]` a bound on the effect of rounding on the sum of `bound_of_sum`."""
    xp = namespace(rows.size)
    ends = rows.value_at(xp.concatenate([xp.zeros_like(rows.size[:, None]), rows.size[:, None]], axis=1))
    farthest = xp.maximum(xp.max(xp.abs(ends), axis=1) / 2, 1.0)  # `slack` is for values below 2
    return rows.square * (rows.length + num_levels + 64) * 2.0**-51 + rows.slack * farthest * farthest


def _shift(cuts, by: int) -> Any:
    """Returns the cut before (−1) or after (+1) each cut; the first and the last stay."""
    xp = namespace(cuts)
    if by < 0:
        return xp.concatenate([cuts[:, :1], cuts[:, :-1]], axis=1)
    return xp.concatenate([cuts[:, 1:], cuts[:, -1:]], axis=1)
