"""The spine: a parameter tree to the same tree with `CodebookArray` leaves, and back.

For each leaf: choose (`plan`) → view as rows (`rows`) → fit levels (`fit`) → round them to their format
(`fixed_point`) → assign against the *rounded* levels (`assign`) → pack (`packing`) → `CodebookArray`.
"""

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nuqjax import fixed_point, packing, rows
from nuqjax.assign import assign, assign_on_host, distortion, distortion_on_host
from nuqjax.codebook_array import (
    CodebookArray,
    check_layout,
    decode,
    dense_on_host,
    dense_sharding,
    is_codebook_array,
    is_on_host,
    level_values,
    with_levels,
)
from nuqjax.fit import fit, levels_on_host
from nuqjax.fit_mesh import fit_leaf_on_mesh
from nuqjax.host import on_host, over_blocks, row_by_row, to_jax, to_numpy, working_dtype, x64
from nuqjax.meshes import explicit_sharding, run_as_automatic
from nuqjax.paths import path_name
from nuqjax.plan import LeafPlan, Plan, plan_leaves, scale_groups
from nuqjax.qformat import AutoQFormat, QFormat
from nuqjax.report import build_report
from nuqjax.rules import Options
from nuqjax.shardings import leaf_specs


def compress_tree(
    params: Any, options: Options, rules: Any, sensitivity: Any, *, return_report: bool, progress: bool
) -> Any:
    """`nuqjax.compress` without data, which is what calls it: warnings name the place that calls that.

    Args:
      params: any pytree.
      options: of the leaves that no rule says more of.
      rules: `Rule`s, or a single one.
      sensitivity: a tree like `params` of importances, or None.
      return_report: return `(cparams, Report)`.
      progress: show a progress bar.
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=is_codebook_array)
    plans = plan_leaves(params, options, rules)
    check_arrays(leaves, plans)
    notes = Plan(tuple(plans)).notes
    for note in notes:
        warnings.warn(f"compress: {note}", stacklevel=3)
    importances = _importances(sensitivity, plans)
    results, fits, tied = [], {}, {}
    for leaf, plan in _with_progress(list(zip(leaves, plans, strict=True)), progress):
        if plan.reason is None:
            importance = importances.get(plan.path)
            same = id(leaf), id(importance), repr(plan.options)  # an array at two places, such as a tied embedding
            if same not in tied:
                tied[same] = compress_leaf(leaf, importance, plan)
            leaf, certificate = tied[same]
            fits[plan.path] = (plan.options.method, certificate)
        results.append(leaf)
    cparams = structure.unflatten(results)
    if not return_report:
        return cparams
    reasons = {plan.path: plan.reason for plan in plans if plan.reason is not None}
    return cparams, build_report(params, cparams, reasons, fits, notes)


def check_arrays(leaves: Sequence[Any], plans: Sequence[LeafPlan]) -> None:
    """Raises ValueError for shapes where values are wanted."""
    for leaf, plan in zip(leaves, plans, strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{plan.path}: a ShapeDtypeStruct, but compress needs values; from shapes, nuqjax.plan(params) shows "
                "what it would do, and jax.eval_shape(nuqjax.compress, params) what it would return"
            )


def decompress(tree: Any) -> Any:
    """The tree with every `CodebookArray` as the dense array that it stands for, of the same shape and dtype.

    Raises:
      ValueError: JAX took a leaf for its arrays: sliced them, or trained its indices. The leaf is named.

    >>> import jax.numpy as jnp, nuqjax
    >>> params = {"kernel": jnp.arange(512.0).reshape(16, 32) % 8}
    >>> dense = nuqjax.decompress(nuqjax.compress(params, bits=3))  # eight distinct values: nothing is lost
    >>> bool((dense["kernel"] == params["kernel"]).all())
    True
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _dense(path, x) if is_codebook_array(x) else x, tree, is_leaf=is_codebook_array
    )


def _dense(path: Sequence[Any], leaf: CodebookArray) -> jax.Array:
    check_layout(leaf, path_name(path) or "the compressed leaf")
    return jax.device_put(dense_on_host(leaf), dense_sharding(leaf)) if is_on_host(leaf) else decode(leaf)


