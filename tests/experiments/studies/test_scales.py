"""Scales of output channels by power means."""

import itertools

import numpy as np
import pytest

from experiments.studies.scales import power_mean, quantized


def test_power_means_rise_to_the_largest_magnitude():
    channels = np.random.default_rng(0).normal(size=(5, 40))
    means = [power_mean(channels, power) for power in (1.0, 2.0, 8.0, 500.0, np.inf)]
    assert means[1] == pytest.approx(np.sqrt((channels**2).mean(axis=1, keepdims=True)))
    assert all((a <= b * (1 + 1e-12)).all() for a, b in itertools.pairwise(means))
    assert means[3] == pytest.approx(means[4], rel=0.02)


@pytest.mark.parametrize("power", [2.0, 8.0, np.inf])
def test_a_kernel_has_at_most_as_many_values_as_levels_in_a_channel(power):
    leaf = np.random.default_rng(0).normal(size=(3, 3, 8, 4)).astype(np.float32)
    leaf[..., 1] = 0  # a channel without weights
    got = quantized(leaf, 3, power)
    assert got.shape == leaf.shape
    assert max(len(np.unique(got[..., channel])) for channel in range(4)) <= 8
    assert ((got - leaf) ** 2).sum() < 0.1 * (leaf**2).sum()
