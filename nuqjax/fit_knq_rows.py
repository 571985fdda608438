"""Rows sorted into distinct values with exact running sums: all that the optimum of 1-D k-means depends on.

The values below any cut of a sorted row enter the cost of a partition only by their weight and their weighted sum.
These are kept as integers (values in units of 2^−frac of the row's scale), so no order of addition changes a bit of
them, and the difference of two running sums is exact.

The same rows come from `sort_on_host` (NumPy, whose sort is much faster than XLA's on a CPU) and from `sort_traced`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax


class SortedRows(NamedTuple):
    """Rows as ascending distinct values; a *cut* c parts the c smallest of them from the others.

    Attributes:
      values: `[R, D]` the distinct values over the row's scale, then repetitions of the last; float64.
      count: `[R, D + 1]` weight below each cut: int64 where all weights are 1, else float64.
      total: `[R, D + 1]` weight times value below each cut, in units of 2^−frac; of the same dtype.
      weight: `[R, D]` float64 weight of each distinct value, unrounded, over the row's largest weight; None where all
        weights are 1, and where rows are traced.
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


def sort_on_host(
    rows: np.ndarray, weights: np.ndarray | None, mask: np.ndarray | None, keep_zero: bool, sizes: Sequence[int]
) -> SortedRows:
    """Sorts rows `[R, N]`, of magnitude below 2, with NumPy; few values are extended to the next of `sizes`."""
    count, length = rows.shape
    frac = fraction_bits(length)
    parts = [
        _sort_row(rows[r], None if weights is None else weights[r], None if mask is None else mask[r], keep_zero, frac)
        for r in range(count)
    ]
    most = max(len(values) for values, *_ in parts)
    most = next((size for size in sizes if size >= most), most)
    return SortedRows(
        np.stack([_extended(values, most) for values, *_ in parts]),
        np.stack([_extended(counts, most + 1) for _, counts, *_ in parts]),
        np.stack([_extended(totals, most + 1) for _, _, totals, *_ in parts]),
        None if weights is None else np.stack([_extended(heavy, most) for _, _, _, heavy, *_ in parts]),
        np.array([len(values) for values, *_ in parts], np.int64),
        np.array([np.searchsorted(values, 0.0) for values, *_ in parts], np.int64),
        np.array([square for *_, square, _ in parts]),
        np.array([slack for *_, slack in parts]),
        frac,
    )


def _sort_row(row, weights, mask, keep_zero, frac):
    """The distinct values, their running weights and sums, their weights, Σ weight · value², and the slack."""
    if mask is not None:
        row, weights = row[mask], None if weights is None else weights[mask]
    if weights is None:
        values = np.sort(row).astype(np.float64) + 0.0  # −0 is 0
        moments = np.rint(np.ldexp(values, frac)).astype(np.int64)
        masses, slack = None, 4 * float(np.abs(values - np.ldexp(moments.astype(np.float64), -frac)).sum())
    else:
        row, weights = row[weights > 0], weights[weights > 0].astype(np.float64)
        order = np.argsort(row, kind="stable")
        values, weights = row[order].astype(np.float64) + 0.0, weights[order]
        weights = weights / np.max(weights, initial=0, keepdims=True)
        moments, masses = _weighted(np, values, weights, frac)
        slack = float(_weighted_slack(np, values, weights, moments, masses, frac))
    new = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    first = np.flatnonzero(new)
    edges = np.append(first, len(values))
    totals = np.concatenate([np.zeros(1, np.int64), np.cumsum(moments)])[edges]
    values_square = values * values
    values = values[first]
    heavy = np.add.reduceat(weights, first) if weights is not None and len(first) else weights
    if masses is None:
        counts, square = edges.astype(np.int64), float(values_square.sum())
    else:
        counts = np.ldexp(np.concatenate([np.zeros(1, np.int64), np.cumsum(masses)])[edges].astype(np.float64), -frac)
        totals = totals.astype(np.float64)
        square = float(np.dot(values_square, np.ldexp(masses.astype(np.float64), -frac)))
    zero = int(np.searchsorted(values, 0.0))
    if keep_zero and not (zero < len(values) and values[zero] == 0):
        values = np.insert(values, zero, 0.0)
        counts, totals = np.insert(counts, zero, counts[zero]), np.insert(totals, zero, totals[zero])
        heavy = None if heavy is None else np.insert(heavy, zero, 0.0)
    return values, counts, totals, heavy, square, slack


