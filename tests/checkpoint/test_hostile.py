"""Damaged and hostile checkpoints of every format: a ValueError that begins with the file's name, or a tree."""

import gc
import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import h5py
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest

import nuqjax
from nuqjax._src.checkpoint.formats import orbax as orbax_format

pytestmark = pytest.mark.filterwarnings("ignore:the file takes")  # of trees as small as these

X = np.arange(6, dtype=np.float32).reshape(2, 3)
TREE = {"a": {"b": X, "c": np.ones(3, ml_dtypes.bfloat16)}, "step": np.array(7), "l": {"0": X > 2, "1": X[:0]}}


def npz(**members):
    """An npz file of these bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(header, body=bytes(24), version=1):
    text = header.encode().ljust(118) if isinstance(header, str) else header
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + body


def array_of(shape, name, raw):
    return msgpack.ExtType(1, msgpack.packb((shape, name, raw)))


def chunked(shape, *chunks):
    return {
        "__msgpack_chunked_array__": True,
        "shape": shape,
        "chunks": {str(i): chunk for i, chunk in enumerate(chunks)},
    }


def deep(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


def packed(value):
    """msgpack of values of any depth."""
    depth = 0
    while isinstance(value, dict) and list(value) == ["a"]:
        value, depth = value["a"], depth + 1
    return b"\x81\xa1a" * depth + msgpack.packb(value)


GOOD = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }")
BAD = {
    "no.npz": b"PK\x03\x04",
    "cut.npz": npz(a=GOOD)[:-30],
    "crc.npz": npz(a=GOOD).replace(bytes(24), b"\1" * 24),
    "token.npz": npz(a=npy("{'descr': '<f4', 'fortran_order")),
    "type.npz": npz(a=npy("{'descr': 3, 'fortran_order': False, 'shape': (2, 3), }")),
    "shape.npz": npz(a=npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, -3), }")),
    "float.npz": npz(a=npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2.0, 3), }")),
    "large.npz": npz(a=npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 0), }", b"")),
    "axes.npz": npz(a=npy("{'descr': '<f4', 'fortran_order': False, 'shape': " + str((1,) * 65) + ", }")),
    "version.npz": npz(a=npy("", version=9)),
    "deep.npz": npz(a=npy("(" * 5000, version=2)),
    "nul.npz": npz(a=npy(b"\0" * 118)),
    "short.npz": npz(a=b"\x93NUM"),
    "cut.npy": GOOD[:-3],
    "cut_header.npy": GOOD[:20],
    "text.npy": npy("import os"),
    "depth.msgpack": packed(deep(1000, lambda x: {"a": x})),
    "more_depth.msgpack": packed(deep(100_000, lambda x: {"a": x})),
    "lists.msgpack": b"\x81\xa1a" + b"\x91" * 900 + b"\1",
    "cut.msgpack": msgpack.packb({"a": array_of((2, 3), "float32", bytes(24))})[:-4],
    "behind.msgpack": msgpack.packb({"a": 1}) + b"\1",
    "bytes.msgpack": msgpack.packb({"a": array_of((2, 3), "float32", bytes(23))}),
    "shape.msgpack": msgpack.packb({"a": array_of((2, -3), "float32", bytes(24))}),
    "object.msgpack": msgpack.packb({"a": array_of((3,), "O", bytes(24))}),
    "fields.msgpack": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb((1, 2)))}),
    "complex.msgpack": msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb(("x", 2)))}),
    "nothing.msgpack": msgpack.packb({"a": msgpack.ExtType(3, b"")}),
    "unicode.msgpack": b"\x81\xa2\xff\xfe\1",
    "key.msgpack": b"\x81\xc0\1",
    "list_key.msgpack": b"\x81\x91\1\1",
    "twice.msgpack": b"\x82\xa1a\1\xa1a\1",
    "mixed.msgpack": b"\x82\xa1a\1\1\1",
    "chunks.msgpack": msgpack.packb({"a": chunked({"0": 6}, array_of((3,), "float32", bytes(12)))}),
    "no_chunks.msgpack": msgpack.packb({"a": chunked({"0": 0})}),
    "chunk.msgpack": msgpack.packb({"a": chunked({"0": 1}, 1)}),
    "of_chunks.msgpack": msgpack.packb({"a": chunked(3)}),
    "hashes.msgpack": msgpack.packb({n * (2**61 - 1): 1 for n in range(-4, 5)} | {"a": 1}),
    "no.h5": b"\x89HDF\r\n\x1a\n" + bytes(500),
    "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_a_value_error_with_its_name(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BAD[name])
    with pytest.raises(ValueError, match="^" + str(path)) as error:
        nuqjax.open_checkpoint(path).read()
    assert len(str(error.value)) < 1000
    assert type(error.value) is ValueError


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_members_of_an_archive_expand_to_no_more_than_they_can(compression, tmp_path):
    header = "{'descr': '|i1', 'fortran_order': False, 'shape': (10000000,), }"
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("a.npy", npy(header, bytes(10**7)))
        archive.writestr("b.npy", GOOD)
    found = {leaf.path: leaf for leaf in nuqjax.open_checkpoint(tmp_path / "a.npz").leaves}
    if compression == zipfile.ZIP_DEFLATED:
        assert found["a"].read().shape == (10**7,)
    else:
        with pytest.raises(ValueError, match=r"'a' holds a member that is encrypted or compressed as NumPy does not"):
            found["a"].read()
    data = (tmp_path / "a.npz").read_bytes()
    place = data.rindex(b"PK\1\2", 0, data.rindex(b"PK\1\2"))
    size = struct.unpack_from("<I", data, place + 24)
    (tmp_path / "b.npz").write_bytes(data[: place + 24] + struct.pack("<I", 2**31) + data[place + 28 :])
    if compression == zipfile.ZIP_DEFLATED:
        with pytest.raises(ValueError, match="says that it expands to 2147483648 bytes, more than is possible"):
            nuqjax.open_checkpoint(tmp_path / "b.npz")
    assert size == (10**7 + 128,)


def test_small_files_of_other_formats_do_not_claim_much(tmp_path):
    """What takes the square of a file's bytes, or more than they can stand for."""
    path = tmp_path / "twice.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", GOOD)
        archive.writestr("b.npy", GOOD)
    path.write_bytes(path.read_bytes().replace(b"b.npy", b"a.npy"))
    with pytest.raises(ValueError, match="'a' appears twice in it"):
        nuqjax.open_checkpoint(path)
    path = tmp_path / "overlap.npz"
    inner, central = np.split(np.frombuffer(npz(b=bytes(1000)), np.uint8), [1035])  # a member in a member
    outer = npz(a=inner.tobytes())
    place = outer.index(b"PK\1\2")
    second = bytearray(central[:-22].tobytes())
    second[42:46] = struct.pack("<I", 35)
    entries = outer[place:-22] + second
    end = b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 2, 2, len(entries), place, 0)
    path.write_bytes(outer[:place] + entries + end)
    with pytest.raises(
        ValueError, match=r"overlap\.npz: its members overlap, so that a few bytes would expand to many"
    ):
        nuqjax.open_checkpoint(path)
    path = tmp_path / "key.msgpack"
    path.write_bytes(msgpack.packb({"k" * 1_000_000: list(range(30_000))}))
    with pytest.raises(ValueError, match="the paths of the leaves are far longer than the"):
        nuqjax.open_checkpoint(path)
    path = tmp_path / "fill.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("bad", (1 << 40,), "f8", chunks=(1 << 20,))
        file["good"] = X
    found = {leaf.path: leaf for leaf in nuqjax.open_checkpoint(path).leaves}
    assert found["good"].read().tobytes() == X.tobytes()
    with pytest.raises(ValueError, match="'bad' holds 1099511627776 values, more than its bytes can stand for"):
        found["bad"].read()


