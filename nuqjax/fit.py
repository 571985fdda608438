"""The table of methods, and `fit`: rows to levels by any of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax.assign import Fit
from nuqjax.fit_enq import fit_enq
from nuqjax.fit_grid import fit_dfp, fit_normal, fit_pow2, fit_quantile, fit_uniform, fit_uniform_pow2
from nuqjax.fit_knq import fit_knq
from nuqjax.rows import namespace

METHODS: dict[str, Callable[..., Fit]] = {
    "knq": fit_knq,
    "enq": fit_enq,
    "uniform": fit_uniform,
    "uniform_pow2": fit_uniform_pow2,
    "dfp": fit_dfp,
    "normal": fit_normal,
    "quantile": fit_quantile,
    "pow2": fit_pow2,
}


def check_method(method: str) -> None:
    """Raises ValueError, listing the known methods, unless `method` is one."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


def fit(
    rows: jax.Array,
    num_levels: int,
    method: str = "knq",
    *,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
    keep_zero: bool = False,
    tolerance: float | None = 1e-6,
) -> Fit:
    """Fits `num_levels` levels to each row of values. Pure, and jittable with all but the arrays static.

    Methods:
      - `"knq"`: the levels that minimise Σ wᵢ (xᵢ − level)² over all choices of levels: the global k-means optimum,
        proven to within `tolerance`.
      - `"enq"`: equal-width intervals represented by their means (our reading of arXiv 1607.02720).
      - `"uniform"`, `"uniform_pow2"`: the two's-complement grid at the (power-of-two) step of least squared error.
      - `"dfp"`: Ristretto's dynamic fixed point.
      - `"normal"`: the normal distribution's quantiles times the largest magnitude; NF4's table for 16 levels.
      - `"quantile"`: means of groups of equal count.
      - `"pow2"`: 0 and ± powers of two.

    Args:
      rows: `[R, N]` finite values of any floating dtype; a row is fitted by itself.
      num_levels: K, 1 to 256.
      method: a name from the list above.
      weights: `[R, N]` non-negative importances; a value of weight 0 does not count. None: 1 each.
      mask: `[R, N]` bool, False where a value does not count. None: all count.
      keep_zero: one level is exactly 0.
      tolerance: for `"knq"`, the relative gap between `sse` and `lower_bound` at which the search may stop. None leaves
        the proof out (`lower_bound` is 0), and with it the certainty, though of 22,440 rows of 300 to 10⁵ values, heavy
        tails and outliers among them, the proof improved none (`python -m experiments.optimality`). A row of 10⁶ values
        takes 0.03 s without and with the proof for 16 levels, 0.07 s and 0.26 s for 256
        (`python -m experiments.benchmark_fit rows`). Levels are rounded to the rows' working dtype, and `sse` counts
        what that costs: more than 10⁻⁶ in clusters 2 · 10⁴ deviations apart at 16 levels. No row that is distributed
        over a mesh is gathered for its proof; rows on one device that is no CPU come to the host. Where arrays are
        traced, or several processes hold them, rows with more than some hundred distinct values have a bound as coarse
        as such cells.

    Returns:
      A `Fit`: `levels [R, K]` ascending, in the rows' units and float32 (float64 for float64 rows); `sse [R]` and
      `lower_bound [R]` in units of `scale [R]` squared.

    Raises:
      ValueError: `rows` is not two-dimensional or not floating, the shapes of `weights` or `mask` differ from it,
        `num_levels` is outside 1..256, or the method is unknown.

    >>> import jax.numpy as jnp
    >>> fitted = fit(jnp.array([[0.0, 1.0, 10.0, 11.0, 12.0]]), 2)
    >>> fitted.levels.tolist()
    [[0.5, 11.0]]
    >>> (fitted.sse * fitted.scale**2).tolist()
    [2.5]
    """
    check_method(method)
    if isinstance(rows, np.ndarray):  # not copied
        rows = rows.astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)
    else:
        rows = jnp.asarray(rows)
    if rows.ndim != 2:
        raise ValueError(f"fit: rows of shape {rows.shape}, but [R, N] is wanted")
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"fit: rows of dtype {rows.dtype}, but a floating dtype is wanted")
    if isinstance(num_levels, bool) or not isinstance(num_levels, int) or not 1 <= num_levels <= 256:
        raise ValueError(f"fit: num_levels is {num_levels!r}, but a whole number from 1 to 256 is wanted")
    for name, array in (("weights", weights), ("mask", mask)):
        if array is not None and jnp.shape(array) != rows.shape:
            raise ValueError(f"fit: {name} of shape {jnp.shape(array)}, but the rows are {rows.shape}")
    asarray = namespace(rows).asarray
    mask = None if mask is None else asarray(mask)
    if weights is not None:
        given: Any = asarray(weights)
        weights, mask = given, given > 0 if mask is None else mask & (given > 0)
    return METHODS[method](rows, num_levels, weights=weights, mask=mask, keep_zero=keep_zero, tolerance=tolerance)
