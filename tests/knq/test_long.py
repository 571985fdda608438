"""Rows longer than 65,536 values, and long rows of 16-bit values: forms of their own, the same optimum."""

import hypothesis
import jax
import jax.numpy as jnp
import kmeans1d
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from nuqjax._src.knq.knq import fit_knq
from nuqjax._src.knq.rows.sorted import LONG, places_of


def squared_error(row, levels, weights=None):
    row, levels = row.astype(np.float64), np.asarray(levels, np.float64)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, row)]
    return float(np.sum((row - nearest) ** 2 * (1 if weights is None else weights)))


@pytest.mark.parametrize("num_levels", [4, 16, 64])
@pytest.mark.parametrize("degrees", [3, 1000])
def test_the_optimum_of_kmeans1d(degrees, num_levels):
    row = np.random.default_rng(degrees).standard_t(degrees, LONG + 1000).astype(np.float32)
    best = squared_error(row, np.sort(kmeans1d.cluster(row.astype(np.float64), num_levels).centroids))
    for tolerance in (None, 1e-6):
        fitted = fit_knq(row[None], num_levels, tolerance=tolerance)
        error = squared_error(row, fitted.levels[0])
        assert error <= best * (1 + 1e-6)
        scale = float(fitted.scale[0]) ** 2
        np.testing.assert_allclose(float(fitted.sse[0]) * scale, error, rtol=2.0**-22)
        bound = float(fitted.lower_bound[0]) * scale
        assert bound <= best * (1 + 1e-12)
        if tolerance is not None:
            assert bound >= error * (1 - 1e-6 - 2.0**-22)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_levels", "options"),
    [
        # On the other versions the programme that takes all is enough.
        *(
            pytest.param(*case, marks=pytest.mark.versionless)
            for case in ((4, "mask"), (4, "all"), (16, "plain"), (16, "weights"))
        ),
        (16, "all"),
    ],
)
def test_host_and_traced_rows_have_the_same_levels(num_levels, options):
    generator = np.random.default_rng(num_levels)
    row = generator.standard_t(3, (1, LONG + 500)).astype(np.float32)
    weights = generator.exponential(size=row.shape).astype(np.float32) * (generator.uniform(size=row.shape) < 0.9)
    given = {
        "weights": weights if options in ("weights", "all") else None,
        "mask": generator.uniform(size=row.shape) < 0.8 if options in ("mask", "all") else None,
    }
    held = options in ("keep zero", "all")
    host = fit_knq(row, num_levels, keep_zero=held, tolerance=None, **given)
    traced = jax.jit(lambda row, given: fit_knq(row, num_levels, keep_zero=held, tolerance=None, **given))(row, given)
    np.testing.assert_array_equal(host.levels, traced.levels)
    proven = fit_knq(row, num_levels, keep_zero=held, tolerance=1e-6, **given)
    assert float(host.sse[0]) <= float(proven.sse[0]) * (1 + 1e-6)
    assert float(proven.lower_bound[0]) >= float(proven.sse[0]) * (1 - 1e-6 - 2.0**-22)
    if held:
        assert (np.asarray(host.levels) == 0).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_sparser_sums_change_nothing(monkeypatch, weighted):
    """The longest rows keep fewer running sums, for memory's sake."""
    generator = np.random.default_rng(7)
    row = generator.standard_t(3, (1, LONG + 777)).astype(np.float32)
    weights = generator.exponential(size=row.shape).astype(np.float32) if weighted else None
    fitted = [fit_knq(row, 16, weights=weights, keep_zero=True)]
    monkeypatch.setattr("nuqjax._src.knq.rows.long._LONGEST", LONG)
    fitted.append(fit_knq(row, 16, weights=weights, keep_zero=True))
    jax.tree.map(np.testing.assert_array_equal, *fitted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_levels", "distinct"),
    # On the other versions one programme is enough.
    [(4, 1), (4, 700), *(pytest.param(64, n, marks=pytest.mark.versionless) for n in (40, 700, 5000))],
)
def test_many_equal_values(num_levels, distinct):
    """Most of the row is zero, as in a pruned layer: as good as the distinct values with their counts for weights."""
    generator = np.random.default_rng(distinct)
    table = np.unique(np.append(generator.standard_normal(distinct - 1).astype(np.float32), np.float32(0)))
    row = generator.choice(table, LONG + 4000) * (generator.uniform(size=LONG + 4000) < 0.3).astype(np.float32)
    values, counts = np.unique(row, return_counts=True)
    fitted = fit_knq(row[None], num_levels, tolerance=None)
    error = squared_error(row, fitted.levels[0])
    if len(values) <= num_levels:
        assert error == 0
        np.testing.assert_array_equal(np.unique(fitted.levels), values)
    else:
        weighted = fit_knq(values[None], num_levels, weights=counts[None].astype(np.float32))
        best = squared_error(values, weighted.levels[0], counts)
        assert abs(error - best) <= 1e-6 * best
    traced = jax.jit(lambda row: fit_knq(row, num_levels, tolerance=None).levels)(row[None])
    np.testing.assert_array_equal(fitted.levels, traced)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_levels", "length", "dtype"),
    [
        # On the other versions the first is enough.
        (4, 9000, ml_dtypes.bfloat16),
        pytest.param(64, LONG + 9000, np.float16, marks=pytest.mark.versionless),
        pytest.param(64, LONG + 9000, ml_dtypes.bfloat16, marks=pytest.mark.versionless),
        pytest.param(256, 9000, np.float16, marks=pytest.mark.versionless),
    ],
)
def test_counted_values_have_the_levels_of_sorted_ones(num_levels, length, dtype):
    generator = np.random.default_rng(length)
    rows = generator.standard_t(5, (2, length)).astype(dtype)
    rows[0, :7] = -0.0
    mask = generator.uniform(size=rows.shape) < 0.9
    for given in ({}, {"mask": mask, "keep_zero": True}):
        counted = fit_knq(rows, num_levels, tolerance=1e-6, **given)
        wide = fit_knq(rows.astype(np.float32), num_levels, tolerance=1e-6, **given)
        np.testing.assert_array_equal(counted.scale, wide.scale)
        np.testing.assert_allclose(counted.sse, wide.sse, rtol=1.2e-6)
        assert (np.asarray(counted.lower_bound) <= np.asarray(wide.sse)).all()
        free = fit_knq(rows, num_levels, tolerance=None, **given)
        for row, kept, levels, best in zip(rows, mask, free.levels, counted.levels, strict=True):
            row = row[kept] if given else row
            least = squared_error(row, best)
            assert abs(squared_error(row, levels) - least) <= 1e-9 * least
    traced = jax.jit(lambda rows: fit_knq(rows, num_levels, tolerance=None).levels)(jnp.asarray(rows))
    np.testing.assert_array_equal(traced, fit_knq(rows, num_levels, tolerance=None).levels)


