"""Peers beside compression with data: what they are given, how they are counted, and what does not run is told."""

from pathlib import Path

import numpy as np
import pytest

import nuqjax
from experiments.documents import tables
from experiments.record.intervals import between
from experiments.studies import peers_with_data
from experiments.studies.peers_with_data import (
    PEERS,
    Peer,
    Task,
    as_codebooks,
    channels,
    checked,
    group_size,
    run,
    stored_bytes,
    table,
    with_kernels,
)
from tests.experiments.small_network import instead_of_data


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outputs", [1, 7, 10, 16, 60, 128, 1000])
def test_groups_divide_the_channels_and_their_tables_take_no_more_than_scales(outputs, bits):
    size = group_size(outputs, bits)
    assert outputs % size == 0
    assert size >= min(2**bits, outputs)
    assert PEERS["coreai-opt, table per grouped channel"].side(outputs, bits) <= max(outputs, 2**bits)


def test_kernels_are_taken_out_and_put_back_as_they_are():
    leaf = np.random.default_rng(0).normal(size=(3, 3, 4, 8)).astype(np.float32)
    kernel = channels(leaf)
    np.testing.assert_array_equal(kernel[5], leaf[..., 5].ravel())
    back = with_kernels({"w": leaf, "b": leaf[0, 0, 0]}, {"w": kernel})
    np.testing.assert_array_equal(back["w"], leaf)
    np.testing.assert_array_equal(back["b"], leaf[0, 0, 0])


def test_what_a_peer_found_is_corrected_as_it_is():
    rng = np.random.default_rng(0)
    found = rng.normal(size=(8, 4)).astype(np.float32)[rng.integers(0, 8, size=(27, 4)), np.arange(4)]
    tree = as_codebooks({"a/w": found, "a/w2": found + 1, "b": found[0]}, ["a/w"], 3)
    assert isinstance(tree["a/w"], nuqjax.CodebookArray)
    np.testing.assert_array_equal(tree["a/w"], found)
    np.testing.assert_array_equal(tree["a/w2"], found + 1)
    with pytest.raises(ValueError, match="a/w cannot be told by 2 bits"):
        as_codebooks({"a/w": found, "b": found[0]}, ["a/w"], 2)


def test_a_kernel_that_a_peer_skips_is_not_counted_as_compressed():
    kernels = {"w": np.arange(12, dtype=np.float32).reshape(2, 6)}
    low = {"w": kernels["w"] // 2}  # three values a channel
    assert checked(kernels, low, 2) is low
    with pytest.raises(ValueError, match="w is left with 6 values in a channel"):
        checked(kernels, kernels, 2)
    for broken in ({}, {"w": low["w"][:1]}, {"w": low["w"] * np.nan}):
        with pytest.raises(ValueError, match="w is missing or not finite"):
            checked(kernels, broken, 2)


def test_indices_are_padded_by_kernel_and_levels_and_scales_have_16_bits():
    kernels = {"a": np.zeros((8, 5), np.float32), "b": np.zeros((4, 3), np.float32)}
    assert stored_bytes(kernels, 3, PEERS["coreai-opt, scale per channel"].side) == 15 + 5 + 2 * (8 + 8 + 8 + 4)


def _nuqjax(task: Task, bits: int) -> dict[str, np.ndarray]:
    """A peer that is this library: one table a tensor."""
    found = nuqjax.decompress(nuqjax.compress(task.kernels, bits, min_size=1))
    return {name: np.asarray(each) for name, each in found.items()}


def _fails(task: Task, bits: int) -> dict[str, np.ndarray]:
    raise ImportError("No module named 'tool'")


@pytest.fixture
def network(monkeypatch):
    """A small network with random weights, and as many images as make two batches to learn from."""
    return instead_of_data(monkeypatch, 32, 128)


def test_peers_run_beside_knq_and_one_that_does_not_is_told(network):
    given = []

    def watched(task: Task, bits: int) -> dict[str, np.ndarray]:
        given.append(task)
        return _nuqjax(task, bits)

    peers = {"same": Peer(watched, PEERS["coremltools, table per tensor"].side), "absent": Peer(_fails, lambda *_: 0)}
    results = run(network, Path(), [3], peers=peers)
    cells = {f"{cell['method']} {cell['levels']}": cell for cell in results["cells"]}
    ours = ["plain knq", "corrected knq", "fisher knq"], ["calibrated uniform", "calibrated knq"]
    forms = [*ours[0], "peer same", "peer corrected same", *ours[1]]
    assert list(cells) == forms
    assert results["missing"] == [{"levels": "absent", "size": "3", "why": "No module named 'tool'"}]
    assert set(results["versions"]) >= {"qwix", "coreai-opt", "coremltools"}
    assert cells["peer same"]["bytes"] < cells["plain knq"]["bytes"]  # it has no scales
    assert cells["calibrated knq"]["kl"] < cells["peer corrected same"]["kl"] < cells["peer same"]["kl"]
    assert len(results["pairs"]) == 6
    less = between(results["pairs"], "3", "peer same")
    assert less is not None
    assert less[0] == pytest.approx(cells["calibrated knq"]["kl"] - cells["peer same"]["kl"])
    (task,) = given
    for name, kernel in task.kernels.items():
        assert task.moments[name].shape == (1, kernel.shape[1], kernel.shape[1])
        assert task.importances[name].shape == kernel.shape
    assert table(results).row_count == 7
    markdown = tables.peers([{**results, "commands": ["python -m peers"]}])
    assert markdown.endswith("Did not run:\n\n- absent, 3 bits: No module named 'tool'\n")
    assert "| same | theirs, then `correct_bias` |" in markdown


def test_mistakes_end_with_their_reason(capsys, tmp_path):
    with pytest.raises(SystemExit):
        peers_with_data.main(["--network", "resnet20", "--data", str(tmp_path / "missing")])
    assert "missing" in capsys.readouterr().err
