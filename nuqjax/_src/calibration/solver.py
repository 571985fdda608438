"""The solver of the layer-wise problem: computes levels, scales and indices of small output error.

It works in stages, and no stage raises tr((W − Ŵ) H (W − Ŵ)ᵀ). First, levels by the method and the nearest one of each
weight. Second, *error feedback* with these levels. Then rounds of *refit*: least squares fits levels, then scales, for
the current indices and rounds them to their stored formats; coordinate descent then chooses indices for these levels.
Every later round begins with error feedback again. A change that does not lower the error is dropped: indices for each
output separately, levels for each codebook separately.
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
from nuqjax._src.calibration.places import channels_of, places_of, visited
from nuqjax._src.calibration.problem import Problem, Solution
from nuqjax._src.calibration.rated import equal_steps, rated_stages
from nuqjax._src.calibration.stages import (
    State,
    Task,
    better_indices,
    evaluated,
    form_of,
    nearest,
    refitted,
    stored_levels,
    stored_scale,
)
from nuqjax._src.calibration.sweeps import descent_matrix, feedback_matrix, sweep
from nuqjax._src.fit.methods import check_method, fit
from nuqjax._src.leaf.qformat import AutoQFormat, CodebookFormat
from nuqjax._src.leaf.rows import Granularity, InputGroups, Scale, row_mask, to_rows

_SAMPLE = 2**19  # the most values of a codebook that k-means fits
_ENOUGH = 1e-3  # another round follows only if this one lowers the error by more than this share


def quantize(
    problem: Problem,
    *,
    bits: int,
    method: str = "knq",
    granularity: Granularity = "tensor",
    scale: Scale = "channel",
    codebook_format: CodebookFormat = None,
    keep_zero: bool = False,
    feedback: bool = True,
    refit: int = 4,
    rate: float | None = None,
) -> Solution:
    """Computes levels, scales and indices with a small output error for one leaf, from its weights and moments.

    Everything is computed by NumPy, and the same problem gives the same bits.

    Args:
      problem: the weights, and the moments of what they multiply.
      bits: index width, 1 to 8.
      method: the levels to begin with, and what refit may change of them: each level of `"knq"` and `"enq"`, middle and
        step of `"uniform"`, nothing of other methods.
      granularity: which weights share a codebook, as in `nuqjax.compress`.
      scale: None, `"channel"` or `InputGroups(n)`: which weights share a factor. Its initial value is a power mean of
        their magnitudes: the root mean square for 1 bit, and higher powers for more bits, where the largest weights
        matter more.
      codebook_format: how levels are stored, as in `nuqjax.compress`. Scales are stored in 16 bits if levels are.
      keep_zero: one level is exactly 0, and weights of exactly 0 stay 0.
      feedback: choose indices with error feedback.
      refit: the largest number of refit rounds.
      rate: for entropy-coded files: the price of a bit of code in units of the error. The solver then starts from
        levels at equal distances and lowers error + rate · bits; `errors` holds this sum. 6 to 8 bits give enough
        levels.

    Returns:
      A `Solution`.

    Raises:
      ValueError: shapes that do not match, values that are not finite, an option out of range.

    >>> import numpy as np
    >>> weights = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    >>> solution = quantize(Problem(weights, np.eye(16)[None] + 1), bits=3)
    >>> solution.levels.shape, solution.indices.shape, solution.scale.shape
    ((1, 8), (8, 16), (8, 1))
    >>> list(solution.errors)
    ['nearest', 'feedback', 'refit']
    """
    _check_options(bits, rate)
    check_method(method)
    task, channels, hessian, moment = prepared("quantize", problem, granularity, scale)
    held_zeros = task.weights == 0 if keep_zero else None
    task = task._replace(held_zeros=held_zeros, codebook_format=codebook_format, form=form_of(method))
    unit = task.level_unit
    matrix, pivots = feedback_matrix(hessian) if feedback else (None, np.einsum("gii->gi", hessian))
    if rate is None:
        factors = _power_means(channels, scale, 2 * bits)  # 6 to 15 % less error than with power 2
        levels = _fitted(task, channels, factors, pivots, 2**bits, method, granularity, scale, keep_zero)
        task, levels, factors = _as_stored(task, levels, factors)
        state, errors = _stages(task, levels, factors, matrix, refit)
    else:
        rate = min(rate / (unit**2 * moment), float(channels.size * channels.shape[1]))  # the cap exceeds any error
        factors = _power_means(channels, scale, 2)
        levels = equal_steps(task, factors, pivots, 2**bits, rate)
        task, levels, factors = _as_stored(task, levels, factors)
        state, errors = rated_stages(task, levels, factors, matrix, pivots, rate=rate, refit=refit)
    return solution_of(task, state, {stage: float(error) * unit**2 * moment for stage, error in errors.items()})


class Prepared(NamedTuple):
    """A problem as the stages take it.

    Attributes:
      task: weights divided by `task.level_unit`, and normalised moments; of the formats and forms, the defaults.
      channels: `[O, I]` float32 the weights divided by that unit.
      hessian: `[G, I, I]` float64 the moments in the order of visit, divided by `moment`.
      moment: the mean of their diagonals.
    """

    task: Task
    channels: np.ndarray
    hessian: np.ndarray
    moment: float


def prepared(name: str, problem: Problem, granularity: Granularity, scale: Scale) -> Prepared:
    """Checks a problem, in the words of the function `name`, and puts it in the units and the order of the stages."""
    _check(name, problem)
    weights, hessian = np.asarray(problem.weights), np.asarray(problem.hessian)
    unit = 2.0 ** int(np.frexp(np.abs(weights).max(initial=0).astype(np.float64))[1])
    channels = (weights.astype(np.float64) / unit).astype(np.float32)
    stretches = hessian.shape[1] if hessian.ndim == 4 else 1
    hessian, order, moment = _ordered(hessian.reshape(-1, *hessian.shape[-2:]))
    places = places_of(len(weights), order, stretches, granularity, scale)
    visits, dtype = visited(channels, places), np.dtype(weights.dtype)
    task = Task(visits, hessian.astype(np.float32), places, None, None, dtype, unit, 1.0)
    return Prepared(task, channels, hessian, moment)


def _stages(
    task: Task, levels: np.ndarray, scale: np.ndarray | None, matrix: np.ndarray | None, refit: int
) -> tuple[State, dict[str, float]]:
    """Runs the stages; returns the solution, and the error after each stage."""
    state = evaluated(task, levels, scale, sweep(task.weights, None, nearest(task, levels, scale))[0])
    errors = {"nearest": float(state.cost.sum())}

    def improved(stage: str, other: State) -> None:
        nonlocal state
        total = float(other.cost.sum())
        if total < state.cost.sum():
            state, errors[stage] = other, total

    def fed_back(stage: str) -> None:
        if matrix is not None:
            indices, _ = sweep(task.weights, matrix, nearest(task, state.levels, state.scale))
            improved(stage, better_indices(state, evaluated(task, state.levels, state.scale, indices)))

    fed_back("feedback")
    descent = descent_matrix(task.hessian)
    for number in range(refit):
        before = state.cost.sum()
        if number:  # error feedback with the levels of the previous round
            fed_back("refit")
        improved("refit", refitted(task, state, descent))
        if not state.cost.sum() < (1 - _ENOUGH) * before:
            break
    return state, errors


def _check(caller: str, problem: Problem) -> None:
    weights, hessian = np.asarray(problem.weights), np.asarray(problem.hessian)
    if weights.ndim != 2:
        raise ValueError(f"{caller}: weights of shape {weights.shape}, but [O, I] is wanted")
    outputs, inputs = weights.shape
    groups = hessian.shape[0] if hessian.ndim else 0
    stretches = hessian.shape[1] if hessian.ndim == 4 and hessian.shape[1] else 1
    size = inputs // stretches
    whole = hessian.shape[-2:] == (size, size) and size * stretches == inputs and hessian.ndim in (3, 4)
    if not whole or not groups or outputs % groups:
        raise ValueError(
            f"{caller}: moments of shape {hessian.shape} for weights of shape {weights.shape}, but "
            f"[G, {inputs}, {inputs}] is wanted, with G a divisor of {outputs}; or [G, B, {inputs}/B, {inputs}/B]"
        )
    for name, array in (("weights", weights), ("moments", hessian)):
        if not np.isfinite(array).all():
            raise ValueError(f"{caller}: {name} that are NaN or infinite, but finite values are wanted")


def _check_options(bits: int, rate: float | None) -> None:
    if rate is not None and not rate >= 0:
        raise ValueError(f"quantize: rate={rate!r}, but the price of a bit is 0 or more")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"quantize: bits={bits!r}, but a whole number from 1 to 8 is wanted")


def _ordered(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Puts moments `[G, I, I]` in the order of visit, normalises them, and raises their diagonals to at least 1e-6.

    Returns:
      The moments divided by the mean of their diagonals; `[G, I]` the inputs in descending order of their moments; and
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


def _power_means(channels: np.ndarray, scale: Any, power: int) -> np.ndarray | None:
    """Returns `[O, S]` (mean |w|^power)^(1/power) over the weights `[O, I]` that share a scale; None without scales."""
    if scale is None:
        return None
    outputs, inputs = channels.shape
    size = _run(scale, inputs)
    runs = -(-inputs // size)
    padded = np.pad(np.abs(channels).astype(np.float64), ((0, 0), (0, runs * size - inputs)))
    padded = padded.reshape(outputs, runs, size)
    largest = padded.max(axis=-1, initial=0)
    relative = padded / np.where(largest > 0, largest, 1)[..., None]
    counts = np.minimum(size, inputs - size * np.arange(runs))
    return largest * ((relative**power).sum(axis=-1) / counts) ** (1 / power)


def _run(scale: Any, inputs: int) -> int:
    """Returns how many weights of an output share a scale."""
    return min(scale.size if isinstance(scale, InputGroups) else inputs, max(inputs, 1))


def _as_stored(
    task: Task, levels: np.ndarray, factors: np.ndarray | None
) -> tuple[Task, np.ndarray, np.ndarray | None]:
    """Chooses units and format for levels `[R, K]` and factors `[O, S]`; returns the new task, and both rounded."""
    if factors is not None:
        unit = task.level_unit
        apart = level_unit(levels, factors * unit, task.codebook_format, task.dtype)
        task = task._replace(level_unit=apart, scale_unit=unit / apart)
    if isinstance(task.codebook_format, AutoQFormat):
        chosen = chosen_format(task.codebook_format, levels * task.level_unit, factors is not None)
        task = task._replace(codebook_format=chosen)
    levels = np.sort(stored_levels(task, levels), axis=1)
    return task, levels, None if factors is None else stored_scale(task, factors).reshape(-1)


def _fitted(
    task: Task, channels: np.ndarray, factors: np.ndarray | None, pivots: np.ndarray, num_levels: int, method: str,
    granularity: Any, scale: Any, keep_zero: bool,
) -> np.ndarray:  # fmt: skip
    """Returns the `[R, K]` levels of weights divided by factors.

    Squared errors are weighted by the geometric mean of the input's moment (the weight of an error by itself) and of
    its pivot (the weight after error feedback); this is better than either. For long rows a sample is fitted.
    """
    outputs, inputs = channels.shape
    order = task.places.order
    importance = np.empty(order.shape, np.float32)
    each = np.sqrt(pivots * np.einsum("gii->gi", task.hessian)).astype(np.float32)
    np.put_along_axis(importance, order, each, axis=1)
    importance = importance.reshape(-1, inputs)
    importance = np.repeat(importance, outputs // len(importance), axis=0)
    if factors is not None:
        spread = np.repeat(factors.astype(np.float32), _run(scale, inputs), axis=1)[:, :inputs]
        channels = channels / np.where(spread > 0, spread, 1)
        importance = importance * spread**2
    given = to_rows(channels, granularity), to_rows(importance, granularity), row_mask(outputs, inputs, granularity)
    rows, weights, mask = (sampled(x, inputs) for x in given)
    return np.asarray(
        fit(rows, num_levels, method, weights=weights, mask=mask, keep_zero=keep_zero, tolerance=None).levels
    )


def sampled(rows: Any, inputs: int, most: int = _SAMPLE) -> Any:
    """Samples at most `most` values of each row, `[R, n]`, in equal steps that hit inputs equally; None gives None."""
    if rows is None:
        return None
    step = -(-rows.shape[1] // most)
    while step > 1 and math.gcd(step, inputs) > 1:
        step += 1
    return rows[:, ::step]


def solution_of(task: Task, state: State, errors: dict[str, float]) -> Solution:
    """Returns a state in the units and the layout of the problem."""
    indices = channels_of(state.indices, task.places)
    levels, scale = rounded_levels(state.levels * task.level_unit, task.codebook_format, task.dtype), None
    if state.scale is not None:
        dtype = scale_dtype(task.codebook_format, task.dtype)
        scale = rounded_scale(state.scale * task.scale_unit, dtype).astype(dtype).reshape(-1, task.places.scales)
    share = np.bincount(indices.reshape(-1), minlength=1) / max(indices.size, 1)
    entropy = float(-(share[share > 0] * np.log2(share[share > 0])).sum()) + 0.0
    return Solution(levels, indices, scale, task.codebook_format, errors, entropy)
