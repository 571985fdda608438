"""Assignment: the nearest level and the tie rule, against exact fractions; the scale; the distortion."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax import assign
from nuqjax._src.leaf.assign import (
    _binary_search,
    _count_by_table,
    distortion,
    finish,
    row_scale,
    thresholds,
    working_dtype,
)
from nuqjax._src.platform.host import x64

TINY, HUGE = np.finfo(np.float32).tiny, np.finfo(np.float32).max
FIRST, LAST = TINY.view(np.int32).item(), HUGE.view(np.int32).item()
floats = st.floats(-float(HUGE), float(HUGE), width=32, allow_subnormal=False)
jit_row_scale = jax.jit(row_scale)
jit_assign, jit_thresholds, jit_binary_search = jax.jit(assign), jax.jit(thresholds), jax.jit(_binary_search)


def exact_assign(values, levels) -> list[int]:
    """The first level at the least distance, in exact arithmetic: of two at one distance the lower."""
    levels = [Fraction(float(level)) for level in levels]
    values = [Fraction(float(value)) for value in values]
    return [min(range(len(levels)), key=lambda k: abs(value - levels[k])) for value in values]


def float_at(ordinals) -> np.ndarray:
    """The float32 values at places in their order: 0 is at 0, each sign from 2²³ on (below are the subnormal ones)."""
    ordinals = np.clip(ordinals, -LAST, LAST)
    magnitude = np.where(np.abs(ordinals) < FIRST, 0, np.abs(ordinals))
    return np.copysign(magnitude.astype(np.int32).view(np.float32), ordinals).astype(np.float32) + np.float32(0)


def next_above(x: np.float32) -> np.float32:
    """The next float32 that is not subnormal."""
    if -TINY <= x < TINY:
        return np.float32(0 if x < 0 else TINY)
    return np.nextafter(x, np.float32(np.inf))


def near_ties(levels: np.ndarray, count: int) -> np.ndarray:
    """`count` values where a wrong rounding shows: levels, midpoints as rounded, and their neighbouring floats."""
    exact = levels.astype(np.float64)
    at = np.concatenate([((exact[:-1] + exact[1:]) / 2).astype(np.float32), levels, np.float32([0, 1, HUGE, -HUGE])])
    ordinals = np.copysign(np.abs(at).view(np.int32).astype(np.float64), at).astype(np.int64)
    ordinals = np.where(np.abs(ordinals) < FIRST, 0, ordinals)
    return np.resize(float_at(ordinals[:, None] + np.where(ordinals[:, None] == 0, FIRST, 1) * [-1, 0, 1]), count)


@st.composite
def adversarial_levels(draw, count: int) -> np.ndarray:
    """Ascending levels full of trouble: neighbouring floats, equal ones, tiny ones beside huge ones."""
    powers = st.integers(1, 254).map(lambda exponent: exponent << 23)
    anywhere = st.one_of(st.integers(-LAST, LAST), powers, powers.map(lambda n: -n), st.just(0))
    pool = draw(st.lists(anywhere, min_size=1, max_size=6))
    near = st.tuples(st.sampled_from(pool), st.integers(-2, 2))
    return np.sort(float_at([sum(pair) for pair in draw(st.lists(near, min_size=count, max_size=count))]))


@pytest.mark.parametrize("num_levels", [2, 5, 33])
@settings(max_examples=50)
@given(data=st.data())
def test_nearest_level_and_ties_are_exact(num_levels, data):
    levels = data.draw(adversarial_levels(num_levels))
    values = near_ties(levels, 256)
    wanted = exact_assign(values, levels)
    np.testing.assert_array_equal(jit_assign(values[None], levels[None])[0], wanted)
    np.testing.assert_array_equal(assign(values[None], levels[None])[0], wanted)  # by NumPy
    by_table = np.empty(256, np.uint8)
    _count_by_table(values, thresholds(levels), by_table)
    np.testing.assert_array_equal(by_table, wanted)


@pytest.mark.parametrize(("count", "num_levels"), [(3, 5), (3, 100), (200, 5), (200, 100), (2**16, 100)])
def test_on_the_host_subnormal_values_count_as_zero_as_they_do_in_xla(count, num_levels):
    """By comparing, by halving and by a table, along short rows and long ones."""
    rng = np.random.default_rng(count)
    pool = np.float32([0, 0.3, 0.6, 0.9, 1, 1.5, 2, 3, 2.0**30]) * TINY
    levels, rows = (
        rng.choice(pool, size=(2, n)) * rng.choice(np.float32([-1, 1]), size=(2, n)) for n in (num_levels, count)
    )
    levels = np.sort(np.where(np.abs(levels) < TINY, 0, levels))
    found = assign(rows, levels)
    assert isinstance(found, jax.Array)
    np.testing.assert_array_equal(found, jit_assign(rows, levels))
    np.testing.assert_array_equal(found, assign(jnp.asarray(rows), jnp.asarray(levels)))


@pytest.mark.parametrize("num_levels", [2, 33])
@settings(max_examples=50)
@given(data=st.data())
def test_thresholds_are_the_largest_floats_not_above_the_midpoints(num_levels, data):
    levels = data.draw(adversarial_levels(num_levels))
    cuts = np.asarray(jit_thresholds(levels))
    assert (np.diff(cuts[np.isfinite(cuts)]) >= 0).all()
    for k, cut in enumerate(cuts):
        later = levels[levels > levels[k]]
        if later.size == 0:
            assert cut == np.inf
            continue
        middle = (Fraction(float(levels[k])) + Fraction(float(later[0]))) / 2
        assert Fraction(float(cut)) <= middle < Fraction(float(next_above(cut)))


@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**100])
def test_float32_where_the_midpoint_is_no_float(scale):
    one = np.float32(scale)
    up, down = np.nextafter(one, np.float32(np.inf)), np.nextafter(one, np.float32(0))
    levels = np.array([[down, one, up]])
    assert jit_assign(levels, levels).tolist() == [[0, 1, 2]]
    # 1 + 2^-24 (the midpoint) would round to 1, and 1 belongs to the lower level.
    assert jit_assign(np.array([[one, up]]), np.array([[one, up]])).tolist() == [[0, 1]]
    # The midpoint is just below half of the large level, which therefore belongs to it; mirrored, just above.
    leaning = np.array([[-np.float32(TINY), one]])
    assert jit_assign(np.array([[one / 2]]), leaning).tolist() == [[1]]
    assert jit_assign(np.array([[-one / 2]]), -leaning[:, ::-1]).tolist() == [[0]]


@settings(max_examples=50)
@given(data=st.data())
def test_compare_and_binary_search_agree(data):
    levels = data.draw(adversarial_levels(32))
    values = near_ties(levels, 256)[None]
    cuts = jit_thresholds(levels)[None]
    np.testing.assert_array_equal(jit_binary_search(values, cuts), jit_assign(values, levels[None]))


@pytest.mark.parametrize("num_levels", [1, 2, 3, 32, 33, 100, 256])
def test_every_number_of_levels(num_levels):
    rng = np.random.default_rng(num_levels)
    levels = np.sort(rng.normal(size=(3, num_levels)).astype(np.float32), axis=-1)
    rows = rng.normal(size=(3, 200)).astype(np.float32)
    distance = np.abs(rows[..., None].astype(np.float64) - levels[:, None, :])  # exact: no two are close to a tie
    indices = jit_assign(rows, levels)
    assert indices.dtype == jnp.uint8
    np.testing.assert_array_equal(indices, distance.argmin(axis=-1))
    np.testing.assert_array_equal(assign(rows, levels), indices)
    np.testing.assert_array_equal(assign(rows[:, :10], levels), indices[:, :10])
    np.testing.assert_array_equal(jit_assign(levels, levels), np.broadcast_to(np.arange(num_levels), levels.shape))


@pytest.mark.parametrize("num_levels", [3, 40])
def test_of_equal_levels_the_first_is_taken(num_levels):
    rows = np.float32([[-1, 0.2, 0.9, 5]])
    all_equal = np.full((1, num_levels), 0.5, np.float32)
    assert not jit_assign(rows, all_equal).any()
    levels = np.float32([[0] + [1] * (num_levels - 2) + [2]])
    assert jit_assign(np.float32([[0.5, 0.6, 1.5, 1.6]]), levels).tolist() == [[0, 1, 1, num_levels - 1]]
    signed_zeros = np.float32([[-0.0] * (num_levels - 1) + [0.0]])
    assert not jit_assign(rows, signed_zeros).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_dtypes_are_compared_as_float32(dtype):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(2, 100)), dtype)
    levels = jnp.sort(jnp.asarray(rng.normal(size=(2, 8)), jnp.float32))
    np.testing.assert_array_equal(jit_assign(rows, levels), jit_assign(rows.astype(jnp.float32), levels))
    narrow = levels.astype(dtype)
    np.testing.assert_array_equal(jit_assign(rows, narrow), jit_assign(rows, narrow.astype(jnp.float32)))
    np.testing.assert_array_equal(assign(rows, levels), jit_assign(rows, levels))
    np.testing.assert_array_equal(assign(rows, narrow), jit_assign(rows, narrow))


@pytest.mark.parametrize("num_levels", [4, 40])
def test_x64(num_levels):
    rng = np.random.default_rng(num_levels)
    levels = np.sort(rng.normal(size=(1, num_levels)))
    middle = (levels[0, :-1] + levels[0, 1:]) / 2
    values = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), levels[0]])
    single = rng.normal(size=(1, 50)).astype(np.float32)
    with x64():
        np.testing.assert_array_equal(jit_assign(values[None], levels)[0], exact_assign(values, levels[0]))
        # float32 values and float64 levels meet in float64.
        np.testing.assert_array_equal(jit_assign(single, levels)[0], exact_assign(single[0], levels[0]))
        np.testing.assert_array_equal(assign(values[None], levels)[0], exact_assign(values, levels[0]))
        np.testing.assert_array_equal(assign(single, levels)[0], exact_assign(single[0], levels[0]))
        in_x64 = jit_assign(single, levels.astype(np.float32))
    np.testing.assert_array_equal(in_x64, jit_assign(single, levels.astype(np.float32)))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("num_levels", [1, 4, 40])
def test_zero_size_rows(shape, num_levels):
    for indices in (function(jnp.zeros(shape), jnp.zeros((shape[0], num_levels))) for function in (jit_assign, assign)):
        assert indices.shape == shape
        assert indices.dtype == jnp.uint8


def test_more_levels_than_an_index_counts():
    with pytest.raises(ValueError, match="257 levels, but a uint8 index distinguishes at most 256"):
        assign(jnp.zeros((1, 3)), jnp.zeros((1, 257)))


@given(st.lists(floats, min_size=6, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_row_scale_is_the_power_of_two_below_the_largest_magnitude(values, counted):
    rows, mask = np.float32([values]), np.array([counted])
    scale = float(jit_row_scale(rows, mask)[0])
    assert row_scale(rows, mask).tolist() == [scale]  # by NumPy
    largest = float(np.abs(rows[mask]).max(initial=0))
    assert np.frexp(scale)[0] == 0.5
    assert np.frexp(1 / np.float32(scale))[0] == 0.5
    if largest == 0:
        assert scale == 1
    elif largest < 2.0**127:
        assert scale <= largest < 2 * scale
    else:
        assert scale == 2.0**126, "1/scale must not be subnormal"


def test_row_scale_of_nothing():
    assert row_scale(jnp.zeros((2, 0))).tolist() == [1, 1]
    assert row_scale(jnp.ones((1, 3)), jnp.zeros((1, 3), bool)).tolist() == [1]
    assert row_scale(jnp.zeros((0, 3))).shape == (0,)
    assert row_scale(jnp.ones((1, 3), jnp.bfloat16)).dtype == jnp.float32


def test_working_dtype():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn):
        assert working_dtype(jnp.dtype(dtype)) == jnp.float32
    assert working_dtype(jnp.dtype(jnp.float64)) == jnp.float64


@pytest.mark.parametrize("num_levels", [7, 40])
def test_distortion_is_the_weighted_squared_error(num_levels):
    rng = np.random.default_rng(num_levels)
    rows = rng.normal(size=(3, 500)).astype(np.float32)
    levels = np.sort(rng.normal(size=(3, num_levels)).astype(np.float32), axis=-1)
    weights = rng.uniform(size=rows.shape).astype(np.float32)
    mask = rng.uniform(size=rows.shape) < 0.7
    square = ((rows[..., None].astype(np.float64) - levels[:, None, :]) ** 2).min(axis=-1)
    for w, m in ((None, None), (weights, None), (None, mask), (weights, mask)):
        wanted = np.sum(square * (1 if w is None else w.astype(np.float64)) * (1 if m is None else m), axis=-1)
        for got in (jax.jit(distortion)(rows, levels, w, m), distortion(rows, levels, w, m)):
            assert got.dtype == jnp.float32
            # Summed in float64 (relative error at most 500·2^-53 for terms of one sign), then rounded once.
            np.testing.assert_allclose(got, wanted, rtol=2.0**-24 * (1 + 2.0**-10))


def test_distortion_ignores_whatever_is_masked():
    rows, mask = np.float32([[0.25, 3e38, 1]]), np.array([[True, False, True]])
    for function in (jax.jit(distortion), distortion):
        assert function(rows, np.float32([[0, 1]]), None, mask).tolist() == [0.0625]


def test_keep_zero_moves_the_nearest_level_to_zero():
    moved = {
        (-1, 0.5, 2): [-1, 0, 2],
        (-1, 1, 2): [0, 1, 2],
        (1, 2, 3): [0, 2, 3],
        (-3, -2, -1): [-3, -2, 0],
        (-2, -2, -2): [-2, -2, 0],
        (2, 2, 2): [0, 2, 2],
        (-1, 0, 1): [-1, 0, 1],
    }
    levels = jnp.array(list(moved), jnp.float32)
    fitted = jax.jit(finish, static_argnums=4)(jnp.ones((len(moved), 4)), levels, None, None, True)
    assert fitted.levels.tolist() == list(moved.values())
    host = finish(np.ones((len(moved), 4), np.float32), np.asarray(levels), None, None, True)
    assert host.levels.tolist() == list(moved.values())