def test_a_long_row_takes_little_more_memory_than_its_values():
    """Resident memory cannot be asked of one call; what NumPy allocates can."""
    import tracemalloc

    row = np.random.default_rng(0).standard_normal((1, 2**24)).astype(np.float32)
    fit_knq(row, 16, tolerance=None)
    tracemalloc.start()
    fit_knq(row, 16, tolerance=None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * row.nbytes


@pytest.mark.parametrize("num_levels", [2, 16, 256])
@pytest.mark.parametrize("distinct", [None, 5])
def test_the_error_is_that_of_the_levels(num_levels, distinct):
    # A level's values are in one of the stretches that are summed at once, or in several.
    row = np.random.default_rng(num_levels).standard_t(3, 3 * LONG + 100).astype(np.float32)
    row = row if distinct is None else np.rint(row).clip(0, distinct - 1)
    fitted = fit_knq(row[None], num_levels)
    scale = float(fitted.scale[0]) ** 2
    np.testing.assert_allclose(float(fitted.sse[0]) * scale, squared_error(row, fitted.levels[0]), rtol=2.0**-22)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(data=st.data())
def test_places_are_those_of_a_comparison_in_float64(data):
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    some = st.floats(width=np.finfo(dtype).bits, allow_nan=False, allow_infinity=False)
    row = np.sort(np.array(data.draw(st.lists(some, max_size=30)), dtype))
    there = row.astype(np.float64)
    with np.errstate(over="ignore"):
        beside = np.concatenate([there, np.nextafter(there, np.inf), np.nextafter(there, -np.inf)])
    more = data.draw(st.lists(st.floats(allow_nan=False)))
    wanted = np.concatenate([beside, [0.0, -0.0, 1e-46, -1e-46, 1e39, -1e39], more])
    for side, passed in (("left", np.less), ("right", np.less_equal)):
        expected = passed(there[:, None], wanted).sum(axis=0)
        np.testing.assert_array_equal(places_of(row, wanted, side), expected)
