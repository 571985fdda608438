"""The JSON of a file, which says how its tensors make the tree: built leaf by leaf, and read back."""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import jax
import numpy as np

from nuqjax._src.report.report import Report
from nuqjax._src.store.describe import checksum, describe
from nuqjax._src.store.dtypes import stored_bytes
from nuqjax._src.store.entry import Entry, Shared, tied
from nuqjax._src.store.file import Bundle, Stored, from_array
from nuqjax._src.store.report import report_to_json, with_coded_sizes
from nuqjax._src.store.text import PLAIN, SHARED, from_text, to_text
from nuqjax._src.store.tree import Structure

# Where a tree has 8 or more tensors of at most 4 KiB, or coded indices, those of one dtype share one tensor of a file.
# Each tensor costs a line of some 75 bytes in the header, which no reader accepts compressed: much, where tensors are
# small.
_SMALL, _MANY = 1 << 12, 8


class LayoutBuilder:
    """Builds the JSON of a file leaf by leaf, both for `save` and for a streaming conversion."""

    def __init__(self, nodes: list[Any]) -> None:
        """Starts the layout of a tree with these nodes; it has no leaves yet."""
        self._nodes, self.entries = nodes, []
        self._names = {"__metadata__"}
        self.coded: dict[str, int] = {}
        self._shared: dict[str, int] = {}  # checksums of the shared tensors by name
        self._pooled = False
        self._added: dict[Any, tuple[int, Any]] = {}  # number of the entry and the leaf, by the ids of its arrays

    def add(self, path: str, leaf: Any, code: Callable[..., Any] | None = None) -> list[Stored]:
        """Adds the next leaf and returns its named tensors to write; none if an earlier leaf has the same arrays.

        `code` is as in `describe`.
        """
        arrays, layout = jax.tree.flatten(leaf)
        same = (*map(id, arrays), layout)
        if same in self._added and arrays and isinstance(arrays[0], jax.Array | np.ndarray):
            self.entries.append({"path": path, "kind": "tied", "to": self._added[same][0]})
            return []
        self._added.setdefault(same, (len(self.entries), leaf))
        return self.place(*described(path, leaf, code))

    def place(
        self, entry: Mapping[str, Any], references: Mapping[str, Any], stored: Mapping[str, Stored]
    ) -> list[Stored]:
        """Adds the next leaf from the results of `described` and returns its named tensors to write."""
        path, named = entry["path"], {}
        for role, tensor in stored.items():
            named[role] = tensor._replace(name=self._name(path, None if role == "data" else role))
        if named:
            entry = {**entry, "tensors": {role: {"name": named[role].name, **references[role]} for role in named}}
        if "coded" in named:
            self.coded[path] = named["coded"].nbytes + named["model"].nbytes
        self.entries.append(dict(entry))
        return list(named.values())

    def pool(self, tensors: Sequence[Stored], limit: int | None) -> list[Stored]:
        """Returns the tensors to write once all leaves are added: streams are joined into one, small ones by dtype.

        Small tensors are joined where they are many or indices are coded. The layout records where each stream begins;
        the small tensors follow each other in the order of the leaves and, in each, of the roles' names. Tensors to be
        split over shards stay as they are: their trees are large, and the size of the headers does not matter.
        """
        if limit is not None and sum(tensor.nbytes for tensor in tensors) > limit:
            return list(tensors)
        by_name = {tensor.name: tensor for tensor in tensors}
        streams: list[dict[str, Any]] = []
        small: dict[str, list[dict[str, Any]]] = {}
        for entry in self.entries:
            for role, reference in sorted(entry.get("tensors", {}).items()):
                tensor = by_name[reference["name"]]
                if role == "coded":
                    streams.append(reference)
                elif tensor.nbytes <= _SMALL:
                    small.setdefault(tensor.code, []).append(reference)
        if not streams and sum(map(len, small.values())) < _MANY:
            return list(tensors)
        pools = []
        for role, references in [("streams", streams), *(("small." + code, parts) for code, parts in small.items())]:
            if len(references) < 2:
                continue
            parts = [by_name.pop(reference["name"]) for reference in references]
            pools.append(pool := _joined(self._name(role, None), parts))
            if references is not streams:
                self._shared[pool.name] = checksum(pool.chunks())
            begin = 0
            for reference, part in zip(references, parts, strict=True):
                if references is streams:
                    reference |= {"name": pool.name, "at": begin}
                    begin += part.nbytes
                else:
                    reference["name"] = pool.name
                    del reference["crc32"]
        self._pooled = bool(pools)
        return [*by_name.values(), *pools]

    def _name(self, path: str, role: str | None) -> str:
        """Returns an unused name for a tensor: the leaf's path, followed by the tensor's role if it has one."""
        name = ".".join(filter(None, [path or "leaf", role]))
        while name in self._names:  # {"a": compressed, "a.packed": dense}, {"a/b": …, "a": {"b": …}}
            name += "~"
        self._names.add(name)
        return name

    def text(self, report: Report | None) -> str:
        """Returns the JSON as it is stored in the metadata."""
        if report is not None:
            paths = [entry["path"] for entry in self.entries]
            if not isinstance(report, Report) or [leaf.path for leaf in report.leaves] != paths:
                raise ValueError("save: the report is of another tree: its leaves have other paths")
            report = with_coded_sizes(report, self.coded)
        kept = None if report is None else report_to_json(report)
        layout = {"tree": self._nodes, "leaves": self.entries, "report": kept}
        if self._pooled or self.coded:
            return to_text(layout | {"shared": self._shared}, SHARED)
        return to_text(layout, PLAIN)


