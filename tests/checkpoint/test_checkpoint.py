"""Checkpoints of other formats: what is read is what was written, and what is written others read."""

import json
import os
import zipfile

import flax.serialization
import h5py
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import nuqjax
from nuqjax._src.checkpoint.checkpoint import detect_format

pytestmark = pytest.mark.filterwarnings("ignore:the file takes")  # of trees as small as these

NAMED = {
    "model.layers.0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model.layers.0.bias": np.ones(3, np.float16),
    "model.embed": (np.arange(10) / 3).astype(ml_dtypes.bfloat16).reshape(5, 2),
    "step": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float64),
    "mask": np.array([True, False]),
}
NESTED = {
    "model": {
        "layers": {"0": {"weight": NAMED["model.layers.0.weight"], "bias": NAMED["model.layers.0.bias"]}},
        "embed": NAMED["model.embed"],
    },
    "step": NAMED["step"],
    "empty": NAMED["empty"],
    "mask": NAMED["mask"],
}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def written(folder, format):
    """`NESTED` by the library of the format itself."""
    path = folder / {"safetensors": "a.safetensors", "npz": "a.npz", "msgpack": "a.msgpack", "orbax": "a"}[format]
    if format == "safetensors":
        safetensors.numpy.save_file(NAMED, path)
    elif format == "npz":
        np.savez(path, **NAMED)
    elif format == "msgpack":
        path.write_bytes(flax.serialization.msgpack_serialize(NESTED))
    else:
        tree = {name: leaf for name, leaf in NESTED.items() if name != "empty"}  # orbax holds no empty arrays
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    return path


FORMATS = ["safetensors", "npz", "msgpack", "orbax"]


@pytest.mark.parametrize("format", FORMATS)
def test_what_others_wrote_is_read(format, tmp_path):
    path = written(tmp_path, format)
    assert detect_format(path) == format
    checkpoint = nuqjax.open_checkpoint(path)
    wanted = {name: leaf for name, leaf in NESTED.items() if format != "orbax" or name != "empty"}
    same(checkpoint.read(), wanted)
    paths = [leaf.path for leaf in checkpoint.leaves]
    assert "model/layers/0/weight" in paths
    for leaf in checkpoint.leaves:
        array = np.asarray(leaf.read())
        assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_others_read(format, tmp_path):
    source = written(tmp_path, "orbax" if format == "orbax" else "npz")
    path = tmp_path / "written"
    nuqjax.write_checkpoint(path, nuqjax.open_checkpoint(source), format)
    if format == "safetensors":
        with safetensors.safe_open(path, "np") as file:
            same({name: file.get_tensor(name) for name in file.keys()}, NAMED)  # noqa: SIM118
    elif format == "npz":
        found = dict(np.load(path))
        found["model.embed"] = found["model.embed"].view(ml_dtypes.bfloat16)  # NumPy forgets its name
        same(found, NAMED)
    elif format == "msgpack":
        same(flax.serialization.msgpack_restore(path.read_bytes()), NESTED)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(path)
        same(found["model"], NESTED["model"])
    same(nuqjax.open_checkpoint(path).read()["model"], NESTED["model"])


@pytest.mark.filterwarnings("ignore:the file takes")
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_compressed_as_its_tree_is(format, tmp_path):
    path = written(tmp_path, format)
    options = {"method": "normal", "bits": 2, "rules": [nuqjax.Rule("weight|embed", skip=False, axis=0)]}
    nuqjax.compress_checkpoint(path, tmp_path / "out", **options)
    wanted = nuqjax.compress(nuqjax.open_checkpoint(path).read(), **options)
    same(nuqjax.load(tmp_path / "out", numpy=True), wanted)
    same(nuqjax.open_checkpoint(tmp_path / "out").read(), nuqjax.decompress(wanted))


def test_shards_with_an_index(tmp_path):
    nuqjax.write_checkpoint(
        tmp_path / "m.safetensors", nuqjax.open_checkpoint(written(tmp_path, "npz")), "safetensors", max_shard_size=50
    )
    assert not (tmp_path / "m.safetensors").exists()
    assert len(list(tmp_path.glob("m-*-of-*.safetensors"))) > 1
    for name in ("m.safetensors", "m.safetensors.index.json"):
        same(nuqjax.open_checkpoint(tmp_path / name).read(), NESTED)


