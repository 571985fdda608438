"""Files: every bit comes back; other tools read them; an interrupted save leaves the old file."""

import os
import re
import subprocess
import sys
from collections import OrderedDict, namedtuple
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors import deserialize, safe_open

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, CodebookArray, InputGroups, QFormat, Rule
from nuqjax._src.leaf import packing, rows
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.store import entropy as store_entropy
from nuqjax._src.store import file as store_file
from nuqjax._src.store.dtypes import ITEMSIZE
from tests import draws

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"
DTYPES = [
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "bfloat16", "float32",
    "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e3m4", "float8_e4m3", "float8_e8m0fnu", "float4_e2m1fn", "int4", "uint4", "int2",
    "uint2",
]  # fmt: skip
FLOATS = ["float16", "bfloat16", "float32"]
METHODS = ["knq", "enq", "uniform", "uniform_pow2", "dfp", "normal", "quantile", "pow2"]


def same(a, b):
    """Whether two trees have the same structure, types and bits."""
    flat_a, structure_a = jax.tree.flatten(a, is_leaf=is_codebook_array)
    flat_b, structure_b = jax.tree.flatten(b, is_leaf=is_codebook_array)
    assert structure_a == structure_b
    for x, y in zip(flat_a, flat_b, strict=True):
        if is_codebook_array(x):
            assert is_codebook_array(y)
            assert jax.tree.structure(x) == jax.tree.structure(y)  # the static layout
            same(jax.tree.leaves(x), jax.tree.leaves(y))
        elif isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert x.dtype == y.dtype
            same(jax.random.key_data(x), jax.random.key_data(y))
        elif hasattr(x, "dtype"):
            x, y = np.asarray(x), np.asarray(y)
            assert (x.dtype.newbyteorder("="), x.shape) == (y.dtype, y.shape)
            assert x.astype(x.dtype.newbyteorder("=")).tobytes() == y.tobytes()
        else:
            assert type(x) is type(y)
            assert repr(x) == repr(y)


