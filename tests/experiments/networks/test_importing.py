"""Published weights, in every file they come in, give the logits that their own framework gives."""

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from safetensors.numpy import save_file

from experiments import networks
from experiments.networks import VGG16, AlexNet
from experiments.networks.importing import load_file, read_arrays
from experiments.studies import train
from tests import draws

HIDDEN, CLASSES = 16, 10  # narrow dense layers, so that the test is quick
SMALL = {
    "alexnet": replace(networks.get("alexnet"), module=AlexNet(CLASSES, HIDDEN)),
    "vgg16": replace(networks.get("vgg16"), module=VGG16(CLASSES, HIDDEN)),
}
# Layers as torchvision numbers them: (outputs, kernel, stride, padding) or "pool"; every convolution has a ReLU.
FEATURES = {
    "alexnet": [(64, 11, 4, 2), "pool", (192, 5, 1, 2), "pool", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), "pool"],
    "vgg16": [
        layer
        for depth, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
        for layer in [(channels, 3, 1, 1)] * depth + ["pool"]
    ],
}
WINDOW = {"alexnet": 3, "vgg16": 2}  # pixels of a pooling's window, two apart
SIDE = {"alexnet": 6, "vgg16": 7}  # of the last feature map
CLASSIFIER = {"alexnet": (1, 4, 6), "vgg16": (0, 3, 6)}
names = pytest.mark.parametrize("name", SMALL)


def numbered(name):
    """The convolutions with the numbers that their place among ReLUs and poolings gives them."""
    number = 0
    for layer in FEATURES[name]:
        if layer == "pool":
            number += 1
        else:
            yield number, layer
            number += 2


def state_dict(name, seed=0):
    """Random weights as torchvision names and lays them out."""
    random = np.random.default_rng(seed)
    arrays, inputs = {}, 3
    for number, (outputs, kernel, _, _) in numbered(name):
        scale = (2 / (inputs * kernel * kernel)) ** 0.5
        arrays[f"features.{number}.weight"] = random.normal(0, scale, (outputs, inputs, kernel, kernel))
        arrays[f"features.{number}.bias"] = random.normal(0, 0.1, outputs)
        inputs = outputs
    inputs *= SIDE[name] ** 2
    for number, outputs in zip(CLASSIFIER[name], (HIDDEN, HIDDEN, CLASSES), strict=True):
        arrays[f"classifier.{number}.weight"] = random.normal(0, (2 / inputs) ** 0.5, (outputs, inputs))
        arrays[f"classifier.{number}.bias"] = random.normal(0, 0.1, outputs)
        inputs = outputs
    return {key: array.astype(np.float32) for key, array in arrays.items()}


def torch_forward(arrays, name, images):
    """The network in torch's own layers, at inference: `[B, 3, H, W]` to logits."""
    torch = pytest.importorskip("torch")
    layers = []
    for layer in FEATURES[name]:
        if layer == "pool":
            layers.append(torch.nn.MaxPool2d(WINDOW[name], 2))
        else:
            outputs, kernel, stride, padding = layer
            layers += [torch.nn.LazyConv2d(outputs, kernel, stride, padding), torch.nn.ReLU()]
    dense = [torch.nn.Dropout(), torch.nn.Linear(1, 1), torch.nn.ReLU()] if name == "alexnet" else []
    size = 256 * 36 if name == "alexnet" else 512 * 49
    linear = [torch.nn.Linear(size, HIDDEN), torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, CLASSES)]
    relu, drop = torch.nn.ReLU, torch.nn.Dropout
    dense = {
        "alexnet": [drop(), linear[0], relu(), drop(), linear[1], relu(), linear[2]],
        "vgg16": [linear[0], relu(), drop(), linear[1], relu(), drop(), linear[2]],
    }[name]
    model = torch.nn.Module()
    model.features, model.classifier = torch.nn.Sequential(*layers), torch.nn.Sequential(*dense)
    model.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
    model.eval()
    with torch.no_grad():
        features = torch.nn.functional.adaptive_avg_pool2d(model.features(torch.from_numpy(images)), SIDE[name])
        return model.classifier(features.flatten(1)).numpy()


