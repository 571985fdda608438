"""Arranges a leaf in rows of values that share a codebook, divided by their scales, on the device that holds it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np

from nuqjax._src.compress.plan import LeafPlan, scale_groups
from nuqjax._src.compress.rules import Options
from nuqjax._src.leaf import rows
from nuqjax._src.platform.host import on_host, row_by_row, to_numpy


class View(NamedTuple):
    """A leaf as rows, with their mask and weights, and the scales by which the values are divided."""

    values: Any  # [S·R, N]
    mask: Any  # [S·R, N] bool, or None
    weights: Any  # [S·R, N], or None
    factors: Any  # [S, O, G] scales, or None


def from_host(array: Any) -> Any:
    """Returns a NumPy view of an array on the host, and any other array unchanged."""
    return to_numpy(array) if on_host(array) else array


def check_finite(array: Any, path: str) -> None:
    """Raises ValueError, naming `path`, for NaN or infinity in an array that is not a tracer."""
    if isinstance(array, jax.core.Tracer):
        return
    xp = rows.namespace(array)
    bad = ~xp.isfinite(array)
    number = int(bad.sum())
    if number:
        first = np.unravel_index(int(xp.argmax(bad)), array.shape)
        value = float(array[first])
        raise ValueError(
            f"{path}: {number} of {array.size} values are NaN or infinite, the first {value} at "
            f"{[int(i) for i in first]}; compress needs finite values"
        )


def each_slice(function: Callable, slices: Any) -> Any:
    """Applies the function to each slice of `[S, …]`; a single slice on the host is not copied."""
    if not isinstance(slices, np.ndarray):
        return jax.vmap(function)(slices)
    return function(slices[0])[None] if len(slices) == 1 else np.stack([function(s) for s in slices])


def in_own_order(array: Any, options: Options) -> bool:
    """Returns whether a slice's values may be in any order: they share a codebook, have no scales, are on no mesh."""
    return options.granularity == "tensor" and options.scale is None and not rows.on_mesh(array)


def view_of(array: Any, importance: Any, plan: LeafPlan) -> View:
    """Returns the leaf as rows of values (divided by their scales), with the weights of their squared errors."""
    options = plan.options
    if in_own_order(array, options):
        count = math.prod(plan.shape[: options.stack_axes])
        weights = None if importance is None else rows.namespace(array).asarray(importance, np.float32)
        return View(array.reshape(count, -1), None, None if weights is None else weights.reshape(count, -1), None)
    slices = array.reshape(-1, *plan.slice_shape)
    outputs, inputs = rows.channel_shape(plan.slice_shape, plan.axes)
    xp = rows.namespace(slices)
    channels = each_slice(partial(rows.to_channels, axes=plan.axes), slices)
    weights = None
    if importance is not None:
        weights = xp.asarray(importance, np.float32).reshape(slices.shape)
        weights = each_slice(partial(rows.to_channels, axes=plan.axes), weights)
    groups, size = scale_groups(inputs, options.scale)
    factors = None
    if groups:
        padded = xp.pad(xp.abs(channels), ((0, 0), (0, 0), (0, groups * size - inputs)))
        factors = padded.reshape(*channels.shape[:2], groups, size).max(axis=-1)
        spread = xp.repeat(factors.astype(np.float32), size, axis=-1)[..., :inputs]
        channels = channels.astype(np.float32) / xp.where(spread > 0, spread, 1)
        # The leaf's squared error is Σ scale² (x/scale − level)². Scales relative to the largest keep it in range.
        share = (spread / xp.maximum(spread.max(), np.float32(np.finfo(np.float32).tiny))) ** 2
        weights = share if weights is None else weights * share
    to_rows = partial(rows.to_rows, granularity=options.granularity)
    mask = rows.row_mask(outputs, inputs, options.granularity)
    if mask is not None:
        mask = np.broadcast_to(mask, (slices.shape[0], *mask.shape)).reshape(-1, mask.shape[-1])
    flat = lambda channels: flat_rows(each_slice(to_rows, channels))  # noqa: E731
    return View(flat(channels), mask, None if weights is None else flat(weights), factors)


def flat_rows(grouped: Any) -> Any:
    """Returns `[…, N]` as `[R, N]`."""
    flat = grouped.reshape(-1, grouped.shape[-1])
    return row_by_row(flat) if isinstance(flat, np.ndarray) else flat
