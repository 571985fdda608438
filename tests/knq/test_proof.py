"""The lower bound against exact solvers, from good and bad beginnings; its passes; many rows; long rows."""

import itertools
import tracemalloc

import kmeans1d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax._src.knq.knq import fit_knq
from nuqjax._src.knq.proof import path_host as fit_knq_path_host
from nuqjax._src.knq.proof.path import nothing_yet, potentials
from nuqjax._src.knq.proof.proof import _more, prove
from nuqjax._src.knq.proof.rows import HostRow
from nuqjax._src.platform.host import x64


def interval_error(values, weight, zero):
    """`[D + 1, D + 1]` Σ weight (value − level)² of every interval, about 0 where it crosses the held_zero zero."""
    size = len(values)
    error = np.full((size + 1, size + 1), np.inf)
    for a, b in itertools.combinations(range(size + 1), 2):
        x, w = values[a:b], weight[a:b]
        held_zero = zero is not None and a <= zero < b
        level = 0.0 if held_zero or w.sum() == 0 else (w * x).sum() / w.sum()
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


def proven(values, weight, num_levels, boundaries, zero=None, tolerance=1e-6, unit=1.0):
    """The cuts and the bound of one row."""
    with x64():
        row = HostRow(values, unit, weight, zero)
        cuts, bounds = prove([row], np.asarray(boundaries)[None], num_levels, tolerance)
    return cuts[0], bounds[0]


def levels_by_kmeans1d(values, num_levels):
    return np.sort(kmeans1d.cluster(values, num_levels).centroids)


def error_of_levels(values, levels):
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
    return ((values - levels[nearest]) ** 2).sum()


def error_of_cuts(values, cuts, weight=None, zero=None):
    weight = np.ones(len(values)) if weight is None else weight
    error = 0.0
    for a, b in itertools.pairwise([0, *cuts, len(values)]):
        if b > a and weight[a:b].sum() > 0:
            held_zero = zero is not None and a <= zero < b
            level = 0.0 if held_zero else np.average(values[a:b], weights=weight[a:b])
            error += (weight[a:b] * (values[a:b] - level) ** 2).sum()
    return error


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_weighted_rows_with_and_without_a_pinned_zero(data):
    size = data.draw(st.integers(3, 40))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values = np.append(generator.standard_t(2, size), 0.0)
    if data.draw(st.booleans()):
        values = np.round(values * 2) / 2
    values = np.sort(values)
    weight = generator.exponential(size=len(values)) ** data.draw(st.integers(0, 4))
    weight[generator.random(len(values)) < 0.1] = 0.0
    num_levels = data.draw(st.integers(2, min(6, len(values) - 1)))
    zero = int(np.searchsorted(values, 0.0)) if data.draw(st.booleans()) else None
    boundaries = np.sort(generator.choice(np.arange(1, len(values)), num_levels - 1, replace=False))
    cuts, bound = proven(values, weight, num_levels, boundaries, zero)
    best = optimum(values, weight, num_levels, zero)
    noise = 1e-13 * (weight * values**2).sum()
    assert bound <= best * (1 + 1e-12) + noise
    assert bound >= best * (1 - 2e-6) - noise
    assert error_of_cuts(values, cuts, weight, zero) <= error_of_cuts(values, boundaries, weight, zero) + noise


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("held_zero", [False, True])
def test_no_bound_is_above_an_error_where_a_cell_holds_a_light_value_far_away(held_zero, below):
    generator = np.random.default_rng(800)
    values, weight = np.sort(generator.standard_normal(800)), generator.exponential(size=800) ** 3
    if held_zero:
        zero = int(np.searchsorted(values, 0.0))
        values, weight = np.insert(values, zero, 0.0), np.insert(weight, zero, 0.0)
    good, _ = proven(values, weight, 2, [270], zero if held_zero else None)
    best = error_of_cuts(values, good, weight, zero if held_zero else None)  # and nothing for levels at the far values
    values, weight = np.append(values, [1.7e9, 7e10]), np.append(weight, [1e-12, 3e-12])
    if below:
        values, weight = -values[::-1], weight[::-1]
    zero = int(np.searchsorted(values, 0.0)) if held_zero else None
    for start in ([68, 272, 568], [200, 400, 600]):  # partitions whose outer interval holds near and far values
        with x64():
            _, bounds = prove([HostRow(values, 1.0, weight, zero)], np.array([start]), 4, 1e-6, np.array([0.03 * best]))
        assert bounds[0] <= best * (1 + 1e-9)


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
    _, bound = proven(values, None, num_levels, boundaries)
    best = error_of_levels(values, levels_by_kmeans1d(values, num_levels))
    assert best * (1 - 2e-6) <= bound <= best * (1 + 1e-12)


