"""ResNet-20 for CIFAR-10 (He et al., arXiv 1512.03385, section 4.2): identity shortcuts, zero-padded channels."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.networks.network import (
    Arrays,
    Network,
    Variables,
    batch_norm_variables,
    imagenet_normalise,
    oihw_to_hwio,
)

_BLOCKS_PER_STAGE = 3
_STAGES = (16, 32, 64)  # channels; every stage but the first begins by halving the resolution


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters (option A of the paper)."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shortcut = x[:, :: self.stride, :: self.stride]
        padding = (self.channels - x.shape[-1]) // 2
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (padding, padding)))
        x = nn.Conv(self.channels, (3, 3), self.stride, padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(self.channels, (3, 3), padding=1, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.relu(x + shortcut)


class ResNet20(nn.Module):
    """`[B, 32, 32, 3]` to `[B, num_classes]` logits."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(_STAGES[0], (3, 3), padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        for stage, channels in enumerate(_STAGES):
            for block in range(_BLOCKS_PER_STAGE):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(channels, stride, name=f"stage{stage + 1}_block{block}")(x, train)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


def convert(arrays: Arrays) -> Variables:
    """PyTorch names and OIHW kernels to linen's."""

    def conv_and_norm(prefix: str, number: int) -> tuple[dict, dict]:
        norm = (arrays[f"{prefix}bn{number}.{p}"] for p in ("weight", "bias", "running_mean", "running_var"))
        params, stats = batch_norm_variables(*norm)
        index = number - 1
        kernel = oihw_to_hwio(arrays[f"{prefix}conv{number}.weight"])
        return {f"Conv_{index}": {"kernel": kernel}, f"BatchNorm_{index}": params}, {f"BatchNorm_{index}": stats}

    params, batch_stats = conv_and_norm("", 1)
    for stage in range(1, len(_STAGES) + 1):
        for block in range(_BLOCKS_PER_STAGE):
            halves = [conv_and_norm(f"layer{stage}.{block}.", number) for number in (1, 2)]
            name = f"stage{stage}_block{block}"
            params[name] = halves[0][0] | halves[1][0]
            batch_stats[name] = halves[0][1] | halves[1][1]
    params["Dense_0"] = {"kernel": arrays["linear.weight"].T, "bias": arrays["linear.bias"]}
    return {"params": params, "batch_stats": batch_stats}


RESNET20 = Network(
    name="resnet20",
    title="ResNet-20",
    module=ResNet20(),
    weights="resnet20_cifar10.npz",
    convert=convert,
    images="cifar10",
    size=32,
    preprocess=imagenet_normalise,
)
