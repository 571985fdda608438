"""Opens safetensors files: checks every field of the header, and maps the tensors without reading them.

The container is that of `safetensors`: eight bytes with the length of the header, the header as JSON, then the bytes
of the tensors without gaps. Several files with an index follow Hugging Face's layout.
"""

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nuqjax._src.store.dtypes import ITEMSIZE, SHARED_BITS
from nuqjax._src.store.foreign import foreign_file

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_MAX_COUNT = 2**63 - 1
_CHUNK = 1 << 24  # bytes written at once (`experiments.speed.constants`)


class HeaderEntry(NamedTuple):
    """A tensor in a header: the code of its dtype, its shape, and its bytes in the data, from `begin` to `end`."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class File:
    """A safetensors file with a checked header; `data` is its bytes from `start` on, mapped or in memory."""

    name: str
    start: int
    entries: dict[str, HeaderEntry]
    metadata: dict[str, str]
    data: np.ndarray

    def array(self, name: str) -> np.ndarray:
        """Returns the bytes of a tensor as a view, `[n]` uint8."""
        entry = self.entries[name]
        return self.data[entry.begin : entry.end]


class Stored(NamedTuple):
    """A tensor to write; `chunks` gives its bytes piece by piece, so that they need not be in memory at once."""

    name: str
    code: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Any]]

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return math.prod(self.shape) * ITEMSIZE[self.code]


def from_array(name: str, code: str, array: np.ndarray) -> Stored:
    """Returns a tensor to write whose bytes are those of an array (little-endian, in C order)."""

    def chunks() -> Iterator[memoryview]:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, _CHUNK):
            yield flat[start : start + _CHUNK].data

    return Stored(name, code, tuple(array.shape), chunks)


# Reading


def parse_json(text: bytes | str, what: str) -> Any:
    """Parses JSON strictly: UTF-8, no repeated key, no NaN or infinity, no nesting too deep for Python.

    Raises:
      ValueError: the text is not such JSON; the message begins with `what`.
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"the number {name}")

    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=no_constant)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{what} is not JSON that is allowed here: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:200]!r} appears twice in an object")
    return found


def parse(data: np.ndarray, name: str) -> File:
    """Checks the header of the file in these bytes and returns the file.

    Args:
      data: `[n]` uint8, the file from its first byte to its last.
      name: the name of the file in messages.

    Raises:
      ValueError: the file is damaged; the message says how, and names the entry.
    """
    if data.size < 8:
        raise ValueError(f"{name}: {data.size} bytes, too few for a safetensors file")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(data.size - 8, MAX_HEADER):
        raise ValueError(
            f"{name}: a header of {length} bytes, but {data.size - 8} bytes follow"
            + (f" and at most {MAX_HEADER} are allowed" if data.size - 8 > MAX_HEADER else "")
        )
    header = parse_json(data[8 : 8 + length].tobytes(), f"{name}: the header")
    if not isinstance(header, dict):
        raise ValueError(f"{name}: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{name}: __metadata__ is not an object of strings")
    body = data[8 + length :]
    entries = {key: _entry(value, f"{name}: tensor {key[:200]!r}") for key, value in header.items()}
    end, before = 0, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            how = "overlaps" if entry.begin < end else "leaves a hole after"
            raise ValueError(f"{name}: tensor {key[:200]!r} begins at byte {entry.begin} and {how} {before}")
        end, before = entry.end, f"tensor {key[:200]!r}"
    if end != body.size:
        raise ValueError(f"{name}: the tensors take {end} bytes, but {body.size} follow the header")
    return File(name, 8 + length, entries, metadata, body)


