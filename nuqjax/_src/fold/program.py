"""Reads a function as a flat list of equations between parameters and activations, for `nuqjax.fold_batch_norm`."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core, source_info_util

from nuqjax._src.trace.interpret import Interpreter, Site, bind, body_of, inline, scan_parts
from nuqjax._src.trace.operations import DERIVED, LINEAR, MOVING, PASSING, move, role_of, unroll

SCALING = frozenset({"mul", "div"})
ELEMENTWISE = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "pow": np.power,
    "neg": np.negative,
    "abs": np.abs,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "square": np.square,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}

# ---------------------------------------------------------------------------------------------------------------------
# Calls are inlined, so that all equations are in one list.


def flatten(jaxpr: core.ClosedJaxpr, unroll: bool = False) -> core.ClosedJaxpr:
    """Returns the same function without calls around its dots and convolutions.

    Args:
      jaxpr: the function to flatten.
      unroll: whether a `scan` with a dot or a convolution in its body is unrolled, too.
    """
    interpreter = Interpreter(
        is_lifted=lambda x: True,
        lower=lambda value, others: value,
        rules=dict.fromkeys(DERIVED, _enter) | {"scan": _unroll if unroll else _keep, "while": _keep, "cond": _keep},
        default=_keep,
    )
    return jax.make_jaxpr(lambda *args: interpreter.evaluate(jaxpr, args))(
        *(
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
            for aval in jaxpr.in_avals
        )
    )


def bind_in(scope: str, eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """Binds an equation under the names of a scope, and returns its outputs."""
    with scoped(scope):
        return bind(eqn, operands)


def scoped(scope: str) -> AbstractContextManager[Any]:
    """Returns a context in which equations are traced under the names of a scope."""
    return jax.named_scope(scope) if scope else nullcontext()


def _keep(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands) -> Sequence[Any]:
    names = source_info_util.new_name_stack(site.scope)  # these end in the equation's own names, and replace them
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names):
        return bind(eqn, operands)


def _enter(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands) -> Sequence[Any]:
    """Inlines a call with a dot or a convolution inside; keeps any other call, with its own derivative."""
    return (inline if _has_linear(eqn) else _keep)(interpreter, site, eqn, *operands)


def _unroll(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands) -> Sequence[Any]:
    """Unrolls a loop with a dot or a convolution in its body; keeps any other."""
    if not _has_linear(eqn):
        return _keep(interpreter, site, eqn, *operands)
    return unroll(interpreter, site, eqn, operands, partial(lax.index_in_dim, keepdims=False), _stacked)


def _stacked(slices: list[Any], aval: Any) -> jax.Array:
    return jnp.stack(slices) if slices else jnp.zeros(aval.shape, aval.dtype)


def _has_linear(eqn: core.JaxprEqn) -> bool:
    return eqn.primitive.name in LINEAR or any(
        _has_linear(inner) for body, _ in _bodies(eqn) for inner in body.jaxpr.eqns
    )


def _bodies(eqn: core.JaxprEqn) -> Iterator[tuple[core.ClosedJaxpr, Sequence[Any]]]:
    """Yields the jaxprs inside an equation, and the arguments of each; None stands for the carry of a loop."""
    given: list[Any] = list(eqn.invars)
    match eqn.primitive.name:
        case "scan":
            first, second = scan_parts(eqn.params, len(given))
            yield eqn.params["jaxpr"], [*given[:first], *[None] * (second - first), *given[second:]]
        case "while":
            first = eqn.params["cond_nconsts"]
            second = first + eqn.params["body_nconsts"]
            yield eqn.params["body_jaxpr"], [*given[first:second], *[None] * (len(given) - second)]
        case "cond":
            for branch in eqn.params["branches"]:
                yield branch, given[1:]
        case _:
            body = body_of(eqn)
            if body is not None:
                yield body, given


# ---------------------------------------------------------------------------------------------------------------------
# The list of equations, and the role of each value.


class Step(NamedTuple):
    """An equation that an activation passes through: a move, or arithmetic with an operand that is not an activation.

    Attributes:
      number: the number of the equation.
      op: "move", "neg", "add", "sub", "mul", "div", or "from" (operand − activation).
      value: the activation.
      operand: the other operand; None for "move" and "neg".
    """

    number: int
    op: str
    value: Any
    operand: Any = None


@dataclass(frozen=True, eq=False)
class Flat:
    """A flat function whose inputs are known to be parameters or activations.

    Attributes:
      jaxpr: the function.
      roles: of every variable: "parameter" where it depends on parameters (and constants) alone, "constant", or
        "activation".
      leaves: the names of the variables that are leaves of the parameters.
      constants: the values of the variables that are constants.
      makers: for every other variable, the number of the equation that computes it.
      takers: for every variable, the numbers of the equations that use it, one entry for each use, without equations
        that no output depends on; the number of equations stands for an output.
      origins: for every variable, the leaves that it depends on.
      roots: the parameters computed from the square root (or another power) of a parameter.
    """

    jaxpr: core.ClosedJaxpr
    roles: dict[Any, str] = field(default_factory=dict)
    leaves: dict[Any, str] = field(default_factory=dict)
    constants: dict[Any, Any] = field(default_factory=dict)
    makers: dict[Any, int] = field(default_factory=dict)
    takers: dict[Any, list[int]] = field(default_factory=dict)
    origins: dict[Any, frozenset[Any]] = field(default_factory=dict)
    roots: set[Any] = field(default_factory=set)

    @property
    def eqns(self) -> Sequence[core.JaxprEqn]:
        """The equations, in order."""
        return self.jaxpr.jaxpr.eqns

    def role(self, atom: Any) -> str:
        """Returns the role of a variable or a literal."""
        return "constant" if isinstance(atom, core.Literal) else self.roles[atom]

    def made_by(self, atom: Any) -> core.JaxprEqn | None:
        """Returns the equation that computes a value; None for an input or a constant."""
        return None if isinstance(atom, core.Literal) or atom not in self.makers else self.eqns[self.makers[atom]]

    def scope(self, number: int) -> str:
        """Returns the names of the scopes around an equation."""
        return str(self.eqns[number].source_info.name_stack)

    def alone(self, var: Any) -> bool:
        """Returns whether a value has a single use, in an equation."""
        return len(self.takers.get(var, ())) == 1 and self.takers[var][0] < len(self.eqns)

    def leaves_of(self, atom: Any) -> frozenset[Any]:
        """Returns the leaves that a value depends on."""
        return frozenset() if atom is None or isinstance(atom, core.Literal) else self.origins[atom]

    def normalises(self, atom: Any) -> bool:
        """Returns whether an expression of parameters contains the square root of a parameter."""
        return not isinstance(atom, core.Literal) and atom in self.roots

    def step(self, number: int) -> Step | None:
        """Returns what an equation does to its single activation if it is a step of a chain, else None."""
        eqn, name = self.eqns[number], self.eqns[number].primitive.name
        acts = [v for v in eqn.invars if self.role(v) == "activation"]
        if len(acts) != 1 or len(eqn.outvars) != 1:
            return None
        [value], [out] = acts, eqn.outvars
        before: Any = value.aval
        after: Any = out.aval
        if not jnp.issubdtype(before.dtype, jnp.floating) or not jnp.issubdtype(after.dtype, jnp.floating):
            return None
        if name in MOVING - {"slice", "rev"}:
            return Step(number, "move", value) if math.prod(before.shape) == math.prod(after.shape) else None
        if before.shape != after.shape:
            return None
        if name == "neg":
            return Step(number, "neg", value)
        if name not in ("add", "sub", "mul", "div"):
            return None
        operand = eqn.invars[1] if eqn.invars[0] is value else eqn.invars[0]
        if operand is eqn.invars[0] and name in ("sub", "div"):
            return Step(number, "from", value, operand) if name == "sub" else None
        return Step(number, name, value, operand)

    def root(self, step: Step) -> Any:
        """Returns the value where the chain of a step begins: only steps lead from there to this step."""
        var = step.value
        while self.alone(var) and var in self.makers:
            before = self.step(self.makers[var])
            if before is None:
                break
            var = before.value
        return var

    def chain(self, root: Any) -> list[Step]:
        """Returns the steps that follow a value, each the only use of the one before."""
        steps, var = [], root
        while self.alone(var):
            step = self.step(self.takers[var][0])
            if step is None:
                break
            steps.append(step)
            [var] = self.eqns[step.number].outvars
        return steps

    def live(self, passed: Mapping[int, Any]) -> frozenset[int]:
        """Returns the equations that the outputs depend on, if those in `passed` only pass on the operand in it."""
        needed = {v for v in self.jaxpr.jaxpr.outvars if not isinstance(v, core.Literal)}
        found = set()
        for number in range(len(self.eqns))[::-1]:
            eqn = self.eqns[number]
            if eqn.effects or not needed.isdisjoint(eqn.outvars):
                found.add(number)
                taken = [passed[number]] if number in passed else eqn.invars
                needed.update(v for v in taken if not isinstance(v, core.Literal))
        return frozenset(found)

    def users(self, leaf: Any, passed: Mapping[int, Any], live: frozenset[int]) -> set[int]:
        """Returns the equations of `live(passed)`, and the outputs, that a leaf reaches through moves alone."""
        found, stack = set(), [leaf]
        while stack:
            for number in self.takers.get(stack.pop(), ()):
                if number == len(self.eqns):
                    found.add(number)
                elif number in live and number not in passed:
                    eqn = self.eqns[number]
                    if eqn.primitive.name in MOVING:
                        stack += eqn.outvars
                    else:
                        found.add(number)
        return found


def flat(jaxpr: core.ClosedJaxpr, roles: Sequence[str], names: Sequence[str]) -> Flat:
    """Gives every variable of a flat jaxpr its role.

    Args:
      jaxpr: the function, from `flatten`.
      roles: the roles of its inputs.
      names: the names of its inputs; only those of parameters are used.
    """
    inner = jaxpr.jaxpr
    made = Flat(jaxpr)
    for var, role, name in zip(inner.invars, roles, names, strict=True):
        made.roles[var], made.origins[var] = role, frozenset()
        if role == "parameter":
            made.leaves[var], made.origins[var] = name, frozenset({var})
    for var, value in zip(inner.constvars, jaxpr.consts, strict=True):
        made.roles[var], made.constants[var], made.origins[var] = "constant", value, frozenset()
    for number, eqn in enumerate(inner.eqns):
        role = role_of(map(made.role, eqn.invars))
        made.roles.update(dict.fromkeys(eqn.outvars, role))
        made.makers.update(dict.fromkeys(eqn.outvars, number))
        origins = frozenset(itertools.chain.from_iterable(map(made.leaves_of, eqn.invars)))
        made.origins.update(dict.fromkeys(eqn.outvars, origins if role == "parameter" else frozenset()))
        takes_root = eqn.primitive.name in ("rsqrt", "sqrt", "pow") and made.role(eqn.invars[0]) == "parameter"
        if role == "parameter" and (takes_root or any(map(made.normalises, eqn.invars))):
            made.roots.update(eqn.outvars)
    live = made.live({})
    for number, eqn in enumerate(inner.eqns):
        for var in eqn.invars if number in live else ():
            if not isinstance(var, core.Literal):
                made.takers.setdefault(var, []).append(number)
    for var in inner.outvars:
        if not isinstance(var, core.Literal):
            made.takers.setdefault(var, []).append(len(inner.eqns))
    return made


def inner_batch_norms(program: Flat) -> Iterator[tuple[int, str]]:
    """Yields the loops and branches with a batch-norm in their body: number, and the batch-norm's scope inside."""
    for number, eqn in enumerate(program.eqns):
        if eqn.primitive.name not in ("scan", "while", "cond"):
            continue
        for body, given in _bodies(eqn):
            roles = ["activation" if v is None else program.role(v) for v in given]
            inside = flat(flatten(body), roles, [""] * len(roles))
            for n in range(len(inside.eqns)):
                step = inside.step(n)
                if step and step.op in SCALING and inside.normalises(step.operand):
                    yield number, inside.scope(n)
            for _, scope in inner_batch_norms(inside):
                yield number, scope


