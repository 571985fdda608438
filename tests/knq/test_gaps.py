"""Rows with gaps so wide that float64 sums do not resolve what lies beside them."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax._src.knq.knq import fit_knq
from nuqjax._src.knq.rows.long import sort_long_rows
from nuqjax._src.knq.rows.sorted import sort_rows
from nuqjax._src.knq.search.gaps import _weights_beside, next_gaps, no_gaps, search_rows
from nuqjax._src.platform.host import x64
from tests.families import FAMILIES, level_rounding

GAPPED = ("outlier", "outlier below", "outliers", "scales", "heavy tail", "wide")  # whose gaps are narrowed


def rows_of(name, count, length, seed=0):
    generator = np.random.default_rng(seed)
    return np.stack([FAMILIES[name](generator, length) for _ in range(count)]).astype(np.float32)


def weights_of(rows, seed=1):
    return np.random.default_rng(seed).exponential(size=rows.shape).astype(np.float32)


def exact_optimum(row, weights, num_levels, keep_zero):
    """The least squared error of K levels, in rational numbers, where no sum is rounded."""
    pairs = sorted(zip((Fraction(float(x)) for x in row), (Fraction(float(w)) for w in weights), strict=True))
    if keep_zero:
        pairs = sorted([*pairs, (Fraction(0), Fraction(0))])
    size = len(pairs)
    sums = [(Fraction(0),) * 3]
    for x, w in pairs:
        n, s, q = sums[-1]
        sums.append((n + w, s + w * x, q + w * x * x))
    zero = next(i for i, (x, _) in enumerate(pairs) if x == 0) if keep_zero else None

    def cost(a, b):
        n, s, q = (end - begin for begin, end in zip(sums[a], sums[b], strict=True))
        return q - s * s / n if n > 0 and not (keep_zero and a <= zero < b) else q

    table = [[cost(a, b) if a < b else None for b in range(size + 1)] for a in range(size)]
    best = [None, *(table[0][b] for b in range(1, size + 1))]
    for _ in range(num_levels - 1):
        best = [None] + [
            min([best[b]] + [best[a] + table[a][b] for a in range(1, b) if best[a] is not None])
            for b in range(1, size + 1)
        ]
    return best[size]


def exact_error(row, weights, levels):
    """Of the nearest levels, in rational numbers."""
    levels = [Fraction(float(level)) for level in levels]
    return sum(
        Fraction(float(w)) * min((Fraction(float(x)) - level) ** 2 for level in levels)
        for x, w in zip(row, weights, strict=True)
    )


@pytest.mark.parametrize("keep_zero", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", GAPPED)
def test_the_optimum_in_rational_numbers(name, weighted, keep_zero):
    rows = rows_of(name, 2, 40)
    weights = weights_of(rows) if weighted else np.ones_like(rows)
    for num_levels in (3, 8, 30):
        given = {"weights": weights if weighted else None, "keep_zero": keep_zero}
        fitted = fit_knq(rows, num_levels, **given)
        for r, row in enumerate(rows):
            best = exact_optimum(row, weights[r], num_levels, keep_zero)
            levels = np.asarray(fitted.levels[r])
            # Every level is rounded once, so that values near it are off by what it was rounded.
            nearest = np.abs(row[:, None].astype(np.float64) - levels).argmin(axis=1)
            off = float((weights[r] * (levels[nearest].astype(np.float64) * 2.0**-24) ** 2).sum())
            error, unit = exact_error(row, weights[r], levels), float(fitted.scale[r]) ** 2
            assert best <= error <= best * (1 + Fraction(1, 10**9)) + Fraction(off)
            assert Fraction(float(fitted.lower_bound[r]) * unit) <= best
            np.testing.assert_allclose(float(fitted.sse[r]) * unit, float(error), rtol=2.0**-22, atol=2.0**-126 * unit)


@pytest.mark.parametrize(
    ("length", "num_levels"),
    # NumPy's arithmetic: on the other versions the short rows are enough.
    [(5000, 256), *(pytest.param(70000, k, marks=[pytest.mark.slow, pytest.mark.versionless]) for k in (4, 256))],
)
@pytest.mark.parametrize("name", ["outlier", "outliers", "heavy tail"])
def test_the_proof_holds_and_the_search_alone_finds_as_much(name, length, num_levels):
    rows = rows_of(name, 1, length)
    weights = weights_of(rows) if length < 70000 else None
    proven, searched = (fit_knq(rows, num_levels, weights=weights, tolerance=t) for t in (1e-6, None))
    sse, bound = (np.asarray(x, np.float64) for x in (proven.sse, proven.lower_bound))
    assert (sse - bound <= 1.2e-6 * sse + level_rounding(rows, weights, proven)).all()
    assert (np.asarray(searched.sse, np.float64) <= sse * (1 + 1e-6) + level_rounding(rows, weights, proven)).all()


# Beside far values of next to no weight the first search has no path of K intervals, and its price is 0.
FAR = (((), ()), ((1.7221562e9, 7.1385612e10), (7e-9, 2e-26)), ((3e4, -2e10), (1e-9, 1e-6)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "length", "given_arrays"),
    [
        # On the other versions one programme is enough.
        pytest.param(2, 200, "weighted", marks=pytest.mark.versionless),
        pytest.param(9, 300, "held_zero", marks=pytest.mark.versionless),
        (1, 3000, "weighted"),
        pytest.param(1, 70000, "held_zero", marks=pytest.mark.versionless),
    ],
)
def test_host_and_traced_paths_agree_bit_for_bit(count, length, given_arrays):
    fit = functools.partial(fit_knq, num_levels=64, keep_zero=given_arrays == "held_zero", tolerance=None)
    traced = jax.jit(fit)
    for far, weights_of_far in FAR if given_arrays == "weighted" else FAR[:1]:
        rows = rows_of("outliers", count, length)
        weights = weights_of(rows) if given_arrays == "weighted" else None
        if count > 1:  # beside rows without gaps
            rows[0] = np.random.default_rng(2).standard_normal(length)
        if far:
            rows[:, [5, 30]], weights[:, [5, 30]] = far, weights_of_far
        on_host = fit(rows, weights=weights)
        np.testing.assert_array_equal(on_host.levels, traced(jnp.asarray(rows), weights=weights).levels)


@pytest.mark.parametrize("sort", [sort_rows, sort_long_rows])
@pytest.mark.parametrize("keep_zero", [False, True])
def test_weights_have_the_same_units_on_the_host_and_traced(sort, keep_zero):
    """XLA multiplies by the reciprocal where all of a row are divided by the same, unless it is kept from it."""
    rows = np.random.default_rng(5).standard_normal((1, 4000)).astype(np.float32)
    weights = np.maximum(weights_of(rows) ** np.linspace(1, 40, 4000, dtype=np.float32), np.float32(2e-38))
    counted = np.arange(4000)[None] % 7 > 0
    with x64():
        on_host = sort(rows, np.full(1, 2.0), weights, counted, keep_zero)
        traced = jax.jit(functools.partial(sort, keep_zero=keep_zero))(rows, np.full(1, 2.0), weights, counted)
        size = int(on_host.size[0])
        cuts = np.arange(size + 1)[None]
        for a, b in zip(
            (on_host.size, *on_host.sums_below(cuts)), (traced.size, *traced.sums_below(cuts)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keep_zero", [False, True])
@pytest.mark.parametrize("length", [40, 300, 5000])
def test_weights_beside_a_gap_are_known_from_below_down_to_a_unit(length, keep_zero):
    """v w/(v + w), the held zero being infinitely heavy: never more, and beside weights of a unit and more a third."""
    rng = np.random.default_rng(length)
    row = np.sort(rng.standard_normal(length).astype(np.float32))
    weights = (2.0 ** -rng.uniform(0, 60, length)).astype(np.float32)
    weights[rng.integers(length)] = 1
    with x64():
        ordered = sort_rows(row[None], np.full(1, 4.0), weights[None], None, keep_zero)
        below_zero = int(np.searchsorted(row, 0))
        exact = np.insert(weights.astype(np.float64), below_zero, np.inf) if keep_zero else weights.astype(np.float64)
        cuts = np.arange(1, len(exact))[None]
        found = np.asarray(_weights_beside(ordered, cuts, keep_zero))[0]
    harmonic = 1 / (1 / exact[:-1] + 1 / exact[1:])
    assert (found <= harmonic).all()
    resolved = np.minimum(exact[:-1], exact[1:]) >= 2.0**-ordered.frac
    assert resolved.mean() > 0.4
    assert (found >= harmonic / 3)[resolved].all()


@settings(max_examples=25)
@given(st.sampled_from(GAPPED), st.integers(0, 2**32 - 1), st.sampled_from([3, 16, 100]), st.booleans())
def test_gaps_keep_order_distances_and_the_zero(name, seed, num_levels, keep_zero):
    row = rows_of(name, 1, 300, seed)
    with x64():
        unit = np.exp2(np.floor(np.log2(np.abs(row).max(axis=1)))).astype(np.float64)
        rows = sort_rows(row, unit, None, None, keep_zero)
        _, gaps, found = search_rows(rows, num_levels, keep_zero, 256)
        if gaps is None:
            gaps, _ = next_gaps(rows, found, no_gaps(rows, num_levels), keep_zero)
        values = rows.values[:, : int(rows.size[0])]
        moved = gaps.narrow(values)
        back = gaps.widen(moved)
    assert (np.diff(moved) >= 0).all()
    assert 1 <= np.abs(moved).max() < 2
    factor, largest = float(gaps.factor[0]), float(np.abs(moved).max())
    off = 2.0**-50 * largest / factor
    assert (np.diff(moved) / factor <= np.diff(values) + off).all()  # no gap grows
    np.testing.assert_allclose(back, values, rtol=2.0**-50, atol=off)
    inside = np.ones(values.shape[1] - 1, bool)
    inside[np.unique(found.cuts[(found.cuts > 0) & (found.cuts < values.shape[1])]) - 1] = False
    np.testing.assert_allclose((np.diff(moved) / factor)[0, inside], np.diff(values)[0, inside], atol=off)
    if keep_zero:
        assert moved[0, int(rows.zero[0])] == 0


def test_float64_levels_are_proven_where_float32_ones_cannot_be():
    generator = np.random.default_rng(3)
    row = np.append(generator.standard_normal(500), 1e4 + generator.standard_normal(500))
    with x64():
        fitted = fit_knq(jnp.asarray(row[None]), 64)
    assert 1 - float(fitted.lower_bound[0]) / float(fitted.sse[0]) <= 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("length", [500, 70000])
def test_values_that_stay_where_they_are_change_no_bit(length, weighted):
    row = np.round(np.random.default_rng(4).standard_normal((1, length)) * 50).astype(np.float32)
    with x64():
        sort = sort_rows if length < 65536 else sort_long_rows
        rows = sort(row, np.full(1, 64.0), weights_of(row) if weighted else None, None, True)
        same = rows.with_values(no_gaps(rows, 16).narrow)
        cuts = np.arange(0, int(rows.size[0]) + 1, 3)[None]
        for a, b in zip(
            (rows.value_at(cuts), *rows.sums_below(cuts)), (same.value_at(cuts), *same.sums_below(cuts)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_a_level_at_zero_stays_there_beside_weights_that_are_rounded_away():
    row = np.array([[-1, 1e-18, 1.00001e-18, 1000]], np.float32)
    weights = np.array([[1e-20, 1, 1, 1]], np.float32)
    for num_levels in (2, 3, 4):
        for tolerance in (None, 1e-6):
            fitted = fit_knq(row, num_levels, weights=weights, keep_zero=True, tolerance=tolerance)
            assert (np.asarray(fitted.levels) == 0).any()
            assert float(fitted.lower_bound[0]) <= float(fitted.sse[0])


def error_of(row, weights, levels):
    levels, row = np.unique(np.asarray(levels, np.float64)), row.astype(np.float64)
    away = row - levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, row)]
    return float((weights.astype(np.float64) * away**2).sum())


@pytest.mark.parametrize(
    ("far", "weights_of_far"),
    [
        ((1.7221562e9, 7.1385612e10), (7e-9, 2e-26)),
        ((-1.7221562e9, 7.1385612e10), (1e-12, 3e-12)),
        ((-1e6, -1e5), (1e-7, 1e-9)),
    ],
)
@pytest.mark.parametrize(
    ("length", "num_levels", "keep_zero", "dtype"),
    [(300, 4, True, "float32"), (2000, 6, False, "bfloat16"), (8192, 4, True, "float64"), (70000, 4, False, "float32")],
)
def test_far_values_of_next_to_no_weight_move_no_other_level(length, num_levels, keep_zero, dtype, far, weights_of_far):
    """The row's best levels are those of the other values, and maybe levels at the far values."""
    rng = np.random.default_rng(length)
    row = np.concatenate([far, rng.standard_normal(length)]).astype(dtype)
    weights = np.concatenate([weights_of_far, rng.exponential(size=length) ** 3]).astype(np.float32)
    order = rng.permutation(length + 2)
    fitted = fit_knq(row[None, order], num_levels, weights=weights[None, order], keep_zero=keep_zero)
    best = np.inf
    for held in (row[:0], row[:1], row[1:2], row[:2]):
        others = fit_knq(row[None, 2:], num_levels - len(held), weights=weights[None, 2:], keep_zero=keep_zero)
        levels = np.concatenate([np.asarray(others.levels[0], np.float64), held.astype(np.float64)])
        best = min(best, error_of(row, weights, levels))
    assert error_of(row, weights, fitted.levels[0]) <= best * (1 + 1e-6)
    bound, sse = float(fitted.lower_bound[0]), float(fitted.sse[0])
    assert sse * (1 - 2e-6) <= bound
    assert bound * float(fitted.scale[0]) ** 2 <= best * (1 + 1e-6)


