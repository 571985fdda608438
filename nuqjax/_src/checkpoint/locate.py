"""Finds the checkpoint at a path, and its format."""

import os
import re

from nuqjax._src.store.file import check_regular
from nuqjax._src.store.foreign import SIGNED, foreign_file

READABLE = ("safetensors", "npz", "npy", "msgpack", "orbax", "h5")


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
