"""The baselines against brute force over their grids, published tables, and their rules in exact arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from nuqjax._src.fit.grid import (
    fit_dfp,
    fit_normal,
    fit_pow2,
    fit_quantile,
    fit_uniform,
    fit_uniform_pow2,
    normal_table,
)

N = 24


def jitted(method):
    """The method compiled, which gives what it gives of NumPy's rows by NumPy: levels bit for bit."""
    compiled = jax.jit(method, static_argnames=("num_levels", "keep_zero"))

    def both(rows, num_levels, **options):
        fitted, host = compiled(rows, num_levels, **options), method(np.asarray(rows), num_levels, **options)
        for name in ("levels", "scale"):
            traced, here = getattr(fitted, name), getattr(host, name)
            assert traced.dtype == here.dtype
            np.testing.assert_array_equal(here, traced, err_msg=name)
        np.testing.assert_allclose(host.sse, fitted.sse, rtol=2.0**-22)
        return fitted

    return both


uniform, uniform_pow2, dfp = jitted(fit_uniform), jitted(fit_uniform_pow2), jitted(fit_dfp)
normal, quantile, pow2 = jitted(fit_normal), jitted(fit_quantile), jitted(fit_pow2)

values = st.one_of(st.integers(-16, 16).map(float), st.floats(-100, 100, width=32, allow_subnormal=False))
rows_of_values = st.lists(values, min_size=N, max_size=N).map(lambda row: np.float32([row]))
weights_of_values = st.lists(st.integers(0, 8), min_size=N, max_size=N).map(lambda row: np.float32([row]))


