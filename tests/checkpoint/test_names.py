"""Between any two formats nothing is renamed, merged or made another type: it comes back, or is refused by name."""

import itertools
import json
import math
import re

import h5py
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
import safetensors.numpy

import nuqjax
from nuqjax._src.checkpoint.formats.orbax import needs_names

pytestmark = pytest.mark.filterwarnings("ignore:the file takes")  # of trees as small as these

X, Y = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([3, -1], np.int32)
DTYPES = [
    *map(np.dtype, ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16")),
    *map(np.dtype, (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu)),
    *map(np.dtype, (ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e4m3b11fnuz, ml_dtypes.float4_e2m1fn)),
    *map(np.dtype, (ml_dtypes.int4, ml_dtypes.uint2)),
]
NARROW = {d.name for d in DTYPES if d.itemsize == 1 and d.name not in ("bool", "uint8", "int8")}
LACKING = {
    "safetensors": {"complex128"} | NARROW - {"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz"},
    "npz": NARROW,
    "msgpack": set(),
    "orbax": {"uint2"},
}
ALL = ("safetensors", "npz", "msgpack", "orbax")
# name: (tree, formats that do not hold it, what the message names)
TREES = {
    "plain": ({"a": {"b": X, "c": Y}, "d": X}, (), ""),
    "one array": (X, (), ""),
    "an array alone in a dict": ({"leaf": X}, (), ""),
    "names as haiku has them": ({"mlp/~/linear": {"w": X, "b": Y}}, (), ""),
    "names as keras has them": ({"dense": {"dense": {"kernel:0": X}}}, (), ""),
    "separators in keys": ({"mlp/~": {"w": X}, "a.b": {"c.d": Y}, "e": X}, (), ""),
    "one name": ({"a.b": X, "a": {"b": Y}}, ("safetensors", "npz", "orbax"), "a.b"),
    "one name with slashes": ({"a/b": X, "a": {"b": Y}}, (), ""),
    "a name that begins another": ({"a": X, "a.b": Y}, (), ""),
    "empty names": ({"": X, "a": {"": Y, "b": {"": X}}}, (), ""),
    "dots alone": ({".": X, "..": Y}, (), ""),
    "numbers as keys": ({3: {-1: X}, 12: Y}, ("msgpack", "orbax"), "the key (3|12) is not a string"),
    "numbers and digits": ({"a": {7: X}, "b": {"7": Y}}, ("msgpack", "orbax"), "the key 7 is not a string"),
    "truth as keys": ({True: X, False: Y}, ("msgpack", "orbax"), "the key (True|False) is not a string"),
    "tuples as keys": ({("k", 1): X}, ("msgpack", "orbax"), r"the key \('k', 1\) is not a string"),
    "lists and tuples": ({"l": [X, (Y, [X])]}, (), ""),
    "nothing between": ({"n": None, "e": {}, "x": X}, (), ""),
    "control characters": ({"\x1b[31mred\n": X, "‮": Y, "[/b]": X}, (), ""),
    "a name with a NUL": ({"a\0b": X}, ("npz",), "leaf 'a\\\\x00b'"),
    "a name of safetensors": ({"__metadata__": X}, ("safetensors",), "leaf '__metadata__'"),
    "a name of Flax": ({"a": {"__msgpack_chunked_array__": X}}, ("msgpack",), "leaf 'a/__msgpack_chunked_array__'"),
    "a very long name": ({"k" * 70_000: X}, ("npz", "orbax"), "leaf 'kkk"),
    "many keys": (dict.fromkeys(range(300), X), ("msgpack", "orbax"), "is not a string"),
    "an integer": ({"opt": {"step": 7}, "w": X}, (), ""),
    "integers at their ends": ({"a": 2**63 - 1, "b": -(2**63), "c": -5}, (), ""),
    "a large integer": ({"a": 2**63}, ("safetensors", "npz", "orbax"), "leaf 'a' is an integer of 64 bits"),
    "a larger integer": ({"a": -(2**64)}, ALL, "leaf 'a' is an integer of 65 bits"),
    "a float": ({"rate": 0.1, "nan": math.nan, "inf": -math.inf, "zero": -0.0}, (), ""),
    "truth": ({"on": True, "off": False}, (), ""),
    "a complex number": ({"z": 1 - 2j}, ("safetensors", "orbax"), "leaf 'z'"),
    "text": ({"name": "é\0"}, ("safetensors", "npz"), "leaf 'name' is of type str"),
    "a number alone": (3, ("msgpack",), "leaf '' is the whole tree"),
    "random keys": ({"key": jax.random.key(0)}, ALL, "leaf 'key'"),
    "no axes": ({"a": np.array(3, np.int64), "b": np.array(True)}, (), ""),
    "no values": ({"a": np.zeros((0, 3), np.float32)}, ("orbax",), "leaf 'a' has no values"),
}  # fmt: skip


def told(checkpoint, as_text):
    """Each leaf: its keys, and what it is to the bit. Flax's msgpack has lists as dicts of digits."""
    found = []
    for keys, leaf in zip(checkpoint.keys, checkpoint.leaves, strict=True):
        value = leaf.read()
        what = (
            (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else (type(value), repr(value))
        )
        found.append((tuple((type(key), key) for key in (map(str, keys) if as_text else keys)), what))
    return sorted(found, key=repr)


def written(source, path, format):
    """The checkpoint written in a format and opened again, or None and what the refusal says."""
    try:
        nuqjax.write_checkpoint(path, source, format)
    except ValueError as error:
        return None, str(error)
    return nuqjax.open_checkpoint(path), None


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_from_every_format_or_is_refused_by_name(name, tmp_path):
    tree, lacking, message = TREES[name]
    if needs_names() and name in ("one array", "empty names", "a number alone"):
        lacking, message = (
            (*lacking, "orbax"),
            "leaf '' (is the whole tree|has no name, and orbax-checkpoint .* does not)",
        )
    nuqjax.save(tmp_path / "a", tree)
    source = nuqjax.open_checkpoint(tmp_path / "a")
    for format in ALL:
        found, refusal = written(source, tmp_path / format, format)
        assert (found is None) == (format in lacking), (format, refusal)
        if found is None:
            assert re.search(message, refusal), refusal
            assert not (tmp_path / format).exists()
        else:
            assert told(found, format == "msgpack") == told(source, format == "msgpack"), format


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(("nuqjax", *ALL), 2)))
def test_every_pair_of_formats_keeps_names_keys_and_numbers(first, second, tmp_path):
    """There and back, of all that both hold, in one tree."""
    formats = {first, second} - {"nuqjax"}
    trees = [tree for tree, lacking, _ in TREES.values() if isinstance(tree, dict) and not formats & set(lacking)]
    nuqjax.save(tmp_path / "a", {f"tree {i}": tree for i, tree in enumerate(trees)})
    here = nuqjax.open_checkpoint(tmp_path / "a")
    wanted = told(here, "msgpack" in formats)
    assert len(wanted) > 20
    for i, format in enumerate((first, second, first)[first == "nuqjax" :]):
        if format == "nuqjax":
            nuqjax.compress_checkpoint(here.path, tmp_path / f"{i}", rules=[nuqjax.Rule("", skip=True)])
            here = nuqjax.open_checkpoint(tmp_path / f"{i}")
        else:
            here, refusal = written(here, tmp_path / f"{i}", format)
            assert refusal is None, refusal
        assert told(here, "msgpack" in formats) == wanted, format


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_dtype_comes_back_from_every_format_or_is_refused_by_name(dtype, tmp_path):
    nuqjax.save(tmp_path / "a", {"a": np.array([[1, 0, 1]]).astype(dtype)})
    source = nuqjax.open_checkpoint(tmp_path / "a")
    for format in ALL:
        found, refusal = written(source, tmp_path / format, format)
        if found is None:
            assert "leaf 'a' has dtype" in refusal
            assert dtype.name in LACKING[format]
        else:
            assert told(found, False) == told(source, False), format