def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("a", "a.npz", "a.msgpack", "a.safetensors"):
        os.mkfifo(tmp_path / name)
        for format in (None, "npz", "msgpack", "safetensors", "npy", "h5"):
            with pytest.raises(OSError, match="not a regular file"):
                nuqjax.open_checkpoint(tmp_path / name, format)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "o", {"a": X})
    os.mkfifo(tmp_path / "o" / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        nuqjax.open_checkpoint(tmp_path / "o")


def test_a_leaf_that_no_file_holds(tmp_path):
    nuqjax.save(tmp_path / "a", {"f": len, "w": X})
    found = {leaf.path: leaf for leaf in nuqjax.open_checkpoint(tmp_path / "a").leaves}
    assert found["w"].read().tobytes() == X.tobytes()
    with pytest.raises(
        ValueError, match=r"'f' holds a builtins.builtin_function_or_method, which is not read; skip='f'"
    ):
        found["f"].read()


# What a file is


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"data")
    return file.getvalue()


FOREIGN = {
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(600), "safetensors"),
    "a pickle, which can run code and is never loaded": (pickle.dumps({"w": [1.0]}), None),
    "a PyTorch file, a pickle in a zip": (zipped("archive/data.pkl", "archive/data/0"), None),
    "a git-LFS pointer to a file that is not here: `git lfs pull` fetches it": (BAD["lfs.safetensors"], None),
    "an ONNX model": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(100), None),
    "a GGUF file": (b"GGUF\3\0\0\0" + bytes(100), None),
    "a Python wheel": (zipped("x/__init__.py", "x-1.dist-info/WHEEL"), None),
    "a Keras model": (zipped("config.json", "model.weights.h5"), None),
    "a zip archive without an array": (zipped("a.txt"), None),
    "a page of HTML": (b"<!DOCTYPE html><html>", None),
    "gzip: unpack it": (b"\x1f\x8b\x08" + bytes(30), None),
    "a tar archive": (bytes(257) + b"ustar" + bytes(300), None),
    "a TFLite model": (b"\x1c\0\0\0TFL3" + bytes(100), None),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize(
    "name", ["weights.bin", "weights.safetensors", "weights.ckpt", "weights.msgpack", "weights.npz"]
)
def test_a_file_of_another_kind_is_named_for_what_it_is(what, name, tmp_path):
    data, format = FOREIGN[what]
    path = tmp_path / name
    path.write_bytes(data)
    asked = [format] if format else [None, "safetensors", "msgpack", "npz"]
    for format in asked:
        with pytest.raises(ValueError, match=f"^{path} is {what}"):
            nuqjax.open_checkpoint(path, format)
    if not data.startswith(b"PK"):
        with pytest.raises(ValueError, match=f"^{path} is {what}"):
            nuqjax.load(path)


