"""The networks compute what their weights were trained for."""

import importlib.util
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.networks import MobileNetV2, ResNet50
from experiments.networks.efficientnet_lite0 import depthwise_as_sum
from experiments.networks.network import check_variables
from nuqjax._src.platform.host import x64
from tests import draws

# --- Forward passes in the layout of the weights files, written independently of the modules: PyTorch's channels come
# first, and arrays are drawn by name and shape as they are met.


def _conv(x, kernel, stride=1, padding="SAME", groups=1, layout="NCHW"):
    kernel_layout = "OIHW" if layout == "NCHW" else "HWIO"
    padding = padding if isinstance(padding, str) else [(padding, padding)] * 2
    return lax.conv_general_dilated(
        x, jnp.asarray(kernel, x.dtype), (stride, stride), padding,
        dimension_numbers=(layout, kernel_layout, layout), feature_group_count=groups,
    )  # fmt: skip


def _normalise(x, scale, bias, mean, var, epsilon, layout="NCHW"):
    scale, bias, mean, var = (np.asarray(a, np.float64) for a in (scale, bias, mean, var))
    factor = scale / np.sqrt(var + epsilon)
    shape = (-1, 1, 1) if layout == "NCHW" else (-1,)
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


def _torch_norm(arrays, x, name, epsilon):
    size = x.shape[1]
    return _normalise(
        x,
        arrays.vector(f"{name}.weight", size, 1.0),
        arrays.vector(f"{name}.bias", size),
        arrays.vector(f"{name}.running_mean", size),
        arrays.vector(f"{name}.running_var", size, 1.0),
        epsilon,
    )


def _torch_conv(arrays, x, name, outputs, size, groups=1, **options):
    inputs = x.shape[1] // groups
    kernel = arrays.kernel(f"{name}.weight", (outputs, inputs, size, size), inputs * size * size)
    return _conv(x, kernel, groups=groups, **options)


def _torch_linear(arrays, x, name, outputs):
    return x @ arrays.kernel(f"{name}.weight", (outputs, x.shape[1]), x.shape[1]).T + arrays.vector(
        f"{name}.bias", outputs
    )


