"""The best partition into K intervals as a shortest path: every interval costs its squared error plus a price.

One pass over the cuts serves any number of levels, where the programme with a fixed number needs a layer for each
(Aggarwal, Schieber and Tokuyama 1994). The least error is a convex function of K, so there is a price at which the best
path has K intervals, and that path is the best partition into K. The price is searched. An interval of weight n and
weighted sum S costs −S²/n, which is its squared error minus a term that all partitions share.

The cut at which the best last interval begins never moves back, because the error is a Monge cost. So a pass handles a
block of cuts at a time. For the block's last cut the best beginning is sought no earlier than that for the last cut of
the block before; for the block's other cuts it lies between these two. Beginnings inside the block are considered only
if one of them is better for its last cut: if one is better for any cut of the block, it is better for the last too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.knq.rows.sorted import first_least, windows

_LANES = 16  # rows handled at once
_BLOCK = 16  # cuts settled at once
_WIDTH = 32  # beginnings compared at once for one end
_NEAR = 8  # and for a block of ends


@functools.partial(jax.jit, static_argnames=("num_levels", "keep_zero"))
def priced_paths(
    count, total, size, zero, price, trials, through, *, num_levels: int, keep_zero: bool
) -> tuple[Any, ...]:
    """Searches the shortest paths with `num_levels` intervals through cuts.

    Args:
      count: `[R, M + 1]` weight below each cut; entries after cut number `size` do not count.
      total: `[R, M + 1]` weighted sum below each cut, of the same dtype.
      size: int32 number of the last cut.
      zero: `[R]` int32, read with `keep_zero`: an interval from a cut not above it to one above it has
        level 0 and no price.
      price: `[R]` float64, the first price to try.
      trials: int32, the most prices to try. If none has a path of K intervals, K − 1 cuts are taken from the last path.
      through: bool, whether to compute paths through each cut.
      num_levels: K.
      keep_zero: whether there is a held zero.

    Returns:
      `[R, K − 1]` int32 places of the boundaries among the cuts, `[R]` the price, `[R]` whether a path at this price
      has K intervals, and `[R, M + 1]` the cost of the best path through each cut (0 without `through`).
    """
    number = count.shape[0]
    lanes = min(_LANES, number)
    missing = -number % lanes

    def grouped(x) -> Any:
        padded = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return padded.reshape(-1, lanes, *x.shape[1:])

    def run(group) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        count, total, zero, price = group
        cuts = count.shape[1]
        count, total = (jnp.pad(x, ((0, 0), (0, _WIDTH)), mode="edge") for x in (count, total))
        problem = _Problem(count, total, size, zero if keep_zero else None)
        places, found, exact, excess = _search(problem, price, trials, through, num_levels)
        return places, found, exact, excess[:, :cuts]

    found = lax.map(run, tuple(map(grouped, (count, total, zero, price))))
    return tuple(x.reshape(number + missing, *x.shape[2:])[:number] for x in found)


class _Problem(NamedTuple):
    """Arguments of `priced_paths`, padded by a window after the cuts; `zero` is None without a held zero."""

    count: jax.Array
    total: jax.Array
    size: jax.Array
    zero: jax.Array | None


def _to_size(x, size) -> jax.Array:
    """Returns `x [R, M + 1]` with its entries up to `size` in reverse order."""
    last = x.shape[1] - 1
    return lax.dynamic_slice_in_dim(jnp.pad(x[:, ::-1], ((0, 0), (0, last))), last - size, last + 1, 1)


def _backwards(problem: _Problem) -> _Problem:
    """Returns the problem of the reversed row."""
    count, total, size, zero = problem
    count, total = (x[:, -1:] - _to_size(x, size) for x in (count, total))
    return _Problem(count, total, size, None if zero is None else size - 1 - zero)


class _Tried(NamedTuple):
    """The state of the search after some prices.

    Attributes:
      number: how many passes were made, one for each price and at most one from the other end.
      price: `[R]` the last one.
      low: `[R]` each: the lowest price known whose path has more than K intervals, its error and its intervals.
      high: the same of the highest price known whose path has fewer.
      potential: `[R, M + 1]` cost of the shortest path to each cut at the last price.
      chain: `[R, steps + 1]` the cuts of the path, from its end.
      intervals: `[R]` how many of its intervals have a price.
      onward: `[R, M + 1]` cost of the shortest path from the end of the row back to each cut, cuts in reverse order.
      passed: whether `onward` is known.
    """

    number: jax.Array
    price: jax.Array
    low: tuple[jax.Array, ...]
    high: tuple[jax.Array, ...]
    potential: jax.Array
    chain: jax.Array
    intervals: jax.Array
    onward: jax.Array
    passed: jax.Array


def _search(problem: _Problem, price, trials, through, num_levels: int) -> tuple[jax.Array, ...]:
    """Returns what `priced_paths` does, for one group of rows.

    All passes over the cuts are turns of one loop, so that the program of a pass is compiled once: a pass for each
    price that is tried, then, with `through`, one from the other end of the row.
    """
    free = num_levels if problem.zero is None else num_levels - 1
    steps = num_levels + num_levels // 4 + 1
    # Factors for a price whose path has so many intervals (Panter and Dite 1951). A table, as XLA's division by a
    # constant differs between one row and many.
    ratios = jnp.asarray((np.maximum(np.arange(steps + 2), 0.5) / free) ** 3)
    reverse = _backwards(problem)

    def searching(tried: _Tried) -> jax.Array:
        return (tried.number == 0) | (jnp.any(tried.intervals != free) & (tried.number < trials))

    def next_price(tried: _Tried) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        price, intervals = tried.price, tried.intervals
        paid = jnp.where(intervals > 0, price * intervals, 0.0)  # a select separates product and sum
        error = lax.dynamic_index_in_dim(tried.potential, problem.size, axis=1, keepdims=False) - paid
        here = price, error, intervals
        low = tuple(jnp.where(intervals > free, x, y) for x, y in zip(here, tried.low, strict=True))
        high = tuple(jnp.where(intervals < free, x, y) for x, y in zip(here, tried.high, strict=True))
        guess = price * _steeper(ratios[intervals], tried.number - 2)
        bracketed = (low[0] > 0) & (high[0] < jnp.inf)
        # At this price the paths of both sides cost the same. If K intervals are best at any price, they are here.
        equal = (high[1] - low[1]) / jnp.maximum(low[2] - high[2], 1)
        # The error of a path that was not traced to its start is unknown, and rounding may put this price outside.
        known = (low[2] <= steps) & (equal > low[0]) & (equal < high[0])
        between = jnp.where(known, equal, jnp.sqrt(low[0]) * jnp.sqrt(high[0]))
        return jnp.where(intervals == free, price, jnp.where(bracketed, between, guess)), low, high

    def turn(tried: _Tried) -> _Tried:
        forth = searching(tried)
        price, low, high = next_price(tried)
        price = jnp.where(forth, price, tried.price)
        here = jax.tree.map(lambda there, back: jnp.where(forth, there, back), problem, reverse)
        potential, firsts = _potentials(here, price)

        def traced() -> tuple[jax.Array, jax.Array]:
            return _traced_back(problem, price, potential, firsts, steps)

        chain, intervals = lax.cond(forth, traced, lambda: (tried.chain, tried.intervals))
        onward = jnp.where(forth, tried.onward, potential)
        potential = jnp.where(forth, potential, tried.potential)
        return _Tried(tried.number + 1, price, low, high, potential, chain, intervals, onward, ~forth)

    nothing, no_cost = jnp.zeros_like(price), jnp.zeros(problem.count.shape)
    none = nothing, nothing, jnp.zeros(price.shape, jnp.int32)
    begin = _Tried(
        number=jnp.int32(0), price=price, low=none, high=(jnp.full_like(price, jnp.inf), *none[1:]), potential=no_cost,
        chain=jnp.zeros((*price.shape, steps + 1), jnp.int32), intervals=jnp.full(price.shape, free, jnp.int32),
        onward=no_cost, passed=jnp.zeros((), bool),
    )  # fmt: skip
    end = lax.while_loop(lambda tried: searching(tried) | (through & ~tried.passed), turn, begin)
    held = num_levels - free
    rank = jnp.arange(num_levels - 1, 0, -1, dtype=jnp.int32) * (end.intervals[:, None] + held) // num_levels
    places = jnp.take_along_axis(end.chain, jnp.minimum(rank, steps), axis=1)
    excess = jnp.where(through, end.potential + _to_size(end.onward, problem.size), 0.0)
    return places, end.price, end.intervals == free, excess


def _steeper(ratio, times) -> Any:
    """Returns the ratio squared `times` times, at most 4: in sparse values the price changes faster than the cube."""
    for time in range(4):
        ratio = jnp.where(time < times, ratio * ratio, ratio)
    return ratio


def _cost(potential, n, s, price, holds_zero) -> Any:
    """Returns the cost of a path of cost `potential` that is continued by an interval of weight n and sum s."""
    n, s = n.astype(jnp.float64), s.astype(jnp.float64)
    reached = potential - s * s / jnp.where(n > 0, n, 1.0) + price
    return reached if holds_zero is None else jnp.where(holds_zero, potential, reached)


def _holds_zero(problem: _Problem, begin, end) -> Any:
    """Returns whether intervals `[R, …]` contain the held zero; None if there is none."""
    if problem.zero is None:
        return None
    zero = problem.zero.reshape(-1, *[1] * (begin.ndim - 1))
    return (begin <= zero) & (end > zero)


def _best_beginning(problem: _Problem, price, potential, first, end, last) -> Any:
    """Returns where the best last interval to the cuts `end` begins, from `first` to `last`; all are `[R, 1]`.

    Of equal beginnings it is the first, as beginnings for the next block are not sought before it.
    """
    n_end, s_end = (jnp.take_along_axis(x, end, axis=1) for x in problem[:2])

    def compare(piece, found) -> tuple[jax.Array, jax.Array]:
        least, where = found
        start = jnp.minimum(first + piece * _WIDTH, potential.shape[1] - _WIDTH)
        n, s, begun = windows((*problem[:2], potential), start[:, 0], _WIDTH)
        begin = start + jnp.arange(_WIDTH, dtype=jnp.int32)
        reached = _cost(begun, n_end - n, s_end - s, price[:, None], _holds_zero(problem, begin, end))
        here, at = first_least(jnp.where(begin <= last, reached, jnp.inf), begin, 1)
        return jnp.minimum(here, least), jnp.where(here < least, at, where)

    pieces = jnp.max(last - first) // _WIDTH + 1
    return lax.fori_loop(0, pieces, compare, (jnp.full(end.shape, jnp.inf), end))[1]


def _potentials(problem: _Problem, price) -> Any:
    """Returns the cost `[R, m]` of the shortest path to each cut, and `[R, blocks + 1]` the first begin per block."""
    count, total, size, _ = problem
    lane = jnp.arange(_BLOCK, dtype=jnp.int32)[None]
    paid = price[:, None]

    def settle(block, state) -> tuple[jax.Array, jax.Array]:
        potential, firsts = state
        below = block * _BLOCK  # the cut before the block
        first = lax.dynamic_slice_in_dim(firsts, block, 1, axis=1)
        end = below + 1 + lane
        n_end, s_end = (lax.dynamic_slice_in_dim(x, below + 1, _BLOCK, axis=1) for x in (count, total))
        last = jnp.full_like(first, below + _BLOCK)
        begun_last = _best_beginning(problem, price, potential, first, last, jnp.full_like(first, below))

        def compare(piece, best) -> jax.Array:
            start = jnp.minimum(first + piece * _NEAR, potential.shape[1] - _NEAR)
            n, s, begun = (x[:, :, None] for x in windows((count, total, potential), start[:, 0], _NEAR))
            begin = (start + jnp.arange(_NEAR, dtype=jnp.int32))[:, :, None]
            begun = jnp.where(begin <= begun_last[:, :, None], begun, jnp.inf)
            holds_zero = _holds_zero(problem, begin, end[:, None])
            reached = _cost(begun, n_end[:, None] - n, s_end[:, None] - s, paid[:, None], holds_zero)
            return jnp.minimum(best, jnp.min(reached, axis=1))

        pieces = jnp.max(begun_last - first) // _NEAR + 1
        best = lax.fori_loop(0, pieces, compare, jnp.full(n_end.shape, jnp.inf))

        def to_last(best) -> Any:
            return _cost(best, n_end[:, -1:] - n_end, s_end[:, -1:] - s_end, paid, _holds_zero(problem, end, last))

        # If a beginning inside the block is better for any cut in it than all before, it is better for the last too.
        within = jnp.any(to_last(best) < best[:, -1:], axis=1, keepdims=True)

        def from_within() -> tuple[Any, jax.Array]:
            def one(place, best) -> jax.Array:
                n, s = (lax.dynamic_slice_in_dim(x, place, 1, axis=1) for x in (n_end, s_end))
                reached = _cost(best, n - n_end, s - s_end, paid, _holds_zero(problem, end, below + 1 + place))
                least = jnp.min(jnp.where(lane < place, reached, jnp.inf), axis=1, keepdims=True)
                return jnp.where((lane == place) & within, jnp.minimum(best, least), best)

            settled = lax.fori_loop(1, _BLOCK, one, best)
            return settled, jnp.where(within, first_least(to_last(settled), end, 1)[1], begun_last)

        best, begun_last = lax.cond(jnp.any(within), from_within, lambda: (best, begun_last))
        potential = lax.dynamic_update_slice_in_dim(potential, best, below + 1, axis=1)
        return potential, lax.dynamic_update_slice_in_dim(firsts, begun_last, block + 1, axis=1)

    unsettled = jnp.full(count.shape, jnp.inf).at[:, 0].set(0.0)
    firsts = jnp.zeros((count.shape[0], count.shape[1] // _BLOCK + 1), jnp.int32)
    blocks = (size + _BLOCK - 1) // _BLOCK
    return lax.fori_loop(jnp.int32(0), blocks, settle, (unsettled, firsts))


def _traced_back(problem: _Problem, price, potential, firsts, steps: int) -> tuple[jax.Array, jax.Array]:
    """Returns the cuts of each path, from its end, and how many of its intervals have a price."""

    def back(end, _) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        last = jnp.maximum(end - 1, 0)
        first = jnp.take_along_axis(firsts, last // _BLOCK, axis=1)
        there = end > 0
        before = jnp.where(there, _best_beginning(problem, price, potential, first, end, last), 0)
        holds_zero = _holds_zero(problem, before, end)
        return before, (before[:, 0], (there if holds_zero is None else there & ~holds_zero)[:, 0])

    end = jnp.full((price.shape[0], 1), problem.size, jnp.int32)
    at, (chain, free) = lax.scan(back, end, length=steps)
    intervals = jnp.sum(free, axis=0, dtype=jnp.int32)
    intervals = jnp.where(at[:, 0] > 0, steps + 1, intervals)  # more than were traced
    return jnp.concatenate([end, chain.T], axis=1), intervals
