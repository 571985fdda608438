"""Checkpoints by tensor: safetensors (sharded too), npz, npy, Flax msgpack, orbax, HDF5, and files written by `save`.

Opening a checkpoint reads no values: its leaves have paths, shapes and dtypes, and each leaf is read on request. (A
msgpack file can only be read as a whole.)
"""

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.checkpoint.formats.hdf5 import open_h5
from nuqjax._src.checkpoint.formats.msgpack import open_msgpack
from nuqjax._src.checkpoint.formats.numpy import open_npy, open_npz
from nuqjax._src.checkpoint.formats.orbax import needs_names, open_orbax, orbax
from nuqjax._src.checkpoint.formats.safetensors import open_safetensors
from nuqjax._src.checkpoint.locate import READABLE, locate
from nuqjax._src.checkpoint.names import NOTES, names_of, notes_for
from nuqjax._src.checkpoint.tree import Checkpoint, Leaf
from nuqjax._src.store.dtypes import DTYPES
from nuqjax._src.store.file import Stored, shard_size
from nuqjax._src.store.target import replacing
from nuqjax._src.store.write import to_json, write

FORMATS = ("safetensors", "npz", "msgpack", "orbax")  # formats that can be written; `READABLE` lists those to read


def detect_format(path: str | os.PathLike[str]) -> str:
    """Returns the format of the checkpoint at a path, found from its contents and name.

    Raises:
      OSError: nothing is at the path.
      ValueError: the format is not a known one.
    """
    return locate(path)[1]


def open_checkpoint(
    path: str | os.PathLike[str], format: str | None = None, separator: str | None = None, skip: str | None = None
) -> Checkpoint:
    """Opens a checkpoint without reading its values.

    Args:
      path: a safetensors file, its index or the common name of its shards; an npz, npy, msgpack or HDF5 file; an orbax
        directory; or a folder: a Hugging Face model, or a `CheckpointManager`'s folder, whose newest step is opened.
      format: one of `READABLE`; None to detect it.
      separator: the text between the keys in a tensor's name (safetensors, npz). None takes the separator stored in the
        file, or else "/" if any name contains it, or else ".". "" does not split: each name is one key.
      skip: a regular expression; leaves with a match anywhere in their path are left out.

    Returns:
      The `Checkpoint`. A leaf with a dtype that cannot be read does not prevent reading the others: its `problem` says
      what it holds, and its `read` raises.

    Raises:
      ValueError: the file is damaged or of another kind, or a name is a prefix of another.
      OSError: there is no such file.
      ImportError: the library of the format is not installed.

    >>> import numpy, nuqjax, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "weights.npz"
    ...     numpy.savez(path, **{"conv/kernel": numpy.ones((3, 4), "float32")})
    ...     [(leaf.path, leaf.shape) for leaf in open_checkpoint(path).leaves]
    [('conv/kernel', (3, 4))]
    """
    if format is not None and format not in READABLE:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(READABLE)}")
    place, format = locate(path, format)
    return _opened(place, format, separator, skip)


# Writing


def _opened(path: str, format: str, separator: str | None, skip: str | None) -> Checkpoint:
    """Opens the checkpoint at a path with the reader of its format."""
    readers: dict[str, Callable[[], Checkpoint]] = {
        "safetensors": lambda: open_safetensors(path, separator, skip),
        "npz": lambda: open_npz(path, separator, skip),
        "npy": lambda: open_npy(path, skip),
        "msgpack": lambda: open_msgpack(path, skip),
        "orbax": lambda: open_orbax(path, skip),
        "h5": lambda: open_h5(path, skip),
    }
    return readers[format]()


