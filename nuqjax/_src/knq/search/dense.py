"""The dense programme: the optimal partition of many rows into K intervals, over every combination of their cuts.

Layer l holds, for each cut, the least cost of l intervals that end there: best[l][p] = min over a of best[l − 1][a] +
cost(a, p) (Bellman 1961). Rows are on the last axis, in the processor's lanes, and a few are handled at a time, so that
costs are computed once and stay in its caches. Few cuts are handled tile by tile, one layer at a time. Many cuts are
handled in small blocks of begins, each of which is added to all later cuts and all layers at once. The least
Σ −S²/n needs no empty interval, so boundary l of a row of M cells is one of the cuts l … M − K + l; empty intervals can
only pay with the changed cost of a lower bound.

A cost depends only on its begin and end, in float64; no product is followed by a sum that could be contracted; and of
equal costs the lowest cut wins. So the result does not depend on the number of rows, nor on the rows next to one.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LANES = 16  # rows handled at once
_UNROLLED = 64  # for up to so many inner cuts the programme is unrolled
_TILE = 16  # cuts handled at once if it is
_BLOCK = 8  # begins handled at once if it is not
_STAGES = 4  # parts of a longer row, each with its later cuts only: half the work, and a program of bounded size


@functools.partial(jax.jit, static_argnames="num_levels")
def dense_rows(
    count: Any, total: Any, above: Any, penalty: Any | None, reach: Sequence[Any] | None, *, num_levels: int
) -> tuple[jax.Array, jax.Array]:
    """Finds the partition of each row into K intervals that makes Σ S²/n greatest; intervals may be empty.

    Call or trace it where 64-bit types are enabled. An interval that contains the held zero gains nothing. For a lower
    bound each interval also gains its extent times the penalties at its first and at its last cut.

    Args:
      count: `[R, M + 1]` running weights at ascending cuts; float64 or int64. Cuts may repeat.
      total: `[R, M + 1]` running sums of weight times value; float64 or int64.
      above: `[R, M + 1]` bool, whether a cut lies above the held zero.
      penalty: `[R, M + 1]` float64, what a boundary at a cut can save per unit of the extent of the intervals next to
        it, or None.
      reach: with `penalty`, two arrays `[R, M + 1]` float64: the highest value that an interval ending at a cut can
        reach, and the lowest that one beginning there can reach.
      num_levels: K, at least 1.

    Returns:
      `[R, K − 1]` int32 ascending places of the boundaries among the cuts, and `[R]` float64 minus the gain.

    >>> import numpy as np
    >>> from nuqjax._src.platform.host import x64
    >>> values = np.array([[1.0, 2.0, 3.0, 10.0, 11.0]])
    >>> running = np.concatenate([[[0.0]], np.cumsum(values, axis=1)], axis=1)
    >>> with x64():
    ...     cuts, best = dense_rows(np.arange(6.0)[None], running, np.zeros((1, 6), bool), None, None, num_levels=2)
    >>> cuts.tolist(), best.tolist()
    ([[3]], [-232.5])
    """
    given = [x for x in (count, total, above, penalty, *(reach or ())) if x is not None]
    number, size = given[0].shape
    if penalty is None and num_levels > size - 1:  # each window has one place
        given = [_extended(x, num_levels + 1, axis=1) for x in given]
    lanes = min(_LANES, number)
    whole = -(-number // lanes) * lanes
    lanes_last = [_extended(x, whole, axis=0).reshape(-1, lanes, x.shape[1]).transpose(0, 2, 1) for x in given]
    cuts, best = lax.map(
        lambda group: _partition(lax.optimization_barrier(group), num_levels), lax.optimization_barrier(lanes_last)
    )
    cuts = jnp.minimum(cuts.transpose(0, 2, 1).reshape(whole, num_levels - 1), size - 1)
    return cuts[:number], best.reshape(-1)[:number]


def _extended(array, size: int, axis: int) -> jax.Array:
    """Returns an array extended to `size` along an axis by repeating its last entry."""
    array = jnp.asarray(array)
    missing = size - array.shape[axis]
    if missing <= 0:
        return array
    last = lax.slice_in_dim(array, array.shape[axis] - 1, array.shape[axis], axis=axis)
    return jnp.concatenate([array, *[last] * missing], axis=axis)


def _lesser(a, b) -> jax.Array:
    """Returns the minimum of two numbers in one instruction; `minimum` propagates NaN and takes several."""
    return jnp.where(a < b, a, b)


def _cost(begin, end) -> jax.Array:
    """Returns minus the gain of intervals from the cuts `begin` to the cuts `end`."""
    weight, moment = (end[0] - begin[0]).astype(jnp.float64), (end[1] - begin[1]).astype(jnp.float64)
    holds_zero = ~begin[2] & end[2]
    gain = jnp.where(holds_zero, 0.0, moment * moment / jnp.where(weight > 0, weight, 1.0))
    if len(begin) > 3:
        least, most = begin[5], end[4]
        extent = jnp.where(holds_zero, jnp.maximum(most, 0.0) - jnp.minimum(least, 0.0), most - least)
        gain = gain + jnp.where(extent > 0, extent * (begin[3] + end[3]), 0.0)  # a select separates product and sum
    return -gain


def _partition(arrays, num_levels: int) -> tuple[Any, jax.Array]:
    """Computes `dense_rows` for one group of rows: arrays `[M + 1, N]`, cuts `[K − 1, N]` and costs `[N]`."""
    size, lanes = arrays[0].shape
    if num_levels == 1:
        return jnp.zeros((0, lanes), jnp.int32), _cost([x[0] for x in arrays], [x[-1] for x in arrays])
    empty = len(arrays) > 3  # whether intervals may be empty
    window = size if empty else size - num_levels
    if empty or size - 2 > _UNROLLED:
        layers = _in_blocks(arrays, num_levels - 1, window, empty)
    else:
        layers = _in_tiles(arrays, num_levels - 1, window)
    place = jnp.arange(window, dtype=jnp.int32)[:, None]

    def back(
        end_place, layer
    ) -> tuple[Any, tuple[Any, jax.Array]]:  # finds the boundary before `end_place`, in a window from `start` on
        start = jnp.int32(0) if empty else layer + 1
        end = [jnp.take_along_axis(x, end_place[None], axis=0) for x in arrays]
        begin = [lax.dynamic_slice_in_dim(x, start, window) for x in arrays]
        best = lax.dynamic_slice(layers, (start - (not empty), layer, jnp.int32(0)), (window, 1, lanes))[:, 0]
        reached = best + jnp.where(place + start <= end_place - (not empty), _cost(begin, end), jnp.inf)
        least = jnp.min(reached, axis=0)
        before = jnp.min(jnp.where(reached == least, place, window - 1), axis=0) + start
        return before, (before, least)

    last = jnp.full(lanes, size - 1, jnp.int32)
    _, (cuts, best) = lax.scan(back, last, jnp.arange(num_levels - 1, dtype=jnp.int32), reverse=True)
    return cuts, best[-1]


def _in_tiles(arrays, number: int, window: int) -> jax.Array:
    """Returns `[M − 1, number, N]` the least costs of 1 … `number` non-empty intervals up to the cuts 1 … M − 1.

    Each tile of cuts is unrolled with all begins before it, so that nothing is stored between the terms.
    """
    places, lanes = len(arrays[0]) - 2, arrays[0].shape[1]
    tiles = max(1, places // _TILE)
    edges = [1 + places * tile // tiles for tile in range(tiles + 1)]
    first = _cost([x[:1] for x in arrays], [x[1:-1] for x in arrays])
    layers = jnp.zeros((number, 0, lanes))
    for low, high in itertools.pairwise(edges):
        oldest = max(1, low - window)
        costs = _cost([x[None, oldest : high - 1] for x in arrays], [x[low:high, None] for x in arrays])
        before = jnp.arange(oldest, high - 1, dtype=jnp.int32) < jnp.arange(low, high, dtype=jnp.int32)[:, None]
        costs = lax.optimization_barrier(jnp.where(before[:, :, None], costs, jnp.inf))

        def layer(here, earlier, oldest=oldest, low=low, high=high, costs=costs) -> tuple[jax.Array, jax.Array]:
            best = jnp.full_like(here, jnp.inf)
            for a in range(oldest, high - 1):
                best = _lesser((earlier[a - 1] if a < low else here[a - low]) + costs[:, a - oldest], best)
            return best, best

        here = first[low - 1 : high - 1]
        _, more = lax.scan(layer, here, layers[:-1])
        layers = jnp.concatenate([layers, jnp.concatenate([here[None], more])], axis=1)
    return layers.swapaxes(0, 1)


def _in_blocks(arrays, number: int, window: int, empty: bool) -> jax.Array:
    """Returns what `_in_tiles` returns; with `empty` intervals may be empty, and cuts run from 0 to M.

    The begins of a block are settled one after the other; then they are added to all later cuts and layers at once.
    Entries past the last cut have no meaning.
    """
    base = 0 if empty else 1
    size, lanes = arrays[0].shape
    places = size - 2 * base
    sub = max(2, -(-places // (_STAGES * _BLOCK)))  # blocks of a stage
    span = sub * _BLOCK
    stages = -(-places // span)
    ends = [_extended(x, base + stages * span, axis=0)[base:] for x in arrays]
    first = _cost([x[:1] for x in arrays], ends)
    zero = jnp.int32(0)
    rest = jnp.full((len(first), number - 1, lanes), jnp.inf)
    done = []
    for stage in range(stages if number > 1 else 0):
        start = stage * span
        low, high, later = 0, number - 1, len(rest)
        if not empty:  # layers and cuts that the begins of this stage can reach
            high, later = min(high, start + span), min(later, span + window)
            low = min(max(0, start - window + 1), high - 1)
        below = first[start : start + later] if low == 0 else rest[:later, low - 1]
        new = _stage([x[start : start + later] for x in ends], below, rest[:later, low:high], sub, empty)
        rest = new if new.shape == rest.shape else lax.dynamic_update_slice(rest, new, (zero, jnp.int32(low), zero))
        done.append(rest[:span])
        rest = rest[span:]
    return jnp.concatenate([first[:, None], jnp.concatenate([*done, rest])], axis=1)


def _stage(ends, below, targets, blocks: int, empty: bool) -> Any:
    """Returns `targets [P, n, N]` lowered by intervals that begin in the first `blocks` blocks.

    `below [P, N]` is the layer before the targets.
    """
    place = jnp.arange(len(below), dtype=jnp.int32)
    starts = jnp.arange(blocks, dtype=jnp.int32) * _BLOCK

    def tabulate(start) -> jax.Array:
        begins = [lax.dynamic_slice_in_dim(x, start, _BLOCK)[None] for x in ends]
        later = place[:, None] > start + place[:_BLOCK]
        return jnp.where(later[:, :, None], _cost(begins, [x[:, None] for x in ends]), jnp.inf)

    def block(targets, inputs) -> tuple[Any, None]:
        start, costs = inputs  # costs [P, B, N]
        inner, firsts, own = (lax.dynamic_slice_in_dim(x, start, _BLOCK) for x in (costs, below, targets))
        begins = [lax.dynamic_slice_in_dim(x, start, _BLOCK) for x in ends]
        nothing = _cost(begins, begins)

        def settle(before, inputs) -> tuple[Any, Any]:  # the block's own cuts, one after the other
            at, first, best, costs, alone = inputs
            for a in range(_BLOCK):
                best = _lesser(before[a] + costs[a], best)
            if empty:
                best = _with_empty(jnp.concatenate([first[None], best]), alone)[1:]
            row = jnp.concatenate([first[None], best[:-1]])
            return lax.dynamic_update_index_in_dim(before, row, at, 0), best if empty else None

        before = jnp.full((_BLOCK, *targets.shape[1:]), jnp.inf)  # the layers before the targets'
        before, settled = lax.scan(settle, before, (place[:_BLOCK], firsts, own, inner, nothing))
        if settled is not None:
            targets = lax.dynamic_update_slice_in_dim(targets, settled, start, 0)
        for a in range(_BLOCK):
            targets = _lesser(before[a] + costs[:, a, None], targets)
        return targets, None

    return lax.scan(block, targets, (starts, lax.map(tabulate, starts)))[0]


def _with_empty(best, alone) -> Any:
    """Returns layers of costs `[n, N]` that may end in empty intervals of cost `alone [N]`: 1, 2, 4 … at a time."""
    step = 1
    while step < len(best):
        best = jnp.concatenate([best[:step], _lesser(best[:-step] + step * alone, best[step:])])
        step *= 2
    return best
