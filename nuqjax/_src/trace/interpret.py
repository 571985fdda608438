"""Evaluates a traced function with other values in place of its arrays.

A function is traced to a jaxpr, and the jaxpr is evaluated equation by equation (JAX's custom-interpreter pattern). An
equation without a *lifted* operand is bound unchanged, so inner `jit`s stay compiled and custom derivatives are kept.
An equation with a lifted operand goes to the rule for its primitive, or to the default.

The caller defines what a lifted value is and what the rules do with it, and gives both to `Interpreter`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend import core, source_info_util

from nuqjax._src.platform.compat import as_varying, bind_primitive
from nuqjax._src.platform.meshes import explicit_sharding


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


Rule = Callable[..., Sequence[Any]]
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

    is_lifted: Callable[[Any], bool]
    lower: Callable[[Any, Sequence[Any]], Any]
    rules: Mapping[str, Rule]
    default: Rule | None = None

    def evaluate(self, jaxpr: core.ClosedJaxpr, args: Sequence[Any], scope: str = "") -> list[Any]:
        """Evaluates a closed jaxpr and returns its outputs; `args` and outputs may be lifted."""
        inner = jaxpr.jaxpr
        env: dict[Any, Any] = dict(zip(inner.constvars, jaxpr.consts, strict=True))
        env.update(zip(inner.invars, args, strict=True))
        last_use = _last_uses(inner)
        seen: dict[tuple[str, str], int] = {}
        for number, eqn in enumerate(inner.eqns):
            operands = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
            here = "/".join(s for s in (scope, str(eqn.source_info.name_stack)) if s)
            name = eqn.primitive.name
            ordinal = seen.get((here, name), 0)
            seen[here, name] = ordinal + 1
            with _as_written(eqn):
                outputs = self._equation(Site(here, name, ordinal), eqn, operands)
            env.update(zip(eqn.outvars, outputs, strict=True))
            for var in last_use.get(number, ()):  # so that eager evaluation frees arrays after their last use
                del env[var]
        return [v.val if isinstance(v, core.Literal) else env[v] for v in inner.outvars]

    def _equation(self, site: Site, eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
        if not any(map(self.is_lifted, operands)):
            return bind(eqn, operands)
        rule = self.rules.get(site.primitive) or CONTROL_FLOW.get(site.primitive) or self.default
        if rule is None:
            return bind(eqn, self.lower_all(operands))
        return rule(self, site, eqn, *operands)

    def lower_all(self, operands: Sequence[Any]) -> list[Any]:
        """Returns the operands with every lifted one lowered."""
        arrays = [x for x in operands if not self.is_lifted(x)]
        return [self.lower(x, arrays) if self.is_lifted(x) else x for x in operands]


class Traced(NamedTuple):
    """A function traced to a jaxpr. The arrays among its arguments are the jaxpr's inputs; other arguments are static.

    Attributes:
      jaxpr: takes the arrays, in the order of `arrays`, and returns the outputs' leaves, then the arrays of `changed`.
      arrays: path and value of every argument that is an array or a leaf that stands for one.
      outputs: the structure of the outputs.
      changed: path and new value of every leaf of the arguments that the function replaced in place; `COMPUTED` in
        place of a new array. Empty if `trace` was given no `caller`.
    """

    jaxpr: core.ClosedJaxpr
    arrays: list[tuple[tuple[Any, ...], Any]]
    outputs: Any
    changed: list[tuple[tuple[Any, ...], Any]]


COMPUTED = object()
"""Stands in `Traced.changed` for an array, which is among the outputs."""


def trace(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_leaf: Callable[[Any], bool],
    sharding_of: Callable[[Any], Any] = lambda leaf: None,
    *,
    caller: str = "",
) -> Traced:
    """Traces `fn` on the dense shapes of its arguments.

    Args:
      fn: a function that JAX can trace.
      args: its positional arguments: pytrees of arrays, of leaves that stand for an array, and of anything else.
      kwargs: its keyword arguments, likewise.
      is_leaf: returns whether a value is a leaf that stands for an array; such leaves have a `shape` and a `dtype`.
      sharding_of: returns the sharding of such a leaf's array on a mesh with explicit axes; None for other leaves.
      caller: the name in messages of the public function that needs the changes to arguments; "" if none does.

    Raises:
      TypeError: `fn` is a model, not a function.
      ValueError: with a `caller`, the function changed more in place than the values of leaves: it added or removed
        a leaf, or changed a static field.
    """
    if callable(getattr(fn, "init", None)) and callable(getattr(fn, "apply", None)):
        raise TypeError(f"{caller}: {type(fn).__name__} is a model, but a function is wanted, such as model.apply")
    flat, structure = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_leaf)
    traced = [n for n, (_, x) in enumerate(flat) if is_leaf(x) or isinstance(x, _ARRAYS)]
    changed: list[tuple[tuple[Any, ...], Any]] = []

    def dense(*arrays):
        values = [x for _, x in flat]
        for n, array in zip(traced, arrays, strict=True):
            values[n] = array
        args, kwargs = structure.unflatten(values)
        before = jax.tree.structure((args, kwargs), is_leaf=is_leaf)
        outputs = fn(*args, **kwargs)
        computed = []
        if caller:
            for path, new in _changes((args, kwargs), before, [p for p, _ in flat], values, is_leaf, caller):
                is_array = isinstance(new, _ARRAYS)
                changed.append((path, COMPUTED if is_array else new))
                computed += [new] if is_array else []
        return outputs, computed

    def shape_of(x):
        varying = _varying_type(jax.tree.leaves(x))
        if is_leaf(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, **{"sharding": sharding_of(x)} | varying)
        aval = jax.typeof(x)
        placed: dict[str, Any] = {"sharding": None if explicit_sharding(x) is None else aval.sharding} | varying
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False), **placed)

    jaxpr, (shapes, _) = jax.make_jaxpr(dense, return_shape=True)(*(shape_of(flat[n][1]) for n in traced))
    return Traced(jaxpr, [flat[n] for n in traced], jax.tree.structure(shapes), changed)


_ARRAYS = jax.Array | np.ndarray | np.generic


def _changes(tree, before, paths, values, is_leaf, caller):
    """Yields path and new value of each leaf that the function replaced."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    missing = dict.fromkeys(paths)
    added = [path for path, _ in flat if path not in missing]
    for path, _ in flat:
        missing.pop(path, None)
    if added or missing:
        path, done = (added[0], "adds") if added else (next(iter(missing)), "takes away")
        raise ValueError(
            f"{caller}: the function {done} {argument_name(path)}, which cannot be written back: let it return the "
            "new state, or create its entry before the call"
        )
    if structure != before:
        number = next(
            n for n, (a, b) in enumerate(zip(_arguments(structure), _arguments(before), strict=True)) if a != b
        )
        raise ValueError(
            f"{caller}: the function changes a static field of its argument {number}, such as a module's mode, "
            "which cannot be written back: set it before the call (model.eval())"
        )
    for (path, new), old in zip(flat, values, strict=True):
        if new is not old and not (type(new) is type(old) and not isinstance(new, _ARRAYS) and new == old):
            yield path, new


