"""Levels and scales as their formats hold them."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from nuqjax.fixed_point import AutoQFormat, QFormat, decode_on_host, encode_on_host


def rounded_levels(levels: np.ndarray, codebook_format: Any, dtype: np.dtype) -> np.ndarray:
    """The nearest values, float32, that a format of levels holds; `dtype`, the leaf's, where it is None."""
    if isinstance(codebook_format, QFormat):
        return decode_on_host(encode_on_host(np.asarray(levels, np.float64), codebook_format), codebook_format)
    return _rounded(levels, np.dtype(dtype if codebook_format is None else codebook_format))


def rounded_scale(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The nearest values, float32, that a dtype holds."""
    return _rounded(scale, dtype)


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    most = min(float(jnp.finfo(dtype).max), float(np.finfo(np.float32).max))
    return np.clip(values, -most, most).astype(dtype).astype(np.float32)


def scale_dtype(codebook_format: Any, dtype: np.dtype) -> np.dtype:
    """The dtype of the scales beside levels of a format: of 16 bits if the levels have no more, else the leaf's."""
    if codebook_format is None or isinstance(codebook_format, QFormat | AutoQFormat):
        return np.dtype(dtype)
    levels = np.dtype(codebook_format)
    return levels if levels.itemsize >= 2 else np.dtype(np.float16)


def level_unit(levels: np.ndarray, scale: np.ndarray, codebook_format: Any) -> float:
    """By what the levels are multiplied, and the scales divided, to make the most of the range of their formats."""
    largest = float(np.abs(levels).max(initial=0))
    if largest == 0:
        return 1.0
    if isinstance(codebook_format, QFormat | AutoQFormat):
        top = codebook_format.range[1] if isinstance(codebook_format, QFormat) else 1.0
        return (top or 1.0) / largest
    # Of float levels any range does, unless the scales would leave that of 16-bit floats.
    exponent = math.frexp(float(scale.max(initial=0)) or 1.0)[1]
    return 2.0 ** (exponent - min(max(exponent, -4), 8))


def chosen_format(auto: AutoQFormat, levels: np.ndarray, mass: np.ndarray, has_scale: bool) -> QFormat:
    """The `QFormat` that moves the levels least, each counted by the mass of what it stands for.

    Levels with a scale are within ±1 already.
    """
    whole = math.frexp(float(np.abs(levels).max(initial=0)))[1] if not has_scale else 0
    full = auto.word - auto.signed - whole
    best = math.inf, full
    for frac in range(full, full + 8 if not has_scale else full + 1):
        frac = min(max(frac, -512), 512)
        moved = rounded_levels(levels, QFormat(auto.word, frac, auto.signed), np.dtype(np.float32)) - levels
        best = min(best, (float((mass * moved.astype(np.float64) ** 2).sum()), frac))
    return QFormat(auto.word, min(max(best[1], -512), 512), auto.signed)
