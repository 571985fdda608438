"""Arrays on meshes with explicit axes, such as `jax.make_mesh` makes: their types state how they are distributed.

JAX refuses an operation on them if its result could be distributed in several ways. nuqjax therefore computes as on
automatic axes between arguments and results, and states how the results are distributed.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def explicit_sharding(*arrays: Any) -> Any:
    """Returns the `NamedSharding` of the first of these arrays that is on a mesh with explicit axes; None if none is.

    For a traced array, which is on no devices, it is the sharding in the array's type.
    """
    for array in arrays:
        if isinstance(array, jax.Array):
            sharding = getattr(jax.typeof(array), "sharding", None)
            if sharding is not None and sharding.mesh.explicit_axes:
                return sharding if isinstance(array, jax.core.Tracer) else array.sharding
    return None


def typed_spec(array: Any) -> PartitionSpec:
    """Returns the partition spec in an array's type, with an entry for every axis."""
    spec = jax.typeof(array).sharding.spec if isinstance(array, jax.Array) else ()
    return PartitionSpec(*(*spec, *[None] * array.ndim)[: array.ndim])


def as_automatic(function: Callable, mesh: Any, specs: Any) -> Callable:
    """Returns a function that computes `function`, made of JAX operations only, as on automatic axes.

    Args:
      function: a function of pytrees of arrays.
      mesh: the mesh with explicit axes that the arrays are on; if None, `function` itself is returned.
      specs: the `PartitionSpec`s of the results, as a tree like them.
    """
    if mesh is None:
        return function
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=_shardings(mesh, specs))


def run_as_automatic(function: Callable, mesh: Any, specs: Any, *args: Any) -> Any:
    """Returns the results of a function of any arguments, some of them arrays, computed as on automatic axes.

    The function may read the arrays' values and shardings. With `specs` None, results keep their sharding; otherwise
    each spec holds for all results below it in the tree.
    """
    leaves, structure = jax.tree.flatten(args)
    places = [n for n, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def run(*arrays) -> Any:
        given = list(leaves)
        for n, x in zip(places, arrays, strict=True):
            given[n] = x
        return function(*structure.unflatten(given))

    arrays = [leaves[n] for n in places]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return as_automatic(run, mesh, specs)(*arrays)
    arrays = [on_automatic(x) for x in arrays]
    automatic = _automatic(mesh)
    within = contextlib.nullcontext() if jax.sharding.get_abstract_mesh().empty else jax.set_mesh(automatic)
    with within:
        results = run(*arrays)
    return results if specs is None else jax.device_put(results, _shardings(mesh, specs))


def on_automatic(x: Any) -> Any:
    """Returns an array with its mesh's axes automatic, and moves no value; traced arrays and others are unchanged."""
    sharding = None if isinstance(x, jax.core.Tracer) else explicit_sharding(x)
    return x if sharding is None else jax.device_put(x, NamedSharding(_automatic(sharding.mesh), sharding.spec))


def _automatic(mesh: Any) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def as_on_automatic(specs: Any) -> Callable[[Callable], Callable]:
    """Returns a decorator that uses `run_as_automatic` if an argument is on a mesh with explicit axes."""

    def decorate(function) -> Any:
        @functools.wraps(function)
        def run(*args, **kwargs) -> Any:
            sharding = explicit_sharding(*jax.tree.leaves((args, kwargs)))
            if sharding is None:
                return function(*args, **kwargs)
            given = lambda args, kwargs: function(*args, **kwargs)  # noqa: E731
            return run_as_automatic(given, sharding.mesh, specs, args, kwargs)

        return run

    return decorate


def shards(mesh, names: Any) -> int:
    """Returns into how many shards these mesh axes split an array axis."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count


def _shardings(mesh: Any, specs: Any) -> Any:
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
