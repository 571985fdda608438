"""The figures show the numbers that the results hold."""

import json

import numpy as np
import pytest

from experiments.paper import plots
from experiments.paper.theory import reference_db
from tests.experiments import small_study


def lines(axes):
    """By label, x and y of the lines that the legend names."""
    return {
        line.get_label(): tuple(np.asarray(values, float).tolist() for values in line.get_data())
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def test_accuracy_joins_the_best_cells_of_each_method():
    [axes] = plots.accuracy(small_study.results()).axes
    found = lines(axes)
    assert found["KNQ (k-means)"] == ([0.0009, 0.0011], [0.76, 0.79])
    assert found["uniform, best step"] == ([0.001, 0.0022], [0.71, 0.79])
    assert found["dynamic fixed point"] == ([0.001], [0.5])
    assert found["float32"][1] == [0.8, 0.8]


def test_features_are_shown_by_agreement():
    [axes] = plots.accuracy(small_study.results(top1=False)).axes
    assert axes.get_ylabel() == "same nearest neighbour as float32"
    assert lines(axes)["KNQ (k-means)"] == ([0.0009, 0.0011, 0.0019], [0.96, 0.99, 1.0])


def test_bars_are_as_high_as_the_least_memory():
    panels = plots.memory(small_study.results()).axes
    assert len(panels) == 2
    bars = [container.patches[0].get_height() for container in panels[0].containers]
    # Budgets of 0 and 0.5 points no cell meets; one image of a hundred is a point.
    assert sorted(bars) == [0] * 9 + [0.0011, 0.0014, 0.0022]
    texts = [text.get_text() for text in panels[0].texts]
    assert sorted(texts) == sorted(["none"] * 9 + ["4 b", "5 b", "5 b"])
    assert len(plots.memory(small_study.results(top1=False)).axes) == 1


def test_layers_come_in_the_order_of_their_numbers():
    [axes] = plots.layers(small_study.results()).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Conv_9", "Conv_10"]
    assert lines(axes)["KNQ (k-means)"][1] == [20.0, 24.0]
    assert "4 bits" in axes.get_title()


def test_theory_shows_the_table_and_every_layer():
    panels = plots.theory([small_study.results()]).axes
    for axes, kind in zip(panels, ("lloyd_max", "uniform"), strict=True):
        found = lines(axes)
        for density, label in (("gauss", "best for a Gaussian"), ("laplace", "best for a Laplacian")):
            table = reference_db(density, kind)
            assert found[label] == ([float(bits) for bits in table], list(table.values()))
    assert sorted(lines(panels[0])["Network"][1]) == [15.0, 18.0, 20.0, 24.0]
    assert sorted(lines(panels[1])["Network"][1]) == [20.0, 24.0, 25.0, 30.0]


def test_the_command_draws_all_and_the_same_every_time(tmp_path):
    (tmp_path / "network.json").write_text(json.dumps(small_study.results()))
    for folder in ("a", "b"):
        assert plots.main([str(tmp_path), "--out", str(tmp_path / folder), "--suffix", "png,pdf"]) == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    figures = ("network_accuracy", "network_memory", "network_layers", "theory")
    assert names == {f"{name}.{suffix}" for name in figures for suffix in ("png", "pdf")}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_no_results_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path), "--out", str(tmp_path)])
    assert "there are no results in" in capsys.readouterr().err
