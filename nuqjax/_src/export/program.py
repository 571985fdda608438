"""A model on compressed weights as a program that needs no nuqjax: a `jax.export` artifact, the weights beside it.

The program takes the tensors of the weights file by their names, a plain dict, and the model's inputs. What decodes the
tensors is a part of it; the packed bytes are not.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import lax

from nuqjax._src.apply.apply import apply
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.store.entry import NUMPY_DTYPES
from nuqjax._src.store.store import Layout, save_by_name
from nuqjax._src.store.tree import tree_to_nodes
from nuqjax._src.store.write import replacing

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROGRAM, WEIGHTS = "program.jax_export", "weights.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class Exported:
    """What `export` makes: a program and the weights that it runs on.

    Attributes:
      program: takes `(weights, *inputs)`, weights being a dict of arrays by their names in the file: what
        `safetensors.numpy.load_file` returns. `program.call` runs it, `program.platforms` are those it runs on.
      serialized: the program as bytes, for `jax.export.deserialize`.
      cparams: the weights, as they were given.

    >>> import jax.numpy as jnp, nuqjax
    >>> predict = lambda params, x: x @ params["w"]
    >>> made = nuqjax.export(predict, {"w": jnp.ones((4, 2))}, jnp.ones((1, 4)), platforms=("cpu",))
    >>> made.program.platforms
    ('cpu',)
    """

    program: jax.export.Exported
    serialized: bytes
    cparams: Any

    def __repr__(self) -> str:
        return f"Exported({len(self.serialized)} bytes, platforms={self.program.platforms})"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `program.jax_export` and `weights.safetensors` into a folder, which is made if there is none.

        The weights are a file as `nuqjax.save` writes it, every tensor under its own name; `nuqjax.load` reads it. Each
        file is written whole or not at all; what was there is replaced.

        Raises:
          OSError: the folder cannot be made or written to.
        """
        folder = os.fspath(folder)
        os.makedirs(folder, exist_ok=True)
        save_by_name(os.path.join(folder, WEIGHTS), self.cparams)
        with replacing(os.path.join(folder, PROGRAM)) as file:
            file.write(self.serialized)


def export(
    fn: Callable[..., Any],
    cparams: Any,
    example_inputs: Any,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> Exported:
    """Exports `apply(fn)(cparams, *inputs)` as a program that runs without nuqjax and without the model's code.

    The program is StableHLO in JAX's own container, for one device of any of the platforms, under the promises of
    compatibility of `jax.export`. It holds how the weights are decoded, not the weights: those are its first argument,
    packed as they are. Leaves that are Python's numbers are constants of it, and so is whatever `fn` closes over.
    `docs/export.md` has the few lines that load and run it.

    Args:
      fn: a function of the parameters and of arrays. Options are bound before: `functools.partial(model.apply,
        train=False)`.
      cparams: its parameters, compressed or not: any pytree that `nuqjax.save` takes.
      example_inputs: the other arguments: a tuple of them, or the only one. Each is an array, a `jax.ShapeDtypeStruct`
        or a tree of these in dicts, lists and tuples; only shapes and dtypes count. Axes of any size are dimensions of
        `jax.export.symbolic_shape`.
      platforms: for which it is compiled: "cpu", "cuda", "rocm", "tpu". None of them need be at hand.

    Returns:
      The program and the weights; `.save(folder)` writes both.

    Raises:
      ValueError: an input is no array; the function changes one of its arguments in place; an input or output is of a
        type of node that JAX cannot write down; a leaf has a dtype that no program could read from the file; a platform
        is unknown.
      ImportError: `flatbuffers` is missing, which JAX needs to serialize a program.

    >>> import jax, jax.numpy as jnp, nuqjax
    >>> predict = lambda params, x: jnp.tanh(x @ params["w"] + params["b"])
    >>> params = {"w": jnp.linspace(-1, 1, 512).reshape(16, 32), "b": jnp.zeros(32)}
    >>> exported = export(predict, nuqjax.compress(params, bits=4), jax.ShapeDtypeStruct((2, 16), jnp.float32))
    >>> exported.program.platforms
    ('cpu', 'cuda', 'tpu')
    >>> (weights, *_), _ = jax.tree.unflatten(exported.program.in_tree, exported.program.in_avals)
    >>> {name: f"{tensor.dtype}{list(tensor.shape)}" for name, tensor in weights.items()}
    {'b': 'float32[32]', 'w.levels': 'float32[1, 16]', 'w.packed': 'uint8[32, 8]'}
    """
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("export needs flatbuffers: pip install 'nuqjax[export]'") from error
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"export: platforms={platforms!r}, but a tuple of some of {PLATFORMS} is wanted")
    inputs = checked_inputs(example_inputs)
    tensors, rebuild = by_name(cparams)
    run = apply(fn)

    @jax.jit
    def program(weights, *inputs):
        arguments = (rebuild(weights), *inputs)
        before = jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_codebook_array)[0]
        outputs = run(*arguments)
        check_kept(before, arguments, "export")
        return outputs

    exported = jax.export.export(program, platforms=tuple(platforms))(tensors, *inputs)
    try:
        serialized = bytes(exported.serialize())
    except ValueError as error:  # a pytree node that JAX does not know how to write
        raise ValueError(f"export: inputs and outputs are trees of dicts, lists and tuples only: {error}") from error
    return Exported(exported, serialized, cparams)


