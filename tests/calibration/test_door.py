"""`compress` with a function and some inputs: the outputs are kept, the report says how well, and mistakes are told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nuqjax
from nuqjax._src.calibration import flow
from nuqjax.calibration import correct_bias


@functools.cache
def teacher(seed=0):
    """A network `[N, 12]` → `[N, 5]` with random weights whose inputs, as those of most layers, are correlated."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (12, 48), "b": (48, 32), "c": (32, 5)}
    params = {}
    for name, (inputs, outputs) in shapes.items():
        weights = rng.standard_t(4, size=(inputs, outputs)) / np.sqrt(inputs)
        params[name] = {"kernel": weights.astype(np.float32), "bias": rng.normal(size=outputs).astype(np.float32)}
    mix = rng.normal(size=(3, 12))
    batches = [
        (rng.normal(size=(64, 3)) @ mix + 0.2 * rng.normal(size=(64, 12)) + 1).astype(np.float32) for _ in range(6)
    ]
    return params, batches


def network(params, x):
    for name in ("a", "b"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["c"]["kernel"] + params["c"]["bias"][None]


def divergence(params, cparams, x, fn=network):
    p, q = (np.asarray(fn(tree, x), np.float64) for tree in (params, nuqjax.decompress(cparams)))
    p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_data_lose_on_the_weights_and_win_on_the_outputs(bits):
    params, batches = teacher()
    given = {"bits": bits, "min_size": 64}
    learned, report = nuqjax.compress(params, fn=network, batches=batches[:5], return_report=True, **given)
    alone, other = nuqjax.compress(params, scale="channel", return_report=True, **given)
    assert report.total["nbytes_after"] == other.total["nbytes_after"]
    assert report.total["sqnr_db"] < other.total["sqnr_db"] - 2
    assert divergence(params, learned, batches[5]) < 0.25 * divergence(params, alone, batches[5])


def test_the_report_says_what_was_measured_on_what_was_held_out():
    params, batches = teacher()
    cparams, report = nuqjax.compress(params, fn=network, batches=batches, min_size=64, return_report=True)
    told = report.calibration
    assert (told["examples"], told["held_out"]) == (5 * 64, 64)
    held = [
        batch for batch in batches if np.isclose(divergence(params, cparams, batch), told["measured"]["kl"], rtol=1e-3)
    ]
    assert len(held) == 1
    assert f"KL {told['measured']['kl']:.4g} nats" in str(report)
    assert {leaf.method for leaf in report.compressed} == {"knq+feedback+refit"}
    for errors in told["layer_errors"].values():
        assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert report.to_dict()["calibration"] == told


def test_one_batch_is_enough_and_nothing_is_measured():
    params, batches = teacher()
    _, report = nuqjax.compress(params, fn=network, batches=batches[:1], min_size=64, return_report=True)
    assert report.calibration["measured"] is None
    assert "nothing was measured" in str(report)


def test_the_same_call_gives_the_same_bits():
    params, batches = teacher()
    first, second = (nuqjax.compress(params, fn=network, batches=batches, min_size=64) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), first, second))


def convolution(params, x):
    x = lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = (x - params["mean"][None, None, None]) * params["factor"][None, None, None]
    return x.mean((1, 2))


def test_a_batch_norms_mean_takes_the_correction_and_a_layer_without_offset_is_named():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 3, 4, 8)).astype(np.float32), "mean": np.zeros(8, np.float32)}
    params["factor"] = np.full(8, 0.5, np.float32)
    x = (rng.normal(size=(16, 6, 6, 4)) + 1).astype(np.float32)
    cparams = nuqjax.compress(params, bits=2)
    mended = correct_bias(convolution, params, cparams, [x[:8], x[8:]])
    error = lambda tree: np.abs((nuqjax.apply(convolution)(tree, x) - convolution(params, x)).mean(0)).max()  # noqa: E731
    assert error(mended) < 0.1 * error(cparams)
    assert (mended["factor"] == params["factor"]).all()
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    _, report = nuqjax.compress(
        {"w": rng.normal(size=(16, 32))}, fn=fn, batches=[x.reshape(-1, 16)], return_report=True
    )
    assert report.calibration["uncorrected"] == {"w": "nothing is added after it"}


