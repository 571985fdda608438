"""Turns a traced function into a graph with named sites, on which the fixed-point emulation is planned and run.

`build` re-runs the function's jaxpr with `Node`s in place of arrays. It inlines calls, unrolls scans, and joins a bias
to the dot or the convolution to which it is added. Every node is then either *exact*, so that its users take all its
bits, or *rounded* to its site's format.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import numpy as np
from jax.extend import core

from nuqjax._src.leaf.codebook_array import check_layout, is_codebook_array
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.trace import operations
from nuqjax._src.trace.interpret import Interpreter, Site, bind, inline
from nuqjax._src.trace.operations import LINEAR
from nuqjax._src.trace.traced import argument_name, trace

_SUMS = frozenset({"add", "sub", "neg", "reduce_sum", "reduce_window_sum", "cumsum"})
_PRODUCTS = frozenset({"mul", "div", "square", "integer_pow"})
_JOINS = frozenset({"select_n", "concatenate", "stack"})
# Their exact results need more bits than their operands, so they are rounded unless only operations follow that take
# all those bits (`_nodes_to_round`).
WIDENING = _SUMS | _PRODUCTS | _JOINS
# They select among their operand's words.
_REDUCTIONS = frozenset({"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"})
CHOOSING = _REDUCTIONS | {"max", "min", "clamp", "abs", "sign", "pad"}
# They move words without computing.
LOOKING_UP = frozenset({"gather", "dynamic_slice"})
MOVING = operations.MOVING | LOOKING_UP | {"index", "optimization_barrier", "split"}
# They compare or locate words; their results are not words.
TELLING = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "argmax", "argmin", "is_finite"})
EXACT = LINEAR | WIDENING | CHOOSING | MOVING | TELLING


@dataclass(frozen=True, eq=False)
class Node:
    """A value of the program.

    Attributes:
      op: the name of the primitive that computes it; or "input", "leaf", "constant".
      inputs: the nodes that it is computed from; for a dot or a convolution, two operands and possibly a bias.
      eqns: its equation; for a dot or a convolution with a bias, also that of the addition.
      shape: its shape.
      dtype: its dtype in the function.
      role: "parameter" where it depends on parameters (and constants) alone, "constant", or "activation".
      name: its name, unique among activations: the path of its leaf, or its site.
      value: the value of a constant.
      index: which of the equation's outputs it is; for an "index" node, the position along the first axis.
    """

    op: str
    inputs: tuple["Node", ...]
    eqns: tuple[core.JaxprEqn, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    role: str
    name: str
    value: Any = None
    index: int = 0

    @property
    def real(self) -> bool:
        """Whether its dtype in the function is floating."""
        return jax.numpy.issubdtype(self.dtype, jax.numpy.floating)

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of its equation."""
        return self.eqns[0].params if self.eqns else {}

    @property
    def subtracts_bias(self) -> bool:
        """Whether it is a dot or a convolution whose bias is subtracted."""
        return len(self.eqns) == 2 and self.eqns[1].primitive.name == "sub"

    def floating(self, *values: Any) -> Any:
        """Returns what the function computes from the inputs' values."""
        if self.op == "index":
            return values[0][self.index]
        if self.op == "stack" and not self.eqns:
            return jax.numpy.stack(values)
        if self.op == "reciprocal":
            return 1 / values[0]
        if self.op == "mul" and not self.eqns:
            return values[0] * values[1]
        result = bind(self.eqns[0], values[: len(self.eqns[0].invars)])[self.index]
        if len(self.eqns) == 2:
            [result] = bind(self.eqns[1], [result, values[-1]])
        return result


