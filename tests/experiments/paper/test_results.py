"""The committed results of the study keep the laws that they must."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.documents import tables
from experiments.paper import study
from experiments.paper.plots import PLAIN
from experiments.paper.scores import paired_interval, share_interval, unpack
from experiments.record.results import read

FILES = sorted((tables.RESULTS / "paper").glob("*.json"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
# Top-1 of the weights' own reference forward passes on the same images.
REFERENCE = {"efficientnet_lite0": 0.877, "tiny_darknet": 0.669}


@every_file
def test_shares_and_intervals_are_those_of_the_images(path: Path):
    results = read(path)
    of_float = results["float"]
    for entry in (of_float, *results["cells"]):
        agrees = unpack(entry["agrees"])
        assert agrees.size == results["images"]
        assert entry["agreement"] == agrees.mean()
        assert entry["agreement_interval"] == pytest.approx(share_interval(agrees), abs=1e-12)
        if of_float["top1"] is not None:
            right = unpack(entry["right"])
            assert entry["top1"] == right.mean()
            assert entry["loss_interval"] == pytest.approx(paired_interval(unpack(of_float["right"]), right), abs=1e-12)
            assert entry["kl"] >= 0
    assert of_float["agreement"] == 1


@every_file
def test_no_cell_is_measured_twice_and_each_is_of_the_grid(path: Path):
    cells = [cell["cell"] for cell in read(path)["cells"]]
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
    for cell in cells:
        kind, _, word = cell["codebook_format"].partition(":")
        options = [cell["method"]], [cell["bits"]], [word if kind == "fixed" else "float"]
        assert cell in [
            one.to_dict() for one in study.grid(*options, [cell["granularity"]], [cell["word"]], [cell["scale"]])
        ]


@every_file
def test_no_levels_are_better_than_those_of_knq(path: Path):
    """Of one codebook a layer and float levels, k-means has the least squared error that there is."""
    plain = {
        (cell["cell"]["method"], cell["cell"]["bits"]): cell["layers"]
        for cell in read(path)["cells"]
        if PLAIN.items() <= cell["cell"].items()
    }
    compared = 0
    for (method, bits), layers in plain.items():
        best = plain.get(("knq", bits))
        if method != "knq" and best is not None:
            for layer in best.keys() & layers.keys():
                assert best[layer] >= layers[layer] - 0.001, (method, bits, layer)  # both are rounded to 0.001 dB
                compared += 1
    assert compared > 0


@every_file
def test_memory_grows_with_the_bits(path: Path):
    sizes: dict[tuple, list[tuple[int, int]]] = {}
    for entry in read(path)["cells"]:
        cell = entry["cell"]
        key = tuple(repr(value) for name, value in cell.items() if name != "bits")
        sizes.setdefault(key, []).append((cell["bits"], entry["stored_bytes"]))
    for pairs in sizes.values():
        assert np.all(np.diff([size for _, size in sorted(pairs)]) > 0)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_float_networks_are_as_good_as_their_reference(name):
    results = read(tables.RESULTS / "paper" / f"{name}.json")
    assert results["images"] == 1000
    assert round(results["float"]["top1"], 3) == REFERENCE[name]


@pytest.mark.parametrize("name", [*REFERENCE, "resnet20"])
def test_two_experiments_measure_the_same_float_network(name):
    here, there = read(tables.RESULTS / "paper" / f"{name}.json"), read(tables.RESULTS / f"accuracy_{name}.json")
    assert here["images"] == there["images"]
    for field in ("top1", "top5", "bytes"):
        assert here["float"][field] == there["float"][field]
