"""KNQ: the levels of least squared error: one-dimensional k-means by dynamic programming.

In one dimension the clusters of an optimal k-means are intervals of the sorted values, so the problem is to part a
sorted row into K intervals (Wu 1991; Grønlund et al., arXiv 1701.07204). `fit_knq_rows` sorts a row into distinct
values with exact running sums, `fit_knq_search` finds a partition, `fit_knq_proof` bounds from below what any other
could cost, and here it becomes levels: each the mean of its interval, rounded once.

A row with no more distinct values than the dense programme has cuts (1024; 256 where there are more than eight rows)
is solved exactly. A longer row is searched by programmes from coarse to single values: mostly the optimum, at worst a
few 1e-4 of the squared error above it in the rows tried. With a `tolerance` the proof then goes on, by branch
and bound, until the levels are known to be within it of the optimum, and takes better ones where it comes upon them.
Under `jit` the proof of a long row is one round only, and as coarse as some hundred cells.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax.assign import Fit, distortion, row_scale, working_dtype
from nuqjax.fit_knq_proof import prove
from nuqjax.fit_knq_rows import SortedRows, sort_rows
from nuqjax.fit_knq_search import bound_of_sum, partition, polish, squared_error_bound, take
from nuqjax.rows import namespace

_SIZES = (16, 64, 256, 512, 1024)  # of rows with few distinct values: few shapes to compile
_FEW_ROWS = 8
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
    dense_cuts = _dense_cuts(count, length)
    options = functools.partial(
        _fit_sorted, num_levels=num_levels, keep_zero=keep_zero, tolerance=tolerance, dense_cuts=dense_cuts
    )
    if any(_elsewhere(x) for x in (rows, weights, mask)):
        return _fit_traced(rows, weights, mask, keep_zero, dtype, options, dense_cuts)
    return _fit_on_host(np.asarray(rows), _host(weights), _host(mask), keep_zero, dtype, options, dense_cuts)


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
    return 1 if count == 1 else 16


def _fit_on_host(rows, weights, mask, keep_zero, dtype, options, dense_cuts) -> Fit:
    sizes = [size for size in _SIZES if size <= dense_cuts]
    scale = _host_scale(rows, mask, dtype)
    chunk = _chunk(rows.shape[0], rows.shape[1])
    rows = rows.astype(dtype, copy=False)

    def fit_from(start):
        here = slice(start, start + chunk)
        fitted = min(chunk, rows.shape[0] - start)
        fill = chunk - fitted

        def part(array):
            return None if array is None else np.pad(array[here], ((0, fill), (0, 0)), mode="edge")

        heavy, counted = part(weights), part(mask)
        unit = np.ldexp(1.0, np.pad(scale[here], (0, fill), mode="edge"))
        with jax.enable_x64(True):  # of this thread
            ordered = sort_rows(part(rows), unit, heavy, counted, keep_zero, sizes)
            levels, bound = options(ordered, fitted=fitted)
        # Levels are rounded in the units of the rows, and their error is that of what was rounded.
        levels = (levels[:fitted] * unit[:fitted, None]).astype(dtype)
        error, bound = _host_error(ordered, levels.astype(np.float64) / unit[:fitted, None]), bound[:fitted]
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


def _heaviest(weights, mask):
    """`[R]` the largest weight of each row."""
    counted = weights if mask is None else np.where(mask, weights, 0)
    return counted.astype(np.float64).max(axis=1)


def _host_scale(rows, mask, dtype) -> np.ndarray:
    """`[R]` exponents: as `row_scale`, without compiling."""
    magnitude = np.abs(rows.astype(dtype))
    largest = np.max(magnitude if mask is None else np.where(mask, magnitude, 0), axis=1)
    limit = 1022 if dtype == np.float64 else 126
    exponent = np.clip(np.frexp(largest)[1] - 1, -limit, limit)
    return np.where(largest >= np.finfo(dtype).tiny, exponent, 0)


def _host_error(rows: SortedRows, levels: np.ndarray) -> np.ndarray:
    """`[R]` Σ weight (value − nearest level)²."""
    errors = np.empty(len(levels))
    for r, row_levels in enumerate(levels):
        distinct = int(rows.distinct[r])
        values = rows.values[r, :distinct]
        weight = np.diff(rows.count[r, : distinct + 1]) if rows.weight is None else rows.weight[r, :distinct]
        nearest = np.searchsorted((row_levels[1:] + row_levels[:-1]) / 2, values)
        errors[r] = np.dot((values - row_levels[nearest]) ** 2, weight)
    return errors


def _fit_traced(rows, weights, mask, keep_zero, dtype, options, dense_cuts) -> Fit:
    scale = row_scale(rows, mask)
    unit = 1 / scale
    scaled = rows.astype(dtype) * unit[:, None]
    tiny = jnp.finfo(dtype).tiny
    scaled = jnp.where(jnp.abs(scaled) < tiny, 0, scaled)
    inputs = [x for x in (scaled, weights, mask) if x is not None]

    def one(inputs):
        given = iter(inputs)
        values = next(given)
        heavy = None if weights is None else next(given)
        counted = None if mask is None else next(given)
        ordered = sort_rows(values, jnp.ones(values.shape[0]), heavy, counted, keep_zero)
        levels, bound = options(ordered)
        if heavy is not None:
            heavy = lax.convert_element_type(heavy, jnp.float64)
            bound = bound * jnp.max(heavy if counted is None else jnp.where(counted, heavy, 0.0), axis=1)
        return levels, bound

    size = min(rows.shape[1], dense_cuts)
    with jax.enable_x64(True):
        chunk = min(max(1, 2**20 // size**2), rows.shape[0])  # what its programmes need stays near 8 MiB
        whole = rows.shape[0] // chunk * chunk
        grouped = [x[:whole].reshape(-1, chunk, x.shape[1]) for x in inputs]
        levels, bound = lax.map(one, grouped)
        levels, bound = levels.reshape(whole, -1), bound.reshape(whole)
        if whole < rows.shape[0]:
            rest = one([x[whole:] for x in inputs])
            levels, bound = jnp.concatenate([levels, rest[0]]), jnp.concatenate([bound, rest[1]])
        levels = (levels * lax.convert_element_type(scale, jnp.float64)[:, None]).astype(dtype)
        bound = lax.convert_element_type(bound, dtype)
    error = distortion(scaled, levels * unit[:, None], weights, mask)
    bound = jnp.nextafter(jnp.minimum(bound, error), jnp.zeros_like(bound))
    return Fit(levels, error, bound, scale)


def _fit_sorted(
    rows: SortedRows,
    *,
    num_levels: int,
    keep_zero: bool,
    tolerance: float | None,
    dense_cuts: int,
    fitted: int | None = None,
):
    """Levels `[R, K]` over the rows' scale, and the bound `[R]` for weights relative to the largest; float64."""
    xp = namespace(rows.values)
    cuts, least = partition(rows, num_levels, keep_zero, dense_cuts)
    if tolerance is None:
        bound = xp.zeros(cuts.shape[0])
    elif least is not None and (xp is jnp or rows.values.shape[1] <= _SHORT):
        bound = bound_of_sum(rows, least, num_levels)
    elif xp is jnp or rows.values.shape[1] <= _SHORT:
        bound = squared_error_bound(rows, num_levels, keep_zero, dense_cuts)
    else:
        cuts, bound = _proven(rows, cuts, num_levels, keep_zero, tolerance, fitted)
    return _interval_means(rows, cuts, keep_zero), bound


