"""Reads safetensors: one file, shards with an index, and files written by `save`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from nuqjax._src.checkpoint.names import named_tree, remembered
from nuqjax._src.checkpoint.tree import Checkpoint, Leaf, array_leaf, checkpoint_of, reading, unreadable
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.store.dtypes import DTYPES
from nuqjax._src.store.file import Bundle, HeaderEntry, open_bundle
from nuqjax._src.store.layout import read_layout


def open_safetensors(path: str, separator: str | None, skip: str | None) -> Checkpoint:
    """Opens a safetensors file, shards with an index, or a file written by `save`."""
    bundle = open_bundle(path)
    nbytes = sum(file.start for file in {file.name: file for file in bundle.files.values()}.values())
    if "nuqjax" in bundle.metadata:
        return _open_saved(path, bundle, nbytes, skip)
    named = {}
    for name, file in bundle.files.items():
        entry = file.entries[name]
        if entry.code not in DTYPES:
            named[name] = unreadable(path, name, f"values of dtype {entry.code[:40]}", entry.shape)
        else:
            dtype = np.dtype(DTYPES[entry.code])
            named[name] = array_leaf(path, name, entry.shape, dtype, _from_file(file.name, file.start, entry, dtype))
    notes = remembered(bundle.metadata, path) if separator is None else None
    tree, separator = named_tree(path, named, separator, notes)
    own, files = _own(bundle.metadata), _of_bundle(bundle)
    return checkpoint_of(path, "safetensors", tree, nbytes, skip, files=files, separator=separator, metadata=own)


def _of_bundle(bundle: Bundle) -> list[str]:
    """Returns the files of a bundle: its single file, or its index and its shards."""
    return sorted({bundle.name, *(file.name for file in bundle.files.values())})


def _own(metadata: dict[str, Any]) -> dict[str, str]:
    """Returns the metadata of a file without those of this library."""
    return {
        key: value for key, value in metadata.items() if isinstance(value, str) and key.partition(".")[0] != "nuqjax"
    }


def _from_file(name: str, start: int, entry: HeaderEntry, dtype: np.dtype) -> Callable[[], np.ndarray]:
    """Returns a function that reads a tensor into new memory: mapped pages would count as memory of the process."""

    def read() -> np.ndarray:
        raw = np.fromfile(name, np.uint8, entry.end - entry.begin, offset=start + entry.begin)
        if raw.size != entry.end - entry.begin:
            raise ValueError(f"{name}: the file has become shorter since it was opened")
        return raw.view(dtype).reshape(entry.shape)

    return read


def _open_saved(path: str, bundle: Bundle, nbytes: int, skip: str | None) -> Checkpoint:
    """Opens a file written by `save`; its compressed leaves are decoded when they are read."""
    structure, entries, _ = read_layout(bundle, verify=True)
    leaves = []
    for entry in entries:

        def read(entry=entry) -> Any:
            leaf = entry.read(verify=True)
            return np.asarray(leaf) if is_codebook_array(leaf) else leaf

        shape, dtype = entry.shape_and_dtype() or (None, None)
        absent = entry.is_absent()
        if absent is not None:
            leaves.append(unreadable(path, entry.path, f"a {absent[:80]}"))
        else:
            leaves.append(Leaf(entry.path, shape, None if dtype is None else np.dtype(dtype), read))
    with reading(path, "its tree"):
        tree = structure.build(leaves)
    separator = bundle.metadata.get("nuqjax.separator")
    own, files = _own(bundle.metadata), _of_bundle(bundle)
    return checkpoint_of(path, "nuqjax", tree, nbytes, skip, files=files, separator=separator, metadata=own)
