"""Traces a function on the dense shapes of its arguments, and writes what it changes in place back into them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import AbstractValue
from jax.extend import core
from jax.sharding import NamedSharding
from jax.tree_util import KeyPath

from nuqjax._src.platform.compat import as_varying
from nuqjax._src.platform.meshes import explicit_sharding
from nuqjax._src.platform.types import Array, PyTree, TreeDef


class Traced(NamedTuple):
    """A function traced to a jaxpr. The arrays among its arguments are the jaxpr's inputs; other arguments are static.

    Attributes:
      jaxpr: takes the arrays, in the order of `arrays`, and returns the outputs' leaves, then the arrays of `changed`.
      arrays: path and value of every argument that is an array or a leaf that stands for one.
      outputs: the structure of the outputs.
      changed: path and new value of every leaf of the arguments that the function replaced in place; `COMPUTED` in
        place of a new array. Empty if `trace` was given no `caller`.
    """

    jaxpr: core.ClosedJaxpr
    arrays: list[tuple[KeyPath, Any]]
    outputs: TreeDef
    changed: list[tuple[KeyPath, Any]]


COMPUTED = object()
"""Stands in `Traced.changed` for an array, which is among the outputs."""


def trace(
    fn: Callable[..., PyTree],
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
    is_leaf: Callable[[object], bool],
    sharding_of: Callable[[Any], NamedSharding | None] = lambda leaf: None,
    *,
    caller: str = "",
) -> Traced:
    """Traces `fn` on the dense shapes of its arguments.

    Args:
      fn: a function that JAX can trace.
      args: its positional arguments: pytrees of arrays, of leaves that stand for an array, and of anything else.
      kwargs: its keyword arguments, likewise.
      is_leaf: returns whether a value is a leaf that stands for an array; such leaves have a `shape` and a `dtype`.
      sharding_of: returns the sharding of such a leaf's array on a mesh with explicit axes; None for other leaves.
      caller: the name in messages of the public function that needs the changes to arguments; "" if none does.

    Raises:
      TypeError: `fn` is a model, not a function.
      ValueError: with a `caller`, the function changed more in place than the values of leaves: it added or removed
        a leaf, or changed a static field.
    """
    if callable(getattr(fn, "init", None)) and callable(getattr(fn, "apply", None)):
        raise TypeError(f"{caller}: {type(fn).__name__} is a model, but a function is wanted, such as model.apply")
    flat, structure = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_leaf)
    traced = [n for n, (_, x) in enumerate(flat) if is_leaf(x) or isinstance(x, _ARRAYS)]
    changed: list[tuple[KeyPath, Any]] = []

    def dense(*arrays: jax.Array) -> tuple[PyTree, list[jax.Array]]:
        values = [x for _, x in flat]
        for n, array in zip(traced, arrays, strict=True):
            values[n] = array
        args, kwargs = structure.unflatten(values)
        before = jax.tree.structure((args, kwargs), is_leaf=is_leaf)
        outputs = fn(*args, **kwargs)
        computed = []
        if caller:
            for path, new in _changes((args, kwargs), before, [p for p, _ in flat], values, is_leaf, caller):
                is_array = isinstance(new, _ARRAYS)
                changed.append((path, COMPUTED if is_array else new))
                computed += [new] if is_array else []
        return outputs, computed

    def shape_of(x) -> jax.ShapeDtypeStruct:
        varying = _varying_type(jax.tree.leaves(x))
        if is_leaf(x):
            placed: dict[str, Any] = {"sharding": sharding_of(x)} | varying
            return jax.ShapeDtypeStruct(x.shape, x.dtype, **placed)
        aval = jax.typeof(x)
        placed = {"sharding": None if explicit_sharding(x) is None else aval.sharding} | varying
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False), **placed)

    jaxpr, (shapes, _) = jax.make_jaxpr(dense, return_shape=True)(*(shape_of(flat[n][1]) for n in traced))
    return Traced(jaxpr, [flat[n] for n in traced], jax.tree.structure(shapes), changed)


_ARRAYS = jax.Array | np.ndarray | np.generic


def _changes(
    tree: PyTree,
    before: TreeDef,
    paths: Sequence[KeyPath],
    values: Sequence[object],
    is_leaf: Callable[[object], bool],
    caller: str,
) -> Iterator[tuple[KeyPath, object]]:
    """Yields path and new value of each leaf that the function replaced."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    missing = dict.fromkeys(paths)
    added = [path for path, _ in flat if path not in missing]
    for path, _ in flat:
        missing.pop(path, None)
    if added or missing:
        path, done = (added[0], "adds") if added else (next(iter(missing)), "takes away")
        raise ValueError(
            f"{caller}: the function {done} {argument_name(path)}, which cannot be written back: let it return the "
            "new state, or create its entry before the call"
        )
    if structure != before:
        number = next(
            n for n, (a, b) in enumerate(zip(_arguments(structure), _arguments(before), strict=True)) if a != b
        )
        raise ValueError(
            f"{caller}: the function changes a static field of its argument {number}, such as a module's mode, "
            "which cannot be written back: set it before the call (model.eval())"
        )
    for (path, new), old in zip(flat, values, strict=True):
        if new is not old and not (type(new) is type(old) and not isinstance(new, _ARRAYS) and new == old):
            yield path, new


