"""Laws of the optimum that need no oracle, on rows long enough for every stage of KNQ."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax import fit

N = 3000  # one length, so that few programs are compiled
TOLERANCE = 1e-6
FAMILIES = {
    "normal": lambda generator: generator.standard_normal(N),
    "t3": lambda generator: generator.standard_t(3, N),
    "uniform": lambda generator: generator.uniform(-1, 1, N),
    "lattice": lambda generator: np.round(generator.laplace(size=N) * 64) / 64,
    "far apart": lambda generator: generator.standard_normal(N) + generator.choice([-1000, 1000], N),
}
seeds = st.integers(0, 2**32 - 1)
some_rows = st.builds(
    lambda family, seed: FAMILIES[family](np.random.default_rng(seed)).astype(np.float32),
    st.sampled_from(sorted(FAMILIES)),
    seeds,
)
some_levels = st.sampled_from([2, 5, 16, 64])
few = settings(max_examples=8)


def fitted(row, num_levels, weights=None):
    return fit(row[None], num_levels, weights=None if weights is None else weights[None], tolerance=TOLERANCE)


def error(row, levels, weights=None):
    """Of the nearest levels, in float64."""
    levels = np.sort(np.asarray(levels, np.float64))
    row = row.astype(np.float64)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, row)]
    return float(np.sum((row - nearest) ** 2 * (1 if weights is None else weights)))


def rounding(row, weights=None):
    """What rounding levels to float32 adds at most: (2⁻²⁴ · the largest magnitude)² for each value."""
    total = len(row) if weights is None else weights.sum()
    return float(total) * (2.0**-24 * float(np.abs(row).max())) ** 2


@few
@given(some_rows, some_levels, seeds, st.booleans())
def test_order_and_powers_of_two_change_no_bit(row, num_levels, seed, weighted):
    generator = np.random.default_rng(seed)
    weights = generator.integers(1, 9, N).astype(np.float32) if weighted else None
    order, factor = generator.permutation(N), np.float32(2.0 ** generator.integers(-40, 41))
    one = fitted(row, num_levels, weights)
    for other, unit in (
        (fitted(row[order], num_levels, None if weights is None else weights[order]), np.float32(1)),
        (fitted(row * factor, num_levels, weights), factor),
    ):
        np.testing.assert_array_equal(np.asarray(other.levels), np.asarray(one.levels) * unit)
        np.testing.assert_array_equal(np.asarray(other.scale), np.asarray(one.scale) * unit)
        np.testing.assert_allclose(other.sse, one.sse, rtol=2.0**-23)


@few
@given(some_rows)
def test_more_levels_are_never_worse(row):
    errors = [error(row, fitted(row, num_levels).levels[0]) for num_levels in (1, 2, 3, 4, 8, 15, 16, 17, 64)]
    for fewer, more in itertools.pairwise(errors):
        assert more <= fewer * (1 + TOLERANCE) + rounding(row)


@few
@given(some_rows, some_levels, seeds, st.booleans())
def test_lloyds_iteration_from_any_start_is_never_better(row, num_levels, seed, weighted):
    generator = np.random.default_rng(seed)
    weights = generator.exponential(size=N).astype(np.float32) if weighted else np.ones(N, np.float32)
    result = fitted(row, num_levels, weights)
    found, bound = error(row, result.levels[0], weights), float(result.lower_bound[0]) * float(result.scale[0]) ** 2
    values, heavy = row.astype(np.float64), weights.astype(np.float64)
    for start in range(3):
        # Drawn from the values, drawn from the range, and the fit itself.
        levels = [
            generator.choice(values, num_levels, replace=False),
            generator.uniform(values.min(), values.max(), num_levels),
            np.asarray(result.levels[0], np.float64),
        ][start]
        for _ in range(30):
            levels = np.sort(levels)
            cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
            mass = np.bincount(cell, heavy, num_levels)
            moment = np.bincount(cell, heavy * values, num_levels)
            levels = np.where(mass > 0, moment / np.where(mass > 0, mass, 1), levels)
        theirs = error(row, levels, weights)
        assert found <= theirs * (1 + TOLERANCE) + rounding(row, weights)
        assert bound <= theirs * (1 + 2.0**-22)  # the bound is returned as float32


@few
@given(some_rows, some_levels, seeds)
def test_duplicates_are_weights(row, num_levels, seed):
    """The row as it is, against its first third with how often each value is to count."""
    short = row[: N // 3]
    times = np.random.default_rng(seed).multinomial(N - N // 3, np.full(N // 3, 3 / N)) + 1
    repeated = np.repeat(short, times)
    weights = np.zeros(N, np.float32)
    weights[: N // 3] = times
    padded = np.concatenate([short, row[N // 3 :]])  # those of weight zero do not count
    one, other = fitted(repeated, num_levels), fitted(padded, num_levels, weights)
    first, second = (error(repeated, result.levels[0]) for result in (one, other))
    assert abs(first - second) <= TOLERANCE * max(first, second) + rounding(repeated)
    np.testing.assert_allclose(one.sse * one.scale**2, other.sse * other.scale**2, rtol=2e-6, atol=rounding(repeated))


@few
@given(some_rows, some_levels, seeds)
def test_a_value_of_weight_zero_changes_nothing(row, num_levels, seed):
    generator = np.random.default_rng(seed)
    weights = np.where(generator.uniform(size=N) < 0.3, 0, generator.exponential(size=N)).astype(np.float32)
    wild = np.where(weights > 0, row, generator.choice([0, 1e30, -1e30, 1e-30], N)).astype(np.float32)
    one, other = fitted(row, num_levels, weights), fitted(wild, num_levels, weights)
    for name in ("levels", "scale", "sse", "lower_bound"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("num_levels", [2, 16])
def test_the_bound_is_below_what_any_partition_costs(num_levels):
    """Random partitions of a row into intervals, each at its mean."""
    generator = np.random.default_rng(0)
    row = np.sort(FAMILIES["t3"](generator)).astype(np.float32)
    result = fitted(row, num_levels)
    bound = float(result.lower_bound[0]) * float(result.scale[0]) ** 2
    for _ in range(100):
        cuts = np.sort(generator.choice(np.arange(1, N), num_levels - 1, replace=False))
        parts = np.split(row.astype(np.float64), cuts)
        assert bound <= sum(((part - part.mean()) ** 2).sum() for part in parts)
