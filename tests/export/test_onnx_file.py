"""ONNX files: packed in the file, and in ONNX Runtime the outputs of `apply`, up to the order of sums.

`jax2onnx` is not in the `test` group, for it holds orbax-checkpoint below the version that the other tests are for:
`pip install jax2onnx`, and these tests run.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, InputGroups
from nuqjax._src.leaf.codebook_array import level_values
from tests import draws

pytestmark = pytest.mark.promotes  # as models and the converter do


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("jax2onnx", reason="not in the test group: it holds orbax-checkpoint back")
    return pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def onnxruntime():
    return pytest.importorskip("onnxruntime", reason="comes with jax2onnx")


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.max_pool(nn.relu(nn.Conv(24, (3, 3), padding="VALID")(x)), (2, 2), strides=(2, 2))
        x = nn.avg_pool(nn.Conv(24, (3, 3), feature_group_count=24)(x), (3, 3), strides=(1, 1))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def outputs(onnxruntime, path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {f"input_{n}": np.asarray(x) for n, x in enumerate(inputs)})


def assert_same_up_to_order(found, expected, layers, terms):
    """Equal up to half an ulp of the largest value for each of the sums' terms, in each layer."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=layers * terms * 2**-24 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options",
    [
        dict(bits=1),
        dict(bits=3, granularity="channel", scale="channel", min_size=1),
        dict(bits=5, granularity=ChannelGroups(5), codebook_format=AutoQFormat(8)),
        dict(bits=2, granularity=InputGroups(24), scale=InputGroups(7)),
        dict(bits=8),
    ],
    ids=str,
)
def test_a_cnn(onnx, onnxruntime, options, tmp_path):
    model, x = Network(), np.random.default_rng(0).normal(size=(2, 10, 10, 3)).astype(np.float32)
    params = draws.variables(model.init, x)
    cparams = nuqjax.compress(params, **options)
    nuqjax.export_onnx(model.apply, cparams, x, tmp_path / "model.onnx")
    [found] = outputs(onnxruntime, tmp_path / "model.onnx", x)
    assert_same_up_to_order(found, np.asarray(jax.jit(nuqjax.apply(model.apply))(cparams, x)), 4, 144)
    file = onnx.load(tmp_path / "model.onnx")
    assert [value.name for value in file.graph.input] == ["input_0"]
    kept = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    kernel = cparams["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kept["params/Dense_0/kernel.packed"], kernel.packed)
    np.testing.assert_array_equal(kept["params/Dense_0/kernel.levels"], level_values(kernel))


def test_dense_leaves_numbers_and_several_outputs(onnx, onnxruntime, tmp_path):
    params = {"w": draws.normal(0, 64, 32), "b": jnp.arange(32.0), "factor": 0.5}

    def forward(params, x, y):
        return {"sum": (x + y) @ params["w"] * params["factor"], "bias": jnp.tanh(y[:, :32]) + params["b"]}

    cparams = nuqjax.compress(params, bits=4)
    x, y = np.random.default_rng(0).normal(size=(2, 3, 64)).astype(np.float32)
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, y))
    nuqjax.export_onnx(forward, cparams, shapes, tmp_path / "model.onnx")
    found = outputs(onnxruntime, tmp_path / "model.onnx", x, y)
    for a, b in zip(found, jax.tree.leaves(nuqjax.apply(forward)(cparams, x, y)), strict=True):
        assert_same_up_to_order(a, np.asarray(b), 1, 64)


def test_what_the_converter_does_not_have_is_told(onnx, tmp_path):
    def forward(params, x):
        return jax.pure_callback(np.sin, x * params["a"], x * params["a"])

    with pytest.raises(NotImplementedError, match="pure_callback"):
        nuqjax.export_onnx(forward, {"a": jnp.ones(3)}, jnp.ones(3), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_tree_of_inputs_is_refused(onnx, tmp_path):
    with pytest.raises(ValueError, match="export_onnx: inputs are arrays"):
        nuqjax.export_onnx(lambda p, x: x["a"] * p["a"], {"a": jnp.ones(3)}, {"a": jnp.ones(3)}, tmp_path / "m.onnx")


def test_without_jax2onnx_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'nuqjax\[onnx\]'"):
        nuqjax.export_onnx(lambda params, x: x, {}, jnp.ones(3), tmp_path / "model.onnx")
