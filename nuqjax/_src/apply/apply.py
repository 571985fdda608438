"""Runs an unchanged function on a tree with `CodebookArray` leaves, decoding inside XLA.

`apply` traces the function on the dense shapes and re-runs it with the compressed leaves (`interpret`). A leaf stays
packed through slices of its stack axes, casts, transposes and reshapes. It is decoded where a primitive needs its
values: a layer just before it runs, an embedding only at the rows looked up, a scanned leaf only at the step's slice. A
dot product takes it as it is stored (`kernels`).
"""

import functools
import math
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from nuqjax._src.apply.contraction import contraction_of, view_of
from nuqjax._src.kernels.after import after, token_of
from nuqjax._src.kernels.product import product
from nuqjax._src.leaf.codebook_array import (
    CodebookArray,
    check_layout,
    decode,
    decoding_levels,
    dense_sharding,
    held_by_jax,
    is_codebook_array,
    matrix_layout,
)
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.leaf.take import decode_take
from nuqjax._src.platform.meshes import as_automatic, explicit_sharding
from nuqjax._src.trace.interpret import CONTROL_FLOW, Interpreter, Rule, Site, bind, scan_parts
from nuqjax._src.trace.traced import argument_name, trace, varying_axes, write_changes


@functools.partial(jax.tree_util.register_dataclass, data_fields=("leaf",), meta_fields=("path", "pending"))
@dataclass(frozen=True, eq=False)
class Packed:
    """A compressed leaf on its way through the program.

    Attributes:
      leaf: the `CodebookArray`, sliced along its stack axes as the program sliced it.
      path: its path among the function's arguments.
      pending: equations of one operand (casts, transposes, reshapes…) to bind on the decoded array, in order.
    """

    leaf: CodebookArray
    path: str
    pending: tuple[core.JaxprEqn, ...] = ()

    @property
    def only_cast(self) -> bool:
        """Whether the pending equations commute with slicing."""
        return all(eqn.primitive.name == "convert_element_type" for eqn in self.pending)

    @property
    def stacked(self) -> bool:
        """Whether a slice of the leaf's arrays along their first axis is a slice of the value."""
        return bool(self.leaf.stack_shape) and self.only_cast

    def finish(self, array: jax.Array) -> jax.Array:
        """Applies the pending equations to a decoded array."""
        for eqn in self.pending:
            [array] = bind(eqn, [array])
        return array


LOOP_BYTES = 2**28


def apply(fn: Callable[..., Any], *misplaced: Any, loop_bytes: int = LOOP_BYTES) -> Callable[..., Any]:
    """Lifts a function of dense arrays to one that takes `CodebookArray` leaves anywhere in its arguments.

    The function is not changed. It may be a Flax `model.apply`, a call of an NNX or equinox module, or any JAX code.
    The result is that of the function on `nuqjax.decompress` of its arguments. Run eagerly, each operation gives the
    same bits. Where XLA compiles several operations together (under `jit`, and in loops and inner `jit`s that a
    compressed leaf enters), results are equal up to the order in which XLA sums. The lifted function composes with
    `jit` (pass the tree as an argument, so that it does not become a constant), `grad`, `vmap`, `shard_map`, sharding
    and `jax.export`. Arguments that are not arrays (`train=False`, `mutable=…`) are static.

    Changes that the function makes in place in its arguments are written back to them: the state of NNX modules
    (caches, batch statistics, counts of random streams) and the entries of dicts and lists. Where that is impossible,
    as for a compressed leaf, an error names the leaf.

    Memory and speed: a leaf is decoded at each use, in each call; for dot products under `jit` on one CPU in blocks, so
    that a large weight, or a tied head, is never dense as a whole. Loops (`scan`, `while_loop`) are an exception: the
    weights that they close over are decoded once, before the first step, up to `loop_bytes` in all. Layers that a
    `scan` runs over are always decoded one by one, and look-ups row by row. To decode once for many calls, pass
    `nuqjax.decompress(cparams)` to `fn` itself.

    Each call traces the function again: put it under `jax.jit` where it runs more than once.

    Args:
      fn: a function that JAX can trace.
      *misplaced: must be empty: the arguments of `fn` go to the function that is returned.
      loop_bytes: most bytes that the weights decoded for one loop may take; 0 decodes in each step.

    Returns:
      A function of the same arguments and outputs; outputs are dense JAX arrays. It pickles if `fn` does.

    Raises:
      TypeError: `fn` is a model and not a function of one, or arguments of the function are given here.
      ValueError: raised by the returned function: a leaf was sliced along an axis that is not a stack axis; an
        optimizer changed its indices; a change in place cannot be written back. The message names the leaf.

    >>> import jax, jax.numpy as jnp, nuqjax
    >>> predict = lambda params, x: jnp.tanh(x @ params["w"] + params["b"])
    >>> params = {"w": jnp.linspace(-1, 1, 512).reshape(16, 32), "b": jnp.zeros(32)}
    >>> cparams = nuqjax.compress(params, bits=4)
    >>> jax.jit(apply(predict))(cparams, jnp.ones((2, 16))).shape
    (2, 32)
    """
    _check_function(fn, misplaced)
    return functools.update_wrapper(_Lifted(fn, loop_bytes), fn)


