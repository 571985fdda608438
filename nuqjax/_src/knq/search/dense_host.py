"""`search.dense` for rows on the host: nothing is compiled, and the cuts are the same, also where partitions tie.

The shortest paths at a price (`search.priced_host`) show which cuts may be boundaries of a best partition. Mostly these
are its K − 1 boundaries. Where they are more, because partitions tie or no price has a path of K intervals, the
programme with a layer for each boundary runs over those few cuts. No interval is empty here: only a lower bound over
cells needs empty ones.
"""

from typing import Any

import numpy as np

from nuqjax._src.knq.search.priced_host import priced_paths

_TRIALS = 24  # prices to try, at most
_TABLE = 2**20  # costs stored at once
_TILE = 16  # cuts handled at once
_MOST = 64  # rows handled at once
_EXACT = 2.0**52  # differences of integers below this are exact in float64


def dense_rows(count, total, size, zero, price, *, num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the partition of each row into K intervals that makes Σ S²/n greatest, like `search.dense.dense_rows`.

    Args:
      count: `[R, M + 1]` running weights at ascending cuts; float64 or int64. Cuts may repeat after the last.
      total: `[R, M + 1]` running sums of weight times value; float64 or int64.
      size: `[R]` the last cut of each row.
      zero: `[R]` the cut below the held zero: an interval from a cut not above it to one above it gains 0; or None.
      price: `[R]` float64 positive, the first price to try.
      num_levels: K, from 2 to M.

    Returns:
      `[R, K − 1]` ascending cuts between the intervals, and `[R]` float64 minus the gain.

    >>> values = np.array([[1.0, 2.0, 3.0, 10.0, 11.0]])
    >>> running = np.concatenate([[[0.0]], np.cumsum(values, axis=1)], axis=1)
    >>> cuts, best = dense_rows(np.arange(6.0)[None], running, np.array([5]), None, np.ones(1), num_levels=2)
    >>> cuts.tolist(), best.tolist()
    ([[3]], [-232.5])
    """
    last = count.shape[1] - 1
    cuts = np.minimum(np.arange(1, num_levels), size[:, None])  # every value its own level
    several = np.flatnonzero(size > num_levels)
    if len(several):
        n, s = count[several], total[several]
        pins = None if zero is None else zero[several]
        found, price, exact, excess, cost = priced_paths(
            n, s, last, pins, price[several], _TRIALS, True, num_levels=num_levels, keep_zero=zero is not None
        )
        found = np.minimum(found, size[several, None])
        # Every addition is rounded in proportion to its sum.
        free = num_levels - (zero is not None)
        gain = -_cost_of(n, s, found, pins)
        off = (np.abs(cost) + np.abs(gain) + free * price) * ((last + 64) * 2.0**-50)
        most = np.maximum((free * price - gain) - cost, 0.0) + off
        near = excess - cost[:, None] <= most[:, None]
        near[np.arange(last + 1) >= size[several, None]] = False  # the ends of a row are always cuts
        near[:, 0] = False
        number = near.sum(axis=1)
        left = np.flatnonzero((number > num_levels - 1) | ~exact)
        left = left[np.argsort(-number[left], kind="stable")]
        while len(left):
            some = min(max(_TABLE // int(number[left[0]]) ** 2, 1), _MOST)
            rows, left = left[:some], left[some:]
            found[rows] = _among(
                n[rows], s[rows], near[rows], size[several[rows]], None if pins is None else pins[rows], num_levels
            )
        cuts[several] = found
    return cuts, _cost_of(count, total, cuts, zero)


def _cost_of(count, total, cuts, zero) -> np.ndarray:
    """Returns `[R]` minus the gain of partitions, added up from the left."""
    whole = np.pad(cuts, ((0, 0), (1, 1)))
    whole[:, -1] = count.shape[1] - 1
    n, s = (np.diff(np.take_along_axis(x, whole, axis=1), axis=1).astype(np.float64) for x in (count, total))
    gain = s * s / np.where(n > 0, n, 1.0)
    if zero is not None:
        gain[(whole[:, :-1] <= zero[:, None]) & (whole[:, 1:] > zero[:, None])] = 0.0
    return -np.cumsum(gain, axis=1)[:, -1]


def _among(count, total, near, size, zero, num_levels: int) -> np.ndarray:
    """Finds the best partition as `dense_rows` does, only at cuts that are `near [R, M + 1]` a best path."""
    row, cut = np.nonzero(near)
    number = near.sum(axis=1)
    most = max(int(number.max()) + 1, num_levels)
    cuts = np.broadcast_to(size[:, None], (len(size), most + 1)).copy()
    cuts[:, 0] = 0
    cuts[row, 1 + np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)] = cut
    above = np.zeros(cuts.shape, bool) if zero is None else cuts > zero[:, None]
    n, s = (np.ascontiguousarray(np.take_along_axis(x, cuts, axis=1).T) for x in (count, total))
    return np.take_along_axis(cuts, _partition(n, s, np.ascontiguousarray(above.T), num_levels), 1)


def _partition(count, total, above, num_levels: int) -> np.ndarray:
    """Returns `[R, K − 1]` places among cuts `[M + 1, R]` of the best partition; of equal ones, that of lowest cuts."""
    size, lanes = count.shape
    count = count.astype(np.float64)
    if total.dtype == np.int64 and max(int(total.max()), -int(total.min())) < _EXACT:
        total = total.astype(np.float64)
    held = above.any()

    def cost(begin, end) -> Any:
        n, s = count[end] - count[begin], (total[end] - total[begin]).astype(np.float64, copy=False)
        np.multiply(s, s, out=s)
        np.copyto(n, 1.0, where=n <= 0)
        np.divide(s, n, out=s)
        if held:
            s[~above[begin] & above[end]] = 0.0
        return np.negative(s, out=s)

    window = size - num_levels  # places of a boundary: no interval is empty
    places = np.arange(window)
    # Costs from each inner cut to the later inner cuts in its window; elsewhere they are infinite.
    costs = np.full((size - 1, size - 1, lanes), np.inf)
    for begin in range(1, size - 2):
        end = slice(begin + 1, min(begin + window, size - 2) + 1)
        costs[begin, end] = cost(begin, end)
    layers = np.empty((num_levels - 1, window, lanes))
    layers[0] = cost(0, slice(1, window + 1))
    for layer in range(1, num_levels - 1):
        earlier, later = layers[layer - 1], layers[layer]
        # The cuts before lie in layer … layer + window − 1, and the ends one higher.
        for low in range(0, window, _TILE):
            high = min(low + _TILE, window)
            reached = costs[layer : layer + high, layer + 1 + low : layer + 1 + high] + earlier[:high, None]
            reached.min(axis=0, out=later[low:high])
    every = np.arange(lanes)
    cuts = np.empty((num_levels - 1, lanes), np.int64)
    reached = layers[-1] + cost(slice(num_levels - 1, size - 1), size - 1)
    cuts[-1] = end = num_levels - 1 + np.argmin(reached, axis=0)
    for layer in range(num_levels - 2, 0, -1):
        reached = layers[layer - 1] + costs[layer + places[:, None], end, every]
        cuts[layer - 1] = end = layer + np.argmin(reached, axis=0)
    return cuts.T