def _weighted(xp, values, shares, frac):
    """Integer moments and masses of values with weights in [0, 1]."""
    masses = xp.rint(shares * 2.0**frac)
    return xp.rint(values * masses).astype(xp.int64), masses.astype(xp.int64)


def _weighted_slack(xp, values, shares, moments, masses, frac):
    """4 Σ |error of a weight| + 4 Σ |error of a weighted value|: magnitudes are below 2, squares below 4."""
    unit = 2.0**-frac
    return 4 * xp.sum(xp.abs(shares - masses * unit) + xp.abs(values * shares - moments * unit), axis=-1)


def _extended(array: np.ndarray, length: int) -> np.ndarray:
    """An array with its last entry repeated."""
    if not len(array):
        return np.zeros(length, array.dtype)
    return np.concatenate([array, np.full(length - len(array), array[-1], array.dtype)])


def sort_traced(rows, weights, mask, keep_zero: bool) -> SortedRows:
    """Sorts rows `[R, N]`, of magnitude below 2, in JAX; to be traced where 64-bit types are enabled."""
    frac = fraction_bits(rows.shape[1])
    counted = jnp.ones(rows.shape, bool) if mask is None else mask
    if weights is not None:
        counted = counted & (weights > 0)
    keys = jnp.where(counted, lax.convert_element_type(rows, jnp.float64) + 0.0, jnp.inf)
    shares = counted.astype(jnp.float64)
    if weights is not None:
        shares = jnp.where(counted, lax.convert_element_type(weights, jnp.float64), 0.0)
        largest = jnp.max(shares, axis=1, keepdims=True, initial=0)
        shares = shares / jnp.where(largest > 0, largest, 1.0)
    if keep_zero:
        pin = jnp.zeros((rows.shape[0], 1))
        keys, shares = jnp.concatenate([keys, pin], axis=1), jnp.concatenate([shares, pin], axis=1)
    length = keys.shape[1]
    if keep_zero or weights is not None:
        values, shares = lax.sort((keys, shares), dimension=1, num_keys=1)
    else:
        values = lax.sort(keys, dimension=1)
        shares = (values < jnp.inf).astype(jnp.float64)
    there = values < jnp.inf
    values = jnp.where(there, values, 0.0)
    if weights is None:
        masses = shares.astype(jnp.int64)
        moments = jnp.rint(values * 2.0**frac).astype(jnp.int64)
        square = jnp.sum(values * values, axis=1)
        slack = 4 * jnp.sum(jnp.abs(values - moments.astype(jnp.float64) * 2.0**-frac), axis=1)
    else:
        moments, masses = _weighted(jnp, values, shares, frac)
        square = jnp.sum(values * values * (masses.astype(jnp.float64) * 2.0**-frac), axis=1)
        slack = _weighted_slack(jnp, values, shares, moments, masses, frac)
    new = there & jnp.concatenate([jnp.ones_like(there[:, :1]), values[:, 1:] != values[:, :-1]], axis=1)
    place = jnp.cumsum(new, axis=1, dtype=jnp.int32)  # of the value's run, from 1
    distinct = place[:, -1:]
    rows_index = jnp.broadcast_to(jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None], keys.shape)

    def by_run(amounts, like):  # sums of each run, then of all runs before
        runs = jnp.zeros((rows.shape[0], length + 1), like.dtype)
        runs = runs.at[rows_index, jnp.where(there, place, 0)].add(amounts, mode="promise_in_bounds")
        return jnp.cumsum(runs.at[:, 0].set(0), axis=1)

    compact = jnp.zeros(keys.shape, values.dtype)
    slot = jnp.where(new, place - 1, length)
    compact = compact.at[rows_index, slot].set(values, mode="drop")
    last = jnp.take_along_axis(compact, jnp.maximum(distinct - 1, 0), axis=1, mode="clip")
    compact = jnp.where(jnp.arange(length, dtype=jnp.int32) < distinct, compact, last)
    counts, totals = by_run(masses, masses), by_run(moments, moments)
    if weights is not None:
        counts, totals = counts.astype(jnp.float64) * 2.0**-frac, totals.astype(jnp.float64)
    there_compact = jnp.arange(length, dtype=jnp.int32) < distinct
    zero = jnp.sum(there_compact & (compact < 0), axis=1, dtype=jnp.int64)
    return SortedRows(compact, counts, totals, None, distinct[:, 0].astype(jnp.int64), zero, square, slack, frac)
