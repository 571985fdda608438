"""Nearest level, the tie rule and the distortion.

Every fit ends here: a row of values and its sorted levels give indices, and indices give the squared error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Fit(NamedTuple):
    """Levels fitted to rows, and what they cost.

    Attributes:
      levels: `[R, K]` ascending levels in the units of the rows; float32, or float64 for float64 rows.
      sse: `[R]` squared error Σ wᵢ (xᵢ − level)² of the returned levels on the data, in units of `scale`².
      lower_bound: `[R]` proven lower bound on the least possible squared error of K levels, in units of `scale`²;
        0 where nothing is proven.
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


def row_scale(rows: Any, mask: Any = None) -> Any:
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
    xp = namespace(rows)
    largest = largest_magnitude(rows, mask)
    _, exponent = xp.frexp(largest)
    limit = 1022 if largest.dtype == jnp.float64 else 126
    exponent = xp.clip(exponent - 1, -limit, limit)
    one = xp.ones_like(largest)
    return xp.where(largest > 0, xp.ldexp(one, exponent), one)


def largest_magnitude(rows: Any, mask: Any = None) -> Any:
    """`[R]` the largest magnitude of each row, in the working dtype; 0 where nothing counts."""
    dtype = working_dtype(rows.dtype)
    if not isinstance(rows, np.ndarray):
        magnitude = jnp.abs(rows.astype(dtype))
        return jnp.max(magnitude if mask is None else jnp.where(mask, magnitude, 0), axis=-1, initial=0)
    largest = np.zeros(rows.shape[0], dtype)

    def block(some, columns):
        magnitude = np.abs(rows[some, columns].astype(dtype, copy=False))
        if mask is not None:
            magnitude *= mask[some, columns]
        return some, magnitude.max(axis=-1)

    for some, most in over_blocks(block, *rows.shape):
        np.maximum(largest[some], most, out=largest[some])
    return flushed(largest)


def thresholds(levels: Any) -> Any:
    """The largest float not above the exact midpoint of each pair of neighbouring levels.

    A value x of the same dtype lies strictly above the midpoint exactly if x > threshold: no rounding of the midpoint
    can move a value across it. Between equal levels it is the threshold above the last of them (infinity at the end).
    Subnormal numbers count as zero, as they do in XLA's arithmetic on CPU and TPU.

    Args:
      levels: `[..., K]` ascending float32 or float64 levels.

    Returns:
      `[..., K − 1]` ascending thresholds.
    """
    xp = namespace(levels)
    dtype = levels.dtype
    if xp is np:
        levels = flushed(levels)
    low, high = levels[..., :-1], levels[..., 1:]
    equal = low == high
    # Halved if large and enlarged if small, so that neither the sum nor its rounding error leaves the normal numbers.
    # Beside a large level a very small one only says to which side of the large one's half the midpoint leans.
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
    # Between equal levels nothing passes before the next distinct one does, so a run of equals is used by its first.
    cuts = xp.where(equal, xp.asarray(np.inf, dtype), cuts)
    if xp is np:
        return flushed(np.minimum.accumulate(cuts[..., ::-1], axis=-1)[..., ::-1])
    return lax.cummin(cuts, axis=cuts.ndim - 1, reverse=True)


_COMPARE_LEVELS = 32  # up to here comparing with every threshold in one fused loop beats a binary search


def assign(rows: jax.Array, levels: jax.Array) -> jax.Array:
    """The index of each value's nearest level; a value exactly between two takes the lower one.

    Args:
      rows: `[R, N]` floating values.
      levels: `[R, K]` ascending levels, K ≤ 256.

    Returns:
      `[R, N]` uint8 indices. Of equal levels the first is taken. Of arrays on the host NumPy finds them, the same ones,
      and nothing is compiled.

    >>> import jax.numpy as jnp
    >>> assign(jnp.array([[-1.0, 0.4, 0.5, 0.6]]), jnp.array([[0.0, 1.0]])).tolist()
    [[0, 0, 0, 1]]
    """
    num_levels = levels.shape[-1]
    if num_levels > 256:
        raise ValueError(f"assign: {num_levels} levels, but a uint8 index counts at most 256")
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
    """The number of `cuts` below each value, by halving steps."""
    steps = cuts.shape[-1].bit_length()
    padding = jnp.full((cuts.shape[0], (1 << steps) - 1 - cuts.shape[-1]), jnp.inf, cuts.dtype)
    cuts = jnp.concatenate([cuts, padding], axis=-1)
    index = jnp.zeros(rows.shape, jnp.int32)
    for step in reversed(range(steps)):
        probe = jnp.take_along_axis(cuts, index + ((1 << step) - 1), axis=-1, mode="promise_in_bounds")
        index = index + ((rows > probe).astype(jnp.int32) << step)
    return index.astype(jnp.uint8)


_TABLE_LEVELS, _TABLE_LENGTH = 17, 2**16  # of NumPy: from here on a table pays, which each row has to itself
_STRETCH = 2**20  # values for which a table is made
_COMPARE_CUTS = 31  # of NumPy: up to here comparing with every threshold beats halving steps
_SHORT = 64  # values of rows along which NumPy is slow