def codebooks(tree: Any) -> Any:
    """The floating levels of every `CodebookArray`, `[*S, R, K]`, in the same tree; None in place of other leaves.

    This is what `jax.grad` and optax work on: the gradient of a level is the sum over the weights that share it.

    >>> import jax.numpy as jnp, nuqjax
    >>> cparams = nuqjax.compress({"w": jnp.ones((16, 32)), "b": jnp.zeros(32)}, bits=1)
    >>> codebooks(cparams)
    {'b': None, 'w': Array([[1., 1.]], dtype=float32)}
    """
    return jax.tree.map(lambda x: level_values(x) if is_codebook_array(x) else None, tree, is_leaf=is_codebook_array)


def with_codebooks(tree: Any, levels: Any) -> Any:
    """The tree with other levels: `with_codebooks(tree, codebooks(tree))` decodes to the same values.

    Levels are taken as they are: floating, in the dtype given, not rounded to a codebook format.

    Args:
      tree: a compressed tree.
      levels: what `codebooks` gives for it, with other values.

    Raises:
      ValueError: the levels of a leaf are missing or have another shape, or there are levels of no such leaf.

    >>> import jax, jax.numpy as jnp, nuqjax
    >>> cparams = nuqjax.compress({"w": jnp.eye(16)}, bits=1, min_size=0)
    >>> loss = lambda levels: nuqjax.decompress(with_codebooks(cparams, levels))["w"].sum()
    >>> jax.grad(loss)(codebooks(cparams))["w"].tolist()  # 240 zeros and 16 ones
    [[240.0, 16.0]]
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_codebook_array)
    given = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(levels)[0]}
    result = []
    for path, leaf in flat:
        if is_codebook_array(leaf):
            name = path_name(path)
            if name not in given:
                raise ValueError(f"with_codebooks: no levels for {name}")
            try:
                leaf = with_levels(leaf, given.pop(name))
            except ValueError as error:
                raise ValueError(f"with_codebooks: {name}: {error}") from error
        result.append(leaf)
    if given:
        raise ValueError(f"with_codebooks: levels for {next(iter(given))!r}, which is no compressed leaf")
    return structure.unflatten(result)


class _Rows(NamedTuple):
    """A leaf as rows, and what was taken out of it."""

    values: Any  # [S·R, N]
    mask: Any  # [S·R, N] bool, or None
    weights: Any  # [S·R, N], or None
    factors: Any  # [S, O, G] scales, or None


def compress_leaf(array: Any, importance: Any, plan: LeafPlan) -> tuple[CodebookArray, float | None]:
    """The leaf, and its certificate."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return _compress_leaf(array, importance, plan)
    found = []

    def arrays(array, importance):
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
    array = _on_host(array)
    check_finite(array, plan.path)
    on_mesh = _fit_on_mesh(array, importance, plan)
    view = _view(array, importance, plan)
    levels, certificate = on_mesh if on_mesh is not None else _fit(view, 2**options.bits, options)
    codebook_format = options.codebook_format
    if isinstance(codebook_format, AutoQFormat):
        codebook_format = _choose_format(codebook_format, levels, view, plan)
    dtype = jnp.dtype(plan.dtype)
    stored, values = _round_levels(levels, codebook_format, dtype, _most_scaled(view.factors, dtype))
    factors = view.factors
    given = options.bits, plan.slice_shape, plan.axes, None if _in_own_order(array, options) else options.granularity
    if isinstance(view.values, np.ndarray):
        indices = assign_on_host(view.values, values)
        del view  # as many bytes as the leaf
        packed = _packed(indices, *given)
    else:
        packed = _assigned_and_packed(view.values, values, *given)
    return _leaf(plan, stored, packed, factors, codebook_format), certificate


def _packed(indices: Any, bits: int, slice_shape: tuple[int, ...], axes: tuple[int, ...], granularity: Any) -> Any:
    """`[S, O, B]` packed, of the indices `[S·R, N]` of rows; granularity None if they are in the leaf's own order."""
    outputs, inputs = rows.channel_shape(slice_shape, axes)
    if granularity is None:
        back = partial(rows.to_channels, axes=axes)
        indices = indices.reshape(-1, *slice_shape)
    else:
        back = partial(rows.from_rows, outputs=outputs, inputs=inputs, granularity=granularity)
        indices = indices.reshape(-1, *rows.row_shape(outputs, inputs, granularity))
    return packing.pack(_each(back, indices), bits)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _assigned_and_packed(values, levels, *given):
    """One program in place of some dozens."""
    return _packed(assign(values, levels), *given)


