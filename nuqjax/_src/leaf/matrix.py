"""Decodes matrices `[O, I]` that are stored as plain arrays: levels, packed indices and scales."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.leaf import packing
from nuqjax._src.leaf import rows as rows_
from nuqjax._src.leaf.rows import Granularity
from nuqjax._src.platform.types import A


@dataclass(frozen=True)
class Layout:
    """How plain arrays stand for a matrix of O output channels with I values each.

    Attributes:
      bits: bits of an index, 1 to 8.
      inputs: I.
      granularity: which values share a codebook.
      scale_group: number of values of a channel that share a scale; 0 without scales.
      casts: the dtypes to which a value is rounded in turn; the last is that of the matrix.
    """

    bits: int
    inputs: int
    granularity: Granularity
    scale_group: int
    casts: tuple[np.dtype, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the matrix."""
        return self.casts[-1]

    def cast(self, values: jax.Array) -> jax.Array:
        """Rounds values, in the dtype of the look-up, to those of the matrix."""
        for dtype in self.casts:
            values = values.astype(dtype)
        return values


def decode_matrix(levels: jax.Array, packed: jax.Array, scale: jax.Array | None, layout: Layout) -> jax.Array:
    """Decodes a matrix with arrays `[O, I]` only: TPUs pad other shapes, and one long row to many times its size.

    Args:
      levels: `[R, K]` floating levels, in the dtype for the look-up.
      packed: `[O, B]` uint8.
      scale: `[O, G]`, or None.
      layout: how they stand for the matrix.

    Returns:
      `[O, I]` of the layout's dtype.
    """
    indices = packing.unpack(packed, layout.bits, layout.inputs).astype(jnp.int32)
    if layout.granularity == "tensor":
        values = levels[0].at[indices].get(mode="promise_in_bounds")
    else:
        output, input = (lax.broadcasted_iota(jnp.int32, indices.shape, axis) for axis in (0, 1))
        row = rows_.row_of(output, input, layout.inputs, layout.granularity)
        values = levels.at[row, indices].get(mode="promise_in_bounds")
    if scale is not None:
        values = values * factors(scale, layout.scale_group, layout.inputs).astype(values.dtype)
    return layout.cast(values)


def factors(scale: A, scale_group: int, inputs: int) -> A:
    """Returns `[O, I]` the scale of each value, from scales `[O, G]`."""
    return rows_.namespace(scale).repeat(scale, min(scale_group, max(inputs, 1)), axis=-1)[:, :inputs]
