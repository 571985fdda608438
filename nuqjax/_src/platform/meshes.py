"""Arrays on meshes with explicit axes, such as `jax.make_mesh` makes: their types state how they are distributed.

JAX refuses an operation on them if its result could be distributed in several ways. nuqjax therefore computes as on
automatic axes between arguments and results, and states how the results are distributed.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec

import jax
import jax.core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nuqjax._src.platform.types import AnyMesh, Array, PyTree, T

P = ParamSpec("P")


def explicit_sharding(*arrays: object) -> NamedSharding | None:
    """Returns the `NamedSharding` of the first of these arrays that is on a mesh with explicit axes; None if none is.

    For a traced array, which is on no devices, it is the sharding in the array's type.
    """
    for array in arrays:
        if isinstance(array, jax.Array):
            sharding = getattr(jax.typeof(array), "sharding", None)
            if sharding is not None and sharding.mesh.explicit_axes:
                place = sharding if isinstance(array, jax.core.Tracer) else array.sharding
                assert isinstance(place, NamedSharding)
                return place
    return None


def typed_spec(array: Array) -> PartitionSpec:
    """Returns the partition spec in an array's type, with an entry for every axis."""
    spec = jax.typeof(array).sharding.spec if isinstance(array, jax.Array) else ()
    return PartitionSpec(*(*spec, *[None] * array.ndim)[: array.ndim])


def as_automatic(function: Callable[P, T], mesh: AnyMesh | None, specs: PyTree) -> Callable[P, T]:
    """Returns a function that computes `function`, made of JAX operations only, as on automatic axes.

    Args:
      function: a function of pytrees of arrays.
      mesh: the mesh with explicit axes that the arrays are on; if None, `function` itself is returned.
      specs: the `PartitionSpec`s of the results, as a tree like them.
    """
    if mesh is None:
        return function
    automatic: Callable = jax.sharding.auto_axes  # which is a decorator, too
    return automatic(function, axes=mesh.explicit_axes, out_sharding=_shardings(mesh, specs))


def run_as_automatic(function: Callable, mesh: AnyMesh, specs: PyTree, *args: object) -> PyTree:
    """Returns the results of a function of any arguments, some of them arrays, computed as on automatic axes.

    The function may read the arrays' values and shardings. With `specs` None, results keep their sharding; otherwise
    each spec holds for all results below it in the tree.
    """
    leaves, structure = jax.tree.flatten(args)
    places = [n for n, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def run(*arrays: jax.Array) -> PyTree:
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


def on_automatic(x: PyTree) -> PyTree:
    """Returns an array with its mesh's axes automatic, and moves no value; traced arrays and others are unchanged."""
    sharding = None if isinstance(x, jax.core.Tracer) else explicit_sharding(x)
    return x if sharding is None else jax.device_put(x, NamedSharding(_automatic(sharding.mesh), sharding.spec))


def _automatic(mesh: AnyMesh) -> Mesh:
    assert isinstance(mesh, Mesh)  # of arrays that hold values
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def as_on_automatic(specs: PyTree) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns a decorator that uses `run_as_automatic` if an argument is on a mesh with explicit axes."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            sharding = explicit_sharding(*jax.tree.leaves((args, kwargs)))
            if sharding is None:
                return function(*args, **kwargs)
            plain: Callable = function
            given = lambda args, kwargs: plain(*args, **kwargs)  # noqa: E731
            return run_as_automatic(given, sharding.mesh, specs, args, kwargs)

        return run

    return decorate


def shards(mesh: AnyMesh, names: str | Sequence[str] | None) -> int:
    """Returns into how many shards these mesh axes split an array axis."""
    names = () if names is None else (names,) if isinstance(names, str) else names
    count = 1
    for name in names:
        count *= mesh.shape[name]
    return count


def _shardings(mesh: AnyMesh, specs: PyTree) -> PyTree:
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
