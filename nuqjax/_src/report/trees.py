"""Compares two arrays: whether their bits or their values are the same, and by how much they differ."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

_CHUNK = 1 << 20  # values compared at once (`experiments.speed.constants`)


class Square(NamedTuple):
    """A sum of squares, `mantissa` · 4^`exponent`, which can hold both 1e-200² and 1e200²."""

    mantissa: float
    exponent: int


class Difference(NamedTuple):
    """How two arrays of the same shape differ.

    Attributes:
      equal: whether the dtype and every bit are the same.
      equal_values: whether all values are the same, with NaN in the same places; dtypes, signs of zero and the bits of
        NaN do not matter.
      nan: how many NaN each has.
      largest_error: max |x − y|, exact for integers; NaN if only one of the two is NaN at some place.
      signal: Σ x² of floating values; None for integers.
      noise: Σ (x − y)² of floating values; None for integers.
    """

    equal: bool
    equal_values: bool
    nan: tuple[int, int]
    largest_error: float | int
    signal: Square | None
    noise: Square | None

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise ratio in dB; None for integers, infinite where the values are the same."""
        return None if self.signal is None or self.noise is None else ratio_db(self.signal, self.noise)


def difference(first: Any, second: Any) -> Difference:
    """Compares two arrays of the same shape, a million values at a time.

    >>> difference(np.array([2**60]), np.array([2**60 + 1]))[:4]
    (False, False, (0, 0), 1)
    >>> difference(np.array([1e-200]), np.array([5e-200])).equal_values
    False
    >>> nothing = np.array([np.nan])
    >>> difference(nothing, nothing)[:4]
    (True, True, (1, 1), 0.0)
    """
    x, y = np.ascontiguousarray(first).reshape(-1), np.ascontiguousarray(second).reshape(-1)
    equal = x.dtype == y.dtype and all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in _chunks(x, y))
    if _is_whole(x.dtype) and _is_whole(y.dtype):
        largest = max((_largest_of_whole(a, b) for a, b in _chunks(x, y)), default=0)
        return Difference(equal, largest == 0, (0, 0), largest, None, None)
    exact = all(_same_values(a, b) for a, b in _chunks(x, y))
    floating = not _is_whole(x.dtype) and not _is_whole(y.dtype)
    nan = [0, 0]
    strangers = 0.0  # the error at places where the values differ and not both are finite
    greatest = top = 0.0
    for a, b in _chunks(x, y):
        a, b = _wide(a), _wide(b)
        nan[0] += int(np.isnan(a).sum())
        nan[1] += int(np.isnan(b).sum())
        if (np.isnan(a) != np.isnan(b)).any():
            strangers = math.nan
        elif ((a != b) & ~(np.isfinite(a) & np.isfinite(b)) & ~np.isnan(a)).any():
            strangers += math.inf
        a, b = _finite(a, b)
        top = max(top, _greatest(a), _greatest(b))
        with np.errstate(over="ignore"):
            greatest = max(greatest, _greatest(a - b))
    if not floating:
        return Difference(equal, exact, (nan[0], nan[1]), greatest + strangers, None, None)
    shift = 2 if top > 2.0**1021 else 0  # so that a difference of two finite values is finite
    signal, noise = Square(0.0, _exponent(top)), Square(0.0, _exponent(greatest))
    if math.isinf(greatest):
        noise = Square(0.0, 1024)
    for a, b in _chunks(x, y):
        a, b = _finite(_wide(a), _wide(b))
        signal = _plus(signal, a, 0)
        noise = _plus(noise, np.ldexp(_parts(a), -shift) - np.ldexp(_parts(b), -shift), shift)
    noise = Square(noise.mantissa + strangers, noise.exponent)
    return Difference(equal, exact, (nan[0], nan[1]), greatest + strangers, signal, noise)


def total(parts: Iterable[Square]) -> Square:
    """Returns the total of several sums of squares."""
    parts = list(parts)
    exponent = max((part.exponent for part in parts if part.mantissa), default=0)
    return Square(sum(math.ldexp(part.mantissa, 2 * (part.exponent - exponent)) for part in parts), exponent)


def ratio_db(signal: Square, noise: Square) -> float:
    """Returns 10·log10(signal / noise) in dB; infinite where there is no noise.

    >>> ratio_db(Square(1.0, -700), Square(1.0, -700))
    0.0
    """
    if noise.mantissa == 0:
        return math.inf
    if math.isnan(noise.mantissa):
        return math.nan
    if signal.mantissa == 0 or math.isinf(noise.mantissa):
        return -math.inf
    exponents = (signal.exponent - noise.exponent) * 20 * math.log10(2)
    return 10 * math.log10(signal.mantissa / noise.mantissa) + exponents


def same_object(first: Any, second: Any) -> tuple[bool, bool]:
    """Returns for two leaves that are not numeric arrays whether type and bits are the same, and whether values are.

    >>> same_object(True, 1), same_object(math.nan, math.nan), same_object("a", "b")
    ((False, True), (True, True), (False, False))
    """
    if isinstance(first, jax.Array) and isinstance(second, jax.Array):  # random keys
        same = first.dtype == second.dtype and first.shape == second.shape
        same = same and np.array_equal(jax.random.key_data(first), jax.random.key_data(second))
        return same, same
    if isinstance(first, jax.Array) or isinstance(second, jax.Array):
        return False, False
    same = type(first) is type(second) and repr(first) == repr(second)
    return same, same or bool(first == second)


def _chunks(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, x.size, _CHUNK):
        yield x[start : start + _CHUNK], y[start : start + _CHUNK]


def _is_whole(dtype: np.dtype) -> bool:
    return dtype.kind in "biu" or "int" in dtype.name  # ml_dtypes has int4 and the like


def _whole(array: np.ndarray) -> np.ndarray:
    return array.astype(np.uint64 if "uint" in array.dtype.name else np.int64)


def _largest_of_whole(a: np.ndarray, b: np.ndarray) -> int:
    a, b = _whole(a), _whole(b)
    if a.dtype != b.dtype and not ((a >= 0).all() and (b >= 0).all()):  # may exceed 64 bits: uses Python's integers
        return int(np.abs(a.astype(object) - b.astype(object)).max(initial=0))
    if a.dtype != b.dtype:
        a, b = a.astype(np.uint64), b.astype(np.uint64)
    return int((np.maximum(a, b).view(np.uint64) - np.minimum(a, b).view(np.uint64)).max(initial=0))


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _parts(array: np.ndarray) -> np.ndarray:
    return array.view(np.float64) if array.dtype.kind == "c" else array


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    if (_is_whole(a.dtype) or _is_whole(b.dtype)) and 8 in (a.itemsize, b.itemsize):
        return bool((a.astype(object) == b.astype(object)).all())  # float64 does not hold every 64-bit integer
    a, b = _wide(a), _wide(b)
    return bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())


def _finite(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both arrays in one dtype, with zeros where not both are finite."""
    both = np.isfinite(a) & np.isfinite(b)
    dtype = np.result_type(a, b)
    return np.where(both, a, 0).astype(dtype), np.where(both, b, 0).astype(dtype)


def _greatest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0))


def _exponent(value: float) -> int:
    return math.frexp(value)[1] if math.isfinite(value) else 1024


def _plus(sum_: Square, values: np.ndarray, shift: int) -> Square:
    """Returns a sum of squares with those of values · 2^shift added."""
    scaled = np.ldexp(_parts(values), shift - sum_.exponent)
    return Square(sum_.mantissa + float(np.vdot(scaled, scaled)), sum_.exponent)
