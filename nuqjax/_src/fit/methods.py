"""The table of methods, and `fit`, which computes levels for rows by any of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from nuqjax._src.fit import grid as fit_grid
from nuqjax._src.fit.enq import enq_levels
from nuqjax._src.knq.knq import fit_knq
from nuqjax._src.leaf.assign import Fit, fit_by, with_zero
from nuqjax._src.platform.host import flushed, on_host, row_by_row, to_numpy, why_unfit
from nuqjax._src.platform.meshes import as_on_automatic, typed_spec
from nuqjax._src.platform.types import Array

_LEVELS: dict[str, Callable[..., Any]] = {
    "enq": enq_levels,
    "uniform": fit_grid.uniform_levels,
    "uniform_pow2": fit_grid.uniform_pow2_levels,
    "dfp": fit_grid.dfp_levels,
    "normal": fit_grid.normal_levels,
    "quantile": fit_grid.quantile_levels,
    "pow2": fit_grid.pow2_levels,
}
METHODS: dict[str, Callable[..., Fit]] = {"knq": fit_knq} | {name: fit_by(levels) for name, levels in _LEVELS.items()}


def check_method(method: str) -> None:
    """Raises ValueError, listing the known methods, unless `method` is one."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


@np.errstate(under="ignore")  # as by default: what is below the least normal number is rounded to 0
def fit(
    rows: Array,
    num_levels: int,
    method: str = "knq",
    *,
    weights: Array | None = None,
    mask: Array | None = None,
    keep_zero: bool = False,
    tolerance: float | None = 1e-6,
) -> Fit:
    """Fits `num_levels` levels to each row of values. Pure, and jittable with all arguments but the arrays static.

    Arrays on the host (NumPy arrays, or JAX arrays on one CPU) are fitted by NumPy, and nothing is compiled. The levels
    equal those of traced arrays; for float64 rows the last bits may differ.

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
      rows: `[R, N]` finite values of any floating dtype; each row is fitted by itself.
      num_levels: K, 1 to 256.
      method: a name from the list above.
      weights: `[R, N]` non-negative importances; a value of weight 0 does not count. None: 1 each.
      mask: `[R, N]` bool, False where a value does not count. None: all count.
      keep_zero: whether one level is exactly 0.
      tolerance: for `"knq"`, the relative gap between `sse` and `lower_bound` at which the search may stop. None skips
        the proof, and `lower_bound` is 0: the levels are then not certain, though the proof improved none of 22,440
        rows of 300 to 10⁵ values, heavy tails and outliers included (`python -m experiments.studies.optimality`). A row
        of 10⁶ values takes 0.03 s for 16 levels, with or without the proof, and for 256 levels 0.07 s without and 0.26
        s with it (`python -m experiments.speed.fit rows`). Levels are rounded to the rows' working dtype, and `sse`
        includes what that costs: more than 10⁻⁶ in clusters 2 · 10⁴ deviations apart at 16 levels. In rows of thousands
        of values, far values with at most 10⁻⁸ of the others' weight cost more (at 10⁹ deviations up to 3 · 10⁻³ of the
        error in 8,192 values and 10⁻¹ in 70,000), and `lower_bound` shows it. A row distributed over a mesh is never
        gathered for its proof; rows on one device that is not a CPU are copied to the host. Where arrays are traced, or
        held by several processes, rows with more than some hundred distinct values have a coarser bound: it is computed
        over some hundred cells.

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
    each = typed_spec(rows)[0] if isinstance(rows, jax.Array) and rows.ndim else None
    of_rows: Any = PartitionSpec(each)
    specs = Fit(levels=of_rows, sse=of_rows, lower_bound=of_rows, scale=of_rows)
    return as_on_automatic(specs)(_fit)(rows, num_levels, method, weights, mask, keep_zero, tolerance)


def _fit(rows, num_levels, method, weights, mask, keep_zero, tolerance) -> Fit:
    host = on_host(rows, weights, mask)
    values: Any = np.asarray(rows) if host else jnp.asarray(rows)
    if values.ndim != 2:
        raise ValueError(f"fit: rows of shape {values.shape}, but [R, N] is wanted")
    if reason := why_unfit(values.dtype):
        raise ValueError(f"fit: rows: {reason}, but a floating dtype such as float32 is wanted")
    values = row_by_row(to_numpy(values)) if host else values
    if isinstance(num_levels, bool) or not isinstance(num_levels, int) or not 1 <= num_levels <= 256:
        raise ValueError(f"fit: num_levels is {num_levels!r}, but a whole number from 1 to 256 is wanted")
    for name, array in (("weights", weights), ("mask", mask)):
        if array is not None and jnp.shape(array) != values.shape:
            raise ValueError(f"fit: {name} of shape {jnp.shape(array)}, but the rows are {values.shape}")
    weights, mask = _counted(weights, mask, host)
    return METHODS[method](values, num_levels, weights=weights, mask=mask, keep_zero=keep_zero, tolerance=tolerance)


def levels_on_host(
    rows: np.ndarray, num_levels: int, method: str, *, weights: Any = None, mask: Any = None, keep_zero: bool = False
) -> np.ndarray:
    """Returns only the levels of `fit`, for NumPy rows and any method but `"knq"`; their error is not computed."""
    weights, mask = _counted(weights, mask, host=True)
    levels = _LEVELS[method](rows, num_levels, weights=weights, mask=mask)
    return with_zero(levels) if keep_zero else levels


def _counted(weights: Any, mask: Any, host: bool) -> tuple[Any, Any]:
    """Returns the weights, and the mask without values of weight 0; NumPy arrays if they are on the host."""
    asarray = (lambda array: row_by_row(to_numpy(array))) if host else jnp.asarray
    mask = None if mask is None else asarray(mask).astype(bool)
    if weights is None:
        return None, mask
    weights = asarray(weights)
    if host and jnp.issubdtype(weights.dtype, jnp.floating):
        weights = flushed(weights)
    return weights, weights > 0 if mask is None else mask & (weights > 0)
