"""Integer arithmetic on raw words: dropping bits, dividing, and bringing into range.

All of it is exact but for the named rounding and overflow modes, which are those of `nuqjax.fixed_point`. Words are
int32 or int64, and results have the dtype of the words.
"""

from typing import overload

import jax
import jax.numpy as jnp
from jax import lax

from nuqjax._src.leaf.qformat import QFormat
from nuqjax._src.platform.host import x64


def drop_bits(raw: jax.Array, bits: int, rounding: str) -> jax.Array:
    """Divides words by 2^bits and rounds to integers; returns them unchanged where `bits` is not positive."""
    if bits <= 0:
        return raw
    width = jnp.iinfo(raw.dtype).bits
    if bits >= width:  # 1/4 replaces all magnitudes below 1/2, which only the least word can reach
        half = (raw == jnp.iinfo(raw.dtype).min) & (bits == width)
        bits, raw = 2, jnp.where(half, -2, jnp.sign(raw)).astype(raw.dtype)
    whole = raw >> bits
    # The quotient is `whole` + rest / 2^bits, 0 ≤ rest < 2^bits; the integer `rest` is compared without rounding.
    rest, half = raw - (whole << bits), jnp.asarray(1 << (bits - 1), raw.dtype)
    return whole + rounds_up(whole, raw < 0, rest > 0, rest > half, rest == half, rounding).astype(raw.dtype)


def divide(raw: jax.Array, divisor: int | jax.Array, rounding: str) -> jax.Array:
    """Divides words by a positive integer: the exact quotient, rounded once to an integer.

    Twice the divisor must fit the dtype.

    >>> divide(jnp.array([7, -6, 10]), 4, "half_even").tolist()
    [2, -2, 2]
    """
    divisor = jnp.asarray(divisor, raw.dtype)
    toward_zero = lax.div(raw, jnp.broadcast_to(divisor, raw.shape))
    rest = raw - toward_zero * divisor
    whole, rest = jnp.where(rest < 0, toward_zero - 1, toward_zero), jnp.where(rest < 0, rest + divisor, rest)
    up = rounds_up(whole, raw < 0, rest > 0, 2 * rest > divisor, 2 * rest == divisor, rounding)
    return whole + up.astype(raw.dtype)


@overload
def rounds_up(whole: int, negative: bool, inexact: bool, above: bool, tie: bool, rounding: str) -> bool: ...
@overload
def rounds_up(
    whole: jax.Array, negative: jax.Array, inexact: jax.Array, above: jax.Array, tie: jax.Array, rounding: str
) -> jax.Array: ...
def rounds_up(
    whole: jax.Array | int,
    negative: jax.Array | bool,
    inexact: jax.Array | bool,
    above: jax.Array | bool,
    tie: jax.Array | bool,
    rounding: str,
) -> jax.Array | bool:
    """Returns whether a value between `whole` and `whole` + 1 rounds up; it is `above` the middle, or at it (`tie`)."""
    match rounding:
        case "floor":
            return inexact & False
        case "toward_zero":
            return negative & inexact
        case "half_up":
            return above | tie
        case "half_down":
            return above
        case "half_away":
            return above | (tie & (negative ^ True))
        case "half_toward_zero":
            return above | (tie & negative)
        case "half_even":
            return above | (tie & ((whole & 1) == 1))
    raise ValueError(f"unknown rounding {rounding!r}")


def outside(whole: jax.Array, shift: int, fmt: QFormat) -> jax.Array:
    """Returns where whole · 2^shift is outside the format's range."""
    return (whole > fmt.largest >> shift) | (whole < -(-fmt.least >> shift))


def into_range(whole: jax.Array, shift: int, fmt: QFormat, overflow: str) -> jax.Array:
    """Brings words · 2^shift into the format's range; the range is tested before the shift, which could overflow."""
    least, largest = fmt.least, fmt.largest
    width = jnp.iinfo(whole.dtype).bits
    if overflow == "wrap":
        low = whole << shift if shift < width else jnp.zeros_like(whole)  # modulo 2^width
        if fmt.word == width:
            return low
        low = low & ((1 << fmt.word) - 1)
        return jnp.where(low > largest, low - (1 << fmt.word), low) if fmt.signed else low
    if overflow == "saturate_symmetric" and fmt.signed:
        least = -largest
    above, below = whole > largest >> shift, whole < -(-least >> shift)
    inside = jnp.where(above | below, 0, whole) << min(shift, width - 1)
    if overflow == "saturate_zero":
        return inside
    return jnp.where(above, largest, jnp.where(below, least, inside)).astype(whole.dtype)


def saturating_rounding_doubling_high_mul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes round(a · b / 2^31) of int32 words, halves up; −2^31 times −2^31 gives 2^31 − 1.

    This is the first rounding of gemmlowp's requantization (gemmlowp, `fixedpoint/fixedpoint.h`).

    >>> saturating_rounding_doubling_high_mul(jnp.array([1, -1]), jnp.array([1 << 30, 1 << 30])).tolist()
    [1, 0]
    """
    with x64():
        product = lax.convert_element_type(a, jnp.int64) * lax.convert_element_type(b, jnp.int64)
        high = drop_bits(product, 31, "half_up")
        return lax.convert_element_type(jnp.minimum(high, (1 << 31) - 1), jnp.int32)


def rounding_divide_by_power_of_two(raw: jax.Array, exponent: int) -> jax.Array:
    """Computes round(raw / 2^exponent), halves away from zero: the second rounding of gemmlowp's requantization.

    >>> rounding_divide_by_power_of_two(jnp.array([5, -5]), 1).tolist()
    [3, -3]
    """
    return drop_bits(raw, exponent, "half_away")


def drop_bits_twice(raw: jax.Array, bits: int) -> jax.Array:
    """Drops bits as gemmlowp does: one by a multiplication by 2^30 (halves up), the rest by a shift (halves away).

    >>> drop_bits_twice(jnp.array([5]), 2).tolist()
    [2]
    """
    return drop_bits(drop_bits(raw, min(bits, 1), "half_up"), bits - 1, "half_away")
