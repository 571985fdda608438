"""A lower bound on the squared error of any K levels, refined until it meets the error of the levels found.

The row is sorted and split at *cuts* into *cells*; the values of one level are an interval of the row. The proof rests
on three facts, each short enough to check by hand (see `docs/knq.md`).

1. *Prices.* Give every value a price ψᵢ. Let λ ≥ 0 be at least Σᵢ (ψᵢ − (xᵢ − c)²), summed over any run of
   neighbouring values, for every level c. Then K levels cost at least Σ ψᵢ − K λ: the squared error of each interval is
   at least the prices in it less λ. (This is the dual of the facility location problem; in one dimension it is tight.)
2. *Prices between cuts.* Let φ be given at the cuts. In a cell of weight n, mean μ and standard deviation σ, set the
   prices to ψᵢ = (xᵢ − C)² + α, so that they add up to the difference of φ over the cell. Against any level c the terms
   f = ψᵢ − (xᵢ − c)² are linear in xᵢ, and a linear function satisfies E max(0, f) ≤ max(0, E f) + std(f)/2. So a run
   that ends inside a cell gains at most what it gains with the whole cell or without it, plus |c − C| n σ, and nothing
   more if f has one sign on the cell. Where f has both signs, |c − C| ≤ 2 max|x − C| + √max(0, α). With the C that
   makes α = 0, or the cell's least value if that is lower (then α < 0), this *leak* is 2 n σ max(x − C) where a run
   begins, and nothing where one ends: there c < C, and f is negative. Hence the prices satisfy fact 1 if
   φ(b) − φ(a) ≤ cost(a, b) + λ − leak(a) for all cuts a < b.
3. *The largest such φ* is that of the shortest path: φ(b) = min over a of φ(a) − leak(a) + cost(a, b) + λ, computed by
   `proof.path.potentials`.

Leaks are of second order in the width of the cells. They matter where a boundary of a nearly best partition may lie.
So cells are narrow at the boundaries of the known partition and wider away from them, and mostly one pass is enough.
Where it is not, the prices from the left, φ, and from the right, φ', together bound the error of every partition with
a boundary in a given cell. If that bound is above the error of the levels found, no best partition has a boundary
there: the cell needs no inner cuts and has no leak. The other cells are split further (branch and bound). A bound on
the rounding error is subtracted at the end.

A generator proves each row and yields the passes that it needs, so that many rows share one pass.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nuqjax._src.knq.proof import path_host as fit_knq_path_host
from nuqjax._src.knq.proof.path import nothing_yet, potentials
from nuqjax._src.knq.proof.rows import CHUNK, HostRow, Row, merged, origin
from nuqjax._src.knq.search.search import COMPILED

_BANDS = (2**7, *(2**e for e in range(9, 40)))  # bands of a pass: few shapes to compile
_STRETCH = 2048  # cells in one call
_TOGETHER = 8  # rows in one pass
_ACTIVE = 64  # rows whose cells are in memory at once
_COARSE = 16  # cells of an interval by rank, and as many by value, before they are graded
_NARROWEST = 0.42  # cells at an interval's ends have this times √tolerance of its width
_WIDENING = 1.3  # other cells have this over K of their distance from the nearer end
_MOST_CELLS = 1536  # of an interval
_ROUNDS = 12
_TRIALS, _LAST_TRIALS = 10, 32  # values of λ tried in a round, and in the last one, whose cells are single values
_MARGIN, _MARGIN_INSIDE = 1.1, 1.5  # ratio of the assumed leaks to the expected ones: at boundaries, inside intervals
_UNIT = 2.0**-53


def _block(band: int) -> int:
    """Returns how many cells a pass handles at once."""
    return 16 if band < 512 else 32


class _Cells(NamedTuple):
    """The row between `cuts [m + 1]`: weight, mean and squared error of each cell, and its least and greatest value.

    Values and means are relative to the row's middle value, or to 0 where there is a held zero.
    """

    cuts: np.ndarray
    weight: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    least: np.ndarray
    greatest: np.ndarray
    zero: int | None  # index in `cuts` of the cut below the value zero, where there is a held zero; else None

    def reversed(self) -> "_Cells":
        """Returns the cells of the negated row."""
        zero = None if self.zero is None else len(self.weight) - 1 - self.zero
        return _Cells(
            self.cuts[-1] - self.cuts[::-1], self.weight[::-1], -self.mean[::-1], self.square[::-1],
            -self.greatest[::-1], -self.least[::-1], zero,
        )  # fmt: skip

    def middles(self) -> np.ndarray:
        return (self.least + self.greatest) / 2

    def intervals(self, whole: np.ndarray) -> np.ndarray:
        """Returns the first cell of each interval of the partition `whole`, empty intervals left out."""
        return _distinct(np.searchsorted(self.cuts, whole[whole < self.cuts[-1]]))


# φ at the cuts, the cut before each on its best path, the band, and the most parts that an interval is merged from.
_Answer = tuple[np.ndarray, np.ndarray, int, int]


class _Request(NamedTuple):
    """A pass that a row is waiting for."""

    cells: _Cells
    leak: np.ndarray  # [m + 1] at each cut
    price: float
    sizes: np.ndarray  # the number of cells of each interval of the partition known
    band: int  # first guess of how many cuts before a block are candidates, in compiled passes
    compiled: bool  # whether the pass is large enough to pay for its compilation


_Proof = Generator[_Request, _Answer, tuple[np.ndarray, float]]


def prove(
    rows: Sequence[Row], boundaries: np.ndarray, num_levels: int, tolerance: float, prices: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds the squared error of any K levels from below, to within `tolerance` of the best partition's.

    Its memory grows with the number of cells, not of values, besides a few MB of working arrays. A row's results do not
    depend on the other rows. It needs 64-bit types enabled.

    Args:
      rows: R sorted rows.
      boundaries: `[R, K − 1]` ascending cuts of good partitions, each a number of values. How good they are affects
        the time only.
      num_levels: K.
      tolerance: the relative gap that is good enough.
      prices: `[R]` the first λ to try, in units of the rows' unit²: that of the search that found the boundaries, or 0
        where it is not known. None if none is known.

    Returns:
      `[R, K − 1]` int64 cuts of the best partitions found, and `[R]` float64 lower bounds on Σ weight (value − level)²,
      in units of the rows' unit².
    """
    best = np.array(boundaries, np.int64)
    bounds = np.zeros(len(rows))
    prices = np.zeros(len(rows)) if prices is None else prices
    waiting: dict[int, tuple[_Proof, _Request]] = {}
    to_come = iter(range(len(rows)))

    def resume(r: int, task: _Proof, answer: _Answer | None) -> None:
        try:
            waiting[r] = task, next(task) if answer is None else task.send(answer)
        except StopIteration as end:
            waiting.pop(r, None)
            best[r], bounds[r] = end.value

    while True:
        for r in to_come:
            resume(r, _prove(rows[r], best[r].copy(), num_levels, tolerance, prices[r]), None)
            if len(waiting) == _ACTIVE:
                break
        if not waiting:
            return best, bounds
        for r, answer in list(_answers({r: request for r, (_, request) in waiting.items()})):
            resume(r, waiting[r][0], answer)


