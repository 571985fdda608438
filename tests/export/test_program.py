"""Exported programs: the same bits in a process that has no nuqjax; the weights beside the program, not in it."""

import functools
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, InputGroups, Rule
from nuqjax._src.export.program import by_name
from nuqjax._src.store.dtypes import AS_BYTES, AS_INTEGERS, AS_PAIRS, CODES, to_part
from tests import draws

pytestmark = pytest.mark.promotes  # the models do; tests/laws/test_flags.py has one that does not

DOCUMENT = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
_, LOADER, FLOAT8_LOADER, *_ = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


class Network(nn.Module):
    @nn.compact
    def __call__(self, images, train=True):
        x = nn.relu(nn.Conv(12, (3, 3))(images))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(40)(x.reshape(x.shape[0], -1))))


class NNXNetwork(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 24, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 24, decode=False, rngs=rngs)
        self.head = nnx.Linear(24, 30, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.attention(self.embed(ids)))


IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 50, (3, 7)).astype(np.int32)
VECTORS = np.random.default_rng(2).normal(size=(5, 32)).astype(np.float32)


def linen(**options):
    model = Network()
    variables = draws.variables(model.init, IMAGES)
    return functools.partial(model.apply, train=False), nuqjax.compress(variables, **options), IMAGES


def nnx_state(**options):
    graph, state = nnx.split(nnx.eval_shape(lambda: NNXNetwork(nnx.Rngs(0))))
    return lambda state, ids: nnx.merge(graph, state)(ids), nuqjax.compress(draws.filled(state), **options), IDS


def nested_dicts(**options):
    """A scanned stack of layers, and leaves of other kinds: a number, a random key, integers, a function."""
    layers = draws.normal(3, 3, 32, 32, dtype=options.pop("dtype", jnp.float32))
    tree = {
        "stack": {"kernel": layers},
        "head": [draws.normal(4, 32, 16), jnp.zeros(16)],
        "temperature": 0.7,
        "key": jax.random.key(5),
        "order": jnp.arange(15, -1, -1, dtype=jnp.int4),
        "activation": jnp.tanh,
    }

    def forward(tree, x):
        x, _ = jax.lax.scan(lambda x, kernel: (tree["activation"](x @ kernel), None), x, tree["stack"]["kernel"])
        logits = (x @ tree["head"][0] + tree["head"][1]) / tree["temperature"]
        return (logits + jax.random.normal(tree["key"], logits.shape))[:, tree["order"].astype(jnp.int32) % 16]

    cparams = nuqjax.compress(tree, rules=[Rule("stack", stack_axes=1, **options)], **options)
    return forward, cparams, VECTORS


