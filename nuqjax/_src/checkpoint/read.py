"""Readers of checkpoints: each returns a `Checkpoint`, or raises a ValueError that begins with the file's name."""

import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.checkpoint.names import named_tree, remembered
from nuqjax._src.checkpoint.tree import Checkpoint, Leaf, array_leaf, checkpoint_of, reading, unreadable
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.store.entry import NUMPY_DTYPES
from nuqjax._src.store.file import Bundle, Entry, check_regular, check_shape, open_bundle
from nuqjax._src.store.foreign import SIGNED, foreign_file, foreign_zip
from nuqjax._src.store.store import read_layout

READABLE = ("safetensors", "npz", "npy", "msgpack", "orbax", "h5")
CODES = NUMPY_DTYPES | {
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
}  # fmt: skip
_DEFLATED, _ZSTD = 1032, 1 << 15  # the most bytes that one byte of zlib, and of Zstandard, can expand to


def locate(path: str | os.PathLike[str], format: str | None = None) -> tuple[str, str]:
    """Returns the path and the format of a checkpoint; for a folder, those of the checkpoint in it.

    Args:
      path: a file, or a folder: an orbax checkpoint, one step or all steps of a `CheckpointManager`, or a model.
      format: the format that the caller states; None to detect it.

    Raises:
      OSError: nothing is at the path, or it is not a regular file.
      ValueError: the format is not a known one, or a folder has several candidates.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return _in_folder(path) if format in (None, "orbax", "safetensors", "msgpack") else _no_file(path, format)
    if not os.path.exists(path) and os.path.exists(f"{path}.index.json"):
        return path, "safetensors"
    check_regular(path)
    with open(path, "rb") as file:
        start = file.read(SIGNED)
    seen = _seen(path, start)
    if seen not in ("npz", "npy", "h5") or format not in (None, "npz", "npy", "h5"):
        what = foreign_file(path)
        if what is not None:
            raise ValueError(f"{path} is {what}")
    if format in ("npz", "npy", "h5") and format != seen:
        named = {"npz": "not a zip file, as npz is", "npy": "not a NumPy array", "h5": "not an HDF5 file"}
        raise ValueError(f"{path}: {named[format]}")
    if format == "msgpack" and not _is_msgpack(start):
        raise ValueError(f"{path}: not a Flax msgpack file: it does not begin with a map")
    if format is None and seen is None:
        known = "safetensors, npz, npy, Flax msgpack, HDF5 nor an orbax directory"
        raise ValueError(f"{path}: neither {known}")
    return path, format or str(seen)


def _seen(path: str, start: bytes) -> str | None:
    """Returns the format of a file by its first bytes or its name; None if neither tells."""
    for sign, format in ((b"PK\x03\x04", "npz"), (b"PK\x05\x06", "npz"), (b"\x93NUMPY", "npy"), (b"\x89HDF\r\n", "h5")):
        if start.startswith(sign):
            return format
    if path.endswith((".safetensors", ".index.json")) or start[8:9] == b"{":
        return "safetensors"
    return "msgpack" if _is_msgpack(start) and (path.endswith((".msgpack", ".ckpt")) or start[0] >= 0x80) else None


def _is_msgpack(start: bytes) -> bool:
    """Returns whether msgpack data begin with a map, an array or an extension (a single array of Flax's)."""
    return bool(start) and (start[0] >> 4 in (8, 9) or start[0] in (0xC7, 0xC8, 0xC9, 0xDC, 0xDD, 0xDE, 0xDF))


def _no_file(path: str, format: str) -> tuple[str, str]:
    raise IsADirectoryError(f"{path} is a directory; a file of format {format} is wanted")


def _in_folder(path: str) -> tuple[str, str]:
    names = sorted(os.listdir(path))
    if {"_METADATA", "manifest.ocdbt"} & set(names):
        return path, "orbax"
    items = [name for name in names if os.path.exists(os.path.join(path, name, "_METADATA"))]
    if items:
        item = items[0] if len(items) == 1 else "default" if "default" in items else None
        if item is None:
            given = os.path.join(path, items[0])
            raise ValueError(f"{path}: a step of several items ({', '.join(items)}): name one, such as {given}")
        return os.path.join(path, item), "orbax"
    steps = {name: re.fullmatch(r"(?:\w+_)?(\d{1,18})", name) for name in names}
    newest = max(
        ((int(number[1]), name) for name, number in steps.items() if number and _is_step(os.path.join(path, name))),
        default=None,
    )
    if newest is not None:
        return _in_folder(os.path.join(path, newest[1]))
    if "_CHECKPOINT_METADATA" in names:
        return path, "orbax"
    for ending, format in ((".safetensors.index.json", "safetensors"), (".safetensors", "safetensors"),
                           (".msgpack", "msgpack"), (".weights.h5", "h5"), (".npz", "npz")):  # fmt: skip
        found = [name for name in names if name.endswith(ending)]
        if found:
            usual = [name for name in found if name == f"model{ending}"] or found
            if len(usual) > 1:
                raise ValueError(
                    f"{path}: a directory with several files of weights ({', '.join(found[:5])}"
                    f"{', …' if len(found) > 5 else ''}): name one of them"
                )
            return os.path.join(path, usual[0]), format
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth")) or name == "saved_model.pb"]
    what = f"; {pickled[0]} is not read here: save the weights as safetensors" if pickled else ""
    raise ValueError(
        f"{path}: a directory that is not an orbax checkpoint and has no safetensors or msgpack file{what}"
    )


def _is_step(path: str) -> bool:
    if not os.path.isdir(path):
        return False
    return any(name in ("_CHECKPOINT_METADATA", "_METADATA") or os.path.exists(os.path.join(path, name, "_METADATA"))
               for name in os.listdir(path))  # fmt: skip


# safetensors


def open_safetensors(path: str, separator: str | None, skip: str | None) -> Checkpoint:
    """Opens a safetensors file, shards with an index, or a file written by `save`."""
    bundle = open_bundle(path)
    nbytes = sum(file.start for file in {file.name: file for file in bundle.files.values()}.values())
    if "nuqjax" in bundle.metadata:
        return _open_saved(path, bundle, nbytes, skip)
    named = {}
    for name, file in bundle.files.items():
        entry = file.entries[name]
        if entry.code not in CODES:
            named[name] = unreadable(path, name, f"values of dtype {entry.code[:40]}", entry.shape)
        else:
            dtype = np.dtype(CODES[entry.code])
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


def _from_file(name: str, start: int, entry: Entry, dtype: np.dtype) -> Callable[[], np.ndarray]:
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

        def read(entry=entry):
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


# NumPy


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
    if info.file_size > (1 if info.compress_type == zipfile.ZIP_STORED else _DEFLATED) * (info.compress_size + 1):
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


# msgpack, as Flax writes it


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


# orbax


def orbax() -> Any:
    """Returns the `orbax.checkpoint` module; where it is missing, the ImportError says how to install it."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("orbax checkpoints need orbax: pip install 'nuqjax[orbax]'") from error
    return orbax.checkpoint


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


# HDF5


def open_h5(path: str, skip: str | None) -> Checkpoint:
    """Opens an HDF5 file: groups become dicts, datasets become leaves; attributes and links are not followed."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 checkpoints need h5py: pip install h5py") from error
    library: Any = h5py

    def address(group: Any) -> int:
        return library.h5o.get_info(group.id).addr

    size = os.path.getsize(path)
    tree: dict[str, Any] = {}
    with reading(path, "a damaged HDF5 file"), h5py.File(path, "r") as file:
        groups: list[tuple[Any, dict[str, Any]]] = [(file, tree)]
        seen = {address(file)}
        while groups:
            group, here = groups.pop()
            for name in group:
                where = f"{group.name.rstrip('/')}/{name}"
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    here[name] = unreadable(path, where, "a link to elsewhere")
                    continue
                item = group[name]
                if isinstance(item, h5py.Group):
                    if address(item) in seen:
                        raise ValueError(f"{path}: the group {where[:200]!r} has two names")
                    seen.add(address(item))
                    here[name] = {}
                    groups.append((item, here[name]))
                else:
                    here[name] = _h5_leaf(path, size, where, item)
    return checkpoint_of(path, "h5", tree, size, skip)


def _h5_leaf(path: str, size: int, where: str, item: Any) -> Leaf:
    import h5py

    if not isinstance(item, h5py.Dataset) or item.shape is None:
        return unreadable(path, where, "no array")
    if item.external or item.is_virtual:
        return unreadable(path, where, "values that are in other files")
    count = check_shape(list(item.shape), f"{path}: {where[:200]!r}")
    if count * item.dtype.itemsize > _DEFLATED * size:
        return unreadable(path, where, f"{count} values, more than its bytes can stand for", item.shape)

    def read() -> Any:
        with h5py.File(path, "r") as file:
            found: Any = file[where]
            return found[()]

    return array_leaf(path, where, item.shape, item.dtype, read)


def open_as(path: str, format: str, separator: str | None, skip: str | None) -> Checkpoint:
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
