"""KNQ finds the levels of least squared error: one-dimensional k-means by dynamic programming.

In one dimension the clusters of an optimal k-means are intervals of the sorted values, so the problem is to split a
sorted row into K intervals (Wu 1991; Grønlund et al., arXiv 1701.07204). The steps:

- `rows.sorted` sorts a row into distinct values with exact running sums; its `count_rows` counts 16-bit values
  instead, and `rows.long` sorts long rows.
- `search.search` finds a partition. `search.gaps` narrows gaps so wide that the sums could not resolve it.
- `proof.proof` computes a lower bound on the cost of every other partition.
- `run.levels` turns the partition into levels: each is the mean of its interval, rounded once.

`run.host`, `run.traced` or `run.mesh` runs these steps, depending on where the rows are. On the host the kernels use
NumPy (`search.priced_host`, `search.dense_host`, `search.windows_host`, `proof.path_host`), and only rows of 10⁶ values
or more need compiled code.

A row is solved exactly if it has no more distinct values than the dense programme has cuts (512; 1024 if the row is no
longer than that; 256 if there are more than eight rows), or if it has up to 1280 and some price has a path of K
intervals. Any other row is searched from coarse cells down to single values, wherever a best path may still pass;
`python -m experiments.studies.optimality` compares the result with the proof. With a `tolerance` the proof follows: a
path through every cut or, in rows longer than 65,536 values, branch and bound, until the levels are within the
tolerance of the optimum. It takes better levels if it finds some, and asks the devices for what it needs of a row on a
mesh. Under `jit` the levels are the same, but the bound of a long row comes from one round over some hundred cells and
is coarse.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nuqjax._src.knq.run.host import fit_on_host
from nuqjax._src.knq.run.levels import FitOptions, dense_cuts
from nuqjax._src.knq.run.mesh import fit_on_mesh
from nuqjax._src.knq.run.traced import fit_traced
from nuqjax._src.leaf.assign import Fit, working_dtype
from nuqjax._src.leaf.rows import on_mesh


def fit_knq(
    rows: jax.Array,
    num_levels: int,
    *,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
    keep_zero: bool = False,
    tolerance: float | None = 1e-6,
) -> Fit:
    """Fits to each row the levels that minimise Σ wᵢ (xᵢ − level)² over all choices of levels.

    NumPy fits concrete arrays on a CPU, XLA fits others. Both return the same bits except in `lower_bound`, which is
    closer on the host. With a `tolerance`, arrays on one other device are copied to the host, where the proof runs;
    arrays on a mesh go to `fit_on_mesh`.

    Args:
      rows: `[R, N]` finite values of any floating dtype; denormal values may count as zero.
      num_levels: K, 1 to 256.
      weights: `[R, N]` non-negative, or None for 1 each; a value of weight 0 does not count. XLA takes denormal weights
        for 0, NumPy does not.
      mask: `[R, N]` bool, False where a value does not count, or None.
      keep_zero: whether one level is exactly 0; the optimum is then the best among such levels.
      tolerance: the relative gap between `sse` and `lower_bound` at which the search may stop. None leaves
        `lower_bound` at 0 and saves the time of the proof. Traced rows, and rows that several processes hold, have a
        coarser bound.

    Returns:
      A `Fit`. The levels of a row with no more distinct values than levels are these values exactly, subnormal ones as
      zero; spare levels repeat the last.

    >>> import jax.numpy as jnp
    >>> fitted = fit_knq(jnp.array([[1.0, 2.0, 3.0, 10.0, 11.0]]), 2)
    >>> fitted.levels.tolist(), (fitted.sse * fitted.scale**2).tolist()
    ([[2.0, 10.5]], [2.5])
    """
    dtype = working_dtype(rows.dtype)
    count, length = rows.shape
    if count == 0 or length == 0:
        empty = jnp.zeros(count, dtype)
        return Fit(jnp.zeros((count, num_levels), dtype), empty, empty, jnp.ones(count, dtype))
    if on_mesh(rows):
        return fit_on_mesh(
            rows, weights, mask, (0,), num_levels=num_levels, keep_zero=keep_zero, tolerance=tolerance
        )  # fmt: skip
    options = FitOptions(num_levels, keep_zero, tolerance, dense_cuts(count, length))
    given = [x for x in (rows, weights, mask) if x is not None]
    away = [x for x in given if _elsewhere(x)]
    if any(tolerance is None or not _on_one_device(x) for x in away):
        return fit_traced(rows, weights, mask, options, dtype)
    fitted = fit_on_host(np.asarray(rows), _host(weights), _host(mask), options, dtype)
    return jax.device_put(fitted, away[0].sharding) if away else fitted


def _host(array: Any) -> np.ndarray | None:
    return None if array is None else np.asarray(array)


def _on_one_device(array: Any) -> bool:
    """Returns whether an array is concrete and on at most one device."""
    return not isinstance(array, jax.core.Tracer) and (not isinstance(array, jax.Array) or len(array.devices()) == 1)


def _elsewhere(array: Any) -> bool:
    """Returns whether an array is traced, on several devices, or on a device that is not a CPU."""
    if isinstance(array, jax.core.Tracer):
        return True
    if not isinstance(array, jax.Array):
        return False
    devices = array.devices()
    return len(devices) > 1 or next(iter(devices)).platform != "cpu"
