"""Error feedback and refit, each alone: laws of plain arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from nuqjax import ChannelGroups, InputGroups, QFormat
from nuqjax._src.leaf.codebook_array import dense_on_host
from nuqjax.calibration import Problem, Solution, error_feedback, quantize, refit
from tests.calibration.test_solver import drawn, leaf_of, output_error

pytestmark = pytest.mark.versionless  # NumPy's arithmetic on plain arrays

LAYOUTS = [
    ("tensor", None),
    ("tensor", "channel"),
    ("channel", None),
    (ChannelGroups(4), "channel"),
    (InputGroups(5), None),
    ("tensor", InputGroups(4)),
    ("channel", InputGroups(5)),
]


def dense(problem, levels, indices, scale, granularity, shares):
    """The weights that levels, indices and scales stand for."""
    bits = int(levels.shape[1]).bit_length() - 1
    leaf = leaf_of(problem, Solution(levels, indices, scale, None, {}, 0.0), bits, granularity, shares)
    return dense_on_host(leaf).astype(np.float64)


@pytest.mark.parametrize(("granularity", "scale"), LAYOUTS)
def test_of_independent_inputs_feedback_is_the_nearest_level(granularity, scale):
    problem = drawn(8, 20)
    problem = problem._replace(hessian=np.eye(20)[None] * np.linspace(1, 3, 20))
    begun = quantize(problem, bits=3, granularity=granularity, scale=scale, feedback=False, refit=0)
    found = error_feedback(problem, begun.levels, begun.scale, granularity=granularity, scale=scale or "channel")
    np.testing.assert_array_equal(found, begun.indices)


@pytest.mark.parametrize(("granularity", "scale"), LAYOUTS)
def test_quantize_takes_feedback_where_it_is_better_than_the_nearest_level(granularity, scale):
    problem = drawn(8, 20, seed=1)
    options = {"granularity": granularity, "scale": scale}
    plain, fed = (quantize(problem, bits=2, feedback=way, refit=0, **options) for way in (False, True))
    levels, factors = fed.levels, fed.scale
    alone = error_feedback(problem, levels, factors, **options | {"scale": scale or "channel"})
    if np.array_equal(plain.levels, levels):
        rows = (fed.indices == alone).all(axis=1) | (fed.indices == plain.indices).all(axis=1)
        assert rows.all()
    error = output_error(problem, dense(problem, levels, alone, factors, granularity, scale))
    assert fed.errors["feedback"] <= error * (1 + 1e-5)
    assert error < plain.errors["nearest"]


@pytest.mark.parametrize("codebook_format", [None, jnp.float16, QFormat(8, 9)])
@pytest.mark.parametrize(("granularity", "scale"), LAYOUTS)
def test_refit_never_raises_the_error_and_tells_it(granularity, scale, codebook_format):
    problem = drawn(8, 20, seed=2)
    options = {"granularity": granularity, "scale": scale}
    begun = quantize(problem, bits=2, feedback=False, refit=0, codebook_format=codebook_format, **options)
    again = refit(problem, begun, rounds=3, **options | {"scale": scale or "channel"})
    assert again.errors["given"] == pytest.approx(begun.errors["nearest"], rel=1e-5)
    assert again.errors["refit"] < again.errors["given"]
    leaf = leaf_of(problem, again, 2, granularity, scale)
    assert output_error(problem, dense_on_host(leaf).astype(np.float64)) == pytest.approx(
        again.errors["refit"], rel=1e-4
    )


@pytest.mark.parametrize("bits", [1, 2])
def test_levels_of_a_refit_solve_the_normal_equations(bits):
    problem = drawn(6, 15, seed=3)
    given = quantize(problem, bits=bits, scale=None, feedback=False, refit=0)
    chosen = np.eye(2**bits)[given.indices]  # [O, I, K]
    hessian = problem.hessian[0]
    matrix = np.einsum("oik,ij,ojl->kl", chosen, hessian, chosen)
    wanted = np.linalg.solve(matrix, np.einsum("oik,ij,oj->k", chosen, hessian, problem.weights.astype(np.float64)))
    found = refit(problem, given)
    np.testing.assert_allclose(found.levels[0], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_pruned_weights_stay_pruned_and_zero_rounds_change_nothing():
    problem = drawn(6, 15, seed=4)
    weights = np.where(np.arange(15) % 4 == 0, 0, problem.weights).astype(np.float32)
    problem = problem._replace(weights=weights)
    given = quantize(problem, bits=3, feedback=False, refit=0, keep_zero=True)
    same, other = (refit(problem, given, rounds=n, keep_zero=True) for n in (0, 2))
    for name in ("levels", "indices", "scale"):
        np.testing.assert_array_equal(getattr(same, name), getattr(given, name))
    assert (np.take(other.levels[0], other.indices)[weights == 0] == 0).all()


PROBLEM = Problem(np.ones((4, 6), np.float32), np.eye(6)[None])
LEVELS = np.array([[0.0, 1.0]], np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: error_feedback(PROBLEM, LEVELS[0]), r"error_feedback: levels of shape \(2,\), but \[1, K\]"),
        (lambda: error_feedback(PROBLEM, np.ones((1, 3))), "a power of two from 2 to 256"),
        (lambda: error_feedback(PROBLEM, LEVELS[:, ::-1]), "error_feedback: levels that are not finite and ascending"),
        (lambda: error_feedback(PROBLEM, LEVELS, np.ones(4)), r"scales of shape \(4,\), but \[4, 1\] finite ones"),
        (lambda: error_feedback(PROBLEM, LEVELS, -np.ones((4, 1))), "finite ones, 0 or more, are wanted"),
        (
            lambda: error_feedback(PROBLEM._replace(hessian=np.eye(5)[None]), LEVELS),
            r"error_feedback: moments of shape \(1, 5, 5\)",
        ),
        (
            lambda: error_feedback(PROBLEM._replace(weights=np.full((4, 6), np.nan)), LEVELS),
            "error_feedback: weights that",
        ),
        (
            lambda: refit(PROBLEM, Solution(LEVELS, np.full((4, 6), 2), None, None, {}, 0.0)),
            r"refit: indices of shape \(4, 6\) for weights of shape \(4, 6\) and 2 levels",
        ),
        (
            lambda: refit(PROBLEM, Solution(LEVELS, np.zeros((4, 6)), None, None, {}, 0.0), rounds=-1),
            "refit: rounds=-1, but a whole number, 0 or more",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
