"""Saves and loads compressed trees: safetensors files whose metadata hold the structure and the layout as JSON.

`docs/format.md` describes the format so that a few lines of NumPy can read it. A file holds data only, no pickle and
no code; everything in it is checked before it is used.
"""

import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import nearest, path_name
from nuqjax._src.leaf.shardings import shardings
from nuqjax._src.platform.host import to_jax
from nuqjax._src.report.report import Report
from nuqjax._src.store.entropy import encode, sized
from nuqjax._src.store.entry import Entry, Shared, checksum, describe, stored_bytes, tied
from nuqjax._src.store.file import Bundle, Stored, from_array, open_bundle
from nuqjax._src.store.report import report_entry, report_from_json, report_to_json, with_coded_sizes
from nuqjax._src.store.text import PLAIN, SHARED, from_text, to_text
from nuqjax._src.store.tree import Structure, tree_to_nodes
from nuqjax._src.store.write import header, write

# Where a tree has 32 or more tensors of at most 4 KiB, or coded indices, small tensors of one dtype share one tensor of
# the file. Each tensor costs a line of some 75 bytes in the header, which no reader accepts compressed: much, where
# tensors are small.
_SMALL, _MANY = 1 << 12, 32
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save(
    path: str | os.PathLike[str],
    cparams: Any,
    *,
    report: Report | None = None,
    entropy_coding: bool = False,
    max_shard_size: int | str | None = None,
) -> None:
    """Saves a tree, compressed or not, bit for bit.

    The file is written under a temporary name, flushed to disk and renamed, so an interrupted save leaves the old file
    whole. Arrays keep their dtypes; Python numbers and strings keep their types. For a leaf that no file can hold (a
    function), the file stores the type's name, and `load(…, like=…)` takes the leaf from `like`.

    Args:
      path: the file to write, by convention `….safetensors`. An existing file is replaced; its permissions are kept.
      cparams: any pytree whose dicts have keys that are strings, integers or tuples of these.
      report: the `Report` of the tree, stored in the same file.
      entropy_coding: entropy-code the indices where that is smaller; needs the `entropy` extra. Memory use does not
        change, because the indices are packed again when the file is loaded.
      max_shard_size: a number of bytes or a string such as `"5GB"`. Tensors of more bytes in total are split over
        several files with an index, `PATH.index.json`, as on the Hugging Face Hub.

    Raises:
      ValueError: a leaf or a key is of a type or dtype that the format does not hold, a leaf's arrays do not fit its
        layout, or the report is of another tree.
      OSError: the file cannot be written; another process is writing it; the path is a directory or a device; or files
        with its name that this library did not write would be hidden, replaced or removed.
      ImportError: entropy coding is asked for without `constriction`.

    >>> import jax.numpy as jnp, nuqjax, pathlib, tempfile
    >>> cparams = nuqjax.compress({"kernel": jnp.arange(4096.0).reshape(64, 64)}, bits=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(pathlib.Path(folder) / "model.safetensors", cparams)
    ...     same = load(pathlib.Path(folder) / "model.safetensors")
    >>> same["kernel"], bool((same["kernel"].packed == cparams["kernel"].packed).all())
    (CodebookArray(float32[64, 64], bits=4, granularity='tensor', 2112 bytes), True)
    """
    _save(path, cparams, report, entropy_coding, shard_size(max_shard_size))


def save_by_name(path: str | os.PathLike[str], cparams: Any) -> None:
    """Saves like `save`, but joins no small tensors: each has its own name, for readers that do not know nuqjax."""
    _save(path, cparams, pooled=False)


def _save(path, cparams, report=None, entropy_coding=False, limit=None, pooled=True) -> None:
    tensors, text = _laid_out(cparams, report, encode if entropy_coding else None, limit, pooled)
    write(path, tensors, *metadata(text), limit)


def _laid_out(cparams, report, code, limit, pooled) -> tuple[list[Stored], str]:
    """Returns the tensors of a tree and the text of its layout."""
    nodes, leaves = tree_to_nodes(cparams)
    layout = Layout(nodes)
    tensors = [tensor for name, leaf in leaves for tensor in layout.add(name, leaf, code)]
    if pooled:
        tensors = layout.pool(tensors, limit)
    text = layout.text(report)
    Structure(nodes, len(text))  # raises for a structure that `load` would refuse
    return tensors, text


def file_sizes(cparams: Any) -> tuple[int, int] | None:
    """Returns the bytes of the files that `save` writes, without and with entropy coding; nothing is coded for it.

    The first number is exact, the second to a few bytes for each leaf. None where no file holds the tree, or where not
    all of it is on this host.

    >>> import jax.numpy as jnp, nuqjax, os, tempfile
    >>> cparams = nuqjax.compress({"kernel": jnp.arange(4096.0).reshape(64, 64)}, bits=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(os.path.join(folder, "model.safetensors"), cparams)
    ...     file_sizes(cparams)[0] == os.path.getsize(os.path.join(folder, "model.safetensors"))
    True
    """
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(cparams)):
        return None
    try:
        made = [_laid_out(cparams, None, code, None, True) for code in (None, sized)]
    except ValueError:
        return None
    plain, coded = (
        len(header(tensors, metadata(text)[0])[0]) + sum(tensor.nbytes for tensor in tensors) for tensors, text in made
    )
    return plain, coded


