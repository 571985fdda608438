"""Work on host arrays, which are NumPy's, or JAX's on one CPU: NumPy computes it, so that nothing compiles.

On a CPU, XLA reads subnormal numbers as 0 and NumPy does not; `flushed` replaces them by 0. NumPy releases the
interpreter lock while it works, so blocks of a large array are computed by as many threads as there are cores.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from nuqjax._src.platform.compat import enable_x64
from nuqjax._src.platform.types import Array, T

BLOCK = 2**15  # so many values have temporaries that stay in a core's own cache
_SHARED = 2**20  # from so many values on, threads are worth starting


def on_host(*arrays: object) -> bool:
    """Returns whether all of these, None ignored, are concrete and held by NumPy, or by JAX on one CPU."""
    return all(_one_on_host(array) for array in arrays)


def _one_on_host(array: object) -> bool:
    if isinstance(array, jax.core.Tracer):
        return False
    if not isinstance(array, jax.Array):
        return True
    devices = array.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def native_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype that JAX converts this one to: in the machine's byte order, and no wider than x64 mode allows.

    >>> native_dtype(np.dtype(">f4"))
    dtype('float32')
    """
    return jax.dtypes.canonicalize_dtype(np.dtype(dtype).newbyteorder("="))


def why_unfit(dtype: DTypeLike) -> str | None:
    """Returns the reason why values of a dtype cannot be fitted; None if they can.

    >>> why_unfit(np.dtype(np.int8)), why_unfit(jnp.bfloat16)
    ('dtype int8 is not floating', None)
    """
    if not jnp.issubdtype(dtype, jnp.floating):  # random keys, for example
        return f"dtype {getattr(dtype, 'name', dtype)} is not floating"
    dtype = np.dtype(dtype)
    if not hasattr(jnp, dtype.name):
        return f"JAX has no dtype {dtype.name}"
    if dtype.name.startswith("float6_"):  # converting them aborts the process
        return f"XLA does not compute with dtype {dtype.name}"
    if float(jnp.finfo(dtype).min) >= 0:
        return f"dtype {dtype.name} has neither zero nor negative numbers"
    return None


@contextlib.contextmanager
def x64() -> Iterator[None]:
    """Enters a context with float64, int64 and standard promotion of dtypes and ranks, whatever the user's flags."""
    with enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def working_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype in which values are fitted and their levels returned: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@overload
def to_numpy(array: ArrayLike) -> np.ndarray: ...
@overload
def to_numpy(array: None) -> None: ...
def to_numpy(array: ArrayLike | None) -> np.ndarray | None:
    """Returns a host array as NumPy's in JAX's dtype for it, and copies only to convert; None stays None."""
    if array is None:
        return None
    array = np.asarray(array)
    return array.astype(native_dtype(array.dtype), copy=False)


@overload
def row_by_row(array: Array) -> np.ndarray: ...
@overload
def row_by_row(array: None) -> None: ...
def row_by_row(array: Array | None) -> np.ndarray | None:
    """Returns the array with the values of each row contiguous in memory, where NumPy is fast; None stays None."""
    return None if array is None else np.ascontiguousarray(array)


def to_jax(array: np.ndarray) -> jax.Array:
    """Moves a NumPy array that nothing else uses to JAX: this compiles nothing, and `jnp.asarray` would copy it."""
    return jax.device_put(array)


def flushed(values: np.ndarray) -> np.ndarray:
    """Returns float32 or float64 values with 0 for subnormal ones."""
    return values * (np.abs(values) >= np.finfo(values.dtype).tiny)


def blocks(count: int, length: int, size: int = BLOCK) -> Iterator[tuple[slice, slice]]:
    """Yields the rows and columns of blocks of about `size` of `[count, length]` values: whole rows, or part of one."""
    some, stretch = max(1, size // max(length, 1)), max(1, min(length, size))
    for row in range(0, count, some):
        for start in range(0, length, stretch):
            yield slice(row, min(row + some, count)), slice(start, min(start + stretch, length))


def over_blocks(function: Callable[[slice, slice], T], count: int, length: int, size: int = BLOCK) -> list[T]:
    """Returns the results of a function of rows and columns for each block, in order."""
    parts = list(blocks(count, length, size))
    if count * length < _SHARED or len(parts) == 1:
        return [function(*part) for part in parts]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda part: function(*part), parts))
