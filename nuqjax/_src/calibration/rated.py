"""Indices for entropy-coded files: minimises error and code length together (ECSQ with error feedback).

A coder uses −log2 p bits for an index that a share p of the weights has. Levels are at equal distances, many of them
rarely used, and an index moves to a likelier level wherever the error costs less than the bits save
(*entropy-constrained scalar quantization*).
"""

import math

import numpy as np

from nuqjax._src.calibration.stages import Prices, State, Task, evaluated, nearest, scale_of, with_better_values
from nuqjax._src.calibration.sweeps import descent_matrix, sweep

_ENOUGH = 1e-3  # another round follows only if this one lowers the sum by more than this share


def entropy_bits(indices: np.ndarray, num_levels: int) -> tuple[np.ndarray, float]:
    """Returns the `[K]` bits of each index in an optimal code, and the total bits of all indices.

    An unused index has a price, too: that of half an occurrence.
    """
    counts = np.bincount(indices.reshape(-1), minlength=num_levels).astype(np.float64)
    total = max(indices.size, 1)
    bits = -np.log2(np.maximum(counts, 0.5) / total)
    return bits, float((counts * bits).sum())


def equal_steps(task: Task, factors: np.ndarray | None, pivots: np.ndarray, num_levels: int, rate: float) -> np.ndarray:
    """Returns `[R, K]` levels at equal distances, one of them 0, for weights divided by factors `[O, S]`.

    The step is such that a slightly finer one would add as much to the price of the bits as it takes off the error.
    """
    largest, size = float(np.abs(task.weights).max(initial=0)), 1.0
    if factors is not None and factors.size:
        alive = np.where(factors > 0, factors, 1).astype(np.float32)
        size = float(np.square(factors).mean())
        largest = float(np.abs(task.weights / alive.reshape(-1)[scale_of(task.places)]).max(initial=0))
    weight = max(float(pivots.mean()) * size, 1e-30)
    step = min(max(math.sqrt(6 * rate / (math.log(2) * weight)), 2 * largest / num_levels), 4 * largest)
    levels = (np.arange(num_levels) - num_levels // 2) * (step or 1.0)
    return np.tile(levels, (task.places.books, 1))


def _total(state: State, rate: float) -> float:
    return float(state.cost.sum()) + rate * entropy_bits(state.indices, state.levels.shape[1])[1]


def _prices(state: State, squares: np.ndarray, rate: float) -> Prices:
    return Prices((rate * entropy_bits(state.indices, state.levels.shape[1])[0]).astype(np.float32), squares)


def rated_stages(
    task: Task, levels: np.ndarray, scale: np.ndarray | None, matrix: np.ndarray | None, pivots: np.ndarray, *,
    rate: float, refit: int,
) -> tuple[State, dict[str, float]]:  # fmt: skip
    """Runs the stages that lower error + `rate` · bits; returns the solution, and that sum after each stage.

    Args:
      task: the problem.
      levels: `[R, K]` initial levels.
      scale: `[O · S]` initial scales, or None.
      matrix: the matrix of error feedback; None for no feedback.
      pivots: `[G, I]` the weights of squared distances from the targets of error feedback.
      rate: the price of a bit in units of the error.
      refit: the largest number of refit rounds.
    """
    state = evaluated(task, levels, scale, sweep(task.weights, None, nearest(task, levels, scale))[0])
    sums = {"nearest": _total(state, rate)}

    def improved(stage: str, other: State) -> None:
        nonlocal state
        if _total(other, rate) < min(sums.values()):
            state, sums[stage] = other, _total(other, rate)

    choose = nearest(task, levels, scale, _prices(state, pivots, rate))
    improved("feedback", evaluated(task, levels, scale, sweep(task.weights, matrix, choose)[0]))
    descent, diagonal = descent_matrix(task.hessian), np.einsum("gii->gi", task.hessian)
    for _ in range(refit):
        before = min(sums.values())
        improved("refit", with_better_values(task, state))
        choose = nearest(task, state.levels, state.scale, _prices(state, diagonal, rate))
        indices, _ = sweep(task.weights, descent, choose, state.errors)
        improved("refit", evaluated(task, state.levels, state.scale, indices))
        if not min(sums.values()) < (1 - _ENOUGH) * before:
            break
    return state, sums
