"""Assignment: the nearest level and the tie rule, against exact fractions; the scale; the distortion."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuqjax import assign
from nuqjax.assign import _binary_search, distortion, finish, row_scale, thresholds, working_dtype

TINY, HUGE = np.finfo(np.float32).tiny, np.finfo(np.float32).max
jit_assign = jax.jit(assign)


def exact_assign(values, levels) -> list[int]:
    """The first level at the least distance, in exact arithmetic: of two at one distance the lower."""
    levels = [Fraction(float(level)) for level in levels]
    values = [Fraction(float(value)) for value in values]
    return [min(range(len(levels)), key=lambda k: abs(value - levels[k])) for value in values]


def near_ties(levels: np.ndarray, count: int) -> np.ndarray:
    """`count` values where a wrong rounding shows: levels, midpoints as rounded, and their neighbouring floats."""
    levels = levels.astype(np.float64)
    middle = ((levels[:-1] + levels[1:]) / 2).astype(np.float32)
    at = np.concatenate([middle, levels.astype(np.float32), np.float32([0, TINY, -TINY, 1, HUGE, -HUGE])])
    with np.errstate(over="ignore"):
        near = np.concatenate([at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf))])
    near = near[np.isfinite(near)]
    near[np.abs(near) < TINY] = 0  # subnormal numbers count as zero
    return np.resize(near, count)


normal_floats = st.floats(-float(HUGE), float(HUGE), width=32, allow_subnormal=False)
exponents = st.integers(-126, 127)


@st.composite
def adversarial_levels(draw, count: int) -> np.ndarray:
    """Ascending levels full of trouble: neighbouring floats, equal ones, tiny ones beside huge ones, signs of zero."""
    some = draw(st.lists(normal_floats, min_size=1, max_size=count))
    some += [draw(st.sampled_from([-1.0, 1.0])) * 2.0**e for e in draw(st.lists(exponents, max_size=count))]
    pool = np.float32(some)
    steps = draw(st.lists(st.integers(-2, 2), min_size=count, max_size=count))
    places = draw(st.lists(st.integers(0, len(pool) - 1), min_size=count, max_size=count))
    levels = pool[places]
    with np.errstate(over="ignore", under="ignore"):
        for _ in range(2):
            direction = np.float32(np.inf) * np.sign(np.float32(steps))
            levels = np.where(np.array(steps) == 0, levels, np.nextafter(levels, direction, dtype=np.float32))
    levels = np.clip(levels, -HUGE, HUGE)
    levels[np.abs(levels) < TINY] = 0
    return np.sort(levels)


@pytest.mark.parametrize("num_levels", [2, 5, 33])
@given(data=st.data())
def test_nearest_level_and_ties_are_exact(num_levels, data):
    levels = data.draw(adversarial_levels(num_levels))
    values = near_ties(levels, 256)
    np.testing.assert_array_equal(jit_assign(values[None], levels[None])[0], exact_assign(values, levels))


@pytest.mark.parametrize("num_levels", [2, 5, 33])
@given(data=st.data())
def test_thresholds_are_the_largest_floats_not_above_the_midpoints(num_levels, data):
    levels = data.draw(adversarial_levels(num_levels))
    cuts = np.asarray(thresholds(jnp.asarray(levels)))
    assert (np.diff(cuts[np.isfinite(cuts)]) >= 0).all()
    for k, cut in enumerate(cuts):
        later = levels[levels > levels[k]]
        if later.size == 0:
            assert cut == np.inf
            continue
        middle = (Fraction(float(levels[k])) + Fraction(float(later[0]))) / 2
        above = np.nextafter(cut, np.float32(np.inf))
        above = TINY if 0 < above < TINY else 0 if -TINY < above < 0 else above  # the next number that is not subnormal
        assert Fraction(float(cut)) <= middle < Fraction(float(above))


@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**100])
def test_float32_where_the_midpoint_is_no_float(scale):
    one = np.float32(scale)
    up, down = np.nextafter(one, np.float32(np.inf)), np.nextafter(one, np.float32(0))
    levels = np.array([[down, one, up]])
    assert assign(levels, levels).tolist() == [[0, 1, 2]]
    # 1 + 2^-24 (the midpoint) would round to 1, and 1 belongs to the lower level.
    assert assign(np.array([[one, up]]), np.array([[one, up]])).tolist() == [[0, 1]]
    # The midpoint is just below 1, which therefore belongs to the upper level; mirrored, just above −1.
    assert assign(np.array([[one]]), np.array([[down * 0, up * 2 - down * 0]]) * np.float32([0.5, 1])).tolist() == [[0]]
    leaning = np.array([[-np.float32(TINY), one]])
    assert assign(np.array([[one / 2]]), leaning).tolist() == [[1]]
    assert assign(np.array([[-one / 2]]), -leaning[:, ::-1]).tolist() == [[0]]


@given(data=st.data())
def test_compare_and_binary_search_agree(data):
    levels = data.draw(adversarial_levels(32))
    values = near_ties(levels, 256)[None]
    cuts = thresholds(jnp.asarray(levels))[None]
    np.testing.assert_array_equal(jax.jit(_binary_search)(values, cuts), jit_assign(values, levels[None]))


@pytest.mark.parametrize("num_levels", [1, 2, 3, 16, 31, 32, 33, 34, 64, 100, 255, 256])
def test_every_number_of_levels(num_levels):
    rng = np.random.default_rng(num_levels)
    levels = np.sort(rng.normal(size=(3, num_levels)).astype(np.float32), axis=-1)
    rows = rng.normal(size=(3, 200)).astype(np.float32)
    distance = np.abs(rows[..., None].astype(np.float64) - levels[:, None, :])  # exact: no two are close to a tie
    indices = jit_assign(rows, levels)
    assert indices.dtype == jnp.uint8
    np.testing.assert_array_equal(indices, distance.argmin(axis=-1))
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
    np.testing.assert_array_equal(assign(rows, levels), assign(rows.astype(jnp.float32), levels))
    narrow = levels.astype(dtype)
    np.testing.assert_array_equal(assign(rows, narrow), assign(rows, narrow.astype(jnp.float32)))


@pytest.mark.parametrize("num_levels", [4, 40])
def test_x64(num_levels):
    rng = np.random.default_rng(num_levels)
    levels = np.sort(rng.normal(size=(1, num_levels)))
    middle = (levels[0, :-1] + levels[0, 1:]) / 2
    values = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), levels[0]])
    single = rng.normal(size=(1, 50)).astype(np.float32)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jit_assign(values[None], levels)[0], exact_assign(values, levels[0]))
        # float32 values and float64 levels meet in float64.
        np.testing.assert_array_equal(jit_assign(single, levels)[0], exact_assign(single[0], levels[0]))
        in_x64 = jit_assign(single, levels.astype(np.float32))
    np.testing.assert_array_equal(in_x64, jit_assign(single, levels.astype(np.float32)))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("num_levels", [1, 4, 40])
def test_zero_size_rows(shape, num_levels):
    indices = assign(jnp.zeros(shape), jnp.zeros((shape[0], num_levels)))
    assert indices.shape == shape
    assert indices.dtype == jnp.uint8


def test_more_levels_than_an_index_counts():
    with pytest.raises(ValueError, match="257 levels, but a uint8 index counts at most 256"):
        assign(jnp.zeros((1, 3)), jnp.zeros((1, 257)))


@given(st.lists(normal_floats, min_size=6, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6))
def test_row_scale_is_the_power_of_two_below_the_largest_magnitude(values, counted):
    rows, mask = np.float32([values]), np.array([counted])
    scale = float(jax.jit(row_scale)(rows, mask)[0])
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


@pytest.mark.parametrize("num_levels", [1, 7, 40])
def test_distortion_is_the_weighted_squared_error(num_levels):
    rng = np.random.default_rng(num_levels)
    rows = rng.normal(size=(3, 500)).astype(np.float32)
    levels = np.sort(rng.normal(size=(3, num_levels)).astype(np.float32), axis=-1)
    weights = rng.uniform(size=rows.shape).astype(np.float32)
    mask = rng.uniform(size=rows.shape) < 0.7
    square = ((rows[..., None].astype(np.float64) - levels[:, None, :]) ** 2).min(axis=-1)
    for w, m in ((None, None), (weights, None), (None, mask), (weights, mask)):
        wanted = np.sum(square * (1 if w is None else w.astype(np.float64)) * (1 if m is None else m), axis=-1)
        got = jax.jit(distortion)(rows, levels, w, m)
        assert got.dtype == jnp.float32
        # Summed in float64 (relative error at most 500·2^-53 for terms of one sign), then rounded once.
        np.testing.assert_allclose(got, wanted, rtol=2.0**-24 * (1 + 2.0**-10))


def test_distortion_ignores_whatever_is_masked():
    rows, mask = np.float32([[0.25, 3e38, 1]]), np.array([[True, False, True]])
    assert distortion(rows, np.float32([[0, 1]]), None, mask).tolist() == [0.0625]


@pytest.mark.parametrize(
    ("levels", "wanted"),
    [
        ([-1, 0.5, 2], [-1, 0, 2]),
        ([-1, 1], [0, 1]),
        ([1, 2, 3], [0, 2, 3]),
        ([-3, -2, -1], [-3, -2, 0]),
        ([-2, -2, -2], [-2, -2, 0]),
        ([2, 2, 2], [0, 2, 2]),
        ([-1, 0, 1], [-1, 0, 1]),
        ([5], [0]),
    ],
)
def test_keep_zero_moves_the_nearest_level_to_zero(levels, wanted):
    fitted = finish(jnp.ones((1, 4)), jnp.float32([levels]) * 1.0, None, None, keep_zero=True)
    assert fitted.levels.tolist() == [wanted]
