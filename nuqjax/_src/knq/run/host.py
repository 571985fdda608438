"""Rows fitted on the host, where NumPy sorts them much faster than XLA on a CPU, and the proof refines its bound."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.knq.rows.sorted import LONG, SortedRows, join_counts, places_of
from nuqjax._src.knq.run.error import nearest_errors
from nuqjax._src.knq.run.levels import SHORT, FitOptions, fit_sorted, host_row, ordered_rows
from nuqjax._src.knq.run.light import settled_on_host
from nuqjax._src.knq.search.search import Rows
from nuqjax._src.leaf.assign import Fit, working_dtype
from nuqjax._src.platform.host import over_blocks, x64

_LEAST, _MOST = 2**18, 2**19  # values of rows that are fitted together
_STRETCH = 2**16  # values whose errors are in memory at once


def fit_on_host(rows, weights, mask, options: FitOptions, dtype) -> Fit:
    """Fits NumPy rows `[R, N]`, with `weights` and `mask` like them or None; no row's results depend on other rows."""
    scale = _host_scale(rows, mask, dtype)
    chunk = _chunk(rows.shape[0], rows.shape[1])

    def fit_from(start) -> tuple[np.ndarray, Any, Any]:
        here = slice(start, start + chunk)
        some, heavy, counted = (None if x is None else x[here] for x in (rows, weights, mask))
        values: Any = _flushed(some)
        unit = np.ldexp(1.0, scale[here])
        with x64():  # applies to this thread only
            ordered = ordered_rows(values, dtype, unit, heavy, counted, options.keep_zero)
            levels, bound = _levels(ordered, unit, options, dtype)
            if weights is not None:
                levels = settled_on_host(values, levels, weights[here], counted, unit, options.keep_zero)
            error = _host_error(ordered, levels.astype(np.float64) / unit[:, None], options.keep_zero)
        if weights is not None:
            heaviest = _heaviest(heavy, counted)
            error, bound = error * heaviest, bound * heaviest
        return levels, error, bound

    starts = range(0, rows.shape[0], chunk)
    if len(starts) == 1:
        parts = [fit_from(0)]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            parts = list(threads.map(fit_from, starts))
    levels, error, bound = (np.concatenate(x) for x in zip(*parts, strict=True))
    return rounded_fit(levels, error, bound, np.ldexp(1.0, scale), dtype)


def fit_counted(counts: np.ndarray, length: int, options: FitOptions, values_dtype) -> Fit:
    """Fits rows of `length` 16-bit values as `fit_on_host` does, from the counts `[R, 2¹⁶]` of their bit patterns."""
    dtype = working_dtype(values_dtype)
    parts, units = [], []
    for row in counts:
        there = np.flatnonzero(row).astype(np.uint16).view(values_dtype)
        there = there if len(there) else np.zeros(1, values_dtype)
        unit = np.ldexp(1.0, _host_scale(there[None], None, dtype))
        units.append(unit)
        with x64():
            ordered = join_counts(row[None], values_dtype, length, unit, options.keep_zero)
            levels, bound = _levels(ordered, unit, options, dtype)
            error = _host_error(ordered, levels.astype(np.float64) / unit[:, None], options.keep_zero)
        parts.append((levels, error, bound))
    levels, error, bound = (np.concatenate(x) for x in zip(*parts, strict=True))
    return rounded_fit(levels, error, bound, np.concatenate(units), dtype)


def _flushed(rows) -> Any:
    """Replaces values that are subnormal in float32 or float64 by 0, as XLA does; float16 rows come back unchanged."""
    if rows.dtype == np.float16:
        return rows
    magnitude, tiny = np.abs, float(jnp.finfo(rows.dtype).tiny)
    if rows.dtype.itemsize == 2:  # NumPy is slow at bfloat16, but its bit patterns ascend with the magnitude
        magnitude, tiny = lambda values: values.view(np.uint16) & np.uint16(0x7FFF), 0x80

    def any_subnormal(some, columns) -> bool:
        size = magnitude(rows[some, columns])
        return bool(((size < tiny) & (size > 0)).any())

    if not any(over_blocks(any_subnormal, *rows.shape)):
        return rows
    return np.where(magnitude(rows) < tiny, rows.dtype.type(0), rows)


