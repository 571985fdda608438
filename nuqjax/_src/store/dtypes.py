"""The dtypes that a file holds: their codes, and the form in which the values of each are stored."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# The codes of dtypes in the file. A dtype without a code that every reader knows is stored in the form given below.
CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
# By code, the dtypes that are read: other libraries write a few more.
DTYPES = {code: name for name, code in CODES.items()} | {
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
}  # fmt: skip
ITEMSIZE = {code: jnp.dtype(name).itemsize for code, name in DTYPES.items()}
# By code, the bits of a value of dtypes whose values share bytes. They are skipped, not read.
SHARED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
AS_BYTES = {  # floats stored as their bits, one value to a byte: number of bits
    "float8_e4m3": 8, "float8_e3m4": 8, "float8_e4m3b11fnuz": 8, "float8_e4m3fnuz": 8, "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8, "float6_e2m3fn": 6, "float6_e3m2fn": 6, "float4_e2m1fn": 4,
}  # fmt: skip
AS_INTEGERS = {"int4": ("int8", -8, 7), "uint4": ("uint8", 0, 15), "int2": ("int8", -2, 1), "uint2": ("uint8", 0, 3)}
AS_PAIRS = {"complex64": "float32", "complex128": "float64"}  # real and imaginary part along an added last axis


class Part(NamedTuple):
    """A tensor of a leaf: the name of its dtype, its shape, and the array stored for it with that array's code."""

    dtype: str
    shape: tuple[int, ...]
    code: str
    array: np.ndarray


def storage_dtype(name: str) -> str:
    """Returns the name of the dtype in which values of dtype `name` are stored."""
    if name in AS_BYTES:
        return "uint8"
    return AS_INTEGERS[name][0] if name in AS_INTEGERS else AS_PAIRS.get(name, name)


def stored_bytes(reference: Mapping[str, Any]) -> int:
    """Returns the bytes that a tensor takes in the file, from the dtype and shape in a reference to it."""
    code, shape = stored_form(reference["dtype"], reference["shape"])
    return math.prod(shape) * ITEMSIZE[code]


def stored_form(dtype: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Returns the code and shape with which values of a dtype and shape are stored."""
    return CODES[storage_dtype(dtype)], (*shape, 2) if dtype in AS_PAIRS else tuple(shape)


def is_stored(dtype: np.dtype) -> bool:
    """Returns whether the format holds arrays of this dtype, in any byte order."""
    return storage_dtype(dtype.name) in CODES


def to_part(array: Any, path: str) -> Part:
    """Returns the stored form of an array, which may have any byte order and memory layout.

    Raises:
      ValueError: the format does not hold the array's dtype.
    """
    array = np.asarray(array)
    name = array.dtype.name
    if is_stored(array.dtype):
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    shape = tuple(array.shape)
    if name in AS_BYTES:
        stored = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(shape)
    elif name in AS_INTEGERS:
        stored = array.astype(AS_INTEGERS[name][0])
    elif name in AS_PAIRS:
        stored = np.ascontiguousarray(array).reshape(-1).view(AS_PAIRS[name]).reshape(*shape, 2)
    elif name in CODES:
        stored = array
    else:
        raise ValueError(f"{path}: dtype {array.dtype}, which the format cannot store")
    return Part(name, shape, CODES[stored.dtype.name], stored)


def is_floating(dtype: str) -> bool:
    """Returns whether the text names a floating dtype that both the format and this NumPy have."""
    if not (dtype in CODES or dtype in AS_BYTES) or "float" not in dtype:
        return False
    try:
        return np.dtype(dtype).itemsize > 0
    except TypeError:
        return False


def viewed(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Returns bytes, `[n]` uint8, as values of a dtype; numbers in a file are little-endian."""
    return raw.view(np.dtype(dtype).newbyteorder("<")) if np.dtype(dtype).kind in "iufc" else raw.view(dtype)
