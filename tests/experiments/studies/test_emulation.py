"""Trained networks on raw integers: every word of every site against NumPy's int64, layer by layer.

`pytest tests/experiments/studies/test_emulation.py --oracle-images 20` compares more images, whole ones, and all
networks at 4- and 8-bit indices with 8- and 16-bit words.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.studies import emulation
from nuqjax._src.leaf.codebook_array import dense_on_host
from tests.fixed_point_oracle import Oracle, Value, same_padding


@dataclass
class Layers:
    """A network's layers on integers, by the paths of its parameters.

    Attributes:
      oracle: what computes.
      kernels: by path, a kernel's indices and levels.
      vectors: by path, a dense leaf.
    """

    oracle: Oracle
    kernels: dict[str, tuple[np.ndarray, np.ndarray]]
    vectors: dict[str, np.ndarray]

    def bias(self, site: str, path: str) -> Value:
        return self.oracle.constant(site, "bias", self.vectors[path])

    def conv(self, x: Value, name: str, bias: str, stride: int = 1, padding: Any = "SAME", groups: int = 1) -> Value:
        site = f"params/{name}/kernel"
        kernel = self.oracle.weights(site, *self.kernels[site])
        window, strides = kernel.raw.shape[:2], (stride, stride)
        if padding == "SAME":
            padding = same_padding(x.raw.shape[1:3], window, strides)
        return self.oracle.conv(site, x, kernel, self.bias(site, f"params/{bias}"), strides, padding, groups=groups)

    def dense(self, x: Value, name: str) -> Value:
        site = f"params/{name}/kernel"
        kernel = self.oracle.weights(site, *self.kernels[site])
        return self.oracle.dot(site, x, kernel, self.bias(site, f"params/{name}/bias"))

    def mean(self, x: Value, scope: str) -> Value:
        """Over height and width."""
        _, height, width, _ = x.raw.shape
        return self.oracle.divided(f"{scope}:div", self.oracle.summed(x, (1, 2)), height * width)


def resnet20(layers: Layers, x: Value) -> None:
    """Shortcuts are every second pixel, and channels of zeros on both sides."""
    one = ((1, 1), (1, 1))
    relu = lambda value: layers.oracle.bounded(value, low=0)  # noqa: E731
    x = relu(layers.conv(x, "Conv_0", "BatchNorm_0/bias", padding=one))
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(3):
            name = f"stage{stage + 1}_block{block}"
            stride = 2 if stage and not block else 1
            wider = (channels - x.raw.shape[-1]) // 2
            shortcut = np.pad(x.raw[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (wider, wider)))
            y = relu(layers.conv(x, f"{name}/Conv_0", f"{name}/BatchNorm_0/bias", stride, padding=one))
            y = layers.conv(y, f"{name}/Conv_1", f"{name}/BatchNorm_1/bias", padding=one)
            x = relu(layers.oracle.add(f"ResNet20/{name}:add", y, x.shaped(shortcut)))
    layers.dense(layers.mean(x, "ResNet20"), "Dense_0")


def tiny_darknet(layers: Layers, x: Value) -> None:
    """Leaky rectifiers: a product with the slope where the word is negative."""
    oracle = layers.oracle
    for number in range(15):
        x = layers.conv(x, f"Conv_{number}", f"BatchNorm_{number}/bias")
        again = f"#{number}" if number else ""
        slope = oracle.constant(f"TinyDarknet:mul{again}", "weight", np.float32(0.1))
        gentle = oracle.times(f"TinyDarknet:mul{again}", x, slope)
        negative = x.raw < 0
        x = oracle.joined(
            f"TinyDarknet:select_n{again}", [gentle, x], lambda a, b, negative=negative: np.where(negative, a, b)
        )
        if number in (0, 1, 5, 9):
            x = oracle.pooled(x, (2, 2), (2, 2), same_padding(x.raw.shape[1:3], (2, 2), (2, 2)), "max")
    layers.mean(layers.conv(x, "Conv_15", "Conv_15/bias"), "TinyDarknet")


def efficientnet_lite0(layers: Layers, x: Value) -> None:
    """Inverted residuals with relu6."""
    relu6 = lambda value: layers.oracle.bounded(value, 0, 6)  # noqa: E731
    stages = [(1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6)]
    x = relu6(layers.conv(x, "stem", "stem_bn/bias", 2))
    number = 0
    for repeats, first_stride, expansion in stages:
        for repeat in range(repeats):
            name, stride = f"block{number}", 1 if repeat else first_stride
            y = x
            if expansion != 1:
                y = relu6(layers.conv(y, f"{name}/expand", f"{name}/expand_bn/bias"))
            groups = y.raw.shape[-1]
            y = relu6(layers.conv(y, f"{name}/depthwise", f"{name}/depthwise_bn/bias", stride, groups=groups))
            y = layers.conv(y, f"{name}/project", f"{name}/project_bn/bias")
            x = layers.oracle.add(f"EfficientNetLite0/{name}:add", y, x) if y.raw.shape == x.raw.shape else y
            number += 1
    x = relu6(layers.conv(x, "head", "head_bn/bias"))
    layers.dense(layers.mean(x, "EfficientNetLite0"), "classifier")


MODELS: dict[str, Callable[[Layers, Value], None]] = {
    "resnet20": resnet20,
    "tiny_darknet": tiny_darknet,
    "efficientnet_lite0": efficientnet_lite0,
}


def unpacked(cparams: Any) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
    """By path: indices and levels of the compressed leaves, the dense leaves."""
    kernels, vectors = {}, {}
    leaves = jax.tree_util.tree_flatten_with_path(cparams, is_leaf=lambda x: isinstance(x, nuqjax.CodebookArray))[0]
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, nuqjax.CodebookArray):
            numbers = np.broadcast_to(np.arange(leaf.levels.shape[-1], dtype=np.float32), leaf.levels.shape)
            indices = dense_on_host(replace(leaf, levels=numbers, codebook_format=None)).astype(int)
            assert leaf.levels.shape[0] == 1
            assert leaf.codebook_format is not None
            kernels[name] = indices, np.ldexp(np.asarray(leaf.levels[0], np.float64), -leaf.codebook_format.frac)
        else:
            vectors[name] = np.asarray(leaf)
    return kernels, vectors


def pytest_generate_tests(metafunc):
    if "oracle" not in metafunc.function.__name__:
        return
    again = pytest.mark.versionless  # the two others are of the same operations
    largest = pytest.param("efficientnet_lite0", 8, 16, marks=again)
    cases = [("resnet20", 4, 8), ("tiny_darknet", 4, 8), largest]
    if metafunc.config.getoption("oracle_images") > 1:
        cases = list(itertools.product(MODELS, (4, 8), (8, 16)))
    metafunc.parametrize(("name", "bits", "word"), cases)


@pytest.mark.slow
def test_every_word_of_a_trained_network_is_the_oracles(data, request, name, bits, word):
    count = request.config.getoption("oracle_images")
    network = networks.get(name)
    fn, variables = emulation.folded(network, data)
    method = "knq" if bits == 4 else "enq"  # which is quicker at 256 levels; the words' law holds for any
    words = nuqjax.AutoQFormat(8)
    cparams = nuqjax.compress(variables, bits, method, granularity="tensor", codebook_format=words)
    inputs = network.preprocess(images.load_images(network, data, count).pixels)
    if count == 1:  # every layer of the larger networks, on as much of an image as takes seconds
        inputs = inputs[:, :64, :64]
    formats = nuqjax.calibrate(fn, cparams, inputs, word=word)
    _, trace = jax.jit(nuqjax.emulate(fn, formats, trace=[""]))(cparams, inputs)

    oracle = Oracle(formats.to_json())
    MODELS[name](Layers(oracle, *unpacked(cparams)), oracle.input(inputs))

    assert (
        trace.words.keys()
        == oracle.words.keys()
        == {r["site"] for r in json.loads(formats.to_json())["rows"] if "output" in r}
    )
    for site, words in trace.words.items():
        np.testing.assert_array_equal(words, oracle.words[site], err_msg=site)
    for site, peak in oracle.accumulator_peaks.items():
        assert peak <= (formats[site].bound or 0)


def test_words_are_wide_at_the_sites_that_are_named():
    def fn(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["last"]

    random = np.random.default_rng(0)
    params = {"first": random.normal(size=(12, 20)), "last": random.normal(size=(20, 3))}
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    x = jnp.asarray(random.normal(size=(8, 12)), jnp.float32)
    cell = {"weight_word": 8, "word": 8, "choose": "range"}
    formats = emulation.formats_of(fn, params, x, cell | {"wide": "^first"})
    everywhere = emulation.formats_of(fn, params, x, cell | {"word": 16})
    assert {row.site: row.output.word for row in formats if row.output} == {"input": 8, "first": 16, "last": 8}
    assert formats["first"].output == everywhere["first"].output
    assert formats["last"].bound is not None  # proven anew
    words = jax.jit(nuqjax.emulate(fn, formats, output="raw"))(params, x)
    assert int(jnp.abs(words).max()) < 2**7
    with pytest.raises(ValueError, match="'nowhere' is in no site's name; the sites are input, first, last"):
        emulation.formats_of(fn, params, x, cell | {"wide": "nowhere"})