def better_of(row: Row, boundaries: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the first of two partitions' boundaries `[K − 1]`; the second if it costs less by more than rounding."""

    def error(boundaries: np.ndarray) -> float:
        whole = row.settled(np.concatenate([[0], boundaries, [row.size]]))
        return _partition_error(_measured(row, _distinct(np.append(whole, row.held_zero or 0))), whole)

    return boundaries if error(boundaries) <= error(others) * (1 + 2.0**-30) else others


def _answers(requests: dict[int, _Request]) -> Iterator[tuple[int, _Answer]]:
    """Yields the answer to each row's request, from passes over many rows at once."""
    for r, request in list(requests.items()):
        if not request.compiled:
            row = requests.pop(r).cells
            arrays = row.weight, row.mean, row.square, request.leak
            yield r, fit_knq_path_host.potentials(*arrays, request.price, row.zero, request.sizes)
    while requests:
        groups: dict[tuple[int, bool], list[int]] = {}
        for r, request in requests.items():
            band = next(band for band in _BANDS if band >= request.band)
            groups.setdefault((band, request.cells.zero is not None), []).append(r)
        wider = {}
        for (band, keep_zero), members in groups.items():
            for start in range(0, len(members), _TOGETHER):
                part = members[start : start + _TOGETHER]
                for r, answer in zip(part, _pass([requests[r] for r in part], band, keep_zero), strict=True):
                    if answer is None:
                        wider[r] = requests[r]._replace(band=band + 1)
                    else:
                        yield r, answer
        requests = wider


def _pass(requests: list[_Request], band: int, keep_zero: bool) -> list[_Answer | None]:
    """Returns the answers to the requests of a few rows; None where the band was too narrow."""
    count = 1 if len(requests) == 1 else _TOGETHER
    sizes = [len(request.cells.weight) for request in requests]
    size = np.zeros(count, np.int32)
    size[: len(sizes)] = sizes
    cells = np.zeros((4, count, -(-max(sizes) // _STRETCH) * _STRETCH))
    price, zero = np.ones(count), np.full(count, -1, np.int32)
    for i, request in enumerate(requests):
        row = request.cells
        for table, array in zip(cells, (row.weight, row.mean, row.square, request.leak[1:]), strict=True):
            table[i, : sizes[i]] = array
        price[i] = request.price
        zero[i] = -1 if row.zero is None else row.zero
    carried, parts, block = nothing_yet(count, band), [], _block(band)
    for begin in range(0, max(sizes), _STRETCH):
        here = np.ascontiguousarray(cells[:, :, begin : begin + _STRETCH])
        here_size = np.minimum(size - begin, _STRETCH).astype(np.int32)
        carried, *found = potentials(
            carried, *here, price, np.int32(begin), here_size, zero, block=block, window=2 * block, keep_zero=keep_zero
        )
        parts.append([np.asarray(x) for x in found])
    potential, before = (np.pad(np.concatenate(x, axis=1), ((0, 0), (1, 0))) for x in zip(*parts, strict=True))
    enough = np.asarray(carried.enough)
    merges = band // block + 2 * block + 2
    return [
        (potential[i, : m + 1], before[i, : m + 1], band, merges) if enough[i] else None for i, m in enumerate(sizes)
    ]


def _prove(row: Row, boundaries: np.ndarray, num_levels: int, tolerance: float, price: float) -> _Proof:
    """Yields the passes that the row needs; returns the boundaries of the best partition found and the bound.

    A `price` of 0 means that none is known, and one is guessed.
    """
    if row.size <= num_levels:
        return boundaries, 0.0
    whole = row.settled(np.concatenate([[0], boundaries, [row.size]]))
    compiled = not isinstance(row, HostRow) or row.size >= COMPILED
    keep_zero = row.held_zero is not None
    free = num_levels - keep_zero
    cells = _measured(row, _first_cuts(row, whole))
    best = _partition_error(cells, whole)
    if best == 0:
        return boundaries, 0.0
    moment = float((cells.square + cells.weight * cells.mean**2).sum())
    # With many values, λ / 2 is about an interval's error; with hardly more than K, it is the error of merging two.
    guess = 2 * best / max(min(free, row.size - num_levels), 1)
    # One interval more saves at most the whole error: a price above that only adds rounding.
    proposed = min(float(price) if price > 0 else guess, best)
    cells = _graded(row, cells, whole, num_levels, tolerance)
    left_places, left_level, right_level = _expected_levels(cells, whole)
    right_places = left_places
    open_cells = np.ones(len(cells.weight), bool)  # cells in which, or at whose ends, a boundary may lie
    bound = 0.0
    for _ in range(_ROUNDS):
        inner = open_cells & (cells.greatest > cells.least)
        spread = np.where(inner, 2 * np.sqrt(cells.weight * cells.square), 0.0)
        margin = _margins(cells, whole)
        left = np.minimum(np.interp(cells.least, left_places, left_level), cells.least)
        right = np.maximum(np.interp(cells.greatest, right_places, right_level), cells.greatest)
        up, down = margin * spread * (cells.greatest - left), margin * spread * (right - cells.least)
        sizes = np.diff(np.searchsorted(cells.cuts, whole))
        band = min(int(1.6 * sizes.max()) + 32, len(cells.weight) + 32)
        tangents: dict[float, tuple[float, int]] = {}
        for _ in range(_TRIALS if inner.any() else _LAST_TRIALS):
            price = proposed
            up = np.minimum(up, price / 2)
            forward, before, band, merges = yield _Request(cells, _at_cuts(up), price, sizes, band, compiled)
            left_level, leak = _leaks(cells, spread, forward)
            more_up = _more(leak, up, price)
            rounding = _rounding(row, cells, float(forward[-1]) + best, merges, num_levels, moment)
            without = forward[-1] - free * price - rounding  # the bound if no leak exceeds the assumed one
            bound = max(bound, without - free * more_up)
            whole, best, found = _better(cells, before, whole, best, free)
            enough = best * (1 - tolerance)
            if bound >= enough:
                break
            if without >= enough:  # only leaks that were assumed too low keep the bound from the tolerance
                up = np.maximum(up, leak * 1.02)
            elif found == free:
                break
            else:
                tangents[price] = float(forward[-1]), found
                proposed = _next_price(tangents, free)
                if proposed in tangents:
                    break
        if bound >= enough:
            break
        mirror, down = cells.reversed(), np.minimum(down, price / 2)
        backward, _, band, merges = yield _Request(mirror, _at_cuts(down[::-1]), price, sizes[::-1], band, compiled)
        rounding = max(rounding, _rounding(row, cells, float(backward[-1]) + best, merges, num_levels, moment))
        right_level, leak = _leaks(mirror, spread[::-1], backward)
        more_down = _more(leak, down[::-1], price)
        right_level, backward = -right_level[::-1], backward[::-1]
        bound = max(bound, backward[0] - free * (price + more_down) - rounding)
        if bound >= enough or not inner.any():
            break
        through = forward + backward - free * (price + max(more_up, more_down))
        dip = spread * np.abs(right_level - left_level) / 2
        open_cells &= np.minimum(through[1:], through[:-1]) - dip <= best * (1 + 1e-9) + 2 * rounding
        parts = int(np.clip(np.ceil(1.2 * np.sqrt((best - bound) / (tolerance * best))), 2, 8))
        left_places = right_places = cells.middles()
        cells, open_cells = _finer(row, cells, open_cells, whole, np.full(len(open_cells), parts))
    return whole[1:-1], max(min(bound, best), 0.0)


def _rounding(row: Row, cells: _Cells, top: float, merges: int, num_levels: int, moment: float) -> float:
    """Bounds the rounding error of a bound; `top` is at least φ plus the best error (docs/knq.md, part 6)."""
    each = 6 * 40 * merges**1.5 + 8 * num_levels + 8 * CHUNK
    measured = row.slack(cells.cuts, cells.weight, cells.greatest - cells.least, top)
    return _UNIT * (each * top + 128 * math.sqrt(top * moment)) + (128 * _UNIT) ** 2 * moment + measured


def _at_cuts(leak: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.maximum(leak[1:], leak[:-1]), [0.0]])


def _expected_levels(cells: _Cells, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates levels before any pass: values, and for a boundary at each the level below it and the level above it.

    At the boundaries of the known partition these are the levels beside them. An interval that ends elsewhere is taken
    to be longer by at most its share of one interval more or fewer on its side.
    """
    starts = cells.intervals(whole)
    _, mean, _ = merged(cells.weight, cells.mean, cells.square, starts)
    inner = (cells.least[starts[1:]] + cells.greatest[starts[1:] - 1]) / 2
    places = np.concatenate([cells.least[:1], inner, cells.greatest[-1:]])
    share = 1 / np.arange(1, len(mean) + 1)
    above = (places[1:] - mean) * (1 + share)  # the levels
    below = (mean - places[:-1]) * (1 + share[::-1])
    return places, places - np.append(above[0], above), places + np.append(below, below[-1])


def _margins(cells: _Cells, whole: np.ndarray) -> np.ndarray:
    """Returns the factor by which each cell's assumed leak exceeds the expected one, so that few passes are repeated.

    A leak assumed too low anywhere lowers the bound. One assumed too high lowers it only where a good path has a
    boundary, and there the levels are known best.
    """
    starts = cells.intervals(whole)
    counts = np.diff(np.append(starts, len(cells.weight)))
    low, high = (np.repeat(ends, counts) for ends in (cells.least[starts], cells.greatest[starts + counts - 1]))
    width, middle = np.where(high > low, high - low, 1.0), cells.middles()
    return _MARGIN + (_MARGIN_INSIDE - _MARGIN) * 4 * (middle - low) / width * (high - middle) / width


def _leaks(cells: _Cells, spread: np.ndarray, potential: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the C of each cell, and its leak; `spread` is 2 n σ, or 0 where the cell has no leak."""
    weight = np.where(cells.weight > 0, cells.weight, 1.0)
    level = cells.mean - np.sqrt(np.maximum((np.diff(potential) - cells.square) / weight, 0.0))
    level = np.minimum(level, cells.least)  # a run that ends in a cell with C inside it would leak too
    missing = 8 * _UNIT * potential[-1] / weight  # φ is rounded
    reach = np.maximum(cells.greatest - level, 0.0) + np.sqrt(missing)
    return level, spread * reach * (1 + 2.0**-30)


def _more(leak: np.ndarray, assumed: np.ndarray, price: float) -> float:
    """Returns by how much λ must exceed the price.

    This is the greater of two excesses: of a leak over the assumed one, and, for runs that consist of parts of two
    cells, of twice the largest leak over the price.
    """
    return float(max(np.max(leak - assumed, initial=0.0), 2 * np.max(leak, initial=0.0) - price))


def _next_price(tangents: dict[float, tuple[float, int]], free: int) -> float:
    """Returns the price where the tangents of φ(n) at the nearest prices tried meet.

    φ(n) is concave in λ, and its slope is the number of intervals.
    """
    more = [price for price, (_, count) in tangents.items() if count > free]
    fewer = [price for price, (_, count) in tangents.items() if count < free]
    if more and fewer:
        low, high = max(more), min(fewer)
        (value, count), (other, least) = tangents[low], tangents[high]
        return float(np.clip((other - value + count * low - least * high) / (count - least), low, high))
    price = max(more) if more else min(fewer)
    # Where values are dense, the price falls with the cube of the number of intervals; for others the steps grow.
    return price * ((tangents[price][1] + 0.5) / (free + 0.5)) ** (3 * 2 ** min(len(tangents) - 1, 8))


def _better(
    cells: _Cells, before: np.ndarray, whole: np.ndarray, best: float, free: int
) -> tuple[np.ndarray, float, int]:
    """Returns the better of a partition and the path to the last cut, its error, and the path's priced intervals."""
    steps, path = before.tolist(), [len(before) - 1]
    while path[-1] > 0:
        path.append(steps[path[-1]])
    count = len(path) - 1 - (cells.zero is not None)
    if count <= free:
        found = np.concatenate([np.zeros(free - count, np.int64), cells.cuts[path[::-1]]])
        error = _partition_error(cells, found)
        if error < best:
            return found, error, count
    return whole, best, count


def _partition_error(cells: _Cells, whole: np.ndarray) -> float:
    """Computes Σ weight (value − mean of its interval)²; the interval of the held zero is taken about 0."""
    starts = cells.intervals(whole)
    weight, mean, square = merged(cells.weight, cells.mean, cells.square, starts)
    error = float(square.sum())
    if cells.zero is not None:
        zero_cell = np.searchsorted(starts, cells.zero, side="right") - 1
        error += float(weight[zero_cell] * mean[zero_cell] ** 2)
    return error


def _first_cuts(row: Row, whole: np.ndarray) -> np.ndarray:
    """Splits each interval into cells and returns their cuts: half of them even in rank, half in value."""
    low, high = whole[:-1, None], whole[1:, None]
    share = np.arange(1, _COARSE) / _COARSE
    by_rank = low + ((high - low) * share).astype(np.int64)
    ranks = row.settled(np.concatenate([whole, by_rank.ravel()]))
    last = row.size - 1
    least, most = (row.values_at(np.clip(place, 0, last)) for place in (low, high - 1))
    by_value = row.cuts_below((least + (most - least) * share).ravel())
    # The cells at the row's ends hold one value each, and have no leak: a path begins at the first cut with leak 0.
    ends = row.values_at(np.array([0, last]))
    single = row.cuts_above(ends[:1]), row.cuts_below(ends[1:])
    return _distinct(np.concatenate([ranks, by_value, *single, np.array(row.held_zero or (), np.int64)]))


def _distinct(array: np.ndarray) -> np.ndarray:
    """Returns the distinct numbers, ascending."""
    array = np.sort(array)
    return array[np.append(True, array[1:] != array[:-1])]


def _graded(row: Row, cells: _Cells, whole: np.ndarray, num_levels: int, tolerance: float) -> _Cells:
    """Splits cells so that they are narrow at the boundaries of `whole`, and wider in proportion to the distance.

    A leak is in proportion to count · width, so lengths are measured by the square root of that.
    """
    size = np.sqrt(np.diff(cells.cuts) * (cells.greatest - cells.least))
    starts = cells.intervals(whole)
    counts = np.diff(np.append(starts, len(size)))
    total = np.repeat(np.add.reduceat(size, starts), counts)
    total = np.where(total > 0, total, 1.0)
    end = np.cumsum(size)
    origin = np.repeat((end - size)[starts], counts)
    size, near, far = size / total, (end - size - origin) / total, 1 - (end - origin) / total
    distance = np.maximum(np.minimum(near, far), 0.0) + size / 4
    width = np.maximum(_NARROWEST * math.sqrt(tolerance), _WIDENING / num_levels * distance)
    parts = np.maximum(np.ceil(size / width), 1).astype(np.int64)
    return _finer(row, cells, np.ones(len(size), bool), whole, parts)[0]


def _finer(
    row: Row, cells: _Cells, chosen: np.ndarray, whole: np.ndarray, parts: np.ndarray
) -> tuple[_Cells, np.ndarray]:
    """Splits each chosen cell into `parts` and joins the others; returns the cells, and which are inside a chosen one.

    The parts are fewer where an interval of the partition `whole` would have too many. Equal values stay in one cell.
    """
    low, high = cells.cuts[:-1][chosen], cells.cuts[1:][chosen]
    parts = np.where(cells.greatest > cells.least, parts, 1)[chosen]
    interval = np.searchsorted(whole, low, side="right")
    crowd = np.bincount(interval, parts, len(whole) + 1)[interval]
    fewer = np.maximum((parts * (_MOST_CELLS / np.maximum(crowd, _MOST_CELLS))).astype(np.int64), np.minimum(parts, 2))
    inner = np.minimum(fewer, high - low) - 1
    cell = np.repeat(np.arange(len(low)), inner)
    number = np.arange(len(cell)) - np.repeat(np.cumsum(inner) - inner, inner) + 1
    between = low[cell] + (high - low)[cell] * number // (inner[cell] + 1)
    above = row.values_at(between)
    tied = row.values_at(between - 1) == above
    if tied.any():
        first, end = row.cuts_below(above[tied]), row.cuts_above(above[tied])
        between[tied] = np.where(first > low[cell][tied], first, np.minimum(end, high[cell][tied]))
    kept = np.zeros(len(cells.cuts), bool)
    kept[np.searchsorted(cells.cuts, whole)] = True
    kept[0] = kept[-1] = True
    kept[:-1] |= chosen
    kept[1:] |= chosen
    if cells.zero is not None:
        kept[cells.zero : cells.zero + 2] = True
    known = cells.cuts[kept]
    cuts = _distinct(np.concatenate([known, between]))
    joined = merged(cells.weight, cells.mean, cells.square, np.flatnonzero(kept[:-1]))
    from_known = np.searchsorted(known, cuts[:-1], side="right") - 1
    weight, mean, square = (array[from_known] for array in joined)
    new = (known[from_known] != cuts[:-1]) | (known[from_known + 1] != cuts[1:])
    weight[new], mean[new], square[new] = row.measure(cuts[:-1][new], cuts[1:][new])
    inside = chosen[np.searchsorted(cells.cuts, cuts[:-1], side="right") - 1]
    return _with_ends(row, cuts, weight, mean, square), inside


def _measured(row: Row, cuts: np.ndarray) -> _Cells:
    return _with_ends(row, cuts, *row.measure(cuts[:-1], cuts[1:]))


def _with_ends(row: Row, cuts: np.ndarray, weight: np.ndarray, mean: np.ndarray, square: np.ndarray) -> _Cells:
    zero = None if row.held_zero is None else int(np.searchsorted(cuts, row.held_zero[0]))
    least, greatest = (row.values_at(place) / row.unit - origin(row) for place in (cuts[:-1], cuts[1:] - 1))
    return _Cells(cuts, weight, mean, np.where(greatest > least, square, 0.0), least, greatest, zero)
