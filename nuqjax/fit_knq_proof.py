"""A lower bound on the squared error of any K levels, refined until it meets the error of the levels found.

Let the row be sorted and part it at *cuts* into *cells*; every level's values are an interval of the row. Three facts
carry the proof, each short enough to check by hand.

1. *Prices.* Give every value a price ψᵢ and let λ be at least Σᵢ max(0, ψᵢ − (xᵢ − c)²), summed over any run of
   neighbouring values, for every level c. Then K levels cost at least Σ ψᵢ − K λ: each level pays for its own
   interval at least the prices in it less λ. (The dual of the facility location problem; in one dimension it is tight.)
2. *Prices between cuts.* Let φ be given at the cuts and price the values of a cell, of weight n, mean μ and standard
   deviation σ, as ψᵢ = (xᵢ − C)² + α, with a total of φ's difference over the cell. Against any level c the terms
   ψᵢ − (xᵢ − c)² are linear in xᵢ, and of a linear function E max(0, f) ≤ max(0, E f) + std(f)/2. So a run that ends
   inside a cell gains at most what it would with the cell whole or without it, plus |c − C| n σ, and nothing if f has
   one sign on the cell; where it has both, |c − C| ≤ 2 max|x − C| + √|α|. With C chosen to make α = 0, this *leak* is
   2 n σ max(x − C). Hence if φ(b) − φ(a) ≤ cost(a, b) + λ − leak(a) for all cuts a < b, the prices satisfy fact 1.
3. *The largest such φ* is that of the shortest path: φ(b) = min over a of φ(a) − leak(a) + cost(a, b) + λ. Far cuts
   need not be looked at: once φ(a₀) − leak(a₀) + cost(a₀, b) ≥ φ(b), no a ≤ a₀ can do better at b, because
   cost(a, b) ≥ cost(a, a₀) + cost(a₀, b).

The leaks are of second order in the width of the cells. Prices from the left, φ, and from the right, φ', together bound
the error of every partition with a boundary in a given cell: where that is above the error of the levels found, no best
partition has a boundary there, the cell needs no inner cuts and leaks nothing. The other cells are parted further, and
the bound closes: 64-fold for parts of an eighth. (Branch and bound.) What rounding can do is subtracted at the end.
"""

from typing import NamedTuple

import jax
import numpy as np

from nuqjax.fit_knq_path import shortest_paths

_PRICES = 32  # tried at once when λ is searched
_SEARCHES = 6
_ROUNDS = 12
_CELLS = 64  # of an interval in the first round
_MOST_CELLS = 384  # of an interval in the others, where halving its cells does not need more
_SIZES = tuple(2**e for e in range(11, 40, 3))  # of the arrays of cells: few shapes to compile
_BANDS = tuple(2**e for e in range(7, 40))


class Proof(NamedTuple):
    """What is known of a row after a proof.

    Attributes:
      boundaries: `[K − 1]` cuts of the best partition seen.
      lower_bound: at most the least squared error of K levels.
    """

    boundaries: np.ndarray
    lower_bound: float


class _Cells(NamedTuple):
    """The row between `cuts [m + 1]`: weight, mean and squared error of each cell, and its least and greatest value."""

    cuts: np.ndarray
    weight: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    least: np.ndarray
    greatest: np.ndarray
    zero: int | None  # the place among the cuts of the cut below the value zero, where a level is pinned to it

    def reversed(self) -> "_Cells":
        """The cells of the negated row."""
        size = len(self.weight)
        zero = None if self.zero is None else size - 1 - self.zero
        return _Cells(
            self.cuts[-1] - self.cuts[::-1], self.weight[::-1], -self.mean[::-1], self.square[::-1],
            -self.greatest[::-1], -self.least[::-1], zero,
        )  # fmt: skip


def _cells(values: np.ndarray, weight: np.ndarray | None, cuts: np.ndarray, zero: int | None) -> _Cells:
    starts, counts = cuts[:-1], np.diff(cuts)
    heavy = counts.astype(np.float64) if weight is None else np.add.reduceat(weight, starts)
    first = values[starts]
    away = values - np.repeat(first, counts)
    shift = np.add.reduceat(away if weight is None else away * weight, starts) / np.where(heavy > 0, heavy, 1.0)
    away -= np.repeat(shift, counts)
    away *= away
    square = np.add.reduceat(away if weight is None else away * weight, starts)
    place = None if zero is None else int(np.searchsorted(cuts, zero))
    return _Cells(cuts, heavy, first + shift, square, first, values[cuts[1:] - 1], place)


