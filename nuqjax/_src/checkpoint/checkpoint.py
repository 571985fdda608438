"""Checkpoints, tensor by tensor: safetensors (also sharded), npz, npy, Flax msgpack, orbax, HDF5, and files of `save`.

A checkpoint is opened without being read: its leaves have paths, shapes and dtypes, and each is read when it is asked
for. (A msgpack file can be read only whole.)
"""

import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.checkpoint.names import NOTES, names_of, notes_for
from nuqjax._src.checkpoint.read import CODES, READABLE, locate, open_as, orbax
from nuqjax._src.checkpoint.tree import Checkpoint, Leaf
from nuqjax._src.store.file import Stored
from nuqjax._src.store.store import shard_size
from nuqjax._src.store.write import replacing, to_json, write

FORMATS = ("safetensors", "npz", "msgpack", "orbax")  # that are written; `READABLE` has those that are read


def detect_format(path: str | os.PathLike[str]) -> str:
    """The format of a checkpoint, by what is there.

    Raises:
      OSError: nothing is there.
      ValueError: it is none of the known formats.
    """
    return locate(path)[1]


def open_checkpoint(
    path: str | os.PathLike[str], format: str | None = None, separator: str | None = None, skip: str | None = None
) -> Checkpoint:
    """Opens a checkpoint.

    Args:
      path: a safetensors file, its index or the name its shards share; an npz, npy, msgpack or HDF5 file; an orbax
        directory; or a folder: a Hugging Face model, or a `CheckpointManager`'s, of whose steps the newest is opened.
      format: one of `READABLE`; None to see by what is there.
      separator: what parts the keys in a tensor's name (safetensors, npz): None for what the file remembers, or else
        "/" where names have it and "." where not; "" for none, so that names are keys as they are.
      skip: a regular expression: the leaves that it is found in are left out.

    Returns:
      The `Checkpoint`. A leaf of a dtype that is not read does not keep the others from being read: its `problem` says
      what it holds, and its `read` raises.

    Raises:
      ValueError: the file is damaged or of another kind, or a name is the beginning of another.
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
    return open_as(place, format, separator, skip)


# Writing


def write_checkpoint(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    format: str,
    *,
    separator: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes the leaves of a checkpoint, decoded, as a dense checkpoint of another format.

    safetensors and npz are written leaf by leaf; msgpack and orbax need the tree in memory.

    Args:
      path: what to write; a file that is there is replaced, with its permissions kept. A directory is not, nor what is
        no file, nor a file that the checkpoint is read from.
      checkpoint: where the leaves come from.
      format: one of `FORMATS`.
      separator: what joins keys to a tensor's name (safetensors, npz); None for what parted them in the checkpoint's
        source, "." where nothing did. Where names alone do not give the keys back, the file has notes that do.
      max_shard_size: of a safetensors file, as in `save`.

    Raises:
      ValueError: a leaf or a key is of a kind that the format does not hold, two leaves would have one name, or a file
        would be replaced that is read.
      OSError: the file cannot be written, what is there is no file or not this library's, or another process writes it.

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
        names_of(checkpoint, ".")  # orbax has them so, and merges what is named alike
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(os.path.abspath(path), checkpoint.read())
    else:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")


def _check_keys(checkpoint: Checkpoint, format: str) -> None:
    """Raises ValueError for what msgpack and orbax would change without a word."""
    kinds = {"msgpack": (bool, int, float, complex, str), "orbax": (bool, int, float, str)}[format]
    most = {"msgpack": 2**64, "orbax": 2**63}[format]
    flat, _ = jax.tree_util.tree_flatten_with_path(checkpoint.tree(range(len(checkpoint.leaves))))
    for (path, _), leaf in zip(flat, checkpoint.leaves, strict=True):
        where = f"{checkpoint.path}: leaf {leaf.path!r}"
        for key in path:
            if isinstance(key, jax.tree_util.DictKey) and not isinstance(key.key, str):
                raise ValueError(f"{where}: the key {key.key!r} is no text, and {format} would make it so")
            if format == "msgpack" and getattr(key, "key", None) == "__msgpack_chunked_array__":
                raise ValueError(f"{where}: a key that Flax's msgpack has another use for")
        if format == "orbax" and len(leaf.path.encode()) > 32_000:
            raise ValueError(f"{where[:300]}…: a name longer than orbax holds")
        if leaf.shape is not None:
            if format == "orbax" and 0 in leaf.shape:
                raise ValueError(f"{where} has no values, and orbax holds no such arrays")
            if leaf.dtype is None:
                leaf.read()  # raises what is wrong with it
            elif format == "orbax" and leaf.dtype.name in _NOT_ORBAX:
                raise ValueError(f"{where} has dtype {leaf.dtype}, which orbax lacks")
            continue
        if format == "msgpack" and not path:
            raise ValueError(f"{where} stands alone and is no array, as no msgpack file has it")
        value = leaf.read()
        if type(value) not in kinds or (type(value) is int and not -(2**63) <= value < most):
            raise ValueError(f"{where} is {_what(value)}, which {format} does not hold")


def _what(value: Any) -> str:
    return f"an integer of {value.bit_length()} bits" if type(value) is int else f"of type {type(value).__name__}"


def _named_arrays(
    checkpoint: Checkpoint, separator: str, format: str
) -> tuple[Sequence[tuple[str, Leaf]], Mapping[str, Any]]:
    """Leaves by name, Python's numbers as arrays without axes, and the notes that tell them and the keys."""
    names, types, named = names_of(checkpoint, separator), {}, []
    for number, (name, leaf) in enumerate(zip(names, checkpoint.leaves, strict=True)):
        if leaf.shape is None:
            value = leaf.read()
            array = np.asarray(value) if type(value) in (bool, int, float, complex) else None
            if array is None or array.dtype.kind not in "bifc":
                raise ValueError(
                    f"{checkpoint.path}: leaf {leaf.path!r} is {_what(value)}, which {format} does not hold"
                )
            types[str(number)] = type(value).__name__
            leaf = Leaf(leaf.path, (), array.dtype, lambda array=array: array)
        elif leaf.dtype is None:
            leaf.read()  # raises what is wrong with it
        named.append((name, leaf))
    return named, notes_for(checkpoint, names, separator, types)