def own_forward(arrays, name, images):
    """The same in XLA's operations, channels first as torch has them."""
    x = jnp.asarray(images)
    numbers = iter(numbered(name))
    for layer in FEATURES[name]:
        if layer == "pool":
            window = (1, 1, WINDOW[name], WINDOW[name])
            x = lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 1, 2, 2), "VALID")
            continue
        number, (_, _, stride, padding) = next(numbers)
        dimensions = ("NCHW", "OIHW", "NCHW")
        kernel = arrays[f"features.{number}.weight"]
        x = lax.conv_general_dilated(
            x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=dimensions
        )
        x = jax.nn.relu(x + arrays[f"features.{number}.bias"][:, None, None])
    x = x.reshape(len(x), -1)
    for place, number in enumerate(CLASSIFIER[name]):
        x = x @ arrays[f"classifier.{number}.weight"].T + arrays[f"classifier.{number}.bias"]
        x = jax.nn.relu(x) if place < 2 else x
    return x


def inputs():
    return np.random.default_rng(9).normal(size=(1, 224, 224, 3)).astype(np.float32)


def close(found, expected):
    """Rounding alone: sums of at most 25,088 products in float32, at most 16 layers deep, errors of either sign."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=16 * 25_088**0.5 * 2**-22 * np.abs(expected).max())


@names
def test_a_state_dict_gives_torch_s_logits(name, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = state_dict(name)
    torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, tmp_path / "weights.pth")
    network, variables = load_file(SMALL[name], tmp_path / "weights.pth")
    assert network.complete
    images = inputs()
    expected = torch_forward(arrays, name, np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    close(jax.jit(network.trained.apply)(variables, images), expected)


@names
def test_the_same_without_torch(name, tmp_path):
    arrays = state_dict(name)
    save_file(arrays, tmp_path / "weights.safetensors")
    np.savez(tmp_path / "weights.npz", **arrays)
    network, variables = load_file(SMALL[name], tmp_path / "weights.safetensors")
    assert network.complete
    images = inputs()
    expected = jax.jit(lambda x: own_forward(arrays, name, x))(images.transpose(0, 3, 1, 2))
    close(jax.jit(network.trained.apply)(variables, images), np.asarray(expected))
    again = load_file(SMALL[name], tmp_path / "weights.npz")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), variables, again))


def torch_resnet50(torch):
    """torchvision's ResNet-50, said again in torch's layers."""
    nn = torch.nn

    def conv(inputs, outputs, size, stride=1):
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)

    class Bottleneck(nn.Module):
        def __init__(self, inputs, channels, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(inputs, channels, 1), nn.BatchNorm2d(channels)
            self.conv2, self.bn2 = conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
            self.conv3, self.bn3 = conv(channels, 4 * channels, 1), nn.BatchNorm2d(4 * channels)
            self.downsample = None
            if stride != 1 or inputs != 4 * channels:
                self.downsample = nn.Sequential(conv(inputs, 4 * channels, 1, stride), nn.BatchNorm2d(4 * channels))

        def forward(self, x):
            y = self.bn1(self.conv1(x)).relu()
            y = self.bn2(self.conv2(y)).relu()
            return (self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))).relu()

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            inputs = 64
            for stage, depth in enumerate((3, 4, 6, 3)):
                blocks = []
                for block in range(depth):
                    blocks.append(Bottleneck(inputs, 64 << stage, 2 if stage > 0 and block == 0 else 1))
                    inputs = 256 << stage
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(inputs, 1000)

        def forward(self, x):
            x = self.maxpool(self.bn1(self.conv1(x)).relu())
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    return ResNet()


def torch_mobilenet_v2(torch):
    """torchvision's MobileNetV2, said again in torch's layers."""
    nn = torch.nn

    def layer(inputs, outputs, size, stride=1, groups=1):
        conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())

    class InvertedResidual(nn.Module):
        def __init__(self, inputs, outputs, stride, expansion):
            super().__init__()
            hidden = inputs * expansion
            self.adds = stride == 1 and inputs == outputs
            layers = [] if expansion == 1 else [layer(inputs, hidden, 1)]
            layers += [layer(hidden, hidden, 3, stride, hidden), nn.Conv2d(hidden, outputs, 1, bias=False)]
            self.conv = nn.Sequential(*layers, nn.BatchNorm2d(outputs))

        def forward(self, x):
            return x + self.conv(x) if self.adds else self.conv(x)

    class MobileNetV2(nn.Module):
        def __init__(self):
            super().__init__()
            layers, inputs = [layer(3, 32, 3, 2)], 32
            stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
            for expansion, outputs, depth, stride in [*stages, (6, 160, 3, 2), (6, 320, 1, 1)]:
                for block in range(depth):
                    layers.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion))
                    inputs = outputs
            self.features = nn.Sequential(*layers, layer(inputs, 1280, 1))
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    return MobileNetV2()


@pytest.mark.parametrize(("name", "build"), [("resnet50", torch_resnet50), ("mobilenet_v2", torch_mobilenet_v2)])
def test_a_state_dict_with_batch_norms_gives_torch_s_logits(name, build, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(7)
    model = build(torch).eval()
    for norm in model.modules():  # as training would leave them: no two statistics the same
        if isinstance(norm, torch.nn.BatchNorm2d):
            for tensor in (norm.weight, norm.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                torch.nn.init.uniform_(tensor, -0.5, 0.5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network, variables = load_file(networks.get(name), tmp_path / "weights.pth")
    assert network.complete
    images = np.random.default_rng(9).normal(size=(2, 96, 96, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))).numpy()
    for module in filter(None, (network.trained, network.cpu_module)):
        found = jax.jit(module.apply)(variables, images)
        # Rounding alone: sums of at most 4608 products in float32, at most 54 layers deep, errors of either sign.
        np.testing.assert_allclose(found, expected, rtol=0, atol=54 * 4608**0.5 * 2**-22 * np.abs(expected).max())


def keras_names(top=True):
    """VGG-16's layers as Keras names them."""
    blocks = [(f"block{b}_conv{i}", None) for b, depth in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, depth + 1)]
    return [name for name, _ in blocks] + (["fc1", "fc2", "predictions"] if top else [])


