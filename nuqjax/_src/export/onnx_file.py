"""Exports a model with compressed weights as an ONNX file with packed weights, by `jax2onnx`, for non-JAX runtimes."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
from jax.extend.core import jaxpr_as_fun

from nuqjax._src.export.program import by_name, check_kept, checked_inputs
from nuqjax._src.leaf.codebook_array import decode, is_codebook_array, level_values, with_levels
from nuqjax._src.store.dtypes import DTYPES
from nuqjax._src.store.layout import LayoutBuilder
from nuqjax._src.store.target import replacing
from nuqjax._src.store.tree import tree_to_nodes
from nuqjax._src.trace.interpret import Interpreter, Site, bind


def export_onnx(fn: Callable[..., Any], cparams: Any, example_inputs: Any, path: str | os.PathLike[str]) -> None:
    """Exports `fn(decompress(cparams), *inputs)` as an ONNX file with packed weights, by the `jax2onnx` converter.

    The packed indices and codebooks are the file's initializers, with the names of `nuqjax.save`. The graph decodes
    them by shifts, masks and `Gather`; levels that are fixed-point words are written as floats. A runtime that folds
    constants, such as ONNX Runtime, decodes once when it loads the file and holds dense weights from then on.

    An operation works if the converter supports it and the runtime has a kernel for it. Tested are feed-forward
    networks in float32 with convolutions, dense layers, rectifiers, pools and element-wise operations. Results equal
    those of `apply(fn)` up to the order of sums.

    Args:
      fn: as in `export`.
      cparams: as in `export`.
      example_inputs: a tuple of arrays or `jax.ShapeDtypeStruct`, or a single one. Shapes are fixed. The file's inputs
        are named `input_0`, `input_1` …, its outputs `output_0` …
      path: the file to write, by convention `….onnx`; an existing file is replaced as a whole.

    Raises:
      ValueError: an input is not an array, or the program could not read the dtype of a leaf.
      NotImplementedError: the converter has no rule for an operation of `fn`.
      ImportError: `jax2onnx` is missing.
      OSError: the file cannot be written.

    >>> import jax.numpy as jnp, nuqjax
    >>> cparams = nuqjax.compress({"w": jnp.linspace(-1, 1, 512).reshape(16, 32)}, bits=4)
    >>> export_onnx(lambda params, x: x @ params["w"], cparams, jnp.ones((2, 16)), "model.onnx")  # doctest: +SKIP
    """
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
        import onnx  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("export_onnx needs jax2onnx: pip install 'nuqjax[onnx]'") from error
    inputs = checked_inputs(example_inputs)
    if not all(isinstance(x, jax.ShapeDtypeStruct) for x in inputs):
        raise ValueError("export_onnx: inputs are arrays, one or a tuple of them, not trees")
    cparams = jax.tree.map(_with_float_levels, cparams, is_leaf=is_codebook_array)
    tensors, rebuild = by_name(cparams)
    count = len(inputs)

    def dense(*arrays) -> list[Any]:
        tree = rebuild(dict(zip(tensors, arrays[count:], strict=True)))
        decoded = jax.tree.map(lambda x: decode(x) if is_codebook_array(x) else x, tree, is_leaf=is_codebook_array)
        arguments = decoded, *arrays[:count]
        before = jax.tree_util.tree_flatten_with_path(arguments)[0]
        outputs = fn(*arguments)
        check_kept(before, arguments, "export_onnx")
        return jax.tree.leaves(outputs)

    # The function is traced and rewritten here, so that the converter sees plain primitives: its own tracing replaces
    # functions of Flax by versions that do not accept all of their arguments.
    traced = jax.make_jaxpr(dense)(*inputs, *tensors.values())
    rewritten = jax.make_jaxpr(lambda *arrays: _POOLS.evaluate(traced, arrays))(*inputs, *tensors.values())
    names = [f"input_{number}" for number in range(count)]
    model = jax2onnx.to_onnx(
        jaxpr_as_fun(rewritten),
        inputs=[*inputs, *tensors.values()],
        input_names=[*names, *tensors],
        output_names=[f"output_{number}" for number in range(len(traced.out_avals))],
    )
    stored = _stored(cparams)
    graph = model.graph
    for value in [value for value in graph.input if value.name in tensors]:
        graph.initializer.append(onnx.numpy_helper.from_array(stored[value.name], value.name))
        graph.input.remove(value)
    onnx.checker.check_model(model)
    with replacing(path) as file:
        file.write(model.SerializeToString())


def _with_float_levels(leaf: Any) -> Any:
    """Returns the leaf with float levels instead of fixed-point words: the converter would decode words in float64."""
    fixed = is_codebook_array(leaf) and leaf.codebook_format
    return with_levels(leaf, level_values(leaf)) if fixed else leaf


def _stored(cparams: Any) -> dict[str, np.ndarray]:
    """Returns the tensors that `nuqjax.save` stores for a tree, by name."""
    nodes, named = tree_to_nodes(cparams)
    layout, found = LayoutBuilder(nodes), {}
    for path, leaf in named:
        for tensor in layout.add(path, leaf):
            data = b"".join(bytes(chunk) for chunk in tensor.chunks())
            found[tensor.name] = np.frombuffer(data, DTYPES[tensor.code]).reshape(tensor.shape)
    return found


def _pool(interpreter: Interpreter, site: Site, eqn: Any, operand: Any, *rest: Any) -> Sequence[Any]:
    """Rewrites a pool as one of an array with at most three axes, as runtimes require: merges the unpooled axes."""
    window = eqn.params["window_dimensions"]
    pooled = [a for a, n in enumerate(window) if n > 1]
    if rest or len(window) <= 3 or len(pooled) > 2:
        return bind(eqn, [operand, *rest])
    others = [a for a in range(len(window)) if a not in pooled]
    if any(eqn.params["window_strides"][a] > 1 or any(eqn.params["padding"][a]) for a in others):
        return bind(eqn, [operand])
    order = [*others, *pooled]
    moved = operand.transpose(order)
    flat = moved.reshape(-1, *moved.shape[len(others) :])
    params: dict[str, Any] = {name: (1, *(value[a] for a in pooled)) for name, value in eqn.params.items()}
    params["padding"] = ((0, 0), *params["padding"][1:])
    made = eqn.primitive.bind(flat, **params)
    return [made.reshape(*moved.shape[: len(others)], *made.shape[1:]).transpose(np.argsort(order))]


_POOLS = Interpreter(
    is_lifted=lambda x: isinstance(x, jax.core.Tracer),
    lower=lambda x, others: x,
    rules={"reduce_window_max": _pool, "reduce_window_sum": _pool},
)
