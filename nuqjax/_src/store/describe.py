"""Turns a leaf into an entry of the layout with named tensors; `docs/format.md` describes the entries."""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.leaf import rows as rows_
from nuqjax._src.leaf.check import check_structure
from nuqjax._src.leaf.codebook_array import CodebookArray, is_codebook_array
from nuqjax._src.leaf.rows import ChannelGroups, InputGroups
from nuqjax._src.store.dtypes import Part, is_floating, to_part

MAX_GROUP = 2**62  # limit on the number of values that share a codebook or a scale
PYTHON = {"bool": bool, "int": int, "float": float, "complex": complex, "str": str}
KEYS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}  # kinds of random keys: 32-bit words in one key


def describe(path: str, leaf: Any, code: Callable[..., Any] | None) -> tuple[dict[str, Any], dict[str, Part]]:
    """Returns the entry of a leaf, without names of tensors, and the leaf's tensors by role.

    `code` is `entropy.encode`, or `entropy.sized` where only sizes matter; None for no entropy coding.

    Raises:
      ValueError: the leaf's arrays do not fit its layout, or the format does not hold the leaf's contents.
    """
    entry: dict[str, Any] = {"path": path}
    if is_codebook_array(leaf):
        leaf = jax.tree.map(np.asarray, leaf)
        _check_kinds(leaf, path)
        parts = {"packed": to_part(leaf.packed, path), "levels": to_part(leaf.levels, path)}
        if leaf.scale is not None:
            parts["scale"] = to_part(leaf.scale, path)
        if code is not None:
            _, inputs = rows_.channel_shape(leaf.slice_shape, leaf.axes)
            coded = code(leaf.packed, leaf.bits, inputs)
            if coded is not None:
                parts |= {"coded": to_part(coded[0], path), "model": to_part(coded[1], path)}
                del parts["packed"]
        return entry | _layout(leaf), parts
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(leaf))
        if impl not in KEYS:
            raise ValueError(f"{path}: random keys of {impl!r}, which the format cannot store")
        return entry | {"kind": "key", "impl": impl}, {"data": to_part(jax.random.key_data(leaf), path)}
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return entry | {"kind": "array"}, {"data": to_part(leaf, path)}
    kind, value = type(leaf).__name__, leaf
    if PYTHON.get(kind) is type(leaf):
        if isinstance(value, float):
            value = value.hex()
        elif isinstance(value, complex):
            value = [value.real.hex(), value.imag.hex()]
        return entry | {"kind": "python", "type": kind, "value": value}, {}
    return entry | {"kind": "absent", "type": f"{type(leaf).__module__}.{type(leaf).__qualname__}"}, {}


def _check_kinds(leaf: CodebookArray, path: str) -> None:
    """Raises ValueError for a compressed leaf that `load` would refuse: such a leaf is not saved."""
    check_structure(leaf, path)
    dtypes = {"dtype": leaf.dtype, "scale": None if leaf.scale is None else leaf.scale.dtype}
    dtypes["levels"] = None if leaf.codebook_format else leaf.levels.dtype
    for name, dtype in dtypes.items():
        if dtype is not None and not is_floating(np.dtype(dtype).name):
            raise ValueError(f"{path}: {name} of dtype {dtype}, but a floating one is wanted")
    if leaf.scale is None and leaf.scale_group:
        raise ValueError(f"{path}: a scale_group of {leaf.scale_group} without scales; 0 is wanted")
    for size in (leaf.scale_group, getattr(leaf.granularity, "size", 0)):
        if size > MAX_GROUP:
            raise ValueError(f"{path}: a group of {size} values, more than any array has")


def _layout(leaf: CodebookArray) -> dict[str, Any]:
    granularity, fixed = leaf.granularity, leaf.codebook_format
    if isinstance(granularity, ChannelGroups):
        granularity = {"channels": granularity.size}
    elif isinstance(granularity, InputGroups):
        granularity = {"inputs": granularity.size}
    return {
        "kind": "codebook",
        "shape": list(leaf.shape),
        "stack_axes": len(leaf.stack_shape),
        "dtype": np.dtype(leaf.dtype).name,
        "bits": leaf.bits,
        "granularity": granularity,
        "output_axes": list(leaf.axes),
        "fixed_point": fixed and {"word": fixed.word, "frac": fixed.frac, "signed": fixed.signed},
        "scale_group": leaf.scale_group,
    }


def checksum(chunks: Iterable[Any]) -> int:
    """Returns the CRC-32 of bytes that come in chunks."""
    value = 0
    for chunk in chunks:
        value = zlib.crc32(chunk, value)
    return value
