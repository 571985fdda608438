"""The accuracy experiment: its scores, its sizes, its command line, on a network and images made here."""

import json

import jax
import numpy as np
import pytest

import nuqjax
from experiments import networks
from experiments.studies import accuracy


@pytest.fixture
def folder(cifar_folder):
    """A ResNet-20 in a data folder, each of whose kernels holds at most 16 distinct values."""
    random = np.random.default_rng(5)
    module = networks.get("resnet20").module
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel"):
            values = random.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, 16)
            return random.choice(values, leaf.shape).astype(np.float32)
        return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    params, stats = variables["params"], variables["batch_stats"]
    arrays = {"linear.weight": params["Dense_0"]["kernel"].T, "linear.bias": params["Dense_0"]["bias"]}

    def add(prefix, params, stats, number):
        arrays[f"{prefix}conv{number}.weight"] = params[f"Conv_{number - 1}"]["kernel"].transpose(3, 2, 0, 1)
        arrays[f"{prefix}bn{number}.weight"] = params[f"BatchNorm_{number - 1}"]["scale"]
        arrays[f"{prefix}bn{number}.bias"] = params[f"BatchNorm_{number - 1}"]["bias"]
        arrays[f"{prefix}bn{number}.running_mean"] = stats[f"BatchNorm_{number - 1}"]["mean"]
        arrays[f"{prefix}bn{number}.running_var"] = stats[f"BatchNorm_{number - 1}"]["var"]

    add("", params, stats, 1)
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            name = f"stage{stage}_block{block}"
            for number in (1, 2):
                add(f"layer{stage}.{block}.", params[name], stats[name], number)
    (cifar_folder / "weights").mkdir()
    np.savez(cifar_folder / "weights" / "resnet20_cifar10.npz", **arrays)
    return cifar_folder


def _run(folder, *arguments):
    file = folder / "results.json"
    command = ["--network", "resnet20", "--data", str(folder), "--batch", "10", "--json", str(file), *arguments]
    assert accuracy.main(command) == 0
    return json.loads(file.read_text())


def test_compression_that_loses_nothing_costs_no_accuracy_and_less_does(folder):
    results = _run(folder, "--method", "knq,uniform", "--bits", "1,4")
    assert results["images"] == 24
    cells = {(c["setting"]["method"], c["setting"]["bits"]): c for c in results["cells"]}
    assert list(cells) == [("knq", 1), ("knq", 4), ("uniform", 1), ("uniform", 4)]
    whole = cells["knq", 4]  # 16 distinct values, 16 levels
    assert whole["agreement"] == 1
    assert whole["sqnr_db"] is None
    assert whole["top1"] == results["float"]["top1"]
    assert whole["top5"] == results["float"]["top5"]
    assert cells["knq", 1]["output_sqnr_db"] < 20
    assert cells["knq", 1]["sqnr_db"] >= cells["uniform", 1]["sqnr_db"]  # the optimum, against a grid of two levels


def test_the_same_command_remakes_the_same_numbers(folder):
    timed = ("compress_seconds", "evaluate_seconds")
    first, second = (
        [
            {k: v for k, v in cell.items() if k not in timed}
            for cell in _run(folder, "--method", "uniform", "--bits", "3")["cells"]
        ]
        for _ in range(2)
    )
    assert first == second


def test_sizes_are_those_of_the_arrays(folder):
    rule = ["Dense", "bits=8", "skip=false"]
    cell = _run(folder, "--method", "enq", "--bits", "3", "--scale", "channel", "--rule", *rule)["cells"][0]
    params = networks.load("resnet20", folder)[1]["params"]
    rules = [nuqjax.Rule("Dense", bits=8, skip=False)]
    leaves = jax.tree.leaves(nuqjax.compress(params, 3, "enq", scale="channel", rules=rules))
    assert cell["bytes"] == sum(leaf.nbytes for leaf in leaves)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert cell["bits_per_weight"] == pytest.approx(8 * cell["bytes"] / weights)
    assert cell["ratio"] == pytest.approx(4 * weights / cell["bytes"])
    assert cell["setting"]["rules"] == [rule]


def test_resume_keeps_cells_and_measures_the_others(folder):
    _run(folder, "--method", "enq", "--bits", "3")
    file = folder / "results.json"
    results = json.loads(file.read_text())
    results["cells"][0]["top1"] = 2.0  # a mark: no fraction of images
    file.write_text(json.dumps(results))
    resumed = _run(folder, "--method", "enq", "--bits", "2,3", "--resume")
    assert [(c["setting"]["bits"], c["top1"] == 2) for c in resumed["cells"]] == [(3, True), (2, False)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "nine"], "nine"),
        (["--granularity", "layer"], "unknown granularity 'layer'"),
        (["--images", "25"], "25 images wanted, but there are 24"),
        (["--bits", "9"], "bits=9"),
        (["--method", "kmeans"], "unknown method 'kmeans'"),
        (["--data", "nowhere"], "data folder nowhere is missing"),
        (["--resume", "--images", "10"], "holds resnet20 on 24 images, not resnet20 on 10"),
    ],
)
def test_bad_arguments_end_with_status_2_and_say_why(arguments, message, folder, capsys):
    (folder / "results.json").write_text(json.dumps({"network": "resnet20", "images": 24, "commands": [], "cells": []}))
    with pytest.raises(SystemExit) as error:
        _run(folder, *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_scores_count_first_and_fifth_choices():
    reference = np.array([[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1]], np.float64)
    outputs = np.array([[5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0]], np.float64)
    scores = accuracy.scores(outputs, reference, np.array([0, 4, 5]))
    assert scores["top1"] == 1 / 3
    assert scores["top5"] == 2 / 3  # of equal outputs the first come first, so the last image's class is sixth
    assert scores["agreement"] == 1 / 3
    noise = 2 * (5**2 + 3**2 + 1**2) + 1
    assert scores["output_sqnr_db"] == pytest.approx(10 * np.log10((55 + 55 + 1) / noise))


def test_features_have_no_accuracy():
    outputs = np.ones((2, 3))
    assert accuracy.scores(outputs, outputs, None) == {
        "top1": None, "top5": None, "agreement": None, "output_sqnr_db": None,
    }  # fmt: skip


def test_outputs_that_are_not_finite_are_an_error():
    outputs = np.array([[0.0, np.nan], [np.inf, 1.0]])
    with pytest.raises(ValueError, match="2 of 4 outputs are not finite"):
        accuracy.scores(outputs, np.zeros((2, 2)), np.zeros(2, int))
