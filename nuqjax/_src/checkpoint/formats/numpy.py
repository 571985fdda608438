"""Reads NumPy's npz and npy files."""

import os
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from nuqjax._src.checkpoint.names import named_tree, remembered
from nuqjax._src.checkpoint.tree import MOST_INFLATED, Checkpoint, Leaf, array_leaf, checkpoint_of, reading, unreadable
from nuqjax._src.store.file import check_shape
from nuqjax._src.store.foreign import foreign_zip


def open_npz(path: str, separator: str | None, skip: str | None) -> Checkpoint:
    """Opens an npz file; only the headers of its members are read."""
    named: dict[str, Leaf] = {}
    size = os.path.getsize(path)
    with reading(path, "a damaged npz file"), zipfile.ZipFile(path) as archive:
        what = foreign_zip(archive)
        if what is not None:
            raise ValueError(f"{path} is {what}")
        members = archive.infolist()
        if sum(info.compress_size for info in members) > size:
            raise ValueError(f"{path}: its members overlap, so that a few bytes would expand to many")
        for info in members:
            name = info.filename.removesuffix(".npy")
            if name in named:
                raise ValueError(f"{path}: {name[:200]!r} appears twice in it")
            named[name] = _npz_leaf(path, archive, info, name)
        notes = remembered(_comments(archive), path) if separator is None else None
    tree, separator = named_tree(path, named, separator, notes)
    metadata = {} if notes is None else notes.metadata
    return checkpoint_of(path, "npz", tree, size, skip, separator=separator, metadata=metadata)


def _comments(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Returns the notes of this library that are stored in the comments of a zip archive."""
    text = b"".join([archive.comment, *(info.comment for info in archive.infolist())])
    return {"nuqjax.notes": text.removeprefix(b"nuqjax ").decode()} if text.startswith(b"nuqjax ") else {}


def _npz_leaf(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Leaf:
    where = f"{path}: {name[:200]!r}"
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return unreadable(path, name, "a member that is encrypted or compressed as NumPy does not")
    if not info.filename.endswith(".npy"):
        return unreadable(path, name, "no array (.npy)")
    if info.file_size > (1 if info.compress_type == zipfile.ZIP_STORED else MOST_INFLATED) * (info.compress_size + 1):
        raise ValueError(f"{where} says that it expands to {info.file_size} bytes, more than is possible")

    def read() -> np.ndarray:  # seeks to the member: opening a ZipFile reads the names of all members each time
        with open(path, "rb") as file:
            file.seek(info.header_offset)
            lengths = struct.unpack("<26x2H", file.read(30))
            file.seek(sum(lengths), os.SEEK_CUR)
            with zipfile.ZipExtFile(file, "r", info) as member:  # type: ignore[arg-type]
                return _npy_array(member)

    with reading(where, "not a NumPy array"), archive.open(info) as file:
        return _npy_leaf(path, name, file, info.file_size, read)


def _npy_leaf(path: str, name: str, file: Any, size: int, read: Callable[[], Any]) -> Leaf:
    """Returns a leaf from the header of an npy file of `size` bytes."""
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = reader(file)
    except ValueError as error:
        if "valid dtype" not in str(error):
            raise
        return unreadable(path, name, f"values whose dtype NumPy does not know ({error})"[:200])
    where = f"{path}: {name[:200]!r}"
    count = check_shape(list(shape), where)
    if dtype == np.dtype("V2"):  # NumPy writes bfloat16 like this
        dtype = np.dtype(jnp.bfloat16)
    if not dtype.hasobject and file.tell() + count * dtype.itemsize != size:
        raise ValueError(f"{where} is not as long as its shape {shape} says")
    return array_leaf(path, name, shape, dtype, read)


def _npy_array(file: Any) -> np.ndarray:
    array = np.lib.format.read_array(file, allow_pickle=False)
    return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array


def open_npy(path: str, skip: str | None) -> Checkpoint:
    """Opens an npy file: one array without a name."""

    def read() -> np.ndarray:
        with open(path, "rb") as file:
            return _npy_array(file)

    size = os.path.getsize(path)
    with reading(path, "not a NumPy array"), open(path, "rb") as file:
        leaf = _npy_leaf(path, "", file, size, read)
    return checkpoint_of(path, "npy", leaf, size, skip)