def test_names_are_parted_as_asked(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a/b.c": np.ones(1), "d": np.zeros(1)}, path)
    same(nuqjax.open_checkpoint(path).read(), {"a": {"b.c": np.ones(1)}, "d": np.zeros(1)})
    same(nuqjax.open_checkpoint(path, separator=".").read(), {"a/b": {"c": np.ones(1)}, "d": np.zeros(1)})
    same(nuqjax.open_checkpoint(path, separator="").read(), {"a/b.c": np.ones(1), "d": np.zeros(1)})
    for names in (["a", "a.b"], ["a.b", "a"], ["a.b.c", "a.b"]):
        safetensors.numpy.save_file({name: np.ones(1) for name in names}, path)
        with pytest.raises(ValueError, match="one name is the beginning of the other"):
            nuqjax.open_checkpoint(path)


def test_a_saved_tree_is_a_checkpoint_that_decodes(tmp_path):
    tree = {"w": jnp.arange(512.0).reshape(16, 32), "n": 3, "b": jnp.ones(2)}
    cparams = nuqjax.compress(tree, bits=3, method="normal")
    nuqjax.save(tmp_path / "a", cparams)
    checkpoint = nuqjax.open_checkpoint(tmp_path / "a")
    assert checkpoint.format == "nuqjax"
    same(checkpoint.read(), nuqjax.decompress(cparams))
    nuqjax.write_checkpoint(tmp_path / "b", checkpoint, "safetensors")
    assert nuqjax.open_checkpoint(tmp_path / "b").read()["n"] == 3


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        nuqjax.open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="a directory that is not an orbax checkpoint"):
        nuqjax.open_checkpoint(tmp_path)
    (tmp_path / "text").write_text("hello, world")
    with pytest.raises(ValueError, match="neither safetensors, npz, npy, Flax msgpack, HDF5 nor an orbax directory"):
        nuqjax.open_checkpoint(tmp_path / "text")
    for format, message in (
        ("safetensors", "a header of"),
        ("npz", "not a zip file"),
        ("msgpack", "not a Flax msgpack"),
    ):
        with pytest.raises(ValueError, match=message):
            nuqjax.open_checkpoint(tmp_path / "text", format)
    with zipfile.ZipFile(tmp_path / "long.npz", "w") as archive:
        head = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
        text = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
        archive.writestr("a.npy", head + text.ljust(117).encode() + b"\n" + bytes(64))
    with pytest.raises(ValueError, match="'a' is not as long as its shape"):
        nuqjax.open_checkpoint(tmp_path / "long.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match="'a' holds text or Python objects of dtype object, which is not read"):
        nuqjax.open_checkpoint(tmp_path / "objects.npz").read()


# What people have


def test_a_folder_of_a_model(tmp_path):
    """As the Hugging Face Hub lays one out: shards with an index, or one file."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a directory that is not an orbax checkpoint and has no safetensors"):
        nuqjax.open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not read here: save the weights as safetensors"):
        nuqjax.open_checkpoint(folder)
    safetensors.numpy.save_file(NAMED, folder / "model.safetensors")
    same(nuqjax.open_checkpoint(folder).read(), NESTED)
    safetensors.numpy.save_file({"x": np.ones(1)}, folder / "adapter.safetensors")
    same(nuqjax.open_checkpoint(folder).read(), NESTED)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(
        ValueError, match=r"several files of weights \(adapter.safetensors, weights.safetensors\): name"
    ):
        nuqjax.open_checkpoint(folder)
    (folder / "adapter.safetensors").unlink()
    source = nuqjax.open_checkpoint(folder)
    nuqjax.write_checkpoint(folder / "model.safetensors", source, "safetensors", max_shard_size=50)
    assert (folder / "model.safetensors.index.json").exists()
    nuqjax.compress_checkpoint(folder, tmp_path / "out")
    same(nuqjax.open_checkpoint(folder).read(), NESTED)


def test_an_index_laid_over_shards_that_hold_more(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2), "b": np.zeros(2)}, tmp_path / "base.safetensors")
    safetensors.numpy.save_file({"b": np.full(2, 7.0)}, tmp_path / "tuned.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "base.safetensors", "b": "tuned.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same(
        nuqjax.open_checkpoint(tmp_path / "model.safetensors.index.json").read(),
        {"a": np.ones(2), "b": np.full(2, 7.0)},
    )


def managed(folder, prefix, **items):
    """Checkpoints of three steps, as orbax's manager writes them."""
    options = ocp.CheckpointManagerOptions(step_prefix=prefix)
    with ocp.CheckpointManager(folder, options=options) as manager:
        for step in (1, 12, 3):
            arguments = {name: ocp.args.StandardSave({"w": np.full(3, float(step))}) for name in items}
            one = next(iter(arguments.values()))
            manager.save(step, args=one if list(items) == ["default"] else ocp.args.Composite(**arguments), force=True)


def test_the_newest_step_of_a_manager(tmp_path):
    managed(tmp_path / "plain", None, default=1)
    (tmp_path / "plain" / "99").mkdir()  # no checkpoint
    newest = nuqjax.open_checkpoint(tmp_path / "plain")
    assert newest.path == str(tmp_path / "plain" / "12" / "default")
    same(newest.read(), {"w": np.full(3, 12.0)})
    for name in ("3", "3/default"):
        same(nuqjax.open_checkpoint(tmp_path / "plain" / name).read(), {"w": np.full(3, 3.0)})
    managed(tmp_path / "named", "step", params=1, opt=1)
    with pytest.raises(
        ValueError, match=r"step_12: a step of several items \(opt, params\): name one, such as .*step_12"
    ):
        nuqjax.open_checkpoint(tmp_path / "named")
    same(nuqjax.open_checkpoint(tmp_path / "named" / "step_12" / "params").read(), {"w": np.full(3, 12.0)})


def test_hdf5_and_npy(tmp_path):
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = np.ones((2, 3), "f4")
        file["layers/dense/vars/1"] = np.zeros(3, ">f8")
        file.create_group("layers/relu")
        file["layers"].attrs["names"] = ["dense"]
    tree = {"layers": {"dense": {"vars": {"0": np.ones((2, 3), "f4"), "1": np.zeros(3)}}, "relu": {}}}
    same(nuqjax.open_checkpoint(tmp_path / "a.weights.h5").read(), tree)
    array = np.random.default_rng(0).normal(size=(24, 40)).astype("f4")
    np.save(tmp_path / "a.npy", array)
    same(nuqjax.open_checkpoint(tmp_path / "a.npy").read(), array)
    nuqjax.compress_checkpoint(tmp_path / "a.npy", tmp_path / "out", method="normal")
    assert nuqjax.load(tmp_path / "out").shape == (24, 40)
    nuqjax.write_checkpoint(tmp_path / "b.npz", nuqjax.open_checkpoint(tmp_path / "a.npy"), "npz")
    same(nuqjax.open_checkpoint(tmp_path / "b.npz").read(), array)


def test_a_group_of_two_names_is_not_followed_for_ever(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/b"] = np.ones(3)
        file["a/again"] = file["a"]
    with pytest.raises(ValueError, match="the group '/a/again' has two names"):
        nuqjax.open_checkpoint(tmp_path / "a.h5")


def test_many_leaves_of_orbax(tmp_path):
    """Read together, each the one that it is, in whatever order they are asked for."""
    tree = {"large": np.zeros((1 << 21) + 1), "small": [np.full(3, i, np.int32) for i in range(40)], "n": 5}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", tree)
    leaves = nuqjax.open_checkpoint(tmp_path / "a").leaves
    for leaf in [*leaves, *leaves[::-1], leaves[3], leaves[3]]:
        value = leaf.read()
        if leaf.path == "n":
            assert value == 5
        elif leaf.path != "large":
            assert value.tolist() == [int(leaf.path.removeprefix("small/"))] * 3


def test_a_file_that_has_become_shorter_since_it_was_opened_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": np.arange(64.0)}, path)
    [leaf] = nuqjax.open_checkpoint(path).leaves
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(ValueError, match=r"a\.safetensors: the file has become shorter since it was opened"):
        leaf.read()