def test_a_large_file_of_another_kind_is_not_read_whole(tmp_path):
    """A file of 64 GiB without blocks: to read it takes longer than any test."""
    for start in (b"\x80\x04\x95", b"hello, world", b"\0" * 16):
        for name in ("a.ckpt", "a.msgpack", "a.npz", "a.safetensors"):
            with open(tmp_path / name, "wb") as file:
                file.write(start)
                file.truncate(1 << 36)
            for format in (None, "msgpack", "npz"):
                with pytest.raises(ValueError, match="^" + str(tmp_path / name)):
                    nuqjax.open_checkpoint(tmp_path / name, format)


# One leaf does not block the others


def container(**tensors):
    """A safetensors file of these dtypes, each of eight bytes."""
    header = {
        name: {"dtype": code, "shape": shape, "data_offsets": [8 * i, 8 * i + 8]}
        for i, (name, (code, shape)) in enumerate(tensors.items())
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8 * len(tensors))


def with_unreadable(folder):
    """Checkpoints with one leaf that is not read, and another that is."""
    for code, shape in (("F4", [16]), ("F6_E2M3", [2, 2, 2]), ("F128", [1])):
        if code != "F6_E2M3":
            (folder / f"{code}.safetensors").write_bytes(container(bad=(code, shape), good=("F32", [2])))
            yield folder / f"{code}.safetensors"
    for name, array in {
        "text": np.array(["a"]), "bytes": np.array([b"a"]), "none": np.array([None, "x"], object),
        "dates": np.array(["2020-01-01"], "M8[D]"), "fields": np.zeros(2, "i4,f4"), "long": np.zeros(2, np.longdouble),
        "narrow": np.zeros(2, ml_dtypes.float8_e5m2),
    }.items():  # fmt: skip
        np.savez(folder / f"{name}.npz", bad=array, good=X)
        yield folder / f"{name}.npz"
    for name, value in {
        "bytes": b"1",
        "unknown": msgpack.ExtType(77, b"1"),
        "new": array_of((1,), "float3", b"1"),
    }.items():
        good = array_of((2, 3), "float32", X.tobytes())
        (folder / f"{name}.msgpack").write_bytes(msgpack.packb({"bad": value, "good": good}))
        yield folder / f"{name}.msgpack"
    with h5py.File(folder / "a.h5", "w") as file:
        file["good"] = X
        file["bad"] = h5py.SoftLink("/good")
    yield folder / "a.h5"
    with h5py.File(folder / "b.h5", "w") as file:
        file["good"] = X
        file["bad"] = ["text"]
    yield folder / "b.h5"


