"""Orders the decoding of layers: packed bytes are made to depend on the activation that their weight is used with.

Inside `jit` only data dependencies order the decoding of different layers, and XLA on CPU would decode every weight
first and hold them all.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir, partial_eval

from nuqjax._src.platform.meshes import as_automatic, explicit_sharding, typed_spec

_after_p = core.Primitive("after")


def after(packed: jax.Array, token: jax.Array) -> jax.Array:
    """Returns `packed`, made to depend on `token`, so that it is not used before `token` is computed."""
    token, sharding = lax.stop_gradient(token), explicit_sharding(packed, token)
    if sharding is None:
        return _after_p.bind(packed, token)
    return as_automatic(_after_p.bind, sharding.mesh, typed_spec(packed))(packed, token)


def _after_by_data(packed, token) -> Any:
    """Combines the bytes with a zero that XLA cannot simplify away, since a float times zero may be NaN."""
    first = lax.reshape(lax.slice(token, (0,) * token.ndim, (1,) * token.ndim), ())
    never = first.astype(jnp.float32) * 0 > 0
    return packed ^ never.astype(packed.dtype)


def _after_by_barrier(packed, token) -> Any:
    return lax.optimization_barrier((packed, token))[0]


def _batch_after(args, dims) -> tuple[Any, Any]:
    packed, token = args
    if dims[1] is not None:  # any one example serves: decoding must not be repeated for each
        token = lax.index_in_dim(token, 0, dims[1], keepdims=False)
    return _after_p.bind(packed, token), dims[0]


def _jvp_after(primals, tangents) -> tuple[Any, Any]:
    output = _after_p.bind(*primals)
    del tangents  # the bytes have no tangent, and that of the token is not used
    return output, ad.Zero.from_primal_value(output)  # pyright: ignore[reportAttributeAccessIssue]


_after_p.def_impl(lambda packed, token: packed)
_after_p.def_abstract_eval(lambda packed, token: packed)
batching.primitive_batchers[_after_p] = _batch_after
ad.primitive_jvps[_after_p] = _jvp_after
# `linear_transpose` treats all that depends on its input as linear in it, so the order of decoding is given up there.
partial_eval.custom_partial_eval_rules[_after_p] = lambda trace, packed, token: packed
mlir.register_lowering(_after_p, mlir.lower_fun(_after_by_barrier, multiple_results=False))
mlir.register_lowering(_after_p, mlir.lower_fun(_after_by_data, multiple_results=False), platform="cpu")


def token_of(others: Sequence[Any]) -> jax.Array | None:
    """Returns an operand whose value the decoding can wait for, or None."""
    for x in others:
        if (
            isinstance(x, jax.core.Tracer)
            and x.size
            and (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer))
        ):
            return x
    return None
