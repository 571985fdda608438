"""Leaves compressed in the order of use: the moments of two trees side by side, and the choice between the two ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nuqjax
from nuqjax._src.calibration import flow, pairs
from nuqjax._src.calibration.biases import with_offsets
from nuqjax._src.calibration.pairs import SideBySide
from nuqjax._src.calibration.programs import Programs, Some
from nuqjax._src.calibration.second_moments import gather_moments
from nuqjax._src.calibration.sequential import stages_of

pytestmark = pytest.mark.promotes  # the functions do

NUMBERS = ("NHWC", "HWIO", "NHWC")


def network(params, x):
    """A convolution, a depthwise one, a loop over stacked layers, and a dense layer."""
    x = lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=NUMBERS) + params["bias"]
    x = lax.conv_general_dilated(
        jax.nn.relu(x), params["deep"], (2, 2), "SAME", dimension_numbers=NUMBERS, feature_group_count=8
    )
    x = x.mean((1, 2))
    x, _ = lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, params["stack"])
    return x @ params["dense"]


@pytest.fixture(scope="module")
def trees():
    draw = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 8), "bias": (8,), "deep": (3, 3, 1, 8), "stack": (2, 8, 8), "dense": (8, 5)}
    params = {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    other = {name: leaf + jnp.asarray(0.3 * draw.normal(size=leaf.shape), jnp.float32) for name, leaf in params.items()}
    batches = [draw.normal(size=(n, 8, 8, 4)).astype(np.float32) for n in (6, 6, 3)]
    return params, other, batches


def side_by_side(programs, other, batches, stage):
    return SideBySide(programs, Some(batches, tuple(range(len(batches))))).moments(other, stage)


def mean_of(found, name):
    return np.concatenate([record.mean for record in found.records[name]])


LEAVES = frozenset({"conv", "deep", "stack", "dense"})


def test_moments_side_by_side_are_those_of_either_tree(trees):
    params, other, batches = trees
    programs = Programs(network, params, "test")
    pair = side_by_side(programs, other, batches, LEAVES)
    exact, seen = gather_moments(programs, batches), gather_moments(Programs(network, other, "test"), batches)
    same = side_by_side(programs, params, batches, LEAVES)
    for name in sorted(LEAVES):
        for one, two in zip(pair.seen.records[name], seen.records[name], strict=True):
            np.testing.assert_allclose(one.mean, two.mean, atol=1e-5)
        for one, two in zip(pair.exact.records[name], exact.records[name], strict=True):
            np.testing.assert_allclose(one.mean, two.mean, atol=1e-5)
        scale = np.abs(seen.of(name).second).max()
        np.testing.assert_allclose(pair.seen.of(name).second, seen.of(name).second, atol=1e-5 * scale)
        np.testing.assert_allclose(same.cross.of(name).second, exact.of(name).second, atol=1e-5 * scale)
        assert np.abs(pair.cross.of(name).second - seen.of(name).second).max() > 1e-3 * scale or name == "conv"


def test_cross_moments_are_those_of_an_outer_product():
    draw = np.random.default_rng(1)
    params = {"a": draw.normal(size=(6, 5)).astype(np.float32), "b": draw.normal(size=(5, 3)).astype(np.float32)}
    other = {**params, "a": params["a"] + draw.normal(size=(6, 5)).astype(np.float32)}
    x = draw.normal(size=(20, 6)).astype(np.float32)
    pair = side_by_side(Programs(lambda p, x: x @ p["a"] @ p["b"], params, "test"), other, [x], frozenset("b"))
    exact, seen = (x @ tree["a"] for tree in (params, other))
    np.testing.assert_allclose(pair.cross.of("b").second[0], exact.T @ seen / 20, rtol=1e-4, atol=1e-4)


def test_offsets_take_up_what_both_trees_differ_by():
    draw = np.random.default_rng(2)
    params = {"a": draw.normal(size=(16, 16)), "b": draw.normal(size=(16, 16)), "c": np.zeros(16)}
    params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}
    x = draw.normal(size=(50, 16)).astype(np.float32) + 1

    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"] + p["c"]

    cparams = nuqjax.compress(params, bits=2)
    programs = Programs(fn, params, "test")
    pair = side_by_side(programs, nuqjax.decompress(cparams), [x], frozenset("ab"))
    tree, why = with_offsets(params, cparams, pair.exact, pair.seen)
    assert why == {"a": "nothing is added after it"}
    moved = np.asarray(nuqjax.apply(fn)(tree, x) - fn(params, x)).mean(axis=0)
    np.testing.assert_allclose(moved, 0, atol=1e-4)


def test_leaves_of_a_stage_do_not_depend_on_one_another():
    draw = np.random.default_rng(7)
    params = {
        name: jnp.asarray(draw.normal(size=(8, 8)), jnp.float32) for name in ("out", "query", "key", "value", "in")
    }

    @jax.jit
    def attention(x, params):
        query, key, value = (x @ params[name] for name in ("query", "key", "value"))
        return jax.nn.softmax(query @ key.T) @ value @ params["out"].T

    def fn(params, x):
        return x @ params["in"] + attention(jnp.tanh(x @ params["in"]), params)

    programs = Programs(fn, params, "test")
    flat = SideBySide(programs, Some([np.ones((4, 8), np.float32)], (0,))).flat(np.ones((4, 8), np.float32))
    assert stages_of(flat, list(params), dict.fromkeys(params, 1), 10) == [
        frozenset({"in"}),
        frozenset({"query", "key", "value"}),
        frozenset({"out"}),
    ]
    assert len(stages_of(flat, list(params), dict.fromkeys(params, 6), 10)) == 5  # as much as memory holds


@pytest.mark.parametrize("most", [0, 2**30])
def test_stages_continue_from_the_values_at_hand(trees, monkeypatch, most):
    """Moments at each stage are those of a run from the beginning, whether values are kept or too large."""
    params, other, batches = trees
    monkeypatch.setattr(pairs, "_STATE_BYTES", most)
    together = SideBySide(Programs(network, params, "test"), Some(batches, (0, 1, 2)))
    tree = dict(params)
    for name in ("conv", "deep", "stack", "dense"):
        pair = together.moments(tree, frozenset({name}))
        whole = side_by_side(Programs(network, params, "test"), tree, batches, LEAVES)
        for one, two in zip(pair, whole, strict=True):
            assert one.images == 15
            np.testing.assert_allclose(mean_of(one, name), mean_of(two, name), rtol=1e-5, atol=1e-6)
        for one, two in zip(pair[:2], whole[:2], strict=True):
            scale = np.abs(two.of(name).second).max()
            np.testing.assert_allclose(one.of(name).second, two.of(name).second, atol=1e-6 * scale)
        tree[name] = other[name]
    assert any(together._values.values()) == bool(most)


def test_a_tied_array_is_fitted_to_all_its_uses_and_stored_once(monkeypatch):
    draw = np.random.default_rng(4)
    shared = jnp.asarray(draw.normal(size=(24, 24)) / 4, jnp.float32)
    params = {"first": shared, "middle": jnp.asarray(draw.normal(size=(24, 24)) / 4, jnp.float32), "last": shared}
    batches = [draw.normal(size=(64, 24)).astype(np.float32) for _ in range(5)]
    problems = []

    def fn(params, x):
        return jnp.tanh(jnp.tanh(x @ params["first"]) @ params["middle"]) @ params["last"]

    real = flow.solved

    def solved(leaf, plan, found, **stages):
        if "cross" in stages:  # in the order of use
            problems.append((plan.path, found, stages["cross"]))
        return real(leaf, plan, found, **stages)

    monkeypatch.setattr(flow, "solved", solved)
    cparams = nuqjax.compress(params, bits=2, fn=fn, batches=batches)
    np.testing.assert_array_equal(cparams["first"].packed, cparams["last"].packed)
    assert [path for path, *_ in problems] == ["first", "middle"]
    found = problems[0][1]
    assert len(found.uses) == 2
    hidden = jnp.tanh(jnp.tanh(jnp.concatenate(batches[:4]) @ shared) @ params["middle"])
    x = np.concatenate([*batches[:4], hidden])
    np.testing.assert_allclose(found.second[0], x.T @ x / len(x), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(problems[0][2], found.second, rtol=1e-3, atol=1e-3)  # nothing is compressed yet


def deep(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x


@pytest.fixture(scope="module")
def layers():
    draw = np.random.default_rng(3)
    return [{"w": jnp.asarray(draw.normal(size=(24, 24)) / 4, jnp.float32), "b": jnp.zeros(24)} for _ in range(6)], [
        draw.normal(size=(64, 24)).astype(np.float32) for _ in range(10)
    ]


def test_the_better_way_is_taken_and_both_are_told(layers):
    params, batches = layers
    cparams, report = nuqjax.compress(params, bits=2, fn=deep, batches=batches, return_report=True)
    [line] = [line for line in report.notes if "in the order of use" in line]
    first, second = (float(line.split(part)[1].split()[0].strip(",:")) for part in ("a KL of ", "leave it, "))
    assert line.endswith("the order was taken" if second < first else "the first was taken")
    assert report.calibration["measured"]["kl"] == pytest.approx(min(first, second), rel=1e-3)
    assert second < 0.9 * first  # many inputs, few bits: errors that add up are undone by later layers
    again = nuqjax.compress(params, bits=2, fn=deep, batches=batches)
    for one, two in zip(jax.tree.leaves(cparams), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_function_that_cannot_be_mapped_is_compressed_leaf_by_leaf(layers):
    params, batches = layers

    def fn(params, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return deep(params, jax.pure_callback(lambda x: np.asarray(x), shape, deep(params[:1], x)))

    _, report = nuqjax.compress(params, bits=3, fn=fn, batches=batches[:3], return_report=True)
    assert any("fn cannot be mapped over two trees" in line for line in report.notes)


def test_pruned_weights_stay_pruned(layers, monkeypatch):
    params, batches = layers
    params = [{**layer, "w": jnp.where(jnp.abs(layer["w"]) < 0.1, 0, layer["w"])} for layer in params]
    made = []
    real = flow.solved
    monkeypatch.setattr(flow, "solved", lambda *args, **given: made.append(real(*args, **given)) or made[-1])
    nuqjax.compress(params, bits=2, fn=deep, batches=batches, keep_zero=True)
    made = made[len(params) :]  # those in the order of use come second
    assert len(made) == len(params)
    for one, layer in zip(made, params, strict=True):
        assert not np.asarray(one.leaf)[np.asarray(layer["w"]) == 0].any()


def test_a_second_way_that_fails_leaves_the_first(layers, monkeypatch):
    params, batches = layers

    def failing(*args, **given):
        raise ValueError("what b multiplies is not finite")

    monkeypatch.setattr(SideBySide, "moments", failing)
    _, report = nuqjax.compress(params, bits=3, fn=deep, batches=batches[:3], return_report=True)
    assert any("could not be compressed in the order of use, too: what b" in line for line in report.notes)