def grid(num_levels: int) -> np.ndarray:
    """The multiples of the step in a two's-complement word of `num_levels` values."""
    return np.arange(-(num_levels // 2), num_levels - num_levels // 2)


def squares(row, levels) -> np.ndarray:
    """(x − nearest level)² of each value in float64; the levels need not ascend."""
    levels = np.sort(np.asarray(levels, np.float64))
    middle = (levels[1:] + levels[:-1]) / 2
    return (row.astype(np.float64) - levels[np.searchsorted(middle, row)]) ** 2


def squared_error(row, levels, weights=None) -> float:
    """Σ w·(x − nearest level)² in float64."""
    return float(np.sum(squares(row, levels) * (1 if weights is None else weights)))


def hidden_by_histogram(row) -> float:
    """√Σ(x − its bin's mean)²: by so much a histogram of 4096 bins may change the root of a squared error.

    The distance to the nearest level changes by no more than the value does.
    """
    row = row.astype(np.float64)
    bins = np.floor(row / (np.abs(row).max() / 2048)).astype(int) + 2048
    count = np.maximum(np.bincount(bins, minlength=4097), 1)
    return math.sqrt(np.sum((row - (np.bincount(bins, row, minlength=4097) / count)[bins]) ** 2))


def least_error_of_any_step(row, num_levels: int, weights) -> float:
    """The least squared error of any step, exactly: between two steps at which a value changes to another multiple,
    the multiples stay, and the best step for given multiples is Σwxk / Σwk².
    """
    row, weights, multiples = row.astype(np.float64), weights.astype(np.float64), grid(num_levels)
    ends = (row[:, None] / (multiples[:-1] + 0.5)).ravel()
    ends = np.unique(ends[ends > 0])
    if not ends.size:
        return float(np.sum(weights * row**2))
    inside = np.concatenate([ends[:1] / 2, (ends[1:] + ends[:-1]) / 2, ends[-1:] * 2])[:, None]
    k = np.clip(np.round(row / inside), multiples[0], multiples[-1])
    moment, square = np.sum(weights * row * k, axis=1), np.sum(weights * k * k, axis=1)
    step = np.where(square > 0, moment / np.where(square > 0, square, 1), 1)[:, None]
    return float(np.sum(weights * (row - step * k) ** 2, axis=1).min())


def rounding_slack(row, weights=None) -> float:
    """What the rounding of a step to float32 (2^-24) may move every level, hence the root of the squared error."""
    return 2.0**-23 * math.sqrt(np.sum(row.astype(np.float64) ** 2 * (1 if weights is None else weights)))


@pytest.mark.parametrize("num_levels", [2, 3, 8])
@given(rows=rows_of_values, weights=weights_of_values)
def test_uniform_has_nearly_the_least_error_on_short_rows(num_levels, rows, weights):
    for w in (np.ones_like(weights), weights):
        levels = np.asarray(uniform(rows, num_levels, weights=w).levels, np.float64)[0]
        step = levels[-1] - levels[-2]
        np.testing.assert_allclose(levels, step * grid(num_levels), rtol=0, atol=2.0**-22 * np.abs(levels).max())
        least = least_error_of_any_step(rows[0], num_levels, w[0])
        got = squared_error(rows[0], levels, w[0])
        assert math.sqrt(got) <= math.sqrt(least) * 1.02 + rounding_slack(rows[0], w[0])


@pytest.mark.parametrize("num_levels", [64, 256])
def test_uniform_has_nearly_the_least_error_where_the_grid_is_fine(num_levels):
    """The error of some values a level has many minima over the step: those of the second, finer search are found."""
    rows = np.random.default_rng(3).standard_t(4, (40, 144)).astype(np.float32)
    for fit in (uniform, fit_uniform):
        levels = np.asarray(fit(rows, num_levels).levels, np.float64)
        least = [least_error_of_any_step(row, num_levels, np.ones_like(row)) for row in rows]
        ratios = [squared_error(row, of_row) / error for row, of_row, error in zip(rows, levels, least, strict=True)]
        assert np.mean(ratios) <= 1.01  # 1.002 measured; 1.02 and more without the finer search


@pytest.fixture(scope="module")
def long_rows() -> np.ndarray:
    """Rows that are searched as histograms: normal, Laplace, positive, with an outlier, and of two clusters."""
    rng, size = np.random.default_rng(7), 8000
    rows = [
        rng.normal(size=size),
        rng.laplace(size=size),
        np.abs(rng.normal(size=size)),
        np.append(rng.normal(size=size - 1), 60),
        rng.normal(size=size) * 0.1 + rng.choice([-1, 1], size),
    ]
    return np.float32(rows)


@pytest.mark.parametrize("num_levels", [2, 3, 16])
def test_uniform_on_long_rows_is_as_good_as_their_histogram_allows(long_rows, num_levels):
    levels = np.asarray(uniform(long_rows, num_levels).levels, np.float64)
    for row, got in zip(long_rows, levels, strict=True):
        steps = np.abs(row).max() * 2.0 ** -np.linspace(-1, 8, 300)
        least = min(squared_error(row, step * grid(num_levels)) for step in steps)
        # Once for the step found, once for the best one.
        slack = 2 * hidden_by_histogram(row) + rounding_slack(row)
        assert math.sqrt(squared_error(row, got)) <= math.sqrt(least) + slack


# The step of least mean squared error of such grids, and that error, on densities of variance 1, by integration in
# float64: for odd numbers of levels they are the symmetric uniform quantizers of Max 1960. The errors for even ones
# are from ratios in dB, printed to 0.01.
TABLE = {
    ("normal", 4): (1.0484, 10**-0.826),
    ("normal", 16): (0.33861, 10**-1.926),
    ("normal", 256): (0.030766, 10**-4.057),
    ("normal", 3): (1.224, 0.190174),
    ("normal", 15): (0.35341, 0.0128894),
    ("laplace", 3): (1.4142, 0.264241),
    ("laplace", 15): (0.48688, 0.0273952),
}
PRINTED = 10**0.0005 - 1  # half of the last digit of a ratio in dB


@pytest.fixture(scope="module")
def unit_samples() -> np.ndarray:
    rng, size = np.random.default_rng(1), 2**18
    return np.float32([rng.normal(size=size), rng.laplace(scale=math.sqrt(0.5), size=size)])


@pytest.mark.parametrize("num_levels", [3, 4, 15, 16, 256])
def test_uniform_reaches_the_tabled_error(unit_samples, num_levels):
    fitted = np.asarray(uniform(unit_samples, num_levels).levels, np.float64)
    for kind, row, levels in zip(("normal", "laplace"), unit_samples, fitted, strict=True):
        if (kind, num_levels) not in TABLE:
            continue
        step, tabled = TABLE[kind, num_levels]
        square = squares(row, step * grid(num_levels))
        six_sigma = 6 * square.std() / math.sqrt(row.size)
        assert abs(square.mean() - tabled) <= six_sigma + tabled * PRINTED, "the oracle and the sample"
        slack = (2 * hidden_by_histogram(row) + rounding_slack(row)) / math.sqrt(row.size)
        assert math.sqrt(squares(row, levels).mean()) <= math.sqrt(square.mean()) + slack
        # And no better than the density allows.
        assert squares(row, levels).mean() >= tabled * (1 - PRINTED) - six_sigma


def test_uniform_of_values_on_a_grid_is_that_grid():
    rows = np.float32([0.3]) * np.arange(-8, 8, dtype=np.float32)[None]
    levels = np.asarray(uniform(rows, 16).levels, np.float64)[0]
    np.testing.assert_allclose(levels, rows[0], rtol=2.0**-22)


@pytest.mark.parametrize("num_levels", [2, 3, 16])
@given(rows=rows_of_values, exponent=st.integers(-60, 60), weights=weights_of_values)
def test_uniform_pow2_is_the_best_of_all_powers(num_levels, rows, exponent, weights):
    rows = np.ldexp(rows, exponent)
    for w in (np.ones_like(weights), weights):
        levels = np.asarray(uniform_pow2(rows, num_levels, weights=w).levels, np.float64)[0]
        step = levels[-1] - levels[-2]
        assert math.frexp(step)[0] == 0.5
        np.testing.assert_array_equal(levels, step * grid(num_levels))
        least = min(squared_error(rows[0], 2.0**e * grid(num_levels), w[0]) for e in range(-90, 70))
        assert squared_error(rows[0], levels, w[0]) <= least * (1 + 1e-12)


@pytest.mark.parametrize("num_levels", [1, 2, 3, 16])
@given(rows=rows_of_values, exponent=st.integers(-60, 60), weights=weights_of_values)
def test_pow2_is_the_best_of_all_powers(num_levels, rows, exponent, weights):
    rows = np.ldexp(rows, exponent)
    powers = 2.0 ** -np.arange(num_levels)

    def pattern(top):
        return np.sort([0, *(top * powers[: num_levels // 2]), *(-top * powers[: (num_levels - 1) // 2])])

    for w in (np.ones_like(weights), weights):
        levels = np.asarray(pow2(rows, num_levels, weights=w).levels, np.float64)[0]
        np.testing.assert_array_equal(levels, pattern(levels[-1]))
        assert num_levels == 1 or math.frexp(levels[-1])[0] == 0.5
        least = min(squared_error(rows[0], pattern(2.0**e), w[0]) for e in range(-90, 70))
        assert squared_error(rows[0], levels, w[0]) <= least * (1 + 1e-12)


@pytest.mark.parametrize(("method", "num_levels"), [(uniform_pow2, 3), (uniform_pow2, 16), (pow2, 3), (pow2, 16)])
def test_powers_on_long_rows(long_rows, method, num_levels):
    levels = np.asarray(method(long_rows, num_levels).levels, np.float64)
    for row, got in zip(long_rows, levels, strict=True):
        errors = [squared_error(row, got * 2.0**e) for e in range(-12, 13)]
        assert errors[12] == min(errors), (
            "the best power is too far ahead of the next for the histogram to confuse them"
        )


@pytest.mark.parametrize("num_levels", [2, 16, 256])
def test_dfp_follows_ristrettos_rule(num_levels):
    magnitudes = [1, 2.0**-30, 2.0**60, 3, 0.75, 1 + 2.0**-23, 1 - 2.0**-24, 1.999, 127, 128, 129, 2.0**-110, 1e-33]
    magnitudes = np.float32([*magnitudes, 2.0**126])
    rows = np.stack([magnitudes, -magnitudes / 2, -magnitudes / 4], axis=-1)
    rows = np.concatenate([rows, -rows])
    levels = np.asarray(dfp(rows, num_levels).levels, np.float64)
    for row, got in zip(rows, levels, strict=True):
        mantissa, exponent = math.frexp(float(np.abs(row).max()))
        ceil_log2 = exponent - 1 if mantissa == 0.5 else exponent
        integer_bits = ceil_log2 + 1  # ⌈log2(largest) + 1⌉, sign included
        fraction_bits = int(math.log2(num_levels)) - integer_bits
        np.testing.assert_array_equal(got, grid(num_levels) * 2.0**-fraction_bits)


def test_dfp_saturates_the_largest_where_it_is_a_power_of_two_and_only_there():
    assert dfp(np.float32([[4.0, -1]]), 8).levels[0, -1] == 3
    assert dfp(np.float32([[-4.0, -1]]), 8).levels[0, 0] == -4
    assert dfp(np.float32([[np.nextafter(np.float32(4), np.float32(5)), -1]]), 8).levels[0, -1] == 6


def test_dfp_at_the_top_of_float32_stays_finite():
    levels = np.asarray(dfp(np.float32([[3e38, -1e38]]), 16).levels)
    assert np.isfinite(levels).all()
    np.testing.assert_array_equal(levels[0, 1:], np.arange(-7, 8) * 2.0**125)


@pytest.mark.parametrize("num_levels", [3, 6, 255])
def test_dfp_needs_a_word(num_levels):
    with pytest.raises(ValueError, match=f'method "dfp": {num_levels} levels, but a fixed-point word has a power of'):
        fit_dfp(jnp.ones((1, 3)), num_levels)


# Dettmers et al., QLoRA, appendix E: computed there in float32 from an offset rounded to 0.9677083.
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def test_normal_is_nf4_at_16_levels():
    # The offset's rounding, 3.4e-8, over the density there, 0.0727, moves its quantile 1.848 by 4.6e-7; the published
    # digits are float32 ones of quotients of float32 quantiles.
    np.testing.assert_allclose(normal_table(16), NF4, rtol=0, atol=4.6e-7 / 1.848 + 4 * 2.0**-24)
    rows = np.float32([[0.5, -3, 2], [0, 0.25, 0.125]])
    levels = np.asarray(normal(rows, 16).levels)
    np.testing.assert_array_equal(levels, np.float32([[3], [0.25]]) * np.float32(normal_table(16)))


@pytest.mark.parametrize("num_levels", [3, 4, 5, 8, 15, 16, 17, 32, 255, 256])
def test_normal_table_is_quantiles_of_the_normal_distribution(num_levels):
    table = np.array(normal_table(num_levels))
    positive, negative = num_levels // 2, num_levels - 1 - num_levels // 2
    assert (np.diff(table) > 0).all()
    assert (table[0], table[negative], table[-1]) == (-1, 0, 1)
    end = 1 - (1 / (2 * num_levels) + 1 / (2 * (num_levels - 1))) / 2
    for side, count in ((table[negative + 1 :], positive), (-table[negative - 1 :: -1], negative)):
        wanted = norm.ppf(np.linspace(0.5, end, count + 1)[1:]) / norm.ppf(end)
        np.testing.assert_allclose(side, wanted, rtol=1e-12)


def test_normal_tables_too_small_for_quantiles():
    assert normal_table(1) == [0]
    assert normal_table(2) == [-1, 1]


@pytest.mark.parametrize("num_levels", [1, 5, 8])
@given(rows=rows_of_values)
def test_quantile_groups_have_equal_counts(num_levels, rows):
    levels = np.asarray(quantile(rows, num_levels).levels)[0]
    ordered = np.sort(rows[0].astype(np.float64))
    # A value is in the group into which the middle of its place, (i + ½)/N, falls.
    group = (2 * np.arange(N) + 1) * num_levels // (2 * N)
    sizes = np.bincount(group)
    assert sizes.max() - sizes.min() <= 1
    wanted = np.array([ordered[group == k].mean() for k in range(num_levels)])
    np.testing.assert_allclose(levels, wanted, rtol=2.0**-24 * 1.01, atol=N * 2.0**-53 * np.abs(ordered).max())


def test_quantile_groups_have_equal_weights():
    rows = np.float32([[4, 1, 3, 2, 7, 6]])
    weights = np.float32([[1, 2, 1, 2, 0, 2]])  # in order of value: 2, 2 | 1, 1, 2
    assert quantile(rows, 2, weights=weights).levels.tolist() == [[1.5, (3 + 4 + 12) / 4]]
    # One value outweighs two groups: the empty one repeats the level below.
    levels = quantile(np.float32([[1, 2, 3]]), 4, weights=np.float32([[1, 10, 1]])).levels
    assert levels.tolist() == [[1, 1, 2, 3]]


@pytest.mark.parametrize("method", [uniform, uniform_pow2, dfp, normal, quantile, pow2])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 1e-30])
def test_constant_rows(method, value):
    fitted = method(np.full((1, 5), value, np.float32), 8)
    levels = np.asarray(fitted.levels)[0]
    assert np.isfinite(levels).all()
    assert (np.diff(levels) >= 0).all()
    if method is not dfp or value <= 0:  # Ristretto's rule saturates a positive power of two
        nearest = levels[np.abs(levels - np.float32(value)).argmin()]
        assert nearest == pytest.approx(np.float32(value), rel=2.0**-22 if value != 1e-30 or method is uniform else 0.5)


TINY, HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@pytest.mark.parametrize("method", [uniform, uniform_pow2, dfp, normal, quantile, pow2])
def test_nasty_rows_have_the_same_levels_traced_and_on_the_host(method):
    """The comparison is in `jitted`: subnormal values, the ends of float32, ties, zeros of both signs, far values."""
    rng = np.random.default_rng(3)
    normal_row, steps = rng.normal(size=N), np.arange(N) - N // 2
    rows = [
        normal_row * TINY, normal_row * TINY / 1000, normal_row * 1e-30, np.clip(normal_row, -1, 1) * HUGE, steps / 4,
        steps * np.float32(0.3), np.copysign(0.0, normal_row), normal_row + 1000, rng.standard_cauchy(N),
        np.where(normal_row > 1, HUGE, TINY), np.round(rng.laplace(size=N)) * 0.7, np.full(N, -1e-38),
    ]  # fmt: skip
    weights = rng.choice([0, 1e-30, 0.5, 1, 3e10], size=(1, N)).astype(np.float32)
    for row in np.float32(rows):
        method(row[None], 8, weights=np.ones_like(weights))
        method(row[None], 8, weights=weights)
