"""ResNet-50 (He et al., arXiv 1512.03385, table 1), with the stride in a block's 3×3 convolution as in torchvision."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.networks.network import Arrays, Network, Variables, conv_and_norm, convs_and_norms, imagenet_normalise

_BLOCKS = (3, 4, 6, 3)  # of each stage; every stage but the first begins by halving the resolution
_EXPANSION = 4  # channels of a block's output over those within


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut, which is projected where the shapes differ (option B)."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def layer(x: jax.Array, channels: int, size: int, stride: int, name: str) -> jax.Array:
            x = nn.Conv(channels, (size, size), stride, padding=size // 2, use_bias=False, name=name)(x)
            return nn.BatchNorm(use_running_average=not train, name=f"{name}_bn")(x)

        outputs, shortcut = self.channels * _EXPANSION, x
        if x.shape[-1] != outputs or self.stride != 1:
            shortcut = layer(x, outputs, 1, self.stride, "downsample")
        x = nn.relu(layer(x, self.channels, 1, 1, "conv1"))
        x = nn.relu(layer(x, self.channels, 3, self.stride, "conv2"))
        return nn.relu(layer(x, outputs, 1, 1, "conv3") + shortcut)


class ResNet50(nn.Module):
    """`[B, 224, 224, 3]` to `[B, num_classes]` logits.

    Attributes:
      num_classes: number of logits.
      width: channels of the first convolution.
      blocks: of each stage.
    """

    num_classes: int = 1000
    width: int = 64
    blocks: Sequence[int] = _BLOCKS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.width, (7, 7), 2, padding=3, use_bias=False, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="conv1_bn")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.width << stage, stride, name=f"layer{stage + 1}_{block}")(x, train)
        return nn.Dense(self.num_classes, name="fc")(jnp.mean(x, axis=(1, 2)))


def convert(arrays: Arrays) -> Variables:
    """torchvision's names and OIHW kernels to linen's; as many blocks as there are."""
    params, batch_stats = conv_and_norm(arrays, "conv1", "bn1", "conv1")
    for stage in range(1, len(_BLOCKS) + 1):
        block = 0
        while (prefix := f"layer{stage}.{block}.") + "conv1.weight" in arrays:
            layers = [(f"{prefix}conv{i}", f"{prefix}bn{i}", f"conv{i}") for i in (1, 2, 3)]
            if f"{prefix}downsample.0.weight" in arrays:
                layers.append((f"{prefix}downsample.0", f"{prefix}downsample.1", "downsample"))
            name = f"layer{stage}_{block}"
            params[name], batch_stats[name] = convs_and_norms(arrays, layers)
            block += 1
    params["fc"] = {"kernel": arrays["fc.weight"].T, "bias": arrays["fc.bias"]}
    return {"params": params, "batch_stats": batch_stats}


RESNET50 = Network(
    name="resnet50",
    title="ResNet-50",
    module=ResNet50(),
    weights="resnet50_imagenet.npz",
    convert=convert,
    images="imagenet",
    size=224,
    resize=256,  # torchvision's second weights want 232: `--resize`
    preprocess=imagenet_normalise,
    classes="wnids_sorted",
)
