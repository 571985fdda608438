"""`refine`: levels approach the float outputs on their format's values, and never at a loss on held-out batches."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nuqjax
from nuqjax.calibration import refine

optax = pytest.importorskip("optax")

LAYERS = {  # a way to store levels each
    "plain": {},
    "fp16": {"codebook_format": jnp.float16, "scale": "channel"},
    "bf16": {"codebook_format": jnp.bfloat16, "granularity": "channel"},
    "float8": {"codebook_format": "float8_e4m3fn", "scale": "channel"},
    "words": {"codebook_format": nuqjax.AutoQFormat(8), "scale": nuqjax.InputGroups(8)},
    "zero": {"keep_zero": True, "granularity": nuqjax.ChannelGroups(4)},
}


def network(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return 4 * x


@functools.cache
def learned():
    rng = np.random.default_rng(0)
    params = {
        name: {
            "kernel": (rng.standard_t(4, size=(16, 16)) / 3).astype(np.float32),
            "bias": (rng.normal(size=16) / 3).astype(np.float32),
        }
        for name in LAYERS
    }
    params["zero"]["kernel"][rng.random((16, 16)) < 0.3] = 0
    rules = [nuqjax.Rule(f"{name}/kernel", skip=False, **given) for name, given in LAYERS.items()]
    batches = [rng.normal(size=(48, 16)).astype(np.float32) for _ in range(4)]
    cparams = nuqjax.compress(params, bits=2, min_size=64, rules=rules)
    given = {"held_out": batches[3:], "steps": 40, "optimizer": optax.adam(1e-2)}
    return params, cparams, batches, refine(network, params, cparams, batches[:3], **given)


def part(tree):
    """Two of the layers, which compile sooner."""
    return {name: tree[name] for name in ("fp16", "plain")}


def kernels(tree):
    return {name: tree[name]["kernel"] for name in LAYERS}


def divergence(fn, params, cparams, x):
    p, q = (jax.nn.log_softmax(fn(tree, x)) for tree in (params, nuqjax.decompress(cparams)))
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


def test_the_divergence_of_what_was_held_out_falls_and_the_result_says_how_far():
    params, cparams, batches, result = learned()
    assert result.before == pytest.approx(divergence(network, params, cparams, batches[3]), rel=1e-4)
    assert result.after == pytest.approx(divergence(network, params, result.cparams, batches[3]), rel=1e-4)
    assert result.after < 0.9 * result.before
    assert dict(result.history)[result.steps] == result.after == min(loss for _, loss in result.history)
    assert str(result) == (
        f"refined in {result.steps} steps: the loss on held-out batches is {result.before:.4g} → {result.after:.4g}"
    )


def test_indices_scales_dense_leaves_and_bytes_stay():
    _, cparams, _, result = learned()
    for name, leaf in kernels(cparams).items():
        new = kernels(result.cparams)[name]
        assert new.packed is leaf.packed
        assert new.scale is leaf.scale
        assert new.nbytes == leaf.nbytes
        assert (new.levels.dtype, new.codebook_format) == (leaf.levels.dtype, leaf.codebook_format)
        assert result.cparams[name]["bias"] is cparams[name]["bias"]
        assert not (np.asarray(new.levels) == np.asarray(leaf.levels)).all()


def test_levels_keep_their_order_and_a_level_of_zero_is_zero():
    _, cparams, _, result = learned()
    before, after = (
        {name: np.asarray(levels, np.float32) for name, levels in kernels(nuqjax.codebooks(tree)).items()}
        for tree in (cparams, result.cparams)
    )
    for name in LAYERS:
        assert (np.diff(after[name], axis=-1) >= 0).all()
        assert (after[name][before[name] == 0] == 0).all()
    assert (before["zero"] == 0).any(axis=-1).all()


def test_the_same_call_gives_the_same_bits():
    params, cparams, batches, result = learned()
    given = {"held_out": batches[3:], "steps": 40, "optimizer": optax.adam(1e-2)}
    again = refine(network, params, cparams, batches[:3], **given)
    assert again.history == result.history
    for one, other in zip(jax.tree.leaves(again.cparams), jax.tree.leaves(result.cparams), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


class Climb:
    """An optimizer that goes the wrong way, by as much as it is told."""

    def __init__(self, speed):
        self.speed = speed

    def init(self, values):
        return ()

    def update(self, gradients, state, values):
        return jax.tree.map(lambda g: self.speed * g, gradients), state


@pytest.mark.parametrize("speed", [1.0, np.nan])
def test_a_tree_that_no_step_makes_better_comes_back_as_it_was(speed):
    params, cparams, batches, _ = learned()
    params, cparams = part(params), part(cparams)
    given = {"held_out": batches[3:], "optimizer": Climb(speed), "steps": 100, "progress": True}
    result = refine(network, params, cparams, batches[:1], **given)
    assert result.cparams is cparams
    assert (result.steps, result.after) == (0, result.before)
    assert [number for number, _ in result.history] == [10, 20, 30]  # and it is given up early
    assert str(result).startswith("not refined")


def deep(params, x):
    """Scanned layers, a tied table, and an output of a single value."""
    x = params["embed"][x]
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
    return (x @ params["head"].T).sum(-1, keepdims=True)


@functools.cache
def deep_tree():
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)
    params = {"embed": table, "head": table, "layers": rng.normal(size=(3, 16, 16)).astype(np.float32) / 4}
    rules = nuqjax.Rule("layers", stack_axes=1, scale="channel")
    return params, nuqjax.compress(params, bits=2, min_size=64, rules=rules), list(rng.integers(0, 24, size=(3, 32)))


def test_stacked_layers_tied_leaves_and_outputs_that_are_no_classes():
    params, cparams, batches = deep_tree()
    result = refine(deep, params, cparams, batches[:2], held_out=batches[2:], steps=20, scales=True)
    assert 0 < result.after < result.before  # a relative error
    exact, other = (deep(tree, batches[2]) for tree in (params, nuqjax.decompress(result.cparams)))
    assert result.after == pytest.approx(float(((exact - other) ** 2).sum() / (exact**2).sum()), rel=1e-3)
    assert result.cparams["embed"] is result.cparams["head"]
    new, old = result.cparams["layers"], cparams["layers"]
    assert (np.asarray(new.levels) != np.asarray(old.levels)).any(axis=(1, 2)).all()
    ratio = np.asarray(new.scale) / np.asarray(old.scale)
    assert (ratio != 1).any()
    assert ((ratio >= 0.25) & (ratio <= 4)).all()


def test_leaves_that_a_pattern_names_are_refined_too_and_no_others():
    params, cparams, batches, _ = learned()
    given = {"held_out": batches[3:], "steps": 10, "dense": "^p.*bias$"}
    result = refine(network, part(params), part(cparams), batches[:3], **given).cparams
    assert result["fp16"]["bias"] is cparams["fp16"]["bias"]
    assert isinstance(result["plain"]["bias"], np.ndarray)
    assert not (result["plain"]["bias"] == cparams["plain"]["bias"]).any()


def wrong(**changes):
    params, cparams, batches, _ = learned()
    given = {"params": params, "cparams": cparams, "batches": batches[:3], "held_out": batches[3:]} | changes
    refine(given.pop("fn", network), given.pop("params"), given.pop("cparams"), given.pop("batches"), **given)


WEIGHTS = np.full((16, 32), 3, np.float32)
BATCH = np.zeros((4, 16), np.float32)
MISTAKES = {
    "learned from": ({"batches": [BATCH], "held_out": [BATCH.copy()]}, "batch 0 of held_out is also learned from"),
    "an iterator": ({"batches": iter([BATCH])}, "refine: batches is an iterator"),
    "none held out": ({"held_out": []}, "held_out: there are no batches"),
    "no steps": ({"steps": 0}, "steps=0"),
    "another tree": ({"cparams": {}}, "the trees differ"),
    "another shape": (
        {"params": {"w": np.ones((2, 3))}, "cparams": {"w": nuqjax.compress({"w": jnp.eye(32)})["w"]}},
        r"w has the shape \(2, 3\) in params, and \(32, 32\) in cparams",
    ),
    "nothing compressed": ({"params": {"w": np.ones(3)}, "cparams": {"w": np.ones(3)}}, "no compressed leaf"),
    "a pattern of nothing": ({"dense": "kernel"}, "dense='kernel' is found in the path of no floating leaf"),
    "no pattern": ({"dense": "("}, r"dense='\(' is not a regular expression"),
    "a tree that overflows": (
        {"params": {"w": WEIGHTS}, "cparams": nuqjax.compress({"w": WEIGHTS * 1e38}, 1), "fn": lambda p, x: x @ p["w"]},
        "with cparams, outputs of fn for held_out are NaN",
    ),
    "no optimizer": ({"optimizer": 0.1}, "optimizer is a float"),
    "shapes": ({"held_out": [np.ones((4, 7), np.float32)]}, "fails with a batch of float32"),
    "not finite": ({"fn": lambda p, x: network(p, x) / 0}, "NaN or infinite with the float parameters"),
    "a compressed tree for the dense one": ({"params": nuqjax.compress({"w": jnp.eye(32)})}, "is compressed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name):
    changes, words = MISTAKES[name]
    with pytest.raises(ValueError, match=words):
        wrong(**changes)


def test_without_optax_an_optimizer_is_wanted(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match=r"pip install 'nuqjax\[optax\]'"):
        wrong()
