"""Fixed-point words: converts values to raw integers and back, by named rounding and overflow modes.

A raw integer in a `QFormat(word, frac)` represents the value raw · 2^−frac.

Rounding modes, with the names of ap_fixed, MATLAB and IEEE 754:

| here | a value between two words goes | ap_fixed | MATLAB fi | IEEE 754 |
|---|---|---|---|---|
| `floor` | down | AP_TRN | Floor | roundTowardNegative |
| `toward_zero` | to the one nearer zero | AP_TRN_ZERO | Zero | roundTowardZero |
| `half_up` | to the nearest, halves up | AP_RND | Nearest | |
| `half_down` | to the nearest, halves down | AP_RND_MIN_INF | | |
| `half_away` | to the nearest, halves away from zero | AP_RND_INF | Round | roundTiesToAway |
| `half_toward_zero` | to the nearest, halves to zero | AP_RND_ZERO | | |
| `half_even` | to the nearest, halves to the even word | AP_RND_CONV | Convergent | roundTiesToEven |

Overflow modes: `saturate` (AP_SAT, Saturate), `saturate_symmetric` (AP_SAT_SYM: the least word is minus the largest),
`saturate_zero` (AP_SAT_ZERO: words out of range become 0), `wrap` (AP_WRAP, Wrap: modulo 2^word).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.leaf.qformat import QFormat, check_modes
from nuqjax._src.leaf.rows import namespace
from nuqjax._src.leaf.words import drop_bits, into_range
from nuqjax._src.platform.host import flushed, on_host, to_jax, x64
from nuqjax._src.platform.types import A


def encode(x: jax.Array, fmt: QFormat, *, rounding: str = "half_even", overflow: str = "saturate") -> jax.Array:
    """Converts real values to raw integers: rounds them first, then brings them into range.

    Args:
      x: floating values of any shape, finite.
      fmt: the format.
      rounding: one of `ROUNDING`.
      overflow: one of `OVERFLOW`.

    Returns:
      int32 raw integers of the same shape. Every step but the rounding is exact.

    Raises:
      ValueError: a mode is unknown.

    >>> import jax.numpy as jnp
    >>> encode(jnp.array([0.625, 0.875, -9.0]), QFormat(4, 2)).tolist()
    [2, 4, -8]
    """
    check_modes(rounding, overflow)
    if on_host(x):
        return to_jax(encode_on_host(np.asarray(x), fmt, rounding, overflow))
    with x64():
        whole = _round(_scaled(x, fmt), rounding)
        return lax.convert_element_type(_overflow(whole, fmt, overflow), jnp.int32)


def encode_on_host(x: np.ndarray, fmt: QFormat, rounding: str = "half_even", overflow: str = "saturate") -> np.ndarray:
    """Computes `encode` in NumPy."""
    return _overflow(_round(_scaled_on_host(x, fmt), rounding), fmt, overflow).astype(np.int32)


def overflows(x: jax.Array, fmt: QFormat, *, rounding: str = "half_even") -> jax.Array:
    """Returns where real values, once rounded, are outside the format's range, so that `encode` changes them.

    >>> import jax.numpy as jnp
    >>> overflows(jnp.array([1.75, 1.875, -2.0]), QFormat(4, 2)).tolist()
    [False, True, False]
    """
    check_modes(rounding, "saturate")
    if on_host(x):
        whole = _round(_scaled_on_host(np.asarray(x), fmt), rounding)
        return to_jax((whole < fmt.least) | (whole > fmt.largest))
    with x64():
        whole = _round(_scaled(x, fmt), rounding)
        return (whole < fmt.least) | (whole > fmt.largest)


def _scaled(x: jax.Array, fmt: QFormat) -> jax.Array:
    """Returns real values in units of the format's last place, in float64."""
    return lax.convert_element_type(x, jnp.float64) * 2.0**fmt.frac


def _scaled_on_host(x: np.ndarray, fmt: QFormat) -> np.ndarray:
    """Computes `_scaled` in NumPy, with 0 for subnormal values as in XLA."""
    x = flushed(x) if jnp.issubdtype(x.dtype, jnp.floating) else x
    with np.errstate(over="ignore"):
        return flushed(x.astype(np.float64) * 2.0**fmt.frac)


