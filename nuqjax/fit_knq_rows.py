"""Rows sorted into distinct values with exact running sums: all that the optimum of 1-D k-means depends on.

The values below any cut of a sorted row enter the cost of a partition only by their weight and their weighted sum.
These are kept as integers (values in units of 2^−frac of the row's scale), so no order of addition changes a bit of
them, and the difference of two running sums is exact.

The same code runs on NumPy arrays, whose sort is much faster than XLA's on a CPU, and on JAX's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax.rows import namespace


class SortedRows(NamedTuple):
    """Rows as ascending distinct values; a *cut* c parts the c smallest of them from the others.

    Attributes:
      values: `[R, D]` the distinct values over the row's scale, then repetitions of the last; float64.
      count: `[R, D + 1]` weight below each cut: int64 where all weights are 1, else float64.
      total: `[R, D + 1]` weight times value below each cut, in units of 2^−frac; of the same dtype.
      weight: `[R, D]` float64 weight of each distinct value, unrounded, over the row's largest weight; None where all
        weights are 1, and of JAX rows.
      distinct: `[R]` int64 number of distinct values, so the last cut.
      zero: `[R]` int64 cut just below the value zero, which is there (maybe of weight 0) where a level is pinned to it.
      square: `[R]` float64 Σ weight · value².
      slack: `[R]` float64 how much rounding to units may change the squared error of any partition.
      frac: fraction bits of `total`.
    """

    values: Any
    count: Any
    total: Any
    weight: Any
    distinct: Any
    zero: Any
    square: Any
    slack: Any
    frac: int


def fraction_bits(length: int) -> int:
    """Bits after the point so that twice a sum of `length` values below 2 stays inside int64; at most float64's own."""
    return min(50, 58 - max(length, 1).bit_length())


def sort_rows(
    rows: Any, scale: Any, weights: Any | None, mask: Any | None, keep_zero: bool, sizes: Sequence[int] = ()
) -> SortedRows:
    """Sorts rows `[R, N]` and joins equal values; to be called, or traced, where 64-bit types are enabled.

    Args:
      rows: float32 or float64, NumPy or JAX.
      scale: `[R]` float64, powers of two near the rows' largest magnitudes.
      weights: `[R, N]` non-negative, or None for 1 each.
      mask: `[R, N]` bool, or None.
      keep_zero: adds the value zero to each row, with weight 0.
      sizes: of NumPy rows, few distinct values are extended to the next of these.
    """
    xp = namespace(rows)
    count, length = rows.shape
    frac = fraction_bits(length)
    counted = mask
    if weights is not None:
        counted = weights > 0 if mask is None else mask & (weights > 0)
    keys, shares = rows if counted is None else xp.where(counted, rows, xp.inf), None
    if weights is not None:
        shares = xp.where(counted, weights, 0).astype(xp.float64)
        largest = xp.max(shares, axis=1, keepdims=True)
        shares = shares / xp.where(largest > 0, largest, 1.0)
    elif keep_zero:
        shares = xp.ones(rows.shape) if counted is None else counted.astype(xp.float64)
    if keep_zero:
        pin = xp.zeros((count, 1), keys.dtype)
        keys, shares = xp.concatenate([keys, pin], axis=1), xp.concatenate([shares, pin.astype(xp.float64)], axis=1)
    keys, shares = _sorted(keys, shares)
    there = keys < xp.inf
    values = xp.where(there, keys, 0).astype(xp.float64) / scale[:, None] + 0.0  # −0 is 0
    if weights is None:
        masses, heavy = None, there
        moments = xp.rint(values * 2.0**frac).astype(xp.int64)
        if shares is not None:
            masses, heavy = shares.astype(xp.int64), shares
            moments = moments * masses
        off = xp.abs(values - moments.astype(xp.float64) * 2.0**-frac)
    else:
        assert shares is not None
        rounded = xp.rint(shares * 2.0**frac)
        masses, moments = rounded.astype(xp.int64), xp.rint(values * rounded).astype(xp.int64)
        heavy = rounded * 2.0**-frac
        off = xp.abs(shares - heavy) + xp.abs(values * shares - moments.astype(xp.float64) * 2.0**-frac)
    square = xp.sum(_rounded(values * values * heavy), axis=1)
    slack = 4 * xp.sum(_rounded(off), axis=1)  # magnitudes are below 2, squares below 4

    new = there & xp.concatenate([xp.ones_like(there[:, :1]), keys[:, 1:] != keys[:, :-1]], axis=1)
    distinct = xp.sum(new, axis=1, dtype=xp.int64)
    most = keys.shape[1]
    if xp is np:
        most = max(int(distinct.max()), 1)
        most = next((size for size in sizes if size >= most), most)
    first = _first_places(new, xp.sum(there, axis=1, dtype=xp.int64), most)

    def below(amounts):  # their running sums at the first of each distinct value
        running = xp.concatenate([xp.zeros_like(amounts[:, :1]), xp.cumsum(amounts, axis=1)], axis=1)
        return _take(running, first)

    counts, totals, run_weight = first if masses is None else below(masses), below(moments), None
    if weights is not None:
        counts, totals = counts.astype(xp.float64) * 2.0**-frac, totals.astype(xp.float64)
        if xp is np:
            run_weight = _run_sums(shares, new, most)
    last = xp.maximum(distinct[:, None] - 1, 0)
    values = _take(values, _take(first, xp.minimum(xp.arange(most, dtype=xp.int64), last)))
    zero = xp.sum((values < 0) & (xp.arange(most, dtype=xp.int64) < distinct[:, None]), axis=1, dtype=xp.int64)
    return SortedRows(values, counts, totals, run_weight, distinct, zero, square, slack, frac)