def assign_on_host(rows: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """`assign` by NumPy."""
    dtype = np.promote_types(working_dtype(rows.dtype), working_dtype(levels.dtype))
    count, length = rows.shape
    num_levels = levels.shape[-1]
    indices = np.empty(rows.shape, np.uint8)
    cuts = thresholds(levels.astype(dtype))
    # Subnormal values count as zero: none of them lies above a threshold of zero.
    cuts = np.where(cuts == 0, np.nextafter(np.finfo(dtype).tiny, dtype.type(0)), cuts)
    long = num_levels >= _TABLE_LEVELS and length >= _TABLE_LENGTH and dtype == np.float32

    def block(some, columns):
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
    """The number of cuts `[r, K − 1]` below each of a few values `[r, n]`."""
    if cuts.shape[1] > _COMPARE_CUTS or values.shape[1] <= _SHORT:
        return _halve(values, cuts)
    found, above = np.zeros(values.shape, np.uint8), np.empty(values.shape, bool)
    for cut in cuts.T:
        np.greater(values, cut[:, None], out=above)
        found += above.view(np.uint8)
    return found


def _halve(values: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The number of cuts below each value, by halving steps: many rows at once, so that short ones cost no more."""
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
    """The number of cuts below each value of a float32 row, looked up by the upper half of its bits.

    Where values of one upper half have one cut between them it is compared with; where they have more it is searched.
    """
    half = cuts.view(np.uint32) >> 16
    place = np.where(half < 2**15, half + 2**15, 2**16 - 1 - half)  # in the order of the values
    times = np.bincount(place, minlength=2**16)
    below = np.cumsum(times) - times
    first = np.append(cuts, np.float32(np.inf))[below]
    # By bits: the positive values first, and of the negative ones the larger.
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
    if on_host(rows, levels, weights, mask):
        return to_jax(distortion_on_host(*(row_by_row(to_numpy(x)) for x in (rows, levels, weights, mask))))
    dtype = working_dtype(rows.dtype)
    nearest = look_up(levels, assign(rows, levels))
    with x64():
        error = lax.convert_element_type(rows, jnp.float64) - lax.convert_element_type(nearest, jnp.float64)
        square = error * error
        if weights is not None:
            square = square * lax.convert_element_type(weights, jnp.float64)
        if mask is not None:
            square = jnp.where(mask, square, 0.0)
        return lax.convert_element_type(jnp.sum(square, axis=-1), dtype)


def distortion_on_host(
    rows: np.ndarray, levels: np.ndarray, weights: np.ndarray | None, mask: np.ndarray | None, unit: Any = 1.0
) -> np.ndarray:
    """`distortion` by NumPy, of rows and levels both times `unit`, one for all or `[R, 1]`.

    The last bit of a float64 sum may be another than XLA's; the same rows give the same bits.
    """
    count, length = rows.shape
    dtype = working_dtype(rows.dtype)
    indices, exact = assign_on_host(rows, levels), levels.astype(np.float64)
    unit = np.broadcast_to(np.asarray(unit, np.float64), (count, 1))

    def block(some, columns):
        error = flushed(rows[some, columns].astype(dtype)) - look_up(exact[some], indices[some, columns])
        with np.errstate(over="ignore", invalid="ignore"):  # of values that do not count
            error *= unit[some]
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


def with_zero(levels: Any) -> Any:
    """Levels `[R, K]` of which the one nearest to zero is replaced by exactly 0; the others keep their values."""
    xp = namespace(levels)
    nearest = xp.argmin(xp.abs(levels), axis=-1, keepdims=True)
    levels = xp.where(xp.arange(levels.shape[-1])[None] == nearest, xp.zeros((), levels.dtype), levels)
    return xp.sort(levels, axis=-1)  # the first of several equal negative levels became 0


def finish(rows: Any, levels: Any, weights: Any, mask: Any, keep_zero: bool) -> Fit:
    """The `Fit` of levels about which nothing is proven.

    Args:
      rows: `[R, N]` values.
      levels: `[R, K]` ascending levels in the units of the rows.
      weights: `[R, N]` non-negative, or None for 1 each.
      mask: `[R, N]` bool, False where a value does not count, or None.
      keep_zero: replace the level nearest to zero by exactly 0; the others keep their values.
    """
    levels = with_zero(levels) if keep_zero else levels
    scale = row_scale(rows, mask)
    unit = 1 / scale[:, None]
    if isinstance(rows, np.ndarray):
        sse = distortion_on_host(rows, levels, weights, mask, unit)
        return Fit(*map(to_jax, (levels, sse, np.zeros_like(sse), scale)))
    sse = distortion(rows.astype(levels.dtype) * unit, levels * unit, weights, mask)
    return Fit(levels, sse, jnp.zeros_like(sse), scale)


def fit_by(levels_of: Callable[..., Any]) -> Callable[..., Fit]:
    """The fit function, as `METHODS` has them, of a method about whose levels nothing is proven.

    Args:
      levels_of: `levels_of(rows, num_levels, weights=…, mask=…)` gives `[R, K]` levels: of NumPy's rows NumPy's, and of
        others JAX's.
    """

    def fit(rows, num_levels, *, weights=None, mask=None, keep_zero=False, tolerance=None) -> Fit:
        del tolerance
        return finish(rows, levels_of(rows, num_levels, weights=weights, mask=mask), weights, mask, keep_zero)

    return fit