def _entry(value: Any, where: str) -> HeaderEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} does not have just dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str):
        raise ValueError(f"{where}: unknown dtype {str(code)[:40]!r}; known: {', '.join(ITEMSIZE)}")
    count = check_shape(shape, where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(x) is int for x in offsets):
        raise ValueError(f"{where}: data_offsets are not two whole numbers")
    begin, end = offsets
    if not 0 <= begin <= end <= _MAX_COUNT:
        raise ValueError(f"{where}: data_offsets from {begin} to {end}")
    bits = SHARED_BITS.get(code, 8 * ITEMSIZE.get(code, 0))
    size = -(-count * bits // 8) if bits else end - begin  # an unknown dtype does not prevent reading other tensors
    if end - begin != size:
        raise ValueError(
            f"{where}: {code} of shape {shape} takes {size} bytes, but its data_offsets hold {end - begin}"
        )
    return HeaderEntry(code, tuple(shape), begin, end)


def check_shape(shape: Any, where: str) -> int:
    """Checks a shape that came from a file and returns its number of values.

    Raises:
      ValueError: it is not a list of at most 64 whole numbers, or their product without zeros exceeds any memory.
    """
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{where}: a shape that is not a list of whole numbers, 0 or more")
    if len(shape) > 64:
        raise ValueError(f"{where}: a shape of {len(shape)} axes; an array has at most 64")
    if math.prod(n for n in shape if n) > _MAX_COUNT // 16:
        raise ValueError(f"{where}: a shape of more values than any memory holds")
    return math.prod(shape)


def check_regular(path: str) -> None:
    """Raises OSError unless a regular file is at the path: reading a pipe or a device could wait forever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a directory; a file is wanted")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is not a regular file")


def open_mapped(path: str) -> File:
    """Maps the file at a path; reads only its header."""
    check_regular(path)
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: 0 bytes, too few for a safetensors file")
    what = foreign_file(path)
    if what is not None:
        raise ValueError(f"{path} is {what}")
    return parse(np.memmap(path, np.uint8, "r").view(np.ndarray), path)


class Bundle(NamedTuple):
    """All tensors of a checkpoint in one file or in shards: the file that holds each tensor, and the metadata."""

    name: str
    files: dict[str, File]
    metadata: dict[str, Any]

    def entry(self, tensor: str) -> HeaderEntry:
        """Returns the header's entry for a tensor."""
        return self.files[tensor].entries[tensor]

    def array(self, tensor: str) -> np.ndarray:
        """Returns the bytes of a tensor as a view, `[n]` uint8."""
        return self.files[tensor].array(tensor)


def bundle_file(file: File) -> Bundle:
    """Returns a single file as a bundle."""
    return Bundle(file.name, dict.fromkeys(file.entries, file), dict(file.metadata))


def bundle_index(text: bytes, name: str, open_shard: Callable[[str], File]) -> Bundle:
    """Returns shards as a bundle, from the text of their index and a function that opens a shard by file name.

    Raises:
      ValueError: the index is not in Hugging Face's form, names a file outside its folder, or disagrees with a shard.
    """
    index = parse_json(text, name)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{name}: not an index with a weight_map")
    metadata = index.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{name}: the metadata is not an object")
    shards: dict[str, list[str]] = {}
    for tensor, shard in index["weight_map"].items():
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise ValueError(
                f"{name}: tensor {tensor[:200]!r} is said to be in {str(shard)[:200]!r}, "
                "which is not the plain name of a .safetensors file next to the index"
            )
        shards.setdefault(shard, []).append(tensor)
    files, of_shards = {}, {}
    for shard, tensors in shards.items():
        file = open_shard(shard)
        asked = set(tensors)
        # An index from `save` names all tensors of its shards; a foreign index may leave some out.
        wrong = sorted(asked ^ file.entries.keys() if "nuqjax" in metadata else asked - file.entries.keys())
        if wrong:
            there = "not in it" if wrong[0] in asked else "in it, but not in the index"
            raise ValueError(f"{name}: tensor {wrong[0][:200]!r} of shard {shard} is {there}")
        files.update(dict.fromkeys(tensors, file))
        of_shards |= {key: value for key, value in file.metadata.items() if key.partition(".")[0] != "nuqjax"}
    return Bundle(name, files, of_shards | metadata)


def is_plain_name(shard: str) -> bool:
    """Returns whether the text names a safetensors file in the folder of the index."""
    return bool(re.fullmatch(r"[^/\\:\x00-\x1f]+\.safetensors", shard)) and not shard.startswith(".")


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Opens the tensors at a path: a safetensors file, an index, or the name under which shards were saved.

    Raises:
      OSError: there is no such file.
      ValueError: a file is damaged.
    """
    path = os.fspath(path)
    index = index_path(path)
    if path != index and (os.path.exists(path) or not os.path.exists(index)):
        return bundle_file(open_mapped(path))
    check_regular(index)
    if os.path.getsize(index) > MAX_HEADER:
        raise ValueError(f"{index}: {os.path.getsize(index)} bytes, but an index takes at most {MAX_HEADER}")
    with open(index, "rb") as file:
        text = file.read()
    folder = os.path.dirname(index)

    def open_shard(shard: str) -> File:
        try:
            return open_mapped(os.path.join(folder, shard))
        except FileNotFoundError as error:
            raise ValueError(f"{index}: the shard {shard} is missing") from error

    return bundle_index(text, index, open_shard)


def index_path(path: str) -> str:
    """Returns the path of the index for shards saved under this name."""
    return path if path.endswith(".index.json") else f"{path}.index.json"


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def shard_size(given: int | str | None) -> int | None:
    """Returns `max_shard_size` in bytes, or None if it is None.

    Raises:
      ValueError: it is not a valid size.
    """
    if given is None:
        return None
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", given.strip()) if isinstance(given, str) else None
    if match and match[2].upper() in _UNITS:
        given = int(match[1]) * _UNITS[match[2].upper()]
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f'max_shard_size={given!r}, but a number of bytes, 1 or more, or such as "5GB" is wanted')
    return given
