"""Published weights from a local file: torchvision's, Keras' VGG-16, or a network's own layout.

    network, variables = load_file(networks.get("vgg16"), Path("vgg16-397923af.pth"))

Files: `.npz`; `.safetensors`; `.pth` or `.pt` (a state dict; read with `weights_only=True`, which executes no pickled
code; needs torch); `.h5` (needs h5py). Whose layout a file has is told by the names in it; ResNet-50's and
MobileNetV2's own is torchvision's. Nothing is downloaded.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file as load_safetensors

from experiments.networks.network import Arrays, Network, Variables, check_variables, oihw_to_hwio, read_weights

# Number of each layer among torchvision's `features`; those between are ReLUs and poolings.
_TORCHVISION_FEATURES = {
    "alexnet": (0, 3, 6, 8, 10),
    "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
}
_TORCHVISION_CLASSIFIER = {"alexnet": (1, 4, 6), "vgg16": (0, 3, 6)}
_KERAS_VGG16 = tuple(
    f"block{block}_conv{i + 1}" for block, depth in enumerate((2, 2, 3, 3, 3), 1) for i in range(depth)
)
_KERAS_DENSE = ("fc1", "fc2", "predictions")
# Keras 3's `.weights.h5` names layers by class and number: conv2d, conv2d_1, …
_KERAS_NUMBERED = {
    f"{kind}_{i}" if i else kind: layer
    for kind, layers in (("conv2d", _KERAS_VGG16), ("dense", _KERAS_DENSE))
    for i, layer in enumerate(layers)
}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a weights file by name; those of an HDF5 file by their path, `group/…/name`.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: a suffix that is not known, or a package that the file needs is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the weights file {path} is missing")
    if path.suffix == ".npz":
        return read_weights(path)
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    if path.suffix in (".pth", ".pt"):
        return _read_torch(path)
    if path.suffix in (".h5", ".hdf5"):
        return _read_hdf5(path)
    raise ValueError(f"{path}: unknown kind of file: the known are .npz, .safetensors, .pth, .pt, .h5, .hdf5")


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    state = _needed("torch", path).load(path, map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    h5py = _needed("h5py", path)
    arrays: dict[str, np.ndarray] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = np.asarray(item)

    with h5py.File(path) as file:
        file.visititems(keep)
    return arrays


def _needed(package: str, path: Path) -> Any:
    """A package that only this kind of file needs."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: {package} is needed to read it (pip install {package})") from error


def load_file(network: Network, path: Path) -> tuple[Network, Variables]:
    """A network with the weights of a local file.

    Args:
      network: which; it says what the file must hold.
      path: the file.

    Returns:
      The network as these weights want it (complete, or its features alone; with Keras' own preprocessing where they
      are Keras'), and its variables.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it cannot be read, or does not hold the network; every array that does not fit is listed.
    """
    arrays = read_arrays(path)
    converted = _from_torchvision(network, arrays) or _from_keras(network, arrays)
    if converted is None:
        try:
            converted = network, network.convert(arrays)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{path} holds neither {network.title} of torchvision or Keras nor the layout of {network.weights}: "
                f"its arrays are {', '.join(sorted(arrays)[:4])}, …"
            ) from error
    network, variables = converted
    check_variables(network.trained, network.size, variables, network.channels)
    return network, jax.tree.map(jnp.asarray, variables)


def _from_torchvision(network: Network, arrays: Arrays) -> tuple[Network, Variables] | None:
    """A state dict of torchvision's: OIHW convolutions, `[out, in]` dense layers, channels before pixels."""
    layers = _TORCHVISION_FEATURES.get(network.name)
    if layers is None or "features.0.weight" not in arrays:
        return None
    dense = _TORCHVISION_CLASSIFIER[network.name]
    needed = [f"features.{i}" for i in layers] + [f"classifier.{i}" for i in dense]
    _check_names(needed, arrays, ("weight", "bias"), ".")
    features = {
        f"Conv_{i}": {
            "kernel": oihw_to_hwio(arrays[f"features.{number}.weight"]),
            "bias": arrays[f"features.{number}.bias"],
        }
        for i, number in enumerate(layers)
    }
    channels = features[f"Conv_{len(layers) - 1}"]["bias"].size
    params: dict[str, Any] = {"features": features}
    for i, number in enumerate(dense):
        weight = arrays[f"classifier.{number}.weight"]
        if i == 0:  # its inputs are pixels within channels; here they are channels within pixels
            side = round((weight.shape[1] / channels) ** 0.5)
            weight = weight.reshape(-1, channels, side, side).transpose(0, 2, 3, 1).reshape(weight.shape[0], -1)
        params[f"Dense_{i}"] = {"kernel": weight.T, "bias": arrays[f"classifier.{number}.bias"]}
    return dataclasses.replace(network, features=None), {"params": params}


def _from_keras(network: Network, arrays: Arrays) -> tuple[Network, Variables] | None:
    """An HDF5 file of `keras.applications.VGG16`, with or without its top: HWIO, `[in, out]`, channels last."""
    if network.name != "vgg16" or not any(_keras_layer(name) == "block1_conv1" for name in arrays):
        return None
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        found.setdefault(_keras_layer(name), {})["bias" if array.ndim == 1 else "kernel"] = array
    named = {f"{layer}/{name}": array for layer, both in found.items() for name, array in both.items()}
    complete = all(layer in found for layer in _KERAS_DENSE)
    _check_names(_KERAS_VGG16, named, ("kernel", "bias"), "/")
    features = {f"Conv_{i}": found[layer] for i, layer in enumerate(_KERAS_VGG16)}
    network = dataclasses.replace(network, preprocess=caffe_normalise)
    if not complete:
        return network, {"params": features}
    dense = {f"Dense_{i}": found[layer] for i, layer in enumerate(_KERAS_DENSE)}
    return dataclasses.replace(network, features=None), {"params": {"features": features} | dense}


def _keras_layer(name: str) -> str:
    """The layer of an array.

    Its name comes first: `block1_conv1/…/kernel:0` of Keras 2 and 3, `…/block1_conv1_W_1:0` of Keras 1, or after the
    group `model_weights` where a whole model was saved. `layers/conv2d/vars/0` is of Keras 3's `save_weights`.
    """
    first, *rest = name.removeprefix("model_weights/").split("/")
    return _KERAS_NUMBERED.get(rest[0], rest[0]) if first == "layers" and rest else first


def caffe_normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGB to float32 BGR less ImageNet's channel means, as Caffe and Keras' VGG-16 take it."""
    return pixels[..., ::-1].astype(np.float32) - np.array([103.939, 116.779, 123.68], np.float32)


def _check_names(layers: Any, arrays: Arrays, parameters: tuple[str, ...], separator: str) -> None:
    wanted = [f"{layer}{separator}{parameter}" for layer in layers for parameter in parameters]
    if missing := [name for name in wanted if name not in arrays]:
        raise ValueError(f"{len(missing)} arrays are missing from the file: {', '.join(missing)}")