def check_kept(before: Sequence[tuple[Any, Any]], arguments: Any, caller: str) -> None:
    """Raises ValueError, naming the leaf, where a function has replaced one of its arguments' leaves in place."""
    old, new = dict(before), dict(jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_codebook_array)[0])
    for path in old | new:
        if old.get(path) is not new.get(path):
            raise ValueError(
                f"{caller}: the function changes {path_name(path[1:]) or 'an argument'} in place, which the file could "
                "not keep: let it return the new value, or not change it (model.eval())"
            )


def checked_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """The inputs as a tuple, with the shape and dtype of each of their arrays."""
    inputs = example_inputs if type(example_inputs) is tuple else (example_inputs,)

    def shape_of(path, x):
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(
                f"export: input {path_name(path)} is of type {type(x).__name__}, but an array or a ShapeDtypeStruct is "
                "wanted; options are bound beforehand, as in functools.partial(fn, train=False)"
            )
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True))

    return jax.tree_util.tree_map_with_path(shape_of, inputs, is_leaf=lambda x: x is None)


def by_name(cparams: Any) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[Mapping[str, Any]], Any]]:
    """The tensors that `nuqjax.save` stores of a tree, by name, and the function that makes the tree of such tensors.

    Raises:
      ValueError: a dtype of the tree is not one that can be made of what is stored.
    """
    nodes, named = tree_to_nodes(cparams)
    layout, tensors = Layout(nodes), {}
    for path, leaf in named:
        stored = layout.add(path, leaf)
        references = layout.entries[-1].get("tensors", {})
        for (role, reference), tensor in zip(references.items(), stored, strict=True):
            where = f"{path or 'the tree'}{'' if role == 'data' else f', {role}'}"
            dtype = NUMPY_DTYPES[tensor.code]
            for name in (dtype, reference["dtype"]):
                _check_dtype(name, where)
            tensors[reference["name"]] = jax.ShapeDtypeStruct(tensor.shape, dtype)
    leaves, structure = jax.tree.flatten(cparams, is_leaf=is_codebook_array)

    def rebuild(weights: Mapping[str, Any]) -> Any:
        found = []
        for leaf, entry in zip(leaves, layout.entries, strict=True):
            references = entry.get("tensors", {})
            arrays = {role: _restored(weights[r["name"]], r["dtype"]) for role, r in references.items()}
            if entry["kind"] == "codebook":
                leaf = replace(leaf, **arrays)
            elif entry["kind"] == "key":
                leaf = jax.random.wrap_key_data(arrays["data"], impl=entry["impl"])
            elif arrays:
                leaf = arrays["data"]
            found.append(leaf)
        return structure.unflatten(found)

    return tensors, rebuild


def _check_dtype(name: str, where: str) -> None:
    if name.startswith("float6_"):
        raise ValueError(f"export: {where} is {name}, which no program can make of the bytes that are stored")
    dtype = jnp.dtype(name)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"export: {where} is {name}, which JAX holds in x64 mode only: cast it, or turn x64 on")


def _restored(stored: jax.Array, name: str) -> jax.Array:
    """An array of the dtype of this name, of what `store.entry` stores of it."""
    dtype = jnp.dtype(name)
    if stored.dtype == dtype:
        return stored
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return lax.complex(stored[..., 0], stored[..., 1])
    if jnp.issubdtype(dtype, jnp.integer):
        return stored.astype(dtype)
    return lax.bitcast_convert_type(stored.astype(jnp.uint4) if name.startswith("float4_") else stored, dtype)
