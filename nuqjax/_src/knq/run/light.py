"""Light levels: levels whose values weigh next to nothing compared with the row's heaviest value.

The search adds integers, in units of the row's largest weight and magnitude, so that no order of summation matters. A
level whose values together have less than 2^−16 of the heaviest weight is then a quotient of few units, with an error
above float32's rounding. It is moved to the mean of the values nearest to it, computed from the unrounded values and
weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.leaf.assign import assign, assign_on_host
from nuqjax._src.platform.host import x64

_LIGHT = 2.0**-16  # of the heaviest value's weight


def settled_on_host(
    rows: np.ndarray,
    levels: np.ndarray,
    weights: np.ndarray,
    mask: np.ndarray | None,
    unit: np.ndarray,
    keep_zero: bool,
) -> np.ndarray:
    """Computes `settled` for NumPy rows; rows with a light value are summed in a fixed order, by value and weight."""
    counted = weights > 0 if mask is None else mask & (weights > 0)
    heaviest = np.max(np.where(counted, weights, 0), axis=1, initial=0).astype(np.float64)
    light = counted & (weights < heaviest[:, None] * _LIGHT)
    for r in np.flatnonzero(light.any(axis=1)).tolist():
        values, weight = rows[r][counted[r]], weights[r][counted[r]].astype(np.float64)
        order = np.lexsort((weight, values))
        values, weight = values[order], weight[order]
        level = assign_on_host(values[None], levels[r : r + 1])[0]
        own = levels[r].astype(np.float64) / unit[r]
        away = (values.astype(np.float64) / unit[r] - own[level]) * weight
        total, moment = (np.bincount(level, amount, levels.shape[1]) for amount in (weight, away))
        levels[r] = _moved(levels[r], own, total, moment, heaviest[r], keep_zero, unit[r])
    return levels


def settled(
    rows: jax.Array,
    levels: jax.Array,
    weights: jax.Array,
    mask: jax.Array | None,
    unit: jax.Array,
    keep_zero: bool,
    axes=(),
) -> jax.Array:
    """Returns the levels, with each light level moved to the mean of the values nearest to it.

    Args:
      rows: `[R, N]` values, or this device's part of them.
      levels: `[R, K]` ascending levels.
      weights: `[R, N]` non-negative.
      mask: `[R, N]` bool, or None.
      unit: `[R]` powers of two near the rows' largest magnitudes.
      keep_zero: whether there is a held zero, which stays where it is.
      axes: names of the mesh axes over which the values of a row are distributed.
    """
    rows = rows.astype(levels.dtype)
    level = assign(rows / unit[:, None], levels / unit[:, None]).astype(jnp.int32)
    with x64():
        counted = weights > 0 if mask is None else mask & (weights > 0)
        weight = jnp.where(counted, weights, 0).astype(jnp.float64)
        heaviest = jnp.max(weight, axis=1, keepdims=True, initial=0)
        unit = unit.astype(jnp.float64)[:, None]
        own = levels.astype(jnp.float64) / unit
        away = rows.astype(jnp.float64) / unit - jnp.take_along_axis(own, level, axis=1)
        sums = jax.vmap(lambda level, amount: jnp.zeros(levels.shape[1], jnp.float64).at[level].add(amount))
        total, moment = sums(level, weight), sums(level, jnp.where(counted, away * weight, 0))
        if axes:
            total, moment, heaviest = lax.psum(total, axes), lax.psum(moment, axes), lax.pmax(heaviest, axes)
        return _moved(levels, own, total, moment, heaviest, keep_zero, unit)


def _moved(levels: Any, own: Any, total: Any, moment: Any, heaviest: Any, keep_zero: bool, unit: Any) -> Any:
    xp = np if isinstance(levels, np.ndarray) else jnp
    light = (total > 0) & (total < heaviest * _LIGHT)
    light = light & (levels != 0) if keep_zero else light
    mean = own + moment / xp.where(total > 0, total, 1)
    return xp.where(light, (mean * unit).astype(levels.dtype), levels)
