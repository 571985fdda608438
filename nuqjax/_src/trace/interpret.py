"""Evaluates a traced function with other values in place of its arrays.

A function is traced to a jaxpr, and the jaxpr is evaluated equation by equation (JAX's custom-interpreter pattern). An
equation without a *lifted* operand is bound unchanged, so inner `jit`s stay compiled and custom derivatives are kept.
An equation with a lifted operand goes to the rule for its primitive, or to the default.

The caller defines what a lifted value is and what the rules do with it, and gives both to `Interpreter`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
from jax.extend import core, source_info_util

from nuqjax._src.platform.compat import bind_primitive
from nuqjax._src.platform.types import PyTree
from nuqjax._src.trace.traced import varying, varying_axes


class Site(NamedTuple):
    """The place of an equation in the program.

    Attributes:
      scope: the names of the scopes around it (`jax.named_scope`; module paths in Flax linen), joined by "/".
      primitive: the name of its primitive.
      ordinal: the number of equations of the same scope and primitive before it.
    """

    scope: str
    primitive: str
    ordinal: int

    def __str__(self) -> str:
        return f"{self.scope or '(top)'}:{self.primitive}#{self.ordinal}"


Value: TypeAlias = Any
"""A value in a program that is evaluated: an array, or what the caller of `Interpreter` lifts in its place."""
Atom: TypeAlias = core.Var | core.Literal
"""An operand of an equation."""
Rule: TypeAlias = Callable[..., Sequence[Value]]
"""`rule(interpreter, site, eqn, *operands) -> outputs`, some of the operands lifted."""


@dataclass(frozen=True)
class Interpreter:
    """Evaluates jaxprs whose values may be lifted.

    Attributes:
      is_lifted: returns whether a value is lifted.
      lower: `lower(value, others) -> array`: converts a lifted value to an array, for an equation whose array operands
        are `others`.
      rules: by primitive name, the rule for an equation that has a lifted operand. Rules for control flow are built in.
      default: the rule for other primitives; None lowers the operands and binds the equation.
    """

    is_lifted: Callable[[Value], bool]
    lower: Callable[[Value, Sequence[Value]], jax.Array]
    rules: Mapping[str, Rule]
    default: Rule | None = None

    def evaluate(self, jaxpr: core.ClosedJaxpr, args: Sequence[Value], scope: str = "") -> list[Value]:
        """Evaluates a closed jaxpr and returns its outputs; `args` and outputs may be lifted."""
        inner = jaxpr.jaxpr
        env: dict[core.Var, Value] = dict(zip(inner.constvars, jaxpr.consts, strict=True))
        env.update(zip(inner.invars, args, strict=True))
        last_use = _last_uses(inner)
        seen: dict[tuple[str, str], int] = {}
        for number, eqn in enumerate(inner.eqns):
            operands = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
            here = "/".join(s for s in (scope, str(eqn.source_info.name_stack)) if s)
            name = eqn.primitive.name
            ordinal = seen.get((here, name), 0)
            seen[here, name] = ordinal + 1
            with as_written(eqn):
                outputs = self.step(Site(here, name, ordinal), eqn, operands)
            env.update(zip(eqn.outvars, outputs, strict=True))
            for var in last_use.get(number, ()):  # so that eager evaluation frees arrays after their last use
                del env[var]
        return [v.val if isinstance(v, core.Literal) else env[v] for v in inner.outvars]

    def step(self, site: Site, eqn: core.JaxprEqn, operands: Sequence[Value]) -> Sequence[Value]:
        """Evaluates one equation and returns its outputs; operands and outputs may be lifted."""
        if not any(map(self.is_lifted, operands)):
            return bind(eqn, operands)
        rule = self.rules.get(site.primitive) or CONTROL_FLOW.get(site.primitive) or self.default
        if rule is None:
            return bind(eqn, self.lower_all(operands))
        return rule(self, site, eqn, *operands)

    def lower_all(self, operands: Sequence[Value]) -> list[jax.Array]:
        """Returns the operands with every lifted one lowered."""
        arrays = [x for x in operands if not self.is_lifted(x)]
        return [self.lower(x, arrays) if self.is_lifted(x) else x for x in operands]


def _last_uses(jaxpr: core.Jaxpr) -> dict[int, list[core.Var]]:
    """Returns, by equation number, the variables that no later equation reads."""
    last = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for var in (*eqn.invars, *eqn.outvars):
            if not isinstance(var, core.Literal):
                last[var] = number
    kept = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    uses: dict[int, list[core.Var]] = {}
    for var, number in last.items():
        if var not in kept:
            uses.setdefault(number, []).append(var)
    return uses


def bind(eqn: core.JaxprEqn, operands: Sequence[Value]) -> list[jax.Array]:
    """Returns the equation's outputs for arrays, exactly as JAX computes them."""
    given = [varying(x, varying_axes(var.aval)) for x, var in zip(operands, eqn.invars, strict=True)]
    with eqn.ctx.manager:
        return bind_primitive(eqn.primitive, given, eqn.params)


