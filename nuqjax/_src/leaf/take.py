"""Parts of a leaf: what is taken along an axis, decoded alone, and blocks of output channels."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from nuqjax._src.leaf import packing
from nuqjax._src.leaf import rows as rows_
from nuqjax._src.leaf.codebook_array import CodebookArray, decoding_levels, held_by_jax
from nuqjax._src.leaf.rows import ChannelGroups


def decode_take(leaf: CodebookArray, index: jax.Array, axis: int) -> jax.Array:
    """Computes `take(decode(leaf), index, axis)` for a leaf without stack axes, and decodes only the values taken.

    Args:
      leaf: a `CodebookArray` of shape `slice_shape`.
      index: `[n]` integers, each inside the axis.
      axis: the axis to take from.

    Returns:
      The dense array, with n entries along `axis`.
    """
    leaf, shape = held_by_jax(leaf), leaf.slice_shape
    outputs, inputs = _axis_numbers(leaf, shape)
    taken = (*shape[:axis], index.shape[0], *shape[axis + 1 :])
    if axis in leaf.axes:
        outputs = jnp.take(outputs, index, axis=leaf.axes.index(axis))
    else:
        others = [a for a in range(len(shape)) if a not in leaf.axes]
        inputs = jnp.take(inputs, index, axis=others.index(axis))
    outputs, inputs = outputs.reshape(-1), inputs.reshape(-1)
    if axis in leaf.axes:
        indices = packing.unpack(leaf.packed[outputs], leaf.bits, inputs.shape[0])
    else:
        indices = packing.unpack_at(leaf.packed, leaf.bits, inputs)
    count = rows_.channel_shape(shape, leaf.axes)[1]
    row = rows_.row_of(outputs[:, None], inputs[None, :], count, leaf.granularity)
    values = decoding_levels(leaf)[row, indices]
    if leaf.scale is not None:
        group = inputs[None, :] // min(leaf.scale_group, max(count, 1))
        values = values * leaf.scale[outputs[:, None], group].astype(values.dtype)
    return rows_.from_channels(values.astype(leaf.dtype), taken, leaf.axes)


def channel_block(leaf: CodebookArray, start: int, stop: int) -> CodebookArray:
    """Returns output channels `start` to `stop` of a leaf without stack axes, as a leaf of shape `[stop − start, I]`.

    With `ChannelGroups(n)`, `start` must be a multiple of n.
    """
    outputs, inputs = rows_.channel_shape(leaf.slice_shape, leaf.axes)
    match leaf.granularity:
        case "tensor":
            levels = leaf.levels
        case ChannelGroups(size):
            levels = leaf.levels[start // size : -(-stop // size)]
        case _:
            count = leaf.levels.shape[0] // max(outputs, 1)
            levels = leaf.levels[start * count : stop * count]
    scale = None if leaf.scale is None else leaf.scale[start:stop]
    packed = leaf.packed[start:stop]
    return replace(leaf, levels=levels, packed=packed, scale=scale, slice_shape=(stop - start, inputs), axes=(0,))


def _axis_numbers(leaf: CodebookArray, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns channel numbers shaped like the output axes, and positions in a channel shaped like the other axes."""
    output_shape = tuple(shape[a] for a in leaf.axes)
    input_shape = tuple(n for a, n in enumerate(shape) if a not in leaf.axes)
    numbers = lambda s: jnp.arange(math.prod(s), dtype=jnp.int32).reshape(s)  # noqa: E731
    return numbers(output_shape), numbers(input_shape)
