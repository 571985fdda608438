"""Streaming compression: the same as in memory, whenever it is interrupted, and with little memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy

import nuqjax
from nuqjax import InputGroups, Rule
from nuqjax._src.checkpoint import convert
from nuqjax._src.leaf.codebook_array import is_codebook_array
from tests.failing_disk import Killed, failing_disk

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
    (kept / "tensors").write_bytes(b"nonsense")
    with pytest.raises(KeyboardInterrupt):
        nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", progress=interrupt, **OPTIONS)
    assert len((kept / "journal").read_bytes().splitlines()) == 2
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole


def interrupt(*_):
    raise KeyboardInterrupt


def leaves_done(monkeypatch):
    """The paths of the leaves that are compressed, as they are."""
    done, compressed = [], convert._compressed
    monkeypatch.setattr(convert, "_compressed", lambda leaf, plan: done.append(plan.path) or compressed(leaf, plan))
    return done


def test_only_leaves_whose_options_changed_are_done_again(source, whole, tmp_path, monkeypatch):
    partial(source, tmp_path, 6)
    done = leaves_done(monkeypatch)
    changed = OPTIONS | {"rules": [Rule("0/a", bits=5), *OPTIONS["rules"]]}
    with pytest.raises(KeyboardInterrupt):
        nuqjax.compress_checkpoint(
            source, tmp_path / "a.safetensors", resume=True,
            progress=lambda plan, _: plan.path == "net/1/d" and interrupt(), **changed,
        )  # fmt: skip
    assert done == ["net/0/a", "net/1/d"]
    del done[:]
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)  # the first are still there
    assert done == ["net/bias", "step"]
    assert (tmp_path / "a.safetensors").read_bytes() == whole


def test_another_source_is_not_resumed(source, whole, tmp_path):
    partial(source, tmp_path, 4)
    other = tmp_path / "other.safetensors"
    shutil.copy(source, other)
    with pytest.raises(ValueError, match="belongs to another source; without resume, the run starts over"):
        nuqjax.compress_checkpoint(other, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    with pytest.raises(ValueError, match="belongs to another source"):
        nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, separator="", **OPTIONS)
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole


@pytest.mark.parametrize("line", [b"{}", b"[]", b"null", b"", b"x" * 99, b"00000000 {}", b"\xff\xfe",
                                  *(b"%08x %s" % (zlib.crc32(text), text) for text in (b"[]", b"{}"))])  # fmt: skip
def test_a_line_that_is_none_is_passed_over(source, whole, tmp_path, monkeypatch, line):
    kept = partial(source, tmp_path, 6)
    head, *lines = (kept / "journal").read_bytes().splitlines()
    lines[3] = line
    (kept / "journal").write_bytes(b"\n".join([head, *lines, b""]))
    done = leaves_done(monkeypatch)
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    assert done == ["net/0/d", "net/1/d", "net/bias", "step"]
    assert (tmp_path / "a.safetensors").read_bytes() == whole


@pytest.mark.parametrize("head", [b'{"mark":"0123"}\n', b'{"nuqjax":"journal 1","mark":"0"}\n'])
def test_a_journal_of_another_version_is_not_resumed(source, whole, tmp_path, head):
    kept = partial(source, tmp_path, 1)
    (kept / "journal").write_bytes(head)
    with pytest.raises(ValueError, match="belongs to another version of nuqjax; without resume, the run starts over"):
        nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("damage", ["zeros", "a bit", "cut", "gone"])
def test_tensors_that_are_not_as_they_were_written_are_done_again(source, whole, tmp_path, monkeypatch, number, damage):
    """Those of a leaf that the journal still names."""
    kept = partial(source, tmp_path, 6)
    lines = [json.loads(line[9:]) for line in (kept / "journal").read_bytes().splitlines()[1:]]
    tensor = list(lines[number]["tensors"].values())[-1]
    data = bytearray((kept / "tensors").read_bytes())
    if damage == "cut":
        del data[tensor["begin"] + tensor["nbytes"] - 1 :]
    elif damage == "zeros":
        data[tensor["begin"] : tensor["begin"] + tensor["nbytes"]] = bytes(tensor["nbytes"])
    else:
        data[tensor["begin"]] ^= 1
    (kept / "tensors").write_bytes(data)
    if damage == "gone":
        (kept / "tensors").unlink()
    done = leaves_done(monkeypatch)
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    again = {"cut": 7 - number, "gone": 7}.get(damage, 1)
    assert len(done) == again + 3


@pytest.mark.parametrize(("old", "limit"), [(None, 700), (700, None)])
def test_killed_at_any_change_of_the_disk(tmp_path, monkeypatch, limit, old):
    """The file is the old or the new; the next run gives the same bytes, resumed or not, and leaves nothing else."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    rng = np.random.default_rng(0)
    source, path, folder = tmp_path / "source", tmp_path / "out" / "a.safetensors", tmp_path / "out"
    tensors = {name: rng.normal(size=(24, 40)).astype("f4") for name in "a"} | {"n": np.array(3, "i4")}
    safetensors.numpy.save_file(tensors, source)
    options = {"method": "normal", "max_shard_size": limit, "entropy_coding": True}
    before = {"old": np.ones(200, "f4"), "more": np.ones(200, "f4")}

    def contents():
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    folder.mkdir()
    nuqjax.compress_checkpoint(source, path, **options)
    wanted, last, news = contents(), 0, []
    while True:
        last += 1
        shutil.rmtree(folder)
        folder.mkdir()
        nuqjax.save(path, before, max_shard_size=old)
        with failing_disk(last):
            try:
                nuqjax.compress_checkpoint(source, path, **options)
                break
            except Killed:
                pass
        keys = nuqjax.load(path).keys()
        assert keys in (before.keys(), tensors.keys())
        news.append(keys == tensors.keys())
        shutil.copytree(folder, tmp_path / "left", dirs_exist_ok=False)
        for resume in (True, False):
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "left", folder)
            nuqjax.compress_checkpoint(source, path, resume=resume, **options)
            assert contents() == wanted
        shutil.rmtree(tmp_path / "left")
    assert news == sorted(news)
    assert set(news) == {False, True}
    assert contents() == wanted


