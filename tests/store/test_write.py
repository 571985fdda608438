"""Writing: nothing that is somebody else's is lost, one writer at a time, and no kill leaves anything broken."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import nuqjax
from nuqjax._src.store.target import claim, replacing
from tests.failing_disk import Killed, failing_disk

OLD = {"old": np.arange(300, dtype="f4"), "more": np.ones(300, "f4")}
MATRIX = np.linspace(-1, 1, 4096, dtype="f4").reshape(64, 64)
NEW = {"a": np.arange(200, dtype="f4"), "b": np.ones((20, 30), "f2"), "n": 3}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def dense(path):
    safetensors.numpy.save_file(
        {"w": np.linspace(-1, 1, 4096, dtype="f4").reshape(64, 64), "b": np.ones(9, "f4")}, path
    )
    return path


def hugging_face(folder):
    """Shards of somebody else's, and their index."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, shard in enumerate(names):
        safetensors.numpy.save_file({f"w{i}": MATRIX + i}, folder / shard)
    index = folder / "model.safetensors.index.json"
    weight_map = {f"w{i}": shard for i, shard in enumerate(names)}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def writers(limit=None):
    """All that write a file: functions of its path."""
    saved = nuqjax.compress({"w": MATRIX, "b": np.ones(9, "f4")}, method="normal")

    def write(format):
        def run(path, folder):
            nuqjax.save(folder / "saved", saved)
            nuqjax.write_checkpoint(path, nuqjax.open_checkpoint(folder / "saved"), format, max_shard_size=limit)

        return run

    return {
        "save": lambda path, folder: nuqjax.save(path, saved, max_shard_size=limit),
        "compress": lambda path, folder: nuqjax.compress_checkpoint(
            dense(folder / "dense.safetensors"), path, method="normal", max_shard_size=limit
        ),
        **{format: write(format) for format in ("safetensors", "npz", "msgpack")},
    }


WRITERS = ["save", "compress", "safetensors", "npz", "msgpack"]


# What is somebody else's


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["device", "pipe", "socket", "folder", "index name"])
def test_only_files_are_replaced(tmp_path, monkeypatch, writer, kind):
    """The device is one of the test's own: of a library that fails here, a real one would be lost."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("x.index.json" if kind == "index name" else "x")
    if kind == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
        except PermissionError:  # pipes and sockets are refused by the same check
            pytest.skip("only root makes devices")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("x")
    elif kind == "folder":
        path.mkdir()
    before = path.stat() if path.exists() else None
    message = {"folder": "is a directory", "index name": "is the name of an index"}.get(kind, "is not a regular file")
    with pytest.raises((OSError, ValueError), match=message):
        writers()[writer](path, tmp_path)
    assert before is None or os.path.samestat(before, path.stat())
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_keeps_its_permissions(tmp_path, writer, mode):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(mode)
    writers()[writer](path, tmp_path)
    assert path.read_bytes() != b"old"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_shards_have_the_permissions_of_what_they_replace(tmp_path):
    path = tmp_path / "x.safetensors"
    nuqjax.save(path, OLD)
    path.chmod(0o600)
    nuqjax.save(path, NEW, max_shard_size=900)
    nuqjax.save(path, OLD, max_shard_size=900)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}
    nuqjax.save(path, NEW)
    assert [stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()] == [0o600]


def test_a_strangers_index_is_neither_removed_nor_replaced(tmp_path):
    hugging_face(tmp_path)
    before = contents(tmp_path)
    for name, write in writers().items():
        write(tmp_path / "model.safetensors", tmp_path)
        assert contents(tmp_path).items() >= before.items(), name
        os.unlink(tmp_path / "model.safetensors")
    for name in ("save", "compress", "safetensors"):
        with pytest.raises(FileExistsError, match=r"index.json was not written by nuqjax: move it away"):
            writers(limit=600)[name](tmp_path / "model.safetensors", tmp_path)
        assert contents(tmp_path).items() >= before.items(), name
        assert not (tmp_path / "model.safetensors.partial").exists()


def test_a_strangers_file_is_not_removed_for_shards(tmp_path):
    path = dense(tmp_path / "x.safetensors")
    before = contents(tmp_path)
    for name in ("save", "compress", "safetensors"):
        with pytest.raises(FileExistsError, match=r"was not written by nuqjax.save, and shards under its name"):
            writers(limit=600)[name](path, tmp_path)
        assert contents(tmp_path).items() >= before.items(), name


def test_a_strangers_shards_are_not_removed(tmp_path):
    """Named as this library's are, and by an index of it."""
    path = tmp_path / "x.safetensors"
    nuqjax.save(path, OLD, max_shard_size=900)
    index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
    foreign = [
        "y-00000000-00001-of-00001.safetensors",
        "x-00001-of-00001.safetensors",
        "x-0123abcd-00001-of-00001.safetensors",
    ]
    for name in foreign:
        (tmp_path / name).write_bytes(b"somebody else's")
    outside = tmp_path.parent / "x-0123abcd-00001-of-00001.safetensors"
    outside.write_bytes(b"")
    index["weight_map"] |= {"1": foreign[0], "2": foreign[1], "3": f"../{outside.name}", "4": 5}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    nuqjax.save(path, NEW)
    assert sorted(os.listdir(tmp_path)) == sorted([*foreign, "x.safetensors"])
    assert outside.exists()


