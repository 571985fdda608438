"""Gaps too wide for an interval of the best partition to reach over are narrowed before rows are searched.

Beside an outlier of 10⁶ deviations, or in clusters as far apart, what decides between partitions is smaller than what
float64 rounds off the sums. But let U be the error of some partition, and g the gap between two neighbouring values of
weights v and w. If g² v w/(v + w) > U, the best partition has a boundary in the gap (and so has that of error U), and
then its error does not depend on g. So the gap may shrink as long as the line holds: the row with all such gaps
narrowed has the same best partition, of the same error. It is searched and proven in place of the row, and its levels
are moved back. This is repeated while it helps: the better the partition known, the narrower the gaps.

What is moved keeps its own distances to a unit in the last place, and where to is computed in integers, so that all
ways to run this agree.
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

_RESOLVED = 2.0**-26  # of the largest square, times the number of values: rounding is 2⁻²⁶ of an error as large
_LOST = 2.0**-40  # of the largest square, times the number of values: a price below may be rounding alone
_SPREAD = 12  # cuts among which the widest gaps are looked for, a level
_GAIN = 8.0  # by which the row must shrink for another search to be worth it
SEARCHES = 8  # of a row, at most
_STEPS = 2.0**45  # in which the place of a stretch is counted from the last
_FINEST = 2.0**-30  # of the longest step, a narrowed gap: all 256 stretches may be joined to one over such gaps
_POWERS = np.ldexp(1.0, np.arange(-1022, 1024))


class Gaps(NamedTuple):
    """Where values are moved to: those from each of `first` to the next from `origin` to `place`.

    Attributes:
      first: `[R, K]` ascending values.
      origin: `[R, K]`.
      place: `[R, K]`.
      factor: `[R]` a power of two by which all is multiplied in the end.
    """

    first: Any
    origin: Any
    place: Any
    factor: Any

    def narrow(self, values):
        """`[R, m]` where values are moved to."""
        piece = _last_not_above(self.first, values)
        return ((values - take(self.origin, piece)) + take(self.place, piece)) * self.factor[:, None]

    def widen(self, levels):
        """The inverse."""
        piece = _last_not_above(self.narrow(self.first), levels)
        return (levels / self.factor[:, None] - take(self.place, piece)) + take(self.origin, piece)


class Searched(NamedTuple):
    """The rows that were searched last, their gaps narrowed by `gaps`, None if none is, and their partition."""

    rows: Rows
    gaps: Gaps | None
    found: Partition


def search(rows: Rows, num_levels: int, keep_zero: bool, dense_cuts: int) -> Searched:
    """Searches the best partition of rows, with their wide gaps narrowed where that changes what can be resolved.

    Not of `ShardedRows`: `run.mesh` decides about these on the host, if that may ask all devices.
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

    def again(state):
        *_, worth, number = state
        return jnp.any(worth) & (number < SEARCHES)

    def once(state):
        gaps, found, narrower, worth, number = state
        gaps = chosen(worth, narrower, gaps)
        found = chosen(worth, searched(gaps), found)
        return gaps, found, *next_gaps(rows, found, gaps, keep_zero), number + 1

    def until_settled():
        shapes = jax.eval_shape(searched, gaps)
        nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        begin = gaps, nothing, gaps, jnp.ones(rows.size.shape, bool), jnp.int32(0)
        return lax.while_loop(again, once, begin)[:2]

    def at_once():  # XLA's compiler for TPUs does not take this loop
        return gaps, partition(rows, num_levels, keep_zero, dense_cuts)

    gaps, found = lax.platform_dependent(tpu=at_once, default=until_settled)
    return Searched(_moved(rows, gaps), gaps, found)


def _moved(rows: Rows, gaps: Gaps) -> Rows:
    """The rows with narrowed gaps; those without any as they were, also in how their sums were rounded."""
    moved = rows.with_values(gaps.narrow)
    if not isinstance(rows, SortedRows):
        return moved
    which, xp = gaps.factor > 1, namespace(rows.size)
    square, slack = xp.where(which, moved.square, rows.square), xp.where(which, moved.slack, rows.slack)
    return moved._replace(square=square, slack=slack)


