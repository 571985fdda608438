"""The bytes of the files that a report says `save` would write."""

import os
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, InputGroups, Rule
from nuqjax._src.store.store import file_sizes


def files(cparams, folder):
    """The bytes of the file and of the entropy-coded file."""
    sizes = []
    for coding in (False, True):
        nuqjax.save(folder / "f", cparams, entropy_coding=coding)
        sizes.append(os.path.getsize(folder / "f"))
    return sizes


def network(count, width):
    """Layers of weights with a normal and a Laplace distribution, and biases."""
    rng = np.random.default_rng(count)
    draw = [rng.normal, rng.laplace]
    return {
        f"layer_{n}": {
            "kernel": draw[n % 2](size=(width, width + 8)).astype(np.float32),
            "bias": rng.normal(size=width + 8).astype(np.float32),
        }
        for n in range(count)
    }


W = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
TREES = {
    "few leaves": network(2, 100),
    "many small tensors": network(16, 40),
    "tied": {"a": W, "b": W, "bias": np.ones(3, np.float32)},
    "nothing": {},
    "no values": {"w": np.zeros((0, 3), np.float32)},
    "constants": {"w": np.full((500, 500), -0.5, np.float32), "v": np.ones((64, 64), np.float32)},
    "others": {"w": W, "k": OrderedDict(x=1.5, y=[None, True, "text", 2j]), "n": {("t", 1): np.int8(3)}},
    "a function": {"w": W, "f": len},
    "one array": W,
    "half": {"w": W.astype(jnp.bfloat16), "v": W.astype(np.float16)},
}


@pytest.mark.parametrize("name", TREES)
def test_a_report_says_what_files_take_before_they_are_written(name, tmp_path):
    params = TREES[name]
    options: dict[str, Any]
    for options in ({"bits": 3, "scale": "channel"}, {"bits": 8, "granularity": ChannelGroups(16)}, {"bits": 1}):
        cparams, made = nuqjax.compress(params, method="quantile", min_size=64, return_report=True, **options)
        plain, coded = files(cparams, tmp_path)
        for report in (made, nuqjax.report(params, cparams)):
            assert report.nbytes_saved == report.total["nbytes_saved"] == plain
            assert report.nbytes_saved_coded == report.total["nbytes_saved_coded"]
            assert report.nbytes_saved_coded == pytest.approx(coded, rel=0.01, abs=16)
            assert f"saved: {plain:,} bytes, {report.nbytes_saved_coded:,} with entropy coding" in str(report)
        again = nuqjax.inspect(tmp_path / "f")
        assert (again.nbytes_file, again.nbytes_saved, again.nbytes_saved_coded) == (coded, None, None)


def test_so_it_does_of_every_layout_and_of_arrays_on_devices(tmp_path):
    params = jax.tree.map(jnp.asarray, network(6, 48)) | {"key": jax.random.key(3)}
    rules = [
        Rule("layer_0", granularity="channel", bits=2), Rule("layer_1", granularity=InputGroups(16), bits=4),
        Rule("layer_2", codebook_format=AutoQFormat(6)), Rule("layer_3", scale=InputGroups(5), bits=5),
        Rule("layer_4", codebook_format="float8_e4m3fn", scale="channel"),
    ]  # fmt: skip
    cparams, report = nuqjax.compress(params, rules=rules, method="normal", min_size=64, return_report=True)
    plain, coded = files(cparams, tmp_path)
    assert report.nbytes_saved == plain
    assert report.nbytes_saved_coded == pytest.approx(coded, rel=0.01)


def test_a_coded_file_is_within_a_fiftieth_of_the_entropy(tmp_path):
    """Header and models counted, for a million weights in 17 leaves of 3 to 6 bits, scales and biases beside them."""
    params = network(17, 240)
    for bits in (3, 6):
        cparams, report = nuqjax.compress(params, bits=bits, method="quantile", scale="channel", return_report=True)
        assert report.total["weights"] > 1e6
        for kept in (None, report):
            nuqjax.save(tmp_path / "f", cparams, entropy_coding=True, report=kept)
            ideal = sum(leaf.entropy * leaf.weights / 8 for leaf in report.compressed)
            ideal += report.total["nbytes_after"] - report.total["nbytes_packed"]
            assert os.path.getsize(tmp_path / "f") < 1.02 * ideal


@pytest.mark.parametrize(
    "tree", [{1.5: W}, {"w": W, "x": np.array(["text"])}], ids=["a key", "a dtype"]
)  # fmt: skip
def test_a_tree_that_no_file_holds_has_a_report_without_files(tree, tmp_path):
    with pytest.raises(ValueError, match=r"a file holds keys|the format cannot store"):
        nuqjax.save(tmp_path / "f", tree)
    assert file_sizes(tree) is None
    report = nuqjax.report(tree, tree)
    assert (report.nbytes_saved, report.nbytes_saved_coded) == (None, None)
    assert "saved:" not in str(report)