def test_a_leaf_that_is_not_read_does_not_block_the_others(tmp_path):
    paths = list(with_unreadable(tmp_path))
    assert len(paths) == 14
    for path in paths:
        found = {leaf.path: leaf for leaf in nuqjax.open_checkpoint(path).leaves}
        assert set(found) == {"good", "bad"}
        assert found["good"].read().dtype == np.float32
        assert found["bad"].problem
        message = f"^{path}: 'bad' holds .*which is not read; skip='bad' leaves it out"
        with pytest.raises(ValueError, match=message):
            found["bad"].read()
        with pytest.raises(ValueError, match=message):
            nuqjax.compress_checkpoint(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        nuqjax.compress_checkpoint(path, tmp_path / "out", skip="^bad$")
        assert list(nuqjax.load(tmp_path / "out")) == ["good"]
        os.remove(tmp_path / "out")


def test_what_is_skipped_is_said_and_must_be_there(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **{"a/b": X, "a/c": X, "d": X})
    checkpoint = nuqjax.open_checkpoint(path, skip="b|d")
    assert checkpoint.skipped == ("a/b", "d")
    assert list(checkpoint.read()) == ["a"]
    with pytest.raises(ValueError, match=r"skip='e/b' matches none of the 3 leaves; the nearest paths are 'a/b'"):
        nuqjax.open_checkpoint(path, skip="e/b")
    with pytest.raises(ValueError, match=r"skip='[(]' is not a regular expression"):
        nuqjax.open_checkpoint(path, skip="(")


def test_dtypes_of_scales_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(container(scale=("F8_E8M0", [8]), fnuz=("F8_E4M3FNUZ", [2, 4]), c=("C64", [1])))
    found = nuqjax.open_checkpoint(path).read()
    assert {name: array.dtype.name for name, array in found.items()} == {
        "scale": "float8_e8m0fnu", "fnuz": "float8_e4m3fnuz", "c": "complex64"
    }  # fmt: skip


# Fuzzing


def outcome(path):
    """The leaves of a checkpoint, or what is wrong with it."""
    try:
        checkpoint = nuqjax.open_checkpoint(path)
        return [(leaf.path, leaf.problem or leaf.read()) for leaf in checkpoint.leaves], None
    except ValueError as error:
        assert str(error).startswith(str(path)), error  # noqa: PT017
        return None, str(error)


def damaged(data, rng, from_=0):
    data = bytearray(data)
    for _ in range(1 + rng.integers(3)):
        place = int(rng.integers(from_, len(data)))
        kind = rng.integers(5)
        if kind < 2:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[place] = (0, 255, 127, 0xC1, 0xDF)[rng.integers(5)]
        elif kind == 3:
            del data[place : place + int(rng.integers(1, 9))]
        else:
            data[place:place] = bytes(rng.integers(256, size=rng.integers(1, 9), dtype=np.uint8))
        if len(data) <= from_:
            break
    return bytes(data)


VALUES = [None, True, 0, -1, 2**63, 2**40, 0.5, "", "a", "float32", b"", b"\0" * 24, [], {}, [[]], {"0": 1}, {1: 1}]


def forged(value, rng):
    """A tree of msgpack with something else in one place, extensions taken apart and put together."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[rng.integers(len(value))]
        return value | {key: forged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = int(rng.integers(len(value)))
        return [*value[:place], forged(value[place], rng), *value[place + 1 :]]
    if isinstance(value, msgpack.ExtType) and rng.random() < 0.8:
        inner = forged(msgpack.unpackb(value.data, raw=True), rng)
        return msgpack.ExtType(value.code if rng.random() < 0.8 else int(rng.integers(128)), msgpack.packb(inner))
    return VALUES[rng.integers(len(VALUES))]


def headers(rng):
    """A header of an npy file that is not quite one."""
    fields = {
        "descr": [
            "<f4",
            ">f4",
            "|O",
            "<U2",
            "|V2",
            "<f1",
            "<i16",
            3,
            [("a", "<f4")],
            ("<f4", (2, 2)),
            None,
            "M8[ns]",
            "",
        ],
        "fortran_order": [False, True, 0, "no", None],
        "shape": [(2, 3), (6,), (), (-6,), (2**62, 0), (2**31, 2**31), (True, 6), (6.0,), [6], None, 6, "6", (0,) * 70],
    }
    chosen = {
        name: values[rng.integers(len(values)) if rng.random() < 0.4 else 0]
        for name, values in fields.items()
        if rng.random() < 0.97
    }
    return npy(
        repr(chosen) if rng.random() < 0.9 else damaged(repr(chosen).encode(), rng), version=int(rng.integers(1, 4))
    )


def test_fuzz_of_npz(tmp_path, fuzz):
    rng, path = np.random.default_rng(0), tmp_path / "a.npz"
    np.savez_compressed(path, a=X, b=np.ones(3, ml_dtypes.bfloat16), c=np.zeros(300))
    deflated, told = path.read_bytes(), 0
    for number in range(fuzz // 200):
        if number % 2:
            path.write_bytes(damaged(deflated, rng))
        else:
            path.write_bytes(npz(a=headers(rng), b=GOOD if rng.random() < 0.5 else damaged(GOOD, rng)))
        told += outcome(path)[1] is not None
    assert told > 0.3 * (fuzz // 200)


def test_fuzz_of_npy(tmp_path, fuzz):
    rng, path = np.random.default_rng(1), tmp_path / "a.npy"
    for _ in range(fuzz // 200):
        path.write_bytes(headers(rng))
        outcome(path)


def test_fuzz_of_msgpack(tmp_path, fuzz):
    rng, path = np.random.default_rng(2), tmp_path / "a.msgpack"
    nuqjax.save(tmp_path / "a", TREE | {"s": {"i": 3, "f": 0.5, "z": 1j, "t": "text"}})
    nuqjax.write_checkpoint(path, nuqjax.open_checkpoint(tmp_path / "a"), "msgpack")
    good, told = path.read_bytes(), 0
    tree = msgpack.unpackb(good) | {"big": chunked({"0": 2, "1": 3}, array_of((6,), "float32", X.tobytes()))}
    path.write_bytes(msgpack.packb(tree))
    assert outcome(path)[1] is None
    for number in range(fuzz // 200):
        path.write_bytes(damaged(good, rng) if number % 2 else msgpack.packb(forged(tree, rng)))
        told += outcome(path)[1] is not None
    assert told > 0.3 * (fuzz // 200)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's own threads
def test_fuzz_of_orbax(tmp_path, fuzz):
    rng, good, path = np.random.default_rng(3), tmp_path / "good", tmp_path / "a"
    nuqjax.save(tmp_path / "saved", {"a": {"b": X, "s": 3, "t": "text"}, "l": [X, {"c": X > 1}], "n": None})
    nuqjax.write_checkpoint(good, nuqjax.open_checkpoint(tmp_path / "saved"), "orbax")
    files = [file for file in orbax_format._files_of(str(good))[0] if os.path.getsize(file)]
    told = 0
    for number in range(max(12, fuzz // 5000)):
        shutil.copytree(good, path)
        chosen = path / os.path.relpath(files[number % len(files)], good)
        data = chosen.read_bytes()
        if rng.random() < 0.1:
            chosen.unlink()
        else:
            chosen.write_bytes(damaged(data, rng) if rng.random() < 0.8 else data[: rng.integers(len(data))])
        told += outcome(path)[1] is not None
        shutil.rmtree(path)
    assert told > 3
    gc.collect()


def test_fuzz_of_h5(tmp_path, fuzz):
    rng, path = np.random.default_rng(4), tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["a/b"] = X
        file.create_dataset("a/c", data=np.zeros(100), compression="gzip")
    good = path.read_bytes()
    for _ in range(fuzz // 2000):
        path.write_bytes(damaged(good, rng, from_=8))
        outcome(path)


def test_orbax_metadata_that_is_deep_or_no_metadata(tmp_path):
    path = tmp_path / "a"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {"a": X})
    text = json.loads((path / "_METADATA").read_text())
    ((_, entry),) = text["tree_metadata"].items()
    keys = ["k"] * 3000
    deep = {str(tuple(keys)): entry | {"key_metadata": [{"key": key, "key_type": 2} for key in keys]}}
    for changed in (text | {"tree_metadata": deep}, {}, [], text | {"tree_metadata": {"x": 1}}):
        (path / "_METADATA").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="^" + str(path)):
            nuqjax.open_checkpoint(path).read()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's own threads
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_damaged_leaf_of_orbax_is_named_and_its_neighbours_are_read(tmp_path):
    """Neighbours are read together, and one by one where that fails."""
    tree = {name: np.arange(64.0) + number for number, name in enumerate("abc")}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "x", tree)
    (tmp_path / "x" / "b" / "0").write_bytes(b"spoilt")
    a, b, c = nuqjax.open_checkpoint(tmp_path / "x").leaves
    np.testing.assert_array_equal(a.read(), tree["a"])
    with pytest.raises(ValueError, match="x: 'b': cannot be read"):
        b.read()
    np.testing.assert_array_equal(c.read(), tree["c"])
    gc.collect()  # so that what orbax left behind is told here


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's own threads
@pytest.mark.parametrize("count", [1, 3])
def test_orbax_leaves_claim_no_more_than_their_files_can_stand_for(tmp_path, count):
    """A chunk that is missing stands for zeros where the metadata say so: 70 GB of them in 300 bytes."""
    path = tmp_path / "x"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, {name: np.arange(64.0) for name in "abcd"})
    text = json.loads((path / "_METADATA").read_text())
    (path / "_METADATA").write_text(json.dumps(text | {"store_array_data_equal_to_fill_value": False}))
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for name in "bcd"[:count]:  # each alone more than there can be, or all together
        (path / name / "0").unlink()
        about = json.loads((path / name / ".zarray").read_text())
        size = 2**33 if count == 1 else (2**15 * nbytes) // 8 // 2
        (path / name / ".zarray").write_text(json.dumps(about | {"shape": [size], "chunks": [1024]}))
    checkpoint = nuqjax.open_checkpoint(path)
    refused = [leaf for leaf in checkpoint.leaves if leaf.problem]
    assert len(refused) == (1 if count == 1 else 2)
    with pytest.raises(ValueError, match=r"x: '[bcd]' holds \d+ bytes, more than its files can stand for.*skip="):
        checkpoint.read()
    np.testing.assert_array_equal(checkpoint.leaves[0].read(), np.arange(64.0))
    wide = tmp_path / "wide"
    nuqjax.save(tmp_path / "saved", {"z": np.zeros((1024, 4096), np.float32)})
    nuqjax.write_checkpoint(wide, nuqjax.open_checkpoint(tmp_path / "saved"), "orbax")
    assert not nuqjax.open_checkpoint(wide).read()["z"].any()  # zeros that are there are read
    gc.collect()
