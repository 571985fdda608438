"""Checkpoints of other formats: what is read is what was written, and what is written others read."""

import zipfile

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import nuqjax
from nuqjax.checkpoint import detect_format

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
        with pytest.raises(ValueError, match="one is the beginning of the other"):
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
    with pytest.raises(ValueError, match="a directory that is no orbax checkpoint"):
        nuqjax.open_checkpoint(tmp_path)
    (tmp_path / "text").write_text("hello, world")
    with pytest.raises(ValueError, match="neither safetensors, npz, npy, Flax msgpack, HDF5 nor an orbax directory"):
        nuqjax.open_checkpoint(tmp_path / "text")
    for format, message in (("safetensors", "a header of"), ("npz", "not a zip file"), ("msgpack", "no Flax msgpack")):
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
