"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation and with ReLU6 in place of swish.

Tan and Le, *EfficientNet*, arXiv 1905.11946, table 1; the Lite form is that of TensorFlow's
`tpu/models/official/efficientnet/lite`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from experiments.networks.network import Arrays, Network, Variables, convs_and_norms

_STAGES = (  # repeats, kernel size, stride of the first block, expansion, output channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_NUM_BLOCKS = sum(stage[0] for stage in _STAGES)

_EPSILON = 1e-3
_conv = partial(nn.Conv, padding="SAME", use_bias=False)
_batch_norm = partial(nn.BatchNorm, epsilon=_EPSILON)


def depthwise_as_sum(lhs, rhs, window_strides, padding, **options) -> jax.Array:
    """A depthwise convolution as a sum of shifted products, one for each tap of the window.

    XLA on CPUs runs a grouped convolution ten times slower than this. Takes the arguments of
    `lax.conv_general_dilated`, for NHWC images, HWIO kernels, as many groups as channels, and no dilation.

    Args:
      lhs: `[B, H, W, C]` images.
      rhs: `[h, w, 1, C]` kernel.
      window_strides: two strides.
      padding: `"SAME"`, `"VALID"` or a pair for each spatial axis.
      **options: the other options of `lax.conv_general_dilated`; dilations must be 1.

    Returns:
      `[B, H', W', C]`, the same sums in another order of addition.
    """
    if options["feature_group_count"] != lhs.shape[-1] or rhs.shape[2:] != (1, lhs.shape[-1]):
        raise ValueError(f"not a depthwise convolution: images {lhs.shape}, kernel {rhs.shape}")
    if any(d != 1 for name in ("lhs_dilation", "rhs_dilation") for d in options[name]):
        raise ValueError("depthwise_as_sum takes no dilation")
    window, strides = rhs.shape[:2], tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], window, strides, padding)
    lhs = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    last = [(lhs.shape[1 + axis] - window[axis]) // strides[axis] * strides[axis] for axis in (0, 1)]
    taps = [
        lhs[:, i : i + last[0] + 1 : strides[0], j : j + last[1] + 1 : strides[1]] * rhs[i, j, 0]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return sum(taps[1:], start=taps[0])


class MBConv(nn.Module):
    """Inverted residual: expand 1×1, depthwise k×k, project 1×1; added to its input where the shapes agree.

    Attributes:
      channels: of the output.
      kernel_size: of the depthwise convolution, in pixels.
      stride: of the depthwise convolution.
      expansion: channels within over those of the input.
      depthwise_conv: what computes the depthwise convolution, called like `lax.conv_general_dilated` (None).
      padding: of the depthwise convolution.
      epsilon: of the batch-norms.
    """

    channels: int
    kernel_size: int
    stride: int
    expansion: int
    depthwise_conv: Callable | None = None
    padding: str | int = "SAME"
    epsilon: float = _EPSILON

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train, epsilon=self.epsilon)
        shortcut, hidden = x, x.shape[-1] * self.expansion
        if self.expansion != 1:
            x = nn.relu6(norm(name="expand_bn")(_conv(hidden, (1, 1), name="expand")(x)))
        window = (self.kernel_size, self.kernel_size)
        x = _conv(
            hidden,
            window,
            self.stride,
            padding=self.padding,
            feature_group_count=hidden,
            conv_general_dilated=self.depthwise_conv,
            name="depthwise",
        )(x)
        x = nn.relu6(norm(name="depthwise_bn")(x))
        x = norm(name="project_bn")(_conv(self.channels, (1, 1), name="project")(x))
        return x + shortcut if x.shape == shortcut.shape else x


class EfficientNetLite0(nn.Module):
    """`[B, 224, 224, 3]` to `[B, num_classes]` logits.

    Attributes:
      num_classes: number of logits.
      depthwise_conv: what computes the depthwise convolutions, called like `lax.conv_general_dilated` (None).
    """

    num_classes: int = 1000
    depthwise_conv: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = partial(_batch_norm, use_running_average=not train)
        x = nn.relu6(norm(name="stem_bn")(_conv(32, (3, 3), 2, name="stem")(x)))
        number = 0
        for repeats, kernel_size, stride, expansion, channels in _STAGES:
            for repeat in range(repeats):
                x = MBConv(
                    channels,
                    kernel_size,
                    stride if repeat == 0 else 1,
                    expansion,
                    self.depthwise_conv,
                    name=f"block{number}",
                )(x, train)
                number += 1
        x = nn.relu6(norm(name="head_bn")(_conv(1280, (1, 1), name="head")(x)))
        x = nn.Dropout(0.2, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(self.num_classes, name="classifier")(x)


def convert(arrays: Arrays) -> Variables:
    """PyTorch names and OIHW kernels to linen's."""
    ends = [("_conv_stem", "_bn0", "stem"), ("_conv_head", "_bn1", "head")]
    params, batch_stats = convs_and_norms(arrays, ends)
    for i in range(_NUM_BLOCKS):
        source, name = f"_blocks.{i}.", f"block{i}"
        layers = [
            (f"{source}_{layer}_conv", f"{source}_bn{number}", layer)
            for number, layer in enumerate(("expand", "depthwise", "project"))
            if f"{source}_{layer}_conv.weight" in arrays  # the first block has nothing to expand
        ]
        params[name], batch_stats[name] = convs_and_norms(arrays, layers)
    params["classifier"] = {"kernel": arrays["_fc.weight"].T, "bias": arrays["_fc.bias"]}
    return {"params": params, "batch_stats": batch_stats}


EFFICIENTNET_LITE0 = Network(
    name="efficientnet_lite0",
    title="EfficientNet-Lite0",
    module=EfficientNetLite0(),
    weights="efficientnet_lite0_imagenet.npz",
    convert=convert,
    images="imagenet",
    size=224,
    resize=256,
    preprocess=lambda pixels: (pixels.astype(np.float32) - 127) / 128,
    classes="wnids_sorted",
    cpu_module=EfficientNetLite0(depthwise_conv=depthwise_as_sum),
)
