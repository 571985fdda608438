"""`CodebookArray` as a leaf wherever JAX users put an array, and what `check` refuses."""

import copy
import pickle
from dataclasses import replace

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import SingleDeviceSharding

import nuqjax
from nuqjax import ChannelGroups, CodebookArray, InputGroups, QFormat, Rule
from nuqjax._src.leaf.check import check
from nuqjax._src.leaf.codebook_array import decode
from nuqjax._src.leaf.take import channel_block, decode_take

STACK, INPUTS, OUTPUTS = 3, 12, 7


@pytest.fixture(scope="module")
def array():
    return np.random.default_rng(0).normal(size=(STACK, INPUTS, OUTPUTS)).astype(np.float32)


@pytest.fixture(scope="module")
def stacked(array):
    rule = Rule("w", skip=False, stack_axes=1, granularity=InputGroups(5), scale="channel")
    return nuqjax.compress({"w": array}, 3, "normal", rules=[rule])["w"]


@pytest.fixture(scope="module")
def leaf(array):
    return nuqjax.compress({"w": array[0]}, 3, "normal", rules=[Rule("w", skip=False)])["w"]


@pytest.fixture(scope="module")
def layouts(array):
    """A leaf without stack axes of every layout."""
    options = [
        {"granularity": "tensor", "scale": InputGroups(5)},
        {"granularity": "channel", "codebook_format": QFormat(6, 4)},
        {"granularity": ChannelGroups(3), "axis": 0},
        {"granularity": InputGroups(5), "axis": (0, 1)},
    ]
    cube = array.reshape(4, 9, 7)
    return [nuqjax.compress({"w": cube}, 3, "normal", rules=[Rule("w", skip=False)], **each)["w"] for each in options]


def test_it_stands_for_the_dense_array(stacked, array):
    dense = nuqjax.decompress(stacked)
    assert stacked.shape == dense.shape == array.shape
    assert (stacked.ndim, stacked.size, len(stacked)) == (dense.ndim, dense.size, len(dense))
    assert stacked.dtype == dense.dtype


def test_nbytes_and_payload_bits_are_those_of_the_arrays(stacked, layouts):
    for leaf in [stacked, *layouts]:
        assert leaf.nbytes == sum(np.asarray(a).nbytes for a in jax.tree.leaves(leaf))
        word = leaf.codebook_format.word if leaf.codebook_format else 32
        scales = 0 if leaf.scale is None else leaf.scale.size
        assert leaf.payload_bits == leaf.size * 3 + leaf.levels.size * word + scales * 32
        assert leaf.payload_bits <= 8 * leaf.nbytes


class TestNumPy:
    def test_asarray_decodes(self, stacked):
        np.testing.assert_array_equal(np.asarray(stacked), nuqjax.decompress(stacked))

    def test_a_dtype_can_be_asked_for(self, stacked):
        assert np.asarray(stacked, np.float64).dtype == np.float64
        np.testing.assert_array_equal(np.asarray(stacked, np.float16), np.asarray(stacked).astype(np.float16))

    def test_the_copy_is_ones_own(self, leaf):
        dense = np.array(leaf)
        dense[:] = 0
        assert np.asarray(leaf).any()

    def test_there_is_nothing_to_share(self, leaf):
        with pytest.raises(ValueError, match="no dense array to share"):
            np.array(leaf, copy=False)


class TestIndexing:
    @pytest.mark.parametrize(
        "index", [0, -1, slice(1, None), np.array([2, 0]), np.array([True, False, True]), None, ()], ids=str
    )
    def test_along_the_stack_axes_as_an_array(self, stacked, index):
        part = stacked[index]
        check(part)
        np.testing.assert_array_equal(np.asarray(part), np.asarray(stacked)[index])

    def test_of_several_stack_axes(self, stacked):
        double = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), stacked)
        for index in [(1, 2), (slice(None), 0), (0, slice(1)), (None, 1)]:
            np.testing.assert_array_equal(np.asarray(double[index]), np.asarray(double)[index])

    def test_by_a_traced_number(self, stacked):
        np.testing.assert_array_equal(jax.jit(lambda leaf, i: decode(leaf[i]))(stacked, 2), np.asarray(stacked)[2])

    @pytest.mark.parametrize("index", [(0, 0), ..., (0, ...), np.ones((STACK, INPUTS), bool)], ids=str)
    def test_not_beyond_them(self, stacked, index):
        with pytest.raises(IndexError, match="1 stack axes only"):
            stacked[index]

    def test_iteration_gives_the_slices(self, stacked):
        slices = list(stacked)
        assert len(slices) == STACK
        for i, each in enumerate(slices):
            chex.assert_trees_all_equal(each, stacked[i])

    def test_without_stack_axes_there_is_no_iteration(self, leaf):
        with pytest.raises(TypeError, match="stack axes"):
            list(leaf)


