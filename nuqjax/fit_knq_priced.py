"""The best partition into K intervals as a shortest path: every interval costs its squared error and a price.

One pass over some cuts serves any number of levels, where the programme with a fixed number needs a layer for each
(Aggarwal, Schieber and Tokuyama 1994): as the least error is a convex function of K, there is a price at which the
best path has K intervals, and it is the best partition into K. The price is searched; an interval of weight n and
weighted sum S costs −S²/n, which is its squared error but for what all partitions have in common.

Rows come last inside, so that they fill the processor's lanes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_LANES = 16  # rows handled at once
_WIDTH = 128
_TOGETHER = 4  # cuts to which the paths of a single row are settled at once
_SPLITS = (2, 4, 6)  # eighths of an interval at which it is tried to part it


@functools.partial(jax.jit, static_argnames=("num_levels", "pin"))
def priced_paths(count, total, size, zero, price, trials, through, *, num_levels: int, pin: bool):
    """The shortest paths with `num_levels` intervals through cuts.

    Args:
      count: `[R, M + 1]` weight below each cut; those after cut number `size` do not count.
      total: `[R, M + 1]` weighted sum below it, of the same dtype.
      size: int32.
      zero: `[R]` int32 with `pin`: the interval from a cut up to `zero` to one above it has the level 0, and no price.
      price: `[R]` float64, to begin with.
      trials: int32, of a price. If none of them gives K intervals, K of those that there are come back.
      through: bool, whether `excess` is wanted.
      num_levels: K.
      pin: whether a level is held at 0.

    Returns:
      `[R, K − 1]` int32 places among the cuts, `[R]` the price, and `[R, M + 1]` by how much the best path through each
      cut exceeds the best (0 without `through`).
    """
    number = count.shape[0]
    lanes = min(_LANES, number)
    missing = -number % lanes

    def grouped(x):
        padded = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return padded.reshape(-1, lanes, *x.shape[1:])

    def run(group):
        count, total, zero, price = group
        problem = _Problem(count, total, size, zero if pin else None)

        found, potential, places = _search(problem, price, trials, num_levels)

        def backwards():
            problem_ = _backwards(problem)
            return potential.T + _to_size(_potentials(problem_, found, _reaches(problem_, found)).T, size)

        excess = lax.cond(through, backwards, lambda: jnp.zeros_like(potential.T))
        return places, found, excess

    found = lax.map(run, tuple(map(grouped, (count, total, zero, price))))
    return tuple(x.reshape(number + missing, *x.shape[2:])[:number] for x in found)


class _Problem(NamedTuple):
    """As the arguments of `priced_paths`; `zero` is None where no level is held."""

    count: jax.Array
    total: jax.Array
    size: jax.Array
    zero: jax.Array | None


def _to_size(x, size):
    """`[R, M + 1]` with the entries up to `size` in reverse order."""
    last = x.shape[1] - 1
    return lax.dynamic_slice_in_dim(jnp.pad(x[:, ::-1], ((0, 0), (0, last))), last - size, last + 1, 1)


def _backwards(problem: _Problem) -> _Problem:
    """The problem of the row from its end."""
    count, total, size, zero = problem
    count, total = (x[:, -1:] - _to_size(x, size) for x in (count, total))
    return _Problem(count, total, size, None if zero is None else size - 1 - zero)


def _search(problem: _Problem, price, trials, num_levels: int):
    """The price, the potentials, and the places."""
    free = num_levels if problem.zero is None else num_levels - 1
    steps = num_levels + num_levels // 4 + 1

    def attempt(price):
        reaches = _reaches(problem, price)
        potential = _potentials(problem, price, reaches)
        return potential, *_traced_back(problem, price, potential, reaches, steps)

    def error(price, potential, intervals):
        paid = jnp.where(intervals > 0, price * intervals, 0.0)  # a select between product and sum
        return lax.dynamic_index_in_dim(potential, problem.size, keepdims=False) - paid

    def wrong(state):
        *_, intervals, trial = state
        return jnp.any(intervals != free) & (trial < trials)

    def again(state):
        price, low, high, potential, _, intervals, trial = state
        here = price, error(price, potential, intervals), intervals
        low = tuple(jnp.where(intervals > free, x, y) for x, y in zip(here, low, strict=True))
        high = tuple(jnp.where(intervals < free, x, y) for x, y in zip(here, high, strict=True))
        guess = price * _steeper((jnp.maximum(intervals, 0.5) / free) ** 3, trial - 2)  # Panter and Dite (1951)
        bracketed = (low[0] > 0) & (high[0] < jnp.inf)
        # At this price the paths of either side cost the same: there K intervals are best, if they are anywhere.
        equal = (high[1] - low[1]) / jnp.maximum(low[2] - high[2], 1)
        # A path that was not followed to its end has no error, and rounding may leave none between two.
        known = (low[2] <= steps) & (equal > low[0]) & (equal < high[0])
        between = jnp.where(known, equal, jnp.sqrt(low[0]) * jnp.sqrt(high[0]))
        price = jnp.where(intervals == free, price, jnp.where(bracketed, between, guess))
        return price, low, high, *attempt(price), trial + 1

    none = jnp.zeros_like(price), jnp.zeros_like(price), jnp.zeros(price.shape, jnp.int32)
    begin = price, none, (jnp.full_like(price, jnp.inf), *none[1:]), *attempt(price), jnp.int32(1)
    price, _, _, potential, chain, intervals, _ = lax.while_loop(wrong, again, begin)
    held = num_levels - free
    rank = jnp.arange(num_levels - 1, 0, -1, dtype=jnp.int32) * (intervals[:, None] + held) // num_levels
    return price, potential, jnp.take_along_axis(chain, jnp.minimum(rank, steps), axis=1)


def _steeper(ratio, times):
    """The ratio, squared some times: where values are sparse the price changes faster than with the cube."""
    for time in range(4):
        ratio = jnp.where(time < times, ratio * ratio, ratio)
    return ratio


def _cost(potential, n, s, price, pinned):
    """Of a path that goes on by an interval of weight n and sum s."""
    n, s = n.astype(jnp.float64), s.astype(jnp.float64)
    reached = potential - s * s / jnp.where(n > 0, n, 1.0) + price
    return reached if pinned is None else jnp.where(pinned, potential, reached)


def _reaches(problem: _Problem, price):
    """`[M + 1]` over how many times 128 cuts an interval of a best path may reach back from each cut.

    If it pays to part an interval at some place, it pays to part every longer one there (the quadrangle inequality),
    and no best path has it.
    """
    cuts = problem.count.shape[1]
    count, total = (jnp.pad(x, ((0, 0), (cuts, 0)), mode="edge") for x in problem[:2])
    place = jnp.arange(cuts, dtype=jnp.int32)

    def before(distance):
        return *(lax.dynamic_slice_in_dim(x, cuts - distance, cuts, axis=1) for x in (count, total)), place - distance

    def whole(begin, end):
        pinned = None
        if problem.zero is not None:
            pinned = (begin[2] <= problem.zero[:, None]) & (end[2] > problem.zero[:, None])
        return _cost(0.0, end[0] - begin[0], end[1] - begin[1], price[:, None], pinned)

    def parted(state):
        pieces, reach, _ = state
        begin, end = before(reach * _WIDTH), before(0)
        middles = [before(reach * _WIDTH * eighths // 8) for eighths in _SPLITS]
        alone = whole(begin, end)
        pays = functools.reduce(jnp.logical_or, [whole(begin, m) + whole(m, end) < alone for m in middles])
        still = ~jnp.all(pays, axis=0) & (place > reach * _WIDTH) & (place <= problem.size) & (pieces == reach)
        longer = reach + (reach + 1) // 2
        return jnp.where(still, longer, pieces), longer, jnp.any(still)

    begin = jnp.ones_like(place), jnp.int32(1), jnp.bool_(True)
    return lax.while_loop(lambda state: state[2], parted, begin)[0]


def _potentials(problem: _Problem, price, reaches):
    """`[M + 1, R]` the cost of the shortest path to each cut.

    A few cuts at a time: from those before all of them, searched at once, then from one another, written out.
    """
    number, cuts = problem.count.shape
    together = _TOGETHER if number == 1 else 1  # many rows fill the lanes as they are
    # Before the first cut there are as many at which no path can be, and behind the last some that fill a step.
    count, total = (jnp.pad(x.T, ((cuts, 0), (0, 0))) for x in problem[:2])
    count, total = (jnp.pad(x, ((0, together), (0, 0)), mode="edge") for x in (count, total))
    potential = jnp.where(jnp.arange(2 * cuts + together) < cuts, jnp.inf, 0.0)[:, None] + jnp.zeros((1, number))
    reaches = jnp.pad(reaches, (0, together))
    place = jnp.arange(_WIDTH, dtype=jnp.int32)[:, None, None]
    ahead = jnp.arange(together, dtype=jnp.int32)[:, None]

    def pinned(begin, end):
        return None if problem.zero is None else (begin <= problem.zero) & (end > problem.zero)

    def step(block, potential):
        first = block * together + 1
        ends = tuple(lax.dynamic_slice_in_dim(x, first + cuts, together) for x in (count, total))

        def compare(piece, best):
            begin = first - (piece + 1) * _WIDTH

            def window(x):
                return lax.dynamic_slice_in_dim(x, begin + cuts, _WIDTH)[:, None]

            n, s = (x - window(y) for x, y in zip(ends, (count, total), strict=True))
            reached = _cost(window(potential), n, s, price, pinned(begin + place, first + ahead))
            return jnp.minimum(best, jnp.min(reached, axis=0))

        pieces = jnp.max(lax.dynamic_slice_in_dim(reaches, first, together))
        pieces = jnp.minimum(pieces, (first + _WIDTH - 1) // _WIDTH)
        reached = lax.fori_loop(0, pieces, compare, jnp.full((together, number), jnp.inf))
        settled = []
        for end in range(together):
            best = reached[end]
            for begin, before in enumerate(settled):
                n, s = (x[end] - x[begin] for x in ends)
                best = jnp.minimum(best, _cost(before, n, s, price, pinned(first + begin, first + end)))
            settled.append(best)
        return lax.dynamic_update_slice_in_dim(potential, jnp.stack(settled), first + cuts, 0)

    steps = (problem.size + together - 1) // together
    return lax.fori_loop(jnp.int32(0), steps, step, potential)[cuts : 2 * cuts]


def _traced_back(problem: _Problem, price, potential, reaches, steps: int):
    """The cuts of each path from its end, and how many intervals are priced."""
    number, cuts = problem.count.shape
    potential = jnp.concatenate([jnp.full_like(potential, jnp.inf), potential]).T
    count, total = (jnp.pad(x, ((0, 0), (cuts, 0))) for x in problem[:2])
    zero = None if problem.zero is None else problem.zero[:, None]
    place = jnp.arange(_WIDTH, dtype=jnp.int32)

    def back(end, _):
        def compare(piece, found):
            least, before = found
            begin = end - (piece + 1) * _WIDTH

            def window(x):
                return jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, _WIDTH))(x, begin + cuts)

            n, s = (jnp.take_along_axis(x, end[:, None] + cuts, axis=1) - window(x) for x in (count, total))
            here = begin[:, None] + place
            pinned = None if zero is None else (here <= zero) & (end[:, None] > zero)
            reached = _cost(window(potential), n, s, price[:, None], pinned)
            nearest = jnp.min(reached, axis=1)
            first = jnp.min(jnp.where(reached == nearest[:, None], here, end[:, None]), axis=1)
            # Pieces go backwards, so that of equals the first cut is taken.
            return jnp.minimum(least, nearest), jnp.where(nearest <= least, first, before)

        pieces = jnp.max(jnp.minimum(reaches[end], (end + _WIDTH - 1) // _WIDTH))
        _, before = lax.fori_loop(0, pieces, compare, (jnp.full(number, jnp.inf), end))
        there = end > 0
        before = jnp.where(there, before, 0)
        free = there if problem.zero is None else there & ~((before <= problem.zero) & (end > problem.zero))
        return before, (before, free)

    end = jnp.broadcast_to(problem.size, (number,))
    at, (chain, free) = lax.scan(back, end, length=steps)
    intervals = jnp.sum(free, axis=0, dtype=jnp.int32)
    intervals = jnp.where(at > 0, steps + 1, intervals)  # more than were followed
    return jnp.concatenate([end[None], chain]).T, intervals
