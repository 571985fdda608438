"""Moments of few inputs, and the weights that come closest to the float outputs with other inputs."""

import numpy as np
import pytest

from nuqjax.calibration import shrunk, target

pytestmark = pytest.mark.versionless  # NumPy's arithmetic on plain arrays


def test_moments_of_many_inputs_stay_and_those_of_few_go_to_their_diagonal():
    second = np.array([[[2.0, 1.0], [1.0, 4.0]]])
    assert shrunk(second, 10**9, 16) == pytest.approx(second + 0.03 * np.eye(2))
    wide = np.ones((1, 1000, 1000))
    assert shrunk(wide, 1, 1)[0, 0, 1] == pytest.approx(1 / 1001)


def test_they_are_positive_definite_whatever_the_sample():
    for samples in (1, 3, 40):
        x = np.random.default_rng(0).normal(size=(2, samples, 20)) * (np.arange(20) % 3 > 0)
        result = shrunk(x.transpose(0, 2, 1) @ x / samples, samples, 1)
        assert (np.linalg.eigvalsh(result) > 0).all()
        assert np.array_equal(result, result.transpose(0, 2, 1))
    assert np.array_equal(shrunk(np.zeros((1, 3, 3)), 1, 1)[0], np.eye(3))


def test_more_than_16_positions_tell_no_more():
    second = np.ones((1, 5, 5))
    assert np.array_equal(shrunk(second, 3, 16), shrunk(second, 3, 64))
    assert shrunk(second, 3, 8)[0, 0, 1] < shrunk(second, 3, 16)[0, 0, 1]


@pytest.mark.parametrize(
    ("second", "images", "message"),
    [
        (np.eye(3), 1, r"second moments of shape \(3, 3\), but \[G, I, I\] is wanted"),
        (np.full((1, 2, 2), np.nan), 1, "NaN or infinite"),
        (np.ones((1, 2, 2)), 0, "0 images at 4 positions, but 1 or more"),
    ],
)
def test_what_are_no_moments_is_named(second, images, message):
    with pytest.raises(ValueError, match=message):
        shrunk(second, images, 4)


def _paths(groups=1, stretches=1, size=6, samples=200):
    """Inputs of the float path, and of another one that differs: `[G, B, samples, size]`."""
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(groups, stretches, samples, size)) @ rng.normal(size=(size, size))
    return exact, np.maximum(exact + 0.5 * rng.normal(size=exact.shape), -1)


def _moments(left, right):
    return left.swapaxes(2, 3) @ right / left.shape[2]


@pytest.mark.parametrize(("groups", "stretches"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
def test_the_target_is_the_least_squares_solution_in_every_layout(groups, stretches):
    exact, seen = _paths(groups, stretches)
    weights = np.random.default_rng(1).normal(size=(4, stretches * 6))
    second, cross = _moments(seen, seen), _moments(exact, seen)
    flat = (lambda x: x[:, 0]) if stretches == 1 else (lambda x: x)
    made = target(weights, flat(second), flat(cross))
    parts = weights.reshape(groups, -1, stretches, 6)
    for g, o, b in np.ndindex(groups, 4 // groups, stretches):
        wanted = np.linalg.lstsq(seen[g, b], exact[g, b] @ parts[g, o, b], rcond=None)[0]
        assert made.reshape(parts.shape)[g, o, b] == pytest.approx(wanted)


def test_with_equal_paths_the_target_is_the_weights_whatever_the_ridge():
    exact, _ = _paths()
    second, weights = _moments(exact, exact)[0], np.random.default_rng(1).normal(size=(3, 6))
    for ridge in (0, 0.1, 100):
        assert target(weights, second, second, second + ridge * np.eye(6)) == pytest.approx(weights)


def test_a_ridge_draws_the_target_to_the_weights_and_no_ridge_makes_it_worse_than_they_are():
    exact, seen = _paths()
    second, cross = _moments(seen, seen)[0], _moments(exact, seen)[0]
    weights = np.random.default_rng(1).normal(size=(3, 6))
    made = [target(weights, second, cross, second + ridge * np.eye(6)) for ridge in (0, 0.1, 1, 10, 1e9)]
    errors = [np.square(exact[0, 0] @ weights.T - seen[0, 0] @ one.T).sum() for one in (*made, weights)]
    away = [np.square(one - weights).sum() for one in made]
    assert errors == sorted(errors)
    assert away == sorted(away, reverse=True)
    assert made[-1] == pytest.approx(weights)