def no_gaps(rows: Rows, num_levels: int) -> Gaps:
    """Values stay where they are."""
    xp = namespace(rows.size)
    nothing = xp.zeros((rows.size.shape[0], num_levels))
    return Gaps(nothing, nothing, nothing, xp.ones(rows.size.shape[0]))


def chosen(which, one, other):
    """The rows of one tree of arrays where `which [R]`, else those of another."""
    xp = namespace(which)
    return jax.tree.map(lambda a, b: xp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), one, other)


def next_gaps(rows: Rows, found: Partition, known: Gaps, keep_zero: bool):
    """The gaps to narrow, and `[R]` whether it is worth to search again with these.

    They are those that a partition leaves: the one found, or, where its price may be no more than rounding, one at the
    widest gaps of cuts spread over the row, if that is better.
    """
    xp = namespace(rows.size)
    cuts, most = found.cuts, _most(rows, found.cuts, keep_zero)
    if found.price is not None:
        lost = found.price < _count(rows, keep_zero) * _LOST
        if xp is jnp or lost.any():
            others = _cuts_at_wide_gaps(rows, cuts.shape[1])
            theirs = _most(rows, others, keep_zero)
            better = lost & (theirs < most)
            cuts, most = xp.where(better[:, None], others, cuts), xp.where(better, theirs, most)
    unresolved = (most > 0) & (most * known.factor * known.factor < _count(rows, keep_zero) * _RESOLVED)
    if xp is np and not unresolved.any():
        return known, unresolved
    gaps = _narrowed(rows, cuts, most * (cuts.shape[1] + 1), keep_zero)
    return gaps, unresolved & (gaps.factor >= _GAIN * known.factor)


def _count(rows: Rows, keep_zero: bool) -> int:
    """The number of values of a row, counted or not, without the zeros that were put there to be held."""
    if not keep_zero or isinstance(rows, SortedRows):
        return rows.nominal
    return rows.nominal - (lax.axis_size(rows.axes) if isinstance(rows, ShardedRows) else 1)


def _cuts_at_wide_gaps(rows: Rows, count: int):
    """`[R, count]` ascending cuts: of some spread over the row those with the widest gaps."""
    xp = namespace(rows.size)
    cuts = coarse_cuts(rows, _SPREAD * (count + 1))
    gap = rows.value_at(cuts) - rows.value_at(cuts - 1)
    new = xp.concatenate([xp.zeros_like(cuts[:, :1]), cuts[:, :-1]], axis=1) < cuts
    widest = xp.argsort(xp.where(new & (cuts < rows.size[:, None]), -gap, 0.0), axis=1, stable=True)
    return xp.sort(take(cuts, widest[:, :count]), axis=1)


def _intervals(rows: Rows, cuts):
    """`[R, K]` the first and the last cut of each interval, and the first and the last value."""
    xp = namespace(rows.size)
    size = rows.size[:, None]
    begin = xp.concatenate([xp.zeros_like(size), cuts], axis=1)
    end = xp.concatenate([cuts, size], axis=1)
    values = rows.value_at(xp.concatenate([begin, end - 1], axis=1))
    return begin, end, values[:, : begin.shape[1]], values[:, begin.shape[1] :]


def _most(rows: Rows, cuts, keep_zero: bool):
    """`[R]` four times as much as any interval between the cuts costs, at least: its weight times its width squared."""
    xp = namespace(rows.size)
    begin, end, first, last = _intervals(rows, cuts)
    width = xp.where(end > begin, last - first, 0.0)
    if keep_zero:
        zero = rows.zero[:, None]
        pinned = (begin <= zero) & (end > zero)
        width = xp.where(pinned, 2 * xp.maximum(xp.abs(first), xp.abs(last)), width)
    below, through = (rows.sums_below(cuts)[0] for cuts in (begin, end))
    weight = (through - below).astype(xp.float64)
    if below.dtype != xp.int64:
        weight = weight + _count(rows, keep_zero) * 2.0**-rows.frac  # what rounding may have taken
    return xp.max(weight * width * width, axis=1)