class TestTransformations:
    def test_jit_takes_it_as_an_argument(self, leaf):
        """Parameters of the program, not constants in it; and an equal layout with other values is no new trace."""
        traces = []

        @jax.jit
        def product(leaf, x):
            traces.append(leaf)
            return x @ decode(leaf)

        x = jnp.ones((2, INPUTS))
        closed = jax.make_jaxpr(product)(leaf, x)
        taken = [v.aval.shape for v in closed.jaxpr.invars]
        assert taken == [leaf.levels.shape, leaf.packed.shape, x.shape]
        assert not any(np.size(c) > 1 for c in closed.consts)
        text = product.lower(leaf, x).as_text()
        signature = text[text.index("@main") : text.index("{\n", text.index("@main"))]
        assert f"tensor<{leaf.packed.shape[0]}x{leaf.packed.shape[1]}xui8>" in signature
        traces.clear()
        product(leaf, x)
        product(replace(leaf, levels=leaf.levels + 1), x)
        assert len(traces) <= 1

    def test_vmap_goes_over_the_stack(self, stacked):
        np.testing.assert_array_equal(jax.vmap(decode)(stacked), np.asarray(stacked))
        x = np.ones((STACK, 2, INPUTS), np.float32)
        result = jax.vmap(lambda leaf, x: x @ decode(leaf))(stacked, x)
        np.testing.assert_allclose(result, x @ np.asarray(stacked), rtol=1e-5, atol=1e-5)

    def test_vmap_makes_a_stack(self, leaf):
        made = jax.vmap(lambda shift: replace(leaf, levels=leaf.levels + shift, packed=leaf.packed))(jnp.arange(2.0))
        assert made.levels.shape == (2, *leaf.levels.shape)

    def test_scan_slices_it(self, stacked):
        def step(carry, leaf):
            assert leaf.shape == (INPUTS, OUTPUTS)
            dense = decode(leaf)
            return carry + dense.sum(), dense

        _, slices = lax.scan(step, 0.0, stacked)
        np.testing.assert_array_equal(slices, np.asarray(stacked))

    def test_scan_returns_it(self, stacked):
        _, again = lax.scan(lambda carry, leaf: (carry, leaf), 0.0, stacked)
        chex.assert_trees_all_equal(again, stacked)

    def test_tree_map_reaches_its_arrays(self, stacked):
        zeros = jax.tree.map(jnp.zeros_like, stacked)
        assert isinstance(zeros, CodebookArray)
        assert not np.asarray(zeros).any()
        assert len(jax.tree.leaves(stacked)) == 3

    def test_eval_shape(self, stacked):
        shapes = jax.eval_shape(lambda leaf: leaf, stacked)
        assert (shapes.shape, shapes.dtype, shapes.nbytes) == (stacked.shape, stacked.dtype, stacked.nbytes)
        dense = jax.eval_shape(decode, shapes)
        assert (dense.shape, dense.dtype) == (stacked.shape, stacked.dtype)

    def test_device_put(self, stacked):
        device = jax.devices()[0]
        moved = jax.device_put(stacked, SingleDeviceSharding(device))
        assert all(a.devices() == {device} for a in jax.tree.leaves(moved))
        chex.assert_trees_all_equal(moved, stacked)

    def test_donation(self, stacked):
        given = jax.tree.map(jnp.array, stacked)
        double = jax.jit(lambda leaf: replace(leaf, levels=leaf.levels * 2), donate_argnums=0)
        result = double(given)
        assert all(a.is_deleted() for a in jax.tree.leaves(given))
        np.testing.assert_array_equal(np.asarray(result), 2 * np.asarray(stacked))

    def test_export(self, stacked, layouts):
        """The exported function takes the packed leaf, and so does what was written to bytes and read again."""
        exported = jax.export.export(jax.jit(decode), platforms=["cpu", "cuda", "tpu"])
        for leaf in [stacked, *layouts]:
            lifted = exported(leaf)
            assert [a.shape for a in lifted.in_avals] == [a.shape for a in jax.tree.leaves(leaf)]
            read = jax.export.deserialize(lifted.serialize())
            assert read.in_tree == lifted.in_tree
            for function in (lifted, read):
                np.testing.assert_array_equal(function.call(leaf), np.asarray(leaf))

    def test_exported_functions_return_it(self, stacked):
        lifted = jax.export.export(jax.jit(lambda leaf: leaf[0]))(stacked)
        chex.assert_trees_all_equal(jax.export.deserialize(lifted.serialize()).call(stacked), stacked[0])

    def test_gradients_flow_to_levels_and_scales(self, stacked):
        def loss(levels, scale):
            return decode(replace(stacked, levels=levels, scale=scale)).sum()

        levels, scale = jax.grad(loss, argnums=(0, 1))(stacked.levels, stacked.scale)
        # The decoded array is linear in each: Euler's relation, to the rounding of sums of so many terms.
        total = np.asarray(stacked, np.float64).sum()
        bound = 2**-23 * stacked.size * abs(np.asarray(stacked, np.float64)).sum()
        assert abs(np.vdot(levels, stacked.levels) - total) <= bound
        assert abs(np.vdot(scale, stacked.scale) - total) <= bound