def _leaf(plan: LeafPlan, levels: Any, packed: Any, factors: Any, codebook_format: Any) -> CodebookArray:
    """The leaf of levels `[S·R, K]`, packed indices `[S, O, B]` and scales `[S, O, G]` or None."""
    options = plan.options
    stack = plan.shape[: options.stack_axes]
    outputs, inputs = rows.channel_shape(plan.slice_shape, plan.axes)
    count, _ = rows.row_shape(outputs, inputs, options.granularity)

    def stacked(array, *shape):
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
    """The leaf of a plan with these values of its levels, which its format represents, and these indices.

    Args:
      plan: of the leaf.
      levels: `[S, R, K]` ascending values.
      indices: `[S, O, I]` uint8.
      scale: `[S, O, G]` in the dtype in which it is stored, or None.
      codebook_format: how the levels are stored: no `AutoQFormat`.
    """
    if isinstance(codebook_format, QFormat):
        stored = fixed_point.encode_on_host(levels, codebook_format).astype(codebook_format.storage_dtype)
    else:
        stored = levels.astype(jnp.dtype(plan.dtype if codebook_format is None else codebook_format))
    return _leaf(plan, stored, packing.pack(indices, plan.options.bits), scale, codebook_format)


def _empty_leaf(plan: LeafPlan) -> CodebookArray:
    """The leaf of an array without values: what codebooks it has are zero."""
    options, dtype = plan.options, jnp.dtype(plan.dtype)
    stack = math.prod(plan.shape[: options.stack_axes])
    outputs, inputs = rows.channel_shape(plan.slice_shape, plan.axes)
    count, _ = rows.row_shape(outputs, inputs, options.granularity)
    groups, _ = scale_groups(inputs, options.scale)
    codebook_format = options.codebook_format
    if isinstance(codebook_format, AutoQFormat):
        codebook_format = QFormat(codebook_format.word, 0, codebook_format.signed)
    zeros = np.zeros((stack * count, 2**options.bits), np.float32)
    levels, _ = _round_levels(zeros, codebook_format, dtype, None)
    packed = np.zeros((stack, outputs, packing.packed_size(inputs, options.bits)), np.uint8)
    factors = np.zeros((stack, outputs, groups), dtype) if options.scale is not None else None
    return _leaf(plan, levels, packed, factors, codebook_format)


def _on_host(array: Any) -> Any:
    """A NumPy view of an array on the host. Others stay where they are."""
    return to_numpy(array) if on_host(array) else array


def check_finite(array: Any, path: str) -> None:
    """Raises ValueError, naming `path`, for NaN or infinity in an array that is no tracer."""
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


def _each(function: Callable, slices: Any) -> Any:
    """The function applied to each slice `[S, …]`; of a single one on the host no copy is made."""
    if not isinstance(slices, np.ndarray):
        return jax.vmap(function)(slices)
    return function(slices[0])[None] if len(slices) == 1 else np.stack([function(s) for s in slices])


def _in_own_order(array: Any, options: Options) -> bool:
    """Whether the values of a slice all share a codebook and nothing else, so that their order does not matter."""
    return options.granularity == "tensor" and options.scale is None and not rows.on_mesh(array)


def _view(array: Any, importance: Any, plan: LeafPlan) -> _Rows:
    """The leaf as rows of values (divided by their scales), with the weights of their squared errors."""
    options = plan.options
    if _in_own_order(array, options):
        count = math.prod(plan.shape[: options.stack_axes])
        weights = None if importance is None else rows.namespace(array).asarray(importance, np.float32)
        return _Rows(array.reshape(count, -1), None, None if weights is None else weights.reshape(count, -1), None)
    slices = array.reshape(-1, *plan.slice_shape)
    outputs, inputs = rows.channel_shape(plan.slice_shape, plan.axes)
    xp = rows.namespace(slices)
    channels = _each(partial(rows.to_channels, axes=plan.axes), slices)
    weights = None
    if importance is not None:
        weights = xp.asarray(importance, np.float32).reshape(slices.shape)
        weights = _each(partial(rows.to_channels, axes=plan.axes), weights)
    groups, size = scale_groups(inputs, options.scale)
    factors = None
    if groups:
        padded = xp.pad(xp.abs(channels), ((0, 0), (0, 0), (0, groups * size - inputs)))
        factors = padded.reshape(*channels.shape[:2], groups, size).max(axis=-1)
        spread = xp.repeat(factors.astype(np.float32), size, axis=-1)[..., :inputs]
        channels = channels.astype(np.float32) / xp.where(spread > 0, spread, 1)
        # The leaf's squared error is Σ scale² (x/scale − level)²: relative to the largest, so that it stays in range.
        share = (spread / xp.maximum(spread.max(), np.float32(np.finfo(np.float32).tiny))) ** 2
        weights = share if weights is None else weights * share
    to_rows = partial(rows.to_rows, granularity=options.granularity)
    mask = rows.row_mask(outputs, inputs, options.granularity)
    if mask is not None:
        mask = np.broadcast_to(mask, (slices.shape[0], *mask.shape)).reshape(-1, mask.shape[-1])
    flat = lambda channels: _flat_rows(_each(to_rows, channels))  # noqa: E731
    return _Rows(flat(channels), mask, None if weights is None else flat(weights), factors)


