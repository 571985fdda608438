"""Levels of a leaf that is distributed over a mesh, fitted where its values are: no device sees the whole leaf."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nuqjax.assign import Fit
from nuqjax.fit_knq import fit_knq_part
from nuqjax.rows import channel_shape, row_shape, to_channels


def fit_leaf_on_mesh(
    array: jax.Array,
    importance: Any,
    num_levels: int,
    *,
    stack_axes: int,
    axes: tuple[int, ...],
    by_channel: bool,
    keep_zero: bool,
    tolerance: float | None,
) -> Fit:
    """Fits `knq` levels to a leaf, one codebook for each slice or for each of its output channels.

    Devices exchange counts and sums of their values (of rows shorter than 65,536 float values, the row), and the levels
    are bit for bit those of the same leaf on one device.

    Args:
      array: `[*S, …]` with a `NamedSharding`.
      importance: non-negative, of the same shape, or None.
      num_levels: K.
      stack_axes: number of leading axes S.
      axes: output axes of a slice.
      by_channel: whether each output channel has levels of its own.
      keep_zero: as in `fit`.
      tolerance: as in `fit`.

    Returns:
      A `Fit` with as many rows as there are codebooks.
    """
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    spec = (*sharding.spec, *[None] * array.ndim)[: array.ndim]
    outputs = [stack_axes + axis for axis in axes] if by_channel else []
    of_rows = [*range(stack_axes), *outputs]  # the axes along which codebooks differ
    of_values = [axis for axis in range(array.ndim) if axis not in of_rows]
    names = [spec[axis] or () for axis in of_values]
    mesh_axes = tuple(name for given in names for name in ((given,) if isinstance(given, str) else given))
    slice_shape = array.shape[stack_axes:]
    codebooks, _ = row_shape(*channel_shape(slice_shape, axes), "channel" if by_channel else "tensor")
    count = codebooks * int(np.prod(array.shape[:stack_axes]))

    def part(block, weights):
        shape = [block.shape[axis] for axis in of_rows]

        def rows(x):
            slices = x.reshape(-1, *x.shape[stack_axes:])
            channels = jax.vmap(partial(to_channels, axes=axes))(slices)
            return channels.reshape(int(np.prod(shape)), -1)  # the order of a row's values does not matter

        fitted = fit_knq_part(
            rows(block), num_levels, None if weights is None else rows(weights), None,
            keep_zero=keep_zero, tolerance=tolerance, count=count, axes=mesh_axes,
        )  # fmt: skip
        return Fit(*(x.reshape(*shape, *x.shape[1:]) for x in fitted))

    whole, by_row = PartitionSpec(*spec), PartitionSpec(*(spec[axis] for axis in of_rows))
    if importance is not None:
        importance = jax.device_put(importance, sharding)
    run = jax.shard_map(
        part,
        mesh=sharding.mesh,
        in_specs=(whole, None if importance is None else whole),
        out_specs=by_row,
        check_vma=False,
    )
    fitted = jax.jit(run)(array, importance)
    return Fit(*(x.reshape(count, *x.shape[len(of_rows) :]) for x in fitted))
