"""Finds the affine chains after a function's convolutions and dots, which `nuqjax.fold_batch_norm` folds.

They depend on shapes alone: a function has the same chains for all values.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from nuqjax._src.fold.program import SCALING, Flat, Step, Values
from nuqjax._src.trace.operations import LINEAR, MOVING, move


class Bias(NamedTuple):
    """The leaf that takes a chain's offset: a bias, or a mean that is subtracted.

    Attributes:
      number: the number of the addition that it enters.
      leaf: the variable of the leaf.
      path: the equations from the leaf to the addition's operand: moves, and additions of other parameters.
      negative: whether the leaf is subtracted.
    """

    number: int
    leaf: Any
    path: tuple[int, ...]
    negative: bool


@dataclass(frozen=True, eq=False)
class Chain:
    """Affine steps after a convolution or a dot: scale · accumulator + offset.

    Attributes:
      accumulator: the number of the convolution or dot.
      leaf: the variable of its kernel's leaf.
      path: the equations from the leaf to the kernel, all of them moves.
      kernel: the variable of the kernel.
      steps: the steps, without moves.
      axes: for every step, the kernel's axis for each axis of the activation; None where there is none.
      bias: the leaf for the offset; None where there is no offset.
    """

    accumulator: int
    leaf: Any
    path: tuple[int, ...]
    kernel: Any
    steps: tuple[Step, ...]
    axes: tuple[tuple[int | None, ...], ...]
    bias: Bias | None = None

    def of(self, number: int, array: np.ndarray) -> np.ndarray:
        """Returns an operand of step `number`, along the kernel's axes instead of the activation's."""
        axes = self.axes[[step.number for step in self.steps].index(number)]
        array = array.reshape((1,) * (len(axes) - array.ndim) + array.shape)
        kept = [axis for axis in axes if axis is not None]
        array = array.squeeze(tuple(a for a, axis in enumerate(axes) if axis is None))
        order = np.argsort(kept)
        absent = [a for a in range(len(self.kernel.aval.shape)) if a not in kept]
        return np.expand_dims(array.transpose(order), absent)

    def compose(self, values: Values) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scale and the offset along the kernel's axes, in float64."""
        scale: Any = np.float64(1)
        offset: Any = np.float64(0)  # without axes until something is added, so that it varies along no axis needlessly
        for step in self.steps:
            x = None if step.operand is None else self.of(step.number, values.of(step.operand))
            with np.errstate(all="ignore"):
                match step.op:
                    case "add":
                        offset = offset + x
                    case "sub":
                        offset = offset - x
                    case "from":
                        scale, offset = -scale, x - offset
                    case "neg":
                        scale, offset = -scale, -offset
                    case "mul":
                        scale, offset = scale * x, offset * x if offset.ndim else offset
                    case "div":
                        scale, offset = scale / x, offset / x if offset.ndim else offset
        return scale, offset


def passed(chains: Sequence[Chain]) -> dict[int, Any]:
    """Returns, by equation number, the operand that each step of the chains passes on."""
    return {step.number: step.value for chain in chains for step in chain.steps}


def positions(program: Flat, leaf: Any, path: Sequence[int]) -> np.ndarray:
    """Returns, for every entry at the end of a path of moves, its position in the leaf, in row-major order."""
    shape = leaf.aval.shape
    array = np.arange(math.prod(shape)).reshape(shape)
    for number in path:
        if program.eqns[number].primitive.name in MOVING:
            array = move(program.eqns[number], array)
    return array


class Refused(NamedTuple):
    """Steps that cannot be folded, and the reason."""

    steps: Sequence[Step]
    reason: str


def find(program: Flat, values: Values, skip: Any) -> tuple[list[Chain], list[Refused]]:
    """Returns the chains that can be folded, and the multiplications by parameters that cannot.

    Args:
      program: the function.
      values: its leaves' values; only their shapes matter.
      skip: `skip(names)` returns whether to leave a chain alone, from the names of its leaves and its scopes.
    """
    scalings: dict[Any, list[Step]] = {}
    for number in sorted(program.live({})):
        step = program.step(number)
        if step and step.op in SCALING and program.role(step.operand) == "parameter":
            scalings.setdefault(program.root(step), []).append(step)
    chains, refused = [], []
    for root, steps in scalings.items():
        chain, reason = _fit(program, values, root)
        kernel = [] if chain is None else [program.leaves[chain.leaf]]
        if skip([*kernel, *_names(program, program.chain(root) or steps)]):
            continue
        if chain is not None:
            chains.append(chain)
            steps = [step for step in steps if step not in chain.steps]
        if steps:
            refused.append(Refused(steps, reason))
    return _apart(program, values, chains, refused)


