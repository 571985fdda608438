"""The spine: trees in, the same trees with codebooks out, every value at its nearest level; NumPy is the oracle."""

import math
from itertools import pairwise, product

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, CodebookArray, InputGroups, QFormat, Rule
from nuqjax._src.leaf.check import check
from nuqjax._src.platform.host import x64

GRANULARITIES = ["tensor", "channel", ChannelGroups(3), InputGroups(5)]
INSIST = Rule(".", skip=False)


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- The oracle: what a leaf must hold, from the meanings in the documentation, element by element. ----


def numbering(shape, stack_axes, axis):
    """Of each value: its slice, its output channel, its position in the channel; and how many positions there are."""
    places = np.indices(shape).reshape(len(shape), -1)
    ndim = len(shape) - stack_axes
    outputs = sorted(a % ndim for a in ([axis] if isinstance(axis, int) else axis))
    inputs = [a for a in range(ndim) if a not in outputs]

    def number(axes):
        result = np.zeros(places.shape[1], int)
        for a in axes:
            result = result * shape[a] + places[a]
        return result

    stacked = [stack_axes + a for a in range(ndim)]
    length = math.prod(shape[stack_axes + a] for a in inputs)
    return number(range(stack_axes)), number(stacked[a] for a in outputs), number(stacked[a] for a in inputs), length


