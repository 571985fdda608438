"""Random values for the benchmarks, the same at every call."""

import math
from typing import Any

import numpy as np

_BLOCK = 2**20  # values drawn at once, as float64
_ALIGNMENT = 64  # bytes; JAX takes such an array as it is, without a copy


def student_t(degrees: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Student-t values; drawn in blocks, so that 10⁸ take no more memory than they must."""
    random = np.random.default_rng(20170427 + degrees)
    values = aligned(math.prod(shape), np.dtype(dtype))
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        block[:] = random.standard_t(degrees, block.size).astype(dtype)
    return values.reshape(shape)


def aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose first byte is at a multiple of 64."""
    size = count * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype)