def _rounded(terms):
    """Terms that are rounded before they are added up."""
    return terms if isinstance(terms, np.ndarray) else lax.optimization_barrier(terms)


def _sorted(keys, shares):
    """Ascending keys, and the shares in their order."""
    if isinstance(keys, np.ndarray):
        if shares is None:
            return np.sort(keys, axis=1), None
        order = np.argsort(keys, axis=1, kind="stable")
        return np.take_along_axis(keys, order, axis=1), np.take_along_axis(shares, order, axis=1)
    if shares is None:
        return lax.sort(keys, dimension=1), None
    return lax.sort((keys, shares), dimension=1, num_keys=1)


def _first_places(new, end, most: int):
    """`[R, most + 1]` the places at which distinct values begin, then the end of the row."""
    if isinstance(new, np.ndarray):
        places = np.broadcast_to(end[:, None], (len(end), most + 1)).copy()
        row, place = np.nonzero(new)
        before = np.cumsum(new.sum(axis=1)) - new.sum(axis=1)
        places[row, np.arange(len(row)) - before[row]] = place
        return places
    length = new.shape[1]
    slot = jnp.where(new, jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1, most + 1)
    row = jnp.broadcast_to(jnp.arange(new.shape[0], dtype=jnp.int32)[:, None], new.shape)
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int64), new.shape)
    places = jnp.broadcast_to(end[:, None], (new.shape[0], most + 1))
    return places.at[row, slot].set(place, mode="drop")


def _run_sums(amounts, new, most: int):
    """`[R, most]` sums over runs of equal values."""
    sums = np.zeros((len(new), most))
    row, place = np.nonzero(new)
    if len(row):
        before = np.cumsum(new.sum(axis=1)) - new.sum(axis=1)
        sums[row, np.arange(len(row)) - before[row]] = np.add.reduceat(amounts.ravel(), row * new.shape[1] + place)
    return sums


def _take(array, index):
    if isinstance(array, np.ndarray):
        return np.take_along_axis(array, np.minimum(index, array.shape[1] - 1), axis=1)
    return jnp.take_along_axis(array, jnp.minimum(index, array.shape[1] - 1).astype(jnp.int32), axis=1, mode="clip")
