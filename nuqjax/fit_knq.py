"""KNQ: the levels of least squared error: one-dimensional k-means by dynamic programming.

In one dimension the clusters of an optimal k-means are intervals of the sorted values, so the problem is to part a
sorted row into K intervals (Wu 1991; Grønlund et al., arXiv 1701.07204). `fit_knq_rows` sorts a row into distinct
values with exact running sums (`fit_knq_long` a long one, `count_rows` one of 16-bit values), `fit_knq_search` finds a
partition, `fit_knq_proof` bounds from below what any other could cost, and here it becomes levels: each the mean of its
interval, rounded once.

A row with no more distinct values than the dense programme has cuts (512, or 1024 if it is no longer than that; 256
where there are more than eight rows) is solved exactly. Another is searched from coarse cells down to single values,
wherever a best path may still pass; `python -m experiments.optimality` compares that with the proof. With a `tolerance`
the proof follows, by branch and bound, until the levels are known to be within it of the optimum, and takes better ones
where it comes upon them. Under `jit` the levels are the same, but the bound of a long row is one round only, as coarse
as some hundred cells.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from nuqjax.assign import Fit, distortion, row_scale, working_dtype
from nuqjax.fit_knq_error import nearest_errors
from nuqjax.fit_knq_long import LongRows, sort_long_rows
from nuqjax.fit_knq_proof import Row, prove
from nuqjax.fit_knq_rows import LONG, SortedRows, count_rows, sort_rows
from nuqjax.fit_knq_search import Rows, bound_of_sum, partition, polish, squared_error_bound
from nuqjax.rows import namespace, on_mesh

_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # of rows with few distinct values: few shapes to compile
_FEW_ROWS = 8
_STRETCH = 2**16  # values whose errors are held at once
_COUNTED = 2**13  # longer rows of 16-bit values are counted, not sorted
_SHORT = 256  # distinct values that the dense programme holds and proves by itself, however many rows


def fit_knq(
    rows: jax.Array,
    num_levels: int,
    *,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
    keep_zero: bool = False,
    tolerance: float | None = 1e-6,
) -> Fit:
    """Fits to each row the levels that minimise Σ wᵢ (xᵢ − level)² over all choices of levels.

    Concrete arrays on a CPU are sorted by NumPy, others by XLA; both ways give the same bits.

    Args:
      rows: `[R, N]` finite values of any floating dtype; denormal values may count as zero.
      num_levels: K, 1 to 256.
      weights: `[R, N]` non-negative, or None for 1 each; a value of weight 0 does not count.
      mask: `[R, N]` bool, False where a value does not count, or None.
      keep_zero: the optimum among levels of which one is exactly 0.
      tolerance: the relative gap between `sse` and `lower_bound` at which the search may stop; None leaves
        `lower_bound` at 0 and saves the time that the proof takes.

    Returns:
      A `Fit`. A row with no more distinct values than levels comes back exactly; spare levels repeat the last.

    >>> import jax.numpy as jnp
    >>> fitted = fit_knq(jnp.array([[1.0, 2.0, 3.0, 10.0, 11.0]]), 2)
    >>> fitted.levels.tolist(), (fitted.sse * fitted.scale**2).tolist()
    ([[2.0, 10.5]], [2.5])
    """
    dtype = working_dtype(rows.dtype)
    count, length = rows.shape
    if count == 0 or length == 0:
        empty = jnp.zeros(count, dtype)
        return Fit(jnp.zeros((count, num_levels), dtype), empty, empty, jnp.ones(count, dtype))
    task = _Task(num_levels, keep_zero, tolerance, _dense_cuts(count, length))
    if on_mesh(rows):
        weights, mask = (None if x is None else jax.device_put(x, rows.sharding) for x in (weights, mask))
        return _fit_on_mesh(
            rows, num_levels, weights, mask, sharding=rows.sharding, keep_zero=keep_zero, tolerance=tolerance
        )
    if any(_elsewhere(x) for x in (rows, weights, mask)):
        return _fit_traced(rows, weights, mask, task, dtype)
    return _fit_on_host(np.asarray(rows), _host(weights), _host(mask), task, dtype)


class _Task(NamedTuple):
    """What is asked of a fit, and how many cuts its dense programme has."""

    num_levels: int
    keep_zero: bool
    tolerance: float | None
    dense_cuts: int


def _dense_cuts(count: int, length: int) -> int:
    """Cuts of the dense programme: all that there can be of a short row; of longer ones a few hundred."""
    if count > _FEW_ROWS:
        return 256
    return 1024 if length <= 1024 else 512


def _elsewhere(array: Any) -> bool:
    """Whether an array is traced, or not on one CPU."""
    if isinstance(array, jax.core.Tracer):
        return True
    if not isinstance(array, jax.Array):
        return False
    devices = array.devices()
    return len(devices) > 1 or next(iter(devices)).platform != "cpu"


def _host(array: Any) -> np.ndarray | None:
    return None if array is None else np.asarray(array)


def _chunk(count: int, size: int) -> int:
    """Rows handled at once: one of few numbers, for few shapes to compile."""
    if size <= _SHORT:
        return 64 if count <= 64 else 1024
    return 1 if count == 1 or size > LONG else 64 if count > 64 else 16


def _fit_on_host(rows, weights, mask, task: _Task, dtype) -> Fit:
    sizes = [size for size in _SIZES if size <= task.dense_cuts]
    scale = _host_scale(rows, mask, dtype)
    chunk = _chunk(rows.shape[0], rows.shape[1])

    def fit_from(start):
        here = slice(start, start + chunk)
        fitted = min(chunk, rows.shape[0] - start)
        fill = chunk - fitted

        def part(array):
            if array is None:
                return None
            return array[here] if not fill else np.pad(array[here], ((0, fill), (0, 0)), mode="edge")

        heavy, counted = part(weights), part(mask)
        unit = np.ldexp(1.0, np.pad(scale[here], (0, fill), mode="edge"))
        with jax.enable_x64(True):  # of this thread
            ordered = _ordered(part(rows), dtype, unit, heavy, counted, task.keep_zero, sizes)
            levels, bound = _fit_sorted(ordered, task, fitted)
        # Levels are rounded in the units of the rows, and their error is that of what was rounded.
        levels = (levels[:fitted] * unit[:fitted, None]).astype(dtype)
        error = _host_error(ordered, levels.astype(np.float64) / unit[:fitted, None], task.keep_zero)
        bound = bound[:fitted]
        if weights is not None:
            heaviest = _heaviest(heavy, counted)[:fitted]
            error, bound = error * heaviest, bound * heaviest
        return levels, error, np.minimum(bound, error)

    starts = range(0, rows.shape[0], chunk)
    if len(starts) == 1:
        parts = [fit_from(0)]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            parts = list(threads.map(fit_from, starts))
    levels, error, bound = (np.concatenate(x) for x in zip(*parts, strict=True))
    below = np.nextafter(bound.astype(dtype), dtype.type(0))  # a bound stays one when it is rounded
    return Fit(
        jnp.asarray(levels), jnp.asarray(error.astype(dtype)), jnp.asarray(below),
        jnp.asarray(np.ldexp(np.ones(len(scale)), scale).astype(dtype)),
    )  # fmt: skip


def _ordered(rows, dtype, unit, weights, mask, keep_zero: bool, sizes=(), axes=()) -> Rows:
    """Rows sorted in the way that suits their length and dtype; distributed ones over the mesh axes `axes`."""
    length = _length(rows, axes)
    if weights is None and rows.dtype.itemsize == 2 and length > _COUNTED:
        return count_rows(rows, unit, mask, keep_zero, sizes, axes)
    rows = rows if rows.dtype == dtype else rows.astype(dtype)
    if length > LONG:
        return sort_long_rows(rows, unit, weights, mask, keep_zero, axes)
    if axes:  # short enough for every device to hold it
        gather = functools.partial(lax.all_gather, axis_name=axes, axis=1, tiled=True)
        rows, weights, mask = (None if x is None else gather(x) for x in (rows, weights, mask))
    return sort_rows(rows, unit, weights, mask, keep_zero, sizes)


def _heaviest(weights, mask):
    """`[R]` the largest weight of each row."""
    counted = weights if mask is None else np.where(mask, weights, 0)
    return counted.astype(np.float64).max(axis=1)


def _host_scale(rows, mask, dtype) -> np.ndarray:
    """`[R]` exponents: as `row_scale`, without compiling."""
    if rows.dtype.itemsize == 2:  # patterns ascend with the magnitude, and NumPy is slow at these dtypes
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
    """`[R]` Σ weight (value − nearest level)²."""
    if isinstance(rows, SortedRows) and rows.length <= _SHORT:
        count, weight = rows.count[: len(levels)], rows.weight
        weight = np.diff(count, axis=1).astype(np.float64) if weight is None else weight[: len(levels)]
        return nearest_errors(rows.values[: len(levels)], weight, levels)
    errors = np.empty(len(levels))
    for r, row_levels in enumerate(levels):
        row = _host_row(rows, r, keep_zero)
        # No value lies between a midpoint and the float of the values' dtype below it.
        middle = (row_levels[1:] + row_levels[:-1]) / 2 * row.unit
        below = middle.astype(row.values.dtype)
        below = np.where(below > middle, np.nextafter(below, below.dtype.type(-np.inf)), below)
        ends = np.concatenate([[0], np.searchsorted(row.values, below, side="right"), [len(row.values)]])
        if len(row.values) <= _STRETCH:
            away = row.values / row.unit - np.repeat(row_levels, np.diff(ends))
            errors[r] = (away * away if row.weight is None else away * away * row.weight).sum()
            continue

        def error(stretch, row=row):
            start, end, level = stretch
            away = row.values[start:end].astype(np.float64) / row.unit - level
            away *= away
            return float((away if row.weight is None else away * row.weight[start:end]).sum())

        stretches = [
            (start, min(start + _STRETCH, end), level)
            for begin, end, level in zip(ends[:-1], ends[1:], row_levels, strict=True)
            for start in range(begin, end, _STRETCH)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            errors[r] = sum(threads.map(error, stretches))
    return errors


def fit_knq_part(
    rows: jax.Array,
    num_levels: int,
    weights: jax.Array | None,
    mask: jax.Array | None,
    *,
    keep_zero: bool,
    tolerance: float | None,
    count: int,
    axes: tuple[str, ...] = (),
) -> Fit:
    """As `fit_knq` for what one device holds of rows that are distributed over a mesh, inside `jax.shard_map`.

    Args:
      rows: `[R, n]` this device's part.
      num_levels: K.
      weights: `[R, n]` or None.
      mask: `[R, n]` or None.
      keep_zero: as in `fit_knq`.
      tolerance: as in `fit_knq`.
      count: number of rows on all devices.
      axes: names of the mesh axes over which the values of a row are distributed; every device on them returns the
        same. Of a row longer than 65,536 values, or of 16-bit values, only counts and sums are exchanged.
    """
    task = _Task(num_levels, keep_zero, tolerance, _dense_cuts(count, _length(rows, axes)))
    return _fit_traced(rows, weights, mask, task, working_dtype(rows.dtype), axes)


def _length(rows, axes) -> int:
    """Values of a row, those on other devices among them."""
    return rows.shape[1] * (lax.axis_size(axes) if axes else 1)


@functools.partial(jax.jit, static_argnames=("num_levels", "sharding", "keep_zero", "tolerance"))
def _fit_on_mesh(rows, num_levels, weights, mask, *, sharding: NamedSharding, keep_zero: bool, tolerance: float | None):
    """Rows that are distributed over a mesh are fitted where they are."""
    of_rows, of_values = (*sharding.spec, None, None)[:2]
    axes = () if of_values is None else (of_values,) if isinstance(of_values, str) else tuple(of_values)
    run = functools.partial(fit_knq_part, keep_zero=keep_zero, tolerance=tolerance, count=rows.shape[0], axes=axes)
    spec, row_spec = PartitionSpec(of_rows, of_values), PartitionSpec(of_rows)
    return jax.shard_map(
        lambda rows, weights, mask: run(rows, num_levels, weights, mask),
        mesh=sharding.mesh,
        in_specs=(spec, None if weights is None else spec, None if mask is None else spec),
        out_specs=row_spec,
        check_vma=False,
    )(rows, weights, mask)


def _fit_traced(rows, weights, mask, task: _Task, dtype, axes=()) -> Fit:
    scale = row_scale(rows, mask)
    scale = lax.pmax(scale, axes) if axes else scale
    rows = jnp.where(jnp.abs(rows) < float(jnp.finfo(dtype).tiny), 0, rows)
    inputs = [x for x in (rows, scale, weights, mask) if x is not None]

    def one(inputs):
        given = iter(inputs)
        values, unit = next(given), lax.convert_element_type(next(given), jnp.float64)
        heavy = None if weights is None else next(given)
        counted = None if mask is None else next(given)
        ordered = _ordered(values, dtype, unit, heavy, counted, task.keep_zero, axes=axes)
        levels, bound = _fit_sorted(ordered, task)
        if heavy is not None:
            heavy = lax.convert_element_type(heavy, jnp.float64)
            heaviest = jnp.max(heavy if counted is None else jnp.where(counted, heavy, 0.0), axis=1)
            bound = bound * (lax.pmax(heaviest, axes) if axes else heaviest)
        return levels, bound

    length = _length(rows, axes)
    with jax.enable_x64(True):
        # Programmes need some 8 MiB, or one long row is handled at a time.
        chunk = 1 if length > LONG else min(max(1, 2**20 // min(length, task.dense_cuts) ** 2), rows.shape[0])
        whole = rows.shape[0] // chunk * chunk
        grouped = [x[:whole].reshape(-1, chunk, *x.shape[1:]) for x in inputs]
        levels, bound = lax.map(one, grouped)
        levels, bound = levels.reshape(whole, -1), bound.reshape(whole)
        if whole < rows.shape[0]:
            rest = one([x[whole:] for x in inputs])
            levels, bound = jnp.concatenate([levels, rest[0]]), jnp.concatenate([bound, rest[1]])
        levels = (levels * lax.convert_element_type(scale, jnp.float64)[:, None]).astype(dtype)
        bound = lax.convert_element_type(bound, dtype)
    unit = 1 / scale[:, None]
    error = distortion(rows.astype(dtype) * unit, levels * unit, weights, mask)
    error = lax.psum(error, axes) if axes else error
    bound = jnp.nextafter(jnp.minimum(bound, error), jnp.zeros_like(bound))
    return Fit(levels, error, bound, scale)


def _fit_sorted(rows: Rows, task: _Task, fitted: int | None = None):
    """Levels `[R, K]` over the rows' scale, and the bound `[R]` for weights relative to the largest; float64."""
    num_levels, keep_zero, tolerance, dense_cuts = task
    xp = namespace(rows.size)
    cuts, least = partition(rows, num_levels, keep_zero, dense_cuts)
    if tolerance is None:
        bound = xp.zeros(cuts.shape[0])
    elif least is not None and (xp is jnp or rows.length <= _SHORT):
        bound = bound_of_sum(rows, least, num_levels)
    elif xp is jnp or rows.length <= _SHORT:
        bound = squared_error_bound(rows, num_levels, keep_zero, dense_cuts)
    else:
        cuts, bound = _proven(rows, cuts, num_levels, keep_zero, tolerance, fitted)
    return _interval_means(rows, cuts, keep_zero), bound


