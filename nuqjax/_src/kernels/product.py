"""`product`: a product with a stored matrix as one operation of JAX, implemented as suits what it is compiled for.

It is linear in x, and its transpose in x is the product that sums over the other axis. So a gradient with respect to x
keeps the packed matrix and no decoded one, and decodes again.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from nuqjax._src.kernels.planes import Stored
from nuqjax._src.kernels.products import IMPLEMENTATIONS, Over
from nuqjax._src.leaf.matrix import Layout

_product_p = core.Primitive("codebook_product")

# A matrix of fewer values is decoded whole: it stays in the cache as well as a block does, and compiles faster.
_SMALL = 2**21


def product(
    x: jax.Array,
    levels: jax.Array,
    packed: jax.Array,
    scale: jax.Array | None = None,
    *,
    layout: Layout,
    over: Over = "inputs",
    precision: Any = None,
    dtype: Any = None,
    implementation: str | None = None,
    name: str = "decode",
) -> jax.Array:
    """Multiplies x with a stored matrix W `[O, I]`.

    Args:
      x: `[…, I]`, or `[…, O]` if sums are over outputs; floating.
      levels: `[R, K]` floating levels, in the dtype for the look-up.
      packed: `[O, B]` uint8.
      scale: `[O, G]`, or None.
      layout: how they stand for W.
      over: `"inputs"` for x Wᵀ `[…, O]`, `"outputs"` for x W `[…, I]`.
      precision: as of `jax.lax.dot_general`.
      dtype: dtype of the result; by default that of x and W together. Sums are taken in float32 at least.
      implementation: one of `products.IMPLEMENTATIONS`; by default what suits the platform that it is compiled for.
      name: the scope that decoding stands under in profiles.

    Returns:
      The product, up to the order of sums the same in every implementation.

    Raises:
      ValueError: there is no such implementation.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r}, but it must be None or one of {sorted(IMPLEMENTATIONS)}")
    arrays = (x, levels, packed) if scale is None else (x, levels, packed, scale)
    dtype = np.dtype(jnp.result_type(x.dtype, layout.dtype) if dtype is None else dtype)
    return _product_p.bind(
        *arrays, layout=layout, over=over, precision=precision, dtype=dtype, implementation=implementation, name=name
    )


def chosen(platform: str, devices: int, layout: Layout, outputs: int, batch: int) -> str:
    """Returns the implementation of a product of `batch` inputs, where it is compiled for so many devices together.

    >>> chosen("cpu", 1, Layout(4, 4096, "tensor", 0, ()), 4096, 1)
    'blocks'
    """
    if devices > 1:
        return "decode"  # the partitioner would gather what is cut into blocks
    if platform == "cpu":
        return "decode" if outputs * layout.inputs < _SMALL else "blocks"
    if platform == "tpu":  # planes of indices that cross no byte need no exchange between lanes
        return "planes" if layout.bits in (1, 2, 4) else "decode"
    return "reduce" if batch == 1 else "decode"


def _compute(
    *arrays: jax.Array, layout: Layout, over: Over, precision: Any, dtype: Any, implementation: str | None, name: str
) -> jax.Array:
    x, levels, packed, *scale = arrays
    stored = Stored(levels, packed, scale[0] if scale else None, name=name)
    return IMPLEMENTATIONS[implementation or "decode"](x, stored, layout, over, precision).astype(dtype)


def _by_decoding(params: Mapping[str, Any]) -> Callable[..., jax.Array]:
    """Returns the product in JAX's own operations."""
    return partial(_compute, **{**params, "implementation": "decode"})


def _abstract(x: Any, levels: Any, packed: Any, *scale: Any, layout: Layout, over: Over, dtype: Any, **_: Any) -> Any:
    columns = packed.shape[0] if over == "inputs" else layout.inputs
    return jax.core.ShapedArray((*x.shape[:-1], columns), dtype)


def _lower(platform: str, context: Any, *arrays: Any, implementation: str | None, **params: Any) -> Any:
    x, _, packed, *_ = context.avals_in
    if implementation is None:
        devices = getattr(context.module_context.axis_context, "num_devices", None) or 2
        implementation = chosen(platform, devices, params["layout"], packed.shape[0], math.prod(x.shape[:-1]))
    function = mlir.lower_fun(partial(_compute, implementation=implementation, **params), multiple_results=False)
    return function(context, *arrays)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    x, *stored = primals
    output, total = _product_p.bind(*primals, **params), None
    if not isinstance(tangents[0], ad.Zero):
        total = _product_p.bind(tangents[0], *stored, **params)
    if not all(isinstance(t, ad.Zero) for t in tangents[1:]):
        floating = [n for n, a in enumerate(stored) if jnp.issubdtype(a.dtype, jnp.floating)]

        def of_matrix(*arrays: jax.Array) -> jax.Array:
            given = list(stored)
            for n, array in zip(floating, arrays, strict=True):
                given[n] = array
            return _by_decoding(params)(x, *given)

        given = [ad.instantiate_zeros(tangents[1 + n]) for n in floating]
        part = jax.jvp(of_matrix, [stored[n] for n in floating], given)[1]
        total = part if total is None else total + part
    if total is None:
        total = ad.Zero.from_primal_value(output)  # pyright: ignore[reportAttributeAccessIssue]
    return output, total


def _transpose(cotangent: Any, *arrays: Any, over: Over, dtype: Any, **params: Any) -> list[Any]:
    linear = [n for n, array in enumerate(arrays) if ad.is_undefined_primal(array)]
    made: list[Any] = [None] * len(arrays)
    if isinstance(cotangent, ad.Zero):
        for n in linear:
            made[n] = ad.Zero(arrays[n].aval)
    elif linear == [0]:
        other: Over = "outputs" if over == "inputs" else "inputs"
        of_x = np.dtype(arrays[0].aval.dtype)
        made[0] = _product_p.bind(cotangent, *arrays[1:], over=other, dtype=of_x, **params)
    else:

        def of_linear(*given: jax.Array) -> jax.Array:
            filled = dict(zip(linear, given, strict=True))
            whole = [filled.get(n, array) for n, array in enumerate(arrays)]
            return _by_decoding(params | {"over": over, "dtype": dtype})(*whole)

        parts = jax.linear_transpose(of_linear, *(arrays[n].aval for n in linear))(cotangent)
        for n, part in zip(linear, parts, strict=True):
            made[n] = part
    return made


def _batch(arrays: Any, dims: Any, **params: Any) -> tuple[Any, int]:
    x, *stored = arrays
    if all(d is None for d in dims[1:]):
        return _product_p.bind(jnp.moveaxis(x, dims[0], 0), *stored, **params), 0
    return jax.vmap(_by_decoding(params), in_axes=dims)(*arrays), 0


_product_p.def_impl(lambda *arrays, **params: jax.jit(partial(_product_p.bind, **params))(*arrays))
_product_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_product_p] = _jvp
ad.primitive_transposes[_product_p] = _transpose
batching.primitive_batchers[_product_p] = _batch
for _platform in ("cpu", "tpu", "cuda", "rocm"):
    mlir.register_lowering(_product_p, partial(_lower, _platform), platform=_platform)
