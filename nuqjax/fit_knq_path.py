"""The penalised programme: the shortest path through the cuts of a row; an interval costs its error and a price.

Its best path has as few intervals as the price is high. One pass over the cells serves every number of levels, where
the programme with a fixed number needs a layer for each (Aggarwal, Schieber and Tokuyama 1994). Errors of intervals are
merged pairwise from means and squared errors (Chan, Golub and LeVeque 1983): sums of terms that are never negative, so
nothing cancels, whatever the row.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, static_argnames=("band", "tables", "pin"))
def shortest_paths(weight, mean, square, leak, prices, size, zero, *, band: int, tables: bool, pin: bool):
    """φ(b) = min over the `band` cuts a before b of φ(a) − leak(a) + error(a, b) + price.

    Args:
      weight: `[R, M]` of each cell; those from `size` on do not count.
      mean: `[R, M]`.
      square: `[R, M]` squared error of each cell about its mean.
      leak: `[R, M]` what a path gains for starting an interval at the cut below a cell.
      prices: `[R, L]` positive, each a problem of its own.
      size: int32 number of cells.
      zero: `[R]` int32 with `pin`: intervals from a cut up to `zero` to one above it hold the level 0: they cost their
        error about 0 and no price.
      band: a power of two.
      tables: whether potentials and paths are wanted.
      pin: whether a level is held at 0.

    Returns:
      `[R, L]` the last potentials φ and the numbers of priced intervals; and with `tables`, for the first price, the
      potentials, the cuts before and the levels of the last intervals, `[R, M + 1]`, and if the band sufficed, `[R]`.
    """
    run = functools.partial(_one, band=band, tables=tables, pin=pin)
    return jax.vmap(run, (0, 0, 0, 0, 0, None, 0))(weight, mean, square, leak, prices, size, zero)


def _one(weight, mean, square, leak, prices, size, zero, *, band: int, tables: bool, pin: bool):
    place = jnp.arange(band, dtype=jnp.int32)
    count = prices.shape[0]
    nothing = jnp.zeros((), jnp.float64)

    def put(array, value, at):
        start = (jnp.int32(0),) * (array.ndim - 1) + (at,)
        return lax.dynamic_update_slice(array, value.reshape(*array.shape[:-1], 1), start)

    def step(b, state):
        heavy, centre, error, start, priced, potential, number, found = state
        at = b & (band - 1)  # the ring's place of the interval that begins at cut b
        heavy, centre, error = put(heavy, nothing, at), put(centre, nothing, at), put(error, nothing, at)
        start, priced = put(start, potential - leak[b], at), put(priced, number, at)
        both = heavy + weight[b]
        share = jnp.where(both > 0, weight[b] / jnp.where(both > 0, both, 1.0), 0.0)
        apart = mean[b] - centre
        # Selected, a product is rounded before it is added: XLA may contract a·b + c otherwise, here and not there.
        error = error + (square[b] + jnp.where(share > 0, apart * apart * (heavy * share), 0.0))
        centre = centre + jnp.where(share > 0, apart * share, 0.0)
        cut = b - ((at - place) & (band - 1))  # where each interval begins
        cost, charge = error, prices[:, None]
        if pin:
            pinned = (cut <= zero) & (b >= zero)
            about = jnp.where(pinned, both * centre * centre, 0.0)
            cost, charge = error + about, jnp.where(pinned, 0.0, charge)
        reached = start + cost + charge
        potential = jnp.min(reached, axis=1)
        chosen = jnp.min(jnp.where(reached == potential[:, None], cut, b), axis=1)
        slot = chosen & (band - 1)
        free = 1 - pinned[slot].astype(jnp.int32) if pin else 1
        number = jnp.take_along_axis(priced, slot[:, None], axis=1)[:, 0] + free
        if tables:
            potentials, before, levels, enough = found
            oldest = (b + 1) & (band - 1)
            enough &= (b + 1 < band) | (start[0, oldest] + cost[oldest] >= potential[0])
            level = jnp.where(pinned[slot[0]], 0.0, centre[slot[0]]) if pin else centre[slot[0]]
            potentials, levels = put(potentials, potential[0], b + 1), put(levels, level, b + 1)
            found = potentials, put(before, chosen[0], b + 1), levels, enough
        return both, centre, error, start, priced, potential, number, found

    long = weight.shape[0] + 1
    found = ()
    if tables:
        found = jnp.zeros(long), jnp.zeros(long, jnp.int32), jnp.zeros(long), jnp.ones((), bool)
    ring = jnp.zeros(band)
    state = (
        ring, ring, ring, jnp.full((count, band), jnp.inf), jnp.zeros((count, band), jnp.int32),
        jnp.zeros(count), jnp.zeros(count, jnp.int32), found,
    )  # fmt: skip
    *_, potential, number, found = lax.fori_loop(jnp.int32(0), size, step, state)
    return potential, number, found
