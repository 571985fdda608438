"""Finds where a function uses its parameters, and sums the moments of what each use multiplies.

The function's jaxpr is re-run (`trace.interpret`) with its parameters lifted. Each is followed through casts,
transposes, reshapes, slices, calls and loops to the dots, convolutions and look-ups that it enters. There the sums over
the other operand are computed, and a following offset that could take a correction is recorded. Everything else about a
use is static: which entry of the leaf each entry of the operand is, is computed afterwards, one leaf at a time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from nuqjax._src.calibration.convolutions import convolve
from nuqjax._src.trace.interpret import Interpreter, Rule, Site, bind, inline, scan_parts
from nuqjax._src.trace.operations import DERIVED, MOVING, move


class Slice:
    """A move: the slice along the first axis that a step of a loop takes."""


class Piece(NamedTuple):
    """A move: one output, by number, of an equation with several outputs."""

    eqn: core.JaxprEqn
    number: int


@dataclass(frozen=True, eq=False)
class Parameter:
    """A leaf of the parameters at some point of the program: its array, its path, and the moves applied so far."""

    array: Any
    name: str
    moves: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Use:
    """A dot, a convolution or a look-up that a leaf enters.

    Its operand, transposed by `order` and reshaped, is `[B, O, I]`: B parts with separate inputs (groups of a
    convolution, batch axes of a dot), and O outputs of I inputs each.

    Attributes:
      name: the leaf's path.
      moves: the moves from the leaf to the operand.
      shape: the shape of the operand.
      order: the order of the operand's axes.
      sizes: `(B, O, I)`.
      site: the place in the program.
      stretches: the number of stretches of inputs within which second moments are taken; 0 for the diagonal alone.
    """

    name: str
    moves: tuple[Any, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, int, int]
    site: Site
    stretches: int

    def entries(self, leaf_shape: Sequence[int]) -> np.ndarray:
        """Returns the entry of the leaf, in row-major order, that each entry of the operand is, `[N, B, O, I]`.

        N is the number of steps of the loops that slice the leaf.
        """
        found = _entries(leaf_shape, self.moves)
        found = np.broadcast_to(found, (len(found), *self.shape))
        return found.transpose(0, *(a + 1 for a in self.order)).reshape(len(found), *self.sizes)


@dataclass(frozen=True, eq=False)
class Bias:
    """A leaf that is added to the outputs of uses.

    Attributes:
      uses: each use with the numbers of its outputs (part · O + output) along the axes of the sum.
      name: the leaf's path.
      moves: the moves from the leaf to the sum.
      negative: whether the leaf is subtracted.
    """

    uses: tuple[tuple[Use, np.ndarray], ...]
    name: str
    moves: tuple[Any, ...]
    negative: bool

    def entries(self, leaf_shape: Sequence[int]) -> np.ndarray:
        """Returns which entry of the leaf is added where, `[N, …]`; axes along which it is broadcast have length 1."""
        return _entries(leaf_shape, self.moves)


@dataclass(frozen=True, eq=False)
class Output:
    """The output of uses, before any operation other than moves and the addition of offsets."""

    array: Any
    made: tuple[tuple[Use, np.ndarray], ...]


class Sums(NamedTuple):
    """Sums over the rows of what a use multiplies.

    Attributes:
      first: `[*, B, I]` sums of x.
      second: `[*, B, S, I/S, I/S]` sums of x xᵀ within S stretches; without stretches `[*, B, I]` sums of x²; or None.
      exact: `[*, B, I]` sums of f, what the use multiplies with the float parameters, if two trees run side by side.
      cross: sums of f xᵀ, as `second`, or None.
    """

    first: Any
    second: Any
    exact: Any = None
    cross: Any = None


PATHS = "paths"
"""The name of the axis along which two trees run side by side: the float parameters, then others."""


@dataclass(eq=False)
class Recorder:
    """Records the uses and offsets that a run of the function finds.

    Attributes:
      wanted: tells by path for which leaves to take second moments, too.
      images: the number of examples in the batch.
      positions: the largest number of positions to take from an example.
      widest: the largest number of inputs between which to take second moments; a use with more inputs has its moments
        within stretches of them.
      paired: whether two trees run side by side, along the axis `PATHS`.
      records: for each use, the use, its number of rows, and its sums.
      biases: the leaves that could take a correction.
      others: by path, the uses that are not understood.
    """

    wanted: Callable[[str], bool]
    images: int
    positions: int
    widest: int
    paired: bool = False
    records: list[tuple[Use, int, Sums]] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)

    def inside(self) -> "Recorder":
        """Returns an empty recorder with the same options, for the body of a loop."""
        return Recorder(self.wanted, self.images, self.positions, self.widest, self.paired)

    def note(self, parameter: Any, why: str) -> None:
        """Records a use of a parameter that is not understood, once for each reason."""
        if isinstance(parameter, Parameter):
            whys = self.others.setdefault(parameter.name, [])
            whys += [] if why in whys else [why]


def _entries(leaf_shape: Sequence[int], moves: Sequence[Any]) -> np.ndarray:
    found = np.arange(math.prod(leaf_shape)).reshape(1, *leaf_shape)
    for step in moves:
        if isinstance(step, Slice):
            found = found.reshape(-1, *found.shape[2:])
        elif isinstance(step, Piece):
            found = np.stack([_split(step.eqn, x)[step.number] for x in found])
        else:
            found = np.stack([move(step, x) for x in found])
    return found


def _split(eqn: core.JaxprEqn, array: np.ndarray) -> list[np.ndarray]:
    full = np.broadcast_to(array, eqn.invars[0].aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
    return np.split(full, np.cumsum(eqn.params["sizes"])[:-1], eqn.params["axis"])


def run(jaxpr: core.ClosedJaxpr, arrays: Sequence[Any], names: Sequence[str | None], recorder: Recorder) -> list[Any]:
    """Runs the function and returns its outputs; fills the recorder with uses and offsets.

    Args:
      jaxpr: the function.
      arrays: its inputs.
      names: for each input its path if it is a parameter, else None.
      recorder: the recorder to fill.
    """
    lifted = [x if name is None else Parameter(x, name) for x, name in zip(arrays, names, strict=True)]
    interpreter = collector(recorder)
    return interpreter.lower_all(interpreter.evaluate(jaxpr, lifted))


def collector(recorder: Recorder) -> Interpreter:
    """Returns an interpreter whose lifted values are `Parameter`s and outputs, and that fills the recorder."""
    return _Collector(_is_lifted, _lower, _RULES, _default, recorder)


@dataclass(frozen=True)
class _Collector(Interpreter):
    recorder: Any = None


def _is_lifted(x: Any) -> bool:
    return isinstance(x, Parameter | Output)


def _lower(value: Any, others: Sequence[Any]) -> Any:
    del others
    return value.array


def _default(interpreter: Any, site: Site, eqn: core.JaxprEqn, *operands) -> Sequence[Any]:
    """The rule for all other equations: records the use as not understood and binds the equation."""
    where = f" at {site.scope!r}" if site.scope else ""
    for x in operands:
        interpreter.recorder.note(x, f"{site.primitive}{where}")
    return bind(eqn, interpreter.lower_all(operands))


def _moved(interpreter: Any, site: Site, eqn: core.JaxprEqn, value: Any, *rest) -> Sequence[Any]:
    """The rule for changes of place or dtype: a parameter or an output stays lifted."""
    [array] = bind(eqn, interpreter.lower_all((value, *rest)))
    if rest or not jnp.issubdtype(array.dtype, jnp.floating):
        return _default(interpreter, site, eqn, value, *rest)
    if isinstance(value, Parameter):
        return [Parameter(array, value.name, (*value.moves, eqn))]
    if array.size > _MOST_NUMBERS and eqn.primitive.name in ("reshape", "slice", "rev"):
        return [array]
    return [Output(array, tuple((use, move(eqn, numbers)) for use, numbers in value.made))]


_MOST_NUMBERS = 2**24  # a larger output is not followed through moves that number its values one by one


def _parted(interpreter: Any, site: Site, eqn: core.JaxprEqn, value: Any) -> list[Any]:
    arrays = bind(eqn, interpreter.lower_all((value,)))
    if isinstance(value, Parameter):
        moves = ((*value.moves, Piece(eqn, n)) for n in range(len(arrays)))
        return [Parameter(x, value.name, m) for x, m in zip(arrays, moves, strict=True)]
    parts = zip(*(_split(eqn, numbers) for _, numbers in value.made), strict=True)
    uses = [use for use, _ in value.made]
    return [Output(x, tuple(zip(uses, part, strict=True))) for x, part in zip(arrays, parts, strict=True)]


def _add(interpreter: Any, site: Site, eqn: core.JaxprEqn, *operands) -> Sequence[Any]:
    """The rule for sums: a parameter added to (or subtracted from) an output of uses can take their correction."""
    outputs = [x for x in operands if isinstance(x, Output)]
    parameters = [x for x in operands if isinstance(x, Parameter)]
    subtracted = site.primitive == "sub"
    if len(outputs) == 1 and len(parameters) == 1 and not (subtracted and operands[0] is parameters[0]):
        [output], [leaf] = outputs, parameters
        interpreter.recorder.biases.append(Bias(output.made, leaf.name, leaf.moves, subtracted))
        interpreter.recorder.note(leaf, "it is an offset")
        return bind(eqn, interpreter.lower_all(operands))
    if len(outputs) == 2 and not subtracted and operands[0] is not operands[1]:
        [array] = bind(eqn, interpreter.lower_all(operands))
        return [Output(array, (*outputs[0].made, *outputs[1].made))]
    return _default(interpreter, site, eqn, *operands)


def _one_parameter(operands: Sequence[Any]) -> bool:
    return [isinstance(x, Parameter) for x in operands].count(True) == 1


def _wide(x: Any) -> Any:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _sums(x: Any, recorder: Recorder, use: Use) -> Sums:
    """Computes the sums over R of rows `[B, R, I]`."""
    x = _wide(x)
    if recorder.paired:
        exact, x = lax.all_gather(x, PATHS)
        second, cross = (_products(f, x, use) if recorder.wanted(use.name) else None for f in (x, exact))
        return Sums(x.sum(axis=1), second, exact.sum(axis=1), cross)
    first = x.sum(axis=1)
    return Sums(first, _products(x, x, use) if recorder.wanted(use.name) else None)


def _products(x: Any, y: Any, use: Use) -> Any:
    """Returns the sums over R of x yᵀ for rows `[B, R, I]`, within stretches."""
    if not use.stretches:
        return (x * y).sum(axis=1)
    x, y = (a.reshape(*a.shape[:2], use.stretches, -1) for a in (x, y))
    return lax.dot_general(x, y, (((1,), (1,)), ((0, 2), (0, 2))), precision=lax.Precision.HIGHEST)


def _stretches(inputs: int, widest: int) -> int:
    """Returns the least number of equal stretches of at most `widest` inputs; 0 if they would be below half of it."""
    fewest = max(1, -(-inputs // widest))
    return next((n for n in range(fewest, 2 * fewest + 1) if inputs % n == 0), 0)


def _dot(interpreter: Any, site: Site, eqn: core.JaxprEqn, *operands) -> Sequence[Any]:
    recorder = interpreter.recorder
    if not _one_parameter(operands):
        return _default(interpreter, site, eqn, *operands)
    [result] = bind(eqn, interpreter.lower_all(operands))
    side = 0 if isinstance(operands[0], Parameter) else 1
    parameter, [x] = operands[side], interpreter.lower_all([operands[1 - side]])
    contracted, batched = eqn.params["dimension_numbers"]
    axes = []
    for n, value in enumerate((parameter.array, x)):
        k = side if n == 0 else 1 - side
        free = [a for a in range(value.ndim) if a not in contracted[k] and a not in batched[k]]
        axes.append((list(batched[k]), free, list(contracted[k])))
    shape = parameter.array.shape
    parts, outputs, inputs = (math.prod(shape[a] for a in group) for group in axes[0])
    order = tuple(a for group in axes[0] for a in group)
    stretches = _stretches(inputs, recorder.widest)
    use = Use(parameter.name, parameter.moves, shape, order, (parts, outputs, inputs), site, stretches)
    if not jnp.issubdtype(result.dtype, jnp.floating) or 0 in (*shape, *x.shape):
        recorder.note(parameter, f"{site.primitive} of no values, or of integers")
        return [result]
    rows = x.transpose([a for group in axes[1] for a in group]).reshape(parts, -1, inputs)
    every = -(-rows.shape[1] // max(recorder.images * recorder.positions, 1))
    rows = rows[:, every // 2 :: every]
    recorder.records.append((use, rows.shape[1], _sums(rows, recorder, use)))
    batch, free, others = [shape[a] for a in axes[0][0]], [shape[a] for a in axes[0][1]], [1] * len(axes[1][1])
    numbers = np.arange(parts * outputs).reshape(batch + (free + others if side == 0 else others + free))
    return [Output(result, ((use, numbers),))]


def _conv(interpreter: Any, site: Site, eqn: core.JaxprEqn, x: Any, kernel: Any) -> Sequence[Any]:
    recorder, params = interpreter.recorder, eqn.params
    if not isinstance(kernel, Parameter) or isinstance(x, Parameter) or params["batch_group_count"] != 1:
        return _default(interpreter, site, eqn, x, kernel)
    [x] = interpreter.lower_all([x])
    result = convolve(eqn, x, kernel.array)
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    shape, order = kernel.array.shape, tuple(numbers.rhs_spec)
    inputs = math.prod(shape) // max(shape[order[0]], 1)
    if 0 in (*shape, *x.shape, *result.shape):
        recorder.note(kernel, "a convolution of no values")
        return [result]
    sizes = groups, shape[order[0]] // groups, inputs
    use = Use(kernel.name, kernel.moves, shape, order, sizes, site, _stretches(inputs, recorder.widest))
    count, sums = _patch_sums(x, result.shape, params, recorder, use)
    recorder.records.append((use, count, sums))
    channels = np.arange(groups * sizes[1]).reshape([-1 if a == numbers.out_spec[1] else 1 for a in range(result.ndim)])
    return [Output(result, ((use, channels),))]


def _patch_sums(x, out_shape, params, recorder: Recorder, use: Use) -> tuple[int, Sums]:
    """Returns the number of rows, and the sums over the patches at some places of every example.

    The places form a lattice of equal steps that begins half a step from the border, so that patches at the border are
    not overrepresented.
    """
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    spatial = len(out_shape) - 2
    x = _wide(x.transpose([numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]]))
    index, per_axis = [], max(1, math.floor(recorder.positions ** (1 / max(spatial, 1)) + 1e-9))
    for a in range(spatial):
        length, taps = out_shape[numbers.out_spec[2 + a]], use.shape[numbers.rhs_spec[2 + a]]
        step, dilation = -(-length // per_axis), params["lhs_dilation"][a]
        while math.gcd(step, dilation) > 1:  # else some offsets between the dilated inputs would never be taken
            step += 1
        places = np.arange(min(step // 2, length - 1), length, step)
        index.append(places[:, None] * params["window_strides"][a] + np.arange(taps) * params["rhs_dilation"][a])
    pads = [(lo, hi, d - 1) for (lo, hi), d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    padded = any(pad != (0, 0, 0) for pad in pads)
    row = math.prod(i.size for i in index) * x.shape[-1]
    places = math.prod(len(i) for i in index)

    def sums_of(x) -> Sums:
        if padded:
            x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
        for a, i in enumerate(index):
            axis = 1 + 2 * a
            x = jnp.take(x, i.reshape(-1), axis=axis, mode="clip")
            x = x.reshape(*x.shape[:axis], *i.shape, *x.shape[axis + 1 :])
        # [n, place, tap, place, tap, …, channel] → [n, place, place, …, channel, tap, tap, …]
        order = [0, *range(1, 2 * spatial, 2), 2 * spatial + 1, *range(2, 2 * spatial + 1, 2)]
        rows = x.transpose(order).reshape(-1, groups, row // places // groups)
        return _sums(rows.transpose(1, 0, 2), recorder, use)

    return places * x.shape[0], _in_blocks(sums_of, x, row)


_BLOCK = 2**24  # the most values of patches in memory at once


def _in_blocks(sums_of: Callable[[Any], Sums], x: Any, row: int) -> Sums:
    """Returns the sums over the examples of x, computed for a few examples at a time if the patches are large."""
    size = max(n for n in range(1, x.shape[0] + 1) if x.shape[0] % n == 0 and (n == 1 or n * row <= _BLOCK))
    if size == x.shape[0]:
        return sums_of(x)
    blocks = x.reshape(-1, size, *x.shape[1:])

    def step(total, block) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, sums_of(block)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(sums_of, blocks[0]))
    return lax.scan(step, zeros, blocks)[0]


def _gather(interpreter: Any, site: Site, eqn: core.JaxprEqn, table: Any, index: Any) -> Sequence[Any]:
    """The rule for look-ups along one axis: counts how often each entry is looked up."""
    recorder, numbers = interpreter.recorder, eqn.params["dimension_numbers"]
    [index] = interpreter.lower_all([index])
    sizes = eqn.params["slice_sizes"]
    if not isinstance(table, Parameter) or len(numbers.start_index_map) != 1:
        return _default(interpreter, site, eqn, table, index)
    [axis], shape = numbers.start_index_map, table.array.shape
    whole = all(n == shape[a] for a, n in enumerate(sizes) if a != axis)
    if getattr(numbers, "operand_batching_dims", ()) or not whole or sizes[axis] != 1 or 0 in (*shape, *index.shape):
        return _default(interpreter, site, eqn, table, index)
    order = (*(a for a in range(len(shape)) if a != axis), axis)
    outputs = math.prod(shape) // shape[axis]
    use = Use(table.name, table.moves, shape, order, (1, outputs, shape[axis]), site, 0)
    counts = jnp.zeros(shape[axis], jnp.float32).at[index.reshape(-1)].add(1, mode="drop")[None]
    second = counts if recorder.wanted(table.name) else None
    if recorder.paired:  # where the trees look up different entries, their counts are averaged
        counts = lax.pmean(counts, PATHS)
        second = None if second is None else counts
        sums = Sums(counts, second, counts, second)
    else:
        sums = Sums(counts, second)
    recorder.records.append((use, index.size, sums))
    return bind(eqn, [table.array, index])


def _scan(interpreter: Any, site: Site, eqn: core.JaxprEqn, *operands) -> Sequence[Any]:
    """The rule for loops: stacks the sums of leaves that the loop slices, and adds up those of other leaves."""
    recorder, body = interpreter.recorder, eqn.params["jaxpr"]
    first, second = scan_parts(eqn.params, len(operands))
    for x in operands[first:second]:
        recorder.note(x, f"a loop's carry at {site.scope!r}")
    consts = [x if isinstance(x, Parameter) else interpreter.lower(x, ()) if _is_lifted(x) else x for x in operands]
    consts, carry, xs = consts[:first], interpreter.lower_all(operands[first:second]), consts[second:]
    mark, arrays = Slice(), interpreter.lower_all(xs)
    length = eqn.params["length"]
    found: list[Recorder] = []

    def step(carry, slices) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        inner = recorder.inside()
        inside = [
            Parameter(s, x.name, (*x.moves, mark)) if isinstance(x, Parameter) else s
            for x, s in zip(xs, slices, strict=True)
        ]
        within = collector(inner)
        outputs = within.lower_all(within.evaluate(body, (*consts, *carry, *inside), site.scope))
        found.append(inner)
        sums = [s for _, _, s in inner.records]
        stacked = [mark in use.moves for use, _, _ in inner.records]
        split = lambda want: tuple(s for s, is_it in zip(sums, stacked, strict=True) if is_it == want)  # noqa: E731
        return tuple(outputs[: len(carry)]), tuple(outputs[len(carry) :]), split(False), split(True)

    slices = jax.eval_shape(lambda xs: tuple(x[0] for x in xs), tuple(arrays)) if length else ()
    if not length:
        return _default(interpreter, site, eqn, *operands)
    shapes = jax.eval_shape(step, tuple(carry), slices)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[2])

    def one(state, slices) -> tuple[tuple[tuple[Any, ...], Any], tuple[tuple[Any, ...], tuple[Any, ...]]]:
        carry, total = state
        carry, ys, shared, stacked = step(carry, slices)
        return (carry, jax.tree.map(jnp.add, total, shared)), (ys, stacked)

    (carry, shared), (ys, stacked) = lax.scan(
        one, (tuple(carry), zeros), tuple(arrays), length=length, reverse=eqn.params["reverse"]
    )
    inner, shared, stacked = found[-1], iter(shared), iter(stacked)
    for use, count, _ in inner.records:
        is_stacked = mark in use.moves
        record = use, count if is_stacked else count * length, next(stacked if is_stacked else shared)
        recorder.records.append(record)
    recorder.biases += inner.biases
    for name, whys in inner.others.items():
        for why in whys:
            recorder.note(Parameter(None, name), why)
    return [*carry, *ys]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVING, _moved),
    **dict.fromkeys(DERIVED, inline),
    **dict.fromkeys(("add", "sub", "add_any"), _add),
    "split": _parted,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "scan": _scan,
    "while": _default,
    "cond": _default,
}