CASES = {
    "linen, a codebook per channel": functools.partial(linen, bits=2, granularity="channel", min_size=1),
    "linen, fixed point": functools.partial(linen, bits=3, codebook_format=AutoQFormat(8)),
    "linen, channel groups, scales": functools.partial(
        linen, bits=5, granularity=ChannelGroups(4), scale=InputGroups(9)
    ),
    "nnx": functools.partial(nnx_state, bits=1, granularity=InputGroups(8)),
    "nnx, a codebook format": functools.partial(nnx_state, bits=8, codebook_format=jnp.bfloat16, scale="channel"),
    "dicts, bfloat16": functools.partial(nested_dicts, bits=7, dtype=jnp.bfloat16),
    "dicts, float8": functools.partial(nested_dicts, bits=6, codebook_format=jnp.float8_e4m3fn),
}
ELSEWHERE = """
import sys
sys.modules |= {"nuqjax": None, "flax": None}  # importing them is an error
loader, float8_loader, *folders = sys.argv[1:]
for folder in folders:
    sys.argv = ["", folder, f"{folder}/inputs.npy", f"{folder}/outputs.npy"]
    if "float8" in folder:
        *begin, load, run = loader.strip().splitlines()  # the line that loads, replaced
        exec("\\n".join([*begin, float8_loader, run]))
    else:
        exec(loader)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """By case: what is exported, what a process without nuqjax makes of the files, and what is expected."""
    exported, expected, folders = {}, {}, {}
    for name, make in CASES.items():
        fn, cparams, inputs = make()
        exported[name] = nuqjax.export(fn, cparams, inputs)
        expected[name] = eqx.filter_jit(nuqjax.apply(fn))(cparams, jnp.asarray(inputs))
        folders[name] = tmp_path_factory.mktemp(name)
        exported[name].save(folders[name])
        np.save(folders[name] / "inputs.npy", inputs)
    command = [sys.executable, "-c", ELSEWHERE, LOADER, FLOAT8_LOADER, *map(str, folders.values())]
    subprocess.run(command, check=True, cwd=tmp_path_factory.getbasetemp())
    return {name: (exported[name], np.load(folders[name] / "outputs.npy"), expected[name]) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_where_nuqjax_is_not(elsewhere, case):
    _, found, expected = elsewhere[case]
    expected = np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))
    assert np.isfinite(expected.astype(np.float32)).all()
    assert np.ptp(expected.astype(np.float32)) > 0


@pytest.mark.parametrize("case", CASES)
def test_the_program_takes_the_tensors_of_the_file(elsewhere, case, tmp_path):
    exported, *_ = elsewhere[case]
    exported.save(tmp_path / "new" / "folder")
    (wanted, *_), _ = jax.tree.unflatten(exported.program.in_tree, exported.program.in_avals)
    with safe_open(tmp_path / "new" / "folder" / "weights.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: tensor.shape for name, tensor in wanted.items()} == shapes
    assert exported.program.platforms == ("cpu", "cuda", "tpu")
    assert (tmp_path / "new" / "folder" / "program.jax_export").read_bytes() == exported.serialized
    again = nuqjax.load(tmp_path / "new" / "folder" / "weights.safetensors", like=exported.cparams)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(exported.cparams), strict=True):
        assert a is b or np.all(a == b)


def test_one_program_for_any_batch(tmp_path):
    fn, cparams, images = linen(bits=4, granularity="channel")
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    exported = nuqjax.export(fn, cparams, (shape,), platforms=["cpu"])
    exported.save(tmp_path)
    program = jax.export.deserialize(bytearray((tmp_path / "program.jax_export").read_bytes()))
    weights = load_file(tmp_path / "weights.safetensors")
    for size in (1, 3, 4):
        expected = jax.jit(nuqjax.apply(fn))(cparams, images[:size])
        # The compiler is told other sizes, so that it may sum in another order: in each of four layers up to 256
        # products, none of whose partial sums is wrong by more than 256 half ulps.
        tolerance = 4 * 256 * 2**-24 * np.abs(expected).max()
        np.testing.assert_allclose(jax.jit(program.call)(weights, images[:size]), expected, rtol=0, atol=tolerance)


def test_an_embedding_of_any_length():
    table = draws.normal(0, 100, 16)
    cparams = nuqjax.compress({"table": table}, bits=3, axis=0)
    rows, columns = jax.export.symbolic_shape("rows, columns")
    ids = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
    program = nuqjax.export(lambda params, ids: params["table"][ids], cparams, ids).program
    weights = {"table.levels": cparams["table"].levels, "table.packed": cparams["table"].packed}
    for shape in ((1, 1), (2, 5)):
        ids = jnp.asarray(np.random.default_rng(1).integers(0, 100, shape), jnp.int32)
        np.testing.assert_array_equal(program.call(weights, ids), nuqjax.decompress(cparams)["table"][ids])


def test_no_weight_is_in_the_program():
    params = {"kernel": draws.normal(0, 1024, 512), "bias": jnp.arange(512.0)}
    cparams = nuqjax.compress(params, bits=4)
    exported = nuqjax.export(lambda params, x: x @ params["kernel"] + params["bias"], cparams, jnp.ones((1, 1024)))
    leaf = cparams["kernel"]
    assert len(exported.serialized) < leaf.nbytes / 16
    for array in (leaf.packed, leaf.levels, params["bias"]):
        assert np.asarray(array).tobytes()[:32] not in exported.serialized


HELD_IN_X64 = ["int64", "uint64", "float64", "complex128"]


@pytest.mark.parametrize("name", [*CODES, *AS_BYTES, *AS_INTEGERS, *AS_PAIRS])
def test_every_dtype_is_made_of_what_is_stored_or_told(name):
    array = (np.random.default_rng(0).integers(0, 2, (3, 4)) + (name == "float8_e8m0fnu")).astype(name)
    tree = {"a": [array]}
    if name in HELD_IN_X64 or name.startswith("float6_"):
        with pytest.raises(ValueError, match=rf"export: a/0 is {name}|export: a/0 is float64"):
            by_name(tree)
        return
    tensors, rebuild = by_name(tree)
    stored = to_part(array, "a/0").array
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {"a/0": (stored.shape, stored.dtype)}
    rebuilt = jax.jit(rebuild)({"a/0": stored})["a"][0]
    assert rebuilt.dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(rebuilt).astype(np.complex64), array.astype(np.complex64))


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (True, {}, "input 0 is of type bool, but an array or a ShapeDtypeStruct is wanted; bind options"),
        ((np.ones(3), {"mask": None}), {}, "input 1/mask is of type NoneType"),
        (Pair(np.ones(3), np.ones(3)), {}, "inputs and outputs are trees of dicts, lists and tuples only"),
        (np.ones(3), {"platforms": "cpu"}, "platforms='cpu', but a tuple of some of"),
        (np.ones(3), {"platforms": ("cpu", "gpu")}, r"platforms=\('cpu', 'gpu'\), but a tuple of some of"),
        (np.ones(3), {"platforms": ()}, r"platforms=\(\), but"),
    ],
)
def test_what_cannot_be_exported_is_told(inputs, options, message):
    with pytest.raises(ValueError, match=f"export: {message}"):
        nuqjax.export(lambda params, *inputs: params["a"] * 2, {"a": jnp.ones(3)}, inputs, **options)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p, z: p.update(seen=p["seen"] + 1), "seen in place"),
        (lambda p, z: z.update(x=z["x"] + 1), "x in place"),
        (lambda p, z: p.update(w=p["w"] + 1), "a compressed leaf in place, argument 0, w"),
    ],
)
def test_what_a_function_changes_in_place_is_not_lost_without_a_word(change, named):
    weights = nuqjax.compress({"w": VECTORS, "seen": jnp.float32(0)}, method="uniform", min_size=0)

    def changing(p, z):
        change(p, z)
        return z["x"] @ p["w"]

    with pytest.raises(ValueError, match=f"the function changes {named}"):
        nuqjax.export(changing, weights, {"x": np.ones((3, 5), np.float32)}, platforms=["cpu"])


def test_every_tensor_of_the_file_has_its_name_however_many_and_small(tmp_path):
    weights = {str(n): VECTORS.copy() for n in range(40)}
    exported = nuqjax.export(lambda p, x: x @ p["7"], weights, np.ones((3, 5), np.float32), platforms=["cpu"])
    exported.save(tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    assert set(stored) == set(weights)
    sums = exported.program.call(stored, np.ones((3, 5), np.float32))
    np.testing.assert_allclose(sums[0], VECTORS.sum(axis=0), rtol=1e-5, atol=1e-5)


def test_without_flatbuffers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r"pip install 'nuqjax\[export\]'"):
        nuqjax.export(lambda params, x: x, {}, jnp.ones(3))
