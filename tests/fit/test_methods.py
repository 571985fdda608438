"""`fit`: what every method promises, whatever its levels are, and what it says of wrong input."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax import Fit, fit
from nuqjax._src.fit.methods import METHODS
from nuqjax._src.platform.host import x64

K, R, N = 4, 2, 24
BASELINES = [method for method in METHODS if method != "knq"]
jit_fit = jax.jit(fit, static_argnames=("num_levels", "method", "keep_zero", "tolerance"))

all_methods = pytest.mark.parametrize("method", METHODS)
baselines = pytest.mark.parametrize("method", BASELINES)
values = st.one_of(st.integers(-9, 9).map(float), st.floats(-100, 100, width=32, allow_subnormal=False))
some_rows = st.lists(values, min_size=R * N, max_size=R * N).map(lambda x: np.float32(x).reshape(R, N))
few_examples = settings(max_examples=25)


def sample(seed: int = 0, shape: tuple[int, ...] = (R, N)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same(first: Fit, second: Fit) -> None:
    """Bit for bit."""
    for name, a, b in zip(Fit._fields, first, second, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=name)


def same_on_the_host(method: str, rows, fitted: Fit, **options) -> None:
    """What is fitted by NumPy: the same scales and, but for the last bits of float64, the same levels and error."""
    host = fit(np.asarray(rows), K, method, **options)
    double = fitted.levels.dtype == jnp.float64
    np.testing.assert_allclose(host.levels, fitted.levels, rtol=0, atol=2.0**-46 * np.abs(rows).max() if double else 0)
    np.testing.assert_array_equal(host.scale, fitted.scale)
    np.testing.assert_allclose(host.sse, fitted.sse, rtol=2.0**-22)


def check(fitted: Fit, rows, num_levels, weights=None, mask=None) -> None:
    """Shapes, order, and the squared error of the returned levels on the data, in float64."""
    rows = np.asarray(rows, np.float64)
    counted = np.ones(rows.shape) if weights is None else np.asarray(weights, np.float64)
    counted = counted if mask is None else np.where(mask, counted, 0)
    levels, sse, bound, scale = (np.asarray(x, np.float64) for x in fitted)
    assert levels.shape == (len(rows), num_levels)
    assert sse.shape == bound.shape == scale.shape == (len(rows),)
    assert np.isfinite(levels).all()
    assert (np.diff(levels) >= 0).all()
    assert (bound >= 0).all()
    assert (bound <= sse * (1 + 2.0**-23)).all()
    largest = np.abs(rows * (counted > 0)).max(axis=-1, initial=0)
    np.testing.assert_array_equal(scale, np.where(largest > 0, 2.0 ** (np.frexp(largest)[1] - 1), 1))
    square = ((rows[..., None] - levels[:, None, :]) ** 2).min(axis=-1)
    wanted = np.sum(np.where(counted > 0, square * counted, 0), axis=-1) / scale**2
    # Rounded to float32 once or twice (a common factor of the weights), after sums in float64.
    np.testing.assert_allclose(sse, wanted, rtol=2.0**-22, atol=1e-30)


@all_methods
def test_contract(method):
    rows = sample() + np.float32(0.3)
    for keep_zero in (False, True):
        fitted = jit_fit(rows, K, method, keep_zero=keep_zero)
        check(fitted, rows, K)
        same_on_the_host(method, rows, fitted, keep_zero=keep_zero)
        assert all(x.dtype == jnp.float32 for x in fitted)
        assert not keep_zero or (fitted.levels == 0).any(axis=-1).all()
        assert method == "knq" or not fitted.lower_bound.any()


@pytest.mark.parametrize(("method", "dtype"), [*((method, jnp.bfloat16) for method in BASELINES), ("enq", jnp.float16)])
def test_narrow_rows_are_fitted_as_float32(method, dtype):
    rows = jnp.asarray(sample() + 0.3, dtype)
    fitted = jit_fit(rows, K, method)
    same(fitted, jit_fit(rows.astype(jnp.float32), K, method))
    same_on_the_host(method, rows, fitted)


@baselines
def test_float64_rows_are_fitted_in_float64(method):
    rows = np.random.default_rng(0).normal(size=(R, N))
    with x64():
        fitted = jit_fit(rows, K, method)
        assert all(x.dtype == jnp.float64 for x in fitted)
        same_on_the_host(method, rows, fitted)
    check(fitted, rows, K)
    single = jit_fit(rows.astype(np.float32), K, method)
    # The same levels but for the rounding of the values to float32 (2^-24) and of the levels again.
    np.testing.assert_allclose(fitted.levels, single.levels, atol=2.0**-21 * np.abs(rows).max())


@baselines
@few_examples
@given(rows=some_rows, seed=st.integers(0, 99))
def test_weights_and_masks(method, rows, seed):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 9, rows.shape).astype(np.float32)
    mask = rng.uniform(size=rows.shape) < 0.8
    fitted = jit_fit(rows, K, method, weights=weights, mask=mask)
    check(fitted, rows, K, weights, mask)
    same_on_the_host(method, rows, fitted, weights=weights, mask=mask)


@all_methods
@settings(max_examples=10)
@given(rows=some_rows, seed=st.integers(0, 99))
def test_the_order_of_the_values_changes_nothing(method, rows, seed):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 5, rows.shape).astype(np.float32)
    order = rng.permutation(N)
    assert (np.asarray(jit_fit(rows, K, method, weights=weights).levels)
            == np.asarray(jit_fit(rows[:, order], K, method, weights=weights[:, order]).levels)).all()  # fmt: skip
    one, other = jit_fit(rows, K, method), jit_fit(rows[:, order], K, method)
    np.testing.assert_array_equal(one.levels, other.levels)
    np.testing.assert_allclose(one.sse, other.sse, rtol=2.0**-23)
    np.testing.assert_array_equal(one.scale, other.scale)


@baselines
def test_the_order_of_many_values_changes_nothing(method):
    rows = sample(3, (1, 5000))
    order = np.random.default_rng(0).permutation(rows.size)
    levels = jit_fit(rows, 8, method).levels
    for other in (jit_fit(rows[:, order], 8, method), fit(rows, 8, method), fit(rows[:, order], 8, method)):
        np.testing.assert_array_equal(other.levels, levels)


@all_methods
@settings(max_examples=10)
@given(rows=some_rows, exponent=st.integers(-60, 60))
def test_a_power_of_two_scales_levels_exactly(method, rows, exponent):
    rows = np.where(np.abs(rows) < 2.0**-20, 0, rows)  # nothing falls out of float32's range
    fitted, scaled = jit_fit(rows, K, method), jit_fit(np.ldexp(rows, exponent), K, method)
    nonzero = np.abs(rows).max(axis=-1) > 0
    np.testing.assert_array_equal(np.ldexp(fitted.levels, exponent)[nonzero], np.asarray(scaled.levels)[nonzero])
    np.testing.assert_array_equal(np.ldexp(fitted.scale, exponent)[nonzero], np.asarray(scaled.scale)[nonzero])
    np.testing.assert_array_equal(fitted.sse, scaled.sse)


@baselines
def test_a_row_is_fitted_by_itself(method):
    rows = sample(5)
    for function in (jit_fit, fit):
        together = function(rows, K, method)
        for r in range(R):
            np.testing.assert_array_equal(function(rows[r : r + 1], K, method).levels[0], together.levels[r])


@all_methods
def test_values_of_weight_zero_do_not_count(method):
    rows, weights = sample(1), np.ones((R, N), np.float32)
    weights[:, ::3] = 0
    fitted = jit_fit(rows, K, method, weights=weights)
    for other in (0.0, 1e5, 3e38, -3e38, 1e-30):
        changed = np.where(weights > 0, rows, np.float32(other))
        same(jit_fit(changed, K, method, weights=weights), fitted)
    check(fitted, rows, K, weights)


@all_methods
def test_masked_values_are_absent_values(method):
    rows = sample(2)
    mask = np.zeros((R, N), bool)
    mask[:, 5:21] = True
    absent = jit_fit(rows[:, 5:21], K, method)
    for other in (0.0, 3e38, -3e38, 1e-30):
        masked = jit_fit(np.where(mask, rows, np.float32(other)), K, method, mask=mask)
        same(masked, absent)


@pytest.mark.parametrize("method", [m for m in BASELINES if m != "quantile"])  # there a weight is not parted
def test_whole_weights_are_duplicates(method):
    rows, weights = sample(4), np.resize(np.float32([1, 2, 3, 0, 2, 4]), (R, N))
    repeated = np.stack([np.repeat(row, w.astype(int)) for row, w in zip(rows, weights, strict=True)])
    weighted, duplicated = jit_fit(rows, K, method, weights=weights), jit_fit(repeated, K, method)
    # Means of other partial sums: a few units of the last place of float32.
    np.testing.assert_allclose(weighted.levels, duplicated.levels, rtol=0, atol=2.0**-22 * np.abs(rows).max())
    np.testing.assert_allclose(weighted.sse, duplicated.sse, rtol=2.0**-20)


@baselines
@pytest.mark.parametrize("scale", [2.0**-20, 3.0, 1e10])
def test_a_common_factor_of_the_weights_does_not_matter(method, scale):
    rows, weights = sample(6), np.random.default_rng(0).uniform(0.5, 2, (R, N)).astype(np.float32)
    one, other = (jit_fit(rows, K, method, weights=w).levels for w in (weights, weights * np.float32(scale)))
    np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-22 * np.abs(rows).max())


@all_methods
@pytest.mark.parametrize("num_levels", [1, 4])
def test_keep_zero_on_rows_of_one_sign(method, num_levels):
    rows = np.float32([[-2] * N, [3] * N, np.linspace(1, 2, N), -np.linspace(1, 2, N), [0] * N])
    fitted = jit_fit(rows, num_levels, method, keep_zero=True)
    check(fitted, rows, num_levels)
    assert (fitted.levels == 0).any(axis=-1).all()


@all_methods
def test_rows_without_values(method):
    nothing = jit_fit(jnp.zeros((2, 0)), K, method)
    check(nothing, np.zeros((2, 0)), K)
    assert not nothing.sse.any()
    assert jit_fit(jnp.zeros((0, 5)), K, method).levels.shape == (0, K)
    assert fit(np.zeros((0, 5), np.float32), K, method).levels.shape == (0, K)
    same_on_the_host(method, np.zeros((2, 0), np.float32), nothing)
    masked = jit_fit(sample(), K, method, mask=np.zeros((R, N), bool))
    same_on_the_host(method, sample(), masked, mask=np.zeros((R, N), bool))
    assert np.isfinite(masked.levels).all()
    assert (np.diff(masked.levels) >= 0).all()
    assert not masked.sse.any()
    assert masked.scale.tolist() == [1, 1]


@all_methods
@pytest.mark.parametrize("magnitude", [1e-37, 3e38])
def test_the_ends_of_float32(method, magnitude):
    rows = np.float32([np.linspace(-1, 0.9, N) * magnitude] * R)
    fitted = jit_fit(rows, K, method)
    same_on_the_host(method, rows, fitted)
    levels = np.asarray(fitted.levels)
    assert np.isfinite(levels).all()
    assert (np.diff(levels) >= 0).all()
    assert np.isfinite(fitted.sse).all()


@all_methods
def test_eager_jit_and_x64_give_the_same_bits(method):
    rows = jnp.asarray(sample(8))
    weights = jnp.asarray(np.random.default_rng(8).uniform(0.5, 2, (R, N)), jnp.float32)
    compiled = jit_fit(rows, K, method, weights=weights)
    same(fit(rows, K, method, weights=weights), compiled)
    with x64():
        same(jit_fit(rows, K, method, weights=weights), compiled)
        same(fit(rows, K, method, weights=weights), compiled)


@all_methods
def test_fit_exports_for_every_platform(method):
    def plain(rows):
        return tuple(fit(rows, K, method))

    exported = jax.export.export(jax.jit(plain), platforms=("cpu", "cuda", "tpu"))(
        jax.ShapeDtypeStruct((R, N), jnp.float32)
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")
    again = jax.export.deserialize(exported.serialize())
    same(Fit(*again.call(sample())), jit_fit(sample(), K, method))


@baselines
def test_arrays_of_numpy_are_taken_and_not_changed(method):
    rows, weights, mask = sample(), np.ones((R, N), np.float32), np.ones((R, N), bool)
    weights[0, 0] = 0
    before = [x.copy() for x in (rows, weights, mask)]
    check(jit_fit(rows, K, method, weights=weights, mask=mask), rows, K, weights, mask)
    for x, y in zip((rows, weights, mask), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_shapes_without_computing():
    shapes = jax.eval_shape(lambda rows: fit(rows, 16, "enq"), jax.ShapeDtypeStruct((3, 100), jnp.bfloat16))
    assert [(x.shape, x.dtype) for x in shapes] == [((3, 16), jnp.float32)] + [((3,), jnp.float32)] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": "kmeans"},
            "unknown method 'kmeans'; known: knq, enq, uniform, uniform_pow2, dfp, normal, quantile, p",
        ),
        ({"rows": jnp.ones(5)}, r"fit: rows of shape \(5,\), but \[R, N\] is wanted"),
        ({"rows": jnp.ones((2, 3, 4))}, r"fit: rows of shape \(2, 3, 4\), but \[R, N\] is wanted"),
        ({"rows": jnp.ones((2, 3), jnp.int32)}, "fit: rows: dtype int32 is not floating, but a floating dtype"),
        ({"rows": jnp.ones((2, 3), jnp.complex64)}, "fit: rows: dtype complex64 is not floating, but a floating dtype"),
        ({"num_levels": 0}, "fit: num_levels is 0, but a whole number from 1 to 256 is wanted"),
        ({"num_levels": 257}, "fit: num_levels is 257, but a whole number from 1 to 256 is wanted"),
        ({"num_levels": 4.0}, "fit: num_levels is 4.0, but a whole number from 1 to 256 is wanted"),
        ({"num_levels": True}, "fit: num_levels is True, but a whole number from 1 to 256 is wanted"),
        ({"weights": jnp.ones((2, 2))}, r"fit: weights of shape \(2, 2\), but the rows are \(2, 3\)"),
        ({"weights": jnp.ones(3)}, r"fit: weights of shape \(3,\), but the rows are \(2, 3\)"),
        ({"mask": jnp.ones((3, 2), bool)}, r"fit: mask of shape \(3, 2\), but the rows are \(2, 3\)"),
        (
            {"num_levels": 6, "method": "dfp"},
            'method "dfp": 6 levels, but a fixed-point word has a power of two of them',
        ),
    ],
)
def test_wrong_input(change, message):
    with pytest.raises(ValueError, match=message):
        fit(**{"rows": jnp.ones((2, 3)), "num_levels": 4, "method": "enq"} | change)