def _narrowed(rows: Rows, cuts, error, keep_zero: bool) -> Gaps:
    """The gaps at cuts, those narrowed over which no interval reaches that costs less than `error [R]` / 4."""
    xp = namespace(rows.size)
    begin, end, first, last = _intervals(rows, cuts)
    beside = _weights_beside(rows, begin, keep_zero)
    below = xp.concatenate([first[:, :1], last[:, :-1]], axis=1)
    gap = xp.where((begin > 0) & (begin < rows.size[:, None]), first - below, 0.0)
    wide = xp.sqrt(error[:, None] / xp.where(beside > 0, beside, 1.0))
    every = xp.broadcast_to(xp.arange(begin.shape[1], dtype=xp.int64), begin.shape)

    def stretches(wide):
        """Where stretches start, the first value of that to which each interval belongs, and the steps between."""
        starts = (beside > 0) & (gap > wide) & (end > begin)
        origin = take(first, _running_max(xp.where(starts, every, 0)))
        before = xp.concatenate([origin[:, :1], origin[:, :-1]], axis=1)
        return origin, xp.where(starts, wide + (below - before), 0.0)

    _, step = stretches(wide)
    wide = xp.maximum(wide, xp.max(step, axis=1, keepdims=True) * _FINEST)  # not lost beside the longest stretch
    origin, step = stretches(wide)
    # Each stretch begins a narrowed gap behind the last one's end, in integers of a fine unit.
    unit = _power_of_two(xp.max(step, axis=1)) * (2.0 / _STEPS)
    unit = xp.where(unit > 0, unit, 1.0)[:, None]
    steps = xp.cumsum(xp.ceil(step / unit).astype(xp.int64), axis=1)
    if keep_zero:
        pin = xp.sum(cuts <= rows.zero[:, None], axis=1, keepdims=True)
        place = (steps - take(steps, pin)).astype(xp.float64) * unit + take(origin, pin)
    else:
        place = (steps - steps[:, -1:] // 2).astype(xp.float64) * unit
    gaps = Gaps(first, origin, place, xp.ones_like(error))
    extent = xp.max(xp.abs(gaps.narrow(xp.concatenate([first, last], axis=1))), axis=1)
    return gaps._replace(factor=1 / xp.where(extent > 0, _power_of_two(extent), 1.0))


def _weights_beside(rows: Rows, cuts, keep_zero: bool):
    """At least v w/(v + w) of the values of weights v and w beside each cut; a pinned zero weighs infinitely much."""
    xp = namespace(rows.size)
    here = rows.sums_below(cuts)[0]
    if here.dtype == xp.int64:
        above = below = xp.ones(cuts.shape)
    else:
        below = here - rows.sums_below(rows.before_ties(xp.maximum(cuts - 1, 0)))[0]
        above = rows.sums_below(rows.after_ties(xp.minimum(cuts + 1, rows.size[:, None])))[0] - here
        off = _count(rows, keep_zero) * (2.0**-rows.frac + 2.0**-52)  # at most, by rounding
        below, above = (xp.maximum(x - off, 0.0) for x in (below, above))
    both = above + below
    harmonic = above * below / xp.where(both > 0, both, 1.0)
    if not keep_zero:
        return harmonic
    zero = rows.zero[:, None]
    return xp.where(cuts == zero, below, xp.where(cuts == zero + 1, above, harmonic))


def _power_of_two(x):
    """The largest power of two not above a number; 0 of 0. By comparisons, as TPUs have no bits of float64."""
    xp = namespace(x)
    place = xp.searchsorted(xp.asarray(_POWERS), x, side="right")
    return xp.where(x > 0, xp.asarray(_POWERS)[xp.maximum(place - 1, 0)], 0.0)


def _running_max(array):
    if isinstance(array, np.ndarray):
        return np.maximum.accumulate(array, axis=1)
    return lax.cummax(array, axis=1)


def _last_not_above(ascending, wanted):
    """`[R, m]` the place of the last of `ascending [R, K]` not above each of `wanted [R, m]`; 0 if all are."""
    inner = ascending[:, 1:]
    if isinstance(ascending, np.ndarray):
        found = [np.searchsorted(row, x, side="right") for row, x in zip(inner, wanted, strict=True)]
        return np.stack(found).astype(np.int64)
    return jax.vmap(functools.partial(jnp.searchsorted, side="right"))(inner, wanted).astype(jnp.int64)
