"""MobileNetV2 (Sandler et al., arXiv 1801.04381, table 2), with padding and batch-norms as in torchvision."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.networks.efficientnet_lite0 import MBConv, depthwise_as_sum
from experiments.networks.network import Arrays, Network, Variables, conv_and_norm, convs_and_norms, imagenet_normalise

_STAGES = (  # expansion, output channels, repeats, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_EPSILON = 1e-5


class MobileNetV2(nn.Module):
    """`[B, 224, 224, 3]` to `[B, num_classes]` logits.

    Attributes:
      num_classes: number of logits.
      stages: of inverted residuals: expansion, output channels, repeats, stride of the first.
      depthwise_conv: what computes the depthwise convolutions, called like `lax.conv_general_dilated` (None).
    """

    num_classes: int = 1000
    stages: Sequence[tuple[int, int, int, int]] = _STAGES
    depthwise_conv: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, epsilon=_EPSILON)
        x = nn.relu6(norm(name="stem_bn")(conv(32, (3, 3), 2, padding=1, name="stem")(x)))
        number = 0
        for expansion, channels, repeats, first_stride in self.stages:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                block = MBConv(
                    channels,
                    3,
                    stride,
                    expansion,
                    self.depthwise_conv,
                    padding=1,
                    epsilon=_EPSILON,
                    name=f"block{number}",
                )
                x = block(x, train)
                number += 1
        x = nn.relu6(norm(name="head_bn")(conv(1280, (1, 1), name="head")(x)))
        x = nn.Dropout(0.2, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(self.num_classes, name="classifier")(x)


def convert(arrays: Arrays) -> Variables:
    """torchvision's names and OIHW kernels to linen's; as many blocks as there are.

    torchvision numbers the stem, the blocks and the head as `features`. A block is a sequence `conv`, of pairs for the
    layers with an activation, and of the projection and its batch-norm; the first block has nothing to expand.
    """
    params, batch_stats = conv_and_norm(arrays, "features.0.0", "features.0.1", "stem")
    number = 1
    while f"features.{number}.conv.0.0.weight" in arrays:
        prefix, name = f"features.{number}.conv.", f"block{number - 1}"
        paired = ("expand", "depthwise") if f"{prefix}1.0.weight" in arrays else ("depthwise",)
        layers = [(f"{prefix}{i}.0", f"{prefix}{i}.1", layer) for i, layer in enumerate(paired)]
        layers.append((f"{prefix}{len(paired)}", f"{prefix}{len(paired) + 1}", "project"))
        params[name], batch_stats[name] = convs_and_norms(arrays, layers)
        number += 1
    head = conv_and_norm(arrays, f"features.{number}.0", f"features.{number}.1", "head")
    params["classifier"] = {"kernel": arrays["classifier.1.weight"].T, "bias": arrays["classifier.1.bias"]}
    return {"params": params | head[0], "batch_stats": batch_stats | head[1]}


MOBILENET_V2 = Network(
    name="mobilenet_v2",
    title="MobileNetV2",
    module=MobileNetV2(),
    weights="mobilenet_v2_imagenet.npz",
    convert=convert,
    images="imagenet",
    size=224,
    resize=256,  # torchvision's second weights want 232: `--resize`
    preprocess=imagenet_normalise,
    classes="wnids_sorted",
    cpu_module=MobileNetV2(depthwise_conv=depthwise_as_sum),
)
