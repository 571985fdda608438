"""The baselines: levels on a grid of given form, of which at most a step or the largest magnitude is fitted.

`uniform`, `uniform_pow2` and `dfp` are K-level two's-complement grids `step · {−⌊K/2⌋ … K − 1 − ⌊K/2⌋}`. `pow2` has 0
and signed powers of two. `normal` follows the normal distribution, and `quantile` that of the data.
"""

import math
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.fit.per_row import mass_of, of_least, per_row, sorted_pairs, squared_error
from nuqjax._src.fit.steps import best_pow2_step, best_step, best_steps, grid_ends, powers
from nuqjax._src.leaf.assign import fit_by, largest_magnitude, row_scale, working_dtype
from nuqjax._src.leaf.rows import namespace
from nuqjax._src.platform.host import BLOCK, flushed, over_blocks, x64


def _grid_levels(step: Any, num_levels: int) -> Any:
    low, high = grid_ends(num_levels)
    most = jnp.finfo(step.dtype).max  # a grid may extend beyond the largest value, and so beyond the dtype
    xp = namespace(step)
    with np.errstate(over="ignore"):
        levels = xp.minimum(step, most)[:, None] * xp.arange(low, high + 1, dtype=step.dtype)[None]
    return _on_grid(xp.clip(levels, -most, most))


def _on_grid(levels: Any) -> Any:
    """Returns the levels; on the host subnormal ones become 0, as in XLA."""
    return flushed(levels) if isinstance(levels, np.ndarray) else levels


def uniform_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the K-level two's-complement grid at the step of least squared error.

    Steps are searched down to a grid that spans 1/256 of the range. A row longer than 4096 is searched as a histogram
    of 4096 bins and their means. Of steps that are equally good but for rounding, the largest is taken.

    >>> import jax.numpy as jnp
    >>> uniform_levels(jnp.array([[-2.0, -1.0, 0.0, 1.0]]), 4).round(6).tolist()
    [[-2.0, -1.0, 0.0, 1.0]]
    """
    if isinstance(rows, np.ndarray):
        return _grid_levels(per_row(partial(best_steps, num_levels=num_levels), rows, weights, mask), num_levels)
    return _grid_levels(_uniform_steps(rows, jnp.int32(num_levels), weights, mask), num_levels)


@jax.jit
def _uniform_steps(rows, num_levels, weights, mask) -> jax.Array:
    """Returns the steps of `uniform_levels`; `num_levels` is traced, so that one executable serves every number."""
    return per_row(partial(best_step, num_levels=num_levels), rows, weights, mask)


def uniform_pow2_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the K-level two's-complement grid at the power-of-two step of least squared error.

    Steps are searched from the one whose grid holds every value, 20 octaves down. A row longer than 4096 is searched as
    a histogram of 4096 bins and their means.

    >>> import jax.numpy as jnp
    >>> uniform_pow2_levels(jnp.array([[-3.0, -1.4, 0.1, 1.6]]), 4).tolist()
    [[-4.0, -2.0, 0.0, 2.0]]
    """
    step = per_row(partial(best_pow2_step, num_levels=num_levels), rows, weights, mask)
    return _grid_levels(step, num_levels)