@pytest.mark.parametrize("link", ["same", "hard", "soft"])
@pytest.mark.parametrize("format", ["safetensors", "npz", "msgpack"])
def test_what_is_read_is_not_replaced(tmp_path, format, link):
    """Whatever it is called; of compressed and of dense sources."""
    for name, source in (("dense", dense(tmp_path / "d")), ("saved", tmp_path / "saved")):
        nuqjax.save(tmp_path / "saved", NEW if name == "dense" else {"w": np.ones(5, "f4")})
        target = source if link == "same" else tmp_path / f"link-{name}"
        if link != "same":
            (os.link if link == "hard" else os.symlink)(source, target)
        before = source.read_bytes()
        checkpoint = nuqjax.open_checkpoint(source)
        with pytest.raises(ValueError, match="is read from: name another target"):
            nuqjax.write_checkpoint(target, checkpoint, format)
        if name == "dense":
            with pytest.raises(ValueError, match="is read from: name another target"):
                nuqjax.compress_checkpoint(source, target, method="normal")
        assert source.read_bytes() == before


def test_shards_that_are_read_are_neither_replaced_nor_removed(tmp_path):
    """This library's own, which it would remove when another file takes their place."""
    path = tmp_path / "x.safetensors"
    nuqjax.write_checkpoint(path, nuqjax.open_checkpoint(dense(tmp_path / "d")), "safetensors", max_shard_size=9000)
    before = contents(tmp_path)
    for limit in (None, 900):
        with pytest.raises(ValueError, match="is read from"):
            nuqjax.compress_checkpoint(path, path, method="normal", max_shard_size=limit)
        with pytest.raises(ValueError, match="is read from"):
            nuqjax.write_checkpoint(path, nuqjax.open_checkpoint(path), "safetensors", max_shard_size=limit)
    assert contents(tmp_path) == before
    nuqjax.write_checkpoint(path, nuqjax.open_checkpoint(tmp_path / "d"), "safetensors", max_shard_size=100)
    assert contents(tmp_path).keys() - before.keys()  # the same contents, and never written over what an index names
    assert nuqjax.open_checkpoint(path).read()["w"].shape == (64, 64)


@pytest.mark.parametrize("what", [{"notes.txt": b""}, {"journal": b"Monday"}, {"tensors": b""}, {"lock": b"x"}, None,
                                  {"lock": b"nuqjax: process 1 on x\n", "notes.txt": b""}])  # fmt: skip
