"""Exports a model with compressed weights as a program that needs no nuqjax: a `jax.export` artifact and its weights.

The program takes a plain dict of the weights file's tensors by name, and the model's inputs. It contains the decoding
of the tensors, but not the packed bytes.
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
from nuqjax._src.store.dtypes import DTYPES
from nuqjax._src.store.layout import LayoutBuilder
from nuqjax._src.store.store import save_by_name
from nuqjax._src.store.target import replacing
from nuqjax._src.store.tree import tree_to_nodes

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROGRAM, WEIGHTS = "program.jax_export", "weights.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class Exported:
    """The result of `export`: a program and its weights.

    Attributes:
      program: takes `(weights, *inputs)`, where `weights` is a dict of arrays by their names in the file, as
        `safetensors.numpy.load_file` returns it. `program.call` runs it on any of `program.platforms`.
      serialized: the program as bytes, for `jax.export.deserialize`.
      cparams: the weights as given to `export`.

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
        """Writes `program.jax_export` and `weights.safetensors` into a folder, which is created if it is missing.

        The weights file has the format of `nuqjax.save`, each tensor with its own name; `nuqjax.load` reads it. Each
        file is written completely or not at all; existing files are replaced.

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

    The program is StableHLO in JAX's own container, for one device of any of the platforms, with the compatibility
    guarantees of `jax.export`. It contains the decoding of the weights, but not the weights: those are its first
    argument, in packed form. Leaves that are Python numbers become constants of the program, and so do all values that
    `fn` closes over. `docs/export.md` shows the few lines that load and run it.

    Args:
      fn: a function of the parameters and of arrays. Bind options beforehand: `functools.partial(model.apply,
        train=False)`.
      cparams: the parameters, compressed or not: any pytree that `nuqjax.save` takes.
      example_inputs: the other arguments: a tuple of them, or a single one. Each is an array, a `jax.ShapeDtypeStruct`
        or a tree of these in dicts, lists and tuples; only shapes and dtypes count. For axes of any size, use the
        dimensions of `jax.export.symbolic_shape`.
      platforms: the target platforms: "cpu", "cuda", "rocm", "tpu". None of them needs to be present.

    Returns:
      The program and the weights; `.save(folder)` writes both.

    Raises:
      ValueError: an input is not an array; the function changes one of its arguments in place; JAX cannot serialize a
        node type of an input or output; no program could read the dtype of a leaf from the file; a platform is unknown.
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
    def program(weights, *inputs) -> Any:
        arguments = (rebuild(weights), *inputs)
        before = jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_codebook_array)[0]
        outputs = run(*arguments)
        check_kept(before, arguments, "export")
        return outputs

    exported = jax.export.export(program, platforms=tuple(platforms))(tensors, *inputs)
    try:
        serialized = bytes(exported.serialize())
    except ValueError as error:  # a pytree node that JAX cannot serialize
        raise ValueError(f"export: inputs and outputs are trees of dicts, lists and tuples only: {error}") from error
    return Exported(exported, serialized, cparams)


def check_kept(before: Sequence[tuple[Any, Any]], arguments: Any, caller: str) -> None:
    """Raises ValueError, naming the leaf, if a function has replaced a leaf of its arguments in place."""
    old, new = dict(before), dict(jax.tree_util.tree_flatten_with_path(arguments, is_leaf=is_codebook_array)[0])
    for path in old | new:
        if old.get(path) is not new.get(path):
            raise ValueError(
                f"{caller}: the function changes {path_name(path[1:]) or 'an argument'} in place, which the file could "
                "not keep: let it return the new value, or not change it (model.eval())"
            )


def checked_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """Returns the inputs as a tuple, each array replaced by its shape and dtype; raises ValueError for other leaves."""
    inputs = example_inputs if type(example_inputs) is tuple else (example_inputs,)

    def shape_of(path, x) -> jax.ShapeDtypeStruct:
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(
                f"export: input {path_name(path)} is of type {type(x).__name__}, but an array or a ShapeDtypeStruct is "
                "wanted; bind options beforehand, as in functools.partial(fn, train=False)"
            )
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True))

    return jax.tree_util.tree_map_with_path(shape_of, inputs, is_leaf=lambda x: x is None)


def by_name(cparams: Any) -> tuple[dict[str, jax.ShapeDtypeStruct], Callable[[Mapping[str, Any]], Any]]:
    """Returns the tensors that `nuqjax.save` stores for a tree, by name, and a function that rebuilds the tree.

    Raises:
      ValueError: a dtype of the tree cannot be rebuilt from its stored form.
    """
    nodes, named = tree_to_nodes(cparams)
    layout, tensors = LayoutBuilder(nodes), {}
    for path, leaf in named:
        stored = layout.add(path, leaf)
        references = layout.entries[-1].get("tensors", {})
        for (role, reference), tensor in zip(references.items(), stored, strict=True):
            where = f"{path or 'the tree'}{'' if role == 'data' else f', {role}'}"
            dtype = DTYPES[tensor.code]
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
        raise ValueError(f"export: {where} is {name}, which an exported program cannot restore from its stored bytes")
    dtype = jnp.dtype(name)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"export: {where} is {name}, which JAX supports in x64 mode only: cast it, or turn x64 on")


def _restored(stored: jax.Array, name: str) -> jax.Array:
    """Rebuilds an array of the dtype with this name from the form in which `store.entry` stores it."""
    dtype = jnp.dtype(name)
    if stored.dtype == dtype:
        return stored
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return lax.complex(stored[..., 0], stored[..., 1])
    if jnp.issubdtype(dtype, jnp.integer):
        return stored.astype(dtype)
    return lax.bitcast_convert_type(stored.astype(jnp.uint4) if name.startswith("float4_") else stored, dtype)
