"""Indices chosen one input after another, each with an eye to the errors that the others leave.

The error of a layer, e H eᵀ with e = w − ŵ, is a square in each single ŵ_j, least at ŵ_j = w_j + Σ_{i≠j} e_i H_ij/H_jj:
the level nearest to that lowers it (*coordinate descent*). With H = L D Lᵀ, L having ones on the diagonal and zeros
below, the error is Σ D_j (e_j + Σ_{i<j} e_i L_ij)²: of one input after another, the level nearest to w_j + Σ_{i<j} e_i
L_ij is the best that the errors before it allow (*error feedback*, GPTQ's or LDLQ's). Both visit w_j + Σ_i M_ji e_i.
"""

from collections.abc import Callable

import numpy as np

Choice = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]

_BLOCK = 64  # inputs whose effect on those after the block is one product of matrices


def feedback_matrix(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M, strictly lower, and D of error feedback for `[G, I, I]` positive definite moments: float32, `[G, I]` float64.

    Moments that rounding keeps from being positive definite are damped until they are.
    """
    backwards = np.asarray(hessian, np.float64)[:, ::-1, ::-1]
    diagonal = np.einsum("gii->gi", backwards)
    damping = 1e-8 * max(float(diagonal.mean()), np.finfo(np.float64).tiny) if diagonal.size else 0.0
    while True:
        try:
            factor = np.linalg.cholesky(backwards)
            break
        except np.linalg.LinAlgError:
            backwards = backwards + damping * np.eye(backwards.shape[-1])
            damping *= 10
    upper = factor[:, ::-1, ::-1]  # H = U Uᵀ
    pivots = np.einsum("gii->gi", upper)
    lower = (upper / pivots[:, None, :]).transpose(0, 2, 1).astype(np.float32)
    np.einsum("gii->gi", lower)[:] = 0
    return np.ascontiguousarray(lower), pivots**2


def descent_matrix(hessian: np.ndarray) -> np.ndarray:
    """M of coordinate descent: `[G, I, I]` float32, zero on the diagonal."""
    diagonal = np.einsum("gii->gi", hessian)
    matrix = (hessian / diagonal[:, :, None]).astype(np.float32)
    np.einsum("gii->gi", matrix)[:] = 0
    return matrix


def sweep(
    weights: np.ndarray, matrix: np.ndarray | None, choose: Choice, errors: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses an index for each weight, one input after another, given the errors of the others at that time.

    Args:
      weights: `[G, I, P]` float32.
      matrix: M, `[G, I, I]` float32, strictly lower if no errors are given; None: errors do not matter.
      choose: `choose(j, targets [G, P])` gives indices and values for input j.
      errors: `[G, I, P]` w − ŵ before; None: there are none yet.

    Returns:
      `[G, I, P]` uint8 indices, and the errors w − ŵ after.
    """
    inputs = weights.shape[1]
    first = errors is None
    errors = np.zeros_like(weights) if errors is None else errors.copy()
    indices = np.empty(weights.shape, np.uint8)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        known = start if first else inputs
        targets = weights[:, start:stop]
        if matrix is not None:
            targets = targets + matrix[:, start:stop, :known] @ errors[:, :known]
        changes = np.zeros_like(targets)
        for place in range(stop - start):
            j = start + place
            target = targets[:, place]
            if matrix is not None and place:
                target = target + (matrix[:, j : j + 1, start:j] @ changes[:, :place])[:, 0]
            indices[:, j], values = choose(j, target)
            changes[:, place] = weights[:, j] - values - errors[:, j]
        errors[:, start:stop] += changes
    return indices, errors