def _arguments(structure: TreeDef) -> list[TreeDef]:
    """Returns the structures of the arguments, positional ones first."""
    return [argument for group in structure.children() for argument in group.children()]


def write_changes(
    traced: Traced, args: Sequence[PyTree], kwargs: Mapping[str, PyTree], computed: Sequence[jax.Array], caller: str
) -> None:
    """Writes what a function changed in its arguments back into the arguments' containers.

    Args:
      traced: the traced function.
      args: the positional arguments that it was traced on.
      kwargs: the keyword arguments that it was traced on.
      computed: the arrays that the jaxpr returns after the outputs, in order.
      caller: as in `trace`.

    Raises:
      ValueError: a container does not accept a new value. The message names the argument.
    """
    arrays = iter(computed)
    for path, value in traced.changed:
        _write((args, kwargs), path, next(arrays) if value is COMPUTED else value, caller)


def _write(tree: PyTree, path: KeyPath, value: object, caller: str) -> None:
    """Replaces the leaf at `path` by a value, in place, in the containers of the tree."""
    *parents, last = path
    try:
        for key in parents:
            tree = (
                getattr(tree, key.name) if hasattr(key, "name") else tree[key.key if hasattr(key, "key") else key.idx]
            )
        if not hasattr(last, "name"):
            tree[last.key if hasattr(last, "key") else last.idx] = value
        elif hasattr(tree, "set_value"):  # an NNX Variable
            tree.set_value(value)
        else:
            setattr(tree, last.name, value)
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{caller}: the function changes {argument_name(path)} in place, which cannot be written back "
            f"({error}); let it return the new value"
        ) from error


def argument_name(path: KeyPath) -> str:
    """Returns the name of a leaf of the arguments for messages: `argument 0, cache/key`."""
    argument, *inside = path[1:]
    name = jax.tree_util.keystr((argument,), simple=True)
    return ", ".join(
        [f"argument {name}", *filter(None, [jax.tree_util.keystr(tuple(inside), simple=True, separator="/")])]
    )


def varying_axes(aval: AbstractValue) -> frozenset[str]:
    """Returns the axes of a `jax.shard_map` over which an array of this type varies."""
    return frozenset(getattr(getattr(aval, "manual_axis_type", None), "varying", ()) or getattr(aval, "vma", ()))


def varying(x: Array, axes: frozenset[str]) -> Array:
    """Returns `x` with a type that varies over these axes, too."""
    missing = axes - varying_axes(jax.typeof(x))
    return as_varying(x, sorted(missing)) if missing else x


def _varying_type(arrays: Sequence[Array]) -> dict[str, Any]:
    """Returns the arguments of `jax.ShapeDtypeStruct` for an array that varies over the axes of all these arrays."""
    axes = frozenset().union(*(varying_axes(jax.typeof(x)) for x in arrays))
    if not axes:
        return {}
    aval = jax.typeof(varying(arrays[0], axes))
    if not hasattr(aval, "manual_axis_type"):
        return {"vma": aval.vma}
    sharding = jax.sharding.NamedSharding(aval.sharding.mesh, jax.sharding.PartitionSpec())
    return {"manual_axis_type": aval.manual_axis_type, "sharding": sharding}
