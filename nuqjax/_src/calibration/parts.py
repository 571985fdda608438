"""The steps of `quantize`, each alone: error feedback with given levels, and refit of a given solution."""

import numpy as np

from nuqjax._src.calibration.places import channels_of, visited
from nuqjax._src.calibration.problem import Problem, Solution
from nuqjax._src.calibration.solver import Prepared, prepared, solution_of
from nuqjax._src.calibration.stages import Task, evaluated, form_of, nearest, refitted
from nuqjax._src.calibration.sweeps import descent_matrix, feedback_matrix, sweep
from nuqjax._src.fit.methods import check_method
from nuqjax._src.leaf.rows import Granularity, Scale


def error_feedback(
    problem: Problem,
    levels: np.ndarray,
    factors: np.ndarray | None = None,
    *,
    granularity: Granularity = "tensor",
    scale: Scale = "channel",
) -> np.ndarray:
    """Chooses indices with error feedback, for levels and scales that stay as they are.

    Inputs are visited in descending order of their moments. Each weight gets the level nearest to a target, which makes
    good what the errors of the inputs before it do to the output: the method of GPTQ (Frantar et al., arXiv:2210.17323)
    and of LDLQ (Chee et al., arXiv:2307.13304), here for levels at any distances.

    Args:
      problem: the weights `[O, I]`, and the moments of what they multiply.
      levels: `[R, K]` ascending levels, K a power of two from 2 to 256; R as `granularity` says.
      factors: `[O, S]` the scales, which multiply levels; None without scales.
      granularity: which weights share a codebook, as in `nuqjax.compress`.
      scale: which weights share a factor: `"channel"` (S = 1) or `InputGroups(n)`.

    Returns:
      `[O, I]` uint8 indices.

    Raises:
      ValueError: shapes that do not match, or values that are not finite.

    >>> import numpy as np
    >>> levels = np.array([[0.0, 1.0]], np.float32)
    >>> independent = Problem(np.array([[0.4, 0.4]], np.float32), np.eye(2)[None])
    >>> error_feedback(independent, levels)
    array([[0, 0]], dtype=uint8)
    >>> alike = independent._replace(hessian=np.array([[[2.0, 1.9], [1.9, 2.0]]]))
    >>> error_feedback(alike, levels)  # the second weight makes good what the first lacks
    array([[0, 1]], dtype=uint8)
    """
    given = prepared("error_feedback", problem, granularity, scale if factors is not None else None)
    task, levels, factors = _with_values("error_feedback", given, levels, factors)
    indices, _ = sweep(task.weights, feedback_matrix(given.hessian)[0], nearest(task, levels, factors))
    return channels_of(indices, task.places)


def refit(
    problem: Problem,
    solution: Solution,
    *,
    method: str = "knq",
    granularity: Granularity = "tensor",
    scale: Scale = "channel",
    keep_zero: bool = False,
    rounds: int = 1,
) -> Solution:
    """Improves levels, then scales, then indices of a solution, in turns.

    Levels and scales are fitted by least squares for the indices at hand and rounded to their formats; coordinate
    descent then chooses indices for these levels, as LNQ does (Kim et al., arXiv:2505.07004). No step raises the error.

    Args:
      problem: the weights, and the moments of what they multiply.
      solution: what `quantize` returned, or levels, indices and scales of any other origin; `codebook_format` says
        how levels are stored.
      method: what may change, as in `quantize`: each level (`"knq"`, `"enq"`), middle and step (`"uniform"`), or the
        scales alone.
      granularity: which weights share a codebook, as in `quantize`.
      scale: which weights share a factor; without scales in the solution it does not matter.
      keep_zero: weights of exactly 0 stay 0.
      rounds: the number of turns.

    Returns:
      A `Solution`. Its `errors` are those of the given solution (`"given"`) and the last one (`"refit"`).

    Raises:
      ValueError: shapes that do not match, values that are not finite, an option out of range.

    >>> import numpy as np
    >>> problem = Problem(np.array([[0.1, 0.2, 0.9, 1.0]], np.float32), np.eye(4)[None])
    >>> given = Solution(np.array([[0.0, 1.0]], np.float32), np.array([[0, 0, 1, 1]], np.uint8), None, None, {}, 1.0)
    >>> refit(problem, given).levels.round(3)
    array([[0.15, 0.95]], dtype=float32)
    """
    check_method(method)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"refit: rounds={rounds!r}, but a whole number, 0 or more, is wanted")
    given = prepared("refit", problem, granularity, scale if solution.scale is not None else None)
    task, levels, factors = _with_values("refit", given, solution.levels, solution.scale)
    indices = np.asarray(solution.indices)
    if indices.shape != given.channels.shape or (indices.size and indices.max() >= levels.shape[1]):
        raise ValueError(
            f"refit: indices of shape {indices.shape} for weights of shape {given.channels.shape} and "
            f"{levels.shape[1]} levels; indices [O, I] below the number of levels are wanted"
        )
    held_zeros = task.weights == 0 if keep_zero else None
    task = task._replace(held_zeros=held_zeros, codebook_format=solution.codebook_format, form=form_of(method))
    state = evaluated(task, levels, factors, visited(indices.astype(np.uint8), task.places))
    errors, descent = {"given": float(state.cost.sum())}, descent_matrix(task.hessian)
    for _ in range(rounds):
        state = refitted(task, state, descent)
        errors["refit"] = float(state.cost.sum())
    squared = given.task.level_unit**2 * given.moment
    return solution_of(task, state, {stage: error * squared for stage, error in errors.items()})


def _with_values(
    caller: str, given: Prepared, levels: np.ndarray, factors: np.ndarray | None
) -> tuple[Task, np.ndarray, np.ndarray | None]:
    """Returns the task with units for these levels and scales, and both in these units."""
    levels, task, places = np.asarray(levels, np.float32), given.task, given.task.places
    outputs = len(given.channels)
    count = levels.shape[-1] if levels.ndim == 2 else 0
    if levels.shape != (places.books, count) or count not in (2, 4, 8, 16, 32, 64, 128, 256):
        raise ValueError(
            f"{caller}: levels of shape {levels.shape}, but [{places.books}, K] is wanted, with K a power of two "
            "from 2 to 256"
        )
    if not np.isfinite(levels).all() or (np.diff(levels, axis=1) < 0).any():
        raise ValueError(f"{caller}: levels that are not finite and ascending in each row")
    if factors is None:
        return task, levels / np.float32(task.level_unit), None
    factors = np.asarray(factors, np.float32)
    if factors.shape != (outputs, places.scales) or not (np.isfinite(factors) & (factors >= 0)).all():
        raise ValueError(
            f"{caller}: scales of shape {factors.shape}, but [{outputs}, {places.scales}] finite ones, 0 or more, are "
            "wanted"
        )
    unit = task.level_unit
    return task._replace(level_unit=1.0, scale_unit=unit), levels, (factors / np.float32(unit)).reshape(-1)
