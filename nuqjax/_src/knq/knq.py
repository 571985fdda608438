"""KNQ: the levels of least squared error: one-dimensional k-means by dynamic programming.

In one dimension the clusters of an optimal k-means are intervals of the sorted values, so the problem is to part a
sorted row into K intervals (Wu 1991; Grønlund et al., arXiv 1701.07204). `rows.sorted` sorts a row into distinct
values with exact running sums (`rows.long` a long one, `count_rows` one of 16-bit values), `search.search` finds a
partition, `search.gaps` narrows gaps that would keep sums from resolving it, `proof.proof` bounds from below what
any other could cost, and in `run.levels` it becomes levels: each the mean of its interval, rounded once. Where rows
are decides who does it: `run.host`, `run.traced` or `run.mesh`. On the host the kernels are NumPy's
(`search.priced_host`, `search.dense_host`, `search.windows_host`, `proof.path_host`), and nothing is compiled but
for rows of 10⁶ values and more.

A row with no more distinct values than the dense programme has cuts (512, or 1024 if it is no longer than that; 256
where there are more than eight rows) is solved exactly, and so is one of up to 1280 where a price has a path of K
intervals. Another is searched from coarse cells down to single values, wherever a best path may still pass;
`python -m experiments.optimality` compares that with the proof. With a `tolerance` the proof follows, by a path through
every cut or, in rows longer than 65,536 values, by branch and bound, until the levels are known to be within it of the
optimum, and takes better ones where it comes upon them; of a row that is distributed over a mesh it asks the devices
for what it needs. Under `jit` the levels are the same, but the bound of a long row is one round only, as coarse as some
hundred cells.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nuqjax._src.knq.run.host import fit_on_host
from nuqjax._src.knq.run.levels import Task, dense_cuts
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

    Concrete arrays on a CPU are fitted by NumPy, others by XLA; both ways give the same bits, except of `lower_bound`,
    which is closer on the host. With a `tolerance` arrays on one other device come to the host, where the proof runs;
    those on a mesh are left to `fit_on_mesh`.

    Args:
      rows: `[R, N]` finite values of any floating dtype; denormal values may count as zero.
      num_levels: K, 1 to 256.
      weights: `[R, N]` non-negative, or None for 1 each; a value of weight 0 does not count.
      mask: `[R, N]` bool, False where a value does not count, or None.
      keep_zero: the optimum among levels of which one is exactly 0.
      tolerance: the relative gap between `sse` and `lower_bound` at which the search may stop; None leaves
        `lower_bound` at 0 and saves the time that the proof takes. Traced rows, and those that several processes hold,
        have a coarser bound.

    Returns:
      A `Fit`. A row with no more distinct values than levels comes back exactly, subnormal ones as zero; spare levels
      repeat the last.

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
    task = Task(num_levels, keep_zero, tolerance, dense_cuts(count, length))
    given = [x for x in (rows, weights, mask) if x is not None]
    away = [x for x in given if _elsewhere(x)]
    if any(tolerance is None or not _on_one_device(x) for x in away):
        return fit_traced(rows, weights, mask, task, dtype)
    fitted = fit_on_host(np.asarray(rows), _host(weights), _host(mask), task, dtype)
    return jax.device_put(fitted, away[0].sharding) if away else fitted


def _host(array: Any) -> np.ndarray | None:
    return None if array is None else np.asarray(array)


def _on_one_device(array: Any) -> bool:
    """Whether an array is there, not traced, and not on several devices."""
    return not isinstance(array, jax.core.Tracer) and (not isinstance(array, jax.Array) or len(array.devices()) == 1)


def _elsewhere(array: Any) -> bool:
    """Whether an array is traced, or not on one CPU."""
    if isinstance(array, jax.core.Tracer):
        return True
    if not isinstance(array, jax.Array):
        return False
    devices = array.devices()
    return len(devices) > 1 or next(iter(devices)).platform != "cpu"