def _chunk(count: int, size: int) -> int:
    """Returns how many rows are handled at once: many, as one operation serves all, but few enough to use all cores."""
    if size > LONG:
        return 1
    each = -(-count // (os.cpu_count() or 1))
    return min(max(each, _LEAST // size), max(_MOST // size, 1)) or 1


def _levels(ordered: Rows, unit: np.ndarray, options: FitOptions, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns the levels in the units and dtype of the rows, and the bound for weights relative to the largest."""
    levels, bound = fit_sorted(ordered, options)
    return (levels * unit[:, None]).astype(dtype), bound


def rounded_fit(levels: np.ndarray, error: np.ndarray, bound: np.ndarray, unit: np.ndarray, dtype) -> Fit:
    """Returns a `Fit` in the rows' working dtype from results in float64."""
    below = np.nextafter(np.minimum(bound, error).astype(dtype), dtype.type(0))  # rounding must not raise the bound
    rounded = levels, error.astype(dtype), below, unit.astype(dtype)
    return Fit(*map(jax.device_put, rounded))  # device_put compiles nothing


def _heaviest(weights, mask) -> Any:
    """Returns `[R]` the largest weight of each row."""
    counted = weights if mask is None else np.where(mask, weights, 0)
    return counted.astype(np.float64).max(axis=1)


def _host_scale(rows, mask, dtype) -> np.ndarray:
    """Computes `[R]` the exponents of `row_scale` without compiling."""
    if rows.dtype.itemsize == 2:  # NumPy is slow at these dtypes, but their bit patterns ascend with the magnitude
        magnitude = rows.view(np.uint16) & np.uint16(0x7FFF)
        magnitude = magnitude if mask is None else np.where(mask, magnitude, 0)
        largest = magnitude.max(axis=1).view(rows.dtype).astype(dtype)
    else:
        counted = rows if mask is None else np.where(mask, rows, 0)
        largest = np.maximum(counted.max(axis=1), -counted.min(axis=1)).astype(dtype)
    limit = 1022 if dtype == np.float64 else 126
    exponent = np.clip(np.frexp(largest)[1] - 1, -limit, limit)
    return np.where(largest >= np.finfo(dtype).tiny, exponent, 0)


def _host_error(rows: Rows, levels: np.ndarray, keep_zero: bool) -> np.ndarray:
    """Computes `[R]` Σ weight (value − nearest level)²."""
    if isinstance(rows, SortedRows) and rows.length <= SHORT:
        count, weight = rows.count[: len(levels)], rows.weight
        weight = np.diff(count, axis=1).astype(np.float64) if weight is None else weight[: len(levels)]
        return nearest_errors(rows.values[: len(levels)], weight, levels)
    errors = np.empty(len(levels))
    for r, row_levels in enumerate(levels):
        row = host_row(rows, r, keep_zero)
        size = len(row.values)
        middle = (row_levels[1:] + row_levels[:-1]) / 2 * row.unit
        ends = np.concatenate([[0], places_of(row.values, middle, "right"), [size]])
        if size <= _STRETCH:
            away = row.values / row.unit - np.repeat(row_levels, np.diff(ends))
            errors[r] = (away * away if row.weight is None else away * away * row.weight).sum()
            continue

        def error(start, row=row, size=size, ends=ends, row_levels=row_levels) -> float:
            end = min(start + _STRETCH, size)
            first, last = np.searchsorted(ends[1:-1], [start, end - 1], side="right")
            away = row.values[start:end].astype(np.float64)
            away /= row.unit
            if first == last:
                away -= row_levels[first]
            else:
                away -= np.repeat(row_levels[first : last + 1], np.diff(np.clip(ends[first : last + 2], start, end)))
            away *= away
            return float((away if row.weight is None else away * row.weight[start:end]).sum())

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            errors[r] = sum(threads.map(error, range(0, size, _STRETCH)))
    return errors
