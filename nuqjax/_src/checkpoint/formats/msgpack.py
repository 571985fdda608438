"""Reads msgpack files as Flax writes them."""

from pathlib import Path
from typing import Any

import numpy as np

from nuqjax._src.checkpoint.tree import Checkpoint, Leaf, array_leaf, checkpoint_of, reading, unreadable
from nuqjax._src.store.file import check_shape


def open_msgpack(path: str, skip: str | None) -> Checkpoint:
    """Reads a whole msgpack file as Flax writes it."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("msgpack checkpoints need flax: pip install 'nuqjax[flax]'") from error

    def from_extension(code: int, data: bytes) -> Any:
        if code == 2:  # a complex number
            real, imaginary = msgpack.unpackb(data)
            return complex(real, imaginary)
        if code in (1, 3):  # an array, or a NumPy scalar
            shape, name, raw = msgpack.unpackb(data, raw=True)
            return _array_of_bytes(path, shape, name.decode(), raw)
        return unreadable(path, "", f"an extension of msgpack, {code}")

    def from_pairs(pairs: list[tuple[Any, Any]]) -> Any:
        for key, _ in pairs:
            if not isinstance(key, str | int):  # msgpack integers have 64 bits: few of them have equal hashes
                raise ValueError(
                    f"{path}: a map with a key that is {type(key).__name__}; only str and int keys are read"
                )
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError(f"{path}: a map with a repeated key")
        return _joined(path, made) if "__msgpack_chunked_array__" in made else made

    data = Path(path).read_bytes()
    with reading(path, "not a Flax msgpack file"):
        tree = msgpack.unpackb(
            data, ext_hook=from_extension, object_pairs_hook=from_pairs, raw=False, strict_map_key=False
        )
    return checkpoint_of(path, "msgpack", _leaves_in(path, tree), len(data), skip)


def _array_of_bytes(path: str, shape: Any, name: str, raw: Any) -> Any:
    """Returns the array in a msgpack extension of Flax, or an unreadable leaf if its dtype is unknown."""
    count = check_shape(list(shape), path)
    try:
        dtype = np.dtype({"V2": "bfloat16"}.get(name, name))
    except TypeError:
        return unreadable(path, "", f"values of dtype {name[:40]!r}", shape)
    if dtype.hasobject or dtype.itemsize * count != len(raw):
        raise ValueError(
            f"{path}: an array of {len(raw)} bytes, but its shape {shape} of {name[:40]} takes another number of bytes"
        )
    return np.frombuffer(raw, dtype).reshape(shape)


def _joined(path: str, chunked: dict[Any, Any]) -> np.ndarray:
    """Joins the chunks of an array that was too large for one msgpack object."""
    shape = [chunked["shape"][str(i)] for i in range(len(chunked["shape"]))]
    chunks = [chunked["chunks"][str(i)] for i in range(len(chunked["chunks"]))]
    check_shape(shape, path)
    if not chunks or not all(isinstance(chunk, np.ndarray) and chunk.dtype == chunks[0].dtype for chunk in chunks):
        raise ValueError(f"{path}: the chunks of an array are not arrays of one dtype")
    return np.concatenate(chunks).reshape(shape)


def _leaves_in(path: str, tree: Any) -> Any:
    """Replaces each value of the tree by a `Leaf`, without recursion, because a file may hold a tree of any depth."""
    top: list[Any] = [tree]
    stack: list[Any] = [top]
    while stack:
        here = stack.pop()
        for key, value in here.items() if isinstance(here, dict) else enumerate(here):
            if isinstance(value, dict | list):
                stack.append(value)
            elif value is not None:
                here[key] = _in_memory(path, value)
    return top[0]


def _in_memory(path: str, value: Any) -> Leaf:
    if isinstance(value, Leaf):
        return value
    if isinstance(value, np.ndarray):
        return array_leaf(path, "", value.shape, value.dtype, lambda: value)
    if type(value) in (bool, int, float, complex, str):
        return Leaf("", None, None, lambda: value)
    return unreadable(path, "", f"a value of type {type(value).__name__}")
