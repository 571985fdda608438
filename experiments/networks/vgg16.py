"""VGG-16 (Simonyan and Zisserman, arXiv 1409.1556, table 1, configuration D)."""

import jax
from flax import linen as nn

from experiments.networks.alexnet import convert_conv_stack
from experiments.networks.network import Network, imagenet_normalise


class VGG16Features(nn.Module):
    """The thirteen convolutions: `[B, 224, 224, 3]` to `[B, 7, 7, 512]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for depth, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(depth):
                x = nn.relu(nn.Conv(channels, (3, 3), padding=1)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return x


class VGG16(nn.Module):
    """The features and three dense layers: `[B, 224, 224, 3]` to `[B, num_classes]` logits."""

    num_classes: int = 1000
    hidden: int = 4096

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = VGG16Features(name="features")(x)
        x = x.reshape(x.shape[0], -1)
        for units in (self.hidden, self.hidden):
            x = nn.relu(nn.Dense(units)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


VGG16_NETWORK = Network(
    name="vgg16",
    title="VGG-16",
    module=VGG16(),
    weights="vgg16_conv_imagenet.npz",
    convert=convert_conv_stack,
    images="imagenet",
    size=224,
    resize=256,
    preprocess=imagenet_normalise,
    classes="wnids_sorted",
    features=VGG16Features(),
)