class _Lifted:
    """A lifted function; it is a class so that it pickles."""

    def __init__(self, fn: Callable[..., Any], loop_bytes: int) -> None:
        self._fn, self._loop_bytes = fn, loop_bytes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_codebook_array)[0]
        for path, x in leaves:
            if is_codebook_array(x):
                check_layout(x, argument_name(path))
        traced = trace(self._fn, args, kwargs, is_codebook_array, dense_sharding, caller="nuqjax.apply")
        held = dict(traced.arrays)
        for path, _ in traced.changed:
            if is_codebook_array(held.get(path)):
                raise ValueError(
                    f"nuqjax.apply: the function changes a compressed leaf in place, {argument_name(path)}; let it "
                    "return the new value, or give it nuqjax.decompress of the tree"
                )
        interpreter = _interpreter(self._loop_bytes)
        values = [Packed(x, path_name(path)) if is_codebook_array(x) else x for path, x in traced.arrays]
        results = interpreter.lower_all(interpreter.evaluate(traced.jaxpr, values))
        results = [_as_array(x, aval) for x, aval in zip(results, traced.jaxpr.out_avals, strict=True)]
        outputs, computed = results[: traced.outputs.num_leaves], results[traced.outputs.num_leaves :]
        write_changes(traced, args, kwargs, computed, "nuqjax.apply")
        return jax.tree.unflatten(traced.outputs, outputs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self) -> str | tuple[Any, ...]:
        name = getattr(self._fn, "__qualname__", "")
        if getattr(sys.modules.get(getattr(self._fn, "__module__", "")), name, None) is self:
            return name  # decorated by `@nuqjax.apply` at the top level of a module
        return functools.partial(apply, loop_bytes=self._loop_bytes), (self._fn,)


def _check_function(fn: Any, misplaced: Sequence[Any]) -> None:
    """Raises TypeError, showing the right call, if `fn` is a model or a tree, or more arguments are given."""
    if misplaced:
        raise TypeError(
            "nuqjax.apply takes a function and returns a function of the same arguments: nuqjax.apply(fn)(cparams, x)"
        )
    if callable(getattr(fn, "init", None)) and callable(getattr(fn, "apply", None)):
        raise TypeError(
            f"nuqjax.apply: {type(fn).__name__} is a model, but a function is wanted: "
            "nuqjax.apply(model.apply)(cparams, x)"
        )
    bound = fn if not isinstance(fn, functools.partial) else (fn.args, fn.keywords)
    leaves = jax.tree.leaves(bound, is_leaf=is_codebook_array)
    is_model = not isinstance(fn, functools.partial) and any(isinstance(x, jax.Array | np.ndarray) for x in leaves)
    if not callable(fn) or is_model or any(map(is_codebook_array, leaves)):
        raise TypeError(
            f"nuqjax.apply: {type(fn).__name__} is not a function of the compressed tree, which must be its argument: "
            "nuqjax.apply(fn)(cparams, x), or nuqjax.apply(lambda model, x: model(x))(cmodel, x)"
        )


