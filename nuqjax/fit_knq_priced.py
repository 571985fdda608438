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
_WIDTH = 128  # cuts before a cut that are compared in one go


@functools.partial(jax.jit, static_argnames=("num_levels", "pin"))
def priced_paths(count, total, size, zero, price, trials, reach, through, *, num_levels: int, pin: bool):
    """The shortest paths with `num_levels` intervals through cuts.

    Args:
      count: `[R, M + 1]` weight below each cut, M a multiple of 128; those after cut number `size` do not count.
      total: `[R, M + 1]` weighted sum below it, of the same dtype.
      size: int32.
      zero: `[R]` int32 with `pin`: the interval from a cut up to `zero` to one above it has the level 0, and no price.
      price: `[R]` float64, to begin with.
      trials: int32, of a price. If none of them gives K intervals, K of those that there are come back.
      reach: int32, how many times 128 cuts an interval may reach over; more if a path reaches as far, unless `through`.
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

        def narrow(state):
            reach, *_, enough = state
            return ~through & ~jnp.all(enough) & (reach * _WIDTH < size)

        def wider(state):
            reach, price, *_ = state
            return 2 * reach, *_search(problem, price, trials, 2 * reach, num_levels)

        state = reach, *_search(problem, price, trials, reach, num_levels)
        reached, price, potential, places, _ = lax.while_loop(narrow, wider, state)
        excess = lax.cond(
            through,
            lambda: potential.T + _to_size(_potentials(_backwards(problem), price, reached).T, size),
            lambda: jnp.zeros_like(potential.T),
        )
        return places, price, excess

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


def _search(problem: _Problem, price, trials, reach, num_levels: int):
    """The price, the potentials, the places, and whether every interval is shorter than the reach."""
    free = num_levels if problem.zero is None else num_levels - 1
    steps = num_levels + num_levels // 4 + 1

    def attempt(price):
        potential = _potentials(problem, price, reach)
        return potential, *_traced_back(problem, price, potential, reach, steps)

    def wrong(state):
        *_, intervals, _, trial = state
        return jnp.any(intervals != free) & (trial < trials)

    def again(state):
        price, low, high, _, _, intervals, _, trial = state
        low, high = jnp.where(intervals > free, price, low), jnp.where(intervals < free, price, high)
        guess = price * (jnp.maximum(intervals, 1) / free) ** 3  # Panter and Dite (1951)
        bracketed = (low > 0) & (high < jnp.inf)
        middle = jnp.sqrt(jnp.where(bracketed, low * jnp.where(bracketed, high, 1.0), 1.0))
        between = jnp.where(bracketed & ((guess <= low) | (guess >= high)), middle, guess)
        price = jnp.where(intervals == free, price, between)
        return price, low, high, *attempt(price), trial + 1

    begin = price, jnp.zeros_like(price), jnp.full_like(price, jnp.inf), *attempt(price), jnp.int32(1)
    price, _, _, potential, chain, intervals, enough, _ = lax.while_loop(wrong, again, begin)
    held = num_levels - free
    rank = jnp.arange(num_levels - 1, 0, -1, dtype=jnp.int32) * (intervals[:, None] + held) // num_levels
    return price, potential, jnp.take_along_axis(chain, jnp.minimum(rank, steps), axis=1), enough


def _cost(potential, n, s, price, pinned):
    """Of a path that goes on by an interval of weight n and sum s."""
    n, s = n.astype(jnp.float64), s.astype(jnp.float64)
    reached = potential - s * s / jnp.where(n > 0, n, 1.0) + price
    return reached if pinned is None else jnp.where(pinned, potential, reached)


def _potentials(problem: _Problem, price, reach):
    """`[M + 1, R]` the cost of the shortest path to each cut."""
    cuts = problem.count.shape[1]
    # Before the first cut there are as many at which no path can be.
    count, total = (jnp.pad(x.T, ((cuts, 0), (0, 0))) for x in problem[:2])
    nowhere = jnp.full(count[:cuts].shape, jnp.inf)
    potential = jnp.concatenate([nowhere, jnp.zeros_like(nowhere)])
    place = jnp.arange(_WIDTH, dtype=jnp.int32)[:, None]

    def step(cut, potential):
        def at_cut(x):
            return lax.dynamic_slice_in_dim(x, cut + cuts, 1)

        def compare(piece, best):
            begin = cut - (piece + 1) * _WIDTH

            def window(x):
                return lax.dynamic_slice_in_dim(x, begin + cuts, _WIDTH)

            n, s = (at_cut(x) - window(x) for x in (count, total))
            pinned = None if problem.zero is None else (begin + place <= problem.zero) & (cut > problem.zero)
            reached = _cost(window(potential), n, s, price, pinned)
            return jnp.minimum(best, jnp.min(reached, axis=0, keepdims=True))

        pieces = jnp.minimum(reach, (cut + _WIDTH - 1) // _WIDTH)
        best = lax.fori_loop(0, pieces, compare, nowhere[:1])
        return lax.dynamic_update_slice_in_dim(potential, best, cut + cuts, 0)

    return lax.fori_loop(jnp.int32(1), problem.size + 1, step, potential)[cuts:]


def _traced_back(problem: _Problem, price, potential, reach, steps: int):
    """The cuts of each path from its end, how many intervals are priced, and whether all are shorter than the reach."""
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

        pieces = jnp.minimum(reach, (jnp.max(end) + _WIDTH - 1) // _WIDTH)
        _, before = lax.fori_loop(0, pieces, compare, (jnp.full(number, jnp.inf), end))
        there = end > 0
        before = jnp.where(there, before, 0)
        free = there if problem.zero is None else there & ~((before <= problem.zero) & (end > problem.zero))
        return before, (before, free, there & (before == end - reach * _WIDTH) & (before > 0))

    end = jnp.broadcast_to(problem.size, (number,))
    at, (chain, free, narrow) = lax.scan(back, end, length=steps)
    intervals = jnp.sum(free, axis=0, dtype=jnp.int32)
    intervals = jnp.where(at > 0, steps + 1, intervals)  # more than were followed
    return jnp.concatenate([end[None], chain]).T, intervals, ~jnp.any(narrow, axis=0)
