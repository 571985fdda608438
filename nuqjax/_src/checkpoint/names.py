"""Converts keys to names of tensors and back, so that no leaves merge and no keys change.

Sometimes names alone do not determine the keys: keys are integers or contain the separator, or leaves are Python
numbers. Then the safetensors and npz files of this library hold notes that do. The notes are JSON of `separator` and,
if needed, of the tree's `nodes` (as in `store.tree`), of the tensors' `names` in the tree's order, and of the `types`
of tensors that represent Python numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nuqjax._src.checkpoint.tree import Checkpoint, Leaf, guessed_separator, nested, reading
from nuqjax._src.store.file import parse_json
from nuqjax._src.store.tree import Structure, tree_to_nodes

NOTES = "nuqjax.notes"
_TYPES = {"bool": bool, "int": int, "float": float, "complex": complex}


@dataclass(frozen=True)
class Notes:
    """A file's notes on its names; `nodes` is None if splitting the names at `separator` gives the keys."""

    separator: str
    nodes: list[Any] | None = None
    names: Sequence[str] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0


def remembered(metadata: Mapping[str, Any], where: str) -> Notes | None:
    """Returns the notes in a file's metadata, or None if it has none.

    Raises:
      ValueError: they do not have the form that `notes_for` makes.
    """
    text = metadata.get(NOTES)
    if text is None:
        return None
    found = parse_json(text, f"{where}: the notes") if isinstance(text, str) else None
    kinds = {"separator": str, "nodes": list, "names": list, "types": dict, "metadata": dict}
    if (
        not isinstance(found, dict)
        or not {"separator"} <= set(found) <= set(kinds)
        or not all(isinstance(value, kinds[name]) for name, value in found.items())
        or not all(isinstance(name, str) for name in found.get("names", []))
        or not all(isinstance(value, str) for value in found.get("metadata", {}).values())
        or not all(value in _TYPES for value in map(str, found.get("types", {}).values()))
    ):
        raise ValueError(f"{where}: the notes on its names are not in the form that nuqjax writes")
    return Notes(**found, nbytes=len(str(text)))


def named_tree(
    where: str, named: Mapping[str, Leaf], separator: str | None, notes: Notes | None
) -> tuple[Any, str | None]:
    """Returns leaves by name as a tree, and the separator at which the names were split.

    Args:
      where: the file, for messages.
      named: the leaves by name.
      separator: the requested separator; None for that of the notes, or else a guess from the names.
      notes: the file's notes; None if it has none, or if a separator was requested.

    Raises:
      ValueError: a name is a prefix of another, or the notes are of other names.
    """
    if notes is None or notes.nodes is None:
        parted = notes.separator if notes else guessed_separator(named) if separator is None else separator
        return nested(where, named, parted), parted
    if len(set(notes.names)) < len(notes.names) or set(notes.names) != set(named):
        raise ValueError(
            f"{where}: the names in its notes are not those of its tensors; separator={notes.separator!r} reads "
            "them by name"
        )
    with reading(where, "the notes on its names do not describe a tree"):
        structure = Structure(notes.nodes, notes.nbytes)
        if len(structure.paths) != len(notes.names):
            raise ValueError(f"{len(notes.names)} names of {len(structure.paths)} leaves")
        leaves = [_typed(where, named[name], notes.types.get(str(i))) for i, name in enumerate(notes.names)]
        return structure.build(leaves), notes.separator


def _typed(where: str, leaf: Leaf, kind: str | None) -> Leaf:
    """Returns the leaf, or a leaf that reads the Python number it represents if the notes give a `kind`."""
    if kind is None:
        return leaf
    wanted = np.asarray(_TYPES[kind]()).dtype
    if leaf.shape != () or leaf.dtype != wanted:
        raise ValueError(
            f"{where}: notes say that {leaf.path[:200]!r} is of type {kind}, but its dtype is not {wanted}"
        )
    return Leaf(leaf.path, None, None, lambda: leaf.read().item())


def names_of(checkpoint: Checkpoint, separator: str) -> list[str]:
    """Returns the name of each leaf: its keys, joined by the separator.

    Raises:
      ValueError: two leaves would have the same name.
    """
    seen: dict[str, str] = {}
    names = []
    for leaf, keys in zip(checkpoint.leaves, checkpoint.keys, strict=True):
        name = separator.join(map(str, keys))
        if name in seen:
            raise ValueError(
                f"{checkpoint.path}: the leaves {seen[name]!r} and {leaf.path!r} have the same name, {name!r}, when "
                f"their keys are joined by {separator!r}"
            )
        seen[name] = leaf.path
        names.append(name)
    return names


def notes_for(checkpoint: Checkpoint, names: Sequence[str], separator: str, types: Mapping[str, str]) -> dict[str, Any]:
    """Returns the notes that a file needs so that its names are read back as the same keys; empty if none are needed.

    Args:
      checkpoint: the checkpoint with the keys.
      names: the names of its leaves.
      separator: the separator that joined the keys.
      types: the type of Python number that a leaf is, by the leaf's number.
    """
    numbers = list(range(len(names)))
    wanted = tree_to_nodes(checkpoint.tree(numbers))

    def is_read_back(parted: str) -> bool:
        try:
            return tree_to_nodes(nested("", dict(zip(names, numbers, strict=True)), parted)) == wanted
        except ValueError:
            return False

    if not types and is_read_back(guessed_separator(names)):
        return {}
    if not types and is_read_back(separator):
        return {"separator": separator}
    notes = {"separator": separator, "nodes": wanted[0], "names": list(names), "types": dict(types)}
    return {name: value for name, value in notes.items() if value or name in ("separator", "nodes", "names")}
