"""The lower bound against exact solvers, from good and bad beginnings; its facts one by one."""

import itertools

import jax
import kmeans1d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax.fit_knq import fit_knq
from nuqjax.fit_knq_proof import prove


def interval_error(values, weight, zero):
    """`[D + 1, D + 1]` Σ weight (value − level)² of every interval, about 0 where it crosses the pinned zero."""
    size = len(values)
    error = np.full((size + 1, size + 1), np.inf)
    for a, b in itertools.combinations(range(size + 1), 2):
        x, w = values[a:b], weight[a:b]
        pinned = zero is not None and a <= zero < b
        level = 0.0 if pinned or w.sum() == 0 else (w * x).sum() / w.sum()
        error[a, b] = (w * (x - level) ** 2).sum()
    return error


def optimum(values, weight, num_levels, zero=None):
    """Over partitions into at most K intervals, by a dynamic programme over all intervals."""
    error = interval_error(values, weight, zero)
    np.fill_diagonal(error, 0)
    best = error[0]
    for _ in range(num_levels - 1):
        best = (best[:, None] + error).min(axis=0)
    return best[-1]


def proven(values, weight, num_levels, boundaries, zero=None, tolerance=1e-6):
    with jax.enable_x64(True):
        return prove(values, weight, zero, np.asarray(boundaries), num_levels, tolerance)


@given(st.data())
@settings(max_examples=60)
def test_weighted_rows_with_and_without_a_pinned_zero(data):
    size = data.draw(st.integers(3, 40))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values = np.unique(np.append(generator.standard_t(2, size), 0.0))
    weight = generator.exponential(size=len(values)) ** data.draw(st.integers(0, 4))
    num_levels = data.draw(st.integers(2, min(6, len(values) - 1)))
    zero = int(np.searchsorted(values, 0.0)) if data.draw(st.booleans()) else None
    boundaries = np.sort(generator.choice(np.arange(1, len(values)), num_levels - 1, replace=False))
    proof = proven(values, weight, num_levels, boundaries, zero)
    best = optimum(values, weight, num_levels, zero)
    assert proof.lower_bound <= best * (1 + 1e-12)
    assert proof.lower_bound >= best * (1 - 2e-6)


@pytest.mark.parametrize("num_levels", [2, 7, 16, 64])
@pytest.mark.parametrize("begin", ["first values", "last values", "even"])
def test_it_does_not_matter_how_bad_the_first_partition_is(begin, num_levels):
    values = np.sort(np.random.default_rng(0).standard_t(3, 5000))
    size = len(values)
    boundaries = {
        "first values": np.arange(1, num_levels),
        "last values": np.arange(size - num_levels + 1, size),
        "even": np.arange(1, num_levels) * size // num_levels,
    }[begin]
    proof = proven(values, None, num_levels, boundaries)
    levels = np.sort(kmeans1d.cluster(values, num_levels).centroids)
    best = ((values - levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values)]) ** 2).sum()
    assert best * (1 - 2e-6) <= proof.lower_bound <= best * (1 + 1e-12)


@pytest.mark.parametrize("num_levels", [64, 256])
def test_a_million_heavy_tailed_values(num_levels):
    row = np.random.default_rng(1).standard_t(3, 10**6).astype(np.float32)
    fitted = fit_knq(row[None], num_levels)
    gap = float(fitted.sse[0]) - float(fitted.lower_bound[0])
    assert 0 <= gap <= 1e-6 * float(fitted.sse[0]) * (1 + 2.0**-3)  # both are rounded to float32


def test_a_looser_tolerance_proves_less_in_fewer_rounds():
    values = np.sort(np.random.default_rng(2).standard_normal(20000))
    boundaries = np.arange(1, 16) * 1250
    tight, loose = (proven(values, None, 16, boundaries, tolerance=t).lower_bound for t in (1e-8, 1e-2))
    assert loose < tight < loose * 1.011


def test_equally_spaced_values_have_many_best_partitions():
    """The counts of intervals that are best at one price jump by dozens: every one of them between is a tie."""
    values = np.arange(4096.0)
    for num_levels in (200, 100):
        sizes = np.full(num_levels, 4096 // num_levels) + (np.arange(num_levels) < 4096 % num_levels)
        best = (sizes * (sizes**2 - 1.0) / 12).sum()
        proof = proven(values, None, num_levels, np.arange(1, num_levels) * 4096 // num_levels)
        assert best * (1 - 2e-6) <= proof.lower_bound <= best * (1 + 1e-12)