def _joined(name: str, parts: Sequence[Stored]) -> Stored:
    """Returns tensors of one dtype joined end to end into a single one."""
    count = sum(math.prod(part.shape) for part in parts)
    return Stored(name, parts[0].code, (count,), lambda: chain.from_iterable(part.chunks() for part in parts))


def described(
    path: str, leaf: Any, code: Callable[..., Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Stored]]:
    """Returns a leaf's entry in the layout, the references to its tensors, and the tensors, by role and without names.

    `code` is as in `describe`.

    Raises:
      ValueError: as in `save`.
    """
    entry, parts = describe(path, leaf, code)
    stored = {role: from_array(role, part.code, part.array) for role, part in parts.items()}
    references = {
        role: {"dtype": part.dtype, "shape": list(part.shape), "crc32": checksum(stored[role].chunks())}
        for role, part in parts.items()
    }
    return entry, references, stored


def metadata(text: str) -> tuple[dict[str, str], str]:
    """Returns the metadata that hold a layout, and its CRC-32 in hexadecimal, which identifies these contents."""
    tag = f"{zlib.crc32(text.encode()):08x}"
    return {"nuqjax": text, "nuqjax.crc32": tag}, tag


def read_layout(bundle: Bundle, verify: bool) -> tuple[Structure, list[Entry], Any]:
    """Reads the structure, the leaves' entries and the report's JSON in the metadata, checked against the tensors.

    Raises:
      ValueError: the layout is wrong; the message says how, and names the entry.
    """
    name = bundle.name
    text = bundle.metadata.get("nuqjax")
    if not isinstance(text, str):
        raise ValueError(f"{name}: the metadata has no 'nuqjax': nuqjax.save did not write this file")
    if verify and bundle.metadata.get("nuqjax.crc32") != metadata(text)[1]:
        raise ValueError(f"{name}: the layout is not the one that was saved (its CRC-32 differs)")
    layout = from_text(text, name)
    fields = ["version", "tree", "leaves", "report", *(["shared"] if layout["version"] == SHARED else [])]
    if set(layout) != set(fields) or not isinstance(layout["leaves"], list):
        raise ValueError(f"{name}: the layout does not have just {', '.join(fields[:-1])} and {fields[-1]}")
    try:
        structure = Structure(layout["tree"], len(text))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if len(structure.paths) != len(layout["leaves"]):
        raise ValueError(f"{name}: {len(layout['leaves'])} leaves, but the tree has {len(structure.paths)}")
    entries: list[Entry] = []
    shared = Shared(layout["shared"], bundle) if "shared" in layout else None
    for path, entry in zip(structure.paths, layout["leaves"], strict=True):
        is_tied = isinstance(entry, dict) and entry.get("kind") == "tied"
        entries.append(tied(entry, path, entries, name) if is_tied else Entry(entry, path, bundle, shared))
    own = [entry for entry in entries if entry.same_as is None]
    references = [reference for entry in own for reference in entry.tensors.values()]
    names = [reference["name"] for reference in references if "at" not in reference]
    names += _pools([reference for reference in references if "at" in reference], bundle)
    times = Counter(names)
    if len(times) < len(names) or len(names) < len(bundle.files):
        unnamed = sorted(bundle.files.keys() - times.keys()) or sorted(n for n, count in times.items() if count > 1)
        raise ValueError(f"{name}: the tensor {unnamed[0][:200]!r} is not named by just one leaf")
    return structure, entries, layout["report"]


def _pools(parts: Sequence[Mapping[str, Any]], bundle: Bundle) -> list[str]:
    """Returns the names of the tensors that hold these parts; raises unless the parts fill each without gaps."""
    ends: dict[str, int] = {}
    for part in sorted(parts, key=lambda part: (part["at"], stored_bytes(part))):
        name, end = part["name"], ends.get(part["name"], 0)
        if part["at"] != end:
            how = "overlaps" if part["at"] < end else "leaves a hole after"
            raise ValueError(
                f"{bundle.name}: in tensor {name[:200]!r}, the leaf at byte {part['at']} {how} the one before it"
            )
        ends[name] = end + stored_bytes(part)
    for name, end in ends.items():
        if end != bundle.array(name).size:
            raise ValueError(
                f"{bundle.name}: the leaves in tensor {name[:200]!r} take {end} bytes, but it has "
                f"{bundle.array(name).size}"
            )
    return list(ends)
