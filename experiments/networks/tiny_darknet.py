"""Tiny Darknet (Redmon, https://pjreddie.com/darknet/tiny-darknet): sixteen convolutions, one million weights."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.networks.network import Arrays, Network, Variables, batch_norm_variables

_LAYERS = (  # channels, kernel size, 2×2 max pooling after the layer
    (16, 3, True), (32, 3, True),
    (16, 1, False), (128, 3, False), (16, 1, False), (128, 3, True),
    (32, 1, False), (256, 3, False), (32, 1, False), (256, 3, True),
    (64, 1, False), (512, 3, False), (64, 1, False), (512, 3, False), (128, 1, False),
)  # fmt: skip


class TinyDarknet(nn.Module):
    """`[B, 224, 224, 3]` to `[B, num_classes]` logits (classes in darknet's own order)."""

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for channels, size, pool in _LAYERS:
            x = nn.Conv(channels, (size, size), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, epsilon=1e-3)(x)
            x = nn.leaky_relu(x, 0.1)
            if pool:
                x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        return jnp.mean(nn.Conv(self.num_classes, (1, 1))(x), axis=(1, 2))


def convert(arrays: Arrays) -> Variables:
    """Keras names, numbered from 1, and HWIO kernels to linen's."""
    params, batch_stats = {}, {}
    for i in range(len(_LAYERS)):
        params[f"Conv_{i}"] = {"kernel": arrays[f"conv2d_{i + 1}/kernel"]}
        params[f"BatchNorm_{i}"], batch_stats[f"BatchNorm_{i}"] = batch_norm_variables(
            *(arrays[f"batch_normalization_{i + 1}/{p}"] for p in ("gamma", "beta", "moving_mean", "moving_variance"))
        )
    last = len(_LAYERS)
    params[f"Conv_{last}"] = {p: arrays[f"conv2d_{last + 1}/{p}"] for p in ("kernel", "bias")}
    return {"params": params, "batch_stats": batch_stats}


TINY_DARKNET = Network(
    name="tiny_darknet",
    title="Tiny Darknet",
    module=TinyDarknet(),
    weights="tiny_darknet_imagenet.npz",
    convert=convert,
    images="imagenet",
    size=224,
    resize=256,
    preprocess=lambda pixels: pixels.astype(np.float32) / 255,
    classes="tiny_darknet_class_order",
)
