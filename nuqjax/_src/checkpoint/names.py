"""Keys to tensors' names and back, so that nothing merges and nothing is renamed.

Where names alone do not give the keys back (numbers, keys that have the separator in them, Python's numbers among the
leaves), safetensors and npz files of this library have notes that do: JSON of `separator` and, if need be, of the
tree's nodes as `store.tree` has them, the tensors' `names` in the tree's order, and `types` of those that stand for
numbers of Python.
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
    """What a file says of its names; `nodes` is None where they give the keys when parted at `separator`."""

    separator: str
    nodes: list[Any] | None = None
    names: Sequence[str] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0


def remembered(metadata: Mapping[str, Any], where: str) -> Notes | None:
    """The notes in a file's metadata, if it has some.

    Raises:
      ValueError: they are not what `notes_for` makes.
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
        raise ValueError(f"{where}: notes on its names that are not such as this library writes")
    return Notes(**found, nbytes=len(str(text)))


def named_tree(
    where: str, named: Mapping[str, Leaf], separator: str | None, notes: Notes | None
) -> tuple[Any, str | None]:
    """Leaves by name as a tree, and the separator that parted the names.

    Args:
      where: the file, for messages.
      named: the leaves.
      separator: as asked; None for that of the notes, or else by what the names have.
      notes: of the file, where it has some and none was asked.

    Raises:
      ValueError: a name is the beginning of another; notes are of other names.
    """
    if notes is None or notes.nodes is None:
        parted = notes.separator if notes else guessed_separator(named) if separator is None else separator
        return nested(where, named, parted), parted
    if len(set(notes.names)) < len(notes.names) or set(notes.names) != set(named):
        raise ValueError(
            f"{where}: its notes name other tensors than it has; separator={notes.separator!r} reads them by name"
        )
    with reading(where, "notes on its names that are none"):
        structure = Structure(notes.nodes, notes.nbytes)
        if len(structure.paths) != len(notes.names):
            raise ValueError(f"{len(notes.names)} names of {len(structure.paths)} leaves")
        leaves = [_typed(where, named[name], notes.types.get(str(i))) for i, name in enumerate(notes.names)]
        return structure.build(leaves), notes.separator


def _typed(where: str, leaf: Leaf, kind: str | None) -> Leaf:
    """The leaf, or the number of Python that it stands for."""
    if kind is None:
        return leaf
    wanted = np.asarray(_TYPES[kind]()).dtype
    if leaf.shape != () or leaf.dtype != wanted:
        raise ValueError(f"{where}: notes say that {leaf.path[:200]!r} is of type {kind}, but it is no {wanted}")
    return Leaf(leaf.path, None, None, lambda: leaf.read().item())


def names_of(checkpoint: Checkpoint, separator: str) -> list[str]:
    """The name of each leaf: its keys, joined.

    Raises:
      ValueError: two leaves would have the same.
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
    """What a file must say of these names so that they are read as the keys that they are of; empty where nothing.

    Args:
      checkpoint: whose keys.
      names: what its leaves are called.
      separator: that joined them.
      types: by number of the leaf, which type of Python's numbers it is of.
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
