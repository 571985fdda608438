"""Sorts rows, and fits levels and a bound to sorted rows: on the host, traced, and on a mesh."""

import functools
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from nuqjax._src.knq.proof.proof import better_of, prove
from nuqjax._src.knq.proof.rows import HostRow
from nuqjax._src.knq.rows.long import LongRows, sort_long_rows
from nuqjax._src.knq.rows.sorted import LONG, SortedRows, count_rows, sort_rows
from nuqjax._src.knq.search.gaps import search_rows
from nuqjax._src.knq.search.search import (
    Partition,
    Rows,
    bound_of_sum,
    cost,
    partition_of_every_cut,
    polish,
    rounding_of_sum,
    some_rows,
    squared_error_bound,
)
from nuqjax._src.leaf.rows import namespace

# So few rows get more cuts: some five times the time (`experiments.speed.constants`), and an exact bound for rows of up
# to 1,024 values.
_FEW_ROWS = 8
_COUNTED = 2**13  # longer rows of 16-bit values are counted, not sorted
SHORT = 256  # distinct values of a row that the dense program handles and proves by itself, for any number of rows


class FitOptions(NamedTuple):
    """The options of a fit, and the number of cuts of its dense program."""

    num_levels: int
    keep_zero: bool
    tolerance: float | None
    dense_cuts: int


def dense_cuts(count: int, length: int) -> int:
    """Returns the number of cuts of the dense program: every cut of a short row, a few hundred of longer rows."""
    if count > _FEW_ROWS:
        return 256
    return 1024 if length <= 1024 else 512


def row_length(rows, axes) -> int:
    """Returns the number of values of a row, those on other devices included."""
    return rows.shape[1] * (lax.axis_size(axes) if axes else 1)


def ordered_rows(rows, dtype, unit, weights, mask, keep_zero: bool, axes=()) -> Rows:
    """Sorts rows by the method for their length and dtype; `axes` names the mesh axes that they are spread over."""
    length = row_length(rows, axes)
    if weights is None and rows.dtype.itemsize == 2 and length > _COUNTED:
        return count_rows(rows, unit, mask, keep_zero, axes)
    rows = rows if rows.dtype == dtype else rows.astype(dtype)
    if length > LONG:
        return sort_long_rows(rows, unit, weights, mask, keep_zero, axes)
    if axes:  # short enough for every device to hold it
        gather = functools.partial(lax.all_gather, axis_name=axes, axis=1, tiled=True)
        rows, weights, mask = (None if x is None else gather(x) for x in (rows, weights, mask))
    return sort_rows(rows, unit, weights, mask, keep_zero)


def fit_sorted(rows: Rows, options: FitOptions) -> tuple[Any, Any]:
    """Returns float64 levels `[R, K]` over the rows' scale, and bounds `[R]` for weights relative to the largest."""
    num_levels, keep_zero, tolerance, dense_cuts = options
    xp = namespace(rows.size)
    rows, gaps, found = search_rows(rows, num_levels, keep_zero, dense_cuts)
    cuts, bound = found.cuts, xp.zeros(found.cuts.shape[0])
    if tolerance is not None and xp is np:
        cuts, bound = _proven(rows, found, options, np.zeros(len(cuts), bool) if gaps is None else gaps.moves())
    elif tolerance is not None and found.least is None:
        bound = squared_error_bound(rows, num_levels, keep_zero, dense_cuts)
    elif tolerance is not None:
        bound = bound_of_sum(rows, found.least, num_levels)
    levels = interval_means(rows, cuts, keep_zero)
    return (levels, bound) if gaps is None else (gaps.widen(levels), bound / (gaps.factor * gaps.factor))