class Layout:
    """Builds the JSON of a file leaf by leaf, both for `save` and for a streaming conversion."""

    def __init__(self, nodes: list[Any]):
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


def load(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    leaves: str | Callable[[str], bool] | None = None,
    sharding: Any = None,
    numpy: bool = False,
    verify: bool = True,
) -> Any:
    """Loads a tree that `save` wrote.

    Dicts, lists, tuples and None come back as they were. Any other node (a Flax `FrozenDict` or NNX state, a named
    tuple, an equinox module) needs its class, which no file holds: `like` provides it. Without `like` the node comes
    back as a dict of its children by name.

    The file is mapped, and only the requested tensors are read.

    Args:
      path: the file, or the name under which shards were saved, or their index.
      like: a tree of the wanted structure, of arrays, `jax.ShapeDtypeStruct` or compressed leaves, or its `PyTreeDef`.
        Shapes and dtypes are compared; a leaf that the file could not hold is taken from `like`.
      leaves: the leaves to load: a regular expression that is searched for in their paths, or a function of the path.
        The other leaves come back as None.
      sharding: where to place arrays: one `jax.sharding.Sharding` for all, or a tree of `NamedSharding` as for the
        dense parameters, matched by path (see `nuqjax.shardings`). Each device receives only its part.
      numpy: return NumPy arrays, which are read-only views of the mapped file where possible.
      verify: compare the checksums of the loaded tensors, which reads every byte of them.

    Returns:
      The tree, with JAX arrays. Arrays of 64-bit dtypes stay NumPy arrays unless x64 is on, because JAX would round
      them; so do arrays of dtypes that JAX does not hold (float6).

    Raises:
      ValueError: the file is damaged, was not written by `save`, or has a newer version; the tree differs from `like`;
        no leaf matches. The message names the entry.
      OSError: there is no such file.
      ImportError: the file is entropy-coded and `constriction` is not installed.

    >>> import jax.numpy as jnp, nuqjax, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "model.safetensors"
    ...     nuqjax.save(path, {"hidden": jnp.ones(3), "out": jnp.zeros(2)})
    ...     load(path, leaves="^out")
    {'hidden': None, 'out': Array([0., 0.], dtype=float32)}
    """
    return from_bundle(open_bundle(path), like=like, leaves=leaves, sharding=sharding, numpy=numpy, verify=verify)


def from_bundle(
    bundle: Bundle,
    *,
    like: Any = None,
    leaves: str | Callable[[str], bool] | None = None,
    sharding: Any = None,
    numpy: bool = False,
    verify: bool = True,
) -> Any:
    """Loads a tree as `load` does, from open files."""
    structure, entries, _ = read_layout(bundle, verify)
    wanted = _wanted(leaves, structure.paths, bundle.name)
    template, treedef = _template(like, entries, bundle.name)
    if sharding is not None and numpy:
        raise ValueError("load: sharding= places JAX arrays, but numpy=True asks for NumPy arrays; give one of them")
    places = _places(sharding, [e for e, w in zip(entries, wanted, strict=True) if w and e.tensors])
    found = []
    for number, (entry, is_wanted) in enumerate(zip(entries, wanted, strict=True)):
        if not is_wanted:
            found.append(None)
        elif entry.kind == "absent":
            found.append(entry.read(verify) if treedef is None else template[number])
        elif entry.same_as is not None and found[entry.same_as] is not None and _placed_alike(entry, entries, places):
            found.append(found[entry.same_as])
        else:
            leaf = entry.read(verify)
            found.append(leaf if numpy else _placed(leaf, places.get(entry.path)))
    try:
        return structure.build(found) if treedef is None else treedef.unflatten(found)
    except ValueError as error:
        raise ValueError(f"{bundle.name}: {error}") from error


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


def _wanted(leaves: str | Callable[[str], bool] | None, paths: Sequence[str], name: str) -> list[bool]:
    if leaves is None:
        return [True] * len(paths)
    if isinstance(leaves, str):
        try:
            pattern = re.compile(leaves)
        except re.error as error:
            raise ValueError(f"load: leaves={leaves!r} is not a regular expression: {error}") from error
        wanted = [pattern.search(path) is not None for path in paths]
    else:
        wanted = [bool(leaves(path)) for path in paths]
    if not any(wanted):
        near = nearest(str(leaves), paths)
        shown = f"leaves={leaves!r} matches" if isinstance(leaves, str) else "the function leaves=… picks"
        raise ValueError(
            f"{name}: {shown} none of the {len(paths)} leaves; the nearest paths are {', '.join(map(repr, near))}"
        )
    return wanted