def _flat_rows(grouped):
    flat = grouped.reshape(-1, grouped.shape[-1])
    return row_by_row(flat) if isinstance(flat, np.ndarray) else flat


@partial(jax.jit, static_argnames=("num_levels", "method", "keep_zero", "tolerance"))
def _jit_levels(rows, num_levels, **options):
    """The levels alone: XLA leaves out what only their error would need."""
    return fit(rows, num_levels, **options).levels


def _fit_on_mesh(array: Any, importance: Any, plan: LeafPlan) -> tuple[jax.Array, float | None] | None:
    """As `_fit`, for a leaf on a mesh, where its values are; None if it must be brought into rows."""
    options = plan.options
    if not rows.on_mesh(array) or options.method != "knq" or options.scale is not None:
        return None
    if options.granularity not in ("tensor", "channel"):
        return None
    tolerance = options.tolerance if array.is_fully_addressable else None  # no process sees all bounds
    fitted = fit_leaf_on_mesh(
        array, importance, 2**options.bits, stack_axes=options.stack_axes, axes=plan.axes,
        by_channel=options.granularity == "channel", keep_zero=options.keep_zero, tolerance=tolerance,
    )  # fmt: skip
    return fitted.levels, None if tolerance is None else _certificate(fitted)


def _fit(view: _Rows, num_levels: int, options: Options) -> tuple[Any, float | None]:
    """The levels `[S·R, K]`, NumPy's where the rows are, and the leaf's certificate if one is asked for."""
    values, traced = view.values, isinstance(view.values, jax.core.Tracer)
    tolerance = None if traced else options.tolerance  # a certificate is a number
    given = {"method": options.method, "keep_zero": options.keep_zero, "tolerance": tolerance}
    if options.method == "knq" or traced:
        fitted = fit(values, num_levels, weights=view.weights, mask=view.mask, **given)
        proven = options.method == "knq" and tolerance is not None
        levels = np.asarray(fitted.levels) if isinstance(values, np.ndarray) else fitted.levels
        return levels, _certificate(fitted) if proven else None
    if not isinstance(values, np.ndarray):
        return _jit_levels(values, num_levels, weights=view.weights, mask=view.mask, **given), None
    levels = levels_on_host(
        values, num_levels, options.method, weights=view.weights, mask=view.mask, keep_zero=options.keep_zero
    )
    return levels, None


def _certificate(fitted) -> float:
    """The relative gap Σ (sse − lower_bound) / Σ sse over a leaf's rows."""
    scale = np.asarray(fitted.scale, np.float64) ** 2
    sse = float((np.asarray(fitted.sse, np.float64) * scale).sum())
    bound = float((np.asarray(fitted.lower_bound, np.float64) * scale).sum())
    return (sse - bound) / sse if sse > 0 else 0.0


def _most_scaled(factors: Any, dtype: np.dtype) -> Any:
    """The largest magnitude of a level that no scale takes beyond the leaf's dtype; None without scales."""
    if factors is None:
        return None
    xp, finest = rows.namespace(factors), jnp.finfo(dtype)
    wide = np.float64 if xp is np else working_dtype(factors.dtype)
    most = factors.astype(wide).max()
    if xp is jnp:  # a quotient rounded upwards would be too large
        most = most * (1 + 4 * float(jnp.finfo(wide).eps))
    return float(finest.max) / xp.maximum(most, float(jnp.finfo(wide).tiny))


