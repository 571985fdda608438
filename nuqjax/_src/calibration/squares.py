"""Least squares by conjugate gradients: computes the best levels, or the best scales, for given indices.

Approximations ŵ = x[index] · factor are linear in x. Either x is the levels and the factors are the scales, or the
other way round. The matrix of the normal equations is never formed: a step is one product with the moments.
"""

import numpy as np


def least_squares(
    values: np.ndarray,
    index: np.ndarray,
    factors: np.ndarray,
    pull: np.ndarray,
    hessian: np.ndarray,
    *,
    systems: int,
    steps: int,
    held: np.ndarray | None = None,
) -> np.ndarray:
    """Returns values x that lower the error Σ (w − ŵ) H (w − ŵ)ᵀ of ŵ = x[index] · factors; enough steps minimise it.

    Args:
      values: `[n]` the initial x. Values that no weight uses do not change.
      index: `[G, I, P]` the number of the value that each weight uses.
      factors: `[G, I, P]` float32, broadcast.
      pull: `[G, I, P]` H (w − ŵ) for the initial values.
      hessian: `[G, I, I]` float32 moments.
      systems: the number of independent systems: consecutive stretches of the values, all of the same length.
      steps: the number of steps; in exact arithmetic as many steps as a stretch has values suffice.
      held: `[n]` bool, values that must not change.

    Returns:
      `[n]` float64, the new values.
    """
    flat = index.reshape(-1)

    def gathered(each: np.ndarray) -> np.ndarray:
        return np.bincount(flat, np.broadcast_to(factors * each, index.shape).reshape(-1), values.size)

    def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.repeat((a * b).reshape(systems, -1).sum(axis=1), values.size // systems)

    diagonal = np.einsum("gii->gi", hessian)[:, :, None]
    size = gathered(factors * diagonal)
    usable = size > 0 if held is None else (size > 0) & ~held
    inverse = np.where(usable, 1 / np.where(usable, size, 1), 0)
    values = values.astype(np.float64)
    residual = gathered(pull)
    step = inverse * residual
    slope = begin = dot(residual, step)
    for _ in range(steps):
        moved = gathered(hessian @ (step.astype(np.float32)[index] * factors))
        curvature = dot(step, moved)
        length = np.where(curvature > 0, slope / np.where(curvature > 0, curvature, 1), 0)
        values = values + length * step
        residual = residual - length * moved
        ahead = inverse * residual
        before, slope = slope, dot(residual, ahead)
        if (slope <= 1e-8 * begin).all():
            break
        step = ahead + np.where(before > 0, slope / np.where(before > 0, before, 1), 0) * step
    return values
