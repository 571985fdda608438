"""AlexNet in its one-tower form (64-192-384-256-256 channels).

Krizhevsky, *One weird trick for parallelizing convolutional neural networks*, arXiv 1404.5997, section 3.1; layer
sizes and padding as in torchvision.
"""

import jax
from flax import linen as nn

from experiments.networks.network import Arrays, Network, Variables, imagenet_normalise


class AlexNetFeatures(nn.Module):
    """The five convolutions: `[B, 224, 224, 3]` to `[B, 6, 6, 256]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(64, (11, 11), strides=4, padding=2)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = nn.relu(nn.Conv(192, (5, 5), padding=2)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        for channels in (384, 256, 256):
            x = nn.relu(nn.Conv(channels, (3, 3), padding=1)(x))
        return nn.max_pool(x, (3, 3), strides=(2, 2))


class AlexNet(nn.Module):
    """The features and three dense layers: `[B, 224, 224, 3]` to `[B, num_classes]` logits."""

    num_classes: int = 1000
    hidden: int = 4096

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = AlexNetFeatures(name="features")(x)
        x = x.reshape(x.shape[0], -1)
        for units in (self.hidden, self.hidden):
            x = nn.Dropout(0.5, deterministic=not train)(x)
            x = nn.relu(nn.Dense(units)(x))
        return nn.Dense(self.num_classes)(x)


def convert_conv_stack(arrays: Arrays) -> Variables:
    """`Conv_i/kernel` (HWIO) and `Conv_i/bias` as the parameters of a stack of convolutions."""
    params: dict[str, dict] = {}
    for name, array in arrays.items():
        layer, _, parameter = name.partition("/")
        params.setdefault(layer, {})[parameter] = array
    return {"params": params}


ALEXNET = Network(
    name="alexnet",
    title="AlexNet",
    module=AlexNet(),
    weights="alexnet_conv_imagenet.npz",
    convert=convert_conv_stack,
    images="imagenet",
    size=224,
    resize=256,
    preprocess=imagenet_normalise,
    classes="wnids_sorted",
    features=AlexNetFeatures(),
)
