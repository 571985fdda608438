"""ENQ: equal-distance intervals, each represented by the mean of its values.

Our reading of Sun, Lin, Wang, *Intra-layer Nonuniform Quantization for Deep Convolutional Neural Network*
(arXiv 1607.02720), of which the abstract alone is in our hands: the range of a row is cut into K intervals of equal
width, and each is represented by the mean of the values in it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from nuqjax.assign import Fit, finish, working_dtype

_UNIT = 2.0**31  # of a value's weight and place in its interval: sums of 2³² values stay inside int64


def fit_enq(
    rows: jax.Array,
    num_levels: int,
    *,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
    keep_zero: bool = False,
    tolerance: float | None = None,
) -> Fit:
    """Fits ENQ levels to each row.

    Args:
      rows: `[R, N]` finite values.
      num_levels: K, 1 to 256.
      weights: `[R, N]` non-negative, or None for 1 each: an interval's mean is the weighted one.
      mask: `[R, N]` bool, False where a value does not count, or None.
      keep_zero: replace the level nearest to zero by exactly 0.
      tolerance: ignored; ENQ proves nothing.

    Returns:
      A `Fit` with `lower_bound` 0. An empty interval is represented by its midpoint.

    >>> import jax.numpy as jnp
    >>> fit_enq(jnp.array([[0.0, 1.0, 2.0, 4.0]]), 2).levels.tolist()
    [[0.5, 3.0]]
    """
    del tolerance
    dtype = working_dtype(rows.dtype)
    counted = jnp.ones(rows.shape, bool) if mask is None else mask
    if weights is not None:
        counted = counted & (weights > 0)
    values = rows.astype(dtype)
    any_counted = counted.any(axis=-1)
    low = jnp.where(any_counted, jnp.min(values, axis=-1, initial=jnp.inf, where=counted), 0)
    high = jnp.where(any_counted, jnp.max(values, axis=-1, initial=-jnp.inf, where=counted), 0)
    importance = None if weights is None else jnp.where(counted, weights, 0).astype(dtype)
    with jax.enable_x64(True):
        levels = _interval_means(values, counted, importance, low, high, num_levels).astype(dtype)
    return finish(rows, levels, weights, mask, keep_zero)


def _interval_means(values, counted, importance, low, high, num_levels):
    """`[R, K]` float64 means. Sums are of integers, so that no order of summation changes them."""
    low, high = low.astype(jnp.float64)[:, None], high.astype(jnp.float64)[:, None]
    width = high - low
    place = (values.astype(jnp.float64) - low) / jnp.where(width > 0, width, 1) * num_levels
    interval = jnp.clip(place.astype(jnp.int32), 0, num_levels - 1)
    inside = jnp.where(place < num_levels, lax.rem(jnp.maximum(place, 0), 1.0), 1)

    def relative(importance, interval):
        """To the interval's heaviest value, so that an interval of light values is as exact as any."""
        heaviest = jnp.zeros(num_levels, jnp.float64).at[interval].max(importance, mode="promise_in_bounds")
        return importance / jnp.where(heaviest > 0, heaviest, 1)[interval]

    def mean(share, interval, inside):
        whole = jnp.round(jnp.stack([share, share * inside], axis=-1) * _UNIT).astype(jnp.int64)
        totals = jnp.zeros((num_levels, 2), jnp.int64).at[interval].add(whole, mode="promise_in_bounds")
        mass, moment = totals.T.astype(jnp.float64)
        return jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1), 0.5)

    share = counted if importance is None else jax.vmap(relative)(importance.astype(jnp.float64), interval)
    means = jax.vmap(mean)(share.astype(jnp.float64), interval, inside)
    offset = (jnp.arange(num_levels, dtype=jnp.int32) + means) / num_levels * width
    return low + jnp.minimum(offset, width)  # which also keeps the product out of a fused multiply-add