def test_a_kill_while_it_is_resumed(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    partial(source, tmp_path, 3)
    for last in (1, 4, 7, 12, 20, 40):
        with failing_disk(last), pytest.raises(Killed):
            nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    nuqjax.compress_checkpoint(source, tmp_path / "a.safetensors", resume=True, **OPTIONS)
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("how", ["replaced", "written over", "gone", "replaced by one of the same time"])
@pytest.mark.parametrize("number", [1, 5, 10])
def test_a_source_that_changes_meanwhile_is_told(source, tmp_path, how, number):
    """No file is made of old leaves and new ones, not by resuming either."""
    mine, other, path = tmp_path / "mine", tmp_path / "other", tmp_path / "a.safetensors"
    shutil.copy(source, mine)
    tensors = safetensors.numpy.load_file(source)
    safetensors.numpy.save_file({name: np.array(-tensor) for name, tensor in tensors.items()}, other)
    status, count = mine.stat(), 0

    def change(*_):
        nonlocal count
        count += 1
        if count == number:
            os.link(mine, tmp_path / "first")
            if how.startswith("replaced"):
                os.replace(other, mine)
            elif how == "gone":
                os.unlink(mine)
            else:
                mine.write_bytes(other.read_bytes())
            if how.endswith("time"):
                os.utime(mine, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises((ValueError, FileNotFoundError), match=r"has changed or gone since it was opened|No such file"):
        nuqjax.compress_checkpoint(mine, path, progress=change, **OPTIONS)
    assert not path.exists()
    if how != "gone":
        with pytest.raises(ValueError, match="belongs to another source"):
            nuqjax.compress_checkpoint(mine, path, resume=True, **OPTIONS)
    if how != "written over":
        os.replace(tmp_path / "first", mine)
        nuqjax.compress_checkpoint(mine, path, resume=True, **OPTIONS)
        nuqjax.compress_checkpoint(source, tmp_path / "b", **OPTIONS)
        assert path.read_bytes() == (tmp_path / "b").read_bytes()


def test_what_headers_tell_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_compressed", None)
    good, path = {"a": np.ones((40, 50), "f4")}, tmp_path / "a.npz"
    for bad, options, message in (
        ({"z": np.array(["text"])}, {}, r"'z' holds text or Python objects of dtype <U4, which is not read; skip='z'"),
        ({"z": np.zeros(3, "M8[s]")}, {}, r"'z' holds values of dtype datetime64\[s\], which is not read; skip='z'"),
        ({}, {"rules": [Rule("nothing", bits=2)]}, "rule 'nothing' matches none"),
        ({"z": np.ones((3, 4), "i4")}, {"rules": [Rule("z", skip=False)]}, "dtype int32 is not floating"),
        ({"z": np.ones((30, 40), "f4")}, {"rules": [Rule("z", axis=2)]}, "output axis 2"),
        ({"z": np.ones((30, 40), "f4")}, {"rules": [Rule("z", codebook_format="int8")]}, "codebook_format=int8"),
        ({"z": np.ones((30, 40), "f4")}, {"max_shard_size": "5 apples"}, "max_shard_size="),
    ):
        np.savez(path, **good, **bad)
        with pytest.raises(ValueError, match=message):
            nuqjax.compress_checkpoint(path, tmp_path / "out", **options)
        assert os.listdir(tmp_path) == ["a.npz"]
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match="entropy coding needs constriction"):
        nuqjax.compress_checkpoint(path, tmp_path / "out", entropy_coding=True)
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_leaf_that_fails_takes_no_other_with_it(tmp_path, monkeypatch):
    tensors = {name: np.linspace(-1, 1, 960, dtype="f4").reshape(24, 40) for name in "abcz"}
    tensors["z"][0, 0] = np.nan
    source, path = tmp_path / "source.safetensors", tmp_path / "out"
    safetensors.numpy.save_file(tensors, source)
    with pytest.raises(ValueError, match=r"^z: 1 of 960 values are NaN") as told:
        nuqjax.compress_checkpoint(source, path, method="normal")
    assert told.value.__notes__ == [f"{path}.partial has what is done; --resume (resume=True) goes on from there"]
    done, skip = leaves_done(monkeypatch), {"method": "normal", "rules": [Rule("z", skip=True)]}
    nuqjax.compress_checkpoint(source, path, resume=True, **skip)
    assert done == ["z"]
    nuqjax.compress_checkpoint(source, tmp_path / "anew", **skip)
    assert path.read_bytes() == (tmp_path / "anew").read_bytes()


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
    with pytest.raises(ValueError, match="belongs to another source"):
        nuqjax.compress_checkpoint(sharded, folder / "a.safetensors", resume=True, **OPTIONS)


_MEMORY = """
import sys, nuqjax
from tests.peak import peak_bytes
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
