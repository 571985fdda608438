"""Rounds levels to the requested format, and chooses the fraction bits of least error."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nuqjax._src.compress.plan import LeafPlan
from nuqjax._src.compress.view import View
from nuqjax._src.leaf import fixed_point, rows
from nuqjax._src.leaf.assign import assign, assign_on_host, distortion, distortion_on_host
from nuqjax._src.leaf.qformat import AutoQFormat, QFormat, of_least_error
from nuqjax._src.platform.host import over_blocks, working_dtype, x64


def most_scaled(factors: Any, dtype: np.dtype) -> Any:
    """Returns the largest magnitude of a level that no scale takes beyond the leaf's dtype; None without scales."""
    if factors is None:
        return None
    xp, finest = rows.namespace(factors), jnp.finfo(dtype)
    wide = np.float64 if xp is np else working_dtype(factors.dtype)
    most = factors.astype(wide).max()
    if xp is jnp:  # so that a quotient that is rounded up is not too large
        most = most * (1 + 4 * float(jnp.finfo(wide).eps))
    # Scales of zero, or near it, take no level beyond the dtype: the quotient stays finite.
    return float(finest.max) / xp.maximum(most, 2 * (float(finest.max) / float(jnp.finfo(wide).max)))


def round_levels(levels: Any, codebook_format, dtype: np.dtype, most_scaled: Any) -> tuple[Any, Any]:
    """Returns levels as they are stored, and the values that they decode to; finite levels stay finite."""
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
    """Returns the largest value of the target dtype at or below a magnitude in its range, or the value before that."""
    xp = rows.namespace(largest)
    below = largest * (1 - float(jnp.finfo(target).eps))
    nearest, before = (x.astype(target).astype(working) for x in (largest, below))
    return xp.where(nearest > largest, before, nearest)


def choose_format(auto: AutoQFormat, levels: Any, view: View, plan: LeafPlan) -> QFormat:
    """Returns the `QFormat` whose fraction bits give the leaf the least squared error."""
    if isinstance(levels, jax.core.Tracer):
        raise ValueError(f"{plan.path}: {auto} chooses its fraction bits from values: under jit give a QFormat")
    whole = max(math.frexp(float(abs(levels).max()))[1], -120)  # no level reaches 2^whole
    unit = np.float32(2.0 ** (1 - whole))
    values, levels = (x.astype(np.float32, copy=False) for x in (view.values, levels))
    dtype = jnp.dtype(plan.dtype)

    unrounded_error = _error(values, levels, unit, view.weights, view.mask)
    mass = _mass(values, levels, unit, view.weights, view.mask)
    most = most_scaled(view.factors, dtype)

    def error_of(fixed: QFormat, least: float) -> float:
        def is_worse(moved: float) -> bool:
            """Returns whether a format that moves the levels' weights so far (squared) cannot be the best.

            By the triangle inequality, its error is at least (√moved − √unrounded_error)².
            """
            return max(math.sqrt(moved) - math.sqrt(unrounded_error), 0) ** 2 * (1 - 1e-5) > least

        if is_worse(_moved_into_range(levels, fixed, dtype, unit, mass)):
            return math.inf
        _, rounded = round_levels(levels, fixed, dtype, most)
        if is_worse(_error(levels, rounded, unit, mass, None)):
            return math.inf
        return _error(values, rounded, unit, view.weights, view.mask)

    # From the coarsest format that does not round all these levels to 0, to one whose range holds few of them.
    full = auto.word - auto.signed - whole  # the finest format that saturates no level
    fracs = range(max(-whole, -512), min(full + _FINER, 512) + 1)
    by_distance = sorted(fracs, key=lambda frac: abs(frac - full))  # good formats first: they rule others out
    return of_least_error((QFormat(auto.word, frac, auto.signed) for frac in by_distance), error_of)


_FINER = 24  # how many more fraction bits than `full` are tried: the range is then 2^−24 of the largest level


def _moved_into_range(levels: Any, fixed: QFormat, dtype, unit: np.float32, mass: Any) -> float:
    """Returns a lower bound of the weighted squared distance by which a format moves the levels.

    It counts only levels outside the format's range, which is widened by the rounding to the leaf's dtype.
    """
    least, largest = (end * (1 + float(jnp.finfo(dtype).eps)) for end in fixed.range)
    exact = np.asarray(levels, np.float64)
    moved = (exact - np.clip(exact, least, largest)) * float(unit)
    return float((moved * moved * np.asarray(mass)).sum())


def _error(values: Any, levels: Any, unit: np.float32, weights: Any, mask: Any) -> float:
    """Returns the squared error of a leaf's rows, with values and levels multiplied by `unit`."""
    if isinstance(values, np.ndarray):
        each = distortion_on_host(values, levels, weights, mask, unit)
    else:
        each = _jit_distortion(values * unit, levels * unit, weights, mask)
    return float(np.asarray(each, np.float64).sum())


_jit_distortion = jax.jit(distortion)


def _mass(values: Any, levels: Any, unit: np.float32, weights: Any, mask: Any) -> Any:
    """Returns `[R, K]`: the total weight of the values nearest to each level."""
    if not isinstance(values, np.ndarray):
        return _jit_mass(values * unit, levels * unit, weights, mask)
    count, num_levels = levels.shape
    indices = assign_on_host(values, levels)
    mass = np.zeros(levels.shape)

    def block(some, columns) -> tuple[Any, np.ndarray]:
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
def _jit_mass(values, levels, weights, mask) -> jax.Array:
    """Computes `_mass` for arrays that are not on the host and are already multiplied by `unit`."""
    with x64():
        each = jnp.ones(values.shape, jnp.float64) if weights is None else weights.astype(jnp.float64)
        each = each if mask is None else jnp.where(mask, each, 0.0)
        place = jax.vmap(lambda index, each: jnp.zeros(levels.shape[-1], jnp.float64).at[index].add(each))
        return place(assign(values, levels), each).astype(jnp.float32)