def decode(raw: jax.Array, fmt: QFormat) -> jax.Array:
    """Converts raw integers to real float32 values: exact for words of up to 24 bits, else rounded once.

    >>> import jax.numpy as jnp
    >>> decode(jnp.array([-8, 3]), QFormat(4, 2)).tolist()
    [-2.0, 0.75]
    """
    if on_host(raw):
        return to_jax(decode_on_host(np.asarray(raw), fmt))
    with x64():
        return lax.convert_element_type(lax.convert_element_type(raw, jnp.float64) * 2.0**-fmt.frac, jnp.float32)


def decode_on_host(raw: np.ndarray, fmt: QFormat) -> np.ndarray:
    """Computes `decode` in NumPy."""
    with np.errstate(over="ignore"):
        return flushed((raw.astype(np.float64) * 2.0**-fmt.frac).astype(np.float32))


def requantize(
    raw: jax.Array, source: QFormat, target: QFormat, *, rounding: str = "half_even", overflow: str = "saturate"
) -> jax.Array:
    """Converts raw integers from one format to another: rounds first, then brings into range. It uses no floats.

    Args:
      raw: integers of any shape and dtype, such as an accumulator's; they may be outside the range of `source`.
      source: the format of `raw`; only its fraction bits matter.
      target: the format of the result.
      rounding: one of `ROUNDING`, where fraction bits are dropped.
      overflow: one of `OVERFLOW`.

    Returns:
      int32 raw integers of the same shape; int64 if `raw` is.

    Raises:
      ValueError: a mode is unknown.
      TypeError: the dtype of `raw` is not an integer one.

    >>> import jax.numpy as jnp
    >>> requantize(jnp.array([20, -20, 60]), QFormat(8, 3), QFormat(4, 0)).tolist()
    [2, -2, 7]
    >>> requantize(jnp.array([20, -20, 60]), QFormat(8, 3), QFormat(4, 0), rounding="floor", overflow="wrap").tolist()
    [2, -3, 7]
    """
    check_modes(rounding, overflow)
    if not jnp.issubdtype(jnp.result_type(raw), jnp.integer):
        raise TypeError(f"requantize: raw words are integers, not {jnp.result_type(raw)}")
    dtype = jnp.int64 if jnp.result_type(raw) == jnp.int64 else jnp.int32
    with x64():
        wide = lax.convert_element_type(raw, jnp.int64)
        drop = source.frac - target.frac
        kept = into_range(drop_bits(wide, drop, rounding), max(-drop, 0), target, overflow)
        return lax.convert_element_type(kept, dtype)


def _round(scaled: A, rounding: str) -> A:
    """Rounds float64 values to whole numbers."""
    xp = namespace(scaled)
    magnitude, negative = xp.abs(scaled), scaled < 0
    below = xp.floor(magnitude)
    rest = magnitude - below  # exact: the fraction digits of the magnitude
    half = rest == 0.5
    match rounding:
        case "floor":
            up = negative & (rest > 0)
        case "toward_zero":
            up = xp.zeros_like(negative)
        case "half_up":
            up = (rest > 0.5) | (half & ~negative)
        case "half_down":
            up = (rest > 0.5) | (half & negative)
        case "half_away":
            up = rest >= 0.5
        case "half_toward_zero":
            up = rest > 0.5
        case _:
            up = (rest > 0.5) | (half & (xp.fmod(below, 2.0) != 0))
    whole = below + up
    return xp.where(negative, -whole, whole)


def _overflow(whole: A, fmt: QFormat, overflow: str) -> A:
    """Brings whole float64 values into the format's range."""
    xp = namespace(whole)
    least, largest = float(fmt.least), float(fmt.largest)
    match overflow:
        case "saturate":
            return xp.clip(whole, least, largest)
        case "saturate_symmetric":
            return xp.clip(whole, -largest if fmt.signed else 0.0, largest)
        case "saturate_zero":
            return xp.where((whole < least) | (whole > largest), 0.0, whole)
    span = 2.0**fmt.word
    wrapped = xp.fmod(whole, span)  # exact, with the sign of `whole`
    wrapped = xp.where(wrapped < least, wrapped + span, wrapped)
    return xp.where(wrapped > largest, wrapped - span, wrapped)
