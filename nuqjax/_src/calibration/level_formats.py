"""Rounds levels and scales to their formats."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from nuqjax._src.leaf.fixed_point import decode_on_host, encode_on_host
from nuqjax._src.leaf.qformat import AutoQFormat, QFormat, of_least_error


def rounded_levels(levels: np.ndarray, codebook_format: Any, dtype: np.dtype) -> np.ndarray:
    """Returns the nearest values of a format of levels, as float32; a format of None stands for the leaf's `dtype`."""
    if isinstance(codebook_format, QFormat):
        return decode_on_host(encode_on_host(np.asarray(levels, np.float64), codebook_format), codebook_format)
    return _rounded(levels, np.dtype(dtype if codebook_format is None else codebook_format))


def rounded_scale(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the nearest values of a dtype, as float32."""
    return _rounded(scale, dtype)


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    most = min(float(jnp.finfo(dtype).max), float(np.finfo(np.float32).max))
    return np.clip(values, -most, most).astype(dtype).astype(np.float32)


def scale_dtype(codebook_format: Any, dtype: np.dtype) -> np.dtype:
    """Returns the dtype of the scales for a format of levels: 16 bits if the levels are no wider, else the leaf's."""
    if codebook_format is None or isinstance(codebook_format, QFormat | AutoQFormat):
        return np.dtype(dtype)
    levels = np.dtype(codebook_format)
    return levels if levels.itemsize >= 2 else np.dtype(np.float16)


def level_unit(levels: np.ndarray, scale: np.ndarray, codebook_format: Any, dtype: np.dtype) -> float:
    """Returns the factor that multiplies levels and divides scales to use the range of their formats well."""
    largest = float(np.abs(levels).max(initial=0))
    if largest == 0:
        return 1.0
    if isinstance(codebook_format, QFormat | AutoQFormat):
        top = codebook_format.range[1] if isinstance(codebook_format, QFormat) else 1.0
        return (top or 1.0) / largest
    if scale_dtype(codebook_format, dtype) != np.float16:
        return 1.0
    exponent = math.frexp(float(scale.max(initial=0)) or 1.0)[1]
    return 2.0 ** (exponent - min(max(exponent, -4), 8))


def chosen_format(auto: AutoQFormat, levels: np.ndarray, has_scale: bool) -> QFormat:
    """Returns the `QFormat` that changes the levels least; levels with a scale are within ±1 and get the finest."""
    whole = 0 if has_scale else math.frexp(float(np.abs(levels).max(initial=0)))[1]
    full = auto.word - auto.signed - whole

    def moved(fixed: QFormat, _: float) -> float:
        rounded = rounded_levels(levels, fixed, np.dtype(np.float32))
        return float(((rounded - levels).astype(np.float64) ** 2).sum())

    within = [min(max(frac, -512), 512) for frac in range(full, full + (1 if has_scale else 8))]
    return of_least_error((QFormat(auto.word, frac, auto.signed) for frac in within), moved)
