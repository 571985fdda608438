"""Reads HDF5 files."""

import os
from typing import Any

from nuqjax._src.checkpoint.tree import MOST_INFLATED, Checkpoint, Leaf, array_leaf, checkpoint_of, reading, unreadable
from nuqjax._src.store.file import check_shape


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
    if count * item.dtype.itemsize > MOST_INFLATED * size:
        return unreadable(path, where, f"{count} values, more than its bytes can stand for", item.shape)

    def read() -> Any:
        with h5py.File(path, "r") as file:
            found: Any = file[where]
            return found[()]

    return array_leaf(path, where, item.shape, item.dtype, read)
