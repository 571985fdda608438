"""Least squares by conjugate gradients: the levels, or the scales, that are best for given indices.

Approximations ŵ = x[slot] · factor are linear in x, be it the levels (with the scales as factors) or the scales (with
the levels). The normal equations are never written down: a step is one product with the moments.
"""

import numpy as np


def least_squares(
    values: np.ndarray,
    slots: np.ndarray,
    factors: np.ndarray,
    pull: np.ndarray,
    hessian: np.ndarray,
    *,
    systems: int,
    steps: int,
    held: np.ndarray | None = None,
) -> np.ndarray:
    """Values x with a lower error Σ (w − ŵ) H (w − ŵ)ᵀ, of ŵ = x[slots] · factors; after enough steps the least.

    Args:
      values: `[n]` x to begin with. One that nothing uses stays as it is.
      slots: `[G, I, P]` which of the values each weight uses.
      factors: `[G, I, P]` float32, broadcast.
      pull: `[G, I, P]` H (w − ŵ) at the beginning.
      hessian: `[G, I, I]` float32.
      systems: how many stretches of the values, all of one length, have nothing to do with one another.
      steps: of the method; in exact arithmetic as many as a stretch has values are enough.
      held: `[n]` bool, values that stay as they are.

    Returns:
      `[n]` float64.
    """
    flat = slots.reshape(-1)

    def gathered(each: np.ndarray) -> np.ndarray:
        return np.bincount(flat, np.broadcast_to(factors * each, slots.shape).reshape(-1), values.size)

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
        moved = gathered(hessian @ (step.astype(np.float32)[slots] * factors))
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
