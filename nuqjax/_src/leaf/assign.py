"""The nearest level of a value, the rule for ties, and the squared error.

Every fit ends here: a row of values and its sorted levels give the indices, and the indices give the squared error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.leaf.rows import look_up, namespace
from nuqjax._src.platform.host import (
    BLOCK,
    flushed,
    on_host,
    over_blocks,
    row_by_row,
    to_jax,
    to_numpy,
    working_dtype,
    x64,
)
from nuqjax._src.platform.meshes import explicit_sharding, run_as_automatic, typed_spec
from nuqjax._src.platform.types import A, Array


class Fit(NamedTuple):
    """Levels fitted to rows, and what they cost.

    Attributes:
      levels: `[R, K]` ascending levels in the units of the rows; float32, or float64 for float64 rows.
      sse: `[R]` squared error Σ wᵢ (xᵢ − level)² of the returned levels on the data, in units of `scale`².
      lower_bound: `[R]` proven lower bound on the squared error of any K levels, in units of `scale`²; 0 where nothing
        is proven.
      scale: `[R]` a power of two near the row's largest magnitude, so that squares neither over- nor underflow.

    >>> import jax.numpy as jnp, nuqjax
    >>> fitted = nuqjax.fit(jnp.array([[0.0, 2.0, 8.0, 10.0]]), 2)
    >>> fitted.levels.tolist(), (fitted.sse * fitted.scale**2).tolist()
    ([[1.0, 9.0]], [4.0])
    """

    levels: jax.Array
    sse: jax.Array
    lower_bound: jax.Array
    scale: jax.Array


@overload
def row_scale(rows: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray: ...
@overload
def row_scale(rows: jax.Array, mask: jax.Array | None = None) -> jax.Array: ...
@overload
def row_scale(rows: Array, mask: Array | None = None) -> Any: ...
def row_scale(rows: Array, mask: Array | None = None) -> Array:
    """Returns a power of two near each row's largest magnitude.

    Args:
      rows: `[R, N]` finite values.
      mask: `[R, N]` bool, False where a value does not count, or None.

    Returns:
      `[R]` in the rows' working dtype: the 2^e with the largest magnitude in [1, 2)·2^e, limited to the range in which
      both 2^e and its reciprocal are normal numbers; 1 for a row that is all zero or empty.

    >>> import jax.numpy as jnp
    >>> row_scale(jnp.array([[3.0, -5.0], [0.0, 0.0]])).tolist()
    [4.0, 1.0]
    """
    xp = namespace(rows)
    largest = largest_magnitude(rows, mask)
    _, exponent = xp.frexp(largest)
    limit = 1022 if largest.dtype == jnp.float64 else 126
    exponent = xp.clip(exponent - 1, -limit, limit)
    one = xp.ones_like(largest)
    return xp.where(largest > 0, xp.ldexp(one, exponent), one)


@overload
def largest_magnitude(rows: np.ndarray, mask: Array | None = None) -> np.ndarray: ...
@overload
def largest_magnitude(rows: jax.Array, mask: Array | None = None) -> jax.Array: ...
@overload
def largest_magnitude(rows: Array, mask: Array | None = None) -> Array: ...
def largest_magnitude(rows: Array, mask: Array | None = None) -> Array:
    """Returns `[R]` the largest magnitude of each row, in the working dtype; 0 where no value counts."""
    dtype = working_dtype(rows.dtype)
    if not isinstance(rows, np.ndarray):
        magnitude = jnp.abs(rows.astype(dtype))
        return jnp.max(magnitude if mask is None else jnp.where(mask, magnitude, 0), axis=-1, initial=0)
    largest = np.zeros(rows.shape[0], dtype)

    def block(some: slice, columns: slice) -> tuple[slice, np.ndarray]:
        magnitude = np.abs(rows[some, columns].astype(dtype, copy=False))
        if mask is not None:
            magnitude *= mask[some, columns]
        return some, magnitude.max(axis=-1)

    for some, most in over_blocks(block, *rows.shape):
        np.maximum(largest[some], most, out=largest[some])
    return flushed(largest)


@overload
def thresholds(levels: np.ndarray) -> np.ndarray: ...
@overload
def thresholds(levels: jax.Array) -> jax.Array: ...
def thresholds(levels: Array) -> Array:
    """Computes the largest float not above the exact midpoint of each pair of neighbouring levels.

    A value x of the same dtype lies strictly above the midpoint if and only if x > threshold, so no rounding of the
    midpoint can move a value across it. Between equal levels the threshold is the one above the last of them (infinity
    at the end). Subnormal numbers count as zero, as they do in XLA's arithmetic on CPU and TPU.

    Args:
      levels: `[..., K]` ascending float32 or float64 levels.

    Returns:
      `[..., K − 1]` ascending thresholds.
    """
    xp = namespace(levels)
    dtype = levels.dtype
    if isinstance(levels, np.ndarray):
        levels = flushed(levels)
    low, high = levels[..., :-1], levels[..., 1:]
    equal = low == high
    # Large levels are halved and small ones enlarged, so that the sum and its rounding error stay normal numbers.
    # Next to a large level, a very small one only decides on which side of half the large one the midpoint lies.
    large = xp.maximum(xp.abs(low), xp.abs(high)) >= 1
    unit = xp.where(large, 1.0, 2.0**101).astype(dtype)
    least = xp.where(large, 2.0**-100, 0.0).astype(dtype)
    low, high = (xp.where(xp.abs(x) < least, xp.sign(x) * least, x) * (unit / 2) for x in (low, high))
    total = low + high
    part = total - low
    error = (low - (total - part)) + (high - part)  # Knuth's two-sum: low + high = total + error, exactly
    with np.errstate(over="ignore"):
        cuts = xp.where(error < 0, xp.nextafter(total, xp.full_like(total, -np.inf)), total)
    tiny = jnp.finfo(dtype).tiny
    cuts = xp.where((cuts < 0) & (cuts > -tiny * unit), -tiny, cuts / unit)
    # Between equal levels the threshold is that of the next distinct pair, so only the first of them is assigned.
    cuts = xp.where(equal, xp.asarray(np.inf, dtype), cuts)
    if xp is np:
        return flushed(np.minimum.accumulate(cuts[..., ::-1], axis=-1)[..., ::-1])
    return lax.cummin(cuts, axis=cuts.ndim - 1, reverse=True)


_COMPARE_LEVELS = 32  # up to this many, comparing with every threshold in one fused loop beats a binary search


@np.errstate(under="ignore")  # as by default: what is below the least normal number is rounded to 0
def assign(rows: Array, levels: Array) -> jax.Array:
    """Returns the index of each value's nearest level; a value exactly between two levels takes the lower one.

    Args:
      rows: `[R, N]` floating values.
      levels: `[R, K]` ascending levels, K ≤ 256.

    Returns:
      `[R, N]` uint8 indices. Of equal levels the first is taken. For arrays on the host NumPy computes the same indices
      without compiling anything.

    >>> import jax.numpy as jnp
    >>> assign(jnp.array([[-1.0, 0.4, 0.5, 0.6]]), jnp.array([[0.0, 1.0]])).tolist()
    [[0, 0, 0, 1]]
    """
    num_levels = levels.shape[-1]
    if num_levels > 256:
        raise ValueError(f"assign: {num_levels} levels, but a uint8 index distinguishes at most 256")
    sharding = explicit_sharding(rows, levels)
    if sharding is not None:
        return run_as_automatic(assign, sharding.mesh, typed_spec(rows), rows, levels)
    if on_host(rows, levels):
        return to_jax(assign_on_host(row_by_row(to_numpy(rows)), to_numpy(levels)))
    dtype = jnp.promote_types(working_dtype(rows.dtype), working_dtype(levels.dtype))
    rows, levels = jnp.asarray(rows, dtype), jnp.asarray(levels, dtype)
    if num_levels == 1:
        return jnp.zeros(rows.shape, jnp.uint8)
    cuts = thresholds(levels)
    if num_levels <= _COMPARE_LEVELS:
        return jnp.sum(rows[..., None] > cuts[:, None, :], axis=-1, dtype=jnp.uint8)
    return _binary_search(rows, cuts)


def _binary_search(rows: jax.Array, cuts: jax.Array) -> jax.Array:
    """Counts the `cuts` below each value, by a binary search."""
    steps = cuts.shape[-1].bit_length()
    padding = jnp.full((cuts.shape[0], (1 << steps) - 1 - cuts.shape[-1]), jnp.inf, cuts.dtype)
    cuts = jnp.concatenate([cuts, padding], axis=-1)
    index = jnp.zeros(rows.shape, jnp.int32)
    for step in reversed(range(steps)):
        probe = jnp.take_along_axis(cuts, index + ((1 << step) - 1), axis=-1, mode="promise_in_bounds")
        index = index + ((rows > probe).astype(jnp.int32) << step)
    return index.astype(jnp.uint8)


_TABLE_LEVELS, _TABLE_LENGTH = 17, 2**16  # NumPy: from here on it pays to build a table for each row
_STRETCH = 2**20  # values that share one table
_COMPARE_CUTS = 63  # NumPy: up to this many, comparing with each beats a binary search (`experiments.speed.constants`)
_SHORT = 64  # NumPy is slow along rows of so few values


def assign_on_host(rows: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Computes `assign` in NumPy."""
    dtype = np.promote_types(working_dtype(rows.dtype), working_dtype(levels.dtype))
    count, length = rows.shape
    num_levels = levels.shape[-1]
    indices = np.empty(rows.shape, np.uint8)
    cuts = thresholds(levels.astype(dtype))
    # Subnormal values count as zero: none of them lies above a threshold of zero.
    cuts = np.where(cuts == 0, np.nextafter(np.finfo(dtype).tiny, dtype.type(0)), cuts)
    long = num_levels >= _TABLE_LEVELS and length >= _TABLE_LENGTH and dtype == np.float32

    def block(some: slice, columns: slice) -> None:
        if long:
            for row in range(some.start, some.stop):
                _count_by_table(rows[row, columns], cuts[row], indices[row, columns])
            return
        values = rows[some, columns].astype(dtype, copy=False)
        if rows.dtype == np.float32 != dtype:
            values = values * (np.abs(values) >= np.finfo(np.float32).tiny)
        indices[some, columns] = _count_below(values, cuts[some])

    over_blocks(block, count, length, _STRETCH if long else BLOCK)
    return indices


