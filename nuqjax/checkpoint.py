"""Checkpoints, tensor by tensor: safetensors (also sharded), npz, Flax msgpack, orbax, and files of `save`.

A checkpoint is opened without being read: its leaves have paths, shapes and dtypes, and each is read when it is asked
for. (A msgpack file can be read only whole.)
"""

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax.codebook_array import is_codebook_array
from nuqjax.rules import path_name
from nuqjax.store import read_layout, shard_size
from nuqjax.store_file import Bundle, Entry, Stored, open_bundle
from nuqjax.store_layout import NUMPY_DTYPES, to_part
from nuqjax.store_write import replacing, write

FORMATS = ("safetensors", "npz", "msgpack", "orbax")


class Leaf(NamedTuple):
    """A leaf of a checkpoint: its path, its shape and dtype (None for what is no array), and how to read it."""

    path: str
    shape: tuple[int, ...] | None
    dtype: np.dtype | None
    read: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the array; 0 for what is no array."""
        return 0 if self.shape is None or self.dtype is None else math.prod(self.shape) * self.dtype.itemsize

    @property
    def spec(self) -> Any:
        """A `jax.ShapeDtypeStruct`; of what is no array, the value."""
        return self.read() if self.shape is None else jax.ShapeDtypeStruct(self.shape, self.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open: its format, its leaves in JAX's order, their structure, and the files it is of."""

    path: str
    format: str
    leaves: tuple[Leaf, ...]
    structure: Any
    files: tuple[str, ...]

    def tree(self, leaves: Iterable[Any]) -> Any:
        """The tree with these in place of its leaves."""
        return jax.tree.unflatten(self.structure, leaves)

    def read(self) -> Any:
        """The tree, read whole."""
        return self.tree(leaf.read() for leaf in self.leaves)


def detect_format(path: str | os.PathLike[str]) -> str:
    """The format of a checkpoint, by what is there.

    Raises:
      OSError: nothing is there.
      ValueError: it is none of the known formats.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        names = set(os.listdir(path))
        if names & {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"}:
            return "orbax"
        raise ValueError(f"{path}: a directory that is no orbax checkpoint (of shards, name their .index.json)")
    if not os.path.exists(path) and os.path.exists(f"{path}.index.json"):
        return "safetensors"
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "npz"
    if path.endswith((".safetensors", ".index.json")) or start[8:9] == b"{":
        return "safetensors"
    if path.endswith((".msgpack", ".ckpt")) or (start and (start[0] >> 4 == 8 or start[0] in (0xDE, 0xDF))):
        return "msgpack"
    raise ValueError(f"{path}: neither safetensors, npz, Flax msgpack nor an orbax directory")


def open_checkpoint(
    path: str | os.PathLike[str], format: str | None = None, separator: str | None = None
) -> Checkpoint:
    """Opens a checkpoint.

    Args:
      path: a safetensors file, its index or the name its shards share; an npz or msgpack file; an orbax directory.
      format: one of `FORMATS`; None to see by what is there.
      separator: what parts the keys in a tensor's name (safetensors, npz): None for "/" where names have it and "."
        where not; "" for none, so that names are keys as they are.

    Raises:
      ValueError: the file is damaged, or a name is the beginning of another.
      OSError: there is no such file.
      ImportError: the library of the format is not installed.
    """
    path = os.fspath(path)
    format = format or detect_format(path)
    if format == "safetensors":
        return _open_safetensors(path, separator)
    if format == "npz":
        return _open_npz(path, separator)
    if format == "msgpack":
        return _open_msgpack(path)
    if format == "orbax":
        return _open_orbax(path)
    raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")


def _nested(
    path: str, format: str, named: Mapping[str, Leaf], separator: str | None, files: Iterable[str] = ()
) -> Checkpoint:
    """A checkpoint of named tensors as a tree of dicts."""
    if separator is None:
        separator = "/" if any("/" in name for name in named) else "."
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *keys, last = name.split(separator) if separator else [name]
        here = tree
        for key in keys:
            here = here.setdefault(key, {})
            if isinstance(here, Leaf):
                break
        if isinstance(here, Leaf) or last in here:
            raise ValueError(
                f"{path}: the tensor {name!r} and another have names of which one is the beginning of the other when "
                f'parted at {separator!r}; separator="" (--separator "") keeps names whole'
            )
        here[last] = leaf
    return _checkpoint(path, format, tree, files)


def _checkpoint(path: str, format: str, tree: Any, files: Iterable[str] = ()) -> Checkpoint:
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Leaf))
    leaves = tuple(leaf._replace(path=path_name(keys)) for keys, leaf in flat)
    return Checkpoint(path, format, leaves, structure, tuple(files) or (path,))


def _open_safetensors(path: str, separator: str | None) -> Checkpoint:
    bundle = open_bundle(path)
    if "nuqjax" in bundle.metadata:
        return _open_saved(path, bundle)
    named = {}
    for name, file in bundle.files.items():
        entry = file.entries[name]
        if entry.code not in NUMPY_DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {entry.code}, which is not read here")
        dtype = np.dtype(NUMPY_DTYPES[entry.code])
        named[name] = Leaf(name, entry.shape, dtype, _from_file(file.name, file.start, entry, dtype))
    return _nested(path, "safetensors", named, separator, _files(bundle))


def _files(bundle: Bundle) -> list[str]:
    """The files that a bundle is of: its index, where it has one, and its shards."""
    return sorted({bundle.name, *(file.name for file in bundle.files.values())})


def _from_file(name: str, start: int, entry: Entry, dtype: np.dtype) -> Callable[[], np.ndarray]:
    """Reads a tensor into memory of its own: what is mapped would count as the process's for as long as it is open."""

    def read() -> np.ndarray:
        raw = np.fromfile(name, np.uint8, entry.end - entry.begin, offset=start + entry.begin)
        if raw.size != entry.end - entry.begin:
            raise ValueError(f"{name}: the file has become shorter")
        return raw.view(dtype).reshape(entry.shape)

    return read