def _as_array(x: Any, aval: Any) -> jax.Array:
    """Returns a result as a JAX array; it may be a literal of the traced program or an unchanged argument."""
    if isinstance(x, jax.Array):
        return x
    x = np.asarray(x)
    return jnp.asarray(x.item()) if aval.weak_type and x.ndim == 0 else jnp.asarray(x, aval.dtype)


def _lower(value: Packed, others: Sequence[Any]) -> jax.Array:
    """Decodes a leaf for an equation that has these other operands."""
    leaf, token = value.leaf, token_of(others)
    if token is not None:
        leaf = replace(leaf, packed=after(leaf.packed, token))
    with jax.named_scope(f"decode {value.path}"):
        return value.finish(decode(leaf))


# ---------------------------------------------------------------------------------------------------------------------
# Rules: what a primitive does with a packed leaf instead of decoding it whole.


def _keep(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, value: Packed, *rest) -> Sequence[Any]:
    """Postpones a change of shape or dtype until the leaf is decoded."""
    if rest:
        return bind(eqn, interpreter.lower_all((value, *rest)))
    return [replace(value, pending=(*value.pending, eqn))]


def _squeeze(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, value: Packed) -> Sequence[Any]:
    """Removes stack axes of length 1 from the leaf itself."""
    dimensions, stack = eqn.params["dimensions"], len(value.leaf.stack_shape)
    if value.only_cast and all(d < stack for d in dimensions):
        return [replace(value, leaf=jax.tree.map(lambda a: lax.squeeze(a, dimensions), value.leaf))]
    return _keep(interpreter, site, eqn, value)


def _slice(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, value: Packed) -> Sequence[Any]:
    """Slices the leaf itself along stack axes; for a slice along one other axis, decodes only the values in it."""
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)
    shape = _operand_shape(eqn)
    cut = [a for a, n in enumerate(shape) if (start[a], limit[a], strides[a]) != (0, n, 1)]
    stack = len(value.leaf.stack_shape)
    if value.only_cast and all(a < stack for a in cut):
        index = tuple(slice(start[a], limit[a], strides[a]) for a in range(stack))
        return [replace(value, leaf=value.leaf[index])]
    if value.only_cast and not stack and len(cut) == 1:
        [a] = cut
        run = range(start[a], limit[a], strides[a])
        return [_take(eqn, value, jnp.arange(run.start, run.stop, run.step, dtype=jnp.int32), a)]
    return _keep(interpreter, site, eqn, value)


def _dynamic_slice(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, value: Any, *start) -> Sequence[Any]:
    """As `_slice`, with computed starts, which `dynamic_slice` clamps so that the slice is inside the array."""
    sizes, shape = eqn.params["slice_sizes"], _operand_shape(eqn)
    if not isinstance(value, Packed) or any(map(interpreter.is_lifted, start)) or not value.only_cast:
        return bind(eqn, interpreter.lower_all((value, *start)))
    cut = [a for a, n in enumerate(shape) if sizes[a] != n]
    stack = len(value.leaf.stack_shape)
    if all(a < stack for a in cut):

        def sliced(array) -> jax.Array:
            rest = array.ndim - stack
            zeros = [jnp.zeros((), start[0].dtype)] * rest
            return lax.dynamic_slice(array, [*start[:stack], *zeros], [*sizes[:stack], *array.shape[stack:]])

        return [replace(value, leaf=jax.tree.map(sliced, value.leaf))]
    if not stack and len(cut) == 1:
        [a] = cut
        first = jnp.clip(start[a], 0, shape[a] - sizes[a])
        return [_take(eqn, value, first + jnp.arange(sizes[a], dtype=first.dtype), a)]
    return bind(eqn, interpreter.lower_all((value, *start)))