KERAS_FILES = {  # the kernel's and the bias's places; {0} is the layer, {1} its class and number
    "keras 1": ("{0}/{0}_W_1:0", "{0}/{0}_b_1:0"),
    "keras 2": ("{0}/{0}/kernel:0", "{0}/{0}/bias:0"),
    "keras 3, a model": ("model_weights/{0}/{0}/kernel", "model_weights/{0}/{0}/bias"),
    "keras 3, weights": ("layers/{1}/vars/0", "layers/{1}/vars/1"),
}


@pytest.mark.parametrize(("kernel", "bias"), KERAS_FILES.values(), ids=list(KERAS_FILES))
@pytest.mark.parametrize("top", [True, False])
def test_keras_files_of_vgg16(kernel, bias, top, tmp_path):
    h5py = pytest.importorskip("h5py")
    module = SMALL["vgg16"].module
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    layers = [shapes["features"][f"Conv_{i}"] for i in range(13)] + [shapes[f"Dense_{i}"] for i in range(3)]
    random = np.random.default_rng(3)
    written = {}
    with h5py.File(tmp_path / "vgg16.h5", "w") as file:
        for i, (layer, shape) in enumerate(zip(keras_names(top), layers, strict=False)):
            written[layer] = {key: random.normal(size=leaf.shape).astype(np.float32) for key, leaf in shape.items()}
            numbered = (f"conv2d_{i}" if i < 13 else f"dense_{i - 13}").removesuffix("_0")
            file[kernel.format(layer, numbered)] = written[layer]["kernel"]
            file[bias.format(layer, numbered)] = written[layer]["bias"]
        file.create_group("block1_pool")
    network, variables = load_file(SMALL["vgg16"], tmp_path / "vgg16.h5")
    assert network.complete == top
    params = variables["params"]
    features = params["features"] if top else params
    for i, layer in enumerate(keras_names(top=False)):
        for key, array in written[layer].items():
            np.testing.assert_array_equal(features[f"Conv_{i}"][key], array)
    for i, layer in enumerate(("fc1", "fc2", "predictions") if top else ()):
        np.testing.assert_array_equal(params[f"Dense_{i}"]["kernel"], written[layer]["kernel"])
    pixels = np.array([[[[255, 0, 128]]]], np.uint8)
    np.testing.assert_allclose(network.preprocess(pixels)[0, 0, 0], [128 - 103.939, -116.779, 255 - 123.68], rtol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Keras in NumPy
@pytest.mark.parametrize("file", ["vgg16.weights.h5", "vgg16.h5"], ids=["weights", "model"])
def test_keras_own_vgg16_gives_its_logits(file, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="Keras itself is asked: pip install keras")
    pytest.importorskip("h5py")
    side = 64  # so that the first dense layer is small, and still sees more than one pixel
    keras.utils.set_random_seed(3)
    model = keras.applications.VGG16(
        weights=None, input_shape=(side, side, 3), classes=CLASSES, classifier_activation=None
    )
    random = np.random.default_rng(4)
    for layer in model.layers:
        if layer.weights:
            kernel, bias = layer.get_weights()
            layer.set_weights([kernel, random.normal(0, 0.1, bias.shape)])
    (model.save_weights if "weights" in file else model.save)(tmp_path / file)
    wanted = replace(networks.get("vgg16"), module=VGG16(CLASSES), size=side)
    network, variables = load_file(wanted, tmp_path / file)
    assert network.complete
    pixels = random.integers(0, 256, (2, side, side, 3), np.uint8)
    inputs = network.preprocess(pixels)
    np.testing.assert_allclose(
        inputs, keras.applications.vgg16.preprocess_input(pixels.astype(np.float32)), rtol=0, atol=255 * 2**-23
    )
    expected = np.asarray(model(inputs))
    close(jax.jit(network.trained.apply)(variables, inputs), expected)


def test_the_data_folders_own_layout_is_read_too(tmp_path):
    network = networks.get("lenet5")
    variables = draws.variables(network.module.init, jnp.zeros((1, 28, 28, 1)))
    train.save(variables, tmp_path / "lenet5.npz")
    found = load_file(network, tmp_path / "lenet5.npz")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), variables, found))


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_code_in_a_pickle_is_not_executed(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Malicious()}, tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_file(SMALL["alexnet"], tmp_path / "weights.pth")
    assert not Path("executed").exists()


