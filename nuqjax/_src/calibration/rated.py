"""Indices for entropy-coded files: of least error and code length together (ECSQ with error feedback).

A coder takes −log2 p bits for an index of which a share p of the weights is made. Many levels at equal distances, most
of them rare, and indices that go to a likelier level wherever it costs less than it saves, take half a bit a weight
less than as many levels as bits allow, at the same error (*entropy-constrained scalar quantization*).
"""

import math

import numpy as np

from nuqjax._src.calibration.stages import Prices, State, Task, evaluated, nearest, scale_of, with_better_values
from nuqjax._src.calibration.sweeps import descent_matrix, sweep

_ENOUGH = 1e-3  # the share of the sum that a round must take off for another one to follow


def entropy_bits(indices: np.ndarray, num_levels: int) -> tuple[np.ndarray, float]:
    """`[K]` the bits of each index in a code made for them, and those of all together.

    An index that is not used has a price, too: as if it were used half a time.
    """
    counts = np.bincount(indices.reshape(-1), minlength=num_levels).astype(np.float64)
    total = max(indices.size, 1)
    bits = -np.log2(np.maximum(counts, 0.5) / total)
    return bits, float((counts * bits).sum())


def equal_steps(task: Task, factors: np.ndarray | None, pivots: np.ndarray, num_levels: int, rate: float) -> np.ndarray:
    """`[R, K]` levels at equal distances, one of them 0, for weights divided by factors `[O, S]`.

    Their steps are such that another bit a weight would take off the error just what it costs.
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
    """The solution of least error + `rate` · bits that the stages come to, and that sum after each.

    Args:
      task: the problem.
      levels: `[R, K]` to begin with.
      scale: `[O · S]` to begin with.
      matrix: of error feedback; None: without.
      pivots: `[G, I]` what the squared distances from targets of error feedback count.
      rate: what a bit costs.
      refit: how many rounds of refit at most.
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
