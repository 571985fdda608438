"""The solver of the layer-wise problem: laws of plain arrays."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax import AutoQFormat, ChannelGroups, CodebookArray, InputGroups, QFormat
from nuqjax._src.calibration.solver import sampled
from nuqjax._src.leaf.check import check
from nuqjax._src.leaf.codebook_array import dense_on_host
from nuqjax._src.leaf.fixed_point import encode_on_host
from nuqjax._src.leaf.packing import pack
from nuqjax.calibration import Problem, quantize, shrunk

pytestmark = pytest.mark.versionless  # NumPy's arithmetic on plain arrays

GRANULARITIES = ["tensor", "channel", ChannelGroups(4), InputGroups(5)]
SCALES = [None, "channel", InputGroups(4)]
FORMATS = [None, jnp.float16, jnp.bfloat16, "float8_e4m3fn", QFormat(6, 4), QFormat(8, 9), AutoQFormat(5)]


def drawn(outputs, inputs, groups=1, *, seed=0, samples=None, dtype=np.float32):
    """Heavy-tailed weights, and moments of positive, correlated inputs."""
    random = np.random.default_rng(seed)
    weights = random.standard_t(4, (outputs, inputs)) * np.exp(random.normal(size=(outputs, 1))) * 0.05
    mixing = random.normal(size=(groups, inputs, inputs)) * np.arange(1, inputs + 1)[:, None] ** -0.7
    x = np.maximum(random.normal(size=(groups, samples or 4 * inputs, inputs)) @ mixing, 0)
    x -= x.mean(axis=1, keepdims=True)
    return Problem(weights.astype(dtype), shrunk(x.transpose(0, 2, 1) @ x / x.shape[1], 100, 16))


def leaf_of(problem, solution, bits, granularity, scale):
    """The solution as a leaf of a tree."""
    levels, fmt = solution.levels, solution.codebook_format
    if isinstance(fmt, QFormat):
        levels = encode_on_host(levels, fmt).astype(fmt.storage_dtype)
    elif fmt is not None:
        levels = levels.astype(fmt)
    inputs = problem.weights.shape[1]
    leaf = CodebookArray(
        levels=levels,
        packed=pack(solution.indices, bits),
        scale=solution.scale,
        slice_shape=problem.weights.shape,
        dtype=np.dtype(np.float32),
        bits=bits,
        granularity=granularity,
        axes=(0,),
        codebook_format=fmt if isinstance(fmt, QFormat) else None,
        scale_group=0 if scale is None else scale.size if isinstance(scale, InputGroups) else inputs,
    )
    check(leaf)
    return leaf


def output_error(problem, approximation):
    groups = problem.hessian.shape[0]
    error = (problem.weights.astype(np.float64) - approximation).reshape(groups, -1, problem.weights.shape[1])
    return float(np.einsum("gpi,gij,gpj->", error, problem.hessian, error))


def is_falling(errors):
    values = list(errors.values())
    return all(np.isfinite(values)) and all(b <= a for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("codebook_format", FORMATS, ids=str)
def test_every_layout_is_a_leaf_whose_error_is_the_one_told_and_never_rises(granularity, scale, codebook_format):
    for bits, groups in ((2, 1), (3, 3)):
        problem = drawn(9, 18, groups, seed=bits)  # the last group of channels is short
        solution = quantize(problem, bits=bits, granularity=granularity, scale=scale, codebook_format=codebook_format)
        assert is_falling(solution.errors)
        leaf = leaf_of(problem, solution, bits, granularity, scale)
        last = list(solution.errors.values())[-1]
        assert output_error(problem, dense_on_host(leaf)) == pytest.approx(last, rel=1e-3)


@given(
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 12),
    samples=st.integers(1, 30),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["plain", "raw", "dead inputs", "dead outputs", "tiny", "huge", "no moments", "equal"]),
    keep_zero=st.booleans(),
    granularity=st.sampled_from(GRANULARITIES),
    scale=st.sampled_from(SCALES),
    codebook_format=st.sampled_from(FORMATS),
    rate=st.sampled_from([None, None, 0.0, 1e-4, 1e30]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_error_is_finite_and_never_rises(
    outputs, inputs, samples, bits, seed, kind, keep_zero, granularity, scale, codebook_format, rate
):
    weights, hessian = drawn(outputs, inputs, seed=seed, samples=samples)
    if kind == "raw":  # of a rank below the number of inputs
        x = np.random.default_rng(seed).normal(size=(1, samples, inputs))
        hessian = x.transpose(0, 2, 1) @ x
    if kind == "dead inputs":
        hessian[:, ::2] = hessian[:, :, ::2] = 0
    weights = {
        "dead outputs": weights * (np.arange(outputs) % 2)[:, None],
        "tiny": weights * 1e-30,
        "huge": weights * 1e30,
        "equal": np.full_like(weights, 0.3),
    }.get(kind, weights).astype(np.float32)
    hessian = 0 * hessian if kind == "no moments" else hessian
    solution = quantize(
        Problem(weights, hessian), bits=bits, granularity=granularity, scale=scale, codebook_format=codebook_format,
        keep_zero=keep_zero, rate=rate,
    )  # fmt: skip
    assert is_falling(solution.errors)
    assert np.isfinite(solution.levels).all()
    assert (np.diff(solution.levels, axis=1) >= 0).all()
    assert solution.indices.max() < 2**bits
    if scale is not None:
        assert np.isfinite(solution.scale).all()


def test_of_independent_inputs_feedback_is_the_nearest_level():
    problem = drawn(16, 24)
    diagonal = Problem(problem.weights, np.diag(np.einsum("gii->gi", problem.hessian)[0])[None])
    plain = quantize(diagonal, bits=3, feedback=False, refit=0)
    fed_back = quantize(diagonal, bits=3, refit=0)
    assert (plain.indices == fed_back.indices).all()
    assert list(fed_back.errors) == ["nearest"]


@pytest.mark.parametrize("granularity", ["tensor", "channel", ChannelGroups(3)], ids=str)
def test_the_order_of_the_inputs_does_not_matter(granularity):
    weights, hessian = drawn(12, 20)
    order = np.random.default_rng(1).permutation(20)
    given = dict(bits=3, granularity=granularity, codebook_format=jnp.float16)
    one = quantize(Problem(weights, hessian), **given)
    other = quantize(Problem(weights[:, order], hessian[:, order][:, :, order]), **given)
    assert np.array_equal(one.indices[:, order], other.indices)
    assert list(other.errors.values()) == pytest.approx(list(one.errors.values()), rel=1e-5)


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_a_factor_of_the_weights_is_one_of_levels_or_scales(scale):
    weights, hessian = drawn(12, 20)
    one = quantize(Problem(weights, hessian), bits=3, scale=scale)
    other = quantize(Problem(weights * 2**-9, hessian * 64), bits=3, scale=scale)
    assert np.array_equal(one.indices, other.indices)
    product = lambda s: s.levels if s.scale is None else s.levels.max() * s.scale  # noqa: E731
    assert np.array_equal(product(one) * 2**-9, product(other))
    assert list(other.errors.values()) == pytest.approx([x * 2.0**-12 for x in one.errors.values()])


@pytest.mark.parametrize("scale", [None, "channel"])
def test_groups_are_solved_as_if_each_were_alone(scale):
    weights, hessian = drawn(12, 10, groups=4)
    together = quantize(Problem(weights, hessian), bits=2, granularity="channel", scale=scale)
    for group in range(4):
        rows = slice(3 * group, 3 * group + 3)
        alone = quantize(Problem(weights[rows], hessian[group][None]), bits=2, granularity="channel", scale=scale)
        assert np.array_equal(together.indices[rows], alone.indices)
        values = together.levels[rows] * (1 if scale is None else together.scale[rows])
        assert values == pytest.approx(alone.levels * (1 if scale is None else alone.scale), rel=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_moments_of_stretches_are_those_of_all_inputs_with_zeros_between(granularity, scale, groups):
    weights, hessian = drawn(9, 20, groups)
    stretches = np.stack([hessian[:, at : at + 5, at : at + 5] for at in range(0, 20, 5)], axis=1)
    whole = np.zeros_like(hessian)
    for place, at in enumerate(range(0, 20, 5)):
        whole[:, at : at + 5, at : at + 5] = stretches[:, place]
    given = dict(bits=2, granularity=granularity, scale=scale)
    parts = quantize(Problem(weights, stretches), **given)
    assert is_falling(parts.errors)
    error = output_error(
        Problem(weights, whole), dense_on_host(leaf_of(Problem(weights, whole), parts, 2, granularity, scale))
    )
    assert error == pytest.approx(list(parts.errors.values())[-1], rel=1e-3)
    assert error <= 1.1 * list(quantize(Problem(weights, whole), **given).errors.values())[-1]


def test_one_group_for_each_output_is_the_dense_problem_with_equal_moments():
    weights, hessian = drawn(8, 12)
    dense = quantize(Problem(weights, hessian), bits=2)
    depthwise = quantize(Problem(weights, np.repeat(hessian, 8, axis=0)), bits=2)
    assert list(depthwise.errors.values()) == pytest.approx(list(dense.errors.values()), rel=1e-3)


def test_no_other_single_index_and_no_other_levels_are_better():
    problem = drawn(6, 10)
    solution = quantize(problem, bits=2, scale=None, refit=40)
    levels, indices = solution.levels[0].astype(np.float64), solution.indices
    best = output_error(problem, levels[indices])
    for output, place, index in itertools.product(range(6), range(10), range(4)):
        other = indices.copy()
        other[output, place] = index
        assert output_error(problem, levels[other]) >= best * (1 - 1e-5)
    root = np.linalg.cholesky(problem.hessian[0])
    design = np.einsum("oik,ij->ojk", np.eye(4)[indices], root).reshape(-1, 4)
    exact = np.linalg.lstsq(design, (problem.weights @ root).reshape(-1))[0]
    assert best <= output_error(problem, exact[indices]) * (1 + 2e-3)


def test_it_is_near_the_best_of_all_indices():
    """Of 3⁶ ways to round a row: by brute force, with the levels as they are."""
    problem = drawn(24, 6, seed=3)
    solution = quantize(problem, bits=1, scale=None, granularity="channel")
    ways = np.array(list(itertools.product(range(2), repeat=6)))
    least = 0.0
    for output in range(24):
        error = problem.weights[output] - solution.levels[output][ways]
        least += np.einsum("wi,ij,wj->w", error, problem.hessian[0], error).min()
    assert list(solution.errors.values())[-1] == pytest.approx(least, rel=0.02)


def test_the_same_problem_gives_the_same_bits():
    problem = drawn(32, 70)
    one, other = (quantize(problem, bits=3, codebook_format=jnp.float16) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_pruned_weights_stay_pruned(granularity, scale):
    weights, hessian = drawn(8, 20)
    weights = np.where(np.random.default_rng(0).random(weights.shape) < 0.5, 0, weights)
    problem = Problem(weights, hessian)
    solution = quantize(problem, bits=2, granularity=granularity, scale=scale, keep_zero=True)
    assert ((solution.levels == 0).any(axis=1)).all()
    assert is_falling(solution.errors)
    assert (dense_on_host(leaf_of(problem, solution, 2, granularity, scale))[weights == 0] == 0).all()


def test_more_bits_and_more_stages_are_better():
    problem = drawn(64, 48)
    errors = [list(quantize(problem, bits=bits).errors.values())[-1] for bits in (1, 2, 3, 4, 5, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    stages = quantize(problem, bits=3).errors
    assert stages["refit"] < 0.95 * stages["feedback"] < 0.7 * stages["nearest"]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("scale", [None, "channel"])
def test_a_higher_price_of_bits_makes_fewer_bits_and_more_error(granularity, scale):
    problem = drawn(24, 40)
    solutions = [
        quantize(problem, bits=6, rate=rate, granularity=granularity, scale=scale, codebook_format=jnp.float16)
        for rate in (1e-5, 1e-4, 1e-3)
    ]
    for solution, rate in zip(solutions, (1e-5, 1e-4, 1e-3), strict=True):
        assert is_falling(solution.errors)
        error = output_error(problem, dense_on_host(leaf_of(problem, solution, 6, granularity, scale)))
        total = error + rate * solution.bits_per_weight * problem.weights.size
        assert total == pytest.approx(list(solution.errors.values())[-1], rel=1e-2)
    bits = [solution.bits_per_weight for solution in solutions]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > bits[2] + 2


def test_priced_indices_take_fewer_bits_at_the_error_of_unpriced_ones():
    """Of codes as long as their entropies."""
    problem = drawn(64, 48)
    plain = quantize(problem, bits=3)
    priced = quantize(problem, bits=8, rate=0.7 * list(plain.errors.values())[-1] / problem.weights.size)
    error = output_error(problem, dense_on_host(leaf_of(problem, priced, 8, "tensor", "channel")))
    assert error <= list(plain.errors.values())[-1]
    assert priced.bits_per_weight < plain.bits_per_weight - 0.1


def test_a_sample_of_a_long_row_meets_every_input_alike():
    rows = np.tile(np.arange(6), 100)[None]
    sample = sampled(rows, 6, most=150)
    assert sample.shape == (1, 120)  # every fifth: neither two, three nor four has no divisor in common with six
    assert np.bincount(sample[0]).tolist() == [20] * 6
    assert sampled(rows, 6, most=600).shape == (1, 600)


@pytest.mark.parametrize(
    ("weights", "hessian", "options", "message"),
    [
        (np.ones(4), np.eye(4)[None], {}, r"weights of shape \(4,\), but \[O, I\] is wanted"),
        (np.ones((2, 3)), np.eye(4)[None], {}, r"moments of shape \(1, 4, 4\).*\[G, 3, 3\]"),
        (np.ones((2, 3)), np.stack([np.eye(3)] * 4), {}, "G a divisor of 2"),
        (np.ones((2, 3)), np.eye(3), {}, r"moments of shape \(3, 3\)"),
        (np.ones((2, 6)), np.ones((1, 4, 2, 2)), {}, r"or \[G, B, 6/B, 6/B\]"),
        (np.full((2, 3), np.nan), np.eye(3)[None], {}, "weights that are NaN or infinite"),
        (np.ones((2, 3)), np.full((1, 3, 3), np.inf), {}, "moments that are NaN or infinite"),
        (np.ones((2, 3)), np.eye(3)[None], {"bits": 9}, "bits=9, but a whole number from 1 to 8"),
        (np.ones((2, 3)), np.eye(3)[None], {"rate": -1.0}, "rate=-1.0, but the price of a bit is 0 or more"),
        (np.ones((2, 3)), np.eye(3)[None], {"granularity": "row"}, "unknown granularity 'row'"),
        (np.ones((2, 3)), np.eye(3)[None], {"scale": "row"}, "scale 'row', but it must be None"),
    ],
)
def test_what_does_not_fit_is_named(weights, hessian, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(Problem(weights, hessian), **({"bits": 4} | options))
