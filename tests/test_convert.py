"""Streaming compression: the same as in memory, whenever it is interrupted, and with little memory."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import nuqjax
from nuqjax import InputGroups, Rule
from nuqjax.codebook_array import is_codebook_array

OPTIONS = {
    "bits": 3,
    "method": "normal",
    "axis": 0,
    "rules": [Rule("b$", granularity="channel", bits=2), Rule("c", scale=InputGroups(8)), Rule("d", skip=True)],
    "entropy_coding": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("source") / "weights.safetensors"
    tensors = {f"net.{i}.{name}": rng.normal(size=(24, 40)).astype("f4") for i in range(2) for name in "abcd"}
    safetensors.numpy.save_file(tensors | {"net.bias": np.ones(5, "f4"), "step": np.array(3, "i4")}, path)
    return path


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The bytes of an uninterrupted run."""
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    nuqjax.compress_checkpoint(source, path, **OPTIONS)
    return path.read_bytes()


def test_the_same_as_in_memory(source, tmp_path):
    report = nuqjax.compress_checkpoint(source, tmp_path / "a", **OPTIONS)
    params = nuqjax.open_checkpoint(source).read()
    options = {name: value for name, value in OPTIONS.items() if name != "entropy_coding"}
    cparams, wanted = nuqjax.compress(params, **options, return_report=True)
    found = nuqjax.load(tmp_path / "a")
    assert jax.tree.structure(found, is_leaf=is_codebook_array) == jax.tree.structure(
        cparams, is_leaf=is_codebook_array
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(cparams), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    nuqjax.save(tmp_path / "b", cparams, report=wanted, entropy_coding=True)
    assert nuqjax.inspect(tmp_path / "a") == nuqjax.inspect(tmp_path / "b") == report
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def partial(source, folder, number):
    """A run that ends behind so many leaves; what it leaves."""

    def stop(*_):
        nonlocal number
        number -= 1
        if number < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nuqjax.compress_checkpoint(source, folder / "a.safetensors", progress=stop, **OPTIONS)
    assert os.listdir(folder) == ["a.safetensors.partial"]
    return folder / "a.safetensors.partial"


@pytest.mark.parametrize("number", range(10))
def test_resumed_behind_any_leaf(source, whole, tmp_path, number):
    partial(source, tmp_path, number)
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_resumed_from_any_half_written_state(source, whole, tmp_path):
    """The journal cut anywhere, the tensors cut or not on disk."""
    kept = partial(source, tmp_path, 6)
    shutil.copytree(kept, tmp_path / "copy")
    length, size = (kept / "journal").stat().st_size, (kept / "tensors").stat().st_size
    rng = np.random.default_rng(0)
    for trial in range(12):
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(tmp_path / "copy", kept)
        os.truncate(kept / "journal", int(rng.integers(length + 1)))
        if trial % 3 == 0:
            os.truncate(kept / "tensors", int(rng.integers(size)))
        elif trial % 3 == 1:
            data = bytearray((kept / "tensors").read_bytes())
            start = int(rng.integers(size))
            data[start:] = bytes(size - start)  # allocated, but never written
            (kept / "tensors").write_bytes(data)
        nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
        assert (tmp_path / "a.safetensors").read_bytes() == whole


_KILLED = """
import os, signal, sys, nuqjax
from nuqjax import InputGroups, Rule
done = 0
def progress(*_):
    global done
    done += 1
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
options = dict(bits=3, method="normal", axis=0, entropy_coding=True, rules=[
    Rule("b$", granularity="channel", bits=2), Rule("c", scale=InputGroups(8)), Rule("d", skip=True)])
nuqjax.compress_checkpoint(sys.argv[1], sys.argv[2], progress=progress, **options)
"""


def test_killed_and_resumed(source, whole, tmp_path):
    command = [sys.executable, "-c", _KILLED, str(source), str(tmp_path / "a.safetensors")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["a.safetensors.partial"]
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole


def test_without_resume_it_begins_anew(source, whole, tmp_path):
    kept = partial(source, tmp_path, 4)
    (kept / "journal").write_bytes(b"nonsense")
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole


def test_other_options_or_another_source_are_not_resumed(source, whole, tmp_path):
    partial(source, tmp_path, 4)
    for change in ({"bits": 4}, {"rules": []}, {"entropy_coding": False}, {"axis": 1}):
        with pytest.raises(ValueError, match="is of another source or other options; without resume it is begun anew"):
            nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS | change)
    other = tmp_path / "other.safetensors"
    shutil.copy(source, other)
    with pytest.raises(ValueError, match="is of another source"):
        nuqjax.compress_checkpoint(other, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole


def test_what_is_refused(source, tmp_path):
    nuqjax.compress_checkpoint(source, tmp_path / "a", **OPTIONS)
    with pytest.raises(ValueError, match="is compressed already"):
        nuqjax.compress_checkpoint(tmp_path / "a", tmp_path / "b")
    with pytest.raises(IsADirectoryError):
        nuqjax.compress_checkpoint(source, tmp_path)
    with pytest.raises(FileNotFoundError):
        nuqjax.compress_checkpoint(source, tmp_path / "no" / "b")
    safetensors.numpy.save_file({"w": np.full((20, 30), np.nan, "f4")}, tmp_path / "nan.safetensors")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"^w: 600 of 600 values are NaN"):
        nuqjax.compress_checkpoint(tmp_path / "nan.safetensors", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_shard_that_changed_is_another_source(source, tmp_path):
    sharded = tmp_path / "s.safetensors"
    nuqjax.write_checkpoint(sharded, nuqjax.open_checkpoint(source), "safetensors", max_shard_size="10KB")
    folder = tmp_path / "out"
    folder.mkdir()
    partial(sharded, folder, 4)
    os.utime(next(tmp_path.glob("s-*.safetensors")), (0, 0))
    with pytest.raises(ValueError, match="is of another source"):
        nuqjax.compress_checkpoint(sharded, folder / "a.safetensors", resume=True, **OPTIONS)


_MEMORY = """
import sys, nuqjax
from experiments.fresh_process import peak_bytes
nuqjax.compress_checkpoint(sys.argv[1], sys.argv[2], method="normal")  # compiles, and holds one leaf
before = peak_bytes()
nuqjax.compress_checkpoint(sys.argv[3], sys.argv[2], method="normal")
print(peak_bytes() - before)
"""


def test_memory_does_not_grow_with_the_number_of_leaves(tmp_path, numbers_printed):
    rng = np.random.default_rng(0)
    one = {"w0": rng.normal(size=(1024, 1024)).astype(np.float16)}
    many = {f"w{i}": one["w0"] for i in range(40)}  # 80 MiB
    safetensors.numpy.save_file(one, tmp_path / "one.safetensors")
    safetensors.numpy.save_file(many, tmp_path / "many.safetensors")
    (peak,) = numbers_printed(_MEMORY, *(tmp_path / f"{name}.safetensors" for name in ("one", "out", "many")))
    assert peak < 40 << 20
