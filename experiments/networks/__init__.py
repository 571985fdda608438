"""Trained networks as Flax linen modules, and the registry of what is needed to run them."""

from pathlib import Path

from flax import linen as nn

from experiments.networks.alexnet import ALEXNET, AlexNet, AlexNetFeatures
from experiments.networks.efficientnet_lite0 import EFFICIENTNET_LITE0, EfficientNetLite0
from experiments.networks.fashion_mnist import LENET5, MLP, MLP_1024, LeNet5
from experiments.networks.mobilenet_v2 import MOBILENET_V2, MobileNetV2
from experiments.networks.network import Network, Variables, load_complete, load_features
from experiments.networks.resnet20 import RESNET20, ResNet20
from experiments.networks.resnet50 import RESNET50, ResNet50
from experiments.networks.tiny_darknet import TINY_DARKNET, TinyDarknet
from experiments.networks.vgg16 import VGG16, VGG16_NETWORK, VGG16Features

NETWORKS = {network.name: network for network in (EFFICIENTNET_LITE0, TINY_DARKNET, RESNET20, ALEXNET, VGG16_NETWORK)}

# Networks whose published weights come from a local file (`--weights`, `networks.importing`).
FROM_FILE = {network.name: network for network in (RESNET50, MOBILENET_V2)}

# Networks whose weights `experiments.studies.train` makes; the data folder holds none.
TRAINED_IN_PLACE = {network.name: network for network in (LENET5, MLP_1024)}


def get(name: str) -> Network:
    """The network of that name.

    Raises:
      ValueError: there is none; the message lists the known.

    >>> get("resnet20").size
    32
    """
    known = NETWORKS | FROM_FILE | TRAINED_IN_PLACE
    if name not in known:
        raise ValueError(f"unknown network {name!r}: the known are {', '.join(known)}")
    return known[name]


def load(name: str, data: Path | str, seed: int = 0) -> tuple[nn.Module, Variables]:
    """A complete network and its variables, from the folder `data` with `weights/` in it.

    Of AlexNet and VGG-16 only the convolutions are trained: their **dense layers are initialised from `seed`**, so
    that sizes, timings and memory are right and the logits mean nothing. `load_features` gives the trained part alone.
    """
    network = get(name)
    return network.module, load_complete(network, data, seed)


__all__ = [
    "FROM_FILE",
    "MLP",
    "NETWORKS",
    "TRAINED_IN_PLACE",
    "VGG16",
    "AlexNet",
    "AlexNetFeatures",
    "EfficientNetLite0",
    "LeNet5",
    "MobileNetV2",
    "Network",
    "ResNet20",
    "ResNet50",
    "TinyDarknet",
    "VGG16Features",
    "get",
    "load",
    "load_complete",
    "load_features",
]
