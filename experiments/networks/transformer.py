"""A small transformer, as a language model of characters and as a classifier of image patches; and random stacks."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    """Attention and two dense layers, each after a LayerNorm, added to what came in: `[B, T, D]` to the same."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        y = nn.LayerNorm(name="before_attention")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, mask=mask)
        y = nn.LayerNorm(name="before_dense")(x)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(y))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class Blocks(nn.Module):
    """Blocks one after another and a last LayerNorm: `[B, T, D]` to the same."""

    layers: int
    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.layers):
            x = Block(self.heads, self.causal, name=f"block{layer}")(x)
        return nn.LayerNorm(name="last")(x)


class CharacterModel(nn.Module):
    """`[B, T]` characters' numbers to `[B, T, characters]` logits of the next ones; the table is also the head."""

    characters: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    longest: int = 128

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        table = nn.Embed(self.characters, self.width, name="characters_table")
        places = self.param("places", nn.initializers.normal(0.02), (self.longest, self.width))
        x = table(text) + places[: text.shape[1]]
        return table.attend(Blocks(self.layers, self.heads, causal=True, name="blocks")(x))


class VisionTransformer(nn.Module):
    """`[B, H, W, C]` pixels to `[B, num_classes]` logits: patches, blocks, and the mean over the patches."""

    patch: int = 7
    width: int = 96
    layers: int = 4
    heads: int = 4
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("places", nn.initializers.normal(0.02), (x.shape[1], self.width))
        x = Blocks(self.layers, self.heads, name="blocks")(x)
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=1))