@dataclass(frozen=True)
class Program:
    """A function as a graph.

    Attributes:
      nodes: all nodes, each after its inputs.
      outputs: the nodes that the function returns.
      structure: the outputs' tree structure.
      arrays: the leaf or input node of every array argument.
      floats: the nodes without an exact rule, and those computed from them.
      rounded: the nodes whose words are rounded to the format of their site.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    structure: Any
    arrays: tuple[Node, ...]
    floats: frozenset[Node] = field(repr=False)
    rounded: frozenset[Node] = field(repr=False)


def build(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Program, list[Any]]:
    """Returns the program of `fn` for arguments of these shapes, and the arguments' arrays in its order.

    The first argument is the tree of parameters; a `CodebookArray` in any other argument is a parameter, too.

    Raises:
      ValueError: the function changes one of its arguments in place, or a compressed leaf's arrays break its layout.
    """
    for path, x in jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_codebook_array)[0]:
        if is_codebook_array(x):
            check_layout(x, argument_name(path))
    traced = trace(fn, args, kwargs, is_codebook_array, caller=_CALLER)
    for path, _ in traced.changed:
        raise ValueError(
            f"{_CALLER}: the function changes {argument_name(path)} in place, which raw integers cannot be written to: "
            "let it return the new value, or not change it (model.eval())"
        )
    recorder = _Builder()
    starts = []
    inputs = itertools.count()
    for path, x in traced.arrays:
        first = len(path) > 1 and path[:2] == _FIRST
        if first or is_codebook_array(x):
            name = path_name(path[2:]) if first else path_name(path)
            starts.append(recorder.node("leaf", (), (), x.shape, x.dtype, name or "parameter"))
        else:
            number = next(inputs)
            starts.append(recorder.node("input", (), (), x.shape, x.dtype, f"input{number or ''}"))
    with jax.ensure_compile_time_eval():  # computes what depends on constants alone
        outputs = _interpreter(recorder).evaluate(traced.jaxpr, starts)
        outputs = [recorder.lifted(x) for x in outputs]
    nodes, renamed = _with_biases(_reached(outputs, starts))
    outputs = tuple(renamed.get(node, node) for node in outputs)
    floats = _floats(nodes)
    program = Program(nodes, outputs, traced.outputs, tuple(starts), floats, _nodes_to_round(nodes, outputs, floats))
    return program, [x for _, x in traced.arrays]


_CALLER = "calibrate, emulate"
_FIRST = (jax.tree_util.SequenceKey(0), jax.tree_util.SequenceKey(0))


class _Builder:
    """Makes nodes with distinct names."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def node(self, op, inputs, eqns, shape, dtype, name, value=None, index=0) -> Node:
        """Returns a node with the role that follows from its inputs; an activation gets a name of its own."""
        starts = {"leaf": "parameter", "constant": "constant", "input": "activation"}
        role = starts.get(op) or operations.role_of(node.role for node in inputs)
        if role == "activation":
            number = self.names.get(name, 0)
            self.names[name] = number + 1
            name = f"{name}#{number}" if number else name
        return Node(op, tuple(inputs), tuple(eqns), tuple(shape), np.dtype(dtype), role, name, value, index)

    def lifted(self, x: Any) -> Node:
        """Returns the node of a constant, and a node unchanged."""
        if isinstance(x, Node):
            return x
        value = np.asarray(x)
        return self.node("constant", (), (), value.shape, value.dtype, "constant", value)

    def record(self, interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands) -> list[Node]:
        """The default rule: returns a node for each output of the equation."""
        inputs = [self.lifted(x) for x in operands]
        name = f"{site.scope}:{site.primitive}" if site.scope else site.primitive
        if site.primitive == "div" and inputs[0].role == "activation" and inputs[1].role != "activation":
            divisor = inputs[1]
            if inputs[0].real and (divisor.role == "parameter" or whole_numbers(divisor.value) is None):
                return [self._multiplied(inputs[0], divisor, eqn, name)]
        if site.primitive in LINEAR or site.primitive in LOOKING_UP:
            name = next((_leaf_of(n) for n in reversed(inputs) if _leaf_of(n)), name)
        return [
            self.node(site.primitive, inputs, (eqn,), var.aval.shape, var.aval.dtype, name, index=number)  # pyright: ignore[reportAttributeAccessIssue]
            for number, var in enumerate(eqn.outvars)
        ]

    def _multiplied(self, x: Node, divisor: Node, eqn: core.JaxprEqn, name: str) -> Node:
        """Returns a division by other than whole numbers as a multiplication by the reciprocal, as in hardware."""
        inverse = self.node("reciprocal", (divisor,), (), divisor.shape, divisor.dtype, f"{name}:reciprocal")
        if divisor.role == "constant":
            inverse = self.lifted((1 / np.asarray(divisor.value, np.float64)).astype(divisor.dtype))
        aval: Any = eqn.outvars[0].aval
        return self.node("mul", (x, inverse), (), aval.shape, aval.dtype, name)

    def unroll(self, interpreter: Interpreter, site: Site, eqn: core.JaxprEqn, *operands) -> list[Any]:
        """The rule of `scan`: unrolls it, so that every step has its own sites and formats."""
        scope = site.scope or "scan"

        def stack(slices: list[Any], aval: Any) -> Node:
            return self.node("stack", [self.lifted(x) for x in slices], (), aval.shape, aval.dtype, f"{scope}:stack")

        return operations.unroll(interpreter, site, eqn, operands, self._index, stack)

    def _index(self, x: Any, step: int) -> Node:
        node = self.lifted(x)
        if node.op == "constant":
            return self.lifted(node.value[step])
        return self.node("index", (node,), (), node.shape[1:], node.dtype, f"{node.name}[{step}]", index=step)