def _proven(rows: SortedRows, cuts: np.ndarray, num_levels: int, keep_zero: bool, tolerance: float, fitted: int | None):
    """The cuts, better ones where a proof came upon them, and the bounds of the first `fitted` rows; on the host."""
    bounds = np.zeros(len(cuts))
    better = cuts.copy()
    for r, distinct in enumerate(rows.distinct[:fitted]):
        if rows.weight is not None:
            weight = rows.weight[r, :distinct]
        else:
            weight = np.diff(rows.count[r, : distinct + 1]).astype(np.float64)
        zero = int(rows.zero[r]) if keep_zero else None
        better[r], bounds[r] = prove(rows.values[r, :distinct], weight, zero, cuts[r], num_levels, tolerance)
    return (cuts if (better == cuts).all() else polish(rows, better, keep_zero)), bounds


def _interval_means(rows: SortedRows, cuts, keep_zero: bool):
    """Ascending means; those of empty intervals repeat the last."""
    xp = namespace(rows.values)
    distinct = rows.distinct[:, None]
    whole = xp.concatenate([xp.zeros_like(distinct), cuts, distinct], axis=1)
    n, s = take(rows.count, whole), take(rows.total, whole)
    n, s = (n[:, 1:] - n[:, :-1]).astype(xp.float64), (s[:, 1:] - s[:, :-1]).astype(xp.float64)
    last = xp.maximum(distinct - 1, 0)
    least, most = (
        take(rows.values, xp.minimum(whole[:, :-1], last)),
        take(rows.values, xp.clip(whole[:, 1:] - 1, 0, last)),
    )
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
