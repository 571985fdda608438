"""Kinds of operations, by the names of their primitives, and what those who read whole programs do with them."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jax.core import AbstractValue
from jax.extend import core

from nuqjax._src.trace.interpret import Interpreter, Site, Value, scan_parts

LINEAR = frozenset({"dot_general", "conv_general_dilated"})
# The result has the values of the operand, up to the dtype.
PASSING = frozenset(
    {"convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint", "stop_gradient"}
)
# They move the values of their only operand: `move` says where each goes.
MOVING = PASSING | {"broadcast_in_dim", "reshape", "rev", "slice", "squeeze", "transpose"}
# Calls whose body may be differentiated in another way than its equations.
DERIVED = ("checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def role_of(roles: Iterable[str]) -> str:
    """Returns the role of what is computed from values of these roles.

    >>> role_of(["constant", "parameter"])
    'parameter'
    """
    given = set(roles)
    return next((role for role in ("activation", "parameter") if role in given), "constant")


def unroll(
    interpreter: Interpreter,
    site: Site,
    eqn: core.JaxprEqn,
    operands: Sequence[Value],
    index: Callable[[Value, int], Value],
    stack: Callable[[list[Value], AbstractValue], Value],
) -> list[Value]:
    """Evaluates a `scan` step by step, each under a scope of its own, `SCOPE[STEP]`.

    Args:
      interpreter: evaluates the body.
      site: the place of the scan.
      eqn: the scan.
      operands: its operands.
      index: `index(x, step)` returns the slice of a scanned operand that a step takes.
      stack: `stack(slices, aval)` returns an output from its slices in the order of the steps, and its type.
    """
    first, second = scan_parts(eqn.params, len(operands))
    consts, carry, xs = operands[:first], list(operands[first:second]), operands[second:]
    steps = range(eqn.params["length"])
    rows: dict[int, Sequence[Value]] = {}
    for step in steps[::-1] if eqn.params["reverse"] else steps:
        taken = [index(x, step) for x in xs]
        scope = f"{site.scope or 'scan'}[{step}]"
        outputs = interpreter.evaluate(eqn.params["jaxpr"], (*consts, *carry, *taken), scope)
        carry, rows[step] = outputs[: len(carry)], outputs[len(carry) :]
    stacked = eqn.outvars[len(carry) :]
    return [*carry, *(stack([rows[step][n] for step in steps], var.aval) for n, var in enumerate(stacked))]


def move(eqn: core.JaxprEqn, array: np.ndarray) -> np.ndarray:
    """Applies an equation of `MOVING` to an array, which may have length 1 along stretched axes."""
    params, aval = eqn.params, eqn.outvars[0].aval
    match eqn.primitive.name:
        case "broadcast_in_dim":
            shape = [1] * len(params["shape"])
            for axis, n in zip(params["broadcast_dimensions"], array.shape, strict=True):
                shape[axis] = n
            return array.reshape(shape)
        case "transpose":
            return array.transpose(params["permutation"])
        case "squeeze":
            return array.squeeze(params["dimensions"])
        case "reshape":
            return _full(eqn, array).reshape(aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
        case "slice":
            strides = params["strides"] or (1,) * array.ndim
            index = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
            return _full(eqn, array)[tuple(slice(*i) for i in index)]
        case "rev":
            return np.flip(_full(eqn, array), params["dimensions"])
    return array


def _full(eqn: core.JaxprEqn, array: np.ndarray) -> np.ndarray:
    return np.broadcast_to(array, eqn.invars[0].aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
