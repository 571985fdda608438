"""Levels on a given grid, of which at most a step or the largest magnitude is fitted: the baselines.

`uniform`, `uniform_pow2` and `dfp` are K-level two's-complement grids `step · {−⌊K/2⌋ … K − 1 − ⌊K/2⌋}`; `pow2` has 0
and signed powers of two; `normal` and `quantile` follow the normal distribution and the data's own.
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax.assign import Fit, finish, row_scale, working_dtype

_BINS = 4096  # longer rows are searched as a histogram of so many bins
_BATCH_VALUES = 2**20  # values searched at once: bounds memory
_SEARCH_DEPTH = 8  # octaves of steps searched below the step whose grid just spans the values
_SEARCH_DENSITY = 16  # steps an octave, each of which is improved
_POW2_DEPTH = 20  # octaves of power-of-two steps and levels searched


def _grid(num_levels: int) -> tuple[int, int]:
    """The least and the largest multiple of the step in a two's-complement grid of K levels."""
    return -(num_levels // 2), num_levels - 1 - num_levels // 2


def _grid_levels(step: jax.Array, num_levels: int) -> jax.Array:
    low, high = _grid(num_levels)
    most = jnp.finfo(step.dtype).max  # a grid may reach beyond the largest value, and that beyond the dtype
    return jnp.clip(jnp.minimum(step, most)[:, None] * jnp.arange(low, high + 1, dtype=step.dtype), -most, most)


def fit_uniform(rows, num_levels, *, weights=None, mask=None, keep_zero=False, tolerance=None) -> Fit:
    """The K-level two's-complement grid at the step of least squared error.

    The step is found by search, down to a grid that spans 1/256 of the range; a row longer than 4096 is searched as a
    histogram of 4096 bins and their means.

    Args and returns as for `nuqjax.fit`; `lower_bound` is 0.

    >>> import jax.numpy as jnp
    >>> fit_uniform(jnp.array([[-2.0, -1.0, 0.0, 1.0]]), 4).levels.round(6).tolist()
    [[-2.0, -1.0, 0.0, 1.0]]
    """
    del tolerance
    return finish(rows, uniform_levels(rows, num_levels, weights=weights, mask=mask), weights, mask, keep_zero)


def uniform_levels(rows, num_levels, *, weights=None, mask=None) -> jax.Array:
    """The levels of `fit_uniform` alone; one executable serves every number of them."""
    return _grid_levels(_uniform_steps(rows, jnp.int32(num_levels), weights, mask), num_levels)


@jax.jit
def _uniform_steps(rows, num_levels, weights, mask) -> jax.Array:
    return _per_row(partial(_best_step, num_levels=num_levels), rows, weights, mask)


def fit_uniform_pow2(rows, num_levels, *, weights=None, mask=None, keep_zero=False, tolerance=None) -> Fit:
    """The K-level two's-complement grid at the power-of-two step of least squared error.

    The step is sought from the one whose grid holds every value, 20 octaves down; a row longer than 4096 is searched as
    a histogram of 4096 bins and their means.

    Args and returns as for `nuqjax.fit`; `lower_bound` is 0.

    >>> import jax.numpy as jnp
    >>> fit_uniform_pow2(jnp.array([[-3.0, -1.4, 0.1, 1.6]]), 4).levels.tolist()
    [[-4.0, -2.0, 0.0, 2.0]]
    """
    del tolerance
    step = _per_row(partial(_best_pow2_step, num_levels=num_levels), rows, weights, mask)
    return finish(rows, _grid_levels(step, num_levels), weights, mask, keep_zero)


def fit_dfp(rows, num_levels, *, weights=None, mask=None, keep_zero=False, tolerance=None) -> Fit:
    """Ristretto's dynamic fixed point: the power-of-two step whose integer part just holds the largest magnitude.

    The integer part has ⌈log2(largest) + 1⌉ bits, sign included, and the word has log2 K, so a largest magnitude that
    is itself a power of two saturates (Gysel et al., *Hardware-oriented Approximation of CNNs*, section 3).

    Args and returns as for `nuqjax.fit`; `lower_bound` is 0.

    Raises:
      ValueError: K is not a power of two, so there is no such word.

    >>> import jax.numpy as jnp
    >>> fit_dfp(jnp.array([[-3.0, 1.0]]), 8).levels.tolist()
    [[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]]
    """
    del tolerance
    if num_levels & (num_levels - 1):
        raise ValueError(f'method "dfp": {num_levels} levels, but a fixed-point word has a power of two of them')
    mantissa, exponent = jnp.frexp(_largest(rows, mask))
    exponent = jnp.where(mantissa == 0.5, exponent - 1, exponent)  # ⌈log2(largest)⌉
    exponent = exponent + 1 - (num_levels - 1).bit_length()
    step = jnp.ldexp(jnp.ones_like(mantissa), jnp.minimum(exponent, jnp.finfo(mantissa.dtype).maxexp - 1))
    return finish(rows, _grid_levels(step, num_levels), weights, mask, keep_zero)


def fit_pow2(rows, num_levels, *, weights=None, mask=None, keep_zero=False, tolerance=None) -> Fit:
    """The levels 0 and ±2^e for consecutive exponents e, the largest chosen by least squared error.

    There are ⌊K/2⌋ positive levels and ⌊(K − 1)/2⌋ negative ones. Exponents more than 100 below the largest repeat.
    The largest is sought from twice the row's largest magnitude, 20 octaves down.

    Args and returns as for `nuqjax.fit`; `lower_bound` is 0.

    >>> import jax.numpy as jnp
    >>> fit_pow2(jnp.array([[-0.5, 0.0, 0.5, 1.0]]), 4).levels.tolist()
    [[-1.0, 0.0, 0.5, 1.0]]
    """
    del tolerance
    positive = [math.ldexp(1.0, -min(i, 100)) for i in range(num_levels // 2)]
    pattern = sorted([0.0, *positive, *(-p for p in positive[: (num_levels - 1) // 2])])

    def best(values, mass, largest):
        del largest
        tops = _powers(1, values.dtype)  # in units of the row's scale

        def option(i):
            return _squared_error(values, mass, _nearest(values, tops[i] * jnp.array(pattern))), tops[i]

        return _of_least(option, 0, tops.size, values.dtype)

    top = jnp.minimum(_per_row(best, rows, weights, mask), 2.0 ** (jnp.finfo(working_dtype(rows.dtype)).maxexp - 1))
    levels = top[:, None] * jnp.array(pattern, top.dtype)
    return finish(rows, levels, weights, mask, keep_zero)


def fit_normal(rows, num_levels, *, weights=None, mask=None, keep_zero=False, tolerance=None) -> Fit:
    """Levels at the normal distribution's quantiles, times the row's largest magnitude; NF4's table for 16 levels.

    The construction is that of NF4 (Dettmers et al., *QLoRA*, section 3, and its released code) for any number of
    levels: zero is a level, and one side has one level more.

    Args and returns as for `nuqjax.fit`; `lower_bound` is 0.

    >>> import jax.numpy as jnp
    >>> fit_normal(jnp.array([[-2.0, 1.0]]), 3).levels.tolist()
    [[-2.0, 0.0, 2.0]]
    """
    del tolerance
    largest = _largest(rows, mask)
    levels = largest[:, None] * jnp.array(normal_table(num_levels), largest.dtype)
    return finish(rows, levels, weights, mask, keep_zero)


def normal_table(num_levels: int) -> list[float]:
    """The K ascending levels of `fit_normal` for a largest magnitude of 1.

    >>> [round(level, 4) for level in normal_table(4)]
    [-1.0, 0.0, 0.4358, 1.0]
    """
    if num_levels <= 2:
        return [[0.0], [-1.0, 1.0]][num_levels - 1]
    positive, negative = num_levels // 2, num_levels - 1 - num_levels // 2
    end = 1 - (1 / (2 * num_levels) + 1 / (2 * (num_levels - 1))) / 2

    def side(count):
        quantiles = [NormalDist().inv_cdf(end + (0.5 - end) * i / count) for i in range(count)]
        return [q / quantiles[0] for q in quantiles]

    return sorted([0.0, *side(positive), *(-level for level in side(negative))])


def fit_quantile(rows, num_levels, *, weights=None, mask=None, keep_zero=False, tolerance=None) -> Fit:
    """The means of K groups of equal count (or equal weight), in ascending order of value.

    Args and returns as for `nuqjax.fit`; `lower_bound` is 0. A group that is empty, because one value outweighs it,
    repeats the level before it.

    >>> import jax.numpy as jnp
    >>> fit_quantile(jnp.array([[5.0, 1.0, 3.0, 9.0]]), 2).levels.tolist()
    [[2.0, 7.0]]
    """
    del tolerance
    dtype = working_dtype(rows.dtype)
    mass = _mass(rows, weights, mask).astype(dtype)
    values, mass = lax.sort((jnp.where(mass > 0, rows.astype(dtype), jnp.inf), mass), num_keys=2)
    with jax.enable_x64(True):
        mass = mass.astype(jnp.float64)
        total = mass.sum(axis=-1, keepdims=True)
        middle = jnp.cumsum(mass, axis=-1) - mass / 2
        group = (middle / jnp.where(total > 0, total, 1) * num_levels).astype(jnp.int32)
        group = jnp.clip(group, 0, num_levels - 1)
        moment = jnp.where(mass > 0, values.astype(jnp.float64), 0) * mass
        sums = jax.vmap(lambda m, g: jax.ops.segment_sum(m, g, num_levels, indices_are_sorted=True))
        weight = sums(mass, group)
        mean = jnp.where(weight > 0, sums(moment, group) / jnp.where(weight > 0, weight, 1), -jnp.inf)
        first = jnp.min(jnp.where(weight > 0, mean, jnp.inf), axis=-1, keepdims=True)
        levels = jnp.maximum(lax.cummax(mean, axis=1), jnp.where(jnp.isfinite(first), first, 0)).astype(dtype)
    return finish(rows, levels, weights, mask, keep_zero)


def _mass(rows, weights, mask) -> jax.Array:
    """`[R, N]` the weight of each value, zero where it does not count."""
    mass = jnp.ones(rows.shape, working_dtype(rows.dtype)) if weights is None else weights
    return mass if mask is None else jnp.where(mask, mass, 0)


def _largest(rows, mask) -> jax.Array:
    """`[R]` the largest magnitude of each row."""
    magnitude = jnp.abs(rows.astype(working_dtype(rows.dtype)))
    return jnp.max(magnitude if mask is None else jnp.where(mask, magnitude, 0), axis=-1, initial=0)


def _per_row(best: Callable, rows, weights, mask) -> jax.Array:
    """`[R]` what `best(values, mass, largest)` finds for each row, searched in float64 in units of the row's scale.

    Long rows are searched as histograms, their bins' means and weights; short ones are sorted, so that sums do not
    depend on the order of the values.
    """
    dtype = working_dtype(rows.dtype)
    scale = row_scale(rows, mask)
    mass = _mass(rows, weights, mask).astype(dtype)
    if weights is not None:
        mass = mass / row_scale(mass)[:, None]
    values = jnp.where(mass > 0, rows.astype(dtype), 0) / scale[:, None]
    if rows.shape[-1] <= _BINS:
        values, mass = lax.sort((values, mass), num_keys=2)
    batch = max(1, _BATCH_VALUES // max(1, min(rows.shape[-1], _BINS)))

    def one(row):
        values, mass = row[0].astype(jnp.float64), row[1].astype(jnp.float64)
        largest = jnp.max(jnp.abs(values), initial=0)
        if values.shape[0] > _BINS:
            values, mass = _histogram(values, mass, largest)
        return best(values, mass, largest).astype(dtype)

    with jax.enable_x64(True):
        found = lax.map(one, (values, mass), batch_size=min(batch, rows.shape[0])) if rows.shape[0] else scale
    return found.astype(dtype) * scale


def _histogram(values, mass, largest):
    """Values as bins' means and weights; summed as integers, so that no order of summation matters."""
    unit = 2.0**30
    width = jnp.where(largest > 0, largest, 1) * (2 / _BINS)
    bins = jnp.clip((values / width).astype(jnp.int32) + _BINS // 2 - (values < 0), 0, _BINS - 1)

    def total(amount):
        whole = jnp.round(amount * unit).astype(jnp.int64)
        whole = jnp.zeros(_BINS, jnp.int64).at[bins].add(whole, mode="promise_in_bounds")
        return whole.astype(jnp.float64) / unit

    weight, moment = total(mass), total(mass * values)
    edges = (jnp.arange(_BINS, dtype=jnp.int32) - _BINS // 2) * width
    # The mean of values of very small weight is all rounding: it stays in the bin at least.
    return jnp.clip(moment / jnp.where(weight > 0, weight, 1), edges, edges + width), weight


def _of_least(option: Callable, begin, end, dtype) -> jax.Array:
    """What the first option of least error gives, of `option(i) -> (error, result)` for begin ≤ i < end."""

    def visit(i, best):
        error, result = option(i)
        better = error < best[0]
        return jnp.where(better, error, best[0]), jnp.where(better, result, best[1])

    return lax.fori_loop(begin, end, visit, (jnp.array(jnp.inf, dtype), jnp.array(0, dtype)))[1]


def _squared_error(values, mass, nearest):
    return jnp.sum(mass * (values - nearest) ** 2)


def _nearest(values, levels):
    """The nearest of a few ascending levels to each value."""
    middle = (levels[:-1] + levels[1:]) / 2
    return levels[jnp.searchsorted(middle, values)]


def _multiples(values, step, num_levels):
    """Which multiple of the step in the grid is nearest to each value."""
    low, high = _grid(num_levels)
    return jnp.clip(jnp.round(values / step), low, high)


def _best_step(values, mass, largest, *, num_levels):
    """The step of least squared error.

    Each of many steps assigns the values to multiples kᵢ; Σ wᵢ xᵢ kᵢ / Σ wᵢ kᵢ² is the best step for them, and takes
    (Σ wᵢ xᵢ kᵢ)² / Σ wᵢ kᵢ² off the squared error of all zeros. The search is repeated, more finely, around the best.
    """

    def improve(step):
        multiple = _multiples(values, step, num_levels)
        moment, square = jnp.sum(mass * values * multiple), jnp.sum(mass * multiple * multiple)
        square = jnp.where(square > 0, square, 1)
        return -moment * moment / square, jnp.where(moment > 0, moment / square, step)

    octaves = 32 - lax.clz(num_levels - 1) + _SEARCH_DEPTH  # ⌈log2 K⌉ and more
    around = 2 * _SEARCH_DENSITY + 1  # ratios of the second search, which stand first
    exponents = np.append(np.linspace(-1, 1, around), -np.arange(16 * _SEARCH_DENSITY + 1)) / _SEARCH_DENSITY
    ratios = jnp.exp2(jnp.array(exponents, values.dtype))

    def search(number, center):
        """One of the two searches, by one program for both: half the time to compile."""
        begin = jnp.where(number == 0, around, 0)
        end = jnp.where(number == 0, around + octaves * _SEARCH_DENSITY + 1, around)
        return _of_least(lambda i: improve(center * ratios[i]), begin, end, values.dtype)

    widest = 2 * jnp.where(largest > 0, largest, 1)  # from where on every value is nearest to zero
    return lax.fori_loop(0, 2, search, widest)


def _best_pow2_step(values, mass, largest, *, num_levels):
    """The power-of-two step of least squared error."""
    del largest  # less than 4, in units of the row's scale
    steps = _powers(3 - (num_levels - 1).bit_length(), values.dtype)

    def option(i):
        return _squared_error(values, mass, steps[i] * _multiples(values, steps[i], num_levels)), steps[i]

    return _of_least(option, 0, steps.size, values.dtype)


def _powers(top: int, dtype) -> jax.Array:
    """Powers of two from 2^top downwards."""
    return jnp.array([2.0 ** (top - i) for i in range(_POW2_DEPTH + 1)], dtype)
