"""Compresses one leaf: choose, view, fit, round, assign, pack."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nuqjax._src.compress.level_format import (
    choose_format,
    most_scaled,
    round_levels,
)
from nuqjax._src.compress.levels import fit_on_mesh, fit_view
from nuqjax._src.compress.plan import LeafPlan, scale_groups
from nuqjax._src.compress.view import check_finite, each_slice, from_host, in_own_order, view_of
from nuqjax._src.leaf import fixed_point, packing, rows
from nuqjax._src.leaf.assign import assign, assign_on_host
from nuqjax._src.leaf.codebook_array import CodebookArray
from nuqjax._src.leaf.qformat import AutoQFormat, QFormat
from nuqjax._src.leaf.shardings import leaf_specs
from nuqjax._src.platform.host import to_jax
from nuqjax._src.platform.meshes import explicit_sharding, run_as_automatic


@np.errstate(under="ignore")  # as by default: what is below the least normal number is rounded to 0
def compress_leaf(array: Any, importance: Any, plan: LeafPlan) -> tuple[CodebookArray, float | None]:
    """Returns the compressed leaf and its certificate, which is None where nothing is proven."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return _compress_leaf(array, importance, plan)
    found = []

    def arrays(array, importance) -> tuple[Any, Any, Any]:
        found.append(_compress_leaf(array, importance, plan))
        leaf, _ = found[0]
        return leaf.levels, leaf.packed, leaf.scale

    options = plan.options
    specs = leaf_specs(sharding, plan.shape, plan.axes, options.bits, options.granularity, options.stack_axes)
    specs = specs if options.scale is not None else (*specs[:2], None)
    levels, packed, scale = run_as_automatic(arrays, sharding.mesh, specs, array, importance)
    [(leaf, certificate)] = found
    return replace(leaf, levels=levels, packed=packed, scale=scale), certificate


def _compress_leaf(array: Any, importance: Any, plan: LeafPlan) -> tuple[CodebookArray, float | None]:
    options = plan.options
    if 0 in plan.shape:
        return _empty_leaf(plan), 0.0 if options.method == "knq" and options.tolerance is not None else None
    if isinstance(importance, jax.core.Tracer):
        array = jnp.asarray(array)
    array = from_host(array)
    check_finite(array, plan.path)
    on_mesh = fit_on_mesh(array, importance, plan)
    view = view_of(array, importance, plan)
    levels, certificate = on_mesh if on_mesh is not None else fit_view(view, 2**options.bits, options)
    codebook_format = options.codebook_format
    if isinstance(codebook_format, AutoQFormat):
        codebook_format = choose_format(codebook_format, levels, view, plan)
    dtype = jnp.dtype(plan.dtype)
    stored, values = round_levels(levels, codebook_format, dtype, most_scaled(view.factors, dtype))
    factors = view.factors
    given = options.bits, plan.slice_shape, plan.axes, None if in_own_order(array, options) else options.granularity
    if isinstance(view.values, np.ndarray):
        indices = assign_on_host(view.values, values)
        del view  # it has as many bytes as the leaf
        packed = _packed(indices, *given)
    else:
        packed = _assigned_and_packed(view.values, values, *given)
    return _leaf(plan, stored, packed, factors, codebook_format), certificate


def _packed(indices: Any, bits: int, slice_shape: tuple[int, ...], axes: tuple[int, ...], granularity: Any) -> Any:
    """Packs the indices `[S·R, N]` of rows into `[S, O, B]`; granularity None: they are in the leaf's own order."""
    outputs, inputs = rows.channel_shape(slice_shape, axes)
    if granularity is None:
        back = partial(rows.to_channels, axes=axes)
        indices = indices.reshape(-1, *slice_shape)
    else:
        back = partial(rows.from_rows, outputs=outputs, inputs=inputs, granularity=granularity)
        indices = indices.reshape(-1, *rows.row_shape(outputs, inputs, granularity))
    return packing.pack(each_slice(back, indices), bits)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _assigned_and_packed(values, levels, *given) -> Any:
    """Assigns and packs in one compiled program instead of some dozens."""
    return _packed(assign(values, levels), *given)


def _leaf(plan: LeafPlan, levels: Any, packed: Any, factors: Any, codebook_format: Any) -> CodebookArray:
    """Builds the leaf from levels `[S·R, K]`, packed indices `[S, O, B]` and scales `[S, O, G]` or None."""
    options = plan.options
    stack = plan.shape[: options.stack_axes]
    outputs, inputs = rows.channel_shape(plan.slice_shape, plan.axes)
    count, _ = rows.row_shape(outputs, inputs, options.granularity)

    def stacked(array, *shape) -> Any:
        array = array.reshape(*stack, *shape)
        return to_jax(array) if isinstance(array, np.ndarray) else array

    return CodebookArray(
        levels=stacked(levels, count, 2**options.bits),
        packed=stacked(packed, outputs, packing.packed_size(inputs, options.bits)),
        scale=None if factors is None else stacked(factors, *factors.shape[1:]),
        slice_shape=plan.slice_shape,
        dtype=jnp.dtype(plan.dtype),
        bits=options.bits,
        granularity=options.granularity,
        axes=plan.axes,
        codebook_format=codebook_format if isinstance(codebook_format, QFormat) else None,
        scale_group=scale_groups(inputs, options.scale)[1],
    )


def leaf_of(
    plan: LeafPlan, levels: np.ndarray, indices: np.ndarray, scale: np.ndarray | None, codebook_format: Any
) -> CodebookArray:
    """Builds the leaf of a plan from the values of its levels, which its format represents exactly, and its indices.

    Args:
      plan: the plan of the leaf.
      levels: `[S, R, K]` ascending values.
      indices: `[S, O, I]` uint8.
      scale: `[S, O, G]` in the dtype in which it is stored, or None.
      codebook_format: how the levels are stored; not an `AutoQFormat`.
    """
    if isinstance(codebook_format, QFormat):
        stored = fixed_point.encode_on_host(levels, codebook_format).astype(codebook_format.storage_dtype)
    else:
        stored = levels.astype(jnp.dtype(plan.dtype if codebook_format is None else codebook_format))
    return _leaf(plan, stored, packing.pack(indices, plan.options.bits), scale, codebook_format)


def _empty_leaf(plan: LeafPlan) -> CodebookArray:
    """Builds the leaf of an array without values; its codebooks, if it has any, are zero."""
    options, dtype = plan.options, jnp.dtype(plan.dtype)
    stack = math.prod(plan.shape[: options.stack_axes])
    outputs, inputs = rows.channel_shape(plan.slice_shape, plan.axes)
    count, _ = rows.row_shape(outputs, inputs, options.granularity)
    groups, _ = scale_groups(inputs, options.scale)
    codebook_format = options.codebook_format
    if isinstance(codebook_format, AutoQFormat):
        codebook_format = QFormat(codebook_format.word, 0, codebook_format.signed)
    zeros = np.zeros((stack * count, 2**options.bits), np.float32)
    levels, _ = round_levels(zeros, codebook_format, dtype, None)
    packed = np.zeros((stack, outputs, packing.packed_size(inputs, options.bits)), np.uint8)
    factors = np.zeros((stack, outputs, groups), dtype) if options.scale is not None else None
    return _leaf(plan, levels, packed, factors, codebook_format)
