"""ENQ against a NumPy float64 description of it, with the error that its integer sums are allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuqjax._src.fit.enq import fit_enq
from nuqjax._src.platform.host import x64

jit_enq = jax.jit(fit_enq, static_argnames=("num_levels", "keep_zero"))
N = 48


def described(row, num_levels: int, weights=None) -> tuple[np.ndarray, np.ndarray]:
    """`[K]` ENQ levels of a row in float64, and how far from them the library's may be."""
    row = row.astype(np.float64)
    weights = np.ones(row.shape) if weights is None else weights.astype(np.float64)
    row, weights = row[weights > 0], weights[weights > 0]
    low, width = row.min(), np.ptp(row)
    place = (row - low) / (width or 1) * num_levels
    interval = np.minimum(place.astype(int), num_levels - 1)
    levels, slack = low + (np.arange(num_levels) + 0.5) / num_levels * width, np.zeros(num_levels)
    for k in np.unique(interval):
        share = weights[interval == k] / weights[interval == k].max()
        levels[k] = (row[interval == k] * share).sum() / share.sum()
        # Each share and each share·place is rounded to 2^-31, by at most half of that.
        slack[k] = share.size / share.sum() * 2.0**-31 * width / num_levels
    # Then one rounding to float32, and some in float64 of numbers no larger than the ends of the range.
    ends = max(abs(low), abs(low + width), width)
    # Subnormal numbers count as zero.
    return levels, slack + np.abs(levels) * 2.0**-24 + ends * 2.0**-48 + np.finfo(np.float32).tiny


def assert_described(levels, rows, num_levels, weights=None):
    assert np.array_equal(fit_enq(rows, num_levels, weights=weights).levels, levels)  # by NumPy
    levels = np.asarray(levels, np.float64)
    for r, row in enumerate(rows):
        wanted, slack = described(row, num_levels, None if weights is None else weights[r])
        assert (np.abs(levels[r] - wanted) <= slack).all(), (levels[r], wanted, slack)
        assert (np.diff(levels[r]) >= 0).all()


# Values that fall on the intervals' ends often, and values that do not.
values = st.one_of(st.integers(-16, 16).map(float), st.floats(-100, 100, width=32, allow_subnormal=False))
rows_of_values = st.lists(values, min_size=N, max_size=N).map(lambda row: np.float32([row]))


@pytest.mark.parametrize("num_levels", [1, 7, 16])
@given(rows=rows_of_values)
def test_intervals_and_means_are_as_described(num_levels, rows):
    fitted = jit_enq(rows, num_levels)
    assert_described(fitted.levels, rows, num_levels)
    assert fitted.lower_bound.tolist() == [0]


@given(rows=rows_of_values, exponents=st.lists(st.integers(-40, 40), min_size=N, max_size=N))
def test_weighted_means_however_unequal_the_weights(rows, exponents):
    weights = np.float32([np.ldexp(np.linspace(1, 2, N), exponents)])
    assert_described(jit_enq(rows, 7, weights=weights).levels, rows, 7, weights)


@pytest.mark.parametrize("shift", [0, 1e4, -1e4])
@pytest.mark.parametrize("num_levels", [16, 256])
def test_large_rows(shift, num_levels):
    rows = (np.random.default_rng(0).normal(size=(2, 20000)) + shift).astype(np.float32)
    assert_described(jit_enq(rows, num_levels).levels, rows, num_levels)


def test_an_empty_interval_is_represented_by_its_midpoint():
    rows = np.float32([[0, 0.5, 7.5, 8]])
    assert jit_enq(rows, 8).levels.tolist() == [[0.25, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.75]]


def test_a_value_on_an_inner_end_belongs_to_the_interval_above():
    rows = np.float32([[0, 1, 2, 3, 4]])
    assert jit_enq(rows, 4).levels.tolist() == [[0, 1, 2, 3.5]]


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-30, 3e38])
def test_a_constant_row_gives_that_constant(value):
    rows = np.full((1, 5), value, np.float32)
    fitted = jit_enq(rows, 4)
    assert fitted.levels.tolist() == [[float(np.float32(value))] * 4]
    assert fitted.sse.tolist() == [0]


def test_the_widest_range_of_float32():
    largest = np.finfo(np.float32).max
    rows = np.float32([[-largest, -1, 0, 1, largest]])
    assert jit_enq(rows, 3).levels.tolist() == [[-float(largest), 0, float(largest)]]


def test_float64_rows():
    rows = np.random.default_rng(1).normal(size=(2, 500))
    with x64():
        fitted = jit_enq(rows, 16)
        assert fitted.levels.dtype == jnp.float64
        assert_described(fitted.levels, rows, 16)


def test_masks_and_weights_of_numpy_are_not_changed():
    mask, weights = np.array([[True, True, False, True]]), np.float32([[1, 0, 1, 2]])
    mask_before, weights_before = mask.copy(), weights.copy()
    rows = jnp.float32([[0.0, 9, 99, 3]])
    assert fit_enq(rows, 1, weights=weights, mask=mask).levels.tolist() == [[2]]
    np.testing.assert_array_equal(mask, mask_before)
    np.testing.assert_array_equal(weights, weights_before)


def test_nasty_rows_have_the_same_levels_traced_and_on_the_host():
    """Subnormal values, the ends of float32, values on inner ends, zeros of both signs, very unequal weights."""
    rng, tiny = np.random.default_rng(3), float(np.finfo(np.float32).tiny)
    row, steps = rng.normal(size=N), np.arange(N) - N // 2
    rows = [
        row * tiny, row * tiny / 1000, np.clip(row, -1, 1) * 3.4e38, steps / 4, steps * np.float32(0.3),
        np.copysign(0.0, row), row + 1000, rng.standard_cauchy(N), np.where(row > 1, 3e38, tiny),
    ]  # fmt: skip
    weights = rng.choice([0, 1e-30, 0.5, 1, 3e10], size=(1, N)).astype(np.float32)
    for row in np.float32(rows):
        for some in (None, weights):
            same = fit_enq(row[None], 7, weights=some)
            np.testing.assert_array_equal(same.levels, jit_enq(row[None], 7, weights=some).levels)
