"""Nearest level, the tie rule and the distortion.

Every fit ends here: a row of values and its sorted levels give indices, and indices give the squared error.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Fit(NamedTuple):
    """Levels fitted to rows, and what they cost.

    Attributes:
      levels: `[R, K]` ascending levels in the units of the rows; float32, or float64 for float64 rows.
      sse: `[R]` squared error Σ wᵢ (xᵢ − level)² of the returned levels on the data, in units of `scale`².
      lower_bound: `[R]` proven lower bound on the least possible squared error of K levels, in units of `scale`²;
        0 where nothing is proven.
      scale: `[R]` a power of two near the row's largest magnitude, so that squares neither over- nor underflow.
    """

    levels: jax.Array
    sse: jax.Array
    lower_bound: jax.Array
    scale: jax.Array


def working_dtype(dtype) -> jnp.dtype:
    """The dtype in which values of `dtype` are fitted and their levels returned: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def row_scale(rows: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """A power of two near each row's largest magnitude.

    Args:
      rows: `[R, N]` finite values.
      mask: `[R, N]` bool, False where a value does not count, or None.

    Returns:
      `[R]` in the rows' working dtype: 2^e with largest magnitude in [1, 2)·2^e, within the range in which both 2^e and
      its reciprocal are normal numbers; 1 for a row that is all zero or empty.

    >>> import jax.numpy as jnp
    >>> row_scale(jnp.array([[3.0, -5.0], [0.0, 0.0]])).tolist()
    [4.0, 1.0]
    """
    rows = rows.astype(working_dtype(rows.dtype))
    magnitude = jnp.abs(rows) if mask is None else jnp.where(mask, jnp.abs(rows), 0)
    largest = jnp.max(magnitude, axis=-1, initial=0)
    _, exponent = jnp.frexp(largest)
    limit = 1022 if rows.dtype == jnp.float64 else 126
    exponent = jnp.clip(exponent - 1, -limit, limit)
    return jnp.where(largest > 0, jnp.ldexp(jnp.ones_like(largest), exponent), 1)


def thresholds(levels: jax.Array) -> jax.Array:
    """The largest float not above the exact midpoint of each pair of neighbouring levels.

    A value x of the same dtype lies strictly above the midpoint exactly if x > threshold: no rounding of the midpoint
    can move a value across it. Between equal levels it is the threshold above the last of them (infinity at the end).
    Subnormal numbers count as zero, as they do in XLA's arithmetic on CPU and TPU.

    Args:
      levels: `[..., K]` ascending float32 or float64 levels.

    Returns:
      `[..., K − 1]` ascending thresholds.
    """
    low, high = levels[..., :-1], levels[..., 1:]
    equal = low == high
    # Halved if large and enlarged if small, so that neither the sum nor its rounding error leaves the normal numbers.
    # Beside a large level a very small one only says to which side of the large one's half the midpoint leans.
    large = jnp.maximum(jnp.abs(low), jnp.abs(high)) >= 1
    unit = jnp.where(large, 1.0, 2.0**101)
    least = jnp.where(large, 2.0**-100, 0.0)
    low, high = (jnp.where(jnp.abs(x) < least, jnp.sign(x) * least, x) * (unit / 2) for x in (low, high))
    total = low + high
    part = total - low
    error = (low - (total - part)) + (high - part)  # Knuth's two-sum: low + high = total + error, exactly
    cuts = jnp.where(error < 0, jnp.nextafter(total, jnp.full_like(total, -jnp.inf)), total)
    tiny = jnp.finfo(levels.dtype).tiny
    cuts = jnp.where((cuts < 0) & (cuts > -tiny * unit), -tiny, cuts / unit)
    # Between equal levels nothing passes before the next distinct one does, so a run of equals is used by its first.
    return lax.cummin(jnp.where(equal, jnp.inf, cuts), axis=cuts.ndim - 1, reverse=True)


_COMPARE_LEVELS = 32  # up to here comparing with every threshold in one fused loop beats a binary search


def assign(rows: jax.Array, levels: jax.Array) -> jax.Array:
    """The index of each value's nearest level; a value exactly between two takes the lower one.

    Args:
      rows: `[R, N]` floating values.
      levels: `[R, K]` ascending levels, K ≤ 256.

    Returns:
      `[R, N]` uint8 indices. Of equal levels the first is taken.

    >>> import jax.numpy as jnp
    >>> assign(jnp.array([[-1.0, 0.4, 0.5, 0.6]]), jnp.array([[0.0, 1.0]])).tolist()
    [[0, 0, 0, 1]]
    """
    dtype = jnp.promote_types(working_dtype(rows.dtype), working_dtype(levels.dtype))
    rows, levels = rows.astype(dtype), levels.astype(dtype)
    num_levels = levels.shape[-1]
    if num_levels > 256:
        raise ValueError(f"assign: {num_levels} levels, but a uint8 index counts at most 256")
    if num_levels == 1:
        return jnp.zeros(rows.shape, jnp.uint8)
    cuts = thresholds(levels)
    if num_levels <= _COMPARE_LEVELS:
        return jnp.sum(rows[..., None] > cuts[:, None, :], axis=-1, dtype=jnp.uint8)
    return _binary_search(rows, cuts)


def _binary_search(rows: jax.Array, cuts: jax.Array) -> jax.Array:
    """The number of `cuts` below each value, by halving steps."""
    steps = cuts.shape[-1].bit_length()
    padding = jnp.full((cuts.shape[0], (1 << steps) - 1 - cuts.shape[-1]), jnp.inf, cuts.dtype)
    cuts = jnp.concatenate([cuts, padding], axis=-1)
    index = jnp.zeros(rows.shape, jnp.int32)
    for step in reversed(range(steps)):
        probe = jnp.take_along_axis(cuts, index + ((1 << step) - 1), axis=-1, mode="promise_in_bounds")
        index = index + ((rows > probe).astype(jnp.int32) << step)
    return index.astype(jnp.uint8)


def distortion(
    rows: jax.Array, levels: jax.Array, weights: jax.Array | None = None, mask: jax.Array | None = None
) -> jax.Array:
    """The squared error Σ wᵢ (xᵢ − nearest level)² of each row, summed in float64.

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
    dtype = working_dtype(rows.dtype)
    nearest = jnp.take_along_axis(levels, assign(rows, levels).astype(jnp.int32), axis=-1, mode="promise_in_bounds")
    with jax.enable_x64(True):
        error = lax.convert_element_type(rows, jnp.float64) - lax.convert_element_type(nearest, jnp.float64)
        square = error * error
        if weights is not None:
            square = square * lax.convert_element_type(weights, jnp.float64)
        if mask is not None:
            square = jnp.where(mask, square, 0.0)
        return lax.convert_element_type(jnp.sum(square, axis=-1), dtype)


def finish(
    rows: jax.Array, levels: jax.Array, weights: jax.Array | None, mask: jax.Array | None, keep_zero: bool
) -> Fit:
    """The `Fit` of levels about which nothing is proven.

    Args:
      rows: `[R, N]` values.
      levels: `[R, K]` ascending levels in the units of the rows.
      weights: `[R, N]` non-negative, or None for 1 each.
      mask: `[R, N]` bool, False where a value does not count, or None.
      keep_zero: replace the level nearest to zero by exactly 0; the others keep their values.
    """
    if keep_zero:
        nearest = jnp.argmin(jnp.abs(levels), axis=-1, keepdims=True)
        levels = jnp.where(jnp.arange(levels.shape[-1]) == nearest, 0, levels)
        levels = jnp.sort(levels, axis=-1)  # the first of several equal negative levels became 0
    scale = row_scale(rows, mask)
    unit = 1 / scale[:, None]
    sse = distortion(rows.astype(levels.dtype) * unit, levels * unit, weights, mask)
    return Fit(levels, sse, jnp.zeros_like(sse), scale)