def _take(eqn: core.JaxprEqn, value: Packed, index: jax.Array, axis: int) -> jax.Array:
    def taken(leaf, index) -> jax.Array:
        with jax.named_scope(f"decode {value.path}"):
            return value.finish(decode_take(leaf, index, axis))

    return _of_its_type(eqn, taken)(value.leaf, index)


def _of_its_type(eqn: core.JaxprEqn, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wraps a function in place of an equation: on a mesh with explicit axes its output has the equation's sharding."""

    def run(*args) -> Any:
        sharding = explicit_sharding(*jax.tree.leaves(args))
        aval: Any = eqn.outvars[0].aval
        return function(*args) if sharding is None else as_automatic(function, sharding.mesh, aval.sharding.spec)(*args)

    return run


def _gather(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, value: Any, indices) -> Sequence[Any]:
    """Decodes only what a look-up along one axis (`jnp.take`, `Embed`) reads; any other gather decodes the leaf."""
    axis = _taken_axis(eqn)
    if axis is None or not isinstance(value, Packed) or not value.only_cast or interpreter.is_lifted(indices):
        return bind(eqn, interpreter.lower_all((value, indices)))
    stack = len(value.leaf.stack_shape)
    if 0 < stack <= axis:
        return bind(eqn, interpreter.lower_all((value, indices)))
    return [_of_its_type(eqn, functools.partial(_looked_up, eqn, axis))(value, indices)]


def _looked_up(eqn: core.JaxprEqn, axis: int, value: Packed, indices: jax.Array) -> jax.Array:
    """Computes a gather that takes whole slices along an axis."""
    shape, params = _operand_shape(eqn), eqn.params
    lead = indices.shape[:-1]
    index = indices.reshape(math.prod(lead))
    inside = jnp.clip(index, 0, shape[axis] - 1)
    with jax.named_scope(f"decode {value.path}"):
        if value.leaf.stack_shape:  # whole slices: look up their codebooks and indices
            taken = decode(jax.tree.map(lambda a: jnp.take(a, inside, axis=axis), value.leaf))
        else:
            taken = decode_take(value.leaf, inside, axis)
        taken = jnp.moveaxis(value.finish(taken), axis, 0)
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = params["fill_value"]
        valid = (index == inside).reshape(-1, *(1,) * (taken.ndim - 1))
        taken = jnp.where(valid, taken, jnp.array(jnp.nan if fill is None else fill, taken.dtype))
    offset = params["dimension_numbers"].offset_dims
    batch = [d for d in range(len(lead) + len(offset)) if d not in offset]
    order = np.argsort([*batch, *offset])
    return taken.reshape(*lead, *taken.shape[1:]).transpose(order)


def _operand_shape(eqn: core.JaxprEqn) -> tuple[int, ...]:
    return eqn.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]


def _taken_axis(eqn: core.JaxprEqn) -> int | None:
    """Returns the axis along which a gather takes whole slices of length 1; None if it does anything else."""
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], _operand_shape(eqn)
    if len(numbers.start_index_map) != 1 or numbers.collapsed_slice_dims != numbers.start_index_map:
        return None
    [axis] = numbers.start_index_map
    whole = all(size == (1 if a == axis else n) for a, (size, n) in enumerate(zip(sizes, shape, strict=True)))
    return axis if whole and not numbers.operand_batching_dims else None


def _dot(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, left: Any, right: Any) -> Sequence[Any]:
    """Multiplies with the matrix as it is stored; a dot that is no such product decodes the leaf."""
    made = _product(eqn, left, right)
    return bind(eqn, interpreter.lower_all((left, right))) if made is None else [made]


