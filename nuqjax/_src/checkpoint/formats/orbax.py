"""Reads orbax checkpoints."""

import math
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nuqjax._src.checkpoint.tree import Checkpoint, Leaf, array_leaf, checkpoint_of, reading, unreadable
from nuqjax._src.store.file import check_shape

_ZSTD = 1 << 15  # the most bytes that one byte of Zstandard can expand to


def orbax() -> Any:
    """Returns the `orbax.checkpoint` module; where it is missing, the ImportError says how to install it."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("orbax checkpoints need orbax: pip install 'nuqjax[orbax]'") from error
    return orbax.checkpoint


def needs_names() -> str | None:
    """Returns the version of orbax if it stores no leaf without a name (before 0.12.1), else None."""
    version = orbax().__version__
    return version if [int(part) for part in version.split(".")[:3] if part.isdigit()] < [0, 12, 1] else None


def open_orbax(path: str, skip: str | None) -> Checkpoint:
    """Opens an orbax checkpoint of one tree; each array is read on request."""
    ocp = orbax()
    path = os.path.abspath(path)
    files, nbytes = _files_of(path)
    checkpointer = ocp.PyTreeCheckpointer()
    with reading(path, "not an orbax checkpoint of one tree"):
        found = checkpointer.metadata(path).item_metadata
        if found is None or found.tree is None:
            raise ValueError("its metadata has no tree")
        metadata = found.tree
    stack: list[tuple[Any, int]] = [(metadata, 0)]
    while stack:  # checks the depth before JAX, which recurses, sees the tree
        here, depth = stack.pop()
        if depth > 256:
            raise ValueError(f"{path}: a tree deeper than 256 levels")
        if isinstance(here, dict | list | tuple):
            stack += [(child, depth + 1) for child in (here.values() if isinstance(here, dict) else here)]
    with reading(path, "not an orbax checkpoint of one tree"):
        flat, structure = jax.tree.flatten(metadata)
    arguments = jax.tree.unflatten(structure, [_restore_args(ocp, info) for info in flat])

    def restored(numbers: Sequence[int]) -> dict[int, Any]:
        asked = [ocp.PLACEHOLDER] * len(flat)
        for number in numbers:
            asked[number] = 0
        item = jax.tree.unflatten(structure, asked)
        found = jax.tree.leaves(
            checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments))
        )
        return {number: found[number] for number in numbers}

    run_of, held = _runs(flat), {}  # each orbax call reads the metadata of the whole tree: neighbours are read together

    left = nbytes * _ZSTD  # bytes to which the files can expand

    def leaf(number: int, info: Any) -> Leaf:
        nonlocal left

        def read() -> Any:
            if number in held:
                return held.pop(number)
            held.clear()
            with reading(f"{path}: {info.name[:200]!r}", "cannot be read"):
                try:
                    held.update(restored(run_of[number]))
                except Exception:  # noqa: BLE001 - a neighbour may be damaged: read this leaf alone
                    return restored([number])[number]
                return held.pop(number)

        found = _orbax_leaf(path, info, read)
        if found.nbytes > left:  # metadata may declare missing chunks as zeros, and so claim any size
            what = f"{found.nbytes} bytes, more than its files can stand for"
            return unreadable(path, info.name, what, found.shape)
        left -= found.nbytes
        return found

    tree = jax.tree.unflatten(structure, [leaf(i, x) for i, x in enumerate(flat)])
    return checkpoint_of(path, "orbax", tree, nbytes, skip, files=files)


def _runs(infos: Sequence[Any]) -> list[list[int]]:
    """Returns, for each leaf, the numbers of the leaves read with it: neighbours of 16 MiB in total, or one leaf."""
    runs: list[list[int]] = [[]]
    size = 0
    for number, info in enumerate(infos):
        shape, dtype = getattr(info, "shape", None) or (), getattr(info, "dtype", None)
        try:
            nbytes = math.prod(shape) * (8 if dtype is None else np.dtype(dtype).itemsize)
        except TypeError:
            nbytes = 8
        if runs[-1] and (size + nbytes > 1 << 24 or len(runs[-1]) >= 1024):
            runs.append([])
            size = 0
        runs[-1].append(number)
        size += nbytes
    return [run for run in runs for _ in run]


def _restore_args(ocp: Any, info: Any) -> Any:
    kind = type(info).__name__
    return (
        ocp.RestoreArgs() if kind in ("ScalarMetadata", "StringMetadata") else ocp.RestoreArgs(restore_type=np.ndarray)
    )


def _orbax_leaf(path: str, info: Any, read: Callable[[], Any]) -> Leaf:
    shape, dtype = getattr(info, "shape", None), getattr(info, "dtype", None)
    if type(info).__name__ == "StringMetadata":
        return Leaf("", None, None, read)
    if shape is None or dtype is None:
        return unreadable(path, str(getattr(info, "name", "")), f"a value of type {type(info).__name__}")
    with reading(path, "an array of no known dtype"):
        dtype = np.dtype(dtype)
        check_shape(list(shape), path)
    if type(info).__name__ == "ScalarMetadata" and dtype.name in ("bool", "int64", "float64"):  # Python numbers
        return Leaf("", None, None, lambda: _python(read()))
    return array_leaf(path, info.name, shape, dtype, read)


def _python(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray | np.generic | jax.Array) else value


def _files_of(path: str) -> tuple[list[str], int]:
    """Returns the files below a folder and their total bytes; raises for pipes and devices, which could block."""
    files, nbytes = [], 0
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{file} is not a regular file")
            files.append(file)
            nbytes += status.st_size
    return sorted(files), nbytes