def _round_levels(levels: Any, codebook_format, dtype: np.dtype, most_scaled: Any) -> tuple[Any, Any]:
    """Levels as they are stored, and the values that they decode to: what is finite stays so."""
    xp, working = rows.namespace(levels), working_dtype(levels.dtype)
    finite = float(jnp.finfo(dtype).max) if most_scaled is None else most_scaled
    if isinstance(codebook_format, QFormat):
        encode: Any = fixed_point.encode
        decode: Any = fixed_point.decode
        if xp is np:
            encode, decode = fixed_point.encode_on_host, fixed_point.decode_on_host
        with np.errstate(over="ignore"):
            most = xp.floor(xp.minimum(finite * 2.0**codebook_format.frac, 2.0**24)).astype(np.int32)
        stored = xp.clip(encode(levels, codebook_format), -most, most).astype(codebook_format.storage_dtype)
        values = decode(stored, codebook_format)
    else:
        target = np.dtype(dtype if codebook_format is None else codebook_format)
        most = _not_above(xp.minimum(finite, min(float(jnp.finfo(t).max) for t in (target, working))), target, working)
        stored = xp.clip(levels, -most, most).astype(target)
        values = stored
    return stored, (values if most_scaled is not None else values.astype(dtype)).astype(working)


def _not_above(largest: Any, target: np.dtype, working: np.dtype) -> Any:
    """The largest value of the target dtype that is not above a magnitude in its range, or the one before it."""
    xp = rows.namespace(largest)
    below = largest * (1 - float(jnp.finfo(target).eps))
    nearest, before = (x.astype(target).astype(working) for x in (largest, below))
    return xp.where(nearest > largest, before, nearest)


def _choose_format(auto: AutoQFormat, levels: Any, view: _Rows, plan: LeafPlan) -> QFormat:
    """The `QFormat` whose fraction bits give the leaf the least squared error."""
    if isinstance(levels, jax.core.Tracer):
        raise ValueError(f"{plan.path}: {auto} chooses its fraction bits from values: under jit give a QFormat")
    whole = max(math.frexp(float(abs(levels).max()))[1], -120)  # no level reaches 2^whole
    unit = np.float32(2.0 ** (1 - whole))
    values, levels = (x.astype(np.float32, copy=False) for x in (view.values, levels))
    dtype = jnp.dtype(plan.dtype)

    def error_of(levels) -> float:
        return _error(values, levels, unit, view.weights, view.mask)

    unrounded_error = error_of(levels)
    mass = _mass(values, levels, unit, view.weights, view.mask)
    most = _most_scaled(view.factors, dtype)
    full = auto.word - auto.signed - whole  # the finest format that saturates no level
    best = math.inf, full

    def is_worse(moved: float) -> bool:
        """Whether a format that moves the levels' weights so far cannot be the best, by the triangle inequality."""
        return max(math.sqrt(moved) - math.sqrt(unrounded_error), 0) ** 2 * (1 - 1e-5) > best[0]

    # Down to the coarsest format that has not only zero for these levels; up to a range that few of them are inside.
    for frac in sorted(range(max(-whole, -512), min(full + _FINER, 512) + 1), key=lambda frac: abs(frac - full)):
        fixed = QFormat(auto.word, frac, auto.signed)
        if is_worse(_moved_into_range(levels, fixed, dtype, unit, mass)):
            continue
        _, rounded = _round_levels(levels, fixed, dtype, most)
        if not is_worse(_error(levels, rounded, unit, mass, None)):
            best = min(best, (error_of(rounded), frac))
    return QFormat(auto.word, best[1], auto.signed)


_FINER = 24  # how many more fraction bits than `full` are tried: the range is then 2^−24 of the largest level


def _moved_into_range(levels: Any, fixed: QFormat, dtype, unit: np.float32, mass: Any) -> float:
    """How far at least a format moves the levels' weights, squared: those outside of its range, which no level leaves.

    But for the rounding to the leaf's dtype.
    """
    least, largest = (end * (1 + float(jnp.finfo(dtype).eps)) for end in fixed.range)
    exact = np.asarray(levels, np.float64)
    moved = (exact - np.clip(exact, least, largest)) * float(unit)
    return float((moved * moved * np.asarray(mass)).sum())