@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_the_separator_and_the_metadata_are_remembered(format, tmp_path):
    tensors = {"a/b.c": X, "a/d": Y, "e": X}
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors", {"format": "pt", "by": "someone"})
    nuqjax.compress_checkpoint(tmp_path / "in.safetensors", tmp_path / "small", min_size=4, separator=".")
    found = nuqjax.open_checkpoint(tmp_path / "small")
    assert (found.separator, found.metadata) == (".", {"format": "pt", "by": "someone"})
    nuqjax.write_checkpoint(tmp_path / "out", found, format)
    again = nuqjax.open_checkpoint(tmp_path / "out")
    assert {leaf.path for leaf in again.leaves} == {"a/b/c", "a/d", "e"}  # keys with a slash, parted at dots
    assert again.keys == [("a/b", "c"), ("a/d",), ("e",)]
    assert again.metadata == {"format": "pt", "by": "someone"}
    if format == "safetensors":
        with safetensors.safe_open(tmp_path / "out", "np") as file:
            assert set(file.keys()) == set(tensors)
            assert file.metadata()["format"] == "pt"
    else:
        assert set(np.load(tmp_path / "out")) == set(tensors)


def test_metadata_of_shards_are_kept(tmp_path):
    for number in (1, 2):
        safetensors.numpy.save_file({f"w{number}": X}, tmp_path / f"m-{number}.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 48}, "weight_map": {f"w{n}": f"m-{n}.safetensors" for n in (1, 2)}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    assert nuqjax.open_checkpoint(tmp_path / "m.safetensors").metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ("[]", "the notes on its names are not in the form"),
        ("{", "the notes is not JSON"),
        ('{"separator":1}', "the notes on its names are not in the form"),
        ('{"separator":".","types":{"0":"os"}}', "the notes on its names are not in the form"),
        ('{"separator":".","nodes":["leaf"],"names":["b"]}', "not those of its tensors; separator='.'"),
        ('{"separator":".","nodes":["leaf"],"names":["a","a"]}', "the names in its notes are not those"),
        ('{"separator":".","nodes":[["list",2],"leaf","leaf"],"names":["a"]}', "1 names of 2 leaves"),
        ('{"separator":".","nodes":[["list",9]],"names":["a"]}', "node 0 of the tree has 9 children"),
        ('{"separator":".","nodes":["leaf"],"names":["a"],"types":{"0":"int"}}', "but its dtype is not int64"),
    ],
)  # fmt: skip
def test_notes_that_lie(notes, message, tmp_path):
    safetensors.numpy.save_file({"a": X}, tmp_path / "a.safetensors", {"nuqjax.notes": notes})
    with pytest.raises(ValueError, match=message) as error:
        nuqjax.open_checkpoint(tmp_path / "a.safetensors")
    assert str(error.value).startswith(str(tmp_path / "a.safetensors"))
    assert nuqjax.open_checkpoint(tmp_path / "a.safetensors", separator=".").keys == [("a",)]


