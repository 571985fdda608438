"""The solver of the layer-wise problem: levels, scales and indices of least output error.

In stages, of which none raises tr((W − Ŵ) H (W − Ŵ)ᵀ): the k-means levels and each weight's nearest; *error feedback*
with those levels; and rounds of *refit*: levels, then scales, by least squares for the indices as they are, rounded as
they are stored, then indices by coordinate descent for the levels as they are. What is no improvement is left out: of
indices for each output alone, of levels for each codebook.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from nuqjax._src.calibration.level_formats import (
    chosen_format,
    level_unit,
    rounded_levels,
    rounded_scale,
    scale_dtype,
)
from nuqjax._src.calibration.places import Places, channels_of, places_of, visited
from nuqjax._src.calibration.problem import Problem, Solution
from nuqjax._src.calibration.squares import least_squares
from nuqjax._src.calibration.sweeps import Choice, descent_matrix, feedback_matrix, sweep
from nuqjax.fit import fit
from nuqjax.fixed_point import AutoQFormat
from nuqjax.rows import InputGroups, row_mask, to_rows

_LEVEL_STEPS = 4  # of conjugate gradients in a round: the next round goes on from there
_SAMPLE = 2**19  # values of a codebook that k-means looks at
_ENOUGH = 1e-3  # the share of the error that a round must take off for another one to follow


class _State(NamedTuple):
    """A solution in the order of visit, and what it costs."""

    levels: np.ndarray  # [R, K] float32
    scale: np.ndarray | None  # [O · S] float32
    indices: np.ndarray  # [G, I, P] uint8
    errors: np.ndarray  # [G, I, P] w − ŵ
    pull: np.ndarray  # [G, I, P] H (w − ŵ)
    cost: np.ndarray  # [G, P] (w − ŵ) H (w − ŵ)ᵀ


class _Task(NamedTuple):
    """What stays the same from stage to stage, in units in which neither weights nor moments leave float32."""

    weights: np.ndarray  # [G, I, P] float32
    hessian: np.ndarray  # [G, I, I] float32
    places: Places
    pinned: np.ndarray | None  # [G, I, P] bool: weights of exactly 0, which stay so
    codebook_format: Any
    dtype: np.dtype
    level_unit: float  # what levels are multiplied by where they are stored
    scale_unit: float  # and scales: together what the weights were divided by


def quantize(
    problem: Problem,
    *,
    bits: int,
    granularity: Any = "tensor",
    scale: Any = "channel",
    codebook_format: Any = None,
    keep_zero: bool = False,
    feedback: bool = True,
    refit: int = 4,
) -> Solution:
    """Levels, scales and indices for one leaf whose output error is small: from its weights and moments alone.

    Everything is computed by NumPy, and the same problem gives the same bits.

    Args:
      problem: the weights and the moments of what they multiply.
      bits: index width, 1 to 8.
      granularity: which weights share a codebook, as in `nuqjax.compress`.
      scale: None, `"channel"` or `InputGroups(n)`: which weights share a factor. It begins as their root mean square.
      codebook_format: how levels are stored, as in `nuqjax.compress`. Scales are stored in 16 bits if levels are.
      keep_zero: one level is exactly 0, and weights of exactly 0 stay 0.
      feedback: choose indices with error feedback.
      refit: how many rounds of refit at most.

    Returns:
      A `Solution`.

    Raises:
      ValueError: shapes that do not fit one another, values that are not finite, an option out of range.

    >>> import numpy as np
    >>> weights = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    >>> solution = quantize(Problem(weights, np.eye(16)[None] + 1), bits=3)
    >>> solution.levels.shape, solution.indices.shape, solution.scale.shape
    ((1, 8), (8, 16), (8, 1))
    >>> list(solution.errors)
    ['nearest', 'feedback', 'refit']
    """
    _check(problem, bits)
    weights = np.asarray(problem.weights)
    outputs = len(weights)
    dtype = np.dtype(weights.dtype)
    unit = 2.0 ** int(np.frexp(np.abs(weights).max(initial=0).astype(np.float64))[1])
    channels = (weights.astype(np.float64) / unit).astype(np.float32)
    hessian, order, moment = _ordered(np.asarray(problem.hessian))
    places = places_of(outputs, order, granularity, scale)
    visits = visited(channels, order)
    pinned = visits == 0 if keep_zero else None
    matrix = feedback_matrix(hessian)[0] if feedback else None
    task = _Task(visits, hessian.astype(np.float32), places, pinned, codebook_format, dtype, unit, 1.0)

    task, levels, factors = _begin(task, channels, 2**bits, granularity, scale, keep_zero)
    state = _evaluated(task, levels, factors, sweep(visits, None, _nearest(task, levels, factors))[0])
    errors = {"nearest": state.cost.sum()}

    def improved(stage: str, other: _State) -> None:
        nonlocal state
        total = other.cost.sum()
        if total < state.cost.sum():
            state, errors[stage] = other, total

    if matrix is not None:
        indices, _ = sweep(visits, matrix, _nearest(task, levels, factors))
        improved("feedback", _better(state, _evaluated(task, levels, factors, indices), outputs))
    if refit:
        descent = descent_matrix(task.hessian)
        for _ in range(refit):
            before = state.cost.sum()
            improved("refit", _refitted(task, state, descent))
            if not state.cost.sum() < (1 - _ENOUGH) * before:
                break
    return _solution(task, state, {stage: float(cost) * unit**2 * moment for stage, cost in errors.items()})


def _check(problem: Problem, bits: int) -> None:
    weights, hessian = np.asarray(problem.weights), np.asarray(problem.hessian)
    if weights.ndim != 2:
        raise ValueError(f"quantize: weights of shape {weights.shape}, but [O, I] is wanted")
    outputs, inputs = weights.shape
    groups = hessian.shape[0] if hessian.ndim else 0
    if hessian.shape != (groups, inputs, inputs) or not groups or outputs % groups:
        raise ValueError(
            f"quantize: moments of shape {hessian.shape} for weights of shape {weights.shape}, but "
            f"[G, {inputs}, {inputs}] is wanted, with G a divisor of {outputs}"
        )
    for name, array in (("weights", weights), ("moments", hessian)):
        if not np.isfinite(array).all():
            raise ValueError(f"quantize: {name} that are NaN or infinite, but finite values are wanted")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"quantize: bits={bits!r}, but a whole number from 1 to 8 is wanted")


def _ordered(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Moments `[G, I, I]` in the order of visit, those of an input that never changes a little above zero.

    Returns:
      The moments divided by the mean of their diagonals; `[G, I]` the inputs, that of the largest moment first; and
      that mean.
    """
    diagonal = np.einsum("gii->gi", hessian).astype(np.float64)
    moment = float(diagonal.mean()) if diagonal.size else 0.0
    moment = moment if moment > 0 else 1.0
    order = np.argsort(-diagonal, axis=1, kind="stable")
    hessian = np.take_along_axis(np.take_along_axis(hessian, order[:, :, None], 1), order[:, None, :], 2) / moment
    diagonal = np.einsum("gii->gi", hessian)
    diagonal[:] = np.maximum(diagonal, 1e-6)
    return hessian, order, moment