def test_stacked_layers_are_compressed_each_for_its_own_inputs():
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(3, 16, 16)).astype(np.float32) / 4,
        "b": rng.normal(size=(3, 16)).astype(np.float32),
    }
    fn = lambda p, x: lax.scan(lambda x, p: (jnp.tanh(x @ p["w"] + p["b"][None]), None), x, p)[0]  # noqa: E731
    x = rng.normal(size=(64, 16)).astype(np.float32)
    cparams, report = nuqjax.compress(params, bits=3, fn=fn, batches=[x[:32], x[32:]], min_size=16, return_report=True)
    assert cparams["w"].levels.shape == (3, 1, 8)
    assert [leaf.path for leaf in report.dense] == ["b"]
    assert not (np.asarray(cparams["b"]) == params["b"]).all()
    assert report.notes[0].startswith("levels")  # and no word of stacks that nobody named
    got = np.asarray(nuqjax.apply(fn)(cparams, x))
    np.testing.assert_allclose(got, fn(nuqjax.decompress(cparams), x), rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "[out, in]": ((32, 16), (0,), lambda p, x: x @ p["w"].T),
    "[in, heads, size]": ((16, 4, 8), (1, 2), lambda p, x: jnp.einsum("ni,ihk->nhk", x, p["w"])),
    "table": ((32, 16), (1,), lambda p, x: p["w"][jnp.abs(x[:, 0]).astype(jnp.int32)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_axes_are_those_of_the_use(layout):
    kernel, axes, fn = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    params, x = {"w": rng.normal(size=kernel).astype(np.float32)}, rng.normal(size=(40, 16)).astype(np.float32)
    cparams = nuqjax.compress(params, bits=3, fn=fn, batches=[x])
    assert cparams["w"].axes == axes
    assert cparams["w"].scale.shape == (np.prod([kernel[a] for a in axes]), 1)


def test_a_tied_array_is_compressed_once_for_all_of_its_uses():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    fn = lambda p, i: jnp.tanh(p["embed"][i]) @ p["head"].T  # noqa: E731
    index = rng.integers(0, 32, size=(2, 50))
    cparams = nuqjax.compress({"embed": table, "head": table}, bits=3, fn=fn, batches=list(index))
    assert cparams["embed"].packed is cparams["head"].packed
    assert cparams["embed"].axes == (0,)


OPTIONS = {
    "granularity": {"granularity": "channel"},
    "groups": {"granularity": nuqjax.ChannelGroups(8)},
    "input groups": {"granularity": nuqjax.InputGroups(16)},
    "scales of groups": {"scale": nuqjax.InputGroups(8)},
    "fp16": {"codebook_format": jnp.float16},
    "fixed point": {"codebook_format": nuqjax.AutoQFormat(8)},
    "zero": {"keep_zero": True},
    "eight bits": {"bits": 8},
    "a rule": {"rules": [nuqjax.Rule("a/kernel", bits=8, scale=None), nuqjax.Rule("c/", skip=True)]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_layout_of_the_library(name):
    params, batches = teacher()
    given = {"bits": 3, "min_size": 64, "rules": [nuqjax.Rule("kernel", skip=False)]} | OPTIONS[name]
    cparams = nuqjax.compress(params, fn=network, batches=batches[:2], **given)
    alone = nuqjax.compress(params, **given)
    for layer in params:
        mine, other = cparams[layer]["kernel"], alone[layer]["kernel"]
        if isinstance(mine, nuqjax.CodebookArray):
            assert (mine.bits, mine.granularity, mine.axes) == (other.bits, other.granularity, other.axes)
            assert mine.levels.shape == other.levels.shape
    assert np.isfinite(network(nuqjax.decompress(cparams), batches[2])).all()


def wrong(**changes):
    params, batches = teacher()
    given = {"params": params, "fn": network, "batches": batches[:2]} | changes
    nuqjax.compress(given.pop("params"), **given)


MISTAKES = {
    "no batches": ({"batches": []}, "no batches"),
    "an iterator": ({"batches": iter([1])}, "iterator"),
    "an array": ({"batches": np.ones((4, 12), np.float32)}, "one array of shape"),
    "no function": ({"fn": None}, "no fn"),
    "no data": ({"batches": None}, "no batches"),
    "shapes": (
        {"batches": [np.ones((4, 7), np.float32)]},
        r"fn\(params, \*inputs\) fails with a batch of float32\[4, 7\]",
    ),
    "unused": ({"fn": lambda p, x: x}, "uses no leaf"),
    "not finite": ({"fn": lambda p, x: network(p, x) / 0}, "NaN or infinite"),
    "inputs not finite": ({"batches": [np.full((4, 12), np.inf, np.float32)]}, "not finite"),
    "integers": ({"fn": lambda p, x: network(p, x).argmax(-1)}, "output to compare"),
    "another method": ({"method": "normal", "rate": "3bpw"}, "goes with it"),
    "no method": ({"method": "best"}, "unknown method"),
    "a budget out of reach": ({"budget": "1bpw"}, "with 2 bits for every leaf"),
    "a rate of bytes": ({"rate": "5kB"}, "rate='5kB'"),
    "a budget and a rate": ({"budget": 1000, "rate": "3bpw"}, "both given"),
    "no budget": ({"budget": "small"}, "budget='small'"),
    "both": ({"sensitivity": {}}, "both given"),
    "a model": ({"fn": type("M", (), {"init": len, "apply": len})()}, "a function"),
    "weights": (
        {"params": {"w": np.full((32, 32), np.nan, np.float32)}, "fn": lambda p, x: x[:, :1] * p["w"][0, 0]},
        "uses no leaf|finite",
    ),
    "one that is compressed": ({"params": {"w": nuqjax.compress({"w": jnp.eye(32)})["w"]}}, "compressed"),
}


@pytest.mark.promotes
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name):
    changes, words = MISTAKES[name]
    with pytest.raises(ValueError, match=words):
        wrong(**changes)


def test_few_examples_of_a_wide_layer_are_warned_of():
    rng = np.random.default_rng(0)
    params, x = {"w": rng.normal(size=(100, 8)).astype(np.float32)}, rng.normal(size=(3, 100)).astype(np.float32)
    with pytest.warns(UserWarning, match="w has 100 inputs, seen in 3 examples: 25 or more"):
        nuqjax.compress(params, fn=lambda p, x: x @ p["w"], batches=[x])


def test_an_output_is_chosen_among_several():
    params, batches = teacher()
    fn = lambda p, x: {"classes": network(p, x).argmax(-1), "logits": network(p, x)}  # noqa: E731
    given = {"fn": fn, "batches": batches[:2], "output": lambda outputs: outputs["logits"], "min_size": 64}
    _, report = nuqjax.compress(params, return_report=True, **given)
    assert report.calibration["measured"]["kl"] > 0


def test_a_budget_is_kept_and_its_prediction_and_rules_hold():
    params, batches = teacher()
    given = {"fn": network, "batches": batches, "min_size": 64}
    _, report = nuqjax.compress(params, budget="5.5bpw", return_report=True, **given)
    assert report.total["bits_per_weight"] <= 5.5
    bits = {path: leaf.bits for path, leaf in zip(params, report.compressed, strict=True)}
    assert len(set(bits.values())) > 1
    told = report.calibration
    assert told["tried"] == told["held_out"] == 64
    assert told["examples"] == 5 * 64  # those that decided on bits among them
    [ways] = [line for line in report.notes if "by its float inputs" in line]
    alone = float(ways.split("a KL of ")[1].split(",")[0])  # the prediction adds up leaves that are compressed alone
    assert told["predicted"] / 3 < alone < told["predicted"] * 3
    assert told["measured"]["kl"] <= alone * (1 + 1e-3)
    rules = [eval(rule, {"Rule": nuqjax.Rule}) for rule in told["rules"]]
    again = nuqjax.compress(params, rules=rules, **given)
    assert {path: again[path]["kernel"].bits for path in params} == bits
    _, cheap = nuqjax.compress(params, budget=f"kl={2 * told['predicted']}", return_report=True, **given)
    assert cheap.total["nbytes_after"] < report.total["nbytes_after"]
    _, same = nuqjax.compress(params, budget=report.total["nbytes_after"], return_report=True, **given)
    assert same.total["nbytes_after"] <= report.total["nbytes_after"]


def test_a_rate_is_what_the_coded_file_takes_and_its_outputs_are_better_than_a_budgets(tmp_path):
    params, batches = wide_teacher()
    given = {"fn": network, "batches": batches, "codebook_format": jnp.float16, "return_report": True}
    rated, report = nuqjax.compress(params, rate="3bpw", **given)
    weights = report.total["weights"]
    assert 2.9 < report.calibration["file_bits_per_weight"] <= 3
    written = nuqjax.save(tmp_path / "rated.safetensors", rated, entropy_coding=True)
    del written
    size = (tmp_path / "rated.safetensors").stat().st_size
    assert 8 * size / weights < 3 + 8 * 1500 / weights  # the header and the models of the coder
    assert report.nbytes_saved_coded == pytest.approx(size, rel=0.01)
    _, other = nuqjax.compress(params, budget="3bpw", **given)
    assert report.calibration["measured"]["kl"] < other.calibration["measured"]["kl"]


@functools.cache
def wide_teacher():
    rng = np.random.default_rng(3)
    shapes = {"a": (24, 128), "b": (128, 128), "c": (128, 10)}
    params = {
        name: {
            "kernel": (rng.standard_t(4, size=shape) / np.sqrt(shape[0])).astype(np.float32),
            "bias": rng.normal(size=shape[1]).astype(np.float32),
        }
        for name, shape in shapes.items()
    }
    mix = rng.normal(size=(6, 24))
    draw = lambda: (rng.normal(size=(96, 6)) @ mix + 0.2 * rng.normal(size=(96, 24)) + 1).astype(np.float32)  # noqa: E731
    return params, [draw() for _ in range(6)]


def test_leaves_whose_moments_do_not_fit_into_memory_together_give_the_same_bits(monkeypatch):
    params, batches = teacher()
    given = {"fn": network, "batches": batches, "min_size": 64, "budget": "8bpw"}
    together = nuqjax.compress(params, **given)
    monkeypatch.setattr(flow, "_MOMENT_VALUES", 1)
    apart = nuqjax.compress(params, **given)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), together, apart))


def test_progress_shows_each_stage_once(capsys):
    params, batches = teacher()
    nuqjax.compress(params, fn=network, batches=batches[:3], min_size=64, progress=True)
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert list(dict.fromkeys(lines)) == lines == ["moments", "leaves", "measured", "in", "then"]


def test_correct_bias_refuses_what_it_cannot_go_through_twice_and_trees_that_differ():
    params, batches = teacher()
    cparams = nuqjax.compress(params, min_size=64)
    with pytest.raises(ValueError, match="correct_bias: batches is an iterator"):
        correct_bias(network, params, cparams, iter(batches))
    with pytest.raises(ValueError, match="the trees differ"):
        correct_bias(network, params, {"a": cparams["a"]}, batches)


def test_outputs_that_are_no_classes_have_a_relative_error():
    params, batches = teacher()
    fn = lambda p, x: network(p, x)[:, :1]  # noqa: E731
    given = {"fn": fn, "batches": batches[:3], "min_size": 64, "budget": "7bpw"}
    _, report = nuqjax.compress(params, return_report=True, **given)
    assert set(report.calibration["measured"]) == {"relative_error", "rows"}
    assert 0 < report.calibration["measured"]["relative_error"] < 0.1
    assert "a relative error of" in str(report)
    with pytest.raises(ValueError, match="no leaf is compressed"):
        nuqjax.compress(params, **given | {"budget": None, "rate": "3bpw", "min_size": 10**6})