def _error(values: Any, levels: Any, unit: np.float32, weights: Any, mask: Any) -> float:
    """The squared error of a leaf's rows in units of `unit`."""
    if isinstance(values, np.ndarray):
        each = distortion_on_host(values, levels, weights, mask, unit)
    else:
        each = _jit_distortion(values * unit, levels * unit, weights, mask)
    return float(np.asarray(each, np.float64).sum())


_jit_distortion = jax.jit(distortion)


def _mass(values: Any, levels: Any, unit: np.float32, weights: Any, mask: Any) -> Any:
    """`[R, K]` how much weight is nearest to each level."""
    if not isinstance(values, np.ndarray):
        return _jit_mass(values * unit, levels * unit, weights, mask)
    count, num_levels = levels.shape
    indices = assign_on_host(values, levels)
    mass = np.zeros(levels.shape)

    def block(some, columns):
        place = indices[some, columns] + np.arange(some.stop - some.start)[:, None] * num_levels
        each = None if weights is None else weights[some, columns]
        if mask is not None:
            each = mask[some, columns] if each is None else np.where(mask[some, columns], each, 0)
        each = None if each is None else each.reshape(-1)
        return some, np.bincount(place.reshape(-1), each, place.shape[0] * num_levels)

    for some, part in over_blocks(block, count, values.shape[1]):
        mass[some] += part.reshape(-1, num_levels)
    return mass.astype(np.float32)


@jax.jit
def _jit_mass(values, levels, weights, mask):
    """`_mass` of arrays that are not on the host, in units of their own."""
    with x64():
        each = jnp.ones(values.shape, jnp.float64) if weights is None else weights.astype(jnp.float64)
        each = each if mask is None else jnp.where(mask, each, 0.0)
        place = jax.vmap(lambda index, each: jnp.zeros(levels.shape[-1], jnp.float64).at[index].add(each))
        return place(assign(values, levels), each).astype(jnp.float32)


def _importances(sensitivity: Any, plans: Sequence[LeafPlan]) -> dict[str, Any]:
    """The importances by path, checked against the leaves."""
    if sensitivity is None:
        return {}
    flat, _ = jax.tree_util.tree_flatten_with_path(sensitivity)
    given = {path_name(path): leaf for path, leaf in flat}
    shapes = {plan.path: plan.shape for plan in plans}
    result = {}
    for path, importance in given.items():
        if path not in shapes:
            near = difflib.get_close_matches(path, shapes, n=3, cutoff=0.4)
            nearest = f"; the nearest paths are {', '.join(map(repr, near))}" if near else ""
            raise ValueError(f"sensitivity has a leaf {path!r} that the parameters do not have{nearest}")
        shape = shapes[path]
        if jnp.shape(importance) != shape:
            raise ValueError(f"{path}: sensitivity of shape {jnp.shape(importance)}, but the leaf has shape {shape}")
        result[path] = importance = _on_host(importance)
        if not isinstance(importance, jax.core.Tracer) and jnp.issubdtype(importance.dtype, np.number):
            xp = rows.namespace(importance)
            bad = ~(xp.isfinite(importance) & (importance >= 0))
            if bad.any():
                first = np.unravel_index(int(np.argmax(bad)), shape)
                raise ValueError(
                    f"{path}: {int(bad.sum())} sensitivities are negative, NaN or infinite, the first "
                    f"{float(np.asarray(importance)[first])} at {[int(i) for i in first]}"
                )
    return result


def _with_progress(work: Sequence[tuple[Any, LeafPlan]], show: bool) -> Iterable[tuple[Any, LeafPlan]]:
    """The work, leaf by leaf, under a progress bar that counts weights."""
    return _progress_bar(work) if show else work


def _progress_bar(work: Sequence[tuple[Any, LeafPlan]]) -> Iterator[tuple[Any, LeafPlan]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(math.prod(plan.shape) for _, plan in work if plan.reason is None)
    text = TextColumn("{task.completed:,.0f} of {task.total:,.0f} weights, {task.fields[rate]}")
    with Progress(TextColumn("{task.description}"), BarColumn(), text, TimeRemainingColumn()) as bar:
        task = bar.add_task("compress", total=total, rate="")
        for leaf, plan in work:
            bar.update(task, description=plan.path)
            yield leaf, plan
            if plan.reason is None:
                bar.advance(task, math.prod(plan.shape))
                speed = bar.tasks[0].speed
                bar.update(task, rate=f"{speed:,.0f}/s" if speed else "")
