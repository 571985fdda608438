"""Chooses indices one input after another, taking into account the errors of the other inputs.

The error of a layer is e H eᵀ with e = w − ŵ. In each single ŵ_j it is quadratic, with its minimum at
ŵ_j = w_j + Σ_{i≠j} e_i H_ij/H_jj; choosing the level nearest to it never raises the error (*coordinate descent*).
Let H = L D Lᵀ with ones on the diagonal of L and zeros below it. Then the error is Σ D_j (e_j + Σ_{i<j} e_i L_ij)².
Visiting the inputs in order, the level nearest to w_j + Σ_{i<j} e_i L_ij minimises term j, given the errors before it
(*error feedback*, as in GPTQ and LDLQ). In both cases the target has the form w_j + Σ_i M_ji e_i.
"""

from collections.abc import Callable

import numpy as np

Choice = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]

_BLOCK = 64  # inputs in a block; one matrix product adds the effect of errors known before it to all its targets


def feedback_matrix(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns M and D of error feedback for `[G, I, I]` positive definite moments.

    M is `[G, I, I]` float32 and strictly lower triangular, D is `[G, I]` float64. Moments that are not positive
    definite because of rounding are damped until they are.
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
    """Returns M of coordinate descent, `[G, I, I]` float32, zero on the diagonal."""
    diagonal = np.einsum("gii->gi", hessian)
    matrix = (hessian / diagonal[:, :, None]).astype(np.float32)
    np.einsum("gii->gi", matrix)[:] = 0
    return matrix


def sweep(
    weights: np.ndarray, matrix: np.ndarray | None, choose: Choice, errors: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses an index for each weight, one input after another, given the current errors of the others.

    Args:
      weights: `[G, I, P]` float32.
      matrix: M, `[G, I, I]` float32, strictly lower triangular if no errors are given; None ignores errors.
      choose: `choose(j, targets [G, P])` returns indices and values for input j.
      errors: `[G, I, P]` w − ŵ before the sweep; None if there are no indices yet.

    Returns:
      `[G, I, P]` uint8 indices, and the errors w − ŵ after the sweep.
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