@pytest.mark.parametrize("clone", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy])
def test_copies_and_pickles_are_equal(clone, stacked, layouts):
    for leaf in [stacked, *layouts]:
        again = clone(leaf)
        assert jax.tree.structure(again) == jax.tree.structure(leaf)
        chex.assert_trees_all_equal(again, leaf)


def test_structures_are_equal_exactly_if_the_layouts_are(stacked, layouts):
    leaves = [stacked, *layouts, replace(layouts[0], dtype=np.dtype(np.float16)), replace(layouts[0], bits=2)]
    structures = [jax.tree.structure(leaf) for leaf in leaves]
    assert len(set(structures)) == len(structures)
    assert jax.tree.structure(jax.tree.map(jnp.zeros_like, stacked)) == structures[0]


class TestRepr:
    def test_is_short_and_says_the_layout(self, leaf, stacked, layouts):
        nbytes = 8 * 4 + OUTPUTS * -(-INPUTS * 3 // 8)
        assert repr(leaf) == f"CodebookArray(float32[12, 7], bits=3, granularity='tensor', {nbytes} bytes)"
        assert "[3, 12, 7]" in repr(stacked)
        assert "InputGroups(size=5)" in repr(stacked)
        assert "QFormat(word=6, frac=4, signed=True)" in repr(layouts[1])

    @pytest.mark.parametrize("stand_in", [object(), None, 0, (1, 2), "x", ...], ids=lambda x: type(x).__name__)
    def test_bears_placeholders(self, stacked, stand_in):
        placeholders = replace(stacked, levels=stand_in, packed=stand_in, scale=stand_in)
        assert repr(placeholders).startswith("CodebookArray(float32[12, 7], bits=3")

    def test_of_tracers_and_shapes(self, stacked):
        seen = []
        jax.jit(lambda leaf: seen.append(repr(leaf)))(stacked)
        assert seen == [repr(stacked)] == [repr(jax.eval_shape(lambda leaf: leaf, stacked))]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_decode_take_is_take_of_decode(layouts, axis):
    index = jnp.array([2, 0, 0, 3])
    for leaf in layouts:
        expected = np.take(np.asarray(leaf), index, axis)
        np.testing.assert_array_equal(decode_take(leaf, index, axis), expected)


def test_channel_blocks_are_parts_of_the_channels(layouts):
    for leaf in layouts:
        outputs = leaf.packed.shape[0]
        others = [a for a in range(leaf.ndim) if a not in leaf.axes]
        channels = np.asarray(leaf).transpose([*leaf.axes, *others]).reshape(outputs, -1)
        for start, stop in [(0, outputs), (0, 2), (3, outputs)]:
            block = channel_block(leaf, start, stop)
            check(block)
            np.testing.assert_array_equal(np.asarray(block), channels[start:stop])


class TestCheck:
    def test_passes_what_compress_makes(self, stacked, layouts):
        for leaf in [stacked, *stacked, *layouts]:
            check(leaf)

    def test_refuses_arrays_that_do_not_fit(self, stacked):
        changes = {
            "levels has shape": {"levels": stacked.levels[..., :4]},
            "packed has shape": {"packed": stacked.packed[..., :-1]},
            "packed has dtype int32": {"packed": stacked.packed.astype(jnp.int32)},
            "scale has shape": {"scale": stacked.scale[:, :2]},
            "bits=9": {"bits": 9},
            "granularity 'row'": {"granularity": "row"},
            "output axis 2": {"axes": (2,)},
            "a scale_group of 0": {"scale_group": 0},
        }
        for message, change in changes.items():
            with pytest.raises(ValueError, match=f"^conv/kernel: .*{message}"):
                check(replace(stacked, **change), "conv/kernel")

    def test_refuses_levels_that_are_no_codebook(self, leaf, layouts):
        with pytest.raises(ValueError, match="w: a level is not finite"):
            check(replace(leaf, levels=leaf.levels.at[0, 2].set(jnp.nan)), "w")
        with pytest.raises(ValueError, match="w: the levels of a codebook do not ascend"):
            check(replace(leaf, levels=leaf.levels[:, ::-1]), "w")
        fixed = layouts[1]
        with pytest.raises(ValueError, match=r"w: levels of dtype float32, but QFormat.* stores int8"):
            check(replace(fixed, levels=fixed.levels.astype(jnp.float32)), "w")
        with pytest.raises(ValueError, match=r"w: a level is outside the range of QFormat"):
            check(replace(fixed, levels=fixed.levels.at[0, -1].set(100)), "w")


def test_a_scale_for_more_values_than_a_channel_has_costs_nothing():
    """A group of 2^40 values is all of a channel."""
    params = {"w": jnp.arange(96.0).reshape(12, 8)}
    one = nuqjax.compress(params, method="normal", scale=InputGroups(12), min_size=0)["w"]
    other = replace(one, scale_group=2**40)
    np.testing.assert_array_equal(decode(one), decode(other))
    index = jnp.array([3, 1])
    for axis in (0, 1):
        np.testing.assert_array_equal(decode_take(one, index, axis), decode_take(other, index, axis))