FAMILIES = {
    "normal": lambda g, n: g.standard_normal(n),
    "laplace": lambda g, n: g.laplace(size=n),
    "uniform": lambda g, n: g.random(n),
    "lognormal": lambda g, n: g.lognormal(size=n),
    "far apart": lambda g, n: np.append(g.standard_normal(n // 2), 1e4 + g.standard_normal(n - n // 2)),
    "outlier": lambda g, n: np.append(g.standard_normal(n - 1) + 20 * (np.arange(n - 1) % 2), 1e6),
    "lattice": lambda g, n: np.round(300 * g.standard_normal(n)),
    "few values": lambda g, n: np.round(20 * g.standard_normal(n)),
    "huge": lambda g, n: 2e37 * g.standard_normal(n),
    "tiny": lambda g, n: 1e-36 * g.standard_normal(n),
}


@pytest.mark.parametrize("num_levels", [4, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_float32_with_ties_against_kmeans1d(family, num_levels):
    row = np.sort(FAMILIES[family](np.random.default_rng(3), 12000).astype(np.float32))
    unit = 2.0 ** np.floor(np.log2(np.abs(row).max()))
    values = row / np.float64(unit)
    levels = levels_by_kmeans1d(values, num_levels)
    good = np.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
    even = np.arange(1, num_levels) * len(row) // num_levels
    for boundaries in (good, even):
        cuts, bound = proven(row, None, num_levels, boundaries, unit=unit)
        best = min(error_of_levels(values, levels), error_of_cuts(values, cuts))
        assert best * (1 - 1.001e-6) <= bound <= best * (1 + 1e-11)


@pytest.mark.parametrize("num_levels", [16, 256])
def test_equal_values_count_as_their_number(num_levels):
    """A row with ties, and its distinct values weighted by how often each comes, have the same optimum."""
    generator = np.random.default_rng(4)
    values = np.sort(np.round(generator.standard_t(3, 30000) * 512) / 512)
    distinct, first, counts = np.unique(values, return_index=True, return_counts=True)
    boundaries = np.arange(1, num_levels) * len(distinct) // num_levels
    _, of_all = proven(values, None, num_levels, first[boundaries])
    cuts, of_distinct = proven(distinct, counts.astype(np.float64), num_levels, boundaries)
    best = error_of_cuts(distinct, cuts, counts.astype(np.float64))
    assert of_all == pytest.approx(of_distinct, rel=2.1e-6)
    assert of_all <= best * (1 + 1e-12)


def test_fewer_distinct_values_than_levels_cost_nothing():
    assert proven(np.repeat([1.0, 2.0, 3.0], 50), None, 8, np.arange(1, 8) * 18)[1] == 0.0


@pytest.mark.parametrize("held_zero", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_are_proven_as_one_by_one(weighted, held_zero):
    generator = np.random.default_rng(5)
    rows = []
    for r in range(11):
        values = np.sort(np.append(generator.standard_t(3, 500 + 130 * r), 0.0)).astype(np.float32)
        weight = generator.exponential(size=len(values)) if weighted else None
        rows.append(HostRow(values, 1.0, weight, int(np.searchsorted(values, 0.0)) if held_zero else None))
    boundaries = np.stack([np.arange(1, 8) * len(row.values) // 8 for row in rows])
    with x64():
        cuts, bounds = prove(rows, boundaries, 8, 1e-6)
        for row, begin, found, bound in zip(rows, boundaries, cuts, bounds, strict=True):
            alone = prove([row], begin[None], 8, 1e-6)
            np.testing.assert_array_equal(alone[0][0], found)
            assert alone[1][0] == bound


def test_a_proof_that_finds_better_levels_hands_them_on():
    """Beside an outlier of 10⁶ deviations the search, which knows values by rounded sums, may miss the optimum."""
    generator = np.random.default_rng(5)
    row = np.append(generator.standard_normal(299) + 20 * (np.arange(299) % 2), 1e6).astype(np.float32)
    weight = generator.exponential(size=300).astype(np.float32)
    rows, weights = np.repeat(row[None], 9, axis=0), np.repeat(weight[None], 9, axis=0)
    fitted = fit_knq(rows, 256, weights=weights)
    order = np.argsort(row, kind="stable")
    best = optimum(row[order].astype(np.float64), weight[order].astype(np.float64), 256)
    error, bound = (np.asarray(x, np.float64) * np.asarray(fitted.scale, np.float64) ** 2 for x in fitted[1:3])
    assert (bound <= best).all()
    assert (bound >= best * (1 - 1e-4)).all()
    assert (error <= best * (1 + 1e-4)).all()


@pytest.mark.parametrize("num_levels", [64, 256])
def test_a_million_heavy_tailed_values(num_levels):
    row = np.random.default_rng(1).standard_t(3, 10**6).astype(np.float32)
    fitted = fit_knq(row[None], num_levels)
    gap = float(fitted.sse[0]) - float(fitted.lower_bound[0])
    assert 0 <= gap <= 1e-6 * float(fitted.sse[0]) * (1 + 2.0**-3)  # both are rounded to float32


def test_a_long_row_is_never_held_twice():
    row = np.sort(np.random.default_rng(6).standard_normal(4 * 10**6, dtype=np.float32))
    levels = np.asarray(fit_knq(row[None, ::64], 16, tolerance=None).levels[0])
    boundaries = np.searchsorted(row, (levels[1:] + levels[:-1]) / 2)
    tracemalloc.start()
    _, bound = proven(row, None, 16, boundaries)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bound > 0
    assert most < row.nbytes  # 16 MB; the row in float64 alone would be 32


def test_a_looser_tolerance_proves_less():
    values = np.sort(np.random.default_rng(2).standard_normal(20000))
    boundaries = np.arange(1, 16) * 1250
    tight, loose = (proven(values, None, 16, boundaries, tolerance=t)[1] for t in (1e-8, 1e-2))
    assert loose < tight < loose * 1.011


def test_equally_spaced_values_have_many_best_partitions():
    """The counts of intervals that are best at one price jump by dozens: every one of them between is a tie."""
    values = np.arange(4096.0)
    for num_levels in (200, 100):
        sizes = np.full(num_levels, 4096 // num_levels) + (np.arange(num_levels) < 4096 % num_levels)
        best = (sizes * (sizes**2 - 1.0) / 12).sum()
        _, bound = proven(values, None, num_levels, np.arange(1, num_levels) * 4096 // num_levels)
        assert best * (1 - 2e-6) <= bound <= best * (1 + 1e-12)


def shortest_path(weight, mean, square, leak, price, zero):
    """The potentials of all cuts, each interval's error summed anew."""
    size = len(weight)
    potential = np.zeros(size + 1)
    for b in range(1, size + 1):
        reached = []
        for a in range(b):
            w, m, q = weight[a:b], mean[a:b], square[a:b]
            held = zero is not None and a <= zero < b
            level = 0.0 if held else np.dot(w, m) / w.sum()
            error = q.sum() + np.dot(w, (m - level) ** 2)
            reached.append(potential[a] - leak[a] * (a > 0) + error + (0.0 if held else price))
        potential[b] = min(reached)
    return potential


@pytest.mark.slow
@given(st.data())
@settings(max_examples=10, deadline=None)
def test_passes_in_blocks_find_the_shortest_paths(data):
    """Against all intervals, in NumPy; long ones, short ones, and many in a block."""
    (count, block), size = data.draw(st.sampled_from([(1, 32), (8, 16)])), 256  # four programs in all
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mean = np.sort(generator.standard_t(data.draw(st.sampled_from([1, 3, 30])), (count, size)), axis=1)
    pin = data.draw(st.booleans())
    if pin:
        mean[:, 100] = 0.0
        mean = np.sort(mean, axis=1)
    weight = generator.exponential(size=(count, size))
    square = weight * generator.exponential(size=(count, size)) * 1e-4
    price = np.full(count, 10.0 ** data.draw(st.integers(-4, 3)))
    leak = generator.random((count, size)) * price[:, None] * data.draw(st.sampled_from([0.0, 0.4]))
    zero = np.array([np.searchsorted(row, 0.0) for row in mean], np.int32)
    from_below = np.concatenate([np.zeros((count, 1)), leak[:, :-1]], axis=1)
    with x64():
        carried, found = nothing_yet(count, 512), []
        for begin in (0, 128):
            part = slice(begin, begin + 128)
            carried, potential, _ = potentials(
                carried, weight[:, part], mean[:, part], square[:, part], leak[:, part], price,
                np.int32(begin), np.full(count, 128, np.int32), zero, block=block, window=2 * block, keep_zero=pin,
            )  # fmt: skip
            found.append(np.asarray(potential))
    assert np.asarray(carried.enough).all()
    for r, potential in enumerate(np.concatenate(found, axis=1)):
        held = zero[r] if pin else None
        expected = shortest_path(weight[r], mean[r], square[r], from_below[r], price[r], held)
        np.testing.assert_allclose(potential, expected[1:], rtol=1e-11)
        paid = np.concatenate([[0.0], leak[r]])
        sizes = np.diff(np.unique([0, *generator.integers(1, size, 8), size]))
        on_host, before, widest, _ = fit_knq_path_host.potentials(
            weight[r], mean[r], square[r], paid, price[r], None if held is None else int(held), sizes
        )
        np.testing.assert_allclose(on_host, expected, rtol=1e-11)
        assert (before[1:] < np.arange(1, size + 1)).all()
        assert 0 < widest <= size


def test_the_price_rises_by_what_leaks_exceed_and_by_what_two_of_them_exceed_it():
    """Two cells may leak on either side of a run, which is then worth less than nothing at too low a price."""
    leak, assumed = np.array([1.0, 3.0, 2.0]), np.array([1.0, 3.0, 2.0])
    assert _more(leak, assumed, 7.0) == 0
    assert _more(leak, assumed - 0.5, 7.0) == 0.5
    assert _more(leak, assumed, 4.0) == 2.0