def test_what_does_not_fit_is_listed(tmp_path):
    arrays = state_dict("alexnet")
    wrong = arrays | {"classifier.6.bias": np.zeros(11, np.float32)}
    save_file(wrong, tmp_path / "shape.safetensors")
    with pytest.raises(ValueError, match=r"Dense_2/bias: file has \(11,\), network wants \(10,\)"):
        load_file(SMALL["alexnet"], tmp_path / "shape.safetensors")
    del arrays["features.3.bias"]
    save_file(arrays, tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"1 arrays are missing from the file: features\.3\.bias"):
        load_file(SMALL["alexnet"], tmp_path / "missing.safetensors")
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    for name in ("resnet20", "alexnet", "vgg16"):
        with pytest.raises(ValueError, match=r"arrays do not fit|holds neither"):
            load_file(networks.get(name), tmp_path / "other.safetensors")


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the weights file nowhere\.pth is missing"):
        read_arrays(Path("nowhere.pth"))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unknown kind of file: the known are \.npz, \.safetensors"):
        read_arrays(tmp_path / "weights.bin")


@pytest.mark.parametrize(("package", "name"), [("torch", "weights.pth"), ("h5py", "weights.h5")])
def test_a_package_that_is_not_installed_is_asked_for(package, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{package} is needed to read it \(pip install {package}\)"):
        read_arrays(tmp_path / name)


def test_hidden_sizes_are_the_published_ones_by_default():
    for name in SMALL:
        module: nn.Module = networks.get(name).module
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
        assert shapes["Dense_1"]["kernel"].shape == (4096, 4096)