def as_written(eqn: core.JaxprEqn) -> AbstractContextManager:
    """Returns a context in which bound primitives get the equation's scope, inside the current one, and source line."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=names)


def _closed(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def body_of(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns the jaxpr that a call evaluates; None if the equation is no call."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return next((_closed(eqn.params[name]) for name in names if name in eqn.params), None)


def inline(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands: Value) -> list[Value]:
    """Evaluates the body of a call without the call.

    A call with derivatives of its own (`DERIVED`) loses them, so this suits lifted values that have no derivatives.
    """
    body = body_of(eqn)
    assert body is not None
    return interpreter.evaluate(body, operands, site.scope)


def _remat(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands: Value) -> list[jax.Array]:
    """Evaluates the body under `jax.checkpoint` again, so that values lowered in it are lowered again for gradients."""
    jaxpr, params = _closed(eqn.params["jaxpr"]), eqn.params

    def inside(*operands: Value) -> list[jax.Array]:
        return interpreter.lower_all(interpreter.evaluate(jaxpr, operands, site.scope))

    return jax.checkpoint(inside, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)


def _custom_jvp(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands: Value) -> tuple[jax.Array, ...]:
    """Evaluates the body for the value; derivatives use the function's own rule, on lowered operands."""

    @jax.custom_jvp
    def call(operands: Value) -> tuple[jax.Array, ...]:
        inside = interpreter.evaluate(_closed(eqn.params["call_jaxpr"]), operands, site.scope)
        return tuple(interpreter.lower_all(inside))

    @call.defjvp
    def _(
        primals: tuple[Value, ...], tangents: tuple[Value, ...]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        return jax.jvp(lambda operands: tuple(bind(eqn, interpreter.lower_all(operands))), primals, tangents)

    return call(operands)


def _custom_vjp(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands: Value) -> tuple[jax.Array, ...]:
    """Evaluates the body for the value; derivatives use the function's own rule, on lowered operands."""

    @jax.custom_vjp
    def call(operands: Value) -> tuple[jax.Array, ...]:
        inside = interpreter.evaluate(_closed(eqn.params["call_jaxpr"]), operands, site.scope)
        return tuple(interpreter.lower_all(inside))

    def forward(operands: Value) -> tuple[tuple[jax.Array, ...], Callable]:
        return jax.vjp(lambda operands: tuple(bind(eqn, interpreter.lower_all(operands))), operands)

    def backward(vjp: Callable, cotangents: tuple[jax.Array, ...]) -> tuple[PyTree, ...]:
        return vjp(cotangents)

    call.defvjp(forward, backward)
    return call(operands)


def _cond(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, index: Value, *operands: Value) -> list[jax.Array]:
    """Evaluates each branch with the lifted operands; the index and the outputs are lowered."""

    def of(branch: core.ClosedJaxpr) -> Callable[..., tuple[jax.Array, ...]]:
        return lambda *operands: tuple(
            interpreter.lower_all(interpreter.evaluate(_closed(branch), operands, site.scope))
        )

    if interpreter.is_lifted(index):
        index = interpreter.lower(index, ())
    return lax.switch(index, [of(branch) for branch in eqn.params["branches"]], *operands)


def _while(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands: Value) -> tuple[jax.Array, ...]:
    """Evaluates a loop with constants that stay lifted; the carry is lowered."""
    params = eqn.params
    cond_jaxpr, body_jaxpr = _closed(params["cond_jaxpr"]), _closed(params["body_jaxpr"])
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = operands[:first], operands[first:second]
    carry = tuple(interpreter.lower_all(operands[second:]))

    def condition(carry: tuple[jax.Array, ...]) -> jax.Array:
        [going] = interpreter.lower_all(interpreter.evaluate(cond_jaxpr, (*cond_consts, *carry), site.scope))
        return going

    def body(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(interpreter.lower_all(interpreter.evaluate(body_jaxpr, (*body_consts, *carry), site.scope)))

    return lax.while_loop(condition, body, carry)


def _scan(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands: Value) -> tuple[jax.Array, ...]:
    """Evaluates a scan: constants stay lifted, lifted operands are sliced if they can be; the carry is lowered."""
    params, jaxpr = eqn.params, _closed(eqn.params["jaxpr"])
    first, second = scan_parts(params, len(operands))
    consts, xs = operands[:first], operands[second:]
    carry = tuple(interpreter.lower_all(operands[first:second]))
    xs = [x if not interpreter.is_lifted(x) or _can_scan(x) else interpreter.lower(x, ()) for x in xs]

    def body(
        carry: tuple[jax.Array, ...], xs: tuple[Value, ...]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        outputs = interpreter.lower_all(interpreter.evaluate(jaxpr, (*consts, *carry, *xs), site.scope))
        return tuple(outputs[: len(carry)]), tuple(outputs[len(carry) :])

    carry, ys = lax.scan(
        body, carry, tuple(xs), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return (*carry, *ys)


def scan_parts(params: Mapping[str, Any], count: int) -> tuple[int, int]:
    """Returns where a scan's carry and its scanned operands begin among its `count` operands."""
    if "ft_in" in params:  # jax 0.11 and newer
        consts, carry, _ = (list(part) for part in params["ft_in"].update(range(count)).unpack())
        return len(consts), len(consts) + len(carry)
    return params["num_consts"], params["num_consts"] + params["num_carry"]


def _can_scan(value: Value) -> bool:
    """Returns whether slicing a lifted value's arrays along their first axis slices the value."""
    return bool(getattr(value, "stacked", False))


CONTROL_FLOW: Mapping[str, Rule] = {
    "jit": inline,
    "pjit": inline,
    "closed_call": inline,
    "core_call": inline,
    "checkpoint": _remat,
    "remat2": _remat,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "custom_vjp_call_jaxpr": _custom_vjp,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