def _leaf_of(node: Node) -> str:
    """Returns the name of the leaf that moves alone turn into this parameter; "" if there is none."""
    while node.op in MOVING and node.role == "parameter":
        if node.op == "index":
            inner = _leaf_of(node.inputs[0])
            return inner and f"{inner}[{node.index}]"
        node = node.inputs[0]
    return node.name if node.op == "leaf" else ""


def _interpreter(recorder: _Builder) -> Interpreter:
    def lower(value, others) -> NoReturn:
        raise AssertionError("a program's values are not lowered")

    rules = dict.fromkeys(operations.DERIVED, inline)
    return Interpreter(
        is_lifted=lambda x: isinstance(x, Node),
        lower=lower,
        rules=rules | {"scan": recorder.unroll, "while": recorder.record, "cond": recorder.record},
        default=recorder.record,
    )


def _reached(outputs: Sequence[Node], starts: Sequence[Node]) -> list[Node]:
    """Returns `starts` and the nodes that the outputs depend on, each after its inputs."""
    order: dict[Node, None] = dict.fromkeys(starts)
    stack = [*reversed(outputs)]
    while stack:
        node = stack[-1]
        missing = [n for n in node.inputs if n not in order]
        if node in order or not missing:
            order[node] = None
            stack.pop()
        else:
            stack.extend(reversed(missing))
    return list(order)


def consumers(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """Returns for each node the nodes that use it, one entry for each use."""
    found: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for taken in node.inputs:
            found[taken].append(node)
    return found


def _with_biases(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], dict[Node, Node]]:
    """Joins each bias to its dot or convolution where that has no other use; returns the new nodes, and new by old."""
    uses, new, kept = consumers(nodes), dict[Node, Node](), []
    dropped = set()
    for node in nodes:
        inputs = tuple(new[n] for n in node.inputs)
        accumulator = _accumulator(node, uses)
        if accumulator is not None:
            before = new[accumulator]
            bias = inputs[1 - node.inputs.index(accumulator)]
            dropped.add(before)
            made = Node(
                before.op,
                (*before.inputs, bias),
                (*before.eqns, *node.eqns),
                node.shape,
                node.dtype,
                node.role,
                before.name,
            )
        elif inputs == node.inputs:
            made = node
        else:
            made = Node(
                node.op, inputs, node.eqns, node.shape, node.dtype, node.role, node.name, node.value, node.index
            )
        new[node] = made
        kept.append(made)
    return tuple(n for n in kept if n not in dropped), new


def _accumulator(node: Node, uses: Mapping[Node, Sequence[Node]]) -> Node | None:
    """Returns the dot or convolution to which a node adds a bias, or None."""
    if node.op not in ("add", "sub") or node.role != "activation":
        return None
    for mine, other in (node.inputs, node.inputs[::-1]):
        if mine.op in LINEAR and mine.role == "activation" and len(uses[mine]) == 1 and other.role != "activation":
            return mine if node.op == "add" or mine is node.inputs[0] else None
    return None