def efficientnet_lite0(arrays, images):
    x = images.transpose(0, 3, 1, 2)
    relu6 = lambda x: jnp.clip(x, 0, 6)  # noqa: E731
    x = relu6(_torch_norm(arrays, _torch_conv(arrays, x, "_conv_stem", 32, 3, stride=2), "_bn0", 1e-3))
    blocks = [(3, 1, 1, 16)]  # kernel, stride, expansion, channels
    blocks += [(3, 2, 6, 24), (3, 1, 6, 24), (5, 2, 6, 40), (5, 1, 6, 40)]
    blocks += [(3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80), (5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112)]
    blocks += [(5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (3, 1, 6, 320)]
    for i, (size, stride, expansion, channels) in enumerate(blocks):
        y, hidden = x, x.shape[1] * expansion
        if expansion > 1:
            y = _torch_conv(arrays, y, f"_blocks.{i}._expand_conv", hidden, 1)
            y = relu6(_torch_norm(arrays, y, f"_blocks.{i}._bn0", 1e-3))
        y = _torch_conv(arrays, y, f"_blocks.{i}._depthwise_conv", hidden, size, groups=hidden, stride=stride)
        y = relu6(_torch_norm(arrays, y, f"_blocks.{i}._bn1", 1e-3))
        y = _torch_norm(
            arrays, _torch_conv(arrays, y, f"_blocks.{i}._project_conv", channels, 1), f"_blocks.{i}._bn2", 1e-3
        )
        x = x + y if stride == 1 and x.shape[1] == channels else y
    x = relu6(_torch_norm(arrays, _torch_conv(arrays, x, "_conv_head", 1280, 1), "_bn1", 1e-3))
    return _torch_linear(arrays, x.mean((2, 3)), "_fc", 1000)


def resnet20(arrays, images):
    x = images.transpose(0, 3, 1, 2)
    x = jax.nn.relu(_torch_norm(arrays, _torch_conv(arrays, x, "conv1", 16, 3, padding=1), "bn1", 1e-5))
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            name, stride = f"layer{stage}.{block}.", 2 if stage > 1 and block == 0 else 1
            y = _torch_conv(arrays, x, f"{name}conv1", channels, 3, stride=stride, padding=1)
            y = jax.nn.relu(_torch_norm(arrays, y, f"{name}bn1", 1e-5))
            y = _torch_conv(arrays, y, f"{name}conv2", channels, 3, padding=1)
            y = _torch_norm(arrays, y, f"{name}bn2", 1e-5)
            if stride == 2:
                padding = jnp.zeros((x.shape[0], channels // 4, *y.shape[2:]))
                x = jnp.concatenate([padding, x[:, :, ::2, ::2], padding], axis=1)
            x = jax.nn.relu(x + y)
    return _torch_linear(arrays, x.mean((2, 3)), "linear", 10)


def resnet50(arrays, images, width=64, blocks=(3, 4, 6, 3), classes=1000):
    def layer(x, conv, norm, outputs, size, stride=1):
        x = _torch_conv(arrays, x, conv, outputs, size, stride=stride, padding=size // 2)
        return _torch_norm(arrays, x, norm, 1e-5)

    x = jax.nn.relu(layer(images.transpose(0, 3, 1, 2), "conv1", "bn1", width, 7, 2))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), [(0, 0), (0, 0), (1, 1), (1, 1)])
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name, channels = f"layer{stage}.{block}.", width * 2 ** (stage - 1)
            stride = 2 if stage > 1 and block == 0 else 1
            y = jax.nn.relu(layer(x, f"{name}conv1", f"{name}bn1", channels, 1))
            y = jax.nn.relu(layer(y, f"{name}conv2", f"{name}bn2", channels, 3, stride))
            y = layer(y, f"{name}conv3", f"{name}bn3", 4 * channels, 1)
            if block == 0:
                x = layer(x, f"{name}downsample.0", f"{name}downsample.1", 4 * channels, 1, stride)
            x = jax.nn.relu(x + y)
    return _torch_linear(arrays, x.mean((2, 3)), "fc", classes)


MOBILENET_V2_BLOCKS = [(1, 16, 1)]  # expansion, channels, stride
MOBILENET_V2_BLOCKS += [(6, 24, 2), (6, 24, 1), (6, 32, 2), (6, 32, 1), (6, 32, 1)]
MOBILENET_V2_BLOCKS += [(6, 64, 2), (6, 64, 1), (6, 64, 1), (6, 64, 1), (6, 96, 1), (6, 96, 1), (6, 96, 1)]
MOBILENET_V2_BLOCKS += [(6, 160, 2), (6, 160, 1), (6, 160, 1), (6, 320, 1)]


def mobilenet_v2(arrays, images, blocks=MOBILENET_V2_BLOCKS, classes=1000):
    def layer(x, name, outputs, size, stride=1, groups=1):
        x = _torch_conv(arrays, x, f"{name}.0", outputs, size, groups, stride=stride, padding=size // 2)
        return jnp.clip(_torch_norm(arrays, x, f"{name}.1", 1e-5), 0, 6)

    x = layer(images.transpose(0, 3, 1, 2), "features.0", 32, 3, 2)
    for number, (expansion, channels, stride) in enumerate(blocks, start=1):
        y, hidden, part = x, x.shape[1] * expansion, 0
        name = f"features.{number}.conv"
        if expansion > 1:
            y, part = layer(y, f"{name}.0", hidden, 1), 1
        y = layer(y, f"{name}.{part}", hidden, 3, stride, hidden)
        y = _torch_norm(arrays, _torch_conv(arrays, y, f"{name}.{part + 1}", channels, 1), f"{name}.{part + 2}", 1e-5)
        x = x + y if stride == 1 and x.shape[1] == channels else y
    x = layer(x, f"features.{len(blocks) + 1}", 1280, 1)
    return _torch_linear(arrays, x.mean((2, 3)), "classifier.1", classes)


def _halve(x):
    """2×2 maximum, for even sizes."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def tiny_darknet(arrays, x):
    channels = [16, 32, 16, 128, 16, 128, 32, 256, 32, 256, 64, 512, 64, 512, 128]
    sizes = [3, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1]
    for i, (outputs, size) in enumerate(zip(channels, sizes, strict=True), start=1):
        shape = (size, size, x.shape[-1], outputs)
        x = _conv(x, arrays.kernel(f"conv2d_{i}/kernel", shape, math.prod(shape[:3])), layout="NHWC")
        norm = f"batch_normalization_{i}/"
        x = _normalise(
            x,
            arrays.vector(f"{norm}gamma", outputs, 1.0),
            arrays.vector(f"{norm}beta", outputs),
            arrays.vector(f"{norm}moving_mean", outputs),
            arrays.vector(f"{norm}moving_variance", outputs, 1.0),
            1e-3,
            layout="NHWC",
        )
        x = jnp.where(x > 0, x, 0.1 * x)
        if i in (1, 2, 6, 10):
            x = _halve(x)
    x = x.mean((1, 2))  # the last convolution is 1×1, so the mean may come first
    return x @ arrays.kernel("conv2d_16/kernel", (1, 1, 128, 1000), 128)[0, 0] + arrays.vector("conv2d_16/bias", 1000)


def _conv_relu(arrays, x, i, outputs, size, stride=1):
    shape = (size, size, x.shape[-1], outputs)
    kernel = arrays.kernel(f"Conv_{i}/kernel", shape, math.prod(shape[:3]))
    padding = size // 2 if stride == 1 else 2
    y = _conv(x, kernel, stride, padding, layout="NHWC") + arrays.vector(f"Conv_{i}/bias", outputs)
    return jax.nn.relu(y)


def vgg16(arrays, x):
    i = 0
    for channels, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            x = _conv_relu(arrays, x, i, channels, 3)
            i += 1
        x = _halve(x)
    return x


def alexnet(arrays, x):
    def pool(x):  # 3×3 windows, two apart
        size = (x.shape[1] - 3) // 2 * 2 + 1
        return jnp.stack([x[:, i : i + size : 2, j : j + size : 2] for i in range(3) for j in range(3)]).max(0)

    x = pool(_conv_relu(arrays, x, 0, 64, 11, stride=4))
    x = pool(_conv_relu(arrays, x, 1, 192, 5))
    for i, channels in ((2, 384), (3, 256), (4, 256)):
        x = _conv_relu(arrays, x, i, channels, 3)
    return pool(x)


FORWARD = {  # and an input size that keeps the test quick
    "efficientnet_lite0": (efficientnet_lite0, 32),
    "tiny_darknet": (tiny_darknet, 32),
    "resnet20": (resnet20, 32),
    "alexnet": (alexnet, 79),
    "vgg16": (vgg16, 32),
    "resnet50": (partial(resnet50, width=8, blocks=(2, 1, 2, 1), classes=10), 32),
    "mobilenet_v2": (partial(mobilenet_v2, blocks=MOBILENET_V2_BLOCKS[:4], classes=10), 32),
}
_FEW_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2))  # the first four blocks
SMALL = {
    "resnet50": ResNet50(10, 8, (2, 1, 2, 1)),
    "mobilenet_v2": MobileNetV2(10, _FEW_STAGES),
}


def small(name):
    """The network, or one of its kind that is quick."""
    network = networks.get(name)
    if name not in SMALL:
        return network
    fast = None if network.cpu_module is None else SMALL[name].clone(depthwise_conv=depthwise_as_sum)
    return replace(network, module=SMALL[name], cpu_module=fast)


def test_every_network_is_tested():
    assert set(FORWARD) == set(networks.NETWORKS | networks.FROM_FILE)


@pytest.mark.parametrize("name", FORWARD)
def test_random_weights_give_the_outputs_of_an_independent_forward_pass(name, random_arrays, tmp_path):
    network, (forward, size) = small(name), FORWARD[name]
    inputs = np.random.default_rng(3).normal(size=(1, size, size, 3))
    with x64():  # so that only rounding far below any mistake remains
        expected = np.asarray(jax.jit(lambda x: forward(random_arrays, x))(inputs))
        random_arrays.save(tmp_path / "weights" / network.weights)
        variables = networks.load_features(network, tmp_path)
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)
        for module in filter(None, (network.trained, network.cpu_module)):
            outputs = np.asarray(jax.jit(module.apply)(variables, inputs))
            assert outputs.dtype == np.float64
            # Sums of at most 4608 products, 50 layers deep: relative errors stay below 50·4608·2⁻⁵³ < 3e-11.
            np.testing.assert_allclose(outputs, expected, rtol=0, atol=3e-11 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("alexnet", 61_100_840), ("vgg16", 138_357_544), ("resnet50", 25_557_032), ("mobilenet_v2", 3_504_872)],
)
def test_the_published_networks_are_complete(name, parameters):
    network = networks.get(name)
    shapes = jax.eval_shape(network.module.init, jax.random.key(0), jnp.zeros((1, network.size, network.size, 3)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])) == parameters
    logits = jax.eval_shape(network.module.apply, shapes, jnp.zeros((2, network.size, network.size, 3)))
    assert logits.shape == (2, 1000)


class Zeros(dict):
    """The arrays that a forward pass asks for, without memory of their own."""

    def kernel(self, name, shape, fan_in):
        return self.setdefault(name, np.broadcast_to(np.float32(0), shape))

    def vector(self, name, size, centre=0.0):
        return self.setdefault(name, np.broadcast_to(np.float32(0), size))


@pytest.mark.parametrize(("name", "forward"), [("resnet50", resnet50), ("mobilenet_v2", mobilenet_v2)])
def test_published_state_dicts_fit_whole(name, forward):
    network, arrays = networks.get(name), Zeros()
    jax.eval_shape(lambda x: forward(arrays, x), jnp.zeros((1, 224, 224, 3)))
    norms = [key.removesuffix("running_var") for key in arrays if key.endswith("running_var")]
    counters = {f"{norm}num_batches_tracked": np.array(0) for norm in norms}
    check_variables(network.module, network.size, network.convert(arrays | counters))
    # Nothing was left over: a convolution's array in torch is one here, and so is each of a batch-norm's four.
    assert len(jax.tree.leaves(network.convert(arrays))) == len(arrays)


def _is_compressed(leaf):
    return isinstance(leaf, nuqjax.CodebookArray)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_networks_from_a_file_fold_compress_and_apply(name):
    module = {"resnet50": ResNet50(10, 8, (1, 1)), "mobilenet_v2": MobileNetV2(10, _FEW_STAGES[:1])}[name]
    inputs = jnp.asarray(np.random.default_rng(6).normal(size=(2, 32, 32, 3)), jnp.float32)
    variables = draws.variables(module.init, inputs)
    folded, of_folded = nuqjax.fold_batch_norm(module.apply, variables, inputs)
    expected = np.asarray(jax.jit(module.apply)(variables, inputs))
    found = np.asarray(jax.jit(folded)(of_folded, inputs))
    # Rounding alone: sums of at most 147 products, 10 layers deep, errors of either sign.
    rounding = 10 * 147**0.5 * 2**-22 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding)
    cparams = nuqjax.compress(of_folded["params"], bits=8, method="dfp")
    packed = jax.jit(nuqjax.apply(folded))(of_folded | {"params": cparams}, inputs)
    decoded = jax.jit(folded)(of_folded | {"params": nuqjax.decompress(cparams)}, inputs)
    np.testing.assert_allclose(packed, decoded, rtol=0, atol=rounding)
    assert sum(map(_is_compressed, jax.tree.leaves(cparams, is_leaf=_is_compressed))) >= 3


def test_untrained_dense_layers_come_from_the_seed(random_arrays, tmp_path):
    jax.eval_shape(partial(alexnet, random_arrays), jnp.zeros((1, 79, 79, 3)))
    random_arrays.save(tmp_path / "weights" / "alexnet_conv_imagenet.npz")
    params = [networks.load("alexnet", tmp_path, seed)[1]["params"] for seed in (0, 1)]
    assert not np.array_equal(params[0]["Dense_2"]["kernel"], params[1]["Dense_2"]["kernel"])
    for params_of_seed in params:
        np.testing.assert_array_equal(params_of_seed["features"]["Conv_2"]["kernel"], random_arrays["Conv_2/kernel"])


@pytest.mark.parametrize("name", ["efficientnet_lite0", "tiny_darknet", "resnet20", "resnet50", "mobilenet_v2"])
def test_training_mode_gives_new_batch_statistics(name):
    module, inputs = small(name).module, jnp.zeros((2, 32, 32, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    apply = partial(module.apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)})
    _, updated = jax.eval_shape(apply, shapes, inputs)
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(shapes["batch_stats"])


def test_training_mode_updates_every_batch_statistic():
    module = networks.get("resnet20").module
    inputs = jnp.asarray(np.random.default_rng(4).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = draws.variables(module.init, inputs)
    _, updated = jax.jit(partial(module.apply, train=True, mutable=["batch_stats"]))(variables, inputs)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), variables["batch_stats"], updated["batch_stats"])
    assert all(jax.tree.leaves(changed))


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(3, 9), st.integers(3, 9), st.integers(1, 4), st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 3), st.sampled_from(["SAME", "VALID", [(1, 2), (0, 1)]]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_depthwise_as_sum_is_the_convolution(batch, height, width, channels, window, stride, padding, seed):
    if padding == "VALID":
        window = min(window, height, width)
    random = np.random.default_rng(seed)
    pixels = random.integers(-9, 10, (batch, height, width, channels)).astype(np.float32)  # so that sums are exact
    kernel = random.integers(-9, 10, (window, window, 1, channels)).astype(np.float32)
    arguments = (pixels, kernel, (stride, stride), padding)
    options = {
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
        "feature_group_count": channels,
        "precision": None,
    }
    expected = lax.conv_general_dilated(*arguments, **options)
    np.testing.assert_array_equal(depthwise_as_sum(*arguments, **options), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_group_count": 2}, r"not a depthwise convolution: images \(1, 8, 8, 4\), kernel \(3, 3, 1, 4\)"),
        ({"rhs_dilation": (2, 2)}, "no dilation"),
    ],
)
def test_depthwise_as_sum_refuses_what_it_does_not_compute(change, message):
    options = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 4} | change
    with pytest.raises(ValueError, match=message):
        depthwise_as_sum(jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4)), (1, 1), "SAME", **options)


def test_a_network_that_is_unknown_names_the_known():
    with pytest.raises(ValueError, match="unknown network 'resnet21': the known are efficientnet_lite0, tiny_darknet"):
        networks.get("resnet21")


def test_missing_weights_say_where_they_are_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights.resnet20_cifar10\.npz is missing.*NUQJAX_DATA"):
        networks.load("resnet20", tmp_path)


def test_weights_that_do_not_fit_are_listed():
    network = networks.get("resnet20")
    shapes = jax.eval_shape(network.module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    params = dict(shapes["params"])
    params["Dense_0"] = {"kernel": np.zeros((64, 11)), "weight": np.zeros(10)}
    with pytest.raises(ValueError, match="3 arrays do not fit") as error:
        check_variables(network.module, 32, {"params": params, "batch_stats": shapes["batch_stats"]})
    assert "params/Dense_0/kernel: file has (64, 11), network wants (64, 10)" in str(error.value)
    assert "params/Dense_0/bias: file has nothing, network wants (10,)" in str(error.value)
    assert "params/Dense_0/weight: file has (10,), network wants nothing" in str(error.value)


# --- The trained weights.


@pytest.fixture(scope="module")
def reference(data):
    """The data folder's own forward passes."""
    spec = importlib.util.spec_from_file_location("reference", data / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _outputs(function, variables, network, pixels):
    program = jax.jit(function)
    return np.concatenate([np.asarray(program(variables, x))[:n] for x, n in images.batches(network, pixels, 10)])


@pytest.mark.parametrize(
    ("name", "forward", "count"),
    [
        ("efficientnet_lite0", lambda r: lambda w, x: r.efficientnet_lite(w, x, 1.0), 10),
        ("tiny_darknet", lambda r: r.tiny_darknet, 30),
        ("resnet20", lambda r: lambda w, x: r.resnet_cifar(w, x, 3), 100),
    ],
)
def test_trained_networks_choose_as_the_reference_does(name, forward, count, data, reference):
    network = networks.get(name)
    module, variables = networks.load(name, data)
    labelled = images.load_images(network, data, count)
    expected = _outputs(forward(reference), reference.load(name), network, labelled.pixels).argmax(axis=1)
    for function in filter(None, (module, network.cpu_module)):
        chosen = _outputs(function.apply, variables, network, labelled.pixels).argmax(axis=1)
        np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_trained_features_are_those_of_the_reference(name, data, reference):
    network = networks.get(name)
    pixels = images.load_images(network, data, 2).pixels
    expected = _outputs(getattr(reference, f"{name}_features"), reference.load(name), network, pixels)
    features = _outputs(network.trained.apply, networks.load_features(network, data), network, pixels)
    # The same convolutions on the same input: rounding alone, at most 4608 products a sum in float32, 13 deep.
    np.testing.assert_allclose(features, expected, rtol=0, atol=13 * 4608 * 2**-24 * np.abs(expected).max())
