"""What an experiment has to know about a trained network, and the reading of its weights file."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

Arrays = Mapping[str, np.ndarray]
Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network architecture with trained weights, and the input its weights were trained on.

    Attributes:
      name: the name on the command line.
      title: the name in tables.
      module: the complete linen module: `[B, size, size, channels]` float32 to `[B, num_classes]` logits.
      weights: name of the weights file.
      convert: arrays of the weights file to linen variables, of the trained parts alone.
      images: name of the data set: `"imagenet"`, `"cifar10"`, or one that the data folder does not hold.
      size: height and width of the input in pixels.
      preprocess: uint8 `[B, size, size, channels]` to the network's float32 input.
      classes: the key in `imagenet_classes.json` of the order of the logits; None where labels are class numbers.
      features: the convolutional part alone, where only that is trained; None for a complete network.
      cpu_module: `module` computed in a way that is faster on CPUs, of the same variables; None if it is so already.
      channels: 3 for RGB, 1 for grey.
      resize: length of an image's shorter side, in pixels, before its centre is cut out; None takes it as it is.
    """

    name: str
    title: str
    module: nn.Module
    weights: str
    convert: Callable[[Arrays], Variables]
    images: str
    size: int
    preprocess: Callable[[np.ndarray], np.ndarray]
    classes: str | None = None
    features: nn.Module | None = None
    cpu_module: nn.Module | None = None
    channels: int = 3
    resize: int | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.size, self.size, self.channels

    @property
    def complete(self) -> bool:
        """Whether the weights file holds every layer, so that the logits mean something."""
        return self.features is None

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters all come from the weights file: the whole network or its features."""
        return self.module if self.features is None else self.features

    @property
    def fastest(self) -> nn.Module:
        """The trained module, in the form that suits the platform."""
        on_cpu = jax.default_backend() == "cpu"
        return self.cpu_module if on_cpu and self.cpu_module is not None else self.trained


def imagenet_normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGB to float32: divided by 255, then ImageNet's channel means and deviations (as torchvision does)."""
    mean, deviation = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    return (pixels.astype(np.float32) / 255 - mean) / deviation


def oihw_to_hwio(kernel: np.ndarray) -> np.ndarray:
    """PyTorch's kernel layout `[out, in, height, width]` to Flax's `[height, width, in, out]`."""
    return np.transpose(kernel, (2, 3, 1, 0))


def batch_norm_variables(scale, bias, mean, var) -> tuple[dict, dict]:
    """The `params` and the `batch_stats` of one `nn.BatchNorm`."""
    return {"scale": scale, "bias": bias}, {"mean": mean, "var": var}


def conv_and_norm(arrays: Arrays, conv: str, norm: str, name: str) -> tuple[dict, dict]:
    """The `params` and the `batch_stats` of `name` and `{name}_bn`: a convolution without bias, then a batch-norm.

    Args:
      arrays: PyTorch's, kernels in OIHW.
      conv: the convolution's name in them.
      norm: the batch-norm's.
      name: linen's name of the convolution.
    """
    of_norm = (arrays[f"{norm}.{p}"] for p in ("weight", "bias", "running_mean", "running_var"))
    params, stats = batch_norm_variables(*of_norm)
    kernel = oihw_to_hwio(arrays[f"{conv}.weight"])
    return {name: {"kernel": kernel}, f"{name}_bn": params}, {f"{name}_bn": stats}


def convs_and_norms(arrays: Arrays, layers: Iterable[tuple[str, str, str]]) -> tuple[dict, dict]:
    """The `params` and the `batch_stats` of several of them, each as `conv_and_norm` wants it: `(conv, norm, name)`."""
    params, batch_stats = {}, {}
    for layer in layers:
        of_layer = conv_and_norm(arrays, *layer)
        params |= of_layer[0]
        batch_stats |= of_layer[1]
    return params, batch_stats


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a weights file (`.npz`).

    Raises:
      FileNotFoundError: the file is missing; the message says where it is looked for.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights file {path} is missing: give the data folder, which holds weights/ and images/, with --data "
            "or the environment variable NUQJAX_DATA"
        )
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def check_variables(module: nn.Module, size: int, variables: Variables, channels: int = 3) -> None:
    """Checks converted variables against what `module` would create.

    Raises:
      ValueError: a parameter is missing, unknown to the module, or has another shape; each is listed by path.
    """
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, channels)))
    expected = {path: leaf.shape for path, leaf in _flatten(shapes)}
    given = {path: np.shape(leaf) for path, leaf in _flatten(variables)}
    if expected != given:
        wrong = [
            f"{path}: file has {given.get(path, 'nothing')}, network wants {expected.get(path, 'nothing')}"
            for path in sorted(expected.keys() | given.keys())
            if expected.get(path) != given.get(path)
        ]
        raise ValueError(f"{type(module).__name__}: {len(wrong)} arrays do not fit\n  " + "\n  ".join(wrong))


def _flatten(variables: Variables) -> Iterator[tuple[str, Any]]:
    return iter(traverse_util.flatten_dict(variables, sep="/").items())


def load_features(network: Network, data: Path | str) -> Variables:
    """Variables of `network.trained`: every one of them read from the weights file in `data`."""
    variables = network.convert(read_weights(Path(data) / "weights" / network.weights))
    check_variables(network.trained, network.size, variables, network.channels)
    return jax.tree.map(jnp.asarray, variables)


def load_complete(network: Network, data: Path | str, seed: int = 0) -> Variables:
    """Variables of `network.module`.

    Where the file holds the features alone (`not network.complete`), the dense layers are **initialised from `seed`,
    not trained**: right for sizes, timings and memory; their logits mean nothing.
    """
    variables = load_features(network, data)
    if network.complete:
        return variables
    params = _initial(network.module, jax.random.key(seed), jnp.zeros((1, *network.input_shape)))["params"]
    return {"params": params | {"features": variables["params"]}}


@functools.partial(jax.jit, static_argnums=0)
def _initial(module: nn.Module, key: jax.Array, inputs: jax.Array) -> Any:
    """A module's variables, compiled once for all seeds."""
    return module.init(key, inputs)
