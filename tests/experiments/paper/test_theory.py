"""The table of what quantizers can reach, integrated anew."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, optimize

from experiments.paper.theory import KINDS, reference_db

DENSITIES = {
    "gauss": lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    "laplace": lambda x: math.exp(-math.sqrt(2) * abs(x)) / math.sqrt(2),
}
# dB of 2, 4, 8, 16 and 32 levels: Jayant and Noll, Digital Coding of Waveforms (1984), table 4.4.
PUBLISHED = {"gauss": (4.40, 9.30, 14.62, 20.22, 26.01), "laplace": (3.01, 7.54, 12.64, 18.13, 23.87)}
both = pytest.mark.parametrize("density", DENSITIES)


@both
def test_lloyd_and_max_s_table_is_the_published_one(density):
    table = reference_db(density, "lloyd_max")
    assert [round(table[bits], 2) for bits in range(1, 6)] == list(PUBLISHED[density])


def grid_error(density, bits, step):
    """Mean squared error of {−K/2, …, K/2 − 1}·step, by quadrature over each cell."""
    levels = step * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    edges = [-40.0, *((levels[1:] + levels[:-1]) / 2), 40.0]
    edges = sorted({*edges, 0.0})  # the Laplacian has a corner at zero
    total = 0.0
    for low, high in itertools.pairwise(edges):
        level = levels[np.abs(levels - (low + high) / 2).argmin()] if high - low < 30 else levels[0 if low < 0 else -1]
        splits = np.linspace(low, high, 40 if high - low > 10 else 2)
        for a, b in itertools.pairwise(splits):
            total += integrate.fixed_quad(
                lambda x, level=level: np.array([DENSITIES[density](v) * (v - level) ** 2 for v in x]), a, b, n=12
            )[0]
    return total


@both
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_best_grid_by_quadrature(density, bits):
    found = optimize.minimize_scalar(
        lambda step: grid_error(density, bits, step), bounds=(0.05, 2.0), method="bounded", options={"xatol": 1e-6}
    )
    assert reference_db(density, "uniform")[bits] == pytest.approx(-10 * math.log10(found.fun), abs=2e-4)


@both
def test_the_kinds_are_ordered_and_gain_six_decibels_a_bit_at_most(density):
    for bits in range(2, 9):
        best, uniform, pow2 = (reference_db(density, kind)[bits] for kind in KINDS)
        assert best > uniform > pow2
    table = reference_db(density, "lloyd_max")
    gains = np.diff(list(table.values()))
    assert ((gains > 4) & (gains < 20 * math.log10(2))).all()


@both
def test_the_table_tends_to_panter_and_dite_s_formula(density):
    """At many levels K, the least error is (∫ f^⅓)³ / 12 K²: here √3π / 2 K² and 9 / 2 K²."""
    factor = {"gauss": math.sqrt(3) * math.pi / 2, "laplace": 4.5}[density]
    errors = [10 ** (-reference_db(density, "lloyd_max")[bits] / 10) * 4**bits / factor for bits in (4, 6, 8)]
    assert errors[0] < errors[1] < errors[2] < 1  # from below
    assert errors[2] > 0.98