def _count_below(values: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Counts the cuts `[r, K − 1]` below each of a few values `[r, n]`."""
    if cuts.shape[1] > _COMPARE_CUTS or values.shape[1] <= _SHORT:
        return _halve(values, cuts)
    found, above = np.zeros(values.shape, np.uint8), np.empty(values.shape, bool)
    for cut in cuts.T:
        np.greater(values, cut[:, None], out=above)
        found += above.view(np.uint8)
    return found


def _halve(values: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Counts the cuts below each value, by a binary search of many rows at once, so that short rows are not slower."""
    steps = cuts.shape[1].bit_length()
    padded = np.full((len(cuts), 1 << steps), np.inf, cuts.dtype)
    padded[:, : cuts.shape[1]] = cuts
    padded = padded.reshape(-1)
    place = np.empty(values.shape, np.intp)
    place[:] = np.arange(len(cuts))[:, None] << steps
    for step in reversed(range(steps)):
        above = values > padded[(1 << step) - 1 :].take(place)
        place += above.view(np.uint8) << np.uint8(step)
    return (place & ((1 << steps) - 1)).astype(np.uint8)


def _count_by_table(row: np.ndarray, cuts: np.ndarray, out: np.ndarray) -> None:
    """Counts the cuts below each value of a float32 row by a table indexed with the upper 16 bits of the value.

    Where one cut has the same upper bits, the value is compared with it; where several have, they are searched.
    """
    half = cuts.view(np.uint32) >> 16
    place = np.where(half < 2**15, half + 2**15, 2**16 - 1 - half)  # halves numbered in the order of the values
    times = np.bincount(place, minlength=2**16)
    below = np.cumsum(times) - times
    first = np.append(cuts, np.float32(np.inf))[below]
    # Reordered by bit pattern: positive values first, then negative values in descending order.
    below, times, first = (np.append(x[2**15 :], x[2**15 - 1 :: -1]) for x in (below.astype(np.uint8), times, first))
    several = times > 1
    for start in range(0, row.size, BLOCK):
        values = row[start : start + BLOCK].astype(np.float32)
        half = values.view(np.uint16)[1::2].astype(np.intp)
        found = below[half]
        found += values > first[half]
        crowded = np.flatnonzero(several[half])
        found[crowded] = np.searchsorted(cuts, values[crowded])
        out[start : start + BLOCK] = found


def distortion(rows: Array, levels: Array, weights: Array | None = None, mask: Array | None = None) -> jax.Array:
    """Computes the squared error Σ wᵢ (xᵢ − nearest level)² of each row, summed in float64.

    Args:
      rows: `[R, N]` values, of magnitude about 1 or less so that squares stay in range.
      levels: `[R, K]` ascending levels in the same units.
      weights: `[R, N]` non-negative, or None for 1 each.
      mask: `[R, N]` bool, False where a value does not count, or None.

    Returns:
      `[R]` in the working dtype.

    >>> import jax.numpy as jnp
    >>> distortion(jnp.array([[0.25, 1.0]]), jnp.array([[0.0, 1.0]])).tolist()
    [0.0625]
    """
    if on_host(rows, levels, weights, mask):
        x, level, weight, counted = (row_by_row(to_numpy(x)) for x in (rows, levels, weights, mask))
        assert x is not None
        assert level is not None
        return to_jax(distortion_on_host(x, level, weight, counted))
    dtype = working_dtype(rows.dtype)
    nearest = look_up(jnp.asarray(levels), assign(rows, levels))
    with x64():
        error = lax.convert_element_type(rows, jnp.float64) - lax.convert_element_type(nearest, jnp.float64)
        square = error * error
        if weights is not None:
            square = square * lax.convert_element_type(weights, jnp.float64)
        if mask is not None:
            square = jnp.where(mask, square, 0.0)
        return lax.convert_element_type(jnp.sum(square, axis=-1), dtype)


def distortion_on_host(
    rows: np.ndarray,
    levels: np.ndarray,
    weights: np.ndarray | None,
    mask: np.ndarray | None,
    unit: float | np.floating | np.ndarray = 1.0,
) -> np.ndarray:
    """Computes `distortion` in NumPy, of rows and levels both multiplied by `unit`, a number or `[R, 1]`.

    The last bit of a float64 sum may differ from XLA's; the same rows give the same bits on every run.
    """
    count, length = rows.shape
    dtype = working_dtype(rows.dtype)
    indices, exact = assign_on_host(rows, levels), levels.astype(np.float64)
    units = np.broadcast_to(np.asarray(unit, np.float64), (count, 1))

    def block(some: slice, columns: slice) -> tuple[slice, np.ndarray]:
        error = flushed(rows[some, columns].astype(dtype)) - look_up(exact[some], indices[some, columns])
        with np.errstate(over="ignore", invalid="ignore"):  # values that do not count may overflow
            error *= units[some]
            error *= error
            if weights is not None:
                error *= weights[some, columns]
        if mask is not None:
            error[~mask[some, columns]] = 0
        return some, error.sum(axis=-1)

    total = np.zeros(count)
    for some, part in over_blocks(block, count, length):
        total[some] += part
    return total.astype(dtype)


def with_zero(levels: A) -> A:
    """Returns levels `[R, K]` with a held zero: the level nearest to 0 is replaced by 0, the others are unchanged."""
    xp = namespace(levels)
    nearest = xp.argmin(xp.abs(levels), axis=-1, keepdims=True)
    levels = xp.where(xp.arange(levels.shape[-1])[None] == nearest, xp.zeros((), levels.dtype), levels)
    return xp.sort(levels, axis=-1)  # 0 may replace the first of several equal negative levels


def finish(rows: Array, levels: Any, weights: Any, mask: Any, keep_zero: bool) -> Fit:
    """Returns the `Fit` of levels without a proof: the lower bound is 0.

    Args:
      rows: `[R, N]` values.
      levels: `[R, K]` ascending levels in the units of the rows.
      weights: `[R, N]` non-negative, or None for 1 each.
      mask: `[R, N]` bool, False where a value does not count, or None.
      keep_zero: whether to replace the level nearest to 0 by a held zero; the others keep their values.
    """
    levels = with_zero(levels) if keep_zero else levels
    scale = row_scale(rows, mask)
    unit = 1 / scale[:, None]
    if isinstance(rows, np.ndarray):
        sse = distortion_on_host(rows, levels, weights, mask, unit)
        return Fit(*map(to_jax, (levels, sse, np.zeros_like(sse), scale)))
    sse = distortion(rows.astype(levels.dtype) * unit, levels * unit, weights, mask)
    return Fit(levels, sse, jnp.zeros_like(sse), scale)


def fit_by(levels_of: Callable[..., Array]) -> Callable[..., Fit]:
    """Returns the fit function, with the signature that `METHODS` needs, of a method that proves no bound.

    Args:
      levels_of: `levels_of(rows, num_levels, weights=…, mask=…)` returns levels `[R, K]`: a NumPy array for NumPy rows,
        else a JAX array.
    """

    def fit(
        rows: A,
        num_levels,
        *,
        weights: A | None = None,
        mask: A | None = None,
        keep_zero=False,
        tolerance=None,
    ) -> Fit:
        del tolerance
        return finish(rows, levels_of(rows, num_levels, weights=weights, mask=mask), weights, mask, keep_zero)

    return fit
