"""A small network of random weights, and images that differ, for the studies with data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import networks
from experiments.data import images
from experiments.data.images import LabelledImages
from experiments.networks import Network


class Small(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(self.channels, (3, 3), use_bias=False)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


def small_network(channels: int, examples: int) -> tuple[Network, Any, LabelledImages]:
    """Returns the network, its variables, and 8×8 images with labels."""
    made = Network(
        name="small", title="Small", module=Small(channels), weights="", convert=dict, images="cifar10", size=8,
        preprocess=lambda pixels: pixels.astype(np.float32) / 255,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 255, size=(examples, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)
    pixels = np.clip(low + rng.normal(size=(examples, 8, 8, 3)) * 20, 0, 255).astype(np.uint8)
    variables = jax.jit(made.module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return made, variables, LabelledImages(pixels, np.arange(examples) % 10)


def instead_of_data(monkeypatch: pytest.MonkeyPatch, channels: int, examples: int) -> Network:
    """Returns a small network whose weights and images the studies find instead of trained ones."""
    made, variables, labelled = small_network(channels, examples)
    monkeypatch.setattr(images, "load_images", lambda *_: labelled)
    monkeypatch.setattr(networks, "load_features", lambda *_: variables)
    return made
