"""Narrows gaps that no interval of the best partition can cross, before rows are searched.

Next to an outlier of 10⁶ deviations, or in clusters as far apart, the costs of partitions differ by less than float64
rounds off the sums. But let U be the error of some partition, and g the gap between two neighbouring values of weights
v and w. If g² v w/(v + w) > U, the best partition has a boundary in the gap, and so has that of error U. Then its error
does not depend on g, and the gap may shrink as long as the inequality holds: the row with all such gaps narrowed has
the same best partition, of the same error. That row is searched and proven instead, and its levels are moved back. This
is repeated while it helps: the better the known partition, the narrower the gaps.

Sums are kept in units of the greatest weight · |value| that the row could have: its largest weight times its largest
magnitude. Where the largest magnitudes weigh next to nothing, that is far more than any value has, and the units are
made as fine as the row allows, whether any gap is narrowed or not.

Values that move together keep their distances to a unit in the last place. The places to which they move are computed
in integers, so the result does not depend on how this is run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.knq.rows.long import ShardedRows
from nuqjax._src.knq.rows.sorted import SortedRows, take
from nuqjax._src.knq.search.search import Partition, Rows, coarse_cuts, partition
from nuqjax._src.leaf.rows import namespace

_RESOLVED = 2.0**-26  # times the largest square and the number of values: of an error of this size rounding is 2⁻²⁶
_LOST = 2.0**-40  # times the largest square and the number of values: a price below this may be rounding alone
_SPREAD = 12  # cuts for each level, among which the widest gaps are sought
_GAIN = 8.0  # factor by which the row must shrink to make another search worth it
SEARCHES = 8  # searches of a row, at most
_STEPS = 2.0**45  # units in the longest step between stretches, at most: the places of stretches are counted in these
_FINEST = 2.0**-30  # least width of a narrowed gap, over the longest step: smaller gaps may join all 256 stretches
_LIGHT = 2.0**8  # units of sums are made finer if they become finer by so much
_MOST_FACTOR = 2.0**256  # far from overflow, even of squares
_POWERS = np.ldexp(1.0, np.arange(-1022, 1024))


class Gaps(NamedTuple):
    """Where values move: those from each of `first` up to the next move as `origin` moves to `place`.

    Attributes:
      first: `[R, K]` ascending values, at which the intervals begin.
      origin: `[R, K]` first value of the stretch to which each interval belongs.
      place: `[R, K]` where that value moves.
      factor: `[R]` a power of two by which all moved values are multiplied.
    """

    first: Any
    origin: Any
    place: Any
    factor: Any

    def narrow(self, values) -> Any:
        """Returns `[R, m]` the places to which values of the row move."""
        piece = _last_not_above(self.first, values)
        return ((values - take(self.origin, piece)) + take(self.place, piece)) * self.factor[:, None]

    def widen(self, levels) -> Any:
        """Returns `[R, m]` levels of the narrowed row moved back to the row: the inverse of `narrow`."""
        piece = _last_not_above(self.narrow(self.first), levels)
        return (levels / self.factor[:, None] - take(self.place, piece)) + take(self.origin, piece)

    def moves(self) -> Any:
        """Returns `[R]` whether values move; where none does, they are only multiplied, which rounds nothing."""
        return (self.place != self.origin).any(axis=1)


class Searched(NamedTuple):
    """The rows that were searched last, the `gaps` narrowed in them (None if there are none), and their partition."""

    rows: Rows
    gaps: Gaps | None
    found: Partition


def search_rows(rows: Rows, num_levels: int, keep_zero: bool, dense_cuts: int) -> Searched:
    """Searches the best partition of rows, with their wide gaps narrowed where rounding would hide differences.

    In `ShardedRows` no gaps are narrowed here: `run.mesh` does that from the host, if it may ask all devices.
    """
    if num_levels == 1 or rows.length <= num_levels or isinstance(rows, ShardedRows):
        return Searched(rows, None, partition(rows, num_levels, keep_zero, dense_cuts))

    def searched(gaps: Gaps) -> Partition:
        return partition(rows.with_values(gaps.narrow), num_levels, keep_zero, dense_cuts)

    gaps = no_gaps(rows, num_levels)
    if namespace(rows.size) is np:
        found, narrowed = partition(rows, num_levels, keep_zero, dense_cuts), False
        for _ in range(SEARCHES - 1):
            narrower, worth = next_gaps(rows, found, gaps, keep_zero)
            if not worth.any():
                break
            gaps, narrowed = chosen(worth, narrower, gaps), True
            found = chosen(worth, searched(gaps), found)
        return Searched(_moved(rows, gaps), gaps, found) if narrowed else Searched(rows, None, found)

    def again(state) -> Any:
        *_, worth, number = state
        return jnp.any(worth) & (number < SEARCHES)

    def once(state) -> tuple[Any, ...]:
        gaps, found, narrower, worth, number = state
        gaps = chosen(worth, narrower, gaps)
        found = chosen(worth, searched(gaps), found)
        return gaps, found, *next_gaps(rows, found, gaps, keep_zero), number + 1

    def until_settled() -> tuple[Any, Any]:
        shapes = jax.eval_shape(searched, gaps)
        nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        begin = gaps, nothing, gaps, jnp.ones(rows.size.shape, bool), jnp.int32(0)
        return lax.while_loop(again, once, begin)[:2]

    def at_once() -> tuple[Any, Partition]:  # XLA's compiler for TPUs does not take this loop
        return gaps, partition(rows, num_levels, keep_zero, dense_cuts)

    gaps, found = lax.platform_dependent(tpu=at_once, default=until_settled)
    return Searched(_moved(rows, gaps), gaps, found)


def _moved(rows: Rows, gaps: Gaps) -> Rows:
    """Returns the rows with narrowed gaps; rows without any keep their values and the rounding of their sums."""
    moved = rows.with_values(gaps.narrow)
    if not isinstance(rows, SortedRows):
        return moved
    which, xp = gaps.moves() | (gaps.factor > 1), namespace(rows.size)
    square, slack = xp.where(which, moved.square, rows.square), xp.where(which, moved.slack, rows.slack)
    return moved._replace(square=square, slack=slack)


def no_gaps(rows: Rows, num_levels: int) -> Gaps:
    """Returns the `Gaps` that move no value."""
    xp = namespace(rows.size)
    nothing = xp.zeros((rows.size.shape[0], num_levels))
    return Gaps(nothing, nothing, nothing, xp.ones(rows.size.shape[0]))


def chosen(which, one, other) -> Any:
    """Returns a tree of arrays with the rows of `one` where `which [R]` is true, and those of `other` elsewhere."""
    xp = namespace(which)
    return jax.tree.map(lambda a, b: xp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), one, other)


def next_gaps(rows: Rows, found: Partition, known: Gaps, keep_zero: bool) -> tuple[Any, Any]:
    """Returns the gaps to narrow or to multiply by more, and `[R]` whether another search with them is worth it.

    They are the gaps at the boundaries of the partition found. Where its price may be rounding alone, a partition at
    the widest gaps among cuts spread over the row is taken instead, if it is better. Where the units of the sums are
    far too coarse, the known gaps come back with finer units.
    """
    xp = namespace(rows.size)
    cuts, most = found.cuts, _most(rows, found.cuts, keep_zero)
    finer, extent = _in_units(rows, known)
    coarse = finer.factor > known.factor
    if found.price is not None:
        lost = found.price < _count(rows, keep_zero) * _LOST * (known.factor * extent) ** 2
        if xp is jnp or lost.any():
            others = _cuts_at_wide_gaps(rows, cuts.shape[1])
            theirs = _most(rows, others, keep_zero)
            better = lost & (theirs < most)
            cuts, most = xp.where(better[:, None], others, cuts), xp.where(better, theirs, most)
    unresolved = (most > 0) & (most < _count(rows, keep_zero) * _RESOLVED * extent**2)
    if xp is np and not unresolved.any():
        return finer, coarse
    gaps, next_extent = _in_units(rows, _narrowed(rows, cuts, most * (cuts.shape[1] + 1), keep_zero))
    worth = unresolved & (next_extent * _GAIN <= extent)
    return chosen(coarse, finer, gaps), coarse | worth


def _in_units(rows: Rows, gaps: Gaps) -> tuple[Gaps, Any]:
    """Returns the gaps, with a greater factor where weights allow a much greater one, and the extent of moved values.

    The extent `[R]` is a power of two near the greatest √weight · |value|, before values are multiplied by the factor.
    The rounding of costs is proportional to its square.
    """
    xp = namespace(rows.size)
    greatest = rows.greatest(gaps._replace(factor=xp.ones_like(gaps.factor)).narrow)
    if greatest is None:
        return gaps, 1 / gaps.factor
    moment, square = greatest
    factor = xp.minimum(1 / _power_of_two_or_one(moment), _MOST_FACTOR)
    factor = xp.where(factor >= _LIGHT * gaps.factor, factor, gaps.factor)
    return gaps._replace(factor=factor), _power_of_two_or_one(xp.sqrt(square))


def _count(rows: Rows, keep_zero: bool) -> int:
    """Returns the number of values of a row, counted or not, without the zeros added for `keep_zero`."""
    if not keep_zero or isinstance(rows, SortedRows):
        return rows.nominal
    return rows.nominal - (lax.axis_size(rows.axes) if isinstance(rows, ShardedRows) else 1)


def _cuts_at_wide_gaps(rows: Rows, count: int) -> Any:
    """Returns `[R, count]` ascending cuts: those with the widest gaps among cuts spread over the row."""
    xp = namespace(rows.size)
    cuts = coarse_cuts(rows, _SPREAD * (count + 1))
    gap = rows.value_at(cuts) - rows.value_at(cuts - 1)
    new = xp.concatenate([xp.zeros_like(cuts[:, :1]), cuts[:, :-1]], axis=1) < cuts
    widest = xp.argsort(xp.where(new & (cuts < rows.size[:, None]), -gap, 0.0), axis=1, stable=True)
    return xp.sort(take(cuts, widest[:, :count]), axis=1)


def _intervals(rows: Rows, cuts) -> tuple[Any, Any, Any, Any]:
    """Returns the first and the last cut of each interval, and its first and last value; each `[R, K]`."""
    xp = namespace(rows.size)
    size = rows.size[:, None]
    begin = xp.concatenate([xp.zeros_like(size), cuts], axis=1)
    end = xp.concatenate([cuts, size], axis=1)
    values = rows.value_at(xp.concatenate([begin, end - 1], axis=1))
    return begin, end, values[:, : begin.shape[1]], values[:, begin.shape[1] :]


def _most(rows: Rows, cuts, keep_zero: bool) -> Any:
    """Returns `[R]` the greatest weight · width² of the intervals between cuts: at least four times the cost of any."""
    xp = namespace(rows.size)
    begin, end, first, last = _intervals(rows, cuts)
    width = xp.where(end > begin, last - first, 0.0)
    if keep_zero:
        zero = rows.zero[:, None]
        holds_zero = (begin <= zero) & (end > zero)
        width = xp.where(holds_zero, 2 * xp.maximum(xp.abs(first), xp.abs(last)), width)
    below, through = (rows.sums_below(cuts)[0] for cuts in (begin, end))
    weight = (through - below).astype(xp.float64)
    if below.dtype != xp.int64:
        weight = weight + _count(rows, keep_zero) * 2.0**-rows.frac  # what rounding may have taken off
    return xp.max(weight * width * width, axis=1)


def _narrowed(rows: Rows, cuts, error, keep_zero: bool) -> Gaps:
    """Returns the gaps at cuts; those that no interval cheaper than `error [R]` can cross are narrowed until one could.

    `error` is at least four times the error of the partition at the cuts.
    """
    xp = namespace(rows.size)
    begin, end, first, last = _intervals(rows, cuts)
    beside = _weights_beside(rows, begin, keep_zero)
    below = xp.concatenate([first[:, :1], last[:, :-1]], axis=1)
    gap = xp.where((begin > 0) & (begin < rows.size[:, None]), first - below, 0.0)
    wide = xp.sqrt(error[:, None] / xp.where(beside > 0, beside, 1.0))
    every = xp.broadcast_to(xp.arange(begin.shape[1], dtype=xp.int64), begin.shape)

    def stretches(wide) -> tuple[np.ndarray | jax.Array, Any]:
        """Returns the first value of the stretch to which each interval belongs, and the steps between stretches."""
        starts = (beside > 0) & (gap > wide) & (end > begin)
        origin = take(first, _running_max(xp.where(starts, every, 0)))
        before = xp.concatenate([origin[:, :1], origin[:, :-1]], axis=1)
        return origin, xp.where(starts, wide + (below - before), 0.0)

    _, step = stretches(wide)
    wide = xp.maximum(wide, xp.max(step, axis=1, keepdims=True) * _FINEST)  # not lost next to the longest stretch
    origin, step = stretches(wide)
    # Each stretch begins one narrowed gap after the end of the stretch before it, in integers of a fine unit.
    unit = _power_of_two(xp.max(step, axis=1)) * (2.0 / _STEPS)
    unit = xp.where(unit > 0, unit, 1.0)[:, None]
    steps = xp.cumsum(xp.ceil(step / unit).astype(xp.int64), axis=1)
    if keep_zero:
        held_zero = xp.sum(cuts <= rows.zero[:, None], axis=1, keepdims=True)
        place = (steps - take(steps, held_zero)).astype(xp.float64) * unit + take(origin, held_zero)
    else:
        place = (steps - steps[:, -1:] // 2).astype(xp.float64) * unit
    gaps = Gaps(first, origin, place, xp.ones_like(error))
    extent = xp.max(xp.abs(gaps.narrow(xp.concatenate([first, last], axis=1))), axis=1)
    return gaps._replace(factor=1 / _power_of_two_or_one(extent))


def _weights_beside(rows: Rows, cuts, keep_zero: bool) -> Any:
    """Returns a lower bound on v w/(v + w) of the weights v and w next to each cut; a held zero is infinitely heavy."""
    xp = namespace(rows.size)
    here = rows.sums_below(cuts)[0]
    if here.dtype == xp.int64:
        above = below = xp.ones(cuts.shape)
    elif isinstance(rows, SortedRows):
        here, last = rows.mass, xp.maximum(rows.size[:, None] - 1, 0)
        below, above = (take(here, xp.clip(c, 0, last)).astype(xp.float64) * 2.0**-rows.frac for c in (cuts - 1, cuts))
        # A value is rounded by half a unit, and not at all to 0 units: by no more than its rounded weight.
        off = _count(rows, keep_zero) * 2.0**-rows.frac
        below, above = (xp.maximum(x - off, x / 2) for x in (below, above))
    else:
        below = here - rows.sums_below(rows.before_ties(xp.maximum(cuts - 1, 0)))[0]
        above = rows.sums_below(rows.after_ties(xp.minimum(cuts + 1, rows.size[:, None])))[0] - here
        off = _count(rows, keep_zero) * (2.0**-rows.frac + 2.0**-52)  # by rounding, at most
        below, above = (xp.maximum(x - off, 0.0) for x in (below, above))
    both = above + below
    harmonic = above * below / xp.where(both > 0, both, 1.0)
    if not keep_zero:
        return harmonic
    zero = rows.zero[:, None]
    return xp.where(cuts == zero, below, xp.where(cuts == zero + 1, above, harmonic))


def _power_of_two(x) -> Any:
    """Returns the largest power of two not above x, 0 for 0; by comparisons, as TPUs do not expose float64's bits."""
    xp = namespace(x)
    place = xp.searchsorted(xp.asarray(_POWERS), x, side="right")
    return xp.where(x > 0, xp.asarray(_POWERS)[xp.maximum(place - 1, 0)], 0.0)


def _power_of_two_or_one(x) -> Any:
    """Returns `_power_of_two(x)`, and 1 for 0."""
    return namespace(x).where(x > 0, _power_of_two(x), 1.0)


def _running_max(array) -> np.ndarray | jax.Array:
    if isinstance(array, np.ndarray):
        return np.maximum.accumulate(array, axis=1)
    return lax.cummax(array, axis=1)


def _last_not_above(ascending, wanted) -> np.ndarray | jax.Array:
    """Returns `[R, m]` the place of the last of `ascending [R, K]` not above each of `wanted [R, m]`, else 0."""
    inner = ascending[:, 1:]
    if isinstance(ascending, np.ndarray):
        found = [np.searchsorted(row, x, side="right") for row, x in zip(inner, wanted, strict=True)]
        return np.stack(found).astype(np.int64)
    return jax.vmap(functools.partial(jnp.searchsorted, side="right"))(inner, wanted).astype(jnp.int64)