def test_a_folder_of_somebody_elses_stays(tmp_path, what):
    """Where this library's own would be."""
    folder = tmp_path / "x.partial"
    if what is None:
        folder.write_bytes(b"a file")
    else:
        folder.mkdir()
        for name, data in what.items():
            (folder / name).write_bytes(data)
    for name, write in writers().items():
        with pytest.raises(FileExistsError, match=r"x.partial was not left by nuqjax: move it away"):
            write(tmp_path / "x", tmp_path)
        assert not (tmp_path / "x").exists(), name
    assert what is None or contents(folder) == what


def test_a_save_leaves_the_journal_of_an_interrupted_run(tmp_path):
    source, path = dense(tmp_path / "source"), tmp_path / "x"

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nuqjax.compress_checkpoint(source, path, method="normal", progress=stop)
    before = contents(tmp_path / "x.partial")
    nuqjax.save(path, NEW)
    assert contents(tmp_path / "x.partial") | {"lock": b""} == before | {"lock": b""}
    nuqjax.compress_checkpoint(source, path, method="normal", resume=True)
    assert sorted(os.listdir(tmp_path)) == ["source", "x"]


@pytest.mark.parametrize("format", ["orbax", "npz"])
def test_an_orbax_folder_is_not_replaced(tmp_path, format):
    nuqjax.write_checkpoint(tmp_path / "x", nuqjax.open_checkpoint(dense(tmp_path / "source")), "orbax")
    with pytest.raises((ValueError, OSError), match=r"already exists|is a directory"):
        nuqjax.write_checkpoint(tmp_path / "x", nuqjax.open_checkpoint(tmp_path / "x"), format)
    assert nuqjax.open_checkpoint(tmp_path / "x").read()["b"].shape == (9,)


# One writer


_HOLDS = """
import sys
from nuqjax._src.store import target
with target.claim(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    command = [sys.executable, "-c", _HOLDS, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        for name, write in writers().items():
            with pytest.raises(BlockingIOError, match=f"x: process {process.pid} on .* is writing it; wait until"):
                write(tmp_path / "x", tmp_path)
            assert not (tmp_path / "x").exists(), name
        process.kill()
        process.wait()
    assert os.path.exists(tmp_path / "x.partial")
    nuqjax.save(tmp_path / "x", NEW)
    assert not os.path.exists(tmp_path / "x.partial")


def test_the_same_process_is_one_writer_too(tmp_path):
    with (
        claim(tmp_path / "x"),
        pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"),
        claim(tmp_path / "x"),
    ):
        pass
    with replacing(tmp_path / "x") as file, replacing(tmp_path / "y") as other:  # others are not held up
        file.write(b"1")
        other.write(b"2")
    assert contents(tmp_path) == {"x": b"1", "y": b"2"}


# Kills


@pytest.mark.parametrize("before", [None, 900])
@pytest.mark.parametrize("limit", [None, 900])
def test_a_save_killed_at_any_change_leaves_the_old_or_the_new(tmp_path, monkeypatch, before, limit):
    """And the next one removes what it left."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path, stopped = tmp_path / "x.safetensors", tmp_path / "stopped"
    last, found = 0, []
    while True:
        last += 1
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        nuqjax.save(path, OLD, max_shard_size=before)
        with failing_disk(last) as disk:
            try:
                nuqjax.save(path, NEW, max_shard_size=limit)
                break
            except Killed:
                pass
        assert disk.changes >= last
        left = nuqjax.load(path)
        assert same(left, OLD) or same(left, NEW)
        found.append(same(left, NEW))
        for next_limit in (None, 900):
            shutil.copytree(tmp_path, stopped, dirs_exist_ok=True, ignore=lambda *_: ["stopped"])
            nuqjax.save(stopped / path.name, NEW, max_shard_size=next_limit)
            assert same(nuqjax.load(stopped / path.name), NEW)
            assert len(os.listdir(stopped)) == (1 if next_limit is None else 3), os.listdir(stopped)
            shutil.rmtree(stopped)
    assert found == sorted(found)  # first the old, then the new
    assert set(found) == {False, True}
    assert last > 15
