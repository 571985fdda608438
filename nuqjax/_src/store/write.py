"""Writes safetensors files: one file, or shards with an index."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from nuqjax._src.store.dtypes import ITEMSIZE
from nuqjax._src.store.file import MAX_HEADER, Stored, index_path
from nuqjax._src.store.target import (
    Target,
    check_sharded,
    claim,
    clear,
    list_placed,
    own_index,
    own_shards,
    placing,
    stem,
)


def header(tensors: Sequence[Stored], metadata: Mapping[str, str]) -> tuple[bytes, list[Stored]]:
    """Returns the header of a file, and its tensors in file order: widest dtype first, so that all are aligned."""
    ordered = sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor.code])
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = to_json(entries).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"a header of {len(text)} bytes, but safetensors files have at most {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text, ordered


def to_json(value: Any) -> str:
    """Returns compact JSON; equal values give equal text."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def write(
    path: str | os.PathLike[str] | Target,
    tensors: Sequence[Stored],
    metadata: Mapping[str, str],
    tag: str | None,
    max_shard_size: int | None,
    inputs: Iterable[str] = (),
) -> list[str]:
    """Writes tensors as one file at `path`, or as shards with an index, and removes the files of an earlier save.

    The names of shards differ from save to save, so that new shards never replace old ones. The index is replaced
    last, and the old shards are removed after that.

    Args:
      path: the file, or a claimed target; for shards, the name with which theirs begin.
      tensors: the tensors, in the tree's order.
      metadata: the metadata of the single file, or of the index.
      tag: eight hexadecimal digits that identify these contents; None for the first free ones.
      max_shard_size: bytes of tensors in a shard (a larger tensor gets a shard of its own); None for a single file.
      inputs: as in `claim`.

    Returns:
      The paths of the files written.

    Raises:
      OSError, ValueError: as in `claim`.
    """
    groups = _shards(tensors, max_shard_size)
    if not isinstance(path, Target):
        with claim(path, inputs, len(groups) > 1) as target:
            return write(target, tensors, metadata, tag, max_shard_size)
    target = path
    path, index = target.path, index_path(target.path)
    old = own_shards(path)
    if len(groups) <= 1:
        list_placed(target, old)
        _write_one(target, path, tensors, metadata)
        if own_index(path) is not None:
            os.unlink(index)
        clear(target)
        return [path]
    check_sharded(path)
    names = _shard_names(path, tag, len(groups), old)
    list_placed(target, [*old, *names])
    for name, group in zip(names, groups, strict=True):
        _write_one(target, name, group, {})
    weight_map = {
        tensor.name: os.path.basename(name) for name, group in zip(names, groups, strict=True) for tensor in group
    }
    total = sum(tensor.nbytes for tensor in tensors)
    about = {"total_size": total, **metadata} | ({} if "nuqjax" in metadata else {"writer": "nuqjax"})
    with placing(target, index) as file:
        file.write(to_json({"metadata": about, "weight_map": weight_map}).encode() + b"\n")
    with suppress(FileNotFoundError):
        os.unlink(path)
    clear(target)
    return [index, *names]


def _shard_names(path: str, tag: str | None, count: int, old: Sequence[str]) -> list[str]:
    """Returns names for the shards that are not the names of files of others."""
    for number in range(1 << 32):
        made = f"{stem(path)}-{tag or f'{number:08x}'}-"
        names = [f"{made}{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        taken = [name for name in names if os.path.lexists(name) and not (tag and name in old)]
        if not taken:
            return names
        if tag:
            raise FileExistsError(f"{taken[0]} exists, but no index of nuqjax names it: move it away")
    raise AssertionError


def _write_one(target: Target, path: str, tensors: Sequence[Stored], metadata: Mapping[str, str]) -> None:
    text, ordered = header(tensors, metadata)
    with placing(target, path) as file:
        file.write(text)
        for tensor in ordered:
            start = file.tell()
            for chunk in tensor.chunks():
                file.write(chunk)
            if file.tell() - start != tensor.nbytes:
                raise ValueError(
                    f"{tensor.name}: {file.tell() - start} bytes were written, but {tensor.nbytes} were expected"
                )


def _shards(tensors: Sequence[Stored], limit: int | None) -> list[list[Stored]]:
    """Splits the tensors into runs of at most `limit` bytes; a larger tensor is a run of its own."""
    if limit is None:
        return [list(tensors)]
    groups: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups
