"""ENQ: equal-distance intervals, each represented by the mean of its values.

This is our reading of Sun, Lin, Wang, *Intra-layer Nonuniform Quantization for Deep Convolutional Neural Network*
(arXiv 1607.02720), of which we have only the abstract: the range of a row is split into K intervals of equal width, and
each is represented by the mean of the values in it.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.leaf.assign import fit_by, working_dtype
from nuqjax._src.leaf.rows import namespace
from nuqjax._src.platform.host import flushed, over_blocks, x64

_UNIT = 2.0**31  # units in 1, for a value's weight and place in its interval: sums of 2³² values stay inside int64


def enq_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the ENQ levels `[R, K]` of each row; an empty interval is represented by its midpoint.

    Args:
      rows: `[R, N]` finite values.
      num_levels: K, 1 to 256.
      weights: `[R, N]` non-negative, or None for 1 each; an interval's mean is weighted.
      mask: `[R, N]` bool, False where a value does not count, or None.

    >>> import jax.numpy as jnp
    >>> enq_levels(jnp.array([[0.0, 1.0, 2.0, 4.0]]), 2).tolist()
    [[0.5, 3.0]]
    """
    if isinstance(rows, np.ndarray):
        return _levels_on_host(rows, num_levels, weights, mask)
    dtype = working_dtype(rows.dtype)
    counted = jnp.ones(rows.shape, bool) if mask is None else mask
    if weights is not None:
        counted = counted & (weights > 0)
    values = rows.astype(dtype)
    any_counted = counted.any(axis=-1)
    low = jnp.where(any_counted, jnp.min(values, axis=-1, initial=jnp.inf, where=counted), 0)
    high = jnp.where(any_counted, jnp.max(values, axis=-1, initial=-jnp.inf, where=counted), 0)
    importance = None if weights is None else jnp.where(counted, weights, 0).astype(dtype)
    with x64():
        return _interval_means(values, counted, importance, low, high, num_levels).astype(dtype)


fit_enq = fit_by(enq_levels)


def _interval_means(values, counted, importance, low, high, num_levels) -> Any:
    """Returns the levels `[R, K]` float64. Sums are of integers, so the order of summation does not change them.

    Values are halved, so that the widest range does not overflow.
    """
    low, high = low.astype(jnp.float64)[:, None] / 2, high.astype(jnp.float64)[:, None] / 2
    width = high - low
    place = (values.astype(jnp.float64) / 2 - low) * _reciprocal(width) * num_levels
    interval = jnp.clip(place.astype(jnp.int32), 0, num_levels - 1)
    inside = jnp.where(place < num_levels, lax.rem(jnp.maximum(place, 0), 1.0), 1)

    def relative(importance, interval) -> Any:
        """Divides weights by the heaviest of the interval, so that an interval of light values is as exact as any."""
        heaviest = jnp.zeros(num_levels, jnp.float64).at[interval].max(importance, mode="promise_in_bounds")
        return importance / jnp.where(heaviest > 0, heaviest, 1)[interval]

    def mean(share, interval, inside) -> Any:
        whole = jnp.round(jnp.stack([share, share * inside], axis=-1) * _UNIT).astype(jnp.int64)
        totals = jnp.zeros((num_levels, 2), jnp.int64).at[interval].add(whole, mode="promise_in_bounds")
        return _quotient(*totals.T)

    share = counted if importance is None else jax.vmap(relative)(importance.astype(jnp.float64), interval)
    return _levels_at(jax.vmap(mean)(share.astype(jnp.float64), interval, inside), low, width)


def _levels_on_host(rows, num_levels, weights, mask) -> np.ndarray:
    """Computes `enq_levels` of NumPy rows in blocks: integers below 2⁵³ are summed in float64, block sums in int64.

    Subnormal weights are not treated as zero here: `fit` has set them to zero already.
    """
    count, length = rows.shape
    dtype = working_dtype(rows.dtype)

    def part(some, columns) -> tuple[Any, Any, Any]:
        """Returns values, their weights or None, and whether they count, or None if all do."""
        values, weight = flushed(rows[some, columns].astype(dtype)), None
        counted = None if mask is None else mask[some, columns]
        if weights is not None:
            weight = weights[some, columns].astype(dtype).astype(np.float64)
            counted = weight > 0 if counted is None else counted & (weight > 0)
        return values, weight if counted is None or weight is None else np.where(counted, weight, 0), counted

    def ends(some, columns) -> tuple[Any, Any, Any]:
        values, _, counted = part(some, columns)
        least, most = (values, values) if counted is None else (np.where(counted, values, x) for x in (np.inf, -np.inf))
        return some, least.min(axis=-1), most.max(axis=-1)

    low, high = np.full((count, 1), np.inf), np.full((count, 1), -np.inf)
    for some, least, most in over_blocks(ends, count, length):
        low[some, 0], high[some, 0] = np.minimum(low[some, 0], least), np.maximum(high[some, 0], most)
    low, high = (np.where(low <= high, x, 0) / 2 for x in (low, high))
    width = high - low

    def places(values, some) -> tuple[Any, Any]:
        """Returns the interval of each value, numbered through all rows of the block, and the value's place in it."""
        with np.errstate(over="ignore"):  # values that do not count may overflow
            inside = (values.astype(np.float64) / 2 - low[some]) * _reciprocal(width[some]) * num_levels
        inside = np.clip(inside, 0, num_levels)
        interval = np.minimum(inside.astype(np.intp), num_levels - 1)
        inside -= interval
        interval += np.arange(len(values))[:, None] * num_levels
        return interval.reshape(-1), inside.reshape(-1)

    def heaviest(some, columns) -> tuple[Any, np.ndarray]:
        values, weight, _ = part(some, columns)
        most = np.zeros(len(values) * num_levels)
        np.maximum.at(most, places(values, some)[0], weight.reshape(-1))
        return some, most.reshape(-1, num_levels)

    relative = np.zeros((count, num_levels))  # the heaviest weight of each interval
    if weights is not None:
        for some, most in over_blocks(heaviest, count, length):
            relative[some] = np.maximum(relative[some], most)
        relative[relative == 0] = 1

    def sums(some, columns) -> tuple[Any, Iterator[np.ndarray]]:
        values, weight, counted = part(some, columns)
        interval, inside = places(values, some)
        size = len(values) * num_levels
        if weight is not None:
            share = weight.reshape(-1) / relative[some].reshape(-1)[interval]
        elif counted is not None:
            share = counted.reshape(-1).astype(np.float64)
        else:
            mass = np.bincount(interval, minlength=size) * _UNIT
            share = None
        if share is not None:
            mass, inside = np.bincount(interval, np.rint(share * _UNIT), size), share * inside
        moment = np.bincount(interval, np.rint(inside * _UNIT), size)
        return some, (x.astype(np.int64).reshape(-1, num_levels) for x in (mass, moment))

    total = np.zeros((2, count, num_levels), np.int64)
    for some, added in over_blocks(sums, count, length):
        for x, more in zip(total, added, strict=True):
            x[some] += more
    return flushed(_levels_at(_quotient(*total), low, width).astype(dtype))


def _reciprocal(width: Any) -> Any:
    """Returns 1/width: a compiler may turn many divisions by one number into multiplications, and NumPy does not."""
    return 1 / namespace(width).where(width > 0, width, 1)


def _quotient(mass: Any, moment: Any) -> Any:
    """Returns the mean place, moment/mass, of integer sums; 0.5, the middle, for an empty interval."""
    xp = namespace(mass)
    mass, moment = mass.astype(np.float64), moment.astype(np.float64)
    return xp.where(mass > 0, moment / xp.where(mass > 0, mass, 1), 0.5)


def _levels_at(means: Any, low: Any, width: Any) -> Any:
    """Returns `[R, K]` the levels at mean places in the intervals of ranges `[R, 1]`, whose ends are given halved."""
    xp, num_levels = namespace(means), means.shape[-1]
    offset = (xp.arange(num_levels, dtype=np.int32) + means) * (width * (1 / num_levels))
    return 2 * (low + xp.minimum(offset, width))  # the minimum also prevents a fused multiply-add