# ---------------------------------------------------------------------------------------------------------------------
# Values of expressions of parameters.


class Values:
    """The values of expressions of parameters and constants, in float64.

    A value has its variable's axes, but length 1 along those that `broadcast_in_dim` stretched.
    """

    def __init__(self, program: Flat, leaves: Mapping[Any, np.ndarray]) -> None:
        self.program = program
        self.known = dict(leaves)

    def of(self, atom: Any) -> np.ndarray:
        """Returns the value of a variable or a literal."""
        if isinstance(atom, core.Literal):
            return wide(atom.val)
        if atom not in self.known:
            eqn = self.program.made_by(atom)
            if eqn is None:
                self.known[atom] = wide(self.program.constants[atom])
            else:
                self.known.update(zip(eqn.outvars, self._outputs(eqn), strict=True))
        return self.known[atom]

    def _outputs(self, eqn: core.JaxprEqn) -> Sequence[np.ndarray]:
        operands = [self.of(v) for v in eqn.invars]
        name, out = eqn.primitive.name, eqn.outvars[0]
        real = jnp.issubdtype(out.aval.dtype, jnp.floating)  # pyright: ignore[reportAttributeAccessIssue]
        if name in MOVING and (real or name not in PASSING):
            moved = move(eqn, operands[0])
            return [moved.astype(np.float64) if real else moved]
        with np.errstate(all="ignore"):
            if real and name == "integer_pow":
                return [operands[0] ** float(eqn.params["y"])]
            if real and name in ELEMENTWISE:
                return [ELEMENTWISE[name](*operands)]
        avals: list[Any] = [v.aval for v in eqn.invars]
        full = [np.broadcast_to(x, a.shape).astype(a.dtype) for x, a in zip(operands, avals, strict=True)]
        inside = eqn.params.get(
            "call_jaxpr"
        )  # of a function with derivatives of its own, which jax 0.7 cannot bind here
        with jax.ensure_compile_time_eval():
            arrays = [jnp.asarray(x) for x in full]
            found = bind(eqn, arrays) if inside is None else core.jaxpr_as_fun(inside)(*arrays)
            return [wide(x) for x in found]


def wide(x: Any) -> np.ndarray:
    """Returns an array as NumPy's, floats as float64."""
    array = np.asarray(x)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array
