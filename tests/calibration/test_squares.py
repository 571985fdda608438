"""Least squares by conjugate gradients."""

import numpy as np
import pytest

from nuqjax._src.calibration.squares import least_squares

pytestmark = pytest.mark.versionless  # NumPy's arithmetic on plain arrays


def drawn(groups, inputs, outputs, index, seed=0):
    random = np.random.default_rng(seed)
    root = random.normal(size=(groups, inputs, inputs))
    return (
        random.normal(size=(groups, inputs, outputs)).astype(np.float32),
        (root @ root.transpose(0, 2, 1)).astype(np.float32),
        random.integers(0, index, (groups, inputs, outputs)),
        random.uniform(0.5, 2, (groups, 1, outputs)).astype(np.float32),
    )


def normal_equations(weights, hessian, index, factors, count):
    use = np.eye(count)[index] * factors[..., None]
    matrix = np.einsum("gipk,gij,gjpl->kl", use, hessian, use)
    return np.linalg.solve(matrix, np.einsum("gipk,gij,gjp->k", use, hessian, weights))


@pytest.mark.parametrize("groups", [1, 5])
def test_after_enough_steps_the_normal_equations_are_solved(groups):
    weights, hessian, index, factors = drawn(groups, 6, 9, 4)
    begin = np.linspace(-1, 1, 4)
    pull = hessian @ (weights - begin[index] * factors).astype(np.float32)
    found = least_squares(begin, index, factors, pull, hessian, systems=1, steps=8)
    assert found == pytest.approx(normal_equations(weights, hessian, index, factors, 4), rel=1e-3, abs=1e-4)


def test_systems_are_solved_as_if_each_were_alone():
    weights, hessian, index, factors = drawn(1, 8, 6, 3)
    own = index + 3 * np.arange(6)
    begin = np.zeros(18)
    together = least_squares(begin, own, factors, hessian @ weights, hessian, systems=6, steps=3)
    for output in range(6):
        only = slice(output, output + 1)
        alone = normal_equations(weights[..., only], hessian, index[..., only], factors[..., only], 3)
        assert together[3 * output : 3 * output + 3] == pytest.approx(alone, rel=2e-3, abs=2e-3)


def test_no_step_raises_the_error():
    weights, hessian, index, factors = drawn(2, 12, 10, 8)
    begin = np.linspace(-2, 2, 8)
    pull = hessian @ (weights - begin[index] * factors).astype(np.float32)
    errors = []
    for steps in range(8):
        found = least_squares(begin, index, factors, pull, hessian, systems=1, steps=steps)
        error = weights - found[index] * factors
        errors.append(np.einsum("gip,gij,gjp->", error, hessian, error))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_values_that_are_held_or_that_nothing_uses_stay():
    weights, hessian, index, factors = drawn(1, 6, 9, 3)
    begin = np.array([-1.0, 0.0, 1.0, 5.0])
    held = np.array([False, True, False, False])
    pull = hessian @ (weights - begin[index] * factors).astype(np.float32)
    found = least_squares(begin, index, factors, pull, hessian, systems=1, steps=4, held=held)
    assert found[1] == 0
    assert found[3] == 5
    assert (found[[0, 2]] != begin[[0, 2]]).all()
