"""KNQ against brute force, kmeans1d and a slow exact weighted dynamic programme; laws; host and traced paths alike."""

import itertools

import jax
import jax.numpy as jnp
import kmeans1d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax._src.knq.knq import fit_knq
from nuqjax._src.platform.host import x64

FAMILIES = {
    "normal": lambda g, n: g.standard_normal(n),
    "t3": lambda g, n: g.standard_t(3, n),
    "laplace": lambda g, n: g.laplace(size=n),
    "uniform": lambda g, n: g.uniform(size=n),
    "log-normal": lambda g, n: g.lognormal(size=n),
    "far apart": lambda g, n: g.standard_normal(n) + g.choice([-100, 100], n),
    "outlier": lambda g, n: np.append(g.standard_normal(n - 1) + g.choice([-3, 3], n - 1), 1e6),
    "lattice": lambda g, n: np.round(g.standard_normal(n) * 8) / 8,
    "huge": lambda g, n: np.clip(g.standard_normal(n), -3, 3) * 1e38,
    "tiny": lambda g, n: np.where(np.abs(x := g.standard_normal(n) * 1e-35) < 1e-37, 0, x),
}


def row_of(name, length, seed=0):
    return FAMILIES[name](np.random.default_rng(seed), length).astype(np.float32)


def squared_error(row, levels, scale, weights=None):
    """Of the nearest levels, in float64, in units of the scale's square."""
    row, levels = row.astype(np.float64) / scale, levels.astype(np.float64) / scale
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, row)]
    return float(np.sum((row - nearest) ** 2 * (1 if weights is None else weights)))


def optimum(row, num_levels, scale):
    """By kmeans1d."""
    if len(np.unique(row)) <= num_levels:
        return 0.0
    row = row.astype(np.float64) / scale
    return squared_error(row, np.sort(kmeans1d.cluster(row, num_levels).centroids), 1.0)


def weighted_optimum(row, weights, num_levels, zero=False):
    """By an exact dynamic programme over all intervals, in float64; with `zero` one interval has the level 0."""
    order = np.argsort(row)
    x, w = row[order].astype(np.float64), weights[order].astype(np.float64)
    size = len(x)
    free = np.full((size + 1, size + 1), np.inf)
    held = np.full((size + 1, size + 1), np.inf)
    for a, b in itertools.combinations_with_replacement(range(size + 1), 2):
        part, heavy = x[a:b], w[a:b]
        total = heavy.sum()
        mean = (heavy * part).sum() / total if total > 0 else 0.0
        free[a, b] = (heavy * (part - mean) ** 2).sum()
        held[a, b] = (heavy * part**2).sum()
    without = np.where(np.arange(size + 1) == 0, 0.0, np.inf)
    with_zero = np.full(size + 1, np.inf)
    for _ in range(num_levels):
        after = np.minimum((without[:, None] + held).min(0), (with_zero[:, None] + free).min(0))
        without, with_zero = (without[:, None] + free).min(0), after
    return with_zero[-1] if zero else without[-1]


def assert_contract(row, fitted, num_levels, weights=None):
    """Levels ascend, the squared error is that of the levels, the bound is below it; returns the squared error."""
    levels, scale = np.asarray(fitted.levels[0]), float(fitted.scale[0])
    assert levels.shape == (num_levels,)
    assert (np.diff(levels) >= 0).all()
    sse = squared_error(row, levels, scale, weights)
    np.testing.assert_allclose(float(fitted.sse[0]), sse, rtol=2.0**-22, atol=1e-30)  # rounded to float32 once
    assert 0 <= float(fitted.lower_bound[0]) <= float(fitted.sse[0])
    return sse