@pytest.mark.parametrize("keep_zero", [False, True])
@pytest.mark.parametrize("weights_of_far", [(7e-9, 2e-26), (1e-12, 1e-12), (3e-20, 1e-3)])
def test_a_level_of_values_that_weigh_next_to_nothing_is_their_mean(weights_of_far, keep_zero):
    """Sums in units of the heaviest weight and the farthest value do not resolve it: the error was 0.8 % above."""
    rng = np.random.default_rng(3)
    rows, weights = rng.standard_normal((4, 40)).astype(np.float32), np.ones((4, 40), np.float32)
    rows[:, [5, 30]], weights[:, [5, 30]] = [1.7221562e9, 7.1385612e10], weights_of_far
    fitted = fit_knq(rows, 4, weights=weights, keep_zero=keep_zero)
    traced = jax.jit(functools.partial(fit_knq, num_levels=4, keep_zero=keep_zero))(rows, weights=weights)
    searched = fit_knq(rows, 4, weights=weights, keep_zero=keep_zero, tolerance=None)
    np.testing.assert_array_equal(traced.levels, searched.levels)
    rounding = level_rounding(rows, weights, fitted) * np.asarray(fitted.scale, np.float64) ** 2
    for r, row in enumerate(rows):
        best = exact_optimum(row, weights[r], 4, keep_zero)
        assert exact_error(row, weights[r], fitted.levels[r]) <= best * Fraction(1 + 1e-6) + Fraction(rounding[r])
