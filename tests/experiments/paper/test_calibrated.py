"""The study with data on a small network made here: every method is treated alike, and everything is counted."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from experiments import networks
from experiments.data import sources
from experiments.paper import __main__ as door
from experiments.paper import calibrated, study
from experiments.paper.calibrated import counted, grid, of_study
from experiments.paper.scores import of_bools, pack, unpack
from experiments.record.results import RESULTS, read
from experiments.record.settings import Setting
from tests.experiments.small_network import small_network


@pytest.fixture
def network(monkeypatch):
    """A small network of random weights, and 128 images that differ."""
    made, variables, labelled = small_network(16, 128)
    monkeypatch.setattr(networks, "get", lambda name: made)
    monkeypatch.setattr(networks, "load_features", lambda *_: variables)
    monkeypatch.setattr(sources, "load", lambda *_: labelled)
    return made


def run(file, *options):
    arguments = ["--network", "resnet20", "--data", str(file.parent), "--json", str(file), *options]
    assert calibrated.main(arguments) == 0
    return json.loads(file.read_text())


WEIGHTS, CHANNELS = [3 * 3 * 3 * 16, 16 * 10], [16, 10]
OFFSETS = 2 * 26  # bytes: float16, and nothing is left of the batch-norm


def test_data_win_for_every_method_and_everything_is_counted(network, tmp_path):
    results = run(tmp_path / "r.json", "--bits", "3", "--plain", "3,9")
    cells = {(c["cell"]["method"], c["cell"]["bits"]): c for c in results["cells"]}
    assert results["images"] == results["learned"] == 64
    assert results["float"]["bytes"] == 4 * WEIGHTS[0] + 2 * WEIGHTS[1] + OFFSETS  # a small leaf is kept in float16
    for method in calibrated.LEARNING:
        learned = cells[f"{method}, data", 3]
        assert learned["kl"] < cells[method, 3]["kl"]
        indices, tables = sum(3 * n / 8 for n in WEIGHTS), 2 * 8 if method != "uniform" else 4
        assert learned["stored_bytes"] >= indices + 2 * tables + 2 * sum(CHANNELS) + OFFSETS
        assert learned["stored_bytes"] <= learned["bytes"]
    # Without data: a step a channel and no tables.
    assert cells["dfp", 9]["stored_bytes"] == sum(-(-9 * n // 8) for n in WEIGHTS) + sum(CHANNELS) + OFFSETS
    assert cells["uniform", 3]["stored_bytes"] == sum(-(-3 * n // 8) for n in WEIGHTS) + 2 * sum(CHANNELS) + OFFSETS
    assert cells["knq", 3]["stored_bytes"] == cells["knq", 3]["bytes"]
    check_that_the_study_s_cells_are_those_measured(results)


def check_that_the_study_s_cells_are_those_measured(results):
    """As if `study` had seen every image twice."""

    def twice(entry):
        return entry | {name: pack(np.repeat(unpack(entry[name]), 2)) for name in ("right", "agrees")}

    measured = {"float": twice(results["float"]), "cells": [twice(entry) for entry in results["cells"]]}
    params = {f"kernel{n}": np.zeros((n // c, c), np.float32) for n, c in zip(WEIGHTS, CHANNELS, strict=True)}
    params |= {f"bias{c}": np.zeros(c, np.float16) for c in CHANNELS}
    taken = of_study(measured, params, results["float"])
    same = [entry for entry in results["cells"] if entry["cell"]["rules"]]
    assert len(taken) == len(same) == 6
    for one, other in zip(taken, same, strict=True):
        assert {name for name, value in one.items() if value != other[name]} <= {"bytes"}  # a table in memory
    with pytest.raises(ValueError, match="right on others"):
        of_study(measured, params, results["float"] | {"right": pack(~unpack(results["float"]["right"]))})


def test_a_rerun_measures_what_is_missing_and_only_that(network, tmp_path, capsys):
    file = tmp_path / "r.json"
    first = run(file, "--plain", "4", "--learn", "48")
    first["cells"][0]["seconds"] = -1  # a mark
    file.write_text(json.dumps(first))
    second = run(file, "--plain", "4,5", "--learn", "48", "--method", "uniform", "--budget", "6bpw")
    assert [cell["seconds"] == -1 for cell in second["cells"]].count(True) == 1
    assert len(second["cells"]) == len(first["cells"]) + 8 + 1
    budget = second["cells"][-1]
    assert (budget["cell"]["method"], budget["cell"]["bits"], budget["cell"]["budget"]) == (
        "uniform, data",
        None,
        "6bpw",
    )
    assert budget["bytes"] * 8 / (sum(WEIGHTS) + 26) <= 6
    assert [command.split("--plain ")[1].split()[0] for command in second["commands"]] == ["4", "4,5"]
    assert str(tmp_path) not in " ".join(second["commands"])
    with pytest.raises(SystemExit):
        run(file, "--plain", "4", "--learn", "32")
    assert "learned 48, not 32: give another file" in capsys.readouterr().err


def test_the_grid_has_each_cell_once_and_no_codebook_of_more_than_8_bits():
    cells = grid(calibrated.LEARNING, [4], ["4bpw"], [8, 9])
    assert len({str(cell.to_dict()) for cell in cells}) == len(cells)
    plain = {(cell.setting.method, cell.setting.bits) for cell in cells if not cell.data}
    assert plain == {*itertools.product(study.METHODS, [8]), *itertools.product(study.FIXED_POINT, [9])}
    learned = [(cell.setting.method, cell.to_dict()["bits"], cell.budget) for cell in cells if cell.data]
    assert learned == [(m, *size) for size in ((4, None), (None, "4bpw")) for m in calibrated.LEARNING]
    with pytest.raises(ValueError, match="with data the known are knq, enq, uniform"):
        grid(["dfp"], [4])


def test_a_grid_counts_two_numbers_and_a_codebook_its_table():
    params = {"kernel": jnp.linspace(-1, 1, 4096).reshape(64, 64)}
    cparams, report = nuqjax.compress(params, 4, codebook_format=jnp.float16, return_report=True)
    assert counted(report, "knq") == cparams["kernel"].nbytes
    assert counted(report, "uniform") == cparams["kernel"].nbytes - 16 * 2 + 4
    assert study.stored_bytes(Setting("uniform"), report.to_dict()["leaves"]) == 2048 + 4


@pytest.mark.parametrize("path", sorted((RESULTS / "paper_with_data").glob("*.json")), ids=lambda path: path.stem)
def test_what_is_kept_is_of_the_images_and_no_cell_stands_twice(path):
    results = read(path)
    right = unpack(results["float"]["right"])
    assert right.size == results["images"]
    for entry in results["cells"]:
        found = of_bools(unpack(entry["right"]), unpack(entry["agrees"]), right)
        for name in ("top1", "top1_interval", "loss", "loss_interval", "agreement", "agreement_interval"):
            assert entry[name] == pytest.approx(found[name], abs=1e-12)
        assert 0 < entry["stored_bytes"] <= entry["bytes"] < results["float"]["bytes"]
    assert len({json.dumps(entry["cell"], sort_keys=True) for entry in results["cells"]}) == len(results["cells"])


def test_one_command_asks_both_questions(monkeypatch):
    monkeypatch.setattr(calibrated, "main", lambda words: ("calibrated", words))
    monkeypatch.setattr(study, "main", lambda words: ("study", words))
    assert door.main(["--calibrated", "--bits", "3"]) == ("calibrated", ["--bits", "3"])
    assert door.main(["--bits", "3"]) == ("study", ["--bits", "3"])