def _floats(nodes: Sequence[Node]) -> frozenset[Node]:
    """Returns the nodes without an exact rule and those computed from them, up to the next dot or convolution."""
    floats: set[Node] = set()
    for node in nodes:
        acts = [n for n in node.inputs if n.role == "activation"]
        if node.role != "activation" or (not any(n.real for n in acts) and not node.real) or not acts:
            continue  # parameters, inputs, and whole numbers computed from whole numbers
        if not _has_rule(node) or (node.op not in LINEAR and any(n in floats for n in acts)):
            floats.add(node)
    return frozenset(floats)


def _has_rule(node: Node) -> bool:
    """Returns whether an exact rule computes the node."""
    roles = [n.role for n in node.inputs]
    params = node.params
    match node.op:
        case "conv_general_dilated":
            return params["batch_group_count"] == 1
        case "div":
            return roles[1] != "activation"
        case "integer_pow":
            return params["y"] in (1, 2, 3, 4)
        case "convert_element_type":
            return node.real  # a real value converted to an integer is not a word
        case "lt" | "le" | "gt" | "ge" | "eq" | "ne" | "max" | "min" | "pad" | "clamp":
            return "parameter" not in roles
        case "select_n":
            return not node.inputs[0].real
    return node.op in EXACT


def _nodes_to_round(nodes: Sequence[Node], outputs: Sequence[Node], floats: frozenset[Node]) -> frozenset[Node]:
    """Returns the nodes to round: inputs, dots, convolutions, divisions, and wide nodes whose bits not all users take.

    A float node is rounded, too, where a dot or a convolution uses it.
    """
    uses = consumers(nodes)
    known: dict[tuple[Node, str], bool] = {}

    def absorbed(node: Node, made_by: str) -> bool:
        """Returns whether all users take all bits of a node's words, which `made_by` computed and moves passed on."""
        if (node, made_by) not in known:
            takers = uses[node]
            taken = bool(takers) and node not in outputs and all(absorbs(t, made_by) for t in takers)
            known[node, made_by] = taken
        return known[node, made_by]

    def absorbs(taker: Node, made_by: str) -> bool:
        if taker in floats:
            return False
        if taker.op in MOVING - LOOKING_UP:
            return absorbed(taker, made_by)
        match taker.op:
            case "mul":
                return made_by in _SUMS and any(n.role == "constant" for n in taker.inputs)
            case "div":
                return made_by in _SUMS
            case "max" | "min":
                return joins(taker) and made_by == "mul"
        return taker.op in ("add", "sub", "neg", "select_n", "reduce_sum")

    def joins(node: Node) -> bool:
        """Returns whether a node is a maximum or minimum of two activations, which may have different formats."""
        return node.op in ("max", "min") and all(n.role == "activation" for n in node.inputs)

    def wide(node: Node) -> bool:
        return node.op in WIDENING or node.op in LINEAR or joins(node)

    found = set()
    for node in nodes:
        if node.role != "activation" or not node.real:
            continue
        if node in floats:
            if any(t.op in LINEAR and t not in floats for t in uses[node]):
                found.add(node)
        elif node.op == "input" or (
            wide(node) and (node.op in LINEAR or node.op == "div" or not absorbed(node, node.op))
        ):
            found.add(node)
    return frozenset(found)


def operands(node: Node) -> Iterator[tuple[str, Node]]:
    """Yields the parameters and constants that need a format of their own: `("weight", node)` or `("bias", node)`."""
    if node.role != "activation" or not node.real:
        return
    still = [n for n in node.inputs if n.role != "activation"]
    if node.op in LINEAR:
        for number, n in enumerate(node.inputs):
            if n.role != "activation":
                yield ("weight" if number < 2 else "bias"), n
    elif node.op == "mul" and still:
        yield "weight", still[0]
    elif node.op in LOOKING_UP and node.inputs[0].role != "activation":
        yield "weight", node.inputs[0]
    elif node.op in ("add", "sub") and still:
        yield "bias", still[0]
    elif node.op in ("select_n", "concatenate", "stack"):
        for n in still:
            if n.real:
                yield "bias", n


def whole_numbers(value: np.ndarray) -> np.ndarray | None:
    """Returns constants as int64 if they are positive whole numbers below 2^31, else None."""
    wide = np.asarray(value, np.float64)
    inside = (wide >= 1) & (wide < 2**31) & (wide == np.floor(wide))
    return wide.astype(np.int64) if inside.all() else None