def _write_safetensors(path: Any, checkpoint: Checkpoint, separator: str, limit: int | None) -> None:
    codes = {np.dtype(name): code for code, name in CODES.items()}
    named, notes = _named_arrays(checkpoint, separator, "safetensors")
    tensors = []
    for name, leaf in named:
        if leaf.dtype is None or leaf.dtype not in codes:
            raise ValueError(f"{checkpoint.path}: leaf {leaf.path!r} has dtype {leaf.dtype}, which safetensors lacks")
        if name == "__metadata__":
            raise ValueError(f"{checkpoint.path}: leaf {leaf.path!r}: safetensors has another use for that name")

        def chunks(leaf=leaf):
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
        raise ValueError(f"{checkpoint.path}: its metadata are longer than an npz file of so few leaves holds")
    parts += [b""] * (1 + len(named) - len(parts))
    with replacing(path, checkpoint.files) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = parts[0]
        for (name, leaf), part in zip(named, parts[1:], strict=True):
            if "\0" in name or len(name.encode()) > _COMMENT - 4:
                raise ValueError(f"{checkpoint.path}: leaf {leaf.path[:200]!r} has a name that npz does not hold")
            if leaf.dtype is None or not (leaf.dtype.type.__module__ == "numpy" or leaf.dtype == jnp.bfloat16):
                raise ValueError(f"{checkpoint.path}: leaf {leaf.path!r} has dtype {leaf.dtype}, which npz lacks")
            array = np.asarray(leaf.read())
            info = zipfile.ZipInfo(f"{name}.npy")  # without the time of day: the same leaves give the same bytes
            info.comment = part
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


_NOT_ORBAX = {"float8_e4m3", "float6_e2m3fn", "float6_e3m2fn", "uint4", "uint2"}
_COMMENT = 65_535  # bytes of a zip archive's comment, of each of its members', and of a name
