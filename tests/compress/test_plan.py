"""The plan says what compress does, and its sizes are those of the arrays that compress makes."""

import json
from itertools import product

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, CodebookArray, InputGroups, QFormat, Rule

GRANULARITIES = ["tensor", "channel", ChannelGroups(3), InputGroups(5)]
SCALES = [None, "channel", InputGroups(5)]
FORMATS = [None, jnp.bfloat16, "float8_e4m3fn", QFormat(6, 4), QFormat(12, 4, signed=False), AutoQFormat(20)]


def real_nbytes(tree):
    return [
        sum(np.asarray(a).nbytes for a in jax.tree.leaves(leaf))
        for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, CodebookArray))
    ]


def assert_as_planned(params, bits=4, method="normal", **options):
    planned = nuqjax.plan(params, bits, method, **options)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    assert nuqjax.plan(shapes, bits, method, **options) == planned
    cparams = nuqjax.compress(params, bits, method, **options)
    assert [leaf.nbytes_after for leaf in planned.leaves] == real_nbytes(cparams)
    assert [leaf.nbytes_before for leaf in planned.leaves] == real_nbytes(params)
    assert (planned.nbytes_before, planned.nbytes_after) == (sum(real_nbytes(params)), sum(real_nbytes(cparams)))
    leaves = jax.tree.leaves(cparams, is_leaf=lambda x: isinstance(x, CodebookArray))
    assert [leaf.reason is None for leaf in planned.leaves] == [isinstance(leaf, CodebookArray) for leaf in leaves]
    assert [leaf.shape for leaf in planned.leaves] == [leaf.shape for leaf in leaves]
    assert [leaf.dtype for leaf in planned.leaves] == [str(leaf.dtype) for leaf in leaves]
    return planned


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("stack_axes", [0, 1])
def test_sizes_are_the_real_ones_for_every_option(granularity, stack_axes):
    """Through `jax.eval_shape`, which runs all of compress but the arithmetic."""
    params = {"a": jnp.ones((2, 9, 7)), "h": jnp.ones((2, 9, 7), jnp.bfloat16), "b": jnp.ones(7)}
    rules = [Rule("[ah]", skip=False, stack_axes=stack_axes)]
    for scale, codebook_format in product(SCALES, FORMATS[:-1]):
        bits, axis = (3, 0) if scale == "channel" else (8, -1)
        options = {
            "bits": bits, "method": "normal", "granularity": granularity, "scale": scale, "axis": axis,
            "codebook_format": codebook_format, "rules": rules,
        }  # fmt: skip
        planned = nuqjax.plan(params, **options)
        cparams = jax.eval_shape(lambda p, options=options: nuqjax.compress(p, **options), params)
        sizes = {name: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(leaf)) for name, leaf in cparams.items()}
        assert {leaf.path: leaf.nbytes_after for leaf in planned.leaves} == sizes


@settings(max_examples=15)
@given(st.data())
def test_the_plan_is_what_compress_does(data):
    """On real arrays, with the choice of what stays dense left to the default."""
    shape = data.draw(st.sampled_from([(16, 20), (3, 5, 20), (300, 1), (0, 9), (320,), ()]))
    options = {
        "granularity": data.draw(st.sampled_from(GRANULARITIES)),
        "scale": data.draw(st.sampled_from(SCALES)),
        "codebook_format": data.draw(st.sampled_from(FORMATS)),
        "min_size": data.draw(st.sampled_from([0, 256, 301])),
    }
    bits = data.draw(st.sampled_from([1, 4, 8]))
    dtype = data.draw(st.sampled_from([np.float32, jnp.bfloat16, np.int32]))
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    assert_as_planned({"w": values, "v": jnp.asarray(values)}, bits, **options)


def test_numpy_float64_counts_the_bytes_that_it_has():
    params = {"w": np.ones((16, 20)), "b": np.ones(20)}
    planned = nuqjax.plan(params, method="normal")
    assert [leaf.nbytes_before for leaf in planned.leaves] == [160, 2560]
    assert [leaf.nbytes_after for leaf in planned.leaves] == real_nbytes(nuqjax.compress(params, method="normal"))
    assert [leaf.dtype for leaf in planned.leaves] == ["float64", "float32"]


def test_the_plan_of_a_model_from_its_shapes_alone():
    model = nn.Dense(24)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 16)))
    planned = nuqjax.plan(shapes, rules=[Rule("bias", skip=True)])
    assert [(leaf.path, leaf.reason) for leaf in planned.leaves] == [
        ("params/bias", "rule 'bias'"),
        ("params/kernel", None),
    ]
    assert planned.leaves[1].nbytes_after == 16 * 4 + 24 * 8


def test_every_leaf_is_listed():
    params = {"w": jnp.ones((16, 20)), "n": 3, "k": jax.random.key(0), "i": np.arange(3), "none": None, "s": "text"}
    planned = nuqjax.plan(params)
    assert [leaf.path for leaf in planned.leaves] == ["i", "k", "n", "s", "w"]
    assert [leaf.reason for leaf in planned.leaves[:4]] == [
        "dtype int64 is not floating", "dtype key<fry> is not floating", "not an array", "not an array",
    ]  # fmt: skip
    again = nuqjax.plan(nuqjax.compress(params, method="normal"))
    assert again.leaves[4].reason == "already compressed"
    assert again.nbytes_after == again.nbytes_before == planned.nbytes_after


def test_options_of_rules_show_in_the_plan():
    params = {"a": jnp.ones((16, 20)), "b": jnp.ones((16, 20))}
    planned = nuqjax.plan(params, 4, rules=[Rule("a", bits=2, granularity=InputGroups(8), axis=[0])])
    first, second = (leaf.options for leaf in planned.leaves)
    assert (first.bits, first.granularity, first.axis, first.rule) == (2, InputGroups(8), (0,), "a")
    assert (second.bits, second.granularity, second.axis, second.rule) == (4, "tensor", -1, None)


def test_the_dict_is_plain():
    params = {"a": jnp.ones((16, 20)), "b": jnp.ones(3)}
    planned = nuqjax.plan(params, granularity=InputGroups(80), codebook_format=QFormat(8, 6))
    table = json.loads(json.dumps(planned.to_dict()))
    assert table["nbytes_after"] == planned.nbytes_after
    assert [leaf["path"] for leaf in table["leaves"]] == ["a", "b"]
    assert table["leaves"][0]["granularity"] == "InputGroups(size=80)"
    assert table["leaves"][1]["reason"] == "one axis"


def test_the_table_shows_every_leaf_and_the_sums():
    params = {"kernel": jnp.ones((16, 20)), "bias": jnp.ones(300)}
    planned = nuqjax.plan(params)
    text = str(planned)
    for shown in (
        "kernel",
        "16×20",
        "knq",
        "bias",
        "one axis",
        f"{planned.nbytes_before:,}",
        f"{planned.nbytes_after:,}",
    ):
        assert shown in text


def test_a_leaf_that_would_be_exactly_as_large_stays_dense():
    """Eight levels of 4 bytes and nine indices of 3 bits are as many bytes as nine values: 36 for each channel."""
    leaves = nuqjax.plan({"w": jnp.zeros((9, 64)), "v": jnp.zeros((10, 64))}, bits=3, granularity="channel").leaves
    assert {leaf.path: (leaf.nbytes_before, leaf.nbytes_after, leaf.reason) for leaf in leaves} == {
        "v": (2560, 2304, None),
        "w": (2304, 2304, "would take 2,304 bytes, not fewer"),
    }
