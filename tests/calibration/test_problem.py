"""Moments of few inputs."""

import numpy as np
import pytest

from nuqjax.calibration import shrunk

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