def prove(
    values: np.ndarray,
    weight: np.ndarray | None,
    zero: int | None,
    boundaries: np.ndarray,
    num_levels: int,
    tolerance: float,
) -> Proof:
    """Bounds the squared error of any K levels from below, to within `tolerance` of the best partition's.

    Args:
      values: `[D]` ascending distinct float64 values.
      weight: `[D]` their positive weights (zero for a pinned zero that is not in the row), or None for 1 each.
      zero: the cut below the value zero, if one level is exactly 0.
      boundaries: `[K − 1]` cuts of a good partition; only the time depends on how good.
      num_levels: K.
      tolerance: the relative gap that is good enough.

    Must run where 64-bit types are enabled.
    """
    whole = np.concatenate([[0], boundaries, [len(values)]]).astype(np.int64)
    if len(values) <= num_levels:
        return Proof(boundaries, 0.0)
    pinned = zero is not None
    best = _partition_error(values, weight, whole, zero)
    if best == 0:
        return Proof(boundaries, 0.0)
    free = num_levels - pinned
    cells = _cells(values, weight, _first_cuts(values, whole, zero), zero)
    open_cells = np.ones(len(cells.weight), bool)  # in which, or at whose ends, a boundary may lie
    inner = np.diff(cells.cuts) > 1
    band = _band(cells, whole)
    price = _price(cells, free, band, 2 * best / max(free, 1), 8.0)
    without_leaks = np.zeros(len(inner))
    above = _pass(cells, without_leaks, price, band).level
    below = -_pass(cells.reversed(), without_leaks, price, band).level[::-1]
    moment = float(np.dot(values, values if weight is None else values * weight))
    bound, rounding, priced_last = 0.0, 0.0, False
    for _ in range(_ROUNDS):
        spread = np.sqrt(cells.weight * cells.square) * 2.02
        up = np.where(inner, spread * np.maximum(cells.greatest - np.minimum(above[:-1], above[1:]), 0.0), 0.0)
        down = np.where(inner, spread * np.maximum(np.maximum(below[:-1], below[1:]) - cells.least, 0.0), 0.0)
        left = _pass(cells, up, price, band)
        right = _pass(cells.reversed(), down[::-1], price, band)
        band = max(left.band, right.band)
        prices_up, more_up = _leaks(cells, inner, left.potential, up, price)
        mirrored, more_down = _leaks(cells.reversed(), inner[::-1], right.potential, down[::-1], price)
        prices_down = -mirrored[::-1]
        forward, backward = left.potential, right.potential[::-1]
        size = len(inner)
        rounding = 2.0**-52 * (8 * band + 4 * num_levels) * (3 * best + np.sqrt(best * moment))
        bound = max(
            bound,
            forward[-1] - free * (price + more_up),
            backward[0] - free * (price + more_down),
        )
        path = _path(left.before, size)
        if len(path) == len(whole):
            found = cells.cuts[path]
            error = _partition_error(values, weight, found, zero)
            if error < best:
                best, whole = error, found
        if bound >= best * (1 - tolerance):
            break
        if not inner.any():  # all that is left is the price
            if priced_last or len(path) == len(whole):
                break
            priced_last = True
        through = forward + backward - free * price - free * max(more_up, more_down)
        dip = np.sqrt(cells.weight * cells.square) * np.abs(prices_down - prices_up)
        open_cells &= np.minimum(through[1:], through[:-1]) - dip <= best * (1 + 1e-9) + 2 * rounding
        parts = int(np.clip(np.ceil(1.2 * np.sqrt((best - bound) / (tolerance * best))), 2, 8))
        if 2 * open_cells.sum() > size:  # too coarse to tell a chain of boundaries from one moved along by half a step
            parts = int(np.clip(np.ceil(1.4 * num_levels * np.sqrt((best - bound) / best)), 2, parts))
        cuts, open_cells = _finer(cells, open_cells, whole, parts)
        at = values[np.minimum(cuts, len(values) - 1)]
        known = values[np.minimum(cells.cuts, len(values) - 1)]
        above, below = np.interp(at, known, left.level), np.interp(at, known, -right.level[::-1])
        cells = _cells(values, weight, cuts, zero)
        inner = open_cells & (np.diff(cuts) > 1)
        band = _band(cells, whole)
        wrong = abs(len(path) - len(whole)) / num_levels
        if wrong:  # the price falls with the cube of the number of intervals
            price = _price(cells, free, band, price, (1 + wrong) ** 4)
    return Proof(whole[1:-1], max(min(bound, best) - rounding, 0.0))


def _partition_error(values, weight, whole, zero) -> float:
    """Σ weight (value − mean of its interval)², the interval of the pinned zero about 0."""
    cuts = np.unique(whole)
    cells = _cells(values, weight, cuts, None)
    error = float(cells.square.sum())
    if zero is not None:
        pinned = np.searchsorted(cuts, zero, side="right") - 1
        error += float(cells.weight[pinned] * cells.mean[pinned] ** 2)
    return error