@st.composite
def codebook_arrays(draw):
    """Any leaf at all, of arbitrary bits, whether or not compress would make it."""
    shape = tuple(draw(st.lists(st.integers(0, 6), min_size=0, max_size=4)))
    stack = draw(st.integers(0, len(shape)))
    inner = shape[stack:]
    axes = tuple(sorted(draw(st.sets(st.integers(0, len(inner) - 1))))) if inner else ()
    bits = draw(st.integers(1, 8))
    kinds = st.sampled_from(["tensor", "channel"]) | st.builds(ChannelGroups, st.integers(1, 9))
    granularity = draw(kinds | st.builds(InputGroups, st.integers(1, 9)))
    outputs, inputs = rows.channel_shape(inner, axes)
    count, _ = rows.row_shape(outputs, inputs, granularity)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels_shape = (*shape[:stack], count, 1 << bits)
    fixed = draw(st.none() | st.builds(QFormat, st.integers(1, 24), st.integers(-20, 30), st.booleans()))
    if fixed:
        levels = rng.integers(fixed.least, fixed.largest + 1, levels_shape).astype(fixed.storage_dtype)
    else:
        dtype = draw(st.sampled_from([*FLOATS, "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"]))
        levels = np.sort(rng.normal(size=levels_shape), axis=-1).astype(dtype)
    indices = rng.binomial((1 << bits) - 1, 0.3, (*shape[:stack], outputs, inputs)).astype(np.uint8)
    group = draw(st.integers(0, 7))
    dtype = draw(st.sampled_from(FLOATS))
    scale = rng.normal(size=(*shape[:stack], outputs, -(-inputs // group))).astype(dtype) if group else None
    return CodebookArray(
        levels, packing.pack(indices, bits), scale, inner, jnp.dtype(dtype), bits, granularity, axes, fixed, group
    )


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if dtype.name in ("bool", "int4", "uint4", "int2", "uint2", "float4_e2m1fn"):
        return rng.integers(0, 2, shape).astype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    array = np.frombuffer(rng.bytes(size), dtype).reshape(shape)  # every bit pattern, NaNs too
    return array.astype(array.dtype.newbyteorder(">")) if dtype.kind in "iuf" and draw(st.booleans()) else array


KEYS = st.text(st.characters(codec="utf-8"), max_size=4)
SCALARS = st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text(st.characters(codec="utf-8"))
TREES = st.recursive(
    codebook_arrays() | arrays() | SCALARS | st.none() | st.integers(0, 9).map(jax.random.key),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
        | st.dictionaries(st.tuples(KEYS, st.integers()), inner, max_size=2)
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(tree=TREES, coding=st.booleans(), limit=st.none() | st.integers(1, 500))
def test_every_bit_comes_back(tmp_path_factory, tree, coding, limit):
    path = tmp_path_factory.mktemp("store") / "tree.safetensors"
    nuqjax.save(path, tree, entropy_coding=coding, max_shard_size=limit)
    same(tree, nuqjax.load(path, numpy=True))
    same(tree, nuqjax.load(path))
    same(tree, nuqjax.load(path, like=tree, verify=False))


@pytest.fixture(scope="module")
def compressed():
    """What compress makes: methods, granularities and formats, each a leaf, and the report."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    params = {
        **{method: draw(32, 48) for method in METHODS},
        "layers": {"stack": draw(3, 16, 24), "heads": draw(16, 4, 8), "bias": draw(16)},
        "own": draw(5, 5, 3, 24), "channels": draw(64, 30), "inputs": draw(64, 30), "auto": draw(64, 32),
        "fixed": draw(64, 32), "float8": draw(64, 32), "step": np.int32(7),
    }  # fmt: skip
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.int32 if a.dtype == np.int32 else jnp.float32), params)
    params["half"] = jnp.asarray(draw(32, 32), jnp.bfloat16)
    rules = [
        *(Rule(f"^{name}$", method=name, bits=bits) for bits, name in enumerate(METHODS, 1)),
        Rule("stack", stack_axes=1, scale="channel", bits=3), Rule("heads", axis=(-2, -1), scale=InputGroups(5)),
        Rule("own", granularity="channel", bits=2), Rule("channels", granularity=ChannelGroups(7), bits=5),
        Rule("inputs", granularity=InputGroups(16), bits=3), Rule("auto", codebook_format=AutoQFormat(6)),
        Rule("fixed", codebook_format=QFormat(12, 9), bits=7), Rule("float8", codebook_format="float8_e4m3fn"),
        Rule("half", codebook_format="bfloat16", scale="channel"),
    ]  # fmt: skip
    return nuqjax.compress(params, method="normal", rules=rules, return_report=True)


def test_what_compress_makes_comes_back_with_its_report(compressed, tmp_path):
    cparams, report = compressed
    assert len(report.compressed) == 17
    for coding in (False, True):
        nuqjax.save(tmp_path / "a", cparams, report=report, entropy_coding=coding)
        same(cparams, nuqjax.load(tmp_path / "a"))
        kept = nuqjax.inspect(tmp_path / "a")
        assert coding or kept == report
        assert str(kept).count("\n") == str(report).count("\n") - 1  # no line of files to come


def test_inspect_without_a_report_agrees_with_the_report(compressed, tmp_path):
    cparams, report = compressed
    nuqjax.save(tmp_path / "a", cparams)
    found = nuqjax.inspect(tmp_path / "a")
    for here, there in zip(found.leaves, report.leaves, strict=True):
        for name in ("path", "shape", "dtype", "weights", "nbytes_before", "nbytes_after", "bits", "granularity",
                     "codebook_format", "levels_used", "levels_available",
                     "payload_bits", "nbytes_packed"):  # fmt: skip
            assert getattr(here, name) == getattr(there, name), name
        assert here.entropy == (None if there.entropy is None else pytest.approx(there.entropy, rel=1e-12))
        assert (here.reason is None) == (there.reason is None)
    assert found.total["sqnr_db"] is None
    assert "SQNR" in str(found)


def script(number):
    return re.findall(r"```python\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)[number]


def test_the_script_of_the_format_decodes_a_file_without_nuqjax(compressed, tmp_path):
    cparams, _ = compressed
    nuqjax.save(tmp_path / "a.safetensors", cparams)
    program = script(0) + "\nassert 'nuqjax' not in sys.modules and 'jax' not in sys.modules\n"
    program += "raw = {path.replace('/', '.'): np.frombuffer(a.tobytes(), 'u1') for path, a in arrays.items()}\n"
    program += "np.savez(sys.argv[2], **raw)"
    command = [sys.executable, "-c", program, str(tmp_path / "a.safetensors"), str(tmp_path / "out.npz")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    decoded = np.load(tmp_path / "out.npz")
    for path, leaf in jax.tree_util.tree_leaves_with_path(nuqjax.decompress(cparams)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert decoded[name].tobytes() == np.asarray(leaf).tobytes(), name


def test_the_scripts_of_the_format_decode_a_stream():
    weights, indices_of = {}, {}
    exec(script(1), weights)
    exec(script(2), indices_of)
    rng = np.random.default_rng(0)
    for bits, share in ((1, 0.02), (4, 0.3), (8, 0.9)):
        indices = rng.binomial((1 << bits) - 1, share, (3, 1001)).astype(np.uint8)
        stream, model = store_entropy.encode(packing.pack(indices, bits), bits, 1001)
        found = weights["weights"](model, bits)
        assert found == store_entropy.weights_of(model, bits).tolist()
        assert indices_of["indices"](stream, found, indices.size) == indices.reshape(-1).tolist()


def test_safetensors_opens_the_file_and_aligns_its_tensors(compressed, tmp_path):
    cparams, _ = compressed
    path = tmp_path / "a.safetensors"
    few = {"knq": cparams["knq"], "layers": {name: cparams["layers"][name] for name in ("stack", "bias")}}
    nuqjax.save(path, few)
    with safe_open(path, "np") as file:
        assert set(file.metadata()) == {"nuqjax", "nuqjax.crc32"}
        np.testing.assert_array_equal(file.get_tensor("knq.packed"), cparams["knq"].packed)
        np.testing.assert_array_equal(file.get_tensor("knq.levels"), cparams["knq"].levels)
        np.testing.assert_array_equal(file.get_tensor("layers/stack.scale"), cparams["layers"]["stack"].scale)
        np.testing.assert_array_equal(file.get_tensor("layers/bias"), cparams["layers"]["bias"])
    for tree in (few, cparams):  # the latter's small tensors are not told apart by other readers
        nuqjax.save(path, tree)
        opened = store_file.open_mapped(str(path))
        assert {name for name, _ in deserialize(path.read_bytes())} == set(opened.entries)
        assert all(e.begin % ITEMSIZE[e.code] == 0 for e in opened.entries.values())
        assert (path.stat().st_size - opened.data.size) % 8 == 0


def test_names_that_would_collide_are_told_apart(tmp_path):
    leaf = nuqjax.compress({"x": jnp.arange(512.0).reshape(16, 32)}, method="normal")["x"]
    tree = {
        "a": leaf,
        "a.packed": jnp.ones(2),
        "b/c": jnp.zeros(1),
        "b": {"c": jnp.ones(1)},
        "__metadata__": jnp.ones(3),
    }
    nuqjax.save(tmp_path / "a", tree)
    same(tree, nuqjax.load(tmp_path / "a"))
    bare = jnp.arange(3.0)
    nuqjax.save(tmp_path / "b", bare)
    same(bare, nuqjax.load(tmp_path / "b"))


Point = namedtuple("Point", ["x", "y"])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)


OTHER_TREES = {
    "frozen": lambda: FrozenDict(draws.variables(nn.Dense(32).init, jnp.ones((1, 16)))),
    "named tuple": lambda: Point(jnp.ones(3), {"z": Point(1, None)}),
    "nnx state": lambda: nnx.state(Net(nnx.Rngs(0))),
    "nnx module": lambda: Net(nnx.Rngs(0)),
    "equinox": lambda: eqx.nn.MLP(16, 4, 32, 2, key=jax.random.key(0, impl="rbg")),
}


@pytest.mark.parametrize("name", OTHER_TREES)
def test_other_nodes_come_from_a_template(name, tmp_path):
    tree = nuqjax.compress(OTHER_TREES[name](), bits=3, method="normal")
    nuqjax.save(tmp_path / "a", tree)
    same(tree, nuqjax.load(tmp_path / "a", like=OTHER_TREES[name]()))
    same(tree, nuqjax.load(tmp_path / "a", like=tree))
    if name != "equinox":  # whose functions a tree structure does not have
        same(tree, nuqjax.load(tmp_path / "a", like=jax.tree.structure(OTHER_TREES[name]())))


def test_what_load_would_refuse_as_hostile_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="100 keys have equal hashes"):
        nuqjax.save(tmp_path / "a", dict.fromkeys((n * (2**61 - 1) for n in range(100)), 1))
    assert not (tmp_path / "a").exists()


def test_like_the_tree_that_was_compressed(tmp_path):
    """Whatever NumPy dtypes it has: `compress` takes float64 as float32, and leaves what stays dense as it is."""
    tree = {"w": np.random.default_rng(0).normal(size=(24, 40)), "b": np.ones(3), "h": np.ones((16, 32), np.float16)}
    nuqjax.save(tmp_path / "a", nuqjax.compress(tree, method="normal"))
    found = nuqjax.load(tmp_path / "a", like=tree)
    assert {name: np.dtype(leaf.dtype).name for name, leaf in found.items()} == {
        "w": "float32", "b": "float64", "h": "float16"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"leaf 'b': float64\[3\], but like has float32\[3\]"):
        nuqjax.load(tmp_path / "a", like=tree | {"b": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"leaf 'w': float32\[24, 40\], but like has float16"):
        nuqjax.load(tmp_path / "a", like=tree | {"w": tree["w"].astype(np.float16)})


def test_other_nodes_without_a_template_are_dicts(tmp_path):
    trees = {name: OTHER_TREES[name]() for name in ("frozen", "named tuple", "equinox")}
    nuqjax.save(tmp_path / "a", trees["frozen"])
    same(trees["frozen"].unfreeze(), nuqjax.load(tmp_path / "a"))
    nuqjax.save(tmp_path / "a", trees["named tuple"])
    same({"x": jnp.ones(3), "y": {"z": {"x": 1, "y": None}}}, nuqjax.load(tmp_path / "a"))
    nuqjax.save(tmp_path / "a", trees["equinox"])
    with pytest.raises(
        ValueError, match=r"leaf 'activation' was of type .*, which no file can hold: give it with like=…"
    ):
        nuqjax.load(tmp_path / "a")
    found = nuqjax.load(tmp_path / "a", leaves="weight")
    assert set(found["layers"][0]) == {"weight", "bias"}


def test_a_template_that_does_not_fit(tmp_path):
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    nuqjax.save(tmp_path / "x", tree)
    for like, message in (
        ({"a": jnp.ones((2, 3))}, "like has no leaf 'b'"),
        (tree | {"c": 1}, "like has a leaf 'c'"),
        (tree | {"b": jnp.ones(5)}, r"leaf 'b': float32\[4\], but like has float32\[5\]"),
        (tree | {"b": jnp.ones(4, jnp.bfloat16)}, r"leaf 'b': float32\[4\], but like has bfloat16\[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            nuqjax.load(tmp_path / "x", like=like)


def test_a_subset_of_leaves(compressed, tmp_path):
    cparams, _ = compressed
    nuqjax.save(tmp_path / "a", cparams, max_shard_size=5000)
    found = nuqjax.load(tmp_path / "a", leaves="^layers/(stack|bias)")
    assert found["knq"] is None
    assert found["layers"]["heads"] is None
    same(cparams["layers"]["stack"], found["layers"]["stack"])
    same(found, nuqjax.load(tmp_path / "a", leaves=lambda path: path in ("layers/stack", "layers/bias")))
    with pytest.raises(
        ValueError, match="leaves='layer/stack' matches none of the 19 leaves; the nearest paths are 'layers/st"
    ):
        nuqjax.load(tmp_path / "a", leaves="layer/stack")
    with pytest.raises(ValueError, match="not a regular expression"):
        nuqjax.load(tmp_path / "a", leaves="(")


def test_only_what_is_asked_for_is_read(tmp_path):
    """The bytes of the other leaf are damaged, and nobody notices."""
    path = tmp_path / "a"
    nuqjax.save(path, {"a": jnp.ones(1000), "b": jnp.zeros(1000)})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    same({"a": jnp.ones(1000), "b": None}, nuqjax.load(path, leaves="a"))
    with pytest.raises(ValueError, match="leaf 'b', data: the bytes are not those that were saved"):
        nuqjax.load(path)
    nuqjax.load(path, verify=False)


def test_numpy_arrays_are_mapped(tmp_path):
    tree = {"a": jnp.ones(1000), "w": nuqjax.compress({"w": jnp.ones((64, 64))}, method="normal")["w"]}
    nuqjax.save(tmp_path / "a", tree)
    found = nuqjax.load(tmp_path / "a", numpy=True)
    for array in (found["a"], found["w"].packed, found["w"].levels):
        assert isinstance(array, np.ndarray)
        assert not array.flags.owndata
        assert not array.flags.writeable
    nuqjax.save(tmp_path / "a", {"a": 1})  # the old file stays as long as it is mapped
    same(tree, found)


_ON_A_MESH = """
import sys, jax, jax.numpy as jnp, numpy as np, nuqjax
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
params = {"w": np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32), "b": jnp.arange(32.0)}
cparams = nuqjax.compress(params, bits=4, method="normal", granularity="channel")
nuqjax.save(sys.argv[1], cparams, entropy_coding=True)
specs = {"w": NamedSharding(mesh, P(None, "model")), "b": NamedSharding(mesh, P("model"))}
found = nuqjax.load(sys.argv[1], sharding=specs)
wanted = nuqjax.shardings(cparams, specs)
for a, b, s in zip(*map(jax.tree.leaves, (found, cparams, wanted))):
    assert a.sharding == s, (a.sharding, s)
    np.testing.assert_array_equal(a, b)
assert found["w"].packed.addressable_shards[0].data.shape == (8, 32)
everywhere = nuqjax.load(sys.argv[1], sharding=NamedSharding(mesh, P()))
assert all(len(a.devices()) == 8 for a in jax.tree.leaves(everywhere))
print("placed")
"""


def test_placed_on_a_mesh(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _ON_A_MESH, str(tmp_path / "a")]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "placed" in finished.stdout


def test_placed_on_a_device(compressed, tmp_path):
    cparams, _ = compressed
    nuqjax.save(tmp_path / "a", cparams)
    same(cparams, nuqjax.load(tmp_path / "a", sharding=SingleDeviceSharding(jax.devices()[0])))
    mesh = jax.make_mesh((1,), ("model",))
    with pytest.raises(ValueError, match="leaf 'auto': sharding= has no entry for it"):
        nuqjax.load(tmp_path / "a", sharding={"own": NamedSharding(mesh, P())})
    with pytest.raises(ValueError, match="sharding= places JAX arrays"):
        nuqjax.load(tmp_path / "a", sharding=NamedSharding(mesh, P()), numpy=True)


# Writing


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("limit", [None, 3000])
@pytest.mark.parametrize("step", [*range(4), "fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(compressed, tmp_path, monkeypatch, limit, step):
    cparams, report = compressed
    nuqjax.save(tmp_path / "a", {"old": jnp.ones(2000), "w": jnp.zeros(2000)}, max_shard_size=limit)
    before = contents(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    if isinstance(step, str):
        monkeypatch.setattr(store_file.os, step, stop)
    else:
        chunks, calls = store_file.from_array, []

        def from_array(name, code, array):
            whole = chunks(name, code, array)

            def stopping():
                calls.append(name)
                if len(calls) > 40 + 7 * step:
                    raise OSError(28, "No space left on device")
                return whole.chunks()

            return whole._replace(chunks=stopping)

        monkeypatch.setattr("nuqjax._src.store.layout.from_array", from_array)
    with pytest.raises((OSError, KeyboardInterrupt)):
        nuqjax.save(tmp_path / "a", cparams, report=report, max_shard_size=limit)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    same({"old": jnp.ones(2000), "w": jnp.zeros(2000)}, nuqjax.load(tmp_path / "a"))


def test_one_file_and_shards_replace_one_another(compressed, tmp_path):
    cparams, _ = compressed
    (tmp_path / "a-00001-of-00002.safetensors").write_bytes(b"somebody else's")
    path = tmp_path / "a.safetensors"
    for limit in (None, 4000, "3KB", 10**9, "2 KiB", 4000, None):
        nuqjax.save(path, cparams, max_shard_size=limit)
        same(cparams, nuqjax.load(path))
        names = sorted(os.listdir(tmp_path))
        assert names[0] == "a-00001-of-00002.safetensors"
        if limit in (None, 10**9):
            assert names[1:] == ["a.safetensors"]
        else:
            assert names[-1] == "a.safetensors.index.json"
            same(cparams, nuqjax.load(tmp_path / names[-1]))
            numbers = {name.rsplit("-", 1)[1] for name in names[1:-1]}
            assert numbers == {f"{len(names) - 2:05}.safetensors"}
            limit = {"3KB": 3000, "2 KiB": 2048}.get(limit, limit)
            for name in names[1:-1]:
                entries = store_file.open_mapped(str(tmp_path / name)).entries
                assert len(entries) == 1 or sum(e.end - e.begin for e in entries.values()) <= limit


def test_the_same_tree_gives_the_same_bytes(compressed, tmp_path):
    cparams, report = compressed
    for name in "ab":
        (tmp_path / name).mkdir()
        nuqjax.save(tmp_path / name / "x", cparams, report=report, entropy_coding=True, max_shard_size=3000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    nuqjax.save(tmp_path / "link", {"a": 1})
    assert (tmp_path / "link").is_symlink()
    assert nuqjax.load(tmp_path / "file") == nuqjax.load(tmp_path / "link") == {"a": 1}


# Entropy coding


@pytest.mark.parametrize("bits", range(1, 9))
def test_coded_within_a_hundredth_of_the_entropy(bits, tmp_path):
    rng = np.random.default_rng(bits)
    params = {"w": rng.normal(size=(512, 400)).astype(np.float32), "v": rng.laplace(size=(300, 500)).astype(np.float32)}
    cparams, report = nuqjax.compress(params, bits=bits, method="uniform", return_report=True)
    nuqjax.save(tmp_path / "a", cparams, report=report, entropy_coding=True)
    same(cparams, nuqjax.load(tmp_path / "a"))
    for leaf in nuqjax.inspect(tmp_path / "a").compressed:
        coded = leaf.nbytes_packed if leaf.nbytes_coded is None else leaf.nbytes_coded
        assert leaf.entropy * leaf.weights / 8 <= coded + 1  # no code is shorter
        if leaf.nbytes_packed > 1.01 * leaf.entropy * leaf.weights / 8:
            assert coded <= 1.01 * leaf.entropy * leaf.weights / 8
        assert coded <= leaf.nbytes_packed
    total = nuqjax.inspect(tmp_path / "a").total
    assert total["nbytes_coded"] is None or total["nbytes_coded"] < total["nbytes_packed"]


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (3, 0, 8)])
def test_what_has_no_indices_is_not_coded(shape, tmp_path):
    tree = nuqjax.compress({"w": jnp.zeros(shape)}, rules=[Rule("w", skip=False)], method="normal")
    nuqjax.save(tmp_path / "a", tree, entropy_coding=True)
    same(tree, nuqjax.load(tmp_path / "a"))


def test_padding_that_is_not_zero_is_kept(tmp_path):
    leaf = nuqjax.compress({"w": jnp.zeros((1001, 16))}, bits=3, method="uniform")["w"]
    odd = replace(leaf, packed=np.asarray(leaf.packed) | 128)
    nuqjax.save(tmp_path / "a", [leaf, odd], entropy_coding=True)
    same([leaf, odd], nuqjax.load(tmp_path / "a"))


def test_without_the_library_the_error_says_how_to_install_it(compressed, tmp_path, monkeypatch):
    cparams, _ = compressed
    nuqjax.save(tmp_path / "coded", cparams, entropy_coding=True)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"pip install 'nuqjax\[entropy\]'"):
        nuqjax.save(tmp_path / "a", cparams, entropy_coding=True)
    with pytest.raises(ImportError, match=r"pip install 'nuqjax\[entropy\]'"):
        nuqjax.load(tmp_path / "coded")
    nuqjax.save(tmp_path / "a", cparams)
    same(cparams, nuqjax.load(tmp_path / "a"))


# Refused


def test_what_a_file_does_not_hold_is_refused(compressed, tmp_path):
    leaf = compressed[0]["knq"]
    deep = 1
    for _ in range(300):
        deep = [deep]
    for tree, message in (
        ({"a": np.array(["x"])}, r"^a: dtype <U1, which the format cannot store"),
        ({"a": np.array([None])}, r"^a: dtype object"),
        ({"a": {3.5: 1}}, r"^a: a dict with the key 3.5 of type float; a file holds keys"),
        ({"a\ud800": 1}, "not valid Unicode"),
        (deep, "deeper than 256 levels"),
        ({"w": jax.tree.map(lambda a: a[..., :-1], leaf)}, r"^w: levels has shape"),
        (
            {"w": replace(leaf, levels=np.asarray(leaf.levels).astype(np.int8))},
            r"^w: levels of dtype int8, but a fl",
        ),
        ({"w": replace(leaf, dtype=np.dtype(np.int8))}, r"^w: dtype of dtype int8, but a floating one is wanted"),
        ({"w": replace(leaf, scale_group=3)}, r"^w: a scale_group of 3 without scales; 0 is wanted"),
        ({"w": replace(leaf, granularity=InputGroups(10**30))}, r"^w: levels has shape|^w: a group of 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            nuqjax.save(tmp_path / "a", tree)
    with pytest.raises(ValueError, match="the report is of another tree"):
        nuqjax.save(tmp_path / "a", {"b": 1}, report=compressed[1])
    for size in (0, -1, "5 apples", 1.5, True):
        with pytest.raises(ValueError, match="max_shard_size="):
            nuqjax.save(tmp_path / "a", {"b": 1}, max_shard_size=size)
    assert os.listdir(tmp_path) == []


def test_paths_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        nuqjax.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        nuqjax.save(tmp_path / "nothing" / "a", {"a": 1})
    with pytest.raises(IsADirectoryError):
        nuqjax.load(tmp_path)
    with pytest.raises(IsADirectoryError):
        nuqjax.save(tmp_path, {"a": 1})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        nuqjax.load(tmp_path / "pipe")


assert ml_dtypes  # gives NumPy the dtypes that the tests name


class TestTiedLeaves:
    """An array at two places is fitted, stored and loaded once."""

    W = draws.normal(5, 32, 64)

    def tree(self, w):
        return {"decoder": {"kernel": w}, "embed": w, "other": draws.normal(6, 32, 64), "bias": draws.normal(7, 64)}

    def test_one_leaf_stands_at_both_places(self, tmp_path):
        cparams = nuqjax.compress(self.tree(self.W), bits=3)
        assert cparams["decoder"]["kernel"] is cparams["embed"]
        assert nuqjax.compress(self.tree(self.W), rules=Rule("embed", bits=2))["embed"].bits == 2
        copied = cparams | {"embed": jax.tree.map(jnp.copy, cparams["embed"])}
        for name, tree in (("tied", cparams), ("copied", copied)):
            nuqjax.save(tmp_path / name, tree)
        sizes = [(tmp_path / name).stat().st_size for name in ("tied", "copied")]
        assert sizes[1] - sizes[0] >= cparams["embed"].nbytes
        loaded = nuqjax.load(tmp_path / "tied")
        assert loaded["decoder"]["kernel"] is loaded["embed"]
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(cparams), strict=True):
            np.testing.assert_array_equal(a, b)
        alone = nuqjax.load(tmp_path / "tied", leaves="embed")
        np.testing.assert_array_equal(alone["embed"].packed, cparams["embed"].packed)
        assert [leaf.path for leaf in nuqjax.inspect(tmp_path / "tied").compressed] == [
            "decoder/kernel",
            "embed",
            "other",
        ]

    def test_dense_leaves_too_but_not_numbers(self, tmp_path):
        tree = {"a": self.W, "b": self.W, "c": 3, "d": 3, "e": np.float32(1), "f": np.float32(1)}
        nuqjax.save(tmp_path / "f", tree)
        loaded = nuqjax.load(tmp_path / "f", numpy=True)
        assert loaded["a"] is loaded["b"]
        assert (loaded["c"], loaded["d"]) == (3, 3)
