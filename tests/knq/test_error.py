"""The error of the nearest levels, against all differences; a row's sum does not depend on the rows beside it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax._src.knq.run.error import nearest_errors


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_nearest_of_all_levels(number, length, num_levels, seed):
    generator = np.random.default_rng(seed)
    values = np.sort(generator.standard_t(3, (number, length)), axis=1)
    weight = np.where(generator.uniform(size=values.shape) < 0.2, 0.0, generator.exponential(size=values.shape))
    levels = np.sort(generator.choice(np.append(values.ravel(), [0.0, 7.0]), (number, num_levels)), axis=1)
    found = nearest_errors(values, weight, levels)
    expected = np.sum(weight * np.min(np.abs(values[:, :, None] - levels[:, None]), axis=2) ** 2, axis=1)
    np.testing.assert_allclose(found, expected, rtol=length * 2.0**-52)
    alone = [nearest_errors(values[r : r + 1], weight[r : r + 1], levels[r : r + 1])[0] for r in range(number)]
    np.testing.assert_array_equal(found, alone)


def test_rows_whose_values_are_levels_have_no_error():
    values = np.array([[1.0, 2.0, 2.0, 5.0]])
    assert nearest_errors(values, np.full((1, 4), 3.0), np.array([[1.0, 2.0, 5.0, 5.0]])).tolist() == [0.0]