def _template(like: Any, entries: Sequence[Entry], name: str) -> tuple[list[Any], Any]:
    """Returns the leaves and the structure of `like`; raises ValueError where they differ from the file's."""
    if like is None:
        return [], None
    if isinstance(like, jax.tree_util.PyTreeDef):
        like = like.unflatten(range(like.num_leaves))
    flat, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_codebook_array)
    given, saved = [path_name(path) for path, _ in flat], [entry.path for entry in entries]
    if given != saved:
        for what, here, there in (("has no", saved, set(given)), ("has a", given, set(saved))):
            wrong = [path for path in here if path not in there]
            if wrong:
                raise ValueError(
                    f"{name}: like {what} leaf {wrong[0]!r}, {'unlike' if here is given else 'as has'} the file"
                )
        raise ValueError(f"{name}: like has the file's leaves in another order")
    for entry, (_, leaf) in zip(entries, flat, strict=True):
        saved_as = entry.shape_and_dtype()
        if saved_as is not None and hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            wanted = tuple(leaf.shape), np.dtype(leaf.dtype).name
            if wanted != saved_as and not (entry.kind == "codebook" and saved_as == _as_compressed(leaf)):
                raise ValueError(
                    f"{entry.where}: {saved_as[1]}{list(saved_as[0])}, but like has {wanted[1]}{list(wanted[0])}"
                )
    return [leaf for _, leaf in flat], treedef


def _as_compressed(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Returns shape and dtype of a dense leaf as `compress` sees it: float64 counts as float32 unless x64 is on."""
    return tuple(leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype).name


def _places(sharding: Any, entries: Sequence[Entry]) -> dict[str, Any]:
    """Returns the sharding of each leaf that has arrays, by path."""
    if sharding is None:
        return {}
    if isinstance(sharding, Sharding):
        return dict.fromkeys((entry.path for entry in entries), sharding)
    flat, _ = jax.tree_util.tree_flatten_with_path(sharding)
    given = {path_name(path): place for path, place in flat}
    for entry in entries:
        if entry.path not in given:
            raise ValueError(f"{entry.where}: sharding= has no entry for it")
    return given


def _placed_alike(entry: Entry, entries: Sequence[Entry], places: Mapping[str, Any]) -> bool:
    """Returns whether a tied leaf has the same sharding as the leaf to which it is tied."""
    assert entry.same_as is not None
    return places.get(entry.path) == places.get(entries[entry.same_as].path)


def _placed(leaf: Any, place: Sharding | None) -> Any:
    """Returns the leaf with its arrays copied to JAX and placed."""
    if is_codebook_array(leaf):
        if place is None:
            return jax.tree.map(lambda array: _on_devices(array, None), leaf)
        if not isinstance(place, NamedSharding):
            return jax.tree.map(lambda array: _on_devices(array, place), leaf)
        placed = shardings(leaf, place)
        levels, packed = _on_devices(leaf.levels, placed.levels), _on_devices(leaf.packed, placed.packed)
        scale = None if leaf.scale is None else _on_devices(leaf.scale, placed.scale)
        return replace(leaf, levels=levels, packed=packed, scale=scale)
    if isinstance(leaf, np.ndarray):
        return _on_devices(leaf, place)
    return leaf if place is None or not isinstance(leaf, jax.Array) else jax.device_put(leaf, place)


def _on_devices(array: np.ndarray, place: Sharding | None) -> Any:
    """Copies the array to JAX, or to NumPy where JAX lacks the dtype; a mapped file may change later, a copy not."""
    if not _is_held(array.dtype):
        return np.array(array)
    if place is None:
        return to_jax(np.array(array))
    return jax.make_array_from_callback(array.shape, place, lambda index: np.array(array[index]))


def _is_held(dtype: np.dtype) -> bool:
    """Returns whether JAX holds arrays of a dtype exactly: not float6, and not 64-bit dtypes unless x64 is on."""
    try:
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            return False
        to_jax(np.zeros((), dtype))
    except (TypeError, jax.errors.JaxRuntimeError):
        return False
    return True


def inspect(path: str | os.PathLike[str], *, verify: bool = True) -> Report:
    """Returns the report of a saved tree: the stored one, or else one computed from the file alone.

    Without a stored report, errors and methods are unknown; sizes, levels and entropies are known. The report's
    `nbytes_file` is the size of the file on disk, header included.

    Args:
      path: as in `load`.
      verify: compare checksums.

    Raises:
      ValueError: the file is damaged, or was not written by `save`.
      OSError: there is no such file.

    >>> import jax.numpy as jnp, nuqjax, tempfile, os
    >>> cparams = nuqjax.compress({"kernel": jnp.arange(4096.0).reshape(64, 64)}, bits=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(os.path.join(folder, "model.safetensors"), cparams)
    ...     inspect(os.path.join(folder, "model.safetensors")).total["nbytes_after"]
    2112
    """
    bundle = open_bundle(path)
    files = {bundle.name, *(file.name for file in bundle.files.values())}
    return replace(inspect_bundle(bundle, verify), nbytes_file=sum(map(os.path.getsize, files)))


def inspect_bundle(bundle: Bundle, verify: bool) -> Report:
    """Returns the report as `inspect` does, from open files; `nbytes_file` is not set."""
    _, entries, report = read_layout(bundle, verify)
    if report is not None:
        return report_from_json(report, bundle.name)
    return Report(tuple(report_entry(entry, verify) for entry in entries))