def dfp_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the grid of Ristretto's dynamic fixed point, whose integer part just holds the largest magnitude.

    Its step is a power of two. The integer part has ⌈log2(largest) + 1⌉ bits, sign included, and the word log2 K bits,
    so a largest magnitude that is itself a power of two saturates (Gysel et al., *Hardware-oriented Approximation of
    CNNs*, section 3).

    Raises:
      ValueError: K is not a power of two, so no word has K levels.

    >>> import jax.numpy as jnp
    >>> dfp_levels(jnp.array([[-3.0, 1.0]]), 8).tolist()
    [[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]]
    """
    del weights
    if num_levels & (num_levels - 1):
        raise ValueError(f'method "dfp": {num_levels} levels, but a fixed-point word has a power of two of them')
    xp = namespace(rows)
    mantissa, exponent = xp.frexp(largest_magnitude(rows, mask))
    exponent = xp.where(mantissa == 0.5, exponent - 1, exponent)  # ⌈log2(largest)⌉
    exponent = exponent + 1 - (num_levels - 1).bit_length()
    step = xp.ldexp(xp.ones_like(mantissa), xp.minimum(exponent, jnp.finfo(mantissa.dtype).maxexp - 1))
    return _grid_levels(_on_grid(step), num_levels)


def pow2_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the levels 0 and ±2^e for consecutive exponents e, the largest chosen by least squared error.

    There are ⌊K/2⌋ positive levels and ⌊(K − 1)/2⌋ negative ones. No exponent is more than 100 below the largest: the
    one at 100 repeats. The largest is searched from twice the row's largest magnitude, 20 octaves down.

    >>> import jax.numpy as jnp
    >>> pow2_levels(jnp.array([[-0.5, 0.0, 0.5, 1.0]]), 4).tolist()
    [[-1.0, 0.0, 0.5, 1.0]]
    """
    positive = [math.ldexp(1.0, -min(i, 100)) for i in range(num_levels // 2)]
    pattern = np.array(sorted([0.0, *positive, *(-p for p in positive[: (num_levels - 1) // 2])]))
    middle = (pattern[:-1] + pattern[1:]) / 2
    xp = namespace(rows)

    def best(values, mass, largest) -> Any:
        del largest
        tops = xp.asarray(powers(1))  # in units of the row's scale

        def option(i) -> tuple[Any, Any]:
            index = xp.searchsorted(xp.asarray(middle) * tops[i], values)
            return squared_error(values, mass, (xp.asarray(pattern) * tops[i])[index]), tops[i]

        return of_least(option, 0, tops.size, values)

    dtype = working_dtype(rows.dtype)
    top = xp.minimum(per_row(best, rows, weights, mask), 2.0 ** (jnp.finfo(dtype).maxexp - 1))
    return _on_grid(top[:, None] * xp.asarray(pattern, dtype)[None])


def normal_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the normal distribution's quantiles times the row's largest magnitude; NF4's table for 16 levels.

    The construction is that of NF4 (Dettmers et al., *QLoRA*, section 3, and its released code), for any number of
    levels: zero is a level, and for even K the positive side has one level more.

    >>> import jax.numpy as jnp
    >>> normal_levels(jnp.array([[-2.0, 1.0]]), 3).tolist()
    [[-2.0, 0.0, 2.0]]
    """
    del weights
    largest = largest_magnitude(rows, mask)
    return _on_grid(largest[:, None] * namespace(rows).asarray([normal_table(num_levels)], largest.dtype))


def normal_table(num_levels: int) -> list[float]:
    """Returns the K ascending levels of `fit_normal` for a largest magnitude of 1.

    >>> [round(level, 4) for level in normal_table(4)]
    [-1.0, 0.0, 0.4358, 1.0]
    """
    if num_levels <= 2:
        return [[0.0], [-1.0, 1.0]][num_levels - 1]
    positive, negative = num_levels // 2, num_levels - 1 - num_levels // 2
    end = 1 - (1 / (2 * num_levels) + 1 / (2 * (num_levels - 1))) / 2

    def side(count) -> list[float]:
        quantiles = [NormalDist().inv_cdf(end + (0.5 - end) * i / count) for i in range(count)]
        return [q / quantiles[0] for q in quantiles]

    return sorted([0.0, *side(positive), *(-level for level in side(negative))])


def quantile_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the means of K groups of equal count (or equal weight), in ascending order of value.

    A group may be empty because one value outweighs it; its level repeats the level before.

    >>> import jax.numpy as jnp
    >>> quantile_levels(jnp.array([[5.0, 1.0, 3.0, 9.0]]), 2).tolist()
    [[2.0, 7.0]]
    """
    if isinstance(rows, np.ndarray):
        return _quantile_on_host(rows, num_levels, weights, mask)
    dtype = working_dtype(rows.dtype)
    mass = mass_of(rows, weights, mask).astype(dtype)
    values, mass = lax.sort((jnp.where(mass > 0, rows.astype(dtype), jnp.inf), mass), num_keys=2)
    with x64():
        mass = mass.astype(jnp.float64)
        total = mass.sum(axis=-1, keepdims=True)
        middle = jnp.cumsum(mass, axis=-1) - mass / 2
        group = (middle * (1 / jnp.where(total > 0, total, 1)) * num_levels).astype(jnp.int32)
        group = jnp.clip(group, 0, num_levels - 1)
        moment = jnp.where(mass > 0, values.astype(jnp.float64), 0) * mass
        sums = jax.vmap(lambda m, g: jax.ops.segment_sum(m, g, num_levels, indices_are_sorted=True))
        weight = sums(mass, group)
        mean = jnp.where(weight > 0, sums(moment, group) / jnp.where(weight > 0, weight, 1), -jnp.inf)
        first = jnp.min(jnp.where(weight > 0, mean, jnp.inf), axis=-1, keepdims=True)
        return jnp.maximum(lax.cummax(mean, axis=1), jnp.where(jnp.isfinite(first), first, 0)).astype(dtype)


fit_uniform, fit_uniform_pow2, fit_dfp = fit_by(uniform_levels), fit_by(uniform_pow2_levels), fit_by(dfp_levels)
fit_pow2, fit_normal, fit_quantile = fit_by(pow2_levels), fit_by(normal_levels), fit_by(quantile_levels)


def _quantile_on_host(rows, num_levels, weights, mask) -> np.ndarray:
    """Computes `quantile_levels` for NumPy rows."""
    dtype = working_dtype(rows.dtype)
    count, length = rows.shape
    scale = row_scale(rows, mask).astype(np.float64)[:, None]  # in these units no sum overflows
    levels = np.zeros((count, num_levels), dtype)

    def fit_block(some, columns) -> None:
        values, mass = flushed(rows[some, columns].astype(dtype)), None
        if weights is None and mask is None:
            values.sort(axis=-1)
            mass = np.ones((1, length))
        else:
            mass = mass_of(rows[some], *(None if x is None else x[some] for x in (weights, mask))).astype(dtype)
            values, mass = sorted_pairs(np.where(mass > 0, values, dtype.type(np.inf)), mass)
            mass = mass.astype(np.float64)
        total = mass.sum(axis=-1, keepdims=True)
        middle = np.cumsum(mass, axis=-1) - mass / 2
        group = (middle * (1 / np.where(total > 0, total, 1)) * num_levels).astype(np.intp)
        group = np.clip(group, 0, num_levels - 1) + np.arange(len(values))[:, None] * num_levels
        moment = np.where(mass > 0, values.astype(np.float64), 0) / scale[some] * mass
        weight, moment = (
            np.bincount(group.reshape(-1), np.broadcast_to(x, group.shape).reshape(-1), levels[some].size)
            for x in (mass, moment)
        )
        mean = np.where(weight > 0, moment / np.where(weight > 0, weight, 1), -np.inf).reshape(-1, num_levels)
        first = np.where(mean > -np.inf, mean, np.inf).min(axis=-1, keepdims=True)
        mean = np.maximum(np.maximum.accumulate(mean, axis=-1), np.where(np.isfinite(first), first, 0))
        levels[some] = flushed((mean * scale[some]).astype(dtype))

    over_blocks(fit_block, count, length, max(length, BLOCK))
    return levels
