"""Stacked layers that no rule names, and leaves that are no parameters."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import nuqjax
from nuqjax import Rule
from nuqjax._src.compress.stacks import Stack, likely_stacks
from nuqjax._src.leaf.codebook_array import is_codebook_array


def array(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(64)(nn.LayerNorm()(x)), None


def linen_stack():
    model = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=6)()
    return model, model.init(jax.random.key(0), array(2, 64))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.dense = nnx.LayerNorm(64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(x))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(64, 5, rngs=rngs)
        self.layers = nnx.split_rngs(splits=6)(nnx.vmap(NNXBlock, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x):
        return self.head(
            nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        )


def test_scanned_layers_of_linen_are_recognised_and_their_biases_left_dense():
    _, variables = linen_stack()
    plan = nuqjax.plan(variables)
    assert {leaf.path.rsplit("/", 1)[1]: leaf.reason for leaf in plan.leaves} == {
        "bias": "one axis in each of 6 stacked layers",
        "kernel": None,
        "scale": "one axis in each of 6 stacked layers",
    }
    [note] = plan.notes
    assert "'params' looks like 6 stacked layers" in note
    assert "nuqjax.Rule('^params/', stack_axes=1)" in note
    assert note in str(plan)
    assert plan.to_dict()["notes"] == [note]
    with pytest.warns(UserWarning, match="compress: 'params' looks like 6 stacked layers") as caught:
        cparams, report = nuqjax.compress(variables, return_report=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert report.notes == (note,)
    assert str(report).endswith(note)
    assert not is_codebook_array(cparams["params"]["LayerNorm_0"]["scale"])


def test_with_the_rule_that_the_note_shows_each_layer_has_its_own_codebook_and_nothing_warns():
    for (model, variables), pattern in ((linen_stack(), "^params/"), ((None, NNXModel(nnx.Rngs(0))), "^layers/")):
        [note] = nuqjax.plan(variables).notes
        assert f"Rule({pattern!r}, stack_axes=1)" in note
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cparams, report = nuqjax.compress(variables, rules=Rule(pattern, stack_axes=1), return_report=True)
        assert report.notes == ()
        leaves = jax.tree.leaves(cparams, is_leaf=is_codebook_array)
        stacked = [x for x in leaves if is_codebook_array(x) and x.stack_shape == (6,)]
        assert [x.slice_shape for x in stacked] == [(64, 64)]
        run = nuqjax.apply(model.apply if model else lambda m, x: m(x))
        dense = nuqjax.decompress(cparams)
        wanted = model.apply(dense, array(2, 64)) if model else dense(array(2, 64))
        got = jax.jit(run)(cparams, array(2, 64))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_rule_that_insists_says_that_it_is_no_stack():
    tree = {"layers": {"kernel": array(6, 32, 64), "bias": array(6, 64)}}
    assert nuqjax.plan(tree, rules=[Rule("kernel", skip=False)]).notes == ()
    assert [leaf.reason for leaf in nuqjax.plan(tree, rules=[Rule("layers", skip=False)]).leaves] == [None, None]


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"kernel": (3, 3, 8, 16), "bias": (16,)}, []),  # a convolution
        ({"a": (64, 64), "b": (64, 64)}, []),  # layers without a bias
        ({"q/kernel": (64, 4, 16), "q/bias": (4, 16), "out/kernel": (4, 16, 64), "out/bias": (64,)}, []),  # attention
        ({"w": (1, 8, 16), "b": (1, 16)}, []),  # one layer
        ({"w": (6, 8, 16), "b": (5, 16)}, []),
        ({"w": (6, 8, 16), "b": (6, 15)}, []),
        ({"w": (6, 8, 16), "b": (6, 16)}, [Stack("", 6)]),
        ({"a/x/w": (6, 8, 16), "a/y/b": (6, 16), "b": (3,)}, [Stack("a", 6)]),
        ({"e/w": (4, 8, 16), "e/b": (4, 16), "s/w": (6, 8, 16), "s/b": (6, 16)}, [Stack("e", 4), Stack("s", 6)]),
    ],
)
def test_what_looks_like_a_stack(shapes, found):
    assert likely_stacks(shapes) == found


def test_leaves_that_are_no_parameters_stay_dense_unless_a_rule_insists():
    weights = {"w": array(32, 32)}
    tree = {"params": weights, "cache": {"keys": array(2, 64, 16)}, "batch_stats": weights, "lora": weights}
    reasons = {leaf.path: leaf.reason for leaf in nuqjax.plan(tree).leaves}
    assert reasons == {"params/w": None} | {
        f"{name}/{leaf}": f"in the collection {name!r}, not in 'params'"
        for name, leaf in (("cache", "keys"), ("batch_stats", "w"), ("lora", "w"))
    }
    cparams, report = nuqjax.compress(tree, rules=Rule("lora", skip=False), return_report=True)
    assert {leaf.path for leaf in report.compressed} == {"params/w", "lora/w"}
    assert cparams["cache"]["keys"] is tree["cache"]["keys"]
    assert {leaf.path for leaf in nuqjax.plan({"cache": weights, "model": weights}).leaves if not leaf.reason} == {
        "model/w"
    }


def test_nnx_variables_that_are_no_param_stay_dense():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(32, 32, rngs=rngs)
            self.norm = nnx.BatchNorm(512, rngs=rngs)
            self.cache = nnx.Cache(jnp.ones((32, 32)))
            self.adapter = nnx.LoRAParam(jnp.ones((32, 32)))

    model = Net(nnx.Rngs(0))
    for params in (model, nnx.state(model)):
        reasons = {leaf.path.split("/value")[0]: leaf.reason for leaf in nuqjax.plan(params).leaves}
        assert reasons["dense/kernel"] is None
        assert reasons["adapter"] is None
        assert reasons["cache"] == "an nnx.Cache, not an nnx.Param"
        assert reasons["norm/mean"] == "an nnx.BatchStat, not an nnx.Param"


def test_what_is_no_tree_of_arrays_is_refused_with_the_right_call():
    module = nn.Dense(3)
    for params, message in (
        (module, "params is a Dense, but a tree of arrays is wanted, such as compress"),
        (module.apply, "params is 'apply', a function, but"),
        ([0.1] * 9, "0: a Python float in a list, which would be a leaf of its own, but .*jnp.asarray"),
        ({"a": [1, 2]}, "a/0: a Python int in a list, which would be a leaf of its own, but .*jnp.asarray"),
        ("params.npz", "params is a str, but a tree of arrays is wanted"),
        (jax.eval_shape(lambda: {"w": jnp.ones((32, 32))}), "w: a ShapeDtypeStruct, but compress needs values.*plan"),
    ):
        with pytest.raises(ValueError, match=message):
            nuqjax.compress(params)
    assert nuqjax.compress({}) == {}
    assert nuqjax.compress(None) is None


def test_one_rule_is_taken_and_what_is_none_is_refused_with_the_right_call():
    tree = {"w": array(32, 32)}
    assert nuqjax.compress(tree, rules=Rule("w", bits=2))["w"].bits == 2
    assert nuqjax.plan(tree, rules=Rule("w", bits=2)).leaves[0].options.bits == 2
    for rules in ({"w": 8}, "w", 3, [("w", 8)]):
        with pytest.raises(ValueError, match=r'a list of nuqjax.Rule is wanted, such as \[nuqjax.Rule\("kernel"'):
            nuqjax.compress(tree, rules=rules)


def test_the_page_on_layers_runs_and_nothing_warns(capsys):
    page = (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="utf-8")
    _, linen, nnx_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"__name__": "layers"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(linen, names)
        assert "CodebookArray(float32[6, 64, 64], bits=4" in capsys.readouterr().out
        exec(nnx_, names)
    assert names["y"].shape == (2, 64)


def test_arrays_that_would_be_taken_for_others_are_refused_by_name():
    """A mask was dropped without a word; a tensor of others ended in an AttributeError."""
    masked = np.ma.masked_array(array(32, 32), mask=np.arange(1024).reshape(32, 32) < 3)
    foreign = SimpleNamespace(shape=(32, 32), dtype="torch.float32")
    for leaf, message in (
        (masked, r"a/w: an array with 3 masked values; a plain array is wanted: its filled\(0\)"),
        (foreign, r"a/w: a types.SimpleNamespace of dtype torch.float32, but .*np.asarray\(leaf\)"),
    ):
        for call in (nuqjax.compress, nuqjax.plan):
            with pytest.raises(ValueError, match=message):
                call({"a": {"w": leaf}})
    unmasked = np.ma.masked_array(array(32, 32))
    assert nuqjax.compress({"w": unmasked}, method="uniform")["w"].shape == (32, 32)


def test_a_model_is_no_function_of_its_parameters():
    module, tree, x = nn.Dense(3), {"w": array(4, 3)}, array(2, 4)
    formats = nuqjax.calibrate(lambda p, x: x @ p["w"], tree, x)
    for call in (
        lambda: nuqjax.calibrate(module, tree, x),
        lambda: nuqjax.emulate(module, formats)(tree, x),
        lambda: nuqjax.fold_batch_norm(module, tree, x),
    ):
        with pytest.raises(TypeError, match=r"Dense is a model, but a function is wanted, such as model.apply"):
            call()