def write_checkpoint(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    format: str,
    *,
    separator: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Decodes the leaves of a checkpoint and writes them as a dense checkpoint, in the same or another format.

    safetensors and npz are written leaf by leaf; msgpack and orbax need the whole tree in memory.

    Args:
      path: the file to write. An existing file is replaced and its permissions are kept, unless the checkpoint is read
        from it. A directory or a special file is never replaced.
      checkpoint: the source of the leaves.
      format: one of `FORMATS`.
      separator: the text that joins keys to a tensor's name (safetensors, npz); None for that of the checkpoint, or "."
        if it has none. Where the names alone do not determine the keys, the file stores notes that do.
      max_shard_size: for a safetensors file, as in `save`.

    Raises:
      ValueError: the format does not hold a leaf or a key, two leaves would have the same name, or the checkpoint is
        read from a file that would be replaced.
      OSError: the file cannot be written, the path is not a regular file, files that this library did not write would
        be replaced, or another process is writing the file.

    >>> import jax.numpy as jnp, numpy, nuqjax, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     small, dense = pathlib.Path(folder) / "small.safetensors", pathlib.Path(folder) / "dense.npz"
    ...     nuqjax.save(small, nuqjax.compress({"conv": {"kernel": jnp.ones((32, 32))}}))
    ...     write_checkpoint(dense, nuqjax.open_checkpoint(small), "npz")
    ...     {name: array.shape for name, array in numpy.load(dense).items()}
    {'conv.kernel': (32, 32)}
    """
    if separator is None:
        separator = checkpoint.separator or "."
    if format == "safetensors":
        _write_safetensors(path, checkpoint, separator, shard_size(max_shard_size))
    elif format == "npz":
        _write_npz(path, checkpoint, separator)
    elif format == "msgpack":
        try:
            from flax import serialization
        except ImportError as error:
            raise ImportError("msgpack checkpoints need flax: pip install 'nuqjax[flax]'") from error
        _check_keys(checkpoint, format)
        with replacing(path, checkpoint.files) as file:
            file.write(serialization.msgpack_serialize(serialization.to_state_dict(checkpoint.read())))
    elif format == "orbax":
        ocp = orbax()
        _check_keys(checkpoint, format)
        names_of(checkpoint, ".")  # raises on equal names: orbax joins keys by ".", and merges leaves of the same name
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(os.path.abspath(path), checkpoint.read())
    else:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")


def _check_keys(checkpoint: Checkpoint, format: str) -> None:
    """Raises ValueError for keys and values that msgpack or orbax would change silently or cannot hold."""
    kinds = {"msgpack": (bool, int, float, complex, str), "orbax": (bool, int, float, str)}[format]
    most = {"msgpack": 2**64, "orbax": 2**63}[format]
    flat, _ = jax.tree_util.tree_flatten_with_path(checkpoint.tree(range(len(checkpoint.leaves))))
    for (path, _), leaf in zip(flat, checkpoint.leaves, strict=True):
        where = f"{checkpoint.path}: leaf {leaf.path!r}"
        for key in path:
            if isinstance(key, jax.tree_util.DictKey) and not isinstance(key.key, str):
                raise ValueError(f"{where}: the key {key.key!r} is not a string, and {format} would turn it into one")
            if format == "msgpack" and getattr(key, "key", None) == "__msgpack_chunked_array__":
                raise ValueError(f"{where}: Flax's msgpack reserves this key")
        if format == "orbax" and not leaf.path and (version := needs_names()):
            raise ValueError(
                f"{where} has no name, and orbax-checkpoint {version} does not store it; "
                "pip install 'orbax-checkpoint>=0.12.1'"
            )
        if format == "orbax" and len(leaf.path.encode()) > 32_000:
            raise ValueError(f"{where[:300]}…: the name is longer than orbax allows")
        if leaf.shape is not None:
            if format == "orbax" and 0 in leaf.shape:
                raise ValueError(f"{where} has no values, and orbax does not store empty arrays")
            if leaf.dtype is None:
                leaf.read()  # raises the leaf's problem
            elif format == "orbax" and leaf.dtype.name in _NOT_ORBAX:
                raise ValueError(f"{where} has dtype {leaf.dtype}, which orbax does not support")
            continue
        if format == "msgpack" and not path:
            raise ValueError(f"{where} is the whole tree and not an array; a msgpack file holds an array or a dict")
        value = leaf.read()
        if type(value) not in kinds or (type(value) is int and not -(2**63) <= value < most):
            raise ValueError(f"{where} is {_what(value)}, which {format} cannot store")


def _what(value: Any) -> str:
    return f"an integer of {value.bit_length()} bits" if type(value) is int else f"of type {type(value).__name__}"


def _named_arrays(
    checkpoint: Checkpoint, separator: str, format: str
) -> tuple[Sequence[tuple[str, Leaf]], Mapping[str, Any]]:
    """Returns leaves by name, with Python numbers as arrays without axes, and notes that restore numbers and keys."""
    names, types, named = names_of(checkpoint, separator), {}, []
    for number, (name, leaf) in enumerate(zip(names, checkpoint.leaves, strict=True)):
        if leaf.shape is None:
            value = leaf.read()
            array = np.asarray(value) if type(value) in (bool, int, float, complex) else None
            if array is None or array.dtype.kind not in "bifc":
                raise ValueError(
                    f"{checkpoint.path}: leaf {leaf.path!r} is {_what(value)}, which {format} cannot store"
                )
            types[str(number)] = type(value).__name__
            leaf = Leaf(leaf.path, (), array.dtype, lambda array=array: array)
        elif leaf.dtype is None:
            leaf.read()  # raises the leaf's problem
        named.append((name, leaf))
    return named, notes_for(checkpoint, names, separator, types)


def _write_safetensors(path: Any, checkpoint: Checkpoint, separator: str, limit: int | None) -> None:
    codes = {np.dtype(name): code for code, name in DTYPES.items()}
    named, notes = _named_arrays(checkpoint, separator, "safetensors")
    tensors = []
    for name, leaf in named:
        if leaf.dtype is None or leaf.dtype not in codes:
            raise ValueError(
                f"{checkpoint.path}: leaf {leaf.path!r} has dtype {leaf.dtype}, which safetensors does not support"
            )
        if name == "__metadata__":
            raise ValueError(f"{checkpoint.path}: leaf {leaf.path!r}: safetensors reserves this name")

        def chunks(leaf=leaf) -> Iterator[memoryview]:
            yield np.ascontiguousarray(leaf.read()).reshape(-1).view(np.uint8).data

        tensors.append(Stored(name, codes[leaf.dtype], leaf.shape or (), chunks))
    noted = {NOTES: to_json(notes)} if notes else {}
    write(path, tensors, dict(checkpoint.metadata) | noted, None, limit, checkpoint.files)


def _write_npz(path: Any, checkpoint: Checkpoint, separator: str) -> None:
    named, notes = _named_arrays(checkpoint, separator, "npz")
    if checkpoint.metadata:
        notes = {"separator": separator} | dict(notes) | {"metadata": dict(checkpoint.metadata)}
    text = b"nuqjax " + to_json(notes).encode() if notes else b""
    parts = [text[start : start + _COMMENT] for start in range(0, len(text), _COMMENT)]
    if len(parts) > 1 + len(named):
        raise ValueError(f"{checkpoint.path}: the metadata is too long for an npz file with so few leaves")
    parts += [b""] * (1 + len(named) - len(parts))
    with replacing(path, checkpoint.files) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = parts[0]
        for (name, leaf), part in zip(named, parts[1:], strict=True):
            if "\0" in name or len(name.encode()) > _COMMENT - 4:
                raise ValueError(f"{checkpoint.path}: leaf {leaf.path[:200]!r} has a name that npz cannot store")
            if leaf.dtype is None or not (leaf.dtype.type.__module__ == "numpy" or leaf.dtype == jnp.bfloat16):
                raise ValueError(
                    f"{checkpoint.path}: leaf {leaf.path!r} has dtype {leaf.dtype}, which npz does not support"
                )
            array = np.asarray(leaf.read())
            info = zipfile.ZipInfo(f"{name}.npy")  # no time of writing: the same leaves give the same bytes
            info.comment = part
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


_NOT_ORBAX = {"float8_e4m3", "float6_e2m3fn", "float6_e3m2fn", "uint4", "uint2"}
_COMMENT = 65_535  # most bytes in the comment of a zip archive, in that of a member, and in a member's name
