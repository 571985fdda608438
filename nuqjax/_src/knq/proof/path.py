"""The penalised program: the shortest path through the cuts of a row, where an interval costs its error plus a price.

The higher the price, the fewer intervals the best path has. One pass over the cells serves every number of levels,
while the program with a fixed number needs a layer for each level (Aggarwal, Schieber and Tokuyama 1994). Errors of
intervals are merged pairwise from means and squared errors (Chan, Golub and LeVeque 1983): sums of terms that are never
negative, so nothing cancels, whatever the row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.knq.rows.sorted import first_least, windows
from nuqjax._src.platform.rounding import rounded_in_loop


class Carried(NamedTuple):
    """The state that one stretch of cells passes to the next: the intervals from each of the last `band` cuts to here.

    Weight, mean, rest and square are those of the values in the interval.
    """

    weight: Any  # [R, band]
    mean: Any
    rest: Any  # the rounding error of the mean, to be added to it
    square: Any
    start: Any  # φ − leak at the cut
    first: Any  # [R] the cut at which the best last interval begins; no later best interval begins before it
    enough: Any  # [R] bool: whether the band held every cut that was needed


def nothing_yet(rows: int, band: int) -> Carried:
    """Returns the state before the first cell, in NumPy arrays."""
    empty = np.zeros((rows, band))
    start = np.full((rows, band), np.inf)
    start[:, -1] = 0.0
    return Carried(empty, empty, empty, empty, start, np.zeros(rows, np.int32), np.ones(rows, bool))


def _merged(one, two) -> tuple[Any, Any, Any, Any]:
    """Merges weight, mean, its rest and squared error of two neighbouring runs (Chan, Golub and LeVeque 1983).

    The new mean is computed from the heavier run's, so that its rounding error is in proportion to the change.
    """
    n, mean, rest, square = one
    k, other, other_rest, other_square = two
    both = n + k
    inverse = 1.0 / jnp.where(both > 0, both, 1.0)
    apart = (other - mean) + (other_rest - rest)
    left = n >= k
    moved = rounded_in_loop(apart * jnp.where(left, k, -n) * inverse) + jnp.where(left, rest, other_rest)
    base = jnp.where(left, mean, other)
    middle = base + moved
    between = rounded_in_loop(apart * apart * (n * k * inverse))
    return both, middle, moved - (middle - base), (square + other_square) + between


def _error(one, two) -> Any:
    """Computes the squared error of two neighbouring runs merged into one."""
    n, mean, rest, square = one
    k, other, other_rest, other_square = two
    both = n + k
    apart = (other - mean) + (other_rest - rest)
    return (square + other_square) + jnp.where(both > 0, apart * apart * (n * k / both), 0.0)


def _running(weight, mean, square, block: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Merges, for each cell, the cells of its block up to it, and those from it on: two tuples of `[R, S]` arrays."""
    count, length = weight.shape

    def both_ways(array) -> jax.Array:
        blocks = array.reshape(count, length // block, block)
        return jnp.moveaxis(jnp.stack([blocks, blocks[:, :, ::-1]]), 3, 0)

    def more(before, cell) -> tuple[tuple[Any, Any, Any, Any], tuple[Any, Any, Any, Any]]:
        now = _merged(before, (cell[0], cell[1], jnp.zeros_like(cell[0]), cell[2]))
        return now, now

    nothing = (jnp.zeros((2, count, length // block)),) * 4
    _, ran = lax.scan(more, nothing, tuple(both_ways(x) for x in (weight, mean, square)))
    ran = tuple(jnp.moveaxis(x, 0, 3) for x in ran)
    shape = weight.shape
    return tuple(x[0].reshape(shape) for x in ran), tuple(x[1, :, :, ::-1].reshape(shape) for x in ran)


@functools.partial(jax.jit, static_argnames=("block", "window", "keep_zero"))
def potentials(
    carried, weight, mean, square, leak, price, begin, size, zero, *, block: int, window: int, keep_zero: bool
) -> tuple[Carried, Any, Any]:
    """Computes φ(b) = min over the cuts a before b of φ(a) − leak(a) + error(a, b) + price, for one stretch of cells.

    The cells are handled in blocks. The cut at which the best last interval begins never moves back, since the error is
    a Monge cost. So for a block's last cut every candidate is searched, and for its other cuts only those between the
    result of the block before and that of the last cut. Intervals inside a block are searched if one could be the best.

    Args:
      carried: the state after the stretch before.
      weight: `[R, S]` weight of each cell, S a multiple of `block`; cells past the last have weight 0.
      mean: `[R, S]` mean of each cell.
      square: `[R, S]` squared error of each cell about its mean.
      leak: `[R, S]` what a path gains for starting an interval at the cut above a cell, at most half the price.
      price: `[R]` positive.
      begin: int32 the cut below the first cell.
      size: `[R]` int32 number of cells that count; none do if it is not positive.
      zero: `[R]` int32, read only with `keep_zero`: an interval from a cut up to `zero` to a cut above it has the held
        zero as its level. It costs its error about 0 and no price.
      block: cells handled at once.
      window: candidate cuts searched at once.
      keep_zero: whether there is a held zero.

    Returns:
      The state to carry on, and for the cut above each cell `[R, S]` φ and `[R, S]` the cut before it on its best path.
      A row's results do not depend on the other rows.
    """
    count, length = weight.shape
    band = carried.weight.shape[1]
    place = jnp.arange(band, dtype=jnp.int32)
    lane = jnp.arange(block, dtype=jnp.int32)
    ahead = jnp.arange(window, dtype=jnp.int32)
    infinite = jnp.inf
    charge = price[:, None]
    running = _running(weight, mean, square, block)

    def at(array, start, size) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, start, size, axis=1)

    def put(array, value, start) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, value, start, axis=1)

    def priced(error, one, two, a, b) -> Any:
        """Returns the cost of the interval (a, b) merged from two parts; without a held zero, the price is left out."""
        if not keep_zero:
            return error
        total, mean, rest, _ = _merged(one, two)
        level = mean + rest
        where = zero.reshape(count, *(1,) * (a.ndim - 1))
        paid = price.reshape(where.shape)
        return error + jnp.where((a <= where) & (b > where), rounded_in_loop(total * level * level), paid)

    def step(number, state) -> tuple[Any, ...]:
        *known, start, first, enough, potential, before = state
        here = number * block
        below = begin + here  # the cut below the block
        cells = tuple(at(x, here, block) for x in (weight, mean, square))
        upward, onward = (tuple(at(x, here, block) for x in tables) for tables in running)
        whole = tuple(x[:, -1:] for x in upward)
        cut = (below - band + 1 + place)[None]
        enough &= (first >= cut[0, 0]) | (here >= size)
        grown = _merged(known, whole)
        reached = start + priced(grown[3], known, whole, cut, below + block)
        _, last = first_least(jnp.where(cut >= first[:, None], reached, infinite), cut, 1)

        def search(state) -> Any:
            step, best, chosen = state
            begins = jnp.clip(first + step - cut[0, 0], 0, band - window)
            a = (begins[:, None] + cut[:, :1] + ahead)[:, :, None]
            valid = (a >= first[:, None, None]) & (a <= last[:, :, None])
            *one, begun = (x[:, :, None] for x in windows((*known, start), begins, window))
            two = tuple(x[:, None, :] for x in upward)
            b = (below + 1 + lane)[None, None]
            begun = jnp.where(valid, begun, infinite)
            low, where = first_least(begun + priced(_error(one, two), one, two, a, b), a, 1)
            low, where = low[:, 0], where[:, 0]
            return step + window, jnp.minimum(low, best), jnp.where(low < best, where, chosen)

        widest = jnp.max(last[:, 0] - first)
        none = jnp.int32(0), jnp.full((count, block), infinite), jnp.zeros((count, block), jnp.int32)
        _, best, chosen = lax.while_loop(lambda state: state[0] <= widest, search, none)
        free = charge
        if keep_zero:
            free = jnp.where((zero[:, None] >= below) & (zero[:, None] < below + block), 0.0, charge)
        else:
            best = best + charge
        loss = at(leak, here, block)
        inside = jnp.any(best > jnp.min(best - loss, axis=1, keepdims=True) + free)

        def shorter(i, state) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
            """Updates the best of the cut above cell i with the intervals that begin at the cuts of this block."""
            ring, best, chosen = state
            cell = tuple(at(x, i, 1) for x in cells)
            cell = cell[0], cell[1], jnp.zeros_like(cell[0]), cell[2]
            begun = lane[None] < i
            ring = tuple(jnp.where(begun, new, old) for new, old in zip(_merged(ring, cell), ring, strict=True))
            a = (below + 1 + lane)[None]
            value = best - loss + ring[3]
            if keep_zero:
                level = ring[1] + ring[2]
                held = (a <= zero[:, None]) & (below + 1 + i > zero[:, None])
                value = value + jnp.where(held, rounded_in_loop(ring[0] * level * level), charge)
            else:
                value = value + charge
            low, where = first_least(jnp.where(begun, value, infinite), a, 1)
            better = (lane[None] == i) & (low < best)
            return ring, jnp.where(better, low, best), jnp.where(better, where, chosen)

        ring = (jnp.zeros((count, block)),) * 4
        _, best, chosen = lax.fori_loop(0, jnp.where(inside, block, 0), shorter, (ring, best, chosen))
        known = tuple(
            jnp.concatenate([old[:, block:], new[:, 1:], jnp.zeros((count, 1))], axis=1)
            for old, new in zip(grown, onward, strict=True)
        )
        start = jnp.concatenate([start[:, block:], best - loss], axis=1)
        first = jnp.maximum(first, chosen[:, -1])
        return *known, start, first, enough, put(potential, best, here), put(before, chosen, here)

    out = jnp.zeros((count, length)), jnp.zeros((count, length), jnp.int32)
    blocks = (jnp.max(size) + block - 1) // block
    *state, potential, before = lax.fori_loop(jnp.int32(0), blocks, step, (*carried, *out))
    return Carried(*state), potential, before