def _apart(
    program: Flat, values: Values, chains: list[Chain], refused: list[Refused]
) -> tuple[list[Chain], list[Refused]]:
    """Removes the chains whose leaves are also used elsewhere, and adds them to `refused`."""
    while True:
        good, ends, skipped = [], {chain.accumulator for chain in chains}, passed(chains)
        users = partial(program.users, passed=skipped, live=program.live(skipped))
        for chain in chains:
            if users(chain.leaf) <= ends:
                found = _with_bias(program, values, chain, users)
            else:
                found = f"its kernel {program.leaves[chain.leaf]!r} is used elsewhere, too"
            if isinstance(found, Chain):
                good.append(found)
            else:
                refused.append(Refused(chain.steps, found))
        if len(good) == len(chains):
            return good, refused
        chains = good


def _names(program: Flat, steps: Sequence[Step]) -> list[str]:
    """Returns the names of the leaves that steps use, and the scopes of the steps."""
    leaves = (program.leaves_of(step.operand) for step in steps if step.operand is not None)
    scopes = (program.scope(step.number) for step in steps if step.op != "move")
    named = sorted(program.leaves[leaf] for leaf in frozenset(itertools.chain.from_iterable(leaves)))
    return [*named, *dict.fromkeys(scope for scope in scopes if scope)]


def _fit(program: Flat, values: Values, root: Any) -> tuple[Chain | None, str]:
    """Returns the part of the chain after a value that can be folded, and why the rest cannot."""
    number = program.makers.get(root)
    if number is None:
        return None, "it is applied to the function's input"
    eqn = program.eqns[number]
    name = eqn.primitive.name
    where = f"{name} at {program.scope(number)!r}" if program.scope(number) else name
    if program.step(number):  # otherwise the chain would begin earlier
        return None, f"what {where} gives is used elsewhere, too"
    if name not in LINEAR:
        return None, f"it follows {where}, not a convolution or a dot"
    roles = [program.role(v) for v in eqn.invars]
    if sorted(roles) != ["activation", "parameter"] or (name != "dot_general" and roles[1] != "parameter"):
        return None, f"it follows {where}, whose kernel is not a parameter"
    side = roles.index("parameter")
    kernel = eqn.invars[side]
    path: list[int] = []
    leaf: Any = kernel
    while (maker := program.made_by(leaf)) is not None and maker.primitive.name in MOVING:
        path.append(program.makers[leaf])
        leaf = maker.invars[0]
    if leaf not in program.leaves or not jnp.issubdtype(leaf.aval.dtype, jnp.floating):
        names = ", ".join(sorted(repr(program.leaves[v]) for v in program.leaves_of(kernel)))
        return None, f"it follows {where}, whose kernel is computed from {names}, not moved alone"
    if not program.alone(root):
        return None, f"what {where} gives with the kernel {program.leaves[leaf]!r} is used elsewhere, too"
    steps: list[Step] = []
    layouts: list[tuple[int | None, ...]] = []
    layout: Sequence[int | None] | None = _channels(eqn, side)
    reason = ""
    for step in program.chain(root):
        if step.op == "move":
            layout = _moved(program.eqns[step.number], layout)
            if layout is None:
                reason = f"the channels of the kernel {program.leaves[leaf]!r} are reshaped before it"
                break
            continue
        shape = () if step.operand is None else values.of(step.operand).shape
        shape = (1,) * (len(layout) - len(shape)) + shape
        if any(n > 1 and axis is None for n, axis in zip(shape, layout, strict=True)):
            reason = f"it varies along more than the channels of the kernel {program.leaves[leaf]!r}"
            break
        steps.append(step)
        layouts.append(tuple(layout))
    while steps and (steps[-1].operand is None or program.role(steps[-1].operand) != "parameter"):
        del steps[-1], layouts[-1]  # trailing steps by constants alone are not part of a batch-norm
    if not any(step.op in SCALING and program.role(step.operand) == "parameter" for step in steps):
        return None, reason
    return Chain(number, leaf, tuple(path[::-1]), kernel, tuple(steps), tuple(layouts)), reason


