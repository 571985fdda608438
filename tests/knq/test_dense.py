"""The dense programme against brute force and a plain float64 one; the same bits in any batch, eager or jitted."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax._src.knq.search import dense_host as fit_knq_dense_host
from nuqjax._src.knq.search.dense import dense_rows
from nuqjax._src.platform.host import x64

ROUNDING = 2.0**-52


def sorted_rows(number, cells, seed, weighted=False, distinct=None, pinned=False, integers=False):
    """Running sums as `rows.sorted` makes them: `count`, `total` and `above`, cuts repeated past `distinct` values."""
    generator = np.random.default_rng(seed)
    values = np.sort(generator.standard_t(3, (number, cells)), axis=1)
    if integers:
        values = np.rint(values * 8)
    weight = generator.exponential(size=values.shape) if weighted else np.ones(values.shape)
    if distinct is not None:
        weight[:, distinct:] = 0
    if pinned:  # the pinned zero is there, without weight
        zero = generator.integers(0, distinct or cells, number)
        values -= np.take_along_axis(values, zero[:, None], axis=1)
        np.put_along_axis(weight, zero[:, None], 0.0, axis=1)
        above = np.arange(cells + 1) > zero[:, None]
    else:
        above = np.zeros((number, cells + 1), bool)
    nothing = np.zeros((number, 1))
    count = np.concatenate([nothing, np.cumsum(weight, axis=1)], axis=1)
    total = np.concatenate([nothing, np.cumsum(weight * values, axis=1)], axis=1)
    if integers and not weighted:
        count, total = count.astype(np.int64), total.astype(np.int64)
    return values, (count, total, above)


def bound_of(values, seed):
    """A penalty and a reach that follow from nothing but the shape."""
    generator = np.random.default_rng(seed)
    penalty = generator.exponential(scale=0.05, size=(len(values), values.shape[1] + 1))
    penalty[:, [0, -1]] = 0
    return penalty, (np.concatenate([values, values[:, -1:]], 1), np.concatenate([values[:, :1], values], 1))


def costs_of(count, total, above, penalty=None, reach=None):
    """`[M + 1, M + 1]` the cost of every interval of one row."""
    weight, moment = (count[None] - count[:, None]).astype(float), (total[None] - total[:, None]).astype(float)
    pinned = ~above[:, None] & above[None]
    gain = np.where(pinned, 0.0, moment**2 / np.where(weight > 0, weight, 1.0))
    if penalty is not None and reach is not None:
        least, most = reach[1][:, None], reach[0][None]
        extent = np.where(pinned, np.maximum(most, 0) - np.minimum(least, 0), most - least)
        gain = gain + np.maximum(extent, 0) * (penalty[:, None] + penalty[None])
    return np.where(np.tri(len(count), k=-1, dtype=bool), np.inf, -gain)


def least_cost(costs, num_levels):
    best = costs[0]
    for _ in range(num_levels - 1):
        best = np.min(best[:, None] + costs, axis=0)
    return best[-1]


def solve(arrays, num_levels, penalty=None, reach=None):
    count, total, above = arrays
    with x64():
        cuts, best = dense_rows(count, total, above, penalty, reach, num_levels=num_levels)
        assert cuts.dtype == jnp.int32
        assert best.dtype == jnp.float64
        return np.asarray(cuts), np.asarray(best)


def assert_the_same_on_the_host(arrays, num_levels, cuts, best):
    """Of the cuts that are equal to the last, the first ends the row; a pinned zero is not among them."""
    count, total, above = arrays
    pinned = above.any()
    zero = np.argmax(above, axis=1) - 1 if pinned else None
    last = np.argmax((count == count[:, -1:]) & (total == total[:, -1:]), axis=1)
    last = last if zero is None else np.maximum(last, zero + 1)
    start = np.maximum(total[:, -1].astype(float) ** 2, 1.0) / count.shape[1]
    found, least = fit_knq_dense_host.dense_rows(count, total, last, zero, start, num_levels=num_levels)
    several = last > num_levels  # of others every value is its own level
    np.testing.assert_array_equal(found[several], np.minimum(cuts, last[:, None])[several])
    np.testing.assert_array_equal(least[several], best[several])


def row_of(arrays, r):
    return [x[r] for x in arrays]


def assert_optimal(arrays, num_levels, penalty=None, reach=None):
    """The cost is the least there is, and that of the cuts; on the host both are the same."""
    cuts, best = solve(arrays, num_levels, penalty, reach)
    size = arrays[0].shape[1]
    if penalty is None and 1 < num_levels < size:
        assert_the_same_on_the_host(arrays, num_levels, cuts, best)
    assert cuts.shape == (len(best), num_levels - 1)
    for r in range(len(best)):
        bound = () if penalty is None or reach is None else (penalty[r], row_of(reach, r))
        count, total, above = row_of(arrays, r)
        costs = costs_of(count, total, above, *bound)
        chain = [0, *cuts[r], size - 1]
        assert (np.diff(chain) >= 0).all()
        # Every sum of K terms is rounded K times, relative to its magnitude.
        tolerance = 4 * (num_levels + 2) * ROUNDING * abs(best[r])
        assert best[r] == pytest.approx(least_cost(costs, num_levels), rel=0, abs=tolerance)
        assert sum(costs[a, b] for a, b in itertools.pairwise(chain)) == pytest.approx(best[r], rel=0, abs=tolerance)


@pytest.mark.slow
@pytest.mark.versionless  # a program for every shape: those of other tests are enough on the other versions
@given(
    st.sampled_from([1, 2, 7]), st.sampled_from([1, 2, 3, 5, 8]), st.integers(0, 2**16),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_optimal_among_all_partitions_of_tiny_rows(cells, num_levels, seed, weighted, pinned, bounded):
    """By trying every one; K from 1 to more than there are cells."""
    values, arrays = sorted_rows(3, cells, seed, weighted=weighted, pinned=pinned, integers=True)
    bound: tuple[Any, Any] = bound_of(values, seed) if bounded else (None, None)
    cuts, best = solve(arrays, num_levels, *bound)
    for r in range(3):
        own = [None if bound[0] is None else bound[0][r], None if bound[1] is None else row_of(bound[1], r)]
        count, total, above = row_of(arrays, r)
        costs = costs_of(count, total, above, *own)
        every = itertools.combinations_with_replacement(range(cells + 1), num_levels - 1)
        least = min(sum(costs[a, b] for a, b in itertools.pairwise([0, *c, cells])) for c in every)
        np.testing.assert_allclose(best[r], least, rtol=4 * (num_levels + 2) * ROUNDING, atol=0)
        assert (np.diff([0, *cuts[r], cells]) >= 0).all()


@given(st.integers(0, 2**16), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 3, 20]))
@settings(max_examples=25, deadline=None)
def test_optimal_with_weights_ties_pins_and_short_rows(seed, weighted, pinned, integers, distinct):
    _, arrays = sorted_rows(5, 40, seed, weighted, distinct, pinned, integers)
    assert_optimal(arrays, 6)


@pytest.mark.parametrize(
    ("cells", "num_levels"),
    [
        # A program each: on the other versions these two are enough.
        (66, 9),
        (67, 60),
        *(pytest.param(*shape, marks=pytest.mark.versionless) for shape in ((16, 16), (16, 40), (64, 2), (300, 5))),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "pinned", "bound"])
def test_optimal_at_every_shape(cells, num_levels, kind):
    """Windows of one place to all, tiles and blocks that do not divide the row."""
    values, arrays = sorted_rows(3, cells, cells + num_levels, weighted=kind != "plain", pinned=kind == "pinned")
    assert_optimal(arrays, num_levels, *(bound_of(values, 1) if kind == "bound" else (None, None)))


def test_rows_of_fewer_values_than_levels_lose_nothing():
    values, arrays = sorted_rows(4, 30, 2, distinct=7)
    _, best = solve(arrays, 12)
    np.testing.assert_allclose(-best, np.sum(values[:, :7] ** 2, axis=1), rtol=16 * ROUNDING)


def test_empty_intervals_are_for_the_bound_to_use():
    """Where one boundary saves so much that two of them at the same cut are best."""
    values, arrays = sorted_rows(2, 12, 3)
    penalty, reach = bound_of(values, 3)
    penalty[:] = 0
    penalty[:, 5] = 100.0
    reach = (reach[0] + 1.0, reach[1] - 1.0)
    cuts, _ = solve(arrays, 4, penalty, reach)
    assert (np.diff(cuts, axis=1) == 0).any(axis=1).all()
    assert_optimal(arrays, 4, penalty, reach)


@pytest.mark.slow
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(
    ("cells", "num_levels"), [(40, 5), pytest.param(130, 7, marks=pytest.mark.versionless)]  # one shape is enough there
)  # fmt: skip
def test_the_same_bits_in_any_batch_eager_or_jitted(cells, num_levels, bounded):
    values, arrays = sorted_rows(70, cells, 4, weighted=True, integers=True)  # with many equal costs
    penalty, reach = bound_of(values, 4) if bounded else (None, None)
    cuts, best = solve(arrays, num_levels, penalty, reach)
    for here in (slice(69, 70), slice(3, 20)):
        some = [None if x is None else x[here] for x in (penalty, *(reach or ()))]
        part_cuts, part_best = solve([x[here] for x in arrays], num_levels, some[0], some[1:] or None)
        np.testing.assert_array_equal(part_cuts, cuts[here])
        np.testing.assert_array_equal(part_best, best[here])

    @jax.jit
    def outside(seed):  # traced without 64-bit types, as `fit` is
        with x64():
            count, total = (jnp.asarray(x) + jnp.zeros_like(x) * (seed > 0) for x in arrays[:2])
            return dense_rows(count, total, jnp.asarray(arrays[2]), penalty, reach, num_levels=num_levels)

    traced_cuts, traced_best = outside(jnp.int32(0))
    np.testing.assert_array_equal(traced_cuts, cuts)
    np.testing.assert_array_equal(traced_best, best)


@pytest.mark.parametrize("cells", [32, 100])
def test_exports_to_every_platform(cells):
    _, arrays = sorted_rows(3, cells, 5)
    with x64():
        function = jax.jit(lambda count, total, above: dense_rows(count, total, above, None, None, num_levels=4))
        exported = jax.export.export(function, platforms=["cpu", "cuda", "tpu"])(*map(jnp.asarray, arrays))
        for found, expected in zip(exported.call(*arrays), function(*arrays), strict=True):
            np.testing.assert_array_equal(found, expected)