@pytest.mark.parametrize("num_levels", [2, 3, 16, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_short_rows_are_optimal_and_proven(name, num_levels):
    row = row_of(name, 1000)
    fitted = fit_knq(jnp.asarray(row[None]), num_levels)
    sse = assert_contract(row, fitted, num_levels)
    best = optimum(row, num_levels, float(fitted.scale[0]))
    # Levels are rounded to float32: that adds at most n·(2⁻²⁴ · 2)² to a sum of squares of magnitudes below 2.
    assert sse <= best * (1 + 1e-9) + 1000 * 2.0**-46
    assert float(fitted.lower_bound[0]) <= best * (1 + 1e-12)
    assert sse - float(fitted.lower_bound[0]) <= 1e-6 * sse + 1000 * 2.0**-46


@pytest.mark.parametrize("num_levels", [4, 16, 64, 256])
@pytest.mark.parametrize("name", FAMILIES)
def test_long_rows_are_optimal_and_proven(name, num_levels):
    row = row_of(name, 6000)
    fitted = fit_knq(jnp.asarray(row[None]), num_levels)
    sse = assert_contract(row, fitted, num_levels)
    best = optimum(row, num_levels, float(fitted.scale[0]))
    rounding = 6000 * 2.0**-46  # of the levels to float32
    assert sse <= best * (1 + 1e-6) + rounding
    assert float(fitted.lower_bound[0]) <= best * (1 + 1e-12)
    assert sse - float(fitted.lower_bound[0]) <= 1e-6 * sse + rounding + sse * 2.0**-22  # both are returned as float32


@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=8),
    st.integers(1, 4),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.booleans(),
)
@settings(max_examples=150)
def test_brute_force_on_tiny_rows(values, num_levels, weights, keep_zero):
    """Weighted and not, with a level held at zero or not; one compiled shape for all."""
    row, weights = np.array(values, np.float32), np.array(weights[: len(values)], np.float32)
    mask = np.arange(8) < len(row)
    padded, heavy = np.resize(row, 8), np.resize(weights, 8)
    for given_weights in (None, heavy):
        fitted = fit_knq(padded[None], num_levels, mask=mask[None], keep_zero=keep_zero,
                         weights=None if given_weights is None else given_weights[None])  # fmt: skip
        counts = np.ones(len(row)) if given_weights is None else weights
        best = weighted_optimum(row, counts, num_levels, keep_zero) / float(fitted.scale[0]) ** 2
        np.testing.assert_allclose(float(fitted.sse[0]), best, rtol=1e-6, atol=8 * 2.0**-46)
        assert float(fitted.lower_bound[0]) <= best * (1 + 1e-6)
        if keep_zero:
            assert (np.asarray(fitted.levels[0]) == 0).any()


@pytest.mark.parametrize("keep_zero", [False, True])
def test_weighted_rows(keep_zero):
    generator = np.random.default_rng(1)
    row = generator.standard_normal(60).astype(np.float32)
    weights = generator.exponential(size=60).astype(np.float32)
    for num_levels in (2, 5, 16):
        fitted = fit_knq(jnp.asarray(row[None]), num_levels, weights=jnp.asarray(weights[None]), keep_zero=keep_zero)
        sse = assert_contract(row, fitted, num_levels, weights.astype(np.float64))
        best = weighted_optimum(row, weights, num_levels, keep_zero) / float(fitted.scale[0]) ** 2
        np.testing.assert_allclose(sse, best, rtol=1e-9, atol=60 * 2.0**-46)
        assert float(fitted.lower_bound[0]) <= best


PATHS = {"plain": (), "both": ("weights", "mask")}