def _proven(rows: Rows, cuts: np.ndarray, num_levels: int, keep_zero: bool, tolerance: float, fitted: int | None):
    """The cuts, better ones where a proof came upon them, and the bounds of the first `fitted` rows; on the host."""
    bounds = np.zeros(len(cuts))
    better = cuts.copy()
    to_prove = [_host_row(rows, r, keep_zero) for r in range(len(cuts))[:fitted]]
    better[:fitted], bounds[:fitted] = prove(to_prove, cuts[:fitted], num_levels, tolerance)
    return (cuts if (better == cuts).all() else polish(rows, better, keep_zero)), bounds


def _host_row(rows: Rows, r: int, keep_zero: bool) -> Row:
    """One of the rows, on the host, as the values that count and their weights."""
    zero, size = int(rows.zero[r]) if keep_zero else None, int(rows.size[r])
    if isinstance(rows, SortedRows):
        if rows.weight is not None:
            weight = rows.weight[r, :size]
        else:
            weight = np.diff(rows.count[r, : size + 1]).astype(np.float64)
        return Row(rows.values[r, :size], 1.0, weight, zero)
    assert isinstance(rows, LongRows)  # others are never on the host
    weight = None if rows.shares is None else rows.shares[r, :size]
    if rows.shares is None and rows.pinned:
        weight = np.ones(size)
        weight[zero] = 0.0
    return Row(rows.values[r, :size], float(rows.unit[r]), weight, zero)