def _proven(rows: Rows, found: Partition, options: FitOptions, moved: np.ndarray) -> tuple[Any, Any]:
    """Returns the cuts, improved where a proof finds better ones, and the bounds; for rows on the host.

    `moved [R]` is whether `search.gaps` moved values.

    A search through every cut mostly is a proof by itself. Sorted rows whose search used only some of the cuts are
    searched through every cut here. Rows that are still unproven, and longer rows, are proven by branch and bound.
    """
    num_levels, keep_zero, tolerance, _ = options
    assert tolerance is not None
    cuts, least, price = found
    if num_levels == 1 and isinstance(rows, SortedRows):  # there is only one partition
        least = cost(rows, cuts, keep_zero)
    bound = np.zeros(len(cuts)) if least is None else bound_of_sum(rows, least, num_levels)

    def unproven() -> np.ndarray:
        if not isinstance(rows, SortedRows):
            return np.flatnonzero(rows.size > num_levels)
        most = rows.square + cost(rows, cuts, keep_zero) + rounding_of_sum(rows, num_levels)
        return np.flatnonzero((rows.size > num_levels) & (bound < most * (1 - tolerance)))  # the rest: no error

    left = unproven()
    if len(left) and least is None and price is not None and isinstance(rows, SortedRows):
        cuts, bound = cuts.copy(), bound.copy()
        some = some_rows(rows, left)
        other = partition_of_every_cut(some, num_levels, keep_zero, price[left])
        gained = cost(some, cuts[left], keep_zero) - cost(some, other.cuts, keep_zero)
        better = gained > rounding_of_sum(some, num_levels)  # if equal, the search's cuts stay
        cuts[left] = np.where(better[:, None], polish(some, other.cuts, keep_zero), cuts[left])
        bound[left], price[left] = bound_of_sum(some, other.least, num_levels), other.price
        left = unproven()
    if len(left):
        cuts, bound = cuts.copy(), bound.copy()
        to_prove = [host_row(rows, r, keep_zero)._replace(moved=bool(moved[r])) for r in left.tolist()]
        better, proven = prove(to_prove, cuts[left], num_levels, tolerance, None if price is None else price[left])
        bound[left] = np.maximum(bound[left], proven)
        changed = np.flatnonzero((better != cuts[left]).any(axis=1))
        if len(changed):
            polished = polish(some_rows(rows, left[changed]), better[changed], keep_zero)
            for r, near in zip(changed.tolist(), polished, strict=True):
                # The search reads values and weights from rounded sums, the proof reads them unrounded.
                cuts[left[r]] = better_of(to_prove[r], near, better[r])
    return cuts, bound


def host_row(rows: Rows, r: int, keep_zero: bool) -> HostRow:
    """Returns row number `r` of rows on the host: the values that count and their weights."""
    zero, size = int(rows.zero[r]) if keep_zero else None, int(rows.size[r])
    if isinstance(rows, SortedRows):
        if rows.weight is not None:
            weight = rows.weight[r, :size]
        else:
            weight = np.diff(rows.count[r, : size + 1]).astype(np.float64)
        return HostRow(rows.values[r, :size], 1.0, weight, zero)
    assert isinstance(rows, LongRows)  # rows of other types are never on the host
    weight = None if rows.shares is None else rows.shares[r, :size]
    if rows.shares is None and rows.added_zero:
        weight = np.ones(size)
        weight[zero] = 0.0
    return HostRow(rows.values[r, :size], float(rows.unit[r]), weight, zero)


def interval_means(rows: Rows, cuts, keep_zero: bool) -> Any:
    """Returns the ascending means of the intervals; empty intervals repeat the last mean."""
    xp = namespace(rows.size)
    size = rows.size[:, None]
    whole = xp.concatenate([xp.zeros_like(size), cuts, size], axis=1)
    n, s = rows.sums_below(whole)
    n, s = (n[:, 1:] - n[:, :-1]).astype(xp.float64), (s[:, 1:] - s[:, :-1]).astype(xp.float64)
    least, most = rows.value_at(whole[:, :-1]), rows.value_at(whole[:, 1:] - 1)
    mean = xp.clip(s / xp.where(n > 0, n, 1.0) * 2.0**-rows.frac, least, most)
    there = whole[:, 1:] > whole[:, :-1]
    if keep_zero:
        above_zero = whole > rows.zero[:, None]
        first, end = above_zero[:, :-1], xp.concatenate([above_zero[:, 1:-1], xp.ones_like(above_zero[:, :1])], axis=1)
        mean, there = xp.where(~first & end, 0.0, mean), there | (~first & end)
    levels = xp.sort(xp.where(there, mean, xp.inf), axis=1)
    highest = xp.max(xp.where(xp.isfinite(levels), levels, -xp.inf), axis=1, keepdims=True)
    highest = xp.where(xp.isfinite(highest), highest, 0.0)
    return xp.where(xp.isfinite(levels), levels, highest)