@pytest.mark.slow
@pytest.mark.parametrize("given_arrays", PATHS)
@pytest.mark.parametrize(
    ("count", "length", "num_levels"),
    [
        # Of each kind of traced programme one is enough on the other versions: those of `test_fit_export` are more.
        pytest.param(1, 1500, 4, marks=pytest.mark.versionless),
        (20, 40, 5),
        pytest.param(18, 300, 16, marks=pytest.mark.versionless),
    ],
)
def test_host_and_traced_paths_agree_bit_for_bit(given_arrays, count, length, num_levels):
    generator = np.random.default_rng(2)
    rows = jnp.asarray(generator.standard_t(3, (count, length)), jnp.float32)
    weights = np.where(generator.uniform(size=rows.shape) < 0.1, 0, generator.exponential(size=rows.shape))
    arrays = {
        "weights": jnp.asarray(weights, jnp.float32),
        "mask": jnp.asarray(generator.uniform(size=rows.shape) < 0.9),
    }  # fmt: skip
    arrays = {name: arrays[name] for name in PATHS[given_arrays]}
    keep_zero = given_arrays == "both"
    host = fit_knq(rows, num_levels, keep_zero=keep_zero, **arrays)
    traced = jax.jit(lambda rows, arrays: fit_knq(rows, num_levels, keep_zero=keep_zero, **arrays))(rows, arrays)
    np.testing.assert_array_equal(host.levels, traced.levels)
    np.testing.assert_array_equal(host.scale, traced.scale)
    np.testing.assert_allclose(host.sse, traced.sse, rtol=2.0**-22)
    with x64():
        np.testing.assert_array_equal(fit_knq(rows, num_levels, keep_zero=keep_zero, **arrays).levels, host.levels)


def test_many_rows_equal_rows_alone():
    rows = np.random.default_rng(3).standard_normal((40, 200)).astype(np.float32)
    together = np.asarray(fit_knq(rows, 6).levels)
    for r in (0, 17, 39):  # alone, the dense programme has more cuts; both hold every value
        np.testing.assert_array_equal(fit_knq(rows[r : r + 1], 6).levels[0], together[r])


def test_permutation_shift_of_exponent_and_repetition():
    row = np.random.default_rng(4).standard_t(5, 300).astype(np.float32)
    levels = np.asarray(fit_knq(row[None], 7).levels)
    shuffled = np.random.default_rng(5).permutation(row)
    np.testing.assert_array_equal(fit_knq(shuffled[None], 7).levels, levels)
    np.testing.assert_array_equal(fit_knq(row[None] * 2.0**20, 7).levels, levels * 2.0**20)
    np.testing.assert_array_equal(-np.asarray(fit_knq(-row[None], 7).levels)[:, ::-1], levels)
    assert fit_knq(row[None], 8).sse[0] <= fit_knq(row[None], 7).sse[0]


def test_integer_weights_are_repetitions_and_zero_weights_nothing():
    generator = np.random.default_rng(6)
    row = generator.standard_normal(100).astype(np.float32)
    times = generator.integers(0, 4, 100)
    weighted = fit_knq(row[None], 6, weights=times[None].astype(np.float32))
    repeated = fit_knq(np.repeat(row, times)[None], 6)
    np.testing.assert_allclose(weighted.levels, repeated.levels, rtol=2.0**-22)
    wild = np.where(times == 0, 1e3, row).astype(np.float32)
    np.testing.assert_allclose(
        fit_knq(wild[None], 6, weights=times[None].astype(np.float32)).levels, weighted.levels, rtol=2.0**-16
    )


def test_masked_values_do_not_count():
    row = np.random.default_rng(7).standard_normal(90).astype(np.float32)
    mask = np.arange(120) < 90
    padded = np.append(row, np.full(30, 7.0, np.float32))
    np.testing.assert_array_equal(fit_knq(padded[None], 5, mask=mask[None]).levels, fit_knq(row[None], 5).levels)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_few_distinct_values_come_back_exactly(dtype):
    values = np.array([-3.5, -0.1, 0.3, 0.7, 11.0]).astype(jnp.dtype(dtype))
    row = jnp.asarray(np.resize(values, 64), dtype)[None]
    expected = np.append(values, [values[-1]] * 3).astype(np.float32)
    fitted = fit_knq(row, 8)
    np.testing.assert_array_equal(fitted.levels[0], expected)
    assert float(fitted.sse[0]) == 0