def row_numbers(output, position, length, granularity):
    match granularity:
        case "tensor":
            return output * 0
        case "channel":
            return output
        case ChannelGroups(n):
            return output // n
        case InputGroups(n):
            return output * -(-length // n) + position // n


def expected_values(array, leaf, stack_axes=0, axis=-1):
    """The array with every value at its nearest level (of two equally near the lower one) among those of the leaf."""
    array = np.asarray(array)
    stack, output, position, length = numbering(array.shape, stack_axes, axis)
    levels = np.asarray(leaf.levels)
    if leaf.codebook_format:
        levels = (levels.astype(np.float64) * 2.0**-leaf.codebook_format.frac).astype(np.float32)
    if leaf.scale is None:
        levels = levels.astype(leaf.dtype)
    levels = levels.astype(np.promote_types(np.float32, levels.dtype))
    own = levels.reshape(-1, *levels.shape[-2:])[stack, row_numbers(output, position, length, leaf.granularity)]
    values = array.reshape(-1).astype(leaf.dtype).astype(levels.dtype)
    factor = np.ones_like(values)
    if leaf.scale is not None:
        scale = np.asarray(leaf.scale)
        scale = scale.reshape(-1, *scale.shape[-2:])[stack, output, position // leaf.scale_group].astype(levels.dtype)
        factor, values = scale, values / np.where(scale > 0, scale, 1)
    nearest = np.abs(values[:, None].astype(np.float64) - own.astype(np.float64)).argmin(axis=-1)
    decoded = np.take_along_axis(own, nearest[:, None], axis=-1)[:, 0] * factor
    return decoded.astype(leaf.dtype).reshape(array.shape)


def assert_nearest(array, leaf, stack_axes=0, axis=-1):
    check(leaf)
    assert leaf.shape == np.shape(array)
    dense = np.asarray(nuqjax.decompress(leaf))
    assert dense.dtype == leaf.dtype
    np.testing.assert_array_equal(dense, expected_values(array, leaf, stack_axes, axis))


def compress_one(array, *args, rule=None, **options):
    tree = nuqjax.compress({"w": array}, *args, rules=[rule or INSIST], **options)
    return tree["w"]


# ---- Structure, shapes and dtypes. ----


def linen_variables():
    model = nn.Sequential([nn.Dense(24), nn.BatchNorm(use_running_average=True)])
    return model.init(jax.random.key(0), jnp.zeros((1, 16)))


def nnx_model():
    return nnx.Sequential(nnx.Linear(16, 24, rngs=nnx.Rngs(0)), nnx.BatchNorm(24, rngs=nnx.Rngs(0)))


TREES = {
    "linen": linen_variables,
    "nnx state": lambda: nnx.state(nnx_model(), nnx.Param, nnx.BatchStat),
    "nnx module": nnx_model,
    "equinox": lambda: eqx.nn.MLP(16, 8, 24, 1, key=jax.random.key(0)),
    "containers": lambda: {"a": [jnp.asarray(gaussian((16, 24))), (jnp.arange(3), 2.5, None)], "b": jnp.float32(1)},
    "numpy": lambda: {"w": gaussian((16, 24)), "v": gaussian(7)},
    "bfloat16": lambda: {"w": jnp.asarray(gaussian((16, 24)), jnp.bfloat16)},
    "float16": lambda: {"w": jnp.asarray(gaussian((16, 24)), jnp.float16)},
    "float8": lambda: {"w": jnp.asarray(gaussian((16, 24)), jnp.float8_e4m3fn)},
    "one array": lambda: jnp.asarray(gaussian((16, 24))),
}


def signature(leaf):
    return (np.shape(leaf), str(leaf.dtype)) if hasattr(leaf, "dtype") else leaf


@pytest.mark.parametrize("name", TREES)
def test_decompress_gives_back_structure_shapes_and_dtypes(name):
    params = TREES[name]()
    cparams = nuqjax.compress(params, 3, "normal")
    restored = nuqjax.decompress(cparams)
    leaves, structure = jax.tree.flatten(cparams, is_leaf=lambda x: isinstance(x, CodebookArray))
    assert any(isinstance(leaf, CodebookArray) for leaf in leaves)
    assert structure == jax.tree.structure(params) == jax.tree.structure(restored)
    assert [*map(signature, leaves)] == [*map(signature, jax.tree.leaves(params))]
    assert [*map(signature, jax.tree.leaves(restored))] == [*map(signature, jax.tree.leaves(params))]
    for before, after in zip(jax.tree.leaves(params), leaves, strict=True):
        assert before is after or isinstance(after, CodebookArray)


def test_float64_is_kept_under_x64():
    with x64():
        array = np.random.default_rng(0).normal(size=(16, 24))
        leaf = compress_one(array, 3, "enq")
        assert leaf.dtype == leaf.levels.dtype == np.float64
        assert_nearest(array, leaf)
        assert_nearest(array, compress_one(array, 3, "enq", scale="channel", granularity=InputGroups(5)))


def test_float64_numpy_is_float32_without_x64():
    leaf = compress_one(gaussian((16, 24)).astype(np.float64), 3, "enq")
    assert leaf.dtype == np.float32
    chex.assert_trees_all_equal(leaf, compress_one(gaussian((16, 24)), 3, "enq"))


def test_inputs_are_not_mutated():
    params = {"w": gaussian((16, 24)), "v": jnp.asarray(gaussian((16, 24))), "b": gaussian(24)}
    importance = {"w": abs(gaussian((16, 24), 1))}
    copies = jax.tree.map(np.array, (params, importance))
    for array in [params["w"], params["b"], importance["w"]]:
        array.flags.writeable = False
    cparams = nuqjax.compress(params, 3, "enq", sensitivity=importance, scale=InputGroups(5), granularity="channel")
    nuqjax.report(params, cparams)
    chex.assert_trees_all_equal((params, importance), copies)


def test_the_result_does_not_alias_the_input():
    array = gaussian((16, 24))
    leaf = compress_one(array, 3, "normal")
    before = np.asarray(leaf)
    array[:] = 0
    np.testing.assert_array_equal(np.asarray(leaf), before)


# ---- Every decoded value is the nearest level. ----


@pytest.mark.parametrize(
    ("bits", "granularity"), [(bits, g) for bits in range(1, 9) for g in GRANULARITIES[bits % 2 :: 2]], ids=str
)
def test_every_value_is_at_its_nearest_level(bits, granularity):
    array = gaussian((3, 4, 7))
    leaf = compress_one(array, bits, "normal", granularity=granularity)
    assert leaf.levels.shape[-1] == 2**bits
    assert_nearest(array, leaf)


@pytest.mark.parametrize("method", ["enq", "uniform", "uniform_pow2", "dfp", "quantile", "pow2"])
def test_every_method_assigns_to_the_nearest_level(method):
    array = gaussian((3, 4, 7))
    assert_nearest(array, compress_one(array, 2, method, granularity=ChannelGroups(3)))


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (-1, -2), (2, 0), (), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES[1:], ids=str)
def test_any_axes_can_be_the_output(axis, granularity):
    array = gaussian((4, 4, 4))
    assert_nearest(array, compress_one(array, 2, "normal", granularity=granularity, axis=axis), axis=axis)


FORMATS = [None, jnp.bfloat16, "float16", "float8_e4m3fn", QFormat(6, 4), AutoQFormat(6), AutoQFormat(5, signed=False)]


@pytest.mark.parametrize(
    ("codebook_format", "scale", "dtype"),
    [
        *product(FORMATS, [None, InputGroups(5)], ["float32"]),
        *product(FORMATS[3:5], [None, "channel"], ["bfloat16"]),
        *[("float32", None, "bfloat16"), ("float32", "channel", "float16")],
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_indices_are_assigned_to_the_stored_levels(codebook_format, scale, dtype):
    array = jnp.asarray(gaussian((3, 4, 7)), dtype)
    leaf = compress_one(array, 3, "normal", granularity="channel", codebook_format=codebook_format, scale=scale)
    assert_nearest(array, leaf)
    if isinstance(codebook_format, QFormat | AutoQFormat):
        chosen = leaf.codebook_format
        assert (chosen.word, chosen.signed) == (codebook_format.word, codebook_format.signed)
        assert leaf.levels.dtype == chosen.storage_dtype
        assert chosen.least <= leaf.levels.min() <= leaf.levels.max() <= chosen.largest
    else:
        assert leaf.levels.dtype == jnp.dtype(codebook_format or dtype)


def test_levels_saturate_into_a_small_float_format():
    array = gaussian((16, 16)) * 1e6
    leaf = compress_one(array, 3, "normal", codebook_format="float8_e4m3fn")
    assert float(leaf.levels.max()) == 448.0 == -float(leaf.levels.min())
    assert_nearest(array, leaf)


@pytest.mark.parametrize("granularity", ["tensor", InputGroups(5)], ids=str)
@pytest.mark.parametrize("size", [1, 5, 100])
def test_scales_are_the_largest_magnitudes_of_their_groups(granularity, size):
    array = gaussian((3, 4, 7))
    array[0] = 0  # an input group of zeros has scale 0 and comes back as zeros
    leaf = compress_one(array, 3, "normal", scale=InputGroups(size), granularity=granularity)
    groups = -(-12 // size)
    padded = np.pad(abs(array).reshape(12, 7).T, ((0, 0), (0, groups * size - 12)))
    np.testing.assert_array_equal(leaf.scale, padded.reshape(7, groups, size).max(axis=-1))
    assert_nearest(array, leaf)
    if size == 1:
        assert not np.asarray(leaf)[0].any()


def test_scale_channel_is_one_group_for_each_channel():
    array = gaussian((3, 4, 7))
    whole = compress_one(array, 3, "enq", scale=InputGroups(12))
    chex.assert_trees_all_equal(compress_one(array, 3, "enq", scale="channel"), whole)


def test_a_common_scale_makes_no_difference_to_a_fit_per_channel():
    """With a codebook for each channel, dividing by a power of two and multiplying again changes nothing."""
    array = gaussian((12, 7))
    array[0] = 2.0 ** np.arange(-3, 4)
    array[1:] = array[1:].clip(-1, 1) * array[0]
    plain = compress_one(array, 3, "enq", granularity="channel")
    scaled = compress_one(array, 3, "enq", granularity="channel", scale="channel")
    np.testing.assert_array_equal(np.asarray(scaled), np.asarray(plain))


def test_scales_weight_the_errors_so_that_the_leafs_own_error_is_minimised():
    """A shared codebook of two levels: the large channel decides where its levels lie."""
    array = np.stack([np.linspace(0.5, 1, 16), 1000 * np.repeat([0.25, 1.0], 8)], axis=1).astype(np.float32)
    leaf = compress_one(array, 1, "enq", scale="channel")
    # Divided by their scales, the values of the second channel weigh a million times as much as those of the first.
    np.testing.assert_allclose(np.asarray(leaf.levels)[0], [0.25, 1.0], atol=1e-5)


# ---- Stack axes. ----


@pytest.mark.parametrize(
    ("granularity", "stack", "scale"),
    [("tensor", 2, None), (ChannelGroups(3), 1, "channel"), (InputGroups(5), 1, None)],
)
def test_a_stack_is_its_slices_compressed_alone(granularity, stack, scale):
    array = gaussian((2, 3, 4, 7)) * np.array([1, 30], np.float32).reshape(2, 1, 1, 1)
    options = {"granularity": granularity, "scale": scale, "codebook_format": QFormat(9, 4)}
    leaf = compress_one(array, 3, "enq", rule=Rule("w", skip=False, stack_axes=stack), **options)
    assert leaf.stack_shape == array.shape[:stack]
    assert_nearest(array, leaf, stack_axes=stack)
    for place in np.ndindex(leaf.stack_shape):
        chex.assert_trees_all_equal(leaf[place], compress_one(array[place], 3, "enq", **options))


def test_sensitivity_follows_the_slices_of_a_stack():
    array, importance = gaussian((2, 12, 7)), abs(gaussian((2, 12, 7), 1))
    rule = Rule("w", skip=False, stack_axes=1)
    leaf = compress_one(array, 2, "enq", rule=rule, sensitivity={"w": importance})
    for i in range(2):
        alone = compress_one(array[i], 2, "enq", sensitivity={"w": importance[i]})
        chex.assert_trees_all_equal(leaf[i], alone)


# ---- Formats chosen from the data. ----


def squared_error(array, leaf, weights=1.0):
    return float((weights * (np.asarray(array, np.float64) - np.asarray(leaf, np.float64)) ** 2).sum())


SPREADS = {
    "normal": lambda x: x,
    "tiny": lambda x: x * np.float32(1e-6),
    "large": lambda x: x * np.float32(3e5),
    "heavy tail": lambda x: x * abs(x) ** 6,
    "one outlier": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, 40, 0.1 * x).astype(np.float32),
    "positive": abs,
    "powers of two": lambda x: np.sign(x) * np.float32(2),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    ("bits", "method", "word", "signed"), [(4, "enq", 6, True), (1, "normal", 3, True), (4, "enq", 2, False)]
)
def test_auto_format_has_the_least_squared_error_of_all(spread, bits, method, word, signed):
    """By brute force: the levels as they were fitted, rounded to every format, and every value at the nearest."""
    array = SPREADS[spread](gaussian((64, 64)))
    levels = np.asarray(compress_one(array, bits, method).levels, np.float64)[0]
    leaf = compress_one(array, bits, method, codebook_format=AutoQFormat(word, signed))
    errors = {}
    for frac in range(-60, 61):
        least, largest = (-(2 ** (word - 1)), 2 ** (word - 1) - 1) if signed else (0, 2**word - 1)
        rounded = np.clip(np.rint(levels * 2.0**frac), least, largest) * 2.0**-frac
        errors[frac] = ((array.reshape(-1, 1) - rounded) ** 2).min(axis=1).sum()
    # Sums of 4096 squares in float64 in any order differ by less than 2⁻⁴⁰ of them; they are rounded to float32.
    close = 1 + 2**-23 + 2**-40
    assert errors[leaf.codebook_format.frac] <= min(errors.values()) * close
    np.testing.assert_allclose(squared_error(array, leaf), errors[leaf.codebook_format.frac], rtol=2**-40)


def test_auto_format_minimises_the_weighted_error():
    array, importance = gaussian((64, 64)), np.ones((64, 64), np.float32)
    importance[abs(array) < 0.5] = 1e5
    leaf = compress_one(array, 4, "enq", codebook_format=AutoQFormat(3), sensitivity={"w": importance})
    errors = {}
    for frac in range(-3, 9):
        fixed = compress_one(array, 4, "enq", codebook_format=QFormat(3, frac), sensitivity={"w": importance})
        errors[frac] = squared_error(array, fixed, importance)
    assert leaf.codebook_format.frac == min(errors, key=errors.get)
    plain = compress_one(array, 4, "enq", codebook_format=AutoQFormat(3))
    assert plain.codebook_format.frac < leaf.codebook_format.frac


def test_auto_format_of_zeros_works():
    leaf = compress_one(np.zeros((4, 4), np.float32), 2, "normal", codebook_format=AutoQFormat(8))
    assert not np.asarray(leaf).any()


# ---- Zeros, sensitivities. ----


@pytest.mark.parametrize("method", ["enq", "uniform", "normal", "quantile", "pow2"])
@pytest.mark.parametrize("scale", [None, InputGroups(5)], ids=str)
def test_keep_zero_keeps_pruned_weights_pruned(method, scale):
    array = gaussian((3, 4, 7)) + 0.3
    array[gaussian((3, 4, 7), 1) < 0] = 0
    for codebook_format in (None, QFormat(5, 2)):
        options = {"granularity": "channel", "scale": scale, "codebook_format": codebook_format, "keep_zero": True}
        leaf = compress_one(array, 2, method, **options)
        assert_nearest(array, leaf)
        assert not np.asarray(leaf)[array == 0].any()


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_sensitivity_lowers_the_weighted_error_of_knq(seed):
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(8, 8)).astype(np.float32)
    importance = (rng.random((8, 8)) ** 4).astype(np.float32)
    weighted = compress_one(array, 2, "knq", sensitivity={"w": importance})
    plain = compress_one(array, 2, "knq")
    # Levels are float32: each may be off by half an ulp of at most 4.
    slack = (2**-22) ** 2 * importance.sum()
    assert squared_error(array, weighted, importance) <= squared_error(array, plain, importance) * (1 + 1e-6) + slack


@pytest.mark.parametrize("method", ["enq", "quantile"])
def test_whole_sensitivities_are_repetitions(method):
    rng = np.random.default_rng(0)
    values = rng.normal(size=16).astype(np.float32)
    times = rng.multinomial(48, np.full(16, 1 / 16)).clip(0, 6)
    weighted = compress_one(values[:, None], 2, method, sensitivity={"w": times[:, None].astype(np.float32)})
    repeated = compress_one(np.repeat(values, times)[:, None], 2, method)
    np.testing.assert_allclose(weighted.levels, repeated.levels, rtol=2**-22, atol=2**-22)


def test_equal_sensitivities_change_nothing():
    array = gaussian((3, 4, 7))
    same = compress_one(array, 3, "enq", sensitivity={"w": np.full(array.shape, 0.37, np.float32)})
    plain = compress_one(array, 3, "enq")
    np.testing.assert_allclose(same.levels, plain.levels, rtol=2**-22)


def test_leaves_without_sensitivity_count_evenly():
    params = {"a": gaussian((16, 24)), "b": gaussian((16, 24), 1), "bias": gaussian(24)}
    importance = {"a": abs(gaussian((16, 24), 2)), "b": None, "bias": abs(gaussian(24))}
    cparams = nuqjax.compress(params, 3, "enq", sensitivity=importance)
    chex.assert_trees_all_equal(cparams["b"], nuqjax.compress(params, 3, "enq")["b"])
    assert not np.array_equal(cparams["a"].levels, nuqjax.compress(params, 3, "enq")["a"].levels)


# ---- Which leaves. ----


def test_the_default_choice():
    params = {
        "kernel": gaussian((16, 24)), "stacked": gaussian((2, 300)), "vector": gaussian(500),
        "small": gaussian((5, 51)),
        "words": np.ones((16, 24), np.int32), "flag": np.ones((16, 24), bool), "step": 3, "name": None,
        "complex": np.ones((16, 24), np.complex64), "key": jax.random.key(0), "wide": gaussian((256, 1)),
    }  # fmt: skip
    _, report = nuqjax.compress(params, 4, "normal", rules=[Rule("stacked", stack_axes=1)], return_report=True)
    reasons = {leaf.path: leaf.reason for leaf in report.leaves}
    assert reasons == {
        "kernel": None, "wide": None, "stacked": "one axis", "vector": "one axis",
        "small": "255 values, min_size is 256",
        "words": "dtype int32 is not floating", "flag": "dtype bool is not floating", "step": "not an array",
        "complex": "dtype complex64 is not floating", "key": "dtype key<fry> is not floating",
    }  # fmt: skip


def test_min_size_is_the_least_size_compressed():
    params = {"w": gaussian((10, 10))}
    assert isinstance(nuqjax.compress(params, 2, "normal", min_size=100)["w"], CodebookArray)
    assert nuqjax.compress(params, 2, "normal", min_size=101)["w"] is params["w"]


def test_a_leaf_that_would_not_get_smaller_stays_dense_unless_a_rule_insists():
    array = gaussian((4, 100))
    cparams, report = nuqjax.compress({"w": array}, 8, "normal", granularity="channel", return_report=True)
    assert cparams["w"] is array
    assert report.leaves[0].reason == f"would take {100 * (4 * 256 + 4):,} bytes, not fewer"
    assert compress_one(array, 8, "normal", granularity="channel").nbytes == 100 * (4 * 256 + 4)


def test_rules_choose_skip_insist_and_override():
    params = {"a": gaussian((16, 24)), "b": gaussian((16, 24), 1), "c": gaussian((16, 24), 2), "v": gaussian(9)}
    rules = [Rule("a", skip=True), Rule("b", bits=2, granularity="channel"), Rule("[bv]", skip=False, method="enq")]
    cparams, report = nuqjax.compress(params, 5, "normal", rules=rules, return_report=True)
    assert cparams["a"] is params["a"]
    assert report.leaves[0].reason == "rule 'a'"
    assert (cparams["b"].bits, cparams["b"].granularity) == (2, "channel")
    assert (cparams["c"].bits, cparams["c"].granularity) == (5, "tensor")
    assert isinstance(cparams["v"], CodebookArray)
    assert [leaf.method for leaf in report.leaves] == [None, "normal", "normal", "enq"]


def test_a_codebook_array_stays_as_it_is():
    once = nuqjax.compress({"w": gaussian((16, 24))}, 3, "normal")
    twice, report = nuqjax.compress(once, 2, "normal", return_report=True)
    assert twice["w"] is once["w"]
    assert report.leaves[0].reason == "already compressed"
    assert report.leaves[0].nbytes_after == once["w"].nbytes


EDGES = {
    "scalar": np.float32(3),
    "one value": np.full((1,), 2.5, np.float32),
    "constant": np.full((4, 5), -0.7, np.float32),
    "no outputs": np.zeros((4, 0), np.float32),
    "no inputs": np.zeros((0, 4), np.float32),
}
EDGE_OPTIONS = [
    {},
    {"granularity": "channel", "scale": InputGroups(3)},
    {"granularity": InputGroups(3), "scale": "channel"},
    {"granularity": ChannelGroups(3), "keep_zero": True, "codebook_format": AutoQFormat(8)},
]


@pytest.mark.parametrize("edge", EDGES)
def test_scalar_empty_constant_and_one_value_leaves_work(edge):
    array = EDGES[edge]
    params = {"w": array, "v": jnp.asarray(array)}
    cparams = nuqjax.compress(params, 4, "normal")
    assert cparams == params or all(cparams[name] is params[name] for name in params)
    for options in EDGE_OPTIONS:
        leaf = compress_one(array, 2, "enq", **options)
        check(leaf)
        assert leaf.nbytes == sum(a.nbytes for a in jax.tree.leaves(leaf))
        dense = nuqjax.decompress(leaf)
        assert (dense.shape, dense.dtype) == (array.shape, array.dtype)
        report = nuqjax.report({"w": array}, {"w": leaf})
        assert report.leaves[0].largest_error == (abs(np.asarray(dense) - array).max() if array.size else 0)
        if "codebook_format" not in options and "keep_zero" not in options:
            np.testing.assert_array_equal(dense, array)


def test_an_empty_stack_works():
    leaf = compress_one(np.zeros((0, 4, 6), np.float32), 2, "enq", rule=Rule("w", skip=False, stack_axes=1))
    check(leaf)
    assert nuqjax.decompress(leaf).shape == leaf.shape == (0, 4, 6)


def test_an_empty_tree_and_a_bare_none_work():
    for tree in ({}, None, [], {"a": None}):
        cparams, report = nuqjax.compress(tree, return_report=True)
        assert cparams == tree
        assert report.leaves == ()
        assert nuqjax.decompress(tree) == tree


# ---- Under jit, and again. ----


JIT_OPTIONS = [
    {"method": "normal", "granularity": InputGroups(30)},
    {"method": "enq", "scale": InputGroups(5), "codebook_format": QFormat(6, 4)},
    {"method": "quantile", "granularity": ChannelGroups(3), "codebook_format": "float8_e4m3fn", "keep_zero": True},
    {"method": "uniform", "granularity": "channel", "scale": "channel"},
]


@pytest.mark.parametrize("options", JIT_OPTIONS, ids=lambda options: options["method"])
def test_compress_under_jit_gives_the_same_bits(options):
    params = {
        "w": jnp.asarray(gaussian((40, 7))),
        "h": jnp.asarray(gaussian((40, 7), 1), jnp.bfloat16),
        "b": jnp.ones(3),
    }
    importance = {"w": jnp.asarray(abs(gaussian((40, 7), 2)))}

    def run(params, importance):
        return nuqjax.compress(params, 3, sensitivity=importance, **options)

    eager, jitted = run(params, importance), jax.jit(run)(params, importance)
    assert isinstance(eager["w"], CodebookArray)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    chex.assert_trees_all_equal(eager, jitted)
    shapes = jax.eval_shape(run, params, importance)
    assert jax.tree.structure(shapes) == jax.tree.structure(eager)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, eager)
    from_numpy = run(*jax.tree.map(np.asarray, (params, importance)))
    chex.assert_trees_all_equal(eager, from_numpy)


def test_decompress_under_jit_gives_the_same_bits():
    params = {"w": jnp.asarray(gaussian((40, 7)), jnp.bfloat16)}
    for options in JIT_OPTIONS:
        cparams = nuqjax.compress(params, 3, **options)
        chex.assert_trees_all_equal(nuqjax.decompress(cparams), jax.jit(nuqjax.decompress)(cparams))


def test_auto_format_under_jit_says_why_not():
    with pytest.raises(ValueError, match=r"^w: AutoQFormat.*under jit give a QFormat"):
        jax.jit(lambda w: nuqjax.compress({"w": w}, 3, "normal", codebook_format=AutoQFormat(8)))(jnp.ones((16, 24)))


def test_the_same_input_gives_the_same_bits():
    array = gaussian((8, 8))
    chex.assert_trees_all_equal(*(compress_one(array, 2, "knq") for _ in range(2)))


def test_progress_changes_nothing(capsys):
    params = {"kernel": gaussian((40, 7)), "bias": gaussian(7)}
    shown = nuqjax.compress(params, 3, "normal", progress=True)
    assert "kernel" in capsys.readouterr().out
    chex.assert_trees_all_equal(shown, nuqjax.compress(params, 3, "normal"))


def test_knq_is_exact_where_there_are_no_more_values_than_levels():
    array = np.random.default_rng(0).choice(gaussian(4), size=(8, 8))
    np.testing.assert_array_equal(np.asarray(compress_one(array, 2, "knq")), array)


def test_tolerance_proves_knq_and_changes_no_bit():
    array = gaussian((8, 8))
    given = {"bits": 2, "rules": [INSIST], "return_report": True}
    plain, without = nuqjax.compress({"w": array}, tolerance=None, **given)
    proven, report = nuqjax.compress({"w": array}, **given)  # to 1e-6
    chex.assert_trees_all_equal(plain, proven)
    assert without.leaves[0].certificate is without.total["certificate"] is None
    assert 0 <= report.leaves[0].certificate <= 1e-6
    assert 0 <= report.total["certificate"] <= 1e-6
    chex.assert_trees_all_equal(plain, jax.jit(lambda w: nuqjax.compress({"w": w}, bits=2, rules=[INSIST]))(array))


# ---- Codebooks out and in again. ----


@pytest.fixture(scope="module")
def mixed():
    """A tree with codebooks of several kinds, and what it came from."""
    params = {"a": gaussian((3, 4, 7)), "s": gaussian((2, 12, 7), 1), "q": gaussian((12, 7), 2), "bias": gaussian(7)}
    rules = [
        Rule("^a$", skip=False, granularity=InputGroups(5), scale=InputGroups(4)),
        Rule("^s$", skip=False, stack_axes=1, granularity=ChannelGroups(3)),
        Rule("^q$", skip=False, codebook_format=QFormat(6, 3)),
    ]
    return params, nuqjax.compress(params, 2, "enq", rules=rules)


def test_codebooks_put_back_decode_to_the_same_values(mixed):
    _, cparams = mixed
    levels = nuqjax.codebooks(cparams)
    assert levels["bias"] is None
    assert levels["q"].dtype == np.float32
    again = nuqjax.with_codebooks(cparams, levels)
    chex.assert_trees_all_equal(nuqjax.decompress(again), nuqjax.decompress(cparams))
    assert again["a"].packed is cparams["a"].packed


def test_codebooks_of_a_dense_tree_are_nothing():
    params = {"a": jnp.ones(3), "b": [jnp.ones((2, 2))]}
    assert nuqjax.codebooks(params) == {"a": None, "b": [None]}
    assert nuqjax.with_codebooks(params, nuqjax.codebooks(params)) == params


@pytest.mark.parametrize("tree", ["nnx module", "nnx state", "equinox"])
def test_codebooks_of_modules(tree):
    cparams = nuqjax.compress(TREES[tree](), 2, "normal")
    levels = jax.tree.map(lambda a: a + 1, nuqjax.codebooks(cparams))
    moved = nuqjax.with_codebooks(cparams, levels)
    assert jax.tree.structure(moved) == jax.tree.structure(cparams)
    before, after = jax.tree.leaves(nuqjax.codebooks(cparams)), jax.tree.leaves(nuqjax.codebooks(moved))
    assert before
    chex.assert_trees_all_equal([a + 1 for a in before], after)


def test_the_gradient_of_a_level_is_the_sum_over_the_weights_that_share_it(mixed):
    params, cparams = mixed
    coefficients = {name: gaussian(array.shape, 5) for name, array in params.items()}

    def loss(levels):
        dense = nuqjax.decompress(nuqjax.with_codebooks(cparams, levels))
        return sum(jnp.vdot(dense[name], coefficients[name]) for name in params)

    for gradient in (jax.grad(loss)(nuqjax.codebooks(cparams)), jax.jit(jax.grad(loss))(nuqjax.codebooks(cparams))):
        assert gradient["bias"] is None
        for name, stack_axes in (("a", 0), ("s", 1), ("q", 0)):
            leaf, array = cparams[name], params[name]
            stack, output, position, length = numbering(array.shape, stack_axes, -1)
            row = row_numbers(output, position, length, leaf.granularity)
            levels = np.asarray(nuqjax.codebooks(leaf))
            levels = levels.reshape(-1, *levels.shape[-2:])
            factor = np.ones(array.size, np.float32)
            if leaf.scale is not None:
                factor = np.asarray(leaf.scale)[output, position // leaf.scale_group]
            index = abs((array.reshape(-1) / factor)[:, None] - levels[stack, row]).argmin(axis=-1)
            expected = np.zeros(levels.shape)
            share = np.zeros(levels.shape)
            np.add.at(expected, (stack, row, index), (coefficients[name].reshape(-1) * factor).astype(np.float64))
            np.add.at(share, (stack, row, index), abs(coefficients[name].reshape(-1) * factor).astype(np.float64))
            # γ_n Σ|terms|, n the most terms that one sum has
            error = abs(np.asarray(gradient[name]).reshape(levels.shape) - expected)
            assert (error <= 2**-23 * array.size * share + 1e-30).all()


def test_an_optax_step_on_the_codebooks_lowers_the_loss():
    target, x = gaussian((16, 24)), gaussian((8, 16), 1)
    cparams = nuqjax.compress({"w": target, "b": np.zeros(24, np.float32)}, 2, "normal")

    @jax.jit
    def loss(levels):
        dense = nuqjax.decompress(nuqjax.with_codebooks(cparams, levels))
        return jnp.mean((x @ dense["w"] - x @ target) ** 2)

    levels = nuqjax.codebooks(cparams)
    optimizer = optax.sgd(1e-2)
    state = optimizer.init(levels)
    values = [loss(levels)]
    for _ in range(3):
        updates, state = optimizer.update(jax.grad(loss)(levels), state)
        levels = optax.apply_updates(levels, updates)
        values.append(loss(levels))
    assert all(later < earlier for earlier, later in pairwise(values))
    check(nuqjax.with_codebooks(cparams, levels)["w"])
