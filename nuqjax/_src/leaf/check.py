"""Checks that a leaf's arrays fit its layout and hold valid values."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nuqjax._src.leaf import packing
from nuqjax._src.leaf import rows as rows_
from nuqjax._src.leaf.codebook_array import CodebookArray


def check(leaf: CodebookArray, path: str = "leaf") -> None:
    """Raises ValueError, naming `path`, unless the arrays fit the layout and hold valid values.

    Construction does not check, since JAX rebuilds nodes with placeholders under `vmap`, `tree.map` and `eval_shape`.
    """
    check_structure(leaf, path)
    if leaf.scale is not None and not np.isfinite(np.asarray(leaf.scale)).all():
        raise ValueError(f"{path}: a scale is not finite")
    levels = np.asarray(leaf.levels).astype(np.float64)
    if not np.isfinite(levels).all():
        raise ValueError(f"{path}: a level is not finite")
    if (np.diff(levels, axis=-1) < 0).any():
        raise ValueError(f"{path}: the levels of a codebook do not ascend")


def check_structure(leaf: CodebookArray, path: str = "leaf") -> None:
    """Checks as `check` does, but not what training may break: that levels and scales are finite and levels ascend."""
    if leaf.bits not in range(1, 9):
        raise ValueError(f"{path}: bits={leaf.bits!r}, but a whole number from 1 to 8 is wanted")
    try:
        rows_.check_granularity(leaf.granularity)
        axes = rows_.output_axes(leaf.axes, len(leaf.slice_shape))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    outputs, inputs = rows_.channel_shape(leaf.slice_shape, axes)
    count, _ = rows_.row_shape(outputs, inputs, leaf.granularity)
    stack = leaf.stack_shape
    _check_array(f"{path}: levels", leaf.levels, (*stack, count, 1 << leaf.bits))
    _check_array(f"{path}: packed", leaf.packed, (*stack, outputs, packing.packed_size(inputs, leaf.bits)), jnp.uint8)
    if leaf.scale is not None:
        if leaf.scale_group < 1:
            raise ValueError(f"{path}: a scale_group of {leaf.scale_group}, but with scales it is 1 or more")
        _check_array(f"{path}: scale", leaf.scale, (*stack, outputs, -(-inputs // leaf.scale_group)))
    fixed = leaf.codebook_format
    if fixed and leaf.levels.dtype != fixed.storage_dtype:
        raise ValueError(f"{path}: levels of dtype {leaf.levels.dtype}, but {fixed} stores {fixed.storage_dtype}")
    if fixed:
        levels = np.asarray(leaf.levels).astype(np.int64)
        if ((levels < fixed.least) | (levels > fixed.largest)).any():
            raise ValueError(f"{path}: a level is outside the range of {fixed}")


def _check_array(name: str, array: jax.Array, shape: Sequence[int], dtype: DTypeLike | None = None) -> None:
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(array.shape)}, but the layout needs {tuple(shape)}")
    if dtype is not None and array.dtype != dtype:
        raise ValueError(f"{name} has dtype {array.dtype}, but {jnp.dtype(dtype)} is wanted")