def test_degenerate_rows():
    np.testing.assert_array_equal(fit_knq(jnp.full((1, 50), 0.3), 4).levels, np.full((1, 4), np.float32(0.3)))
    np.testing.assert_array_equal(fit_knq(jnp.array([[2.5]]), 3).levels, np.full((1, 3), 2.5))
    nothing = fit_knq(jnp.ones((2, 5)), 3, mask=jnp.zeros((2, 5), bool))
    np.testing.assert_array_equal(nothing.levels, np.zeros((2, 3)))
    np.testing.assert_array_equal(nothing.sse, np.zeros(2))
    assert fit_knq(jnp.zeros((0, 5)), 3).levels.shape == (0, 3)
    assert fit_knq(jnp.zeros((2, 0)), 3).levels.shape == (2, 3)
    np.testing.assert_allclose(fit_knq(jnp.array([[1.0, 2.0, 6.0]]), 1).levels, [[3.0]])


@pytest.mark.parametrize("kind", ["plain", "pinned", "weighted"])
@pytest.mark.parametrize("num_levels", [2, 4, 16, 64])
def test_the_search_finds_the_optimum_without_the_proof(num_levels, kind):
    rng = np.random.default_rng(num_levels)
    for length in (300, 1100, 2304, 4608):
        rows = jnp.asarray(rng.standard_t(3, (9, length)), jnp.float32)
        weights = jnp.asarray(rng.uniform(size=rows.shape), jnp.float32) if kind == "weighted" else None
        given = {"weights": weights, "keep_zero": kind == "pinned"}
        found, proven = (np.asarray(fit_knq(rows, num_levels, tolerance=t, **given).sse) for t in (None, 1e-6))
        assert (found <= proven * (1 + 1e-6)).all()


def test_float64_rows():
    with x64():
        row = np.random.default_rng(8).standard_normal(500)
        fitted = fit_knq(jnp.asarray(row)[None], 8)
        assert fitted.levels.dtype == jnp.float64
        best = optimum(row, 8, float(fitted.scale[0]))
        np.testing.assert_allclose(
            squared_error(row, np.asarray(fitted.levels[0]), float(fitted.scale[0])), best, rtol=1e-12
        )


def test_without_the_proof_the_levels_are_the_same():
    rows = jnp.asarray(np.random.default_rng(9).standard_normal((1, 2000)), jnp.float32)
    with_proof, without = fit_knq(rows, 8), fit_knq(rows, 8, tolerance=None)
    np.testing.assert_array_equal(with_proof.levels, without.levels)
    assert float(without.lower_bound[0]) == 0 < float(with_proof.lower_bound[0])


def test_rows_of_another_device_are_proven_on_the_host_and_else_stay_there(monkeypatch):
    generator = np.random.default_rng(10)
    rows = jnp.asarray(generator.standard_t(3, (1, 400)), jnp.float32)
    weights = jnp.asarray(generator.exponential(size=rows.shape), jnp.float32)
    host = fit_knq(rows, 4, weights=weights)
    monkeypatch.setattr("nuqjax._src.knq.knq._elsewhere", lambda array: isinstance(array, jax.Array))
    away = fit_knq(rows, 4, weights=weights)
    for a, b in zip(away, host, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.devices() == rows.devices()
    np.testing.assert_array_less(away.sse * (1 - 1.1e-6), away.lower_bound)
    monkeypatch.setattr("nuqjax._src.knq.knq.fit_on_host", None)
    np.testing.assert_array_equal(fit_knq(rows, 4, weights=weights, tolerance=None).levels, host.levels)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_subnormal_values_count_as_zero_on_the_host_too(dtype):
    values = jnp.array([[-3e-39, 5e-39, 0.0, 2e-38, 4e-38, 5e-38, 1e-37, 2e-39]], jnp.float32)
    rows = np.asarray(values.astype(dtype))
    without = np.where(np.abs(rows.astype(np.float64)) < float(jnp.finfo(dtype).tiny), 0, rows).astype(rows.dtype)
    np.testing.assert_array_equal(fit_knq(rows, 3).levels, fit_knq(without, 3).levels)