def _open_saved(path: str, bundle: Bundle) -> Checkpoint:
    """A file of `save`: its compressed leaves decode when they are read."""
    structure, entries, _ = read_layout(bundle, verify=True)
    leaves = []
    for entry in entries:

        def read(entry=entry):
            leaf = entry.read(verify=True)
            return np.asarray(leaf) if is_codebook_array(leaf) else leaf

        shape, dtype = entry.shape_and_dtype() or (None, None)
        leaves.append(Leaf(entry.path, shape, None if dtype is None else np.dtype(dtype), read))
    return _checkpoint(path, "nuqjax", structure.build(leaves), _files(bundle))


def _open_npz(path: str, separator: str | None) -> Checkpoint:
    named = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as file:
                    shape, dtype = _npy_header(file, f"{path}: {name!r}")
                    if file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
                        raise ValueError(f"{path}: {name!r} is not as long as its shape {shape} says")
                named[name] = Leaf(name, shape, dtype, _from_npz(path, info.filename))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: {error}") from error
    return _nested(path, "npz", named, separator)


def _npy_header(file: Any, where: str) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(file)
    if dtype.hasobject:
        raise ValueError(f"{where} holds Python objects, which are not loaded")
    return shape, np.dtype(jnp.bfloat16) if dtype == np.dtype("V2") else dtype  # how NumPy writes bfloat16


def _from_npz(path: str, member: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: {member!r}: {error}") from error
        return array.view(jnp.bfloat16) if array.dtype == np.dtype("V2") else array

    return read


def _open_msgpack(path: str) -> Checkpoint:
    try:
        from flax import serialization
    except ImportError as error:
        raise ImportError("msgpack checkpoints need flax: pip install 'nuqjax[flax]'") from error
    try:
        tree = serialization.msgpack_restore(Path(path).read_bytes())
    except Exception as error:  # msgpack raises its own kinds, and whatever its hooks do
        raise ValueError(f"{path}: no Flax msgpack file: {error}") from error
    return _checkpoint(path, "msgpack", jax.tree.map(_in_memory, tree))


def _in_memory(value: Any) -> Leaf:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return Leaf("", tuple(value.shape), np.dtype(value.dtype), lambda: np.asarray(value))
    return Leaf("", None, None, lambda: value)


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("orbax checkpoints need orbax: pip install 'nuqjax[orbax]'") from error
    return orbax.checkpoint


def _open_orbax(path: str) -> Checkpoint:
    ocp = _orbax()
    path = os.path.abspath(path)
    checkpointer = ocp.PyTreeCheckpointer()
    try:
        metadata = checkpointer.metadata(path).item_metadata.tree
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: no orbax checkpoint of one tree: {error}") from error
    flat, structure = jax.tree.flatten(metadata)
    arguments = jax.tree.unflatten(structure, [ocp.RestoreArgs(restore_type=np.ndarray)] * len(flat))

    def leaf(number: int, info: Any) -> Leaf:
        def read() -> Any:
            asked = [ocp.PLACEHOLDER] * len(flat)
            asked[number] = 0
            item = jax.tree.unflatten(structure, asked)
            found = checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments))
            return jax.tree.leaves(found)[number]

        if getattr(info, "shape", None) is None or getattr(info, "dtype", None) is None:
            return Leaf("", None, None, read)
        return Leaf("", tuple(info.shape), np.dtype(info.dtype), read)

    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return _checkpoint(path, "orbax", jax.tree.unflatten(structure, [leaf(i, x) for i, x in enumerate(flat)]), files)