def _channels(eqn: core.JaxprEqn, side: int) -> list[int | None]:
    """Returns the kernel's axis for every axis of a convolution or a dot; None where it is the activation's axis."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "conv_general_dilated":
        layout: list[int | None] = [None] * len(numbers.out_spec)
        layout[numbers.out_spec[1]] = numbers.rhs_spec[0]
        return layout
    free = []
    for n, (contracted, batch, v) in enumerate(zip(*numbers, eqn.invars, strict=True)):
        axes = [a for a in range(v.aval.ndim) if a not in contracted and a not in batch]  # pyright: ignore[reportAttributeAccessIssue]
        free += axes if n == side else [None] * len(axes)
    return [*numbers[1][side], *free]


def _moved(eqn: core.JaxprEqn, layout: Sequence[int | None]) -> list[int | None] | None:
    """Returns the layout after a move, or None where channels are merged or split."""
    params = eqn.params
    match eqn.primitive.name:
        case "transpose":
            return [layout[a] for a in params["permutation"]]
        case "squeeze":
            return [axis for a, axis in enumerate(layout) if a not in params["dimensions"]]
        case "broadcast_in_dim":
            after: list[int | None] = [None] * len(params["shape"])
            for a, axis in zip(params["broadcast_dimensions"], layout, strict=True):
                after[a] = axis
            return after
        case "reshape":
            return _reshaped(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, layout)  # pyright: ignore[reportAttributeAccessIssue]
    return list(layout)


def _reshaped(before: Sequence[int], after: Sequence[int], layout: Sequence[int | None]) -> list[int | None] | None:
    """Returns the layout after a reshape, as `_moved`: axes are matched in order, and are the same if lengths agree."""
    new: list[int | None] = [None] * len(after)
    if 0 in before:
        return None
    old_axes, new_axes = ([a for a, n in enumerate(shape) if n > 1] for shape in (before, after))
    while old_axes:
        olds, news = [old_axes.pop(0)], [new_axes.pop(0)]
        while (p := math.prod(before[a] for a in olds)) != (q := math.prod(after[a] for a in news)):
            if p < q:
                olds.append(old_axes.pop(0))
            else:
                news.append(new_axes.pop(0))
        if len(olds) == len(news) == 1:
            new[news[0]] = layout[olds[0]]
        elif any(layout[a] is not None for a in olds):
            return None
    return new


def _with_bias(program: Flat, values: Values, chain: Chain, users: Callable[[Any], set[int]]) -> Chain | str:
    """Returns the chain with a bias for its offset, or the reason why it has none.

    It is the layer's own, else the batch-norm's, else what the batch-norm subtracts.
    """
    if all(step.op in ("mul", "div", "neg") for step in chain.steps):
        return chain
    shape = np.shape(chain.compose(values)[1])
    kinds = [step.op in SCALING and program.role(step.operand) == "parameter" for step in chain.steps]
    first = kinds.index(True)

    def preference(candidate: tuple[int, Bias]) -> tuple[bool, bool, bool, int]:
        at, bias = candidate
        sums = any(program.eqns[n].primitive.name not in MOVING for n in bias.path)
        return sums, bias.negative, at > first, -at

    candidates = [
        (at, Bias(step.number, leaf, path, negative))
        for at, step in enumerate(chain.steps)
        if step.op in ("add", "sub", "from")
        for leaf, path, negative in _addends(program, step.operand, step.op == "sub")
    ]
    for _, bias in sorted(candidates, key=preference):
        where = chain.of(bias.number, positions(program, bias.leaf, bias.path))
        if (
            np.broadcast_shapes(where.shape, shape) == where.shape
            and np.unique(where).size == where.size
            and jnp.issubdtype(bias.leaf.aval.dtype, jnp.floating)
            and not users(bias.leaf)
        ):
            return replace(chain, bias=bias)
    return "none of the leaves that it adds can take its offset: each is used elsewhere, too, or has too few entries"


def _addends(program: Flat, atom: Any, negative: bool) -> Iterator[tuple[Any, tuple[int, ...], bool]]:
    """Yields the leaves that a sum of parameters adds entry by entry: leaf, path, and whether it is subtracted."""
    eqn = program.made_by(atom)
    if eqn is None:
        if not isinstance(atom, core.Literal) and atom in program.leaves:
            yield atom, (), negative
        return
    name = eqn.primitive.name
    if program.role(atom) != "parameter" or not (name in MOVING or name in ("add", "sub")):
        return
    for n, part in enumerate(eqn.invars):
        for leaf, path, minus in _addends(program, part, negative != (n == 1 and name == "sub")):
            yield leaf, (*path, program.makers[atom]), minus