def _interval_means(rows: Rows, cuts, keep_zero: bool):
    """Ascending means; those of empty intervals repeat the last."""
    xp = namespace(rows.size)
    size = rows.size[:, None]
    whole = xp.concatenate([xp.zeros_like(size), cuts, size], axis=1)
    n, s = rows.sums_below(whole)
    n, s = (n[:, 1:] - n[:, :-1]).astype(xp.float64), (s[:, 1:] - s[:, :-1]).astype(xp.float64)
    least, most = rows.value_at(whole[:, :-1]), rows.value_at(whole[:, 1:] - 1)
    mean = xp.clip(s / xp.where(n > 0, n, 1.0) * 2.0**-rows.frac, least, most)
    there = whole[:, 1:] > whole[:, :-1]
    if keep_zero:
        pinned = whole > rows.zero[:, None]
        first, end = pinned[:, :-1], xp.concatenate([pinned[:, 1:-1], xp.ones_like(pinned[:, :1])], axis=1)
        mean, there = xp.where(~first & end, 0.0, mean), there | (~first & end)
    levels = xp.sort(xp.where(there, mean, xp.inf), axis=1)
    highest = xp.max(xp.where(xp.isfinite(levels), levels, -xp.inf), axis=1, keepdims=True)
    highest = xp.where(xp.isfinite(highest), highest, 0.0)
    return xp.where(xp.isfinite(levels), levels, highest)
