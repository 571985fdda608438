"""Depthwise convolutions in a form that is fast on CPUs."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from nuqjax._src.trace.interpret import Interpreter, bind

_MOST_TAPS = 256  # each is an operation to compile; up to 121 were measured (`experiments.speed.constants`)


def convolve(eqn: core.JaxprEqn, x: Any, kernel: Any) -> Any:
    """Computes a convolution; a depthwise one on a CPU becomes a sum of shifted products.

    XLA on CPUs runs grouped convolutions ten times slower than this. Only the order of the sums differs. Mapped over
    several kernels, they are convolved one after the other, as XLA would make a grouped convolution of them.
    """
    one = jax.custom_batching.custom_vmap(lambda x, kernel: convolved(eqn, x, kernel))

    @one.def_vmap
    def each(size: int, mapped: Sequence[bool], *operands: Any) -> tuple[Any, bool]:  # pyright: ignore[reportUnusedFunction]
        of = lambda n: (a[n] if is_mapped else a for a, is_mapped in zip(operands, mapped, strict=True))  # noqa: E731
        return jnp.stack([convolved(eqn, *of(n)) for n in range(size)]), True

    return one(x, kernel)


def convolved(eqn: core.JaxprEqn, x: Any, kernel: Any) -> Any:
    """Computes a convolution as `convolve` does, for a single kernel."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    channels, taps = kernel.shape[numbers.rhs_spec[0]], [kernel.shape[a] for a in numbers.rhs_spec[2:]]
    depthwise = params["feature_group_count"] == channels == x.shape[numbers.lhs_spec[1]] and channels > 1
    dilated = any(d != 1 for d in params["lhs_dilation"])
    plain = x.dtype == kernel.dtype == eqn.outvars[0].aval.dtype and not isinstance(x, np.ndarray)  # pyright: ignore[reportAttributeAccessIssue]
    if jax.default_backend() != "cpu" or not (depthwise and plain) or dilated or np.prod(taps) > _MOST_TAPS:
        return bind(eqn, [x, kernel])[0]
    x = x.transpose([numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]])
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((lo, hi, 0) for lo, hi in params["padding"]), (0, 0, 0)])
    kernel = kernel.transpose([*numbers.rhs_spec[2:], *numbers.rhs_spec[:2]]).reshape(-1, channels)
    lengths = [eqn.outvars[0].aval.shape[a] for a in numbers.out_spec[2:]]  # pyright: ignore[reportAttributeAccessIssue]
    result: Any = None
    for number, tap in enumerate(itertools.product(*map(range, taps))):
        starts = [t * d for t, d in zip(tap, params["rhs_dilation"], strict=True)]
        ends = [s + (n - 1) * w + 1 for s, n, w in zip(starts, lengths, params["window_strides"], strict=True)]
        part = lax.slice(x, [0, *starts, 0], [x.shape[0], *ends, channels], [1, *params["window_strides"], 1])
        product = part * lax.broadcast_in_dim(kernel[number], part.shape, (part.ndim - 1,))
        result = product if result is None else result + product
    places = [numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]]
    return result.transpose(np.argsort(places))


def with_fast_convolutions(
    jaxpr: core.ClosedJaxpr, arrays: Sequence[Any], convolve: Callable[..., Any] = convolve
) -> list[Any]:
    """Evaluates the function with its convolutions computed by `convolve`, and returns its outputs.

    With `convolved` in its place, which cannot be mapped over kernels, the outputs have gradients.
    """

    def rule(interpreter: Any, site: Any, eqn: core.JaxprEqn, *operands: Any) -> Any:
        if eqn.primitive.name == "conv_general_dilated":
            return [convolve(eqn, *operands)]
        return bind(eqn, operands)

    names = ("conv_general_dilated", "scan", "while", "cond", "checkpoint", "remat2", "custom_jvp_call")
    names = (*names, "custom_vjp_call", "custom_vjp_call_jaxpr")
    interpreter = Interpreter(lambda x: True, lambda value, others: value, dict.fromkeys(names, rule), rule)
    return interpreter.evaluate(jaxpr, arrays)
