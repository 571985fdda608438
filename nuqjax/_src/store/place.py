"""Copies loaded arrays to JAX, and places them on devices."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.leaf.shardings import shardings
from nuqjax._src.platform.host import to_jax
from nuqjax._src.store.entry import Entry


def places_of(sharding: Any, entries: Sequence[Entry]) -> dict[str, Any]:
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


def placed_alike(entry: Entry, entries: Sequence[Entry], places: Mapping[str, Any]) -> bool:
    """Returns whether a tied leaf has the same sharding as the leaf to which it is tied."""
    assert entry.same_as is not None
    return places.get(entry.path) == places.get(entries[entry.same_as].path)


def placed(leaf: Any, place: Sharding | None) -> Any:
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
