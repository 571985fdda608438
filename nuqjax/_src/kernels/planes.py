"""Decodes a stored matrix plane by plane, which puts no index beside another of its byte.

The least number of indices that fill whole bytes is P = 8 / gcd(bits, 8), and these take bits / gcd(bits, 8) bytes.
Plane p of a matrix `[O, I]` is `[O, Q]`, Q = ⌈I / P⌉: the values at positions p, p + P, p + 2P… of each channel. All
bits of a plane's indices lie alike in their bytes, so that a plane is decoded by whole vectors. A product with a matrix
is the sum of the products with its planes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nuqjax._src.leaf import packing, rows
from nuqjax._src.leaf.matrix import Layout
from nuqjax._src.leaf.rows import ChannelGroups, InputGroups

MOST_CHOSEN = 4  # bits: a choice takes 2^bits − 1 operations


class Stored(NamedTuple):
    """The arrays of a matrix `[O, I]`, or of a block of it.

    Attributes:
      levels: `[R, K]` floating levels of the whole matrix, in the dtype for the look-up.
      packed: `[o, b]` uint8 of o channels and q positions of every plane.
      scale: `[o, G]` factors of the o channels, or None.
      output: the number of the first channel.
      position: the first position in every plane.
      name: the scope that decoding stands under in profiles.
    """

    levels: jax.Array
    packed: jax.Array
    scale: jax.Array | None
    output: jax.Array | int = 0
    position: jax.Array | int = 0
    name: str = "decode"


def planes_of(layout: Layout) -> tuple[int, int, int]:
    """Returns the number of planes, the bytes that an index of each fill together, and the positions in a plane.

    >>> planes_of(Layout(3, 20, "tensor", 0, ()))
    (8, 3, 3)
    """
    planes, width = packing.period(layout.bits)
    return planes, width, -(-layout.inputs // planes)


def decode_planes(stored: Stored, layout: Layout, *, select: bool = False) -> list[jax.Array]:
    """Decodes the planes of a matrix or a block, in the accuracy of `decode_matrix`: the same values.

    Args:
      stored: the arrays.
      layout: how they stand for the matrix.
      select: choose among 16 levels at most by comparisons of bits instead of reading them from memory, as suits TPUs.
        It takes whole matrices only.

    Returns:
      P arrays `[o, q]`. Positions beyond the matrix's last are 0.
    """
    with jax.named_scope(stored.name):
        planes = enumerate(_indices(stored.packed, layout))
        return [_valued(stored, indices, layout, plane, select) for plane, indices in planes]


def _indices(packed: jax.Array, layout: Layout) -> list[jax.Array]:
    """Returns the int32 indices of each plane, `[o, q]`."""
    mask, (count, width, _) = 2**layout.bits - 1, planes_of(layout)
    padded = jnp.pad(packed, ((0, 0), (0, -packed.shape[1] % width)))
    columns = padded.reshape(packed.shape[0], -1, width).astype(jnp.int32)
    planes = []
    for plane in range(count):
        byte, shift = divmod(plane * layout.bits, 8)
        index = columns[..., byte] >> shift
        if shift + layout.bits > 8:
            index = index | (columns[..., byte + 1] << (8 - shift))
        planes.append(index & mask)
    return planes


def _valued(stored: Stored, indices: jax.Array, layout: Layout, plane: int, select: bool) -> jax.Array:
    """Returns the values of a plane from its indices."""
    if select and layout.bits <= MOST_CHOSEN:
        values = _selected(stored.levels, indices, layout, plane)
    elif layout.granularity == "tensor":
        values = stored.levels[0].at[indices].get(mode="promise_in_bounds")
    else:
        place = _rows(stored, indices.shape, layout, plane) * stored.levels.shape[1] + indices
        values = stored.levels.reshape(-1).at[place].get(mode="promise_in_bounds")
    if stored.scale is not None:
        factors = _spread(stored.scale, layout.scale_group, indices.shape, layout, plane, stored.position)
        values = values * factors.astype(values.dtype)
    values = layout.cast(values)
    if layout.inputs % planes_of(layout)[0]:
        inside = _inputs(stored.position, indices.shape, layout, plane) < layout.inputs
        values = jnp.where(inside, values, jnp.zeros((), values.dtype))
    return values


def _rows(stored: Stored, shape: Sequence[int], layout: Layout, plane: int) -> jax.Array:
    """Returns the codebook of each value of a plane, `[o, q]`."""
    output = stored.output + lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
    input = jnp.minimum(_inputs(stored.position, (1, shape[1]), layout, plane), layout.inputs - 1)
    return rows.row_of(output, input, layout.inputs, layout.granularity)


def _inputs(position: jax.Array | int, shape: Sequence[int], layout: Layout, plane: int) -> jax.Array:
    """Returns the positions in the matrix, `[o, q]`, of a plane's values."""
    return (position + lax.broadcasted_iota(jnp.int32, shape, 1)) * planes_of(layout)[0] + plane


def _spread(
    groups: jax.Array, size: int, shape: Sequence[int], layout: Layout, plane: int, position: jax.Array | int = 0
) -> jax.Array:
    """Returns what stands for each run of `size` values of a channel, `[o, G]`, at a plane's positions, `[o, q]`."""
    if groups.shape[1] == 1:
        return jnp.broadcast_to(groups, shape)
    planes, _, _ = planes_of(layout)
    if size % planes == 0 and isinstance(position, int):
        return jnp.repeat(groups, size // planes, axis=1)[:, position : position + shape[1]]
    input = _inputs(position, (1, shape[1]), layout, plane)[0]
    return groups.at[:, jnp.minimum(input // size, groups.shape[1] - 1)].get(mode="promise_in_bounds")


def _selected(levels: jax.Array, indices: jax.Array, layout: Layout, plane: int) -> jax.Array:
    """Returns the levels of a plane's indices by a tree of choices, one for each bit."""
    chosen = [_of_level(levels[:, k], indices.shape, layout, plane) for k in range(2**layout.bits)]
    for bit in range(layout.bits):
        is_set = (indices & (1 << bit)) != 0
        chosen = [jnp.where(is_set, high, low) for low, high in zip(chosen[::2], chosen[1::2], strict=True)]
    return chosen[0]


def _of_level(level: jax.Array, shape: Sequence[int], layout: Layout, plane: int) -> jax.Array:
    """Returns one level of each codebook, `[R]`, at a plane's values: `[o, q]`."""
    match layout.granularity:
        case "tensor":
            return jnp.broadcast_to(level, shape)
        case "channel":
            return jnp.broadcast_to(level[:, None], shape)
        case ChannelGroups(size):
            return jnp.broadcast_to(jnp.repeat(level, min(size, shape[0]))[: shape[0], None], shape)
        case InputGroups(size):
            return _spread(level.reshape(shape[0], -1), size, shape, layout, plane)