def _first_cuts(values, whole, zero) -> np.ndarray:
    """Each interval parted into cells, half of them even in rank and half in value."""
    low, high = whole[:-1, None], whole[1:, None]
    share = np.arange(1, _CELLS // 2) / (_CELLS // 2)
    by_rank = low + ((high - low) * share).astype(np.int64)
    last = len(values) - 1
    least, most = values[np.minimum(low, last)], values[np.clip(high - 1, 0, last)]
    by_value = np.searchsorted(values, (least + (most - least) * share).ravel())
    pin = np.zeros(0, np.int64) if zero is None else np.array([zero, zero + 1])
    return np.unique(np.concatenate([whole, by_rank.ravel(), by_value, pin]))


def _finer(cells: _Cells, chosen, whole, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts that part the chosen cells, and join the others; and which of the new cells lie inside a chosen one.

    Each is parted into `most`, or fewer where an interval of the partition `whole` would hold too many.
    """
    low, high = cells.cuts[:-1][chosen], cells.cuts[1:][chosen]
    interval = np.searchsorted(whole, low, side="right")
    crowd = np.bincount(interval)[interval] if len(interval) else interval
    inner = np.minimum(np.clip(_MOST_CELLS // np.maximum(crowd, 1), 2, most), high - low) - 1
    cell = np.repeat(np.arange(len(low)), inner)
    number = np.arange(len(cell)) - np.repeat(np.cumsum(inner) - inner, inner) + 1
    between = low[cell] + (high - low)[cell] * number // (inner[cell] + 1)
    kept = np.zeros(len(cells.cuts), bool)
    kept[0] = kept[-1] = True
    kept[:-1] |= chosen
    kept[1:] |= chosen
    if cells.zero is not None:
        kept[cells.zero : cells.zero + 2] = True
    cuts = np.unique(np.concatenate([cells.cuts[kept], between]))
    return cuts, chosen[np.searchsorted(cells.cuts, cuts[:-1], side="right") - 1]


def _band(cells: _Cells, whole) -> int:
    """The cells that an interval may have, first guess: a pass that needs more says so."""
    places = np.searchsorted(cells.cuts, whole)
    wanted = min(2 * int(np.diff(places).max()) + 16, len(cells.weight))
    return next(size for size in _BANDS if size >= wanted)


class _Potential(NamedTuple):
    potential: np.ndarray  # [m + 1]
    before: np.ndarray  # [m + 1] the cut before, on the best path to each cut
    level: np.ndarray  # [m + 1] the mean of the interval between them
    band: int


def _pass(cells: _Cells, leak, price: float, band: int) -> _Potential:
    """The shortest path to every cut, with as wide a band as proves it."""
    size = len(cells.weight)
    at_cut = np.concatenate([[0.0], np.maximum(leak[1:], leak[:-1]), [0.0]])
    while True:
        *_, (potential, before, level, enough) = _run(cells, at_cut, np.array([price]), band, True)
        if enough:
            return _Potential(potential[: size + 1], before[: size + 1], level[: size + 1], band)
        band = next(size for size in _BANDS if size > band)


def _price(cells: _Cells, free: int, band: int, guess: float, factor: float) -> float:
    """λ at which the shortest path has `free` priced intervals: where the dual value is largest."""
    prices = np.geomspace(guess / factor, guess * factor, _PRICES)
    for _ in range(_SEARCHES):
        total, count, _ = _run(cells, np.zeros(len(cells.weight) + 1), prices, band, False)
        right = np.flatnonzero(count == free)
        if len(right):
            return float(prices[right[len(right) // 2]])
        most = int(np.argmax(total - free * prices))
        low, high = prices[max(most - 1, 0)], prices[min(most + 1, len(prices) - 1)]
        if most in (0, len(prices) - 1):
            factor = factor**4
            low, high = prices[most] / factor, prices[most] * factor
        prices = np.geomspace(low, high, _PRICES)
    return float(prices[most])


def _run(cells: _Cells, leak, prices, band: int, tables: bool):
    size = len(cells.weight)
    length = next(length for length in _SIZES if length >= size)

    def padded(array):
        return np.concatenate([array, np.zeros(length - len(array))])[None]

    zero = np.array([-1 if cells.zero is None else cells.zero], np.int32)
    found = shortest_paths(
        padded(cells.weight), padded(cells.mean), padded(cells.square), padded(leak[:-1]), prices[None],
        np.int32(size), zero, band=band, tables=tables, pin=cells.zero is not None,
    )  # fmt: skip
    return jax.tree.map(lambda x: np.asarray(x)[0], found)


def _path(before: np.ndarray, size: int) -> np.ndarray:
    """The cuts of the shortest path, from 0 to the last."""
    path = [size]
    while path[-1] > 0:
        path.append(int(before[path[-1]]))
    return np.array(path[::-1])


def _leaks(cells: _Cells, inner, potential, assumed, price: float) -> tuple[np.ndarray, float]:
    """The C of each cell (fact 2), and by how much λ must exceed the price.

    That is how far a leak exceeds what was assumed, or, for runs of parts of two cells, how far two leaks do the price.
    """
    weight = np.where(cells.weight > 0, cells.weight, 1.0)
    rest = np.diff(potential) / weight - cells.square / weight
    level = cells.mean - np.sqrt(np.maximum(rest, 0.0))
    reach = np.maximum(cells.greatest - level, 0.0) + np.sqrt(np.maximum(-rest, 0.0))
    leak = np.where(inner, 2 * np.sqrt(cells.weight * cells.square) * reach, 0.0)
    return level, float(max(np.max(leak - assumed, initial=0.0), 2 * np.max(leak, initial=0.0) - price))