def _arguments(structure) -> list[Any]:
    """Returns the structures of the arguments, positional ones first."""
    return [argument for group in structure.children() for argument in group.children()]


def write_changes(traced: Traced, args: Any, kwargs: Any, computed: Sequence[Any], caller: str) -> None:
    """Writes what a function changed in its arguments back into the arguments' containers.

    Args:
      traced: the traced function.
      args: the positional arguments that it was traced on.
      kwargs: the keyword arguments that it was traced on.
      computed: the arrays that the jaxpr returns after the outputs, in order.
      caller: as in `trace`.

    Raises:
      ValueError: a container does not accept a new value. The message names the argument.
    """
    arrays = iter(computed)
    for path, value in traced.changed:
        _write((args, kwargs), path, next(arrays) if value is COMPUTED else value, caller)


def _write(tree: Any, path: Sequence[Any], value: Any, caller: str) -> None:
    """Replaces the leaf at `path` by a value, in place, in the containers of the tree."""
    *parents, last = path
    try:
        for key in parents:
            tree = (
                getattr(tree, key.name) if hasattr(key, "name") else tree[key.key if hasattr(key, "key") else key.idx]
            )
        if not hasattr(last, "name"):
            tree[last.key if hasattr(last, "key") else last.idx] = value
        elif hasattr(tree, "set_value"):  # an NNX Variable
            tree.set_value(value)
        else:
            setattr(tree, last.name, value)
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{caller}: the function changes {argument_name(path)} in place, which cannot be written back "
            f"({error}); let it return the new value"
        ) from error


def argument_name(path: Sequence[Any]) -> str:
    """Returns the name of a leaf of the arguments for messages: `argument 0, cache/key`."""
    argument, *inside = path[1:]
    name = jax.tree_util.keystr((argument,), simple=True)
    return ", ".join(
        [f"argument {name}", *filter(None, [jax.tree_util.keystr(tuple(inside), simple=True, separator="/")])]
    )


def _last_uses(jaxpr: core.Jaxpr) -> dict[int, list[Any]]:
    """Returns, by equation number, the variables that no later equation reads."""
    last = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for var in (*eqn.invars, *eqn.outvars):
            if not isinstance(var, core.Literal):
                last[var] = number
    kept = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    uses: dict[int, list[Any]] = {}
    for var, number in last.items():
        if var not in kept:
            uses.setdefault(number, []).append(var)
    return uses


