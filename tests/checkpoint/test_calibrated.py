"""Compression of a checkpoint with data: wherever it is interrupted, a resumed run does the rest, to the same bytes."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

import nuqjax
from nuqjax._src.calibration import flow
from nuqjax._src.checkpoint.calibrated import compress_with_data
from nuqjax._src.checkpoint.results import Results
from nuqjax._src.compress.rules import Options
from nuqjax._src.store.target import claim
from tests.failing_disk import Killed, failing_disk

OPTIONS = Options(
    bits=2, method="knq", granularity="tensor", axis=-1, scale=None, codebook_format=None, keep_zero=False,
    tolerance=1e-6, min_size=64,
)  # fmt: skip


def network(params, x):
    return np.float32(2) * (x @ params["a"] + params["bias"][None]) @ params["b"]


def other_network(params, x):
    return np.float32(3) * (x @ params["a"] + params["bias"][None]) @ params["b"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("source") / "weights.npz"
    shapes = {"a": (16, 24), "b": (24, 8), "bias": (24,)}
    np.savez(path, **{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    return path


BATCHES = [np.random.default_rng(n).normal(size=(20, 16)).astype(np.float32) for n in range(4)]


def run(source, folder, **changes):
    given = {"fn": network, "batches": BATCHES, "budget": "8bpw"} | changes
    options = given.pop("options", OPTIONS)
    return compress_with_data(nuqjax.open_checkpoint(source), folder / "a.safetensors", options, (), **given)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The bytes of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    report = run(source, folder)
    assert report.nbytes_file == (folder / "a.safetensors").stat().st_size
    return (folder / "a.safetensors").read_bytes()


@pytest.fixture
def solved(monkeypatch):
    """The leaves that are solved, and after how many of them the run ends."""
    done, real, real_all = [], flow.solved, flow.sensitivities

    def counted(leaf, plan, *given, **stages):
        if len(done) == counted.last:
            raise KeyboardInterrupt
        done.append(plan.path)
        return real(leaf, plan, *given, **stages)

    def counted_all(*given):
        done.append("sensitivities")
        return real_all(*given)

    counted.last, counted.done = None, done
    monkeypatch.setattr(flow, "solved", counted)
    monkeypatch.setattr(flow, "sensitivities", counted_all)
    return counted


ORDER = ["sensitivities", "a", "b", "a", "b"]  # the leaves by their float inputs, then in the order of use


@pytest.mark.parametrize("number", range(1, 5))
def test_resumed_behind_any_leaf(source, whole, tmp_path, solved, number):
    solved.last = number
    with pytest.raises(KeyboardInterrupt) as caught:
        run(source, tmp_path)
    [note] = caught.value.__notes__
    assert note.endswith("a.safetensors.partial has what is done; --resume (resume=True) goes on from there")
    assert os.listdir(tmp_path) == ["a.safetensors.partial"]
    solved.last = None
    run(source, tmp_path, resume=True)
    assert solved.done == ORDER  # nothing twice
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    assert os.listdir(tmp_path) == ["a.safetensors"]


CHANGED = {
    "nothing": ({}, 2),
    "the function": ({"fn": other_network}, 0),
    "an input": ({"batches": [*BATCHES[:3], BATCHES[3] + np.float32(1e-6)]}, 0),
    "an option": ({"options": dataclasses.replace(OPTIONS, keep_zero=True)}, 0),
    "the budget": ({"budget": "8.1bpw"}, 0),
}


@pytest.mark.parametrize("what", CHANGED)
def test_nothing_is_taken_over_of_another_call(source, tmp_path, solved, what):
    solved.last = 2
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path)
    solved.last = None
    changes, kept = CHANGED[what]
    run(source, tmp_path, resume=True, **changes)
    assert len(solved.done) == 2 + len(ORDER) - kept


def test_without_resume_it_begins_anew_and_so_does_a_run_without_data(source, whole, tmp_path, solved):
    solved.last = 3
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path)
    solved.last = None
    shutil.copytree(tmp_path, tmp_path / "copy")
    run(source, tmp_path)
    assert len(solved.done) == 3 + len(ORDER)
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    nuqjax.compress_checkpoint(source, tmp_path / "copy" / "a.safetensors", method="normal")
    assert os.listdir(tmp_path / "copy") == ["a.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_results_that_are_not_as_they_were_written_are_made_again(source, whole, tmp_path, solved, damage):
    solved.last = 4
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path)
    solved.last = None
    for path in (tmp_path / "a.safetensors.partial").glob("*.result"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    run(source, tmp_path, resume=True)
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    assert len(solved.done) == 4 + len(ORDER)


def test_a_run_that_fails_at_once_leaves_nothing(source, tmp_path):
    with pytest.raises(ValueError, match="uses no leaf"):
        run(source, tmp_path, fn=lambda params, x: x)
    assert os.listdir(tmp_path) == []


def test_a_rate_is_that_of_the_file(source, tmp_path):
    pytest.importorskip("constriction")
    run(source, tmp_path, budget=None, rate="34bpw", entropy_coding=True)
    weights = 16 * 24 + 24 * 8 + 24
    assert 8 * (tmp_path / "a.safetensors").stat().st_size <= 34 * weights


def test_killed_at_any_change_of_the_disk(tmp_path, monkeypatch):
    """The file is the old or the new; a resumed run gives the same results, and leaves nothing else."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    trees = {"one": {"a": np.arange(6.0, dtype=np.float32), "n": 3, "none": None, "text": "x"}, "two": {"t": {2: 0.1}}}
    path, made, last = tmp_path / "out", [], 0

    def keep(resume):
        with claim(path) as place:
            kept = Results(place, resume)
            found = {key: kept.once(key, lambda key=key: made.append(key) or trees[key]) for key in trees}
            kept.remove()
        return found

    while True:
        last += 1
        with failing_disk(last):
            try:
                keep(False)
                break
            except Killed:
                pass
        found = keep(True)
        assert repr(found["two"]) == repr(trees["two"])
        assert (found["one"]["a"] == trees["one"]["a"]).all()
        assert [found["one"][name] for name in ("n", "none", "text")] == [3, None, "x"]
        assert os.listdir(tmp_path) == []
    assert last > 10
    assert made.count("two") > last // 2
    assert len(made) < 3 * last  # some were kept
