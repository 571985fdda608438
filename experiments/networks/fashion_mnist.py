"""Two small networks for 28×28 grey images that `experiments.studies.train` trains: LeNet-5, and dense layers alone.

LeNet-5 has the layer sizes of LeCun et al., *Gradient-based learning applied to document recognition* (1998), section
II.B, with what is usual today in place of its own: ReLU, max-pooling, every map connected, plain logits.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn

from experiments.networks.alexnet import convert_conv_stack
from experiments.networks.network import Network


class LeNet5(nn.Module):
    """`[B, 28, 28, 1]` to `[B, num_classes]` logits."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(6, (5, 5), padding=2)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(16, (5, 5), padding="VALID")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for units in (120, 84):
            x = nn.relu(nn.Dense(units)(x))
        return nn.Dense(self.num_classes)(x)


class MLP(nn.Module):
    """Dense layers with ReLU between them: `[B, 28, 28, 1]` to `[B, num_classes]` logits."""

    hidden: Sequence[int] = (1024, 1024)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
        return nn.Dense(self.num_classes)(x)


def _network(name: str, title: str, module: nn.Module) -> Network:
    return Network(
        name=name,
        title=title,
        module=module,
        weights=f"{name}_fashion_mnist.npz",
        convert=convert_conv_stack,  # the file holds `Layer_i/parameter` in Flax's own layout
        images="fashion_mnist",
        size=28,
        preprocess=lambda pixels: pixels.astype(np.float32) / 255 - np.float32(0.5),
        channels=1,
    )


LENET5 = _network("lenet5", "LeNet-5", LeNet5())
MLP_1024 = _network("mlp", "MLP 784-1024-1024-10", MLP())
