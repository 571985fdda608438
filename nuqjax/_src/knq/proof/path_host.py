"""`proof.path` in NumPy, for one row on the host: nothing is compiled.

As in `proof.path`, errors of intervals are merged from means and squared errors, sums of terms that are never negative,
and a block of cuts is settled at once.
"""

import itertools
from typing import Any

import numpy as np

from nuqjax._src.knq.search.priced_host import LEAST_BLOCK, schedule

_MOST_BLOCK = 128  # cells handled at once, at most
_PER_BLOCK = 6  # a block has a sixth of the cells that an interval may have: 1.6 times those that one is known to have


def potentials(
    weight, mean, square, leak, price: float, zero: int | None, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Computes φ(b) = min over the cuts a before b of φ(a) − leak(a) + error(a, b) + price.

    Args:
      weight: `[m]` weight of each cell.
      mean: `[m]` mean of each cell.
      square: `[m]` squared error of each cell about its mean.
      leak: `[m + 1]` what a path gains for starting an interval at each cut, at most half the price.
      price: positive.
      zero: the cut below the value 0 where there is a held zero, else None: an interval from a cut up to `zero` to a
        cut above it costs its error about 0 and no price.
      sizes: the number of cells of each interval of some partition, m in all. It affects the time only.

    Returns:
      `[m + 1]` φ, `[m + 1]` the cut before each on its best path, the number of cells of the widest interval computed,
      and the greatest number of parts that an interval's error is merged from.
    """
    length = len(weight)
    potential, before = np.zeros(length + 1), np.zeros(length + 1, np.int64)
    start = np.zeros(length + 1)  # φ − leak
    blocks = _block_sizes(sizes)
    ends = schedule(length, np.repeat(blocks, sizes))
    upward, onward = _running(weight, mean, square, ends)
    # `known` holds weight, mean, rest and squared error of the intervals from each cut since `first` to the block.
    first, widest, known = 0, 0, tuple(np.zeros(1) for _ in range(4))

    def priced(error, one, two, a, b) -> Any:
        """Returns the cost of intervals (a, b) merged from two parts."""
        if zero is None:
            return error + price
        held = (a <= zero) & (b > zero)
        if not held.any():
            return error + price
        total, middle, rest, _ = _merged(one, two)
        level = middle + rest
        return error + np.where(held, total * level * level, price)

    for below, last in itertools.pairwise(ends):
        up = tuple(x[below:last] for x in upward)
        whole = tuple(x[-1] for x in up)
        grown = _merged(known, whole)
        begins = np.arange(first, below + 1)
        widest = max(widest, last - first)
        reached = start[first : below + 1] + priced(grown[3], known, whole, begins, last)
        at = int(np.argmin(reached))
        one, two = tuple(x[: at + 1, None] for x in known), tuple(x[None] for x in up)
        costs = priced(_error(one, two), one, two, begins[: at + 1, None], np.arange(below + 1, last + 1))
        costs += start[first : first + at + 1, None]
        chosen = np.argmin(costs, axis=0)
        best = costs[chosen, np.arange(last - below)]
        chosen += first
        # Intervals inside the block are searched only if one could be the best.
        free = 0.0 if zero is not None and below <= zero < last else price
        here = leak[below + 1 : last + 1]
        if (best > (best - here).min() + free).any():
            _settle_within(weight, mean, square, here, price, zero, below, best, chosen)
        potential[below + 1 : last + 1], before[below + 1 : last + 1] = best, chosen
        start[below + 1 : last + 1] = best - here
        step = max(int(chosen[-1]) - first, 0)
        if first + step <= below:
            parts = (tuple(x[step:] for x in grown), tuple(x[below + 1 : last] for x in onward), _nothing())
            known = tuple(np.concatenate(x) for x in zip(*parts, strict=True))
        else:
            rest = tuple(x[first + step : last] for x in onward)
            known = tuple(np.concatenate(x) for x in zip(rest, _nothing(), strict=True))
        first += step
    return potential, before, widest, widest // LEAST_BLOCK + 2 * int(blocks.max()) + 2


def _block_sizes(sizes: np.ndarray) -> np.ndarray:
    """Returns how many cells are settled at once beside intervals of some sizes: powers of two, for few shapes.

    In larger blocks many intervals begin and end, and those are settled one after the other.
    """
    share = np.maximum((1.6 * sizes + 32) / _PER_BLOCK, 1)
    return np.clip(2 ** np.log2(share).astype(np.int64), LEAST_BLOCK, _MOST_BLOCK)


def _nothing() -> tuple[np.ndarray, ...]:
    return (np.zeros(1),) * 4


def _settle_within(weight, mean, square, leak, price, zero, below: int, best, chosen) -> None:
    """Updates `best` and `chosen` in place with the intervals that begin inside the block, cut by cut."""
    number = len(best)
    ring = tuple(np.zeros(number) for _ in range(4))  # the intervals from each cut of the block to here
    for i in range(1, number):
        cell = weight[below + i], mean[below + i], 0.0, square[below + i]
        for part, new in zip(ring, _merged(tuple(x[:i] for x in ring), cell), strict=True):
            part[:i] = new
        value = best[:i] - leak[:i] + ring[3][:i]
        if zero is None:
            value += price
        else:
            held = (below + 1 + np.arange(i) <= zero) & (below + 1 + i > zero)
            level = ring[1][:i] + ring[2][:i]
            value += np.where(held, ring[0][:i] * level * level, price)
        at = int(np.argmin(value))
        if value[at] < best[i]:
            best[i], chosen[i] = value[at], below + 1 + at


def _merged(one, two) -> tuple[Any, Any, Any, Any]:
    """Merges weight, mean, its rest and squared error of two neighbouring runs (Chan, Golub and LeVeque 1983)."""
    n, mean, rest, square = one
    k, other, other_rest, other_square = two
    both = n + k
    inverse = 1.0 / np.where(both > 0, both, 1.0)
    apart = (other - mean) + (other_rest - rest)
    left = n >= k
    moved = apart * np.where(left, k, -n) * inverse + np.where(left, rest, other_rest)
    base = np.where(left, mean, other)
    middle = base + moved
    return both, middle, moved - (middle - base), (square + other_square) + apart * apart * (n * k * inverse)


def _error(one, two) -> Any:
    """Computes the squared error of two neighbouring runs merged into one."""
    n, mean, rest, square = one
    k, other, other_rest, other_square = two
    both = n + k
    apart = (other - mean) + (other_rest - rest)
    apart *= apart
    apart *= n * k / np.where(both > 0, both, 1.0)
    apart += square + other_square
    return apart


def _running(weight, mean, square, ends: list[int]) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Merges, for each cell, the cells of its block up to it, and those from it on: two tuples of `[m]` arrays."""
    starts, sizes = np.array(ends[:-1]), np.diff(ends)
    up, on = np.empty((4, len(weight))), np.empty((4, len(weight)))
    for size in np.unique(sizes).tolist():
        places = starts[sizes == size, None] + np.arange(size)
        for ran, order in ((up, places), (on, places[:, ::-1])):
            now = tuple(np.zeros(len(order)) for _ in range(4))
            for cell in order.T:
                now = _merged(now, (weight[cell], mean[cell], np.zeros(len(cell)), square[cell]))
                ran[:, cell] = now
    return tuple(up), tuple(on)
