"""Fixed-point formats, and the names of the rounding and overflow modes of arithmetic on words."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import jax.numpy as jnp
from jax.typing import DTypeLike

ROUNDING = ("floor", "toward_zero", "half_up", "half_down", "half_away", "half_toward_zero", "half_even")
OVERFLOW = ("saturate", "saturate_symmetric", "saturate_zero", "wrap")


@dataclass(frozen=True)
class QFormat:
    """A fixed-point format: `word` bits in all, `frac` bits after the binary point; value = raw · 2^−frac.

    Attributes:
      word: word length in bits, sign included: 1 to 32, or 31 if unsigned, since raw words are int32.
      frac: number of fraction bits; may be negative or above `word`.
      signed: two's complement if True, else non-negative.

    >>> QFormat(8, 6).range
    (-2.0, 1.984375)
    """

    word: int
    frac: int
    signed: bool = True

    def __post_init__(self) -> None:
        _check_word(self.word, self.signed, "QFormat")
        if isinstance(self.frac, bool) or not isinstance(self.frac, int) or abs(self.frac) > 512:
            raise ValueError(f"QFormat: frac {self.frac!r}, but a whole number from -512 to 512 is wanted")

    @property
    def least(self) -> int:
        """The least raw integer."""
        return -(1 << (self.word - 1)) if self.signed else 0

    @property
    def largest(self) -> int:
        """The largest raw integer."""
        return (1 << (self.word - self.signed)) - 1

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value."""
        return self.least * 2.0**-self.frac, self.largest * 2.0**-self.frac

    @property
    def storage_dtype(self) -> jnp.dtype:
        """The smallest integer dtype that holds every raw integer."""
        kind = "int" if self.signed else "uint"
        return jnp.dtype(f"{kind}{8 if self.word <= 8 else 16 if self.word <= 16 else 32}")


@dataclass(frozen=True)
class AutoQFormat:
    """A `QFormat` of `word` bits whose fraction bits are chosen per leaf to minimise its squared error.

    >>> AutoQFormat(8)
    AutoQFormat(word=8, signed=True)
    """

    word: int
    signed: bool = True

    def __post_init__(self) -> None:
        _check_word(self.word, self.signed, "AutoQFormat")


CodebookFormat: TypeAlias = DTypeLike | QFormat | AutoQFormat | None
"""How levels are stored; None for the leaf's dtype."""


def of_least_error(formats: Iterable[QFormat], error_of: Callable[[QFormat, float], float]) -> QFormat:
    """Returns the format of least error; of equally good ones, that with the fewest fraction bits.

    Args:
      formats: the formats to try, in this order; they differ in their fraction bits alone.
      error_of: `error_of(format, least)` returns the error of a format. It may return infinity without computing the
        error if that is certain to be above `least`, the least error so far.

    >>> of_least_error((QFormat(4, frac) for frac in range(3)), lambda fmt, least: abs(fmt.range[1] - 2))
    QFormat(word=4, frac=2, signed=True)
    """
    best, least = None, math.inf
    for fmt in formats:
        error = error_of(fmt, least)
        if best is None or (error, fmt.frac) < (least, best.frac):
            best, least = fmt, error
    assert best is not None
    return best


def _check_word(word: object, signed: bool, name: str) -> None:
    most = 32 if signed else 31
    if isinstance(word, bool) or not isinstance(word, int) or not 1 <= word <= most:
        raise ValueError(f"{name}: a word of {word!r} bits, but a whole number from 1 to {most} is wanted")


def check_modes(rounding: str, overflow: str) -> None:
    """Raises ValueError, listing the known modes, unless both modes are known."""
    if rounding not in ROUNDING:
        raise ValueError(f"unknown rounding {rounding!r}; known: {', '.join(ROUNDING)}")
    if overflow not in OVERFLOW:
        raise ValueError(f"unknown overflow {overflow!r}; known: {', '.join(OVERFLOW)}")