# In whatever order bytes and axes are


def arrangements(native):
    """The same values in other orders of bytes and axes."""
    yield native
    yield np.asfortranarray(native)
    yield np.repeat(native, 2, axis=1)[:, ::2]
    yield native[::-1].copy()[::-1]
    yield np.broadcast_to(native[:1], native.shape)
    readonly = native.copy()
    readonly.flags.writeable = False
    yield readonly
    yield native[:0]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.isbuiltin == 1], ids=lambda dtype: dtype.name)
def test_readers_give_arrays_in_this_machines_order(dtype, tmp_path):
    native = np.arange(12).reshape(3, 4).astype(dtype)
    for number, array in enumerate(arrangements(native)):
        for order in "<>":
            given, wanted = array.astype(array.dtype.newbyteorder(order), copy=False), np.ascontiguousarray(array)
            given = given if array.flags.c_contiguous else np.lib.stride_tricks.as_strided(
                given, given.shape, given.strides
            )  # fmt: skip
            paths = [tmp_path / f"{number}.{end}" for end in ("npz", "npy", "h5", "st")]
            np.savez(paths[0], a=given)
            np.save(paths[1], given)
            with h5py.File(paths[2], "w") as file:
                file["a"] = given
            nuqjax.save(paths[3], {"a": given})
            for path in paths:
                (leaf,) = nuqjax.open_checkpoint(path).leaves
                found = leaf.read()
                assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype), path
                assert found.dtype == wanted.dtype
                assert found.dtype.isnative
                assert found.flags.c_contiguous
                assert found.tobytes() == wanted.tobytes()
            assert nuqjax.load(paths[3], numpy=True)["a"].tobytes() == wanted.tobytes()


@pytest.mark.parametrize("order", "<>")
def test_a_file_in_another_byte_order_is_compressed_as_a_native_one(order, tmp_path):
    native = np.random.default_rng(0).normal(size=(24, 40)).astype(np.float32)
    np.savez(tmp_path / "native.npz", w=native)
    np.savez(tmp_path / "other.npz", w=np.asfortranarray(native).astype(f"{order}f4"))
    for name in ("native", "other"):
        nuqjax.compress_checkpoint(tmp_path / f"{name}.npz", tmp_path / name, method="normal")
    assert (tmp_path / "native").read_bytes() == (tmp_path / "other").read_bytes()


def test_an_orbax_that_stores_no_leaf_without_a_name_is_told(tmp_path, monkeypatch):
    nuqjax.save(tmp_path / "a", X)
    source = nuqjax.open_checkpoint(tmp_path / "a")
    monkeypatch.setattr(orbax.checkpoint, "__version__", "0.11.24")
    with pytest.raises(ValueError, match=r"leaf '' has no name, and orbax-checkpoint 0\.11\.24 .*orbax-checkpoint>=0"):
        nuqjax.write_checkpoint(tmp_path / "b", source, "orbax")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("version", "needed"),
    [("0.11.40", True), ("0.12.0", True), ("0.12.1", False), ("0.13.0rc1", False), ("1.0", False)],
)
def test_orbax_stores_leaves_without_a_name_from_0_12_1_on(version, needed, monkeypatch):
    monkeypatch.setattr(orbax.checkpoint, "__version__", version)
    assert needs_names() == (version if needed else None)