def bind(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """Returns the equation's outputs for arrays, exactly as JAX computes them."""
    operands = [_varying(x, _varying_axes(var.aval)) for x, var in zip(operands, eqn.invars, strict=True)]
    with eqn.ctx.manager:
        outputs = bind_primitive(eqn.primitive, operands, eqn.params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _as_written(eqn: core.JaxprEqn):
    """Returns a context in which bound primitives get the equation's scope, inside the current one, and source line."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=names)


def _varying_axes(aval: Any) -> frozenset[Any]:
    """Returns the axes of a `jax.shard_map` over which an array of this type varies."""
    return frozenset(getattr(getattr(aval, "manual_axis_type", None), "varying", ()) or getattr(aval, "vma", ()))


def _varying(x: Any, axes: frozenset[Any]) -> Any:
    """Returns `x` with a type that varies over these axes, too."""
    missing = axes - _varying_axes(jax.typeof(x))
    return as_varying(x, sorted(missing)) if missing else x


def _varying_type(arrays: Sequence[Any]) -> dict[str, Any]:
    """Returns the arguments of `jax.ShapeDtypeStruct` for an array that varies over the axes of all these arrays."""
    axes = frozenset().union(*(_varying_axes(jax.typeof(x)) for x in arrays))
    if not axes:
        return {}
    aval = jax.typeof(_varying(arrays[0], axes))
    if not hasattr(aval, "manual_axis_type"):
        return {"vma": aval.vma}
    sharding = jax.sharding.NamedSharding(aval.sharding.mesh, jax.sharding.PartitionSpec())
    return {"manual_axis_type": aval.manual_axis_type, "sharding": sharding}


def _closed(jaxpr: Any) -> core.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _jit(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands):
    return interpreter.evaluate(_closed(eqn.params["jaxpr"]), operands, site.scope)


def _call(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands):
    return interpreter.evaluate(_closed(eqn.params["call_jaxpr"]), operands, site.scope)


def inline(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands):
    """Evaluates the body of a call without the call: for lifted values that are not arrays and have no derivatives."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inside = next(eqn.params[name] for name in names if name in eqn.params)
    return interpreter.evaluate(_closed(inside), operands, site.scope)


def _remat(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands):
    """Evaluates the body under `jax.checkpoint` again, so that values lowered in it are lowered again for gradients."""
    jaxpr, params = _closed(eqn.params["jaxpr"]), eqn.params

    def inside(*operands):
        return interpreter.lower_all(interpreter.evaluate(jaxpr, operands, site.scope))

    return jax.checkpoint(inside, prevent_cse=params["prevent_cse"], policy=params["policy"])(*operands)


def _custom_jvp(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands):
    """Evaluates the body for the value; derivatives use the function's own rule, on lowered operands."""

    @jax.custom_jvp
    def call(operands):
        inside = interpreter.evaluate(_closed(eqn.params["call_jaxpr"]), operands, site.scope)
        return tuple(interpreter.lower_all(inside))

    @call.defjvp
    def _(primals, tangents):
        return jax.jvp(lambda operands: tuple(bind(eqn, interpreter.lower_all(operands))), primals, tangents)

    return call(operands)


def _custom_vjp(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands):
    """Evaluates the body for the value; derivatives use the function's own rule, on lowered operands."""

    @jax.custom_vjp
    def call(operands):
        inside = interpreter.evaluate(_closed(eqn.params["call_jaxpr"]), operands, site.scope)
        return tuple(interpreter.lower_all(inside))

    def forward(operands):
        return jax.vjp(lambda operands: tuple(bind(eqn, interpreter.lower_all(operands))), operands)

    def backward(vjp, cotangents):
        return vjp(cotangents)

    call.defvjp(forward, backward)
    return call(operands)


def _cond(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, index, *operands):
    """Evaluates each branch with the lifted operands; the index and the outputs are lowered."""

    def of(branch):
        return lambda *operands: tuple(
            interpreter.lower_all(interpreter.evaluate(_closed(branch), operands, site.scope))
        )

    if interpreter.is_lifted(index):
        index = interpreter.lower(index, ())
    return lax.switch(index, [of(branch) for branch in eqn.params["branches"]], *operands)


def _while(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands):
    """Evaluates a loop with constants that stay lifted; the carry is lowered."""
    params = eqn.params
    cond_jaxpr, body_jaxpr = _closed(params["cond_jaxpr"]), _closed(params["body_jaxpr"])
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts = operands[:first], operands[first:second]
    carry = tuple(interpreter.lower_all(operands[second:]))

    def condition(carry):
        [going] = interpreter.lower_all(interpreter.evaluate(cond_jaxpr, (*cond_consts, *carry), site.scope))
        return going

    def body(carry):
        return tuple(interpreter.lower_all(interpreter.evaluate(body_jaxpr, (*body_consts, *carry), site.scope)))

    return lax.while_loop(condition, body, carry)


def _scan(interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands):
    """Evaluates a scan: constants stay lifted, lifted operands are sliced if they can be; the carry is lowered."""
    params, jaxpr = eqn.params, _closed(eqn.params["jaxpr"])
    first, second = scan_parts(params, len(operands))
    consts, xs = operands[:first], operands[second:]
    carry = tuple(interpreter.lower_all(operands[first:second]))
    xs = [x if not interpreter.is_lifted(x) or _can_scan(x) else interpreter.lower(x, ()) for x in xs]

    def body(carry, xs):
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


def _can_scan(value: Any) -> bool:
    """Returns whether slicing a lifted value's arrays along their first axis slices the value."""
    return bool(getattr(value, "stacked", False))


CONTROL_FLOW: Mapping[str, Rule] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "checkpoint": _remat,
    "remat2": _remat,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "custom_vjp_call_jaxpr": _custom_vjp,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