def _begin(
    task: _Task, channels: np.ndarray, num_levels: int, granularity: Any, scale: Any, keep_zero: bool
) -> tuple[_Task, np.ndarray, np.ndarray | None]:
    """Root mean squares as scales, and the k-means levels, each squared error weighted by its input's moment."""
    outputs, inputs = channels.shape
    groups = task.hessian.shape[0]
    importance = np.empty((groups, inputs), np.float32)
    np.put_along_axis(importance, task.places.order, np.einsum("gii->gi", task.hessian), axis=1)
    importance = np.repeat(importance, outputs // groups, axis=0)
    factors = spread = None
    if task.places.scales:
        size = scale.size if isinstance(scale, InputGroups) else max(inputs, 1)
        padded = np.pad(channels.astype(np.float64) ** 2, ((0, 0), (0, task.places.scales * size - inputs)))
        counts = np.minimum(size, inputs - size * np.arange(task.places.scales))
        factors = np.sqrt(padded.reshape(outputs, -1, size).sum(axis=-1) / counts).astype(np.float32)
        spread = np.repeat(factors, size, axis=1)[:, :inputs]
        channels = channels / np.where(spread > 0, spread, 1)
        importance = importance * spread**2
    levels = _kmeans(channels, importance, num_levels, granularity, keep_zero)
    if factors is not None:
        unit = task.level_unit
        apart = level_unit(levels, factors * unit, task.codebook_format, task.dtype)
        task = task._replace(level_unit=apart, scale_unit=unit / apart)
    if isinstance(task.codebook_format, AutoQFormat):
        chosen = chosen_format(task.codebook_format, levels * task.level_unit, factors is not None)
        task = task._replace(codebook_format=chosen)
    levels = np.sort(_rounded(task, levels), axis=1)
    factors = None if factors is None else _rounded_scale(task, factors).reshape(-1)
    return task, levels, factors


def _kmeans(
    channels: np.ndarray, importance: np.ndarray, num_levels: int, granularity: Any, keep_zero: bool
) -> np.ndarray:
    """`[R, K]` the k-means levels; of long rows those of a sample, which error feedback moves on from anyway."""
    outputs, inputs = channels.shape
    given = to_rows(channels, granularity), to_rows(importance, granularity), row_mask(outputs, inputs, granularity)
    rows, weights, mask = (sampled(x, inputs) for x in given)
    return np.asarray(fit(rows, num_levels, weights=weights, mask=mask, keep_zero=keep_zero, tolerance=None).levels)


def sampled(rows: Any, inputs: int, most: int = _SAMPLE) -> Any:
    """`[R, n]` at most so many values of each row, at equal distances that meet every input alike; None as it is."""
    if rows is None:
        return None
    step = -(-rows.shape[1] // most)
    while step > 1 and math.gcd(step, inputs) > 1:
        step += 1
    return rows[:, ::step]


def _rounded(task: _Task, levels: np.ndarray) -> np.ndarray:
    """Levels as they are stored, in the units of the solver."""
    stored = rounded_levels(levels * task.level_unit, task.codebook_format, task.dtype)
    return (stored / task.level_unit).astype(np.float32)


def _rounded_scale(task: _Task, scale: np.ndarray) -> np.ndarray:
    """Scales as they are stored, in the units of the solver."""
    stored = rounded_scale(scale * task.scale_unit, scale_dtype(task.codebook_format, task.dtype))
    return (stored / task.scale_unit).astype(np.float32)


def _nearest(task: _Task, levels: np.ndarray, scale: np.ndarray | None) -> Choice:
    """Chooses the nearest level of a target; of two the lower one."""
    places, (count, num_levels) = task.places, levels.shape
    cuts = (levels[:, :-1] + levels[:, 1:]) / 2
    flat = levels.reshape(-1)
    zero = (levels == 0).argmax(axis=1)

    def choose(j: int, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        factor = None
        if scale is not None:
            factor = scale[places.scale_of_output + places.scale_of_input[:, j, None]]
            target = target / np.where(factor > 0, factor, 1)
        book = None
        if count == 1:
            index = np.searchsorted(cuts[0], target)
        else:
            book = places.book_of_output + places.book_of_input[:, j, None]
            index = np.zeros(target.shape, np.intp)
            for cut in cuts[book].transpose(2, 0, 1):
                index += target > cut
        if task.pinned is not None:
            index = np.where(task.pinned[:, j], zero[0 if book is None else book], index)
        value = flat[index if book is None else book * num_levels + index]
        return index, value if factor is None else value * factor

    return choose


def _slots(places: Places) -> np.ndarray:
    """`[G, I, P]` the codebook of each weight."""
    return places.book_of_output[:, None, :] + places.book_of_input[:, :, None]


def _scale_slots(places: Places) -> np.ndarray:
    """`[G, I, P]` the scale of each weight."""
    return places.scale_of_output[:, None, :] + places.scale_of_input[:, :, None]


def _factors(task: _Task, scale: np.ndarray | None) -> np.ndarray:
    """What multiplies the level of each weight, broadcast."""
    if scale is None:
        return np.ones((1, 1, 1), np.float32)
    if task.places.scales == 1:
        return scale[task.places.scale_of_output][:, None, :]
    return scale[_scale_slots(task.places)]


def _evaluated(task: _Task, levels: np.ndarray, scale: np.ndarray | None, indices: np.ndarray) -> _State:
    values = levels.reshape(-1)[_slots(task.places) * levels.shape[1] + indices] * _factors(task, scale)
    errors = task.weights - values
    pull = task.hessian @ errors
    cost = np.maximum((errors * pull).sum(axis=1, dtype=np.float64), 0)
    return _State(levels, scale, indices, errors, pull, cost)


def _better(one: _State, other: _State, systems: int) -> _State:
    """The better of two solutions: of each of several systems of outputs (neighbours, all of one size)."""
    groups, outputs = one.cost.shape
    lower = (other.cost < one.cost).reshape(-1)
    if systems < groups * outputs:
        member = np.arange(groups * outputs) // -(-groups * outputs // systems)
        lower = (np.bincount(member, (other.cost - one.cost).reshape(-1), systems) < 0)[member]
    if lower.all():
        return other
    mine = lower.reshape(groups, outputs)

    def of_parts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Codebooks or scales, an equal number of neighbours for each system."""
        if a is b:
            return a
        first = lower[:: -(-groups * outputs // systems)]
        take = np.repeat(first, a.shape[0] // systems)
        return np.where(take.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    each = mine[:, None, :]
    return _State(
        levels=of_parts(one.levels, other.levels),
        scale=None if one.scale is None or other.scale is None else of_parts(one.scale, other.scale),
        indices=np.where(each, other.indices, one.indices),
        errors=np.where(each, other.errors, one.errors),
        pull=np.where(each, other.pull, one.pull),
        cost=np.where(mine, other.cost, one.cost),
    )


def _refitted(task: _Task, state: _State, descent: np.ndarray) -> _State:
    """One round: levels, scales, indices."""
    outputs = state.cost.size
    state = _better(state, _with_better_levels(task, state), min(state.levels.shape[0], outputs))
    if state.scale is not None:
        state = _better(state, _with_better_scales(task, state), outputs)
    choose = _nearest(task, state.levels, state.scale)
    indices, _ = sweep(task.weights, descent, choose, state.errors)
    return _better(state, _evaluated(task, state.levels, state.scale, indices), outputs)


def _with_better_levels(task: _Task, state: _State) -> _State:
    count, num_levels = state.levels.shape
    books = _slots(task.places)
    held = None if task.pinned is None else state.levels.reshape(-1) == 0
    found = least_squares(
        state.levels.reshape(-1), books * num_levels + state.indices, _factors(task, state.scale), state.pull,
        task.hessian, systems=min(count, state.cost.size), steps=_LEVEL_STEPS, held=held,
    )  # fmt: skip
    levels = _rounded(task, found.reshape(state.levels.shape))
    order = np.argsort(levels, axis=1, kind="stable")
    rank = np.argsort(order, axis=1).astype(np.uint8)
    indices = rank.reshape(-1)[books * num_levels + state.indices]
    return _evaluated(task, np.take_along_axis(levels, order, axis=1), state.scale, indices)


def _with_better_scales(task: _Task, state: _State) -> _State:
    assert state.scale is not None
    values = state.levels.reshape(-1)[_slots(task.places) * state.levels.shape[1] + state.indices]
    found = least_squares(
        state.scale, _scale_slots(task.places), values, state.pull, task.hessian,
        systems=state.cost.size, steps=min(task.places.scales, _LEVEL_STEPS),
    )  # fmt: skip
    # A factor that changes sign, or runs away, fits indices that are about to change.
    scale = np.clip(found, state.scale * np.float32(0.3), state.scale * np.float32(3)).astype(np.float32)
    return _evaluated(task, state.levels, _rounded_scale(task, scale), state.indices)


def _solution(task: _Task, state: _State, errors: dict[str, float]) -> Solution:
    indices = channels_of(state.indices, task.places.order)
    levels, scale = rounded_levels(state.levels * task.level_unit, task.codebook_format, task.dtype), None
    if state.scale is not None:
        dtype = scale_dtype(task.codebook_format, task.dtype)
        scale = rounded_scale(state.scale * task.scale_unit, dtype).astype(dtype).reshape(-1, task.places.scales)
    share = np.bincount(indices.reshape(-1), minlength=1) / max(indices.size, 1)
    entropy = float(-(share[share > 0] * np.log2(share[share > 0])).sum()) + 0.0
    return Solution(levels, indices, scale, task.codebook_format, errors, entropy)
