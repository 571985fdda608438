"""Packs indices into exactly `bits` bits each, and unpacks them.

Index i of a row occupies the bits from i·bits to (i + 1)·bits − 1 of that row, counted from the least significant bit
of its first byte. A row is padded with zero bits only at its end, to a whole byte. `pack` and `unpack` accept JAX and
NumPy arrays.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.leaf.rows import namespace
from nuqjax._src.platform.types import A


def packed_size(count: int, bits: int) -> int:
    """Returns the bytes that a row of `count` indices of `bits` bits occupies.

    >>> packed_size(5, 3)
    2
    """
    return -(-count * bits // 8)


def period(bits: int) -> tuple[int, int]:
    """Returns the least number of indices that fill whole bytes, and the number of these bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def pack(indices: A, bits: int) -> A:
    """Packs indices along the last axis.

    Args:
      indices: `[…, N]` uint8, each below 2^bits.
      bits: 1 to 8.

    Returns:
      `[…, ⌈N·bits / 8⌉]` uint8.

    >>> import jax.numpy as jnp
    >>> pack(jnp.array([1, 2, 3], jnp.uint8), 4).tolist()
    [33, 3]
    """
    *lead, count = indices.shape
    if bits == 8:
        return indices.astype(jnp.uint8)
    group, width = period(bits)
    xp = namespace(indices)
    padded = indices.astype(jnp.uint8, copy=False)
    if count % group:
        padded = xp.pad(padded, [(0, 0)] * len(lead) + [(0, -count % group)])
    padded = padded.reshape(*lead, -(-count // group), group)
    columns = []
    for byte in range(width):
        column = xp.zeros(padded.shape[:-1], jnp.uint8)
        for i in range(group):
            shift = i * bits - 8 * byte
            if -bits < shift < 8:
                index = padded[..., i]
                column = column | (index << shift if shift >= 0 else index >> -shift)
        columns.append(column)
    flat = xp.stack(columns, axis=-1).reshape(*lead, -(-count // group) * width)
    return flat[..., : packed_size(count, bits)]


def unpack(packed: A, bits: int, count: int) -> A:
    """Unpacks the first `count` indices of each row: the inverse of `pack`.

    Args:
      packed: `[…, B]` uint8.
      bits: 1 to 8.
      count: N, with ⌈N·bits / 8⌉ = B.

    Returns:
      `[…, N]` uint8.

    >>> import jax.numpy as jnp
    >>> unpack(jnp.array([33, 3], jnp.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    *lead, size = packed.shape
    if bits == 8:
        return packed[..., :count]
    xp = namespace(packed)
    if xp is jnp and 8 % bits == 0:  # no index crosses a byte: compilers fuse this form with the look-up
        shift = lax.broadcasted_iota(jnp.uint8, (*lead, size, 8 // bits), len(lead) + 1) * bits
        return ((packed[..., None] >> shift) & (2**bits - 1)).reshape(*lead, -1)[..., :count]
    group, width = period(bits)
    padded = xp.pad(packed, [(0, 0)] * len(lead) + [(0, -size % width)]).reshape(*lead, -(-size // width), width)
    if xp is jnp and width == 3:  # whole indices in 24-bit words, which compilers fuse with the look-up, too
        byte = [padded[..., n].astype(jnp.uint32) for n in range(3)]
        words = byte[0] | (byte[1] << np.uint32(8)) | (byte[2] << np.uint32(16))
        shift = lax.broadcasted_iota(jnp.uint32, (*words.shape, group), words.ndim) * np.uint32(bits)
        return ((words[..., None] >> shift) & np.uint32(2**bits - 1)).astype(jnp.uint8).reshape(*lead, -1)[..., :count]
    columns = []
    for i in range(group):
        byte, shift = divmod(i * bits, 8)
        index = padded[..., byte] >> shift
        if shift + bits > 8:
            index = index | (padded[..., byte + 1] << (8 - shift))
        columns.append(index & (2**bits - 1))
    return xp.stack(columns, axis=-1).reshape(*lead, -(-size // width) * group)[..., :count]


def unpack_at(packed: jax.Array, bits: int, positions: jax.Array) -> jax.Array:
    """Returns the indices at some positions of each row, without unpacking the others.

    Args:
      packed: `[…, B]` uint8.
      bits: 1 to 8.
      positions: `[P]` integers, each inside the row.

    Returns:
      `[…, P]` uint8.

    >>> import jax.numpy as jnp
    >>> unpack_at(jnp.array([33, 3], jnp.uint8), 4, jnp.array([2, 0])).tolist()
    [3, 1]
    """
    bit = positions.astype(jnp.int32) % 8 * bits  # offset in the `bits` bytes that eight indices fill
    byte = positions.astype(jnp.int32) // 8 * bits + bit // 8
    shift = jnp.expand_dims((bit % 8).astype(jnp.uint8), range(packed.ndim - 1))
    index = packed[..., byte] >> shift
    if 8 % bits:
        following = packed[..., jnp.minimum(byte + 1, packed.shape[-1] - 1)]
        index |= jnp.where(shift > 0, following << (8 - shift), 0).astype(jnp.uint8)
    return index & (2**bits - 1)