# Writing


def write_checkpoint(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    format: str,
    *,
    separator: str = ".",
    max_shard_size: int | str | None = None,
) -> None:
    """Writes the leaves of a checkpoint, decoded, as a dense checkpoint of another format.

    safetensors and npz are written leaf by leaf; msgpack and orbax need the tree in memory.

    Args:
      path: what to write; a file that is there is replaced, with its permissions kept. A directory is not, nor what is
        no file, nor a file that the checkpoint is read from.
      checkpoint: where the leaves come from.
      format: one of `FORMATS`.
      separator: what joins keys to a tensor's name.
      max_shard_size: of a safetensors file, as in `save`.

    Raises:
      ValueError: a leaf is of a kind that the format does not hold, or a file would be replaced that is read.
      OSError: the file cannot be written, what is there is no file or not this library's, or another process writes it.
    """
    if format == "safetensors":
        _write_safetensors(path, checkpoint, separator, shard_size(max_shard_size))
    elif format == "npz":
        _write_npz(path, checkpoint, separator)
    elif format == "msgpack":
        try:
            from flax import serialization
        except ImportError as error:
            raise ImportError("msgpack checkpoints need flax: pip install 'nuqjax[flax]'") from error
        with replacing(path, checkpoint.files) as file:
            file.write(serialization.msgpack_serialize(serialization.to_state_dict(checkpoint.read())))
    elif format == "orbax":
        ocp = _orbax()
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(os.path.abspath(path), checkpoint.read())
    else:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")


def _named_arrays(checkpoint: Checkpoint, separator: str) -> Sequence[tuple[str, Leaf]]:
    named = []
    for leaf in checkpoint.leaves:
        if leaf.shape is None:
            raise ValueError(f"{checkpoint.path}: leaf {leaf.path!r} is no array, which the format does not hold")
        named.append((leaf.path.replace("/", separator) or "leaf", leaf))
    if len(dict(named)) < len(named):
        raise ValueError(f"{checkpoint.path}: two leaves have the same name when joined by {separator!r}")
    return named


def _write_safetensors(path: Any, checkpoint: Checkpoint, separator: str, limit: int | None) -> None:
    codes = {np.dtype(name): code for code, name in NUMPY_DTYPES.items()}
    tensors = []
    for name, leaf in _named_arrays(checkpoint, separator):
        if leaf.dtype is None or leaf.dtype not in codes:
            raise ValueError(f"{checkpoint.path}: leaf {leaf.path!r} has dtype {leaf.dtype}, which safetensors lacks")

        def chunks(leaf=leaf):
            yield np.ascontiguousarray(to_part(leaf.read(), leaf.path).array).reshape(-1).view(np.uint8).data

        tensors.append(Stored(name, codes[leaf.dtype], leaf.shape or (), chunks))
    write(path, tensors, {}, None, limit, checkpoint.files)


def _write_npz(path: Any, checkpoint: Checkpoint, separator: str) -> None:
    with replacing(path, checkpoint.files) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, leaf in _named_arrays(checkpoint, separator):
            array = np.asarray(leaf.read())
            if array.dtype.kind == "V" and array.dtype != np.dtype(jnp.bfloat16):
                raise ValueError(f"{checkpoint.path}: leaf {leaf.path!r} has dtype {array.dtype}, which npz lacks")
            info = zipfile.ZipInfo(f"{name}.npy")  # without the time of day: the same leaves give the same bytes
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
