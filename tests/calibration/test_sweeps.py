"""Sweeps over the inputs: error feedback and coordinate descent."""

import numpy as np
import pytest

from nuqjax._src.calibration.sweeps import descent_matrix, feedback_matrix, sweep

pytestmark = pytest.mark.versionless  # NumPy's arithmetic on plain arrays


def moments(groups, inputs, seed=0):
    x = np.random.default_rng(seed).normal(size=(groups, 3 * inputs, inputs)) + 0.5
    return x.transpose(0, 2, 1) @ x / (3 * inputs)


def whole(j, target):
    """The nearest whole number between −2 and 1."""
    index = np.clip(np.rint(target), -2, 1)
    return (index + 2).astype(np.uint8), index.astype(np.float32)


def test_the_feedback_matrix_completes_the_squares():
    hessian = moments(2, 9)
    matrix, pivots = feedback_matrix(hessian)
    error = np.random.default_rng(1).normal(size=(2, 9))
    squares = (pivots * (error + np.einsum("gji,gi->gj", matrix, error)) ** 2).sum(axis=1)
    assert squares == pytest.approx(np.einsum("gi,gij,gj->g", error, hessian, error))


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_moments_without_full_rank_have_a_finite_feedback_matrix(rank):
    x = np.random.default_rng(0).normal(size=(1, rank, 9))
    matrix, pivots = feedback_matrix(x.transpose(0, 2, 1) @ x)
    assert np.isfinite(matrix).all()
    assert (pivots > 0).all()


@pytest.mark.parametrize(("groups", "inputs"), [(1, 150), (3, 20)])
def test_blocks_change_nothing(groups, inputs):
    """Beside GPTQ as it was published, by the inverse of the moments, and one weight after another."""
    hessian = moments(groups, inputs)
    weights = np.random.default_rng(2).normal(size=(groups, inputs, 4))
    indices, errors = sweep(weights.astype(np.float32), feedback_matrix(hessian)[0], whole)
    for group in range(groups):
        upper = np.linalg.cholesky(np.linalg.inv(hessian[group])).T
        left = weights[group].copy()
        for j in range(inputs):
            index, value = whole(j, left[j])
            assert np.array_equal(indices[group, j], index)
            left[j:] -= np.outer(upper[j, j:], (left[j] - value) / upper[j, j])
    assert errors == pytest.approx(weights - (indices - 2.0), abs=1e-5)


def test_coordinate_descent_never_raises_the_error_and_ends_where_no_change_helps():
    hessian = moments(1, 70)
    weights = np.random.default_rng(3).normal(size=(1, 70, 5)).astype(np.float32)
    matrix = descent_matrix(hessian)
    indices, errors = sweep(weights, None, whole)
    cost = lambda e: np.einsum("gip,gij,gjp->p", e, hessian, e)  # noqa: E731
    for _ in range(20):
        before, (indices, errors) = (indices, cost(errors)), sweep(weights, matrix, whole, errors)
        assert (cost(errors) <= before[1] * (1 + 1e-5)).all()
    assert np.array_equal(indices, before[0])
    for step in (-1.0, 1.0):
        for j in range(70):
            other = errors.copy()
            other[:, j] += step
            allowed = (np.abs(weights[:, j] - other[:, j] + 0.5) <= 1.5)[0]
            assert (cost(other)[allowed] >= cost(errors)[allowed] * (1 - 1e-5)).all()
