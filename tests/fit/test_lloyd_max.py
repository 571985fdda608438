"""KNQ on samples of a Gaussian and a Laplace source, against the codebooks that are best for the sources themselves.

On a sample the fitted levels cannot be worse than any others; on the source nothing can beat the Lloyd–Max quantizer
(Lloyd 1982, Max 1960), which for a log-concave density is the only fixed point of Lloyd's iteration (Trushkin 1982).
The two meet as the sample grows. The codebooks come from a table where it is there, else from the iteration.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import special

from nuqjax import fit

_TABLE = Path(__file__).resolve().parents[3] / "shared" / "facts" / "lloyd_max.json"


class Source(NamedTuple):
    """A density of mean 0 and variance 1."""

    draw: Any  # (generator, count) to values
    mass: Any  # x to ∫ f over (−∞, x]
    moment: Any  # x to ∫ t f(t) dt over (−∞, x]


SOURCES = {
    "gauss": Source(
        lambda generator, count: generator.standard_normal(count),
        special.ndtr,
        lambda x: -np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    ),
    "laplace": Source(
        lambda generator, count: generator.laplace(scale=math.sqrt(0.5), size=count),
        lambda x: np.where(x < 0, np.exp(-math.sqrt(2) * np.abs(x)) / 2, 1 - np.exp(-math.sqrt(2) * np.abs(x)) / 2),
        lambda x: -np.exp(-math.sqrt(2) * np.abs(x)) * (np.abs(x) + math.sqrt(0.5)) / 2,
    ),
}
all_sources = pytest.mark.parametrize("source", SOURCES)


def cells(source, levels):
    """`[K]` probability and first moment of the values nearest to each level."""
    edges = (levels[1:] + levels[:-1]) / 2
    below = np.concatenate([[0.0], source.mass(edges), [1.0]])
    moments = np.concatenate([[0.0], source.moment(edges), [0.0]])
    return np.diff(below), np.diff(moments)


def source_error(source, levels):
    """The mean squared error of the source, in float64 up to about 1e-15."""
    mass, moment = cells(source, levels)
    return 1 - 2 * np.sum(levels * moment) + np.sum(levels**2 * mass)


def lloyd_max(source, num_levels):
    """Lloyd's iteration on the density, from levels as dense as its cube root (Panter and Dite 1951)."""
    x = np.linspace(-12, 12, 100_001)
    spread = np.cumsum(np.gradient(source.mass(x)) ** (1 / 3))
    levels = np.interp((np.arange(num_levels) + 0.5) / num_levels, spread / spread[-1], x)
    for _ in range(20_000):
        mass, moment = cells(source, levels)
        before, levels = levels, moment / mass
        levels = (levels - levels[::-1]) / 2  # both sources are symmetric; Laplace's would drift back ever more slowly
        if np.max(np.abs(levels - before)) < 1e-14:
            break
    return levels


def codebook(name, num_levels):
    """The best levels for the source."""
    if _TABLE.is_file():
        return np.array(json.loads(_TABLE.read_text())[name][str(num_levels)]["levels"])
    return lloyd_max(SOURCES[name], num_levels)


def errors(values, levels):
    """`[N]` squared distances to the nearest level, in float64."""
    values = values.astype(np.float64)
    return (values - levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values)]) ** 2


def sample(name, count, seed=0):
    return SOURCES[name].draw(np.random.default_rng(seed), count).astype(np.float32)


def fitted_levels(values, num_levels):
    return np.asarray(fit(values[None], num_levels).levels[0], np.float64)


@all_sources
def test_the_iteration_finds_the_table(source):
    if not _TABLE.is_file():
        pytest.skip(f"no {_TABLE.name} beside the repository; the other tests use the iteration instead")
    for num_levels in range(1, 17):
        entry = json.loads(_TABLE.read_text())[source][str(num_levels)]
        levels = lloyd_max(SOURCES[source], num_levels)
        np.testing.assert_allclose(levels, entry["levels"], atol=1e-9)
        assert source_error(SOURCES[source], levels) == pytest.approx(entry["mse"], abs=1e-13)


# dB, as Jayant and Noll, Digital Coding of Waveforms (1984), table 4.4, prints them for 2, 4, 8, 16 and 32 levels.
PUBLISHED = {"gauss": (4.40, 9.30, 14.62, 20.22, 26.01), "laplace": (3.01, 7.54, 12.64, 18.13, 23.87)}


@all_sources
def test_the_iteration_finds_the_published_ratios(source):
    for bits, printed in enumerate(PUBLISHED[source], start=1):
        error = source_error(SOURCES[source], lloyd_max(SOURCES[source], 2**bits))
        assert round(-10 * math.log10(error), 2) == printed


@all_sources
def test_known_errors_of_the_iteration(source):
    """One and two levels, by hand: E[(x − m)²] and 1 − (E|x|)²."""
    mean_magnitude = {"gauss": math.sqrt(2 / math.pi), "laplace": math.sqrt(0.5)}[source]
    for num_levels, expected in ((1, 1.0), (2, 1 - mean_magnitude**2)):
        levels = lloyd_max(SOURCES[source], num_levels)
        assert source_error(SOURCES[source], levels) == pytest.approx(expected, abs=1e-13)


@all_sources
@pytest.mark.parametrize("num_levels", [2, 3, 4, 8, 16, 64, 256])
def test_on_a_sample_a_fit_is_never_worse_than_the_best_codebook_of_the_source(source, num_levels):
    for seed in range(3):
        values = sample(source, 20_000, seed)
        best = errors(values, codebook(source, num_levels)).sum()
        assert errors(values, fitted_levels(values, num_levels)).sum() <= best


@all_sources
@pytest.mark.parametrize("num_levels", [2, 4, 16, 64])
def test_the_error_of_a_sample_approaches_that_of_the_source(source, num_levels):
    best = codebook(source, num_levels)
    least = source_error(SOURCES[source], best)
    excesses = []
    for count in (1000, 10_000, 100_000):
        values = sample(source, count)
        levels = fitted_levels(values, num_levels)
        excess = source_error(SOURCES[source], levels) - least
        assert excess >= -1e-14  # on the source nothing is better than its own codebook
        # The best codebook's error on the sample is a mean of independent terms; the fit's is below it by about as much
        # as the fit's on the source is above the least (the two halves of one square, to second order).
        of_best = errors(values, best)
        noise = 5 * of_best.std() / math.sqrt(count)
        assert least - noise - 2 * excess <= errors(values, levels).mean() <= least + noise
        excesses.append(excess)
    assert excesses[2] < excesses[1] < excesses[0]
