"""The experiment with data: leaves that folding makes neutral are not counted, and data bring what they should."""

from pathlib import Path

import numpy as np
import pytest

import nuqjax
from experiments import networks
from experiments.record.intervals import between
from experiments.studies import calibrated
from experiments.studies.calibrated import Cell, kept_leaves, run, table
from tests.experiments.small_network import instead_of_data


@pytest.fixture
def network(monkeypatch):
    """A small network with random weights, and as many images as make five batches to learn from."""
    return instead_of_data(monkeypatch, 32, 320)


def test_data_win_at_the_same_bytes_and_a_budget_is_kept(network):
    cells = [Cell("plain", "3"), Cell("corrected", "3"), Cell("calibrated", "3"), Cell("budget", "6bpw")]
    results = run(network, Path(), cells)
    plain, corrected, learned, budget = results["cells"]
    assert results["learned"] == 160
    assert plain["bytes"] == corrected["bytes"]
    assert learned["bytes"] <= plain["bytes"]  # scales in 16 bits
    assert learned["kl"] < corrected["kl"] < plain["kl"]
    assert budget["bits_per_weight"] <= 6
    assert budget["predicted_kl"] > 0
    assert table(results).row_count == 5


def test_forms_of_one_size_are_compared_in_pairs_and_a_grid_with_data_is_worse_than_free_levels(network):
    cells = [Cell(method, "3", levels) for levels in ("knq", "uniform") for method in ("plain", "calibrated")]
    results = run(network, Path(), cells)
    plain, learned, plain_grid, learned_grid = (cell["kl"] for cell in results["cells"])
    assert learned < learned_grid < min(plain, plain_grid)
    assert len(results["pairs"]) == 4 + 6  # with the float network, and with one another
    for one, other in (("calibrated uniform", learned_grid), ("plain knq", plain)):
        difference, low, high = between(results["pairs"], "3", one)
        assert difference == pytest.approx(learned - other)
        assert low < difference < high < 0
    assert between(results["pairs"], "4", "plain knq") is None


def test_only_leaves_that_the_function_needs_are_kept(network):
    x, variables = np.zeros((1, 8, 8, 3), np.float32), networks.load_features(network, Path())
    folded, params = nuqjax.fold_batch_norm(network.module.apply, variables, x)
    kept, whole = kept_leaves(folded, params, x)
    assert len(kept) == 4  # two kernels and two offsets, of the ten leaves
    np.testing.assert_allclose(folded(whole(kept), x), network.module.apply(variables, x), atol=1e-2)


def test_mistakes_end_with_their_reason(capsys, tmp_path):
    with pytest.raises(SystemExit):
        calibrated.main(["--network", "resnet20", "--data", str(tmp_path / "missing")])
    assert "missing" in capsys.readouterr().err