def _product(eqn: core.JaxprEqn, left: Any, right: Any) -> jax.Array | None:
    """Computes a `dot_general` of one leaf and one array by `kernels.product`; None where that cannot be."""
    is_left = isinstance(left, Packed)
    value, other = (left, right) if is_left else (right, left)
    if isinstance(other, Packed) or value.leaf.stack_shape:
        return None
    arrays = [other, *jax.tree.leaves(value.leaf)]
    if not any(isinstance(a, jax.core.Tracer) for a in arrays):
        return None  # eagerly, each operation has the bits of the dense one
    if explicit_sharding(*arrays) is not None or any(varying_axes(jax.typeof(a)) for a in arrays):
        return None
    params, dtype = eqn.params, eqn.outvars[0].aval.dtype  # pyright: ignore[reportAttributeAccessIssue]
    floating = all(jnp.issubdtype(t, jnp.floating) for t in (jnp.result_type(other), value.leaf.dtype, dtype))
    if not floating or params.get("out_sharding") is not None or not _is_precision(params["precision"]):
        return None
    view = view_of(value.leaf, value.pending)
    found = view and contraction_of(value.leaf, view, np.shape(other), eqn, is_left)
    if found is None:
        return None
    casts = [e.params["new_dtype"] for e in value.pending if e.primitive.name == "convert_element_type"]
    leaf = held_by_jax(value.leaf)
    layout = matrix_layout(leaf)
    layout = replace(layout, casts=(*layout.casts, *map(np.dtype, casts)))
    kept = np.ndim(other) - len(params["dimension_numbers"][0][0])
    x = lax.transpose(jnp.asarray(other), found.order)
    made = product(
        x.reshape(*x.shape[:kept], -1), decoding_levels(leaf), leaf.packed, leaf.scale,
        layout=layout, over=found.over, precision=params["precision"], dtype=dtype, name=f"decode {value.path}",
    )  # fmt: skip
    return lax.transpose(made.reshape(found.shape), found.result)


def _is_precision(precision: Any) -> bool:
    """Returns whether it is one that holds for sums in float32."""
    given = precision if isinstance(precision, tuple) else (precision,)
    return all(each is None or isinstance(each, lax.Precision) for each in given)


def _loop(loop_bytes: int, interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands) -> Sequence[Any]:
    """Decodes before a loop the leaves that each of its steps would decode, up to `loop_bytes` in all."""
    constants = _loop_constants(eqn, len(operands))
    repeated = _decoded_inside(interpreter, site, eqn, operands)
    arrays = [x for x in operands if not interpreter.is_lifted(x)]
    operands = list(operands)
    for n in constants:
        x = operands[n]
        if isinstance(x, Packed) and x.path in repeated:
            size = x.leaf.size * np.dtype(x.leaf.dtype).itemsize
            if size <= loop_bytes:
                loop_bytes -= size
                operands[n] = interpreter.lower(x, arrays)
    if not any(map(interpreter.is_lifted, operands)):
        return bind(eqn, operands)
    return CONTROL_FLOW[site.primitive](interpreter, site, eqn, *operands)


def _loop_constants(eqn: core.JaxprEqn, count: int) -> range:
    """Returns the numbers of a loop's operands that are the same in every step."""
    if eqn.primitive.name == "scan":
        return range(scan_parts(eqn.params, count)[0])
    return range(eqn.params["cond_nconsts"] + eqn.params["body_nconsts"])


def _decoded_inside(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, operands: Sequence[Any]) -> set[str]:
    """Returns the paths of the leaves that the body of an equation decodes whole, found by tracing it."""
    paths = set()

    def note(value: Packed, others: Sequence[Any]) -> jax.Array:
        paths.add(value.path)
        return value.finish(jnp.zeros(value.leaf.shape, value.leaf.dtype))

    noting = Interpreter(interpreter.is_lifted, note, _RULES)
    jax.eval_shape(lambda: (CONTROL_FLOW[site.primitive](noting, site, eqn, *operands), None)[1])
    return paths


_RULES: dict[str, Rule] = {
    "convert_element_type": _keep,
    "transpose": _keep,
    "reshape": _keep,
    "broadcast_in_dim": _keep,
    "rev": _keep,
    "copy": _keep,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
}


def _interpreter(loop_bytes: int) -> Interpreter:
    loop = functools.partial(_loop, loop_bytes)
    return Interpreter(
        lambda x: isinstance(x, Packed), _lower, _RULES | {"dot_general": _dot, "scan": loop, "while": loop}
    )
