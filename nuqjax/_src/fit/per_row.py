"""Searches each row for what fits it best: rows are sorted, or long ones made histograms, in units of their scale."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.leaf.assign import row_scale, working_dtype
from nuqjax._src.leaf.rows import namespace
from nuqjax._src.platform.host import BLOCK, flushed, over_blocks, x64

_BINS = 4096  # longer rows are searched as a histogram of so many bins
_BATCH_VALUES = 2**20  # values searched at once: this bounds the memory
_EQUAL = 2.0**-40  # relative difference of errors up to which they count as equal


def mass_of(rows, weights, mask) -> Any:
    """Returns `[R, N]` the weight of each value, zero where it does not count."""
    xp = namespace(rows)
    mass = xp.ones(rows.shape, working_dtype(rows.dtype)) if weights is None else weights
    return mass if mask is None else xp.where(mask, mass, 0)


def per_row(best: Callable, rows, weights, mask) -> Any:
    """Returns `[R]` what `best(values, mass, largest)` finds for each row, in float64 in units of the row's scale.

    Long rows are searched as histograms, by the means and weights of their bins. Short rows are sorted, so that sums do
    not depend on the order of values. With JAX `best` gets one row at a time, with NumPy `[r, n]`, and None for equal
    masses.
    """
    if isinstance(rows, np.ndarray):
        return _per_row_on_host(best, rows, weights, mask)
    dtype = working_dtype(rows.dtype)
    scale = row_scale(rows, mask)
    mass = mass_of(rows, weights, mask).astype(dtype)
    if weights is not None:
        mass = mass / row_scale(mass)[:, None]
    values = jnp.where(mass > 0, rows.astype(dtype), 0) / scale[:, None]
    if rows.shape[-1] <= _BINS:
        values, mass = lax.sort((values, mass), num_keys=2)
    batch = max(1, _BATCH_VALUES // max(1, min(rows.shape[-1], _BINS)))

    def one(row) -> Any:
        values, mass = row[0].astype(jnp.float64), row[1].astype(jnp.float64)
        largest = jnp.max(jnp.abs(values), initial=0)
        if values.shape[0] > _BINS:
            values, mass = _histogram(values, mass, largest)
        return best(values, mass, largest).astype(dtype)

    with x64():
        found = lax.map(one, (values, mass), batch_size=min(batch, rows.shape[0])) if rows.shape[0] else scale
    return found.astype(dtype) * scale


def _per_row_on_host(best: Callable, rows, weights, mask) -> np.ndarray:
    """Computes `per_row` for NumPy rows."""
    dtype = working_dtype(rows.dtype)
    if not rows.shape[1]:
        rows, weights, mask = np.zeros((len(rows), 1), dtype), None, None  # rows without values are fitted as zeros
    count, length = rows.shape
    scale = row_scale(rows, mask)
    heaviest: Any = None if weights is None else row_scale(weights, mask)
    found = np.empty(count, dtype)

    def part(some, columns) -> tuple[Any, Any]:
        """Returns values and masses in units of their scales; None for the masses if all are equal."""
        values, mass = flushed(rows[some, columns].astype(dtype)), None
        if mask is not None:
            mass = mask[some, columns].astype(dtype)
        if weights is not None:
            weight = weights[some, columns].astype(dtype) / heaviest[some, None]
            mass = flushed(weight if mass is None else weight * mass)
        values = values if mass is None else np.where(mass > 0, values, 0)
        return values / scale[some, None], mass

    def fit_block(some, columns) -> None:
        if length > _BINS:
            found[some] = best(*_histogram_on_host(partial(part, some), length))
            return
        values, mass = part(some, columns)
        if mass is None:
            values.sort(axis=-1)
        else:
            values, mass = sorted_pairs(values, mass)
            mass = mass.astype(np.float64)
        values = values.astype(np.float64)
        found[some] = best(values, mass, np.abs(values).max(axis=-1, keepdims=True))

    over_blocks(fit_block, count, length, length if length > _BINS else BLOCK)
    with np.errstate(over="ignore"):  # a step may exceed every value: see `_grid_levels`
        return flushed(found * scale)


def sorted_pairs(values, mass) -> tuple[Any, ...]:
    """Returns rows `[r, n]` sorted by value, and equal values by mass, in ascending order."""
    if values.dtype != np.float32:
        order = np.lexsort((mass, values), axis=-1)
        return tuple(np.take_along_axis(x, order, axis=-1) for x in (values, mass))
    sortable = lambda bits: bits ^ ((bits >> 31) & 0x7FFFFFFF)  # noqa: E731
    values = values + np.float32(0)  # no negative zeros
    pairs = sortable(values.view(np.int32)).astype(np.int64) << 32 | mass.view(np.int32)  # masses have no sign
    pairs.sort(axis=-1)
    return sortable((pairs >> 32).astype(np.int32)).view(np.float32), pairs.astype(np.int32).view(np.float32)


def _histogram_on_host(part: Callable, length: int) -> tuple[Any, Any, np.ndarray]:
    """Returns `_histogram` of one NumPy row, read by `part(columns) -> (values, mass)`, and the largest magnitude."""
    unit = 2.0**30

    def most(_, columns) -> Any:
        return np.abs(part(columns)[0]).max()

    largest = np.float64(max(over_blocks(most, 1, length)))
    width = (largest if largest > 0 else 1.0) * (2 / _BINS)

    def sums(_, columns) -> tuple[np.ndarray, np.ndarray]:
        values, mass = part(columns)
        values = values[0].astype(np.float64)
        bins = np.clip((values * (1 / width)).astype(np.intp) + _BINS // 2 - (values < 0), 0, _BINS - 1)
        total = lambda amount: np.bincount(bins, np.rint(amount * unit), _BINS).astype(np.int64)  # noqa: E731
        if mass is None:
            return np.bincount(bins, minlength=_BINS) << 30, total(values)
        mass = mass[0].astype(np.float64)
        return total(mass), total(mass * values)

    weight, moment = (np.sum(x, axis=0) / unit for x in zip(*over_blocks(sums, 1, length), strict=True))
    edges = (np.arange(_BINS) - _BINS // 2) * width
    means = np.clip(moment / np.where(weight > 0, weight, 1), edges, edges + width)
    return means[None], weight[None], largest.reshape(1, 1)


def _histogram(values, mass, largest) -> tuple[jax.Array, jax.Array]:
    """Returns means and weights of the bins; summed as integers, so that the order of summation does not matter."""
    unit = 2.0**30
    width = jnp.where(largest > 0, largest, 1) * (2 / _BINS)
    bins = jnp.clip((values * (1 / width)).astype(jnp.int32) + _BINS // 2 - (values < 0), 0, _BINS - 1)

    def total(amount) -> jax.Array:
        whole = jnp.round(amount * unit).astype(jnp.int64)
        whole = jnp.zeros(_BINS, jnp.int64).at[bins].add(whole, mode="promise_in_bounds")
        return whole.astype(jnp.float64) / unit

    weight, moment = total(mass), total(mass * values)
    edges = (jnp.arange(_BINS, dtype=jnp.int32) - _BINS // 2) * width
    # The mean of values of very small weight may be rounding alone, so it is clipped to the bin.
    return jnp.clip(moment / jnp.where(weight > 0, weight, 1), edges, edges + width), weight


def of_least(option: Callable, begin, end, values) -> Any:
    """Returns the result of the first option of least error, of `option(i) -> (error, result)` for begin ≤ i < end.

    Errors count as equal if they may differ by rounding alone, which depends on the order of a sum.
    """
    xp = namespace(values)

    def visit(i, best) -> tuple[Any, Any]:
        error, result = option(i)
        better = error < best[0] - _EQUAL * xp.abs(best[0])
        return xp.where(better, error, best[0]), xp.where(better, result, best[1])

    none = np.finfo(np.float64).max
    if xp is jnp:
        return lax.fori_loop(begin, end, visit, (jnp.array(none, values.dtype), jnp.array(0, values.dtype)))[1]
    best = np.full(len(values), none), np.zeros(len(values))
    for i in range(begin, end):
        best = visit(i, best)
    return best[1]


def squared_error(values, mass, nearest) -> Any:
    square = (values - nearest) ** 2
    return (square if mass is None else mass * square).sum(axis=-1)
