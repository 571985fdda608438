"""`search.priced` in NumPy, for rows on the host: nothing is compiled, and places and prices are bit for bit the same.

Rows are on the last axis, some dozens at a time, so that one operation serves all of them. Where intervals hold few
cells, the gains of all intervals up to a width are computed once for all prices (`_narrow_path`). Where they hold many,
a block of cuts is settled at once (`_wide_path`): each row has its own window of cuts at which a best interval may
begin, and the sums gathered from it serve all cuts of the block.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

_LANES = 128  # rows handled at once (`experiments.speed.constants`)
_GROUP = 16  # rows with windows of similar widths, handled together
_NARROW = 12  # cells per interval, on average, up to which the gains of all intervals are stored
_BAND = 2.5  # width of the widest intervals tried first, over the average
_HELD = 2**21  # gains stored at once
LEAST_BLOCK, _BLOCK, _MOST_BLOCK = 4, 32, 128  # cuts settled at once: at the ends of a row, with one window, at most
_PER_BLOCK = 4  # a block has at most one cut for every so many between it and the nearer end of the row
_AT_ONCE = 2**16  # gains compared at once
_STEP = 2**13  # going back an interval costs as much as comparing so many gains, besides those that it compares
_EXACT = 2.0**52  # sums and differences of integers below this are exact in float64


def priced_paths(
    count, total, size: int, zero, price, trials: int, through: bool, *, num_levels: int, keep_zero: bool
) -> tuple[np.ndarray, ...]:
    """Searches the shortest paths with `num_levels` intervals through cuts, like `search.priced.priced_paths`.

    Args:
      count: `[R, M + 1]` weight below each cut; entries after cut number `size` do not count.
      total: `[R, M + 1]` weighted sum below each cut, of the same dtype.
      size: number of the last cut.
      zero: `[R]`, read with `keep_zero`: an interval from a cut not above it to one above it has level 0 and no price.
      price: `[R]` float64, the first price to try.
      trials: the most prices to try. If none has a path of K intervals, K − 1 cuts are taken from the last path.
      through: whether to compute paths through each cut.
      num_levels: K.
      keep_zero: whether there is a held zero.

    Returns:
      `[R, K − 1]` places of the boundaries among the cuts, `[R]` the price, `[R]` whether a path at this price has K
      intervals, `[R, size + 1]` the cost of the best path through each cut (0 without `through`), and `[R]` the cost of
      the path.
    """
    width, lanes = None, _LANES
    if size <= _NARROW * num_levels:
        width = min(int(_BAND * size / num_levels) + 8, size)
        lanes = min(max(_HELD // (width * size), _GROUP), 4 * _LANES)
    parts = []
    for start in range(0, len(count), lanes):
        here = slice(start, start + lanes)
        problem = _problem(count[here], total[here], size, zero[here] if keep_zero else None, width, num_levels)
        problem, found, exact, potential, places = _search(problem, price[here], trials, num_levels)
        if through:
            backwards = _path(_backwards(problem), found)[1]
            excess = (potential + backwards.potential[::-1]).T
        else:
            excess = np.zeros((len(found), size + 1))
        parts.append((places, found, exact, excess, potential[-1]))
    return tuple(np.concatenate(x) for x in zip(*parts, strict=True))


class _Problem(NamedTuple):
    """Arguments of `priced_paths` with rows on the last axis: `count`, `total` `[m + 1, R]`; `zero [R]` or None.

    `gains [W, m + 1, R]` has at w the gains of the intervals of W − w cells that end at each cut. It is None where
    intervals hold too many cells to store them.
    """

    count: np.ndarray
    total: np.ndarray
    zero: Any
    gains: Any
    weighty: bool  # whether every cell weighs something
    block: int  # cuts settled at once, at most


class _Path(NamedTuple):
    """The shortest path to each cut.

    Attributes:
      potential: `[m + 1, R]` its cost.
      block: `[m + 1]` the block to which each cut belongs; None where gains are stored.
      firsts: `[blocks, R]` the first cut at which a best interval to a cut of each block may begin; None likewise.
    """

    potential: np.ndarray
    block: Any
    firsts: Any


def _problem(count, total, size: int, zero, width: int | None, num_levels: int) -> _Problem:
    """Returns the problem, with the gains of intervals of up to `width` cells if that is not None."""
    count, total = (np.ascontiguousarray(x[:, : size + 1].T) for x in (count, total))
    count = count.astype(np.float64, copy=False)
    block = 1 << max(size // (2 * num_levels), 1).bit_length() - 1
    block = min(max(block, _BLOCK // 2), _MOST_BLOCK)
    problem = _Problem(count, total, zero, None, bool((count[1:] > count[:-1]).all()), block)
    return problem if width is None else _with_gains(problem, width)


def _with_gains(problem: _Problem, width: int) -> _Problem:
    count, total = problem.count, problem.total
    gains = np.zeros((width, *count.shape))
    (total,) = _floats(total)
    for w in range(width):
        begin, end = slice(None, -w - 1), slice(w + 1, None)
        gains[width - 1 - w, end] = _gain(count[begin], total[begin], count[end], total[end], problem.weighty)
    return problem._replace(gains=gains)


def _backwards(problem: _Problem) -> _Problem:
    """Returns the problem of the reversed rows."""
    count, total, zero, gains, weighty, block = problem
    if gains is not None:  # an interval of W − w cells ends as many cuts after its begin
        width, length, number = gains.shape
        padded = np.concatenate([gains, np.zeros((width, width, number))], axis=1)
        w, cut, row = padded.strides
        from_each = np.lib.stride_tricks.as_strided(padded[:, width:], (width, length, number), (w - cut, cut, row))
        gains = from_each[:, ::-1]
    count, total = (x[-1] - x[::-1] for x in (count, total))
    return _Problem(count, total, None if zero is None else len(count) - 2 - zero, gains, weighty, block)


def _search(
    problem: _Problem, price, trials: int, num_levels: int
) -> tuple[_Problem, Any, Any, np.ndarray, np.ndarray]:
    """Returns the problem, prices, whether their paths have K intervals, potentials, and places of the boundaries.

    A row is no longer searched once it has K intervals. The problem returned may store the gains of wider intervals.
    """
    free = num_levels if problem.zero is None else num_levels - 1
    steps = num_levels + num_levels // 4 + 1
    # Factors for a price whose path has so many intervals (Panter and Dite 1951).
    ratios = (np.maximum(np.arange(steps + 2), 0.5) / free) ** 3
    found, number = price.copy(), len(price)
    problem, path = _path(problem, price)
    potential = np.array(path.potential)
    chain, intervals = _traced_back(problem, price, path, steps)
    low = np.zeros(number), np.zeros(number), np.zeros(number, np.int64)
    high = np.full(number, np.inf), np.zeros(number), np.zeros(number, np.int64)
    held, some = np.arange(number), problem  # rows still searched, and some that are done
    for trial in range(1, trials):
        wrong = np.flatnonzero(intervals != free)
        if not len(wrong):
            break
        here, counts = found[wrong], intervals[wrong]
        error = potential[-1, wrong] - np.where(counts > 0, here * counts, 0.0)
        for bounds, which in ((low, counts > free), (high, counts < free)):
            for known, new in zip(bounds, (here, error, counts), strict=True):
                known[wrong[which]] = new[which]
        below, above = (tuple(x[wrong] for x in bounds) for bounds in (low, high))
        guess = here * _steeper(ratios[counts], trial - 2)
        bracketed = (below[0] > 0) & (above[0] < np.inf)
        # At this price the paths of both sides cost the same. If K intervals are best at any price, they are here.
        equal = (above[1] - below[1]) / np.maximum(below[2] - above[2], 1)
        # The error of a path that was not traced to its start is unknown, and rounding may put this price outside.
        known = (below[2] <= steps) & (equal > below[0]) & (equal < above[0])
        between = np.where(known, equal, np.sqrt(below[0]) * np.sqrt(above[0]))
        found[wrong] = np.where(bracketed, between, guess)
        if 2 * len(wrong) <= len(held):
            some, held = _of_rows(some, np.searchsorted(held, wrong)), wrong
        some, path = _path(some, found[held])
        some_chain, some_intervals = _traced_back(some, found[held], path, steps)
        new = np.searchsorted(held, wrong)
        potential[:, wrong], chain[wrong], intervals[wrong] = (
            path.potential[:, new],
            some_chain[new],
            some_intervals[new],
        )
    rank = np.arange(num_levels - 1, 0, -1) * (intervals[:, None] + num_levels - free) // num_levels
    places = np.take_along_axis(chain, np.minimum(rank, steps), axis=1)
    return problem, found, intervals == free, potential, places


def _of_rows(problem: _Problem, rows: np.ndarray) -> _Problem:
    count, total, zero, gains = (None if x is None else np.ascontiguousarray(x[..., rows]) for x in problem[:4])
    return problem._replace(count=count, total=total, zero=zero, gains=gains)


def _path(problem: _Problem, price) -> tuple[_Problem, _Path]:
    """Returns the problem, with the gains of wider intervals if the paths needed them, and the shortest paths."""
    if problem.gains is None:
        return problem, (_path_of_one if problem.count.shape[1] == 1 else _wide_path)(problem, price)
    while True:
        path = _narrow_path(problem, price)
        if path is not None:
            return problem, path
        problem = _with_gains(problem, min(2 * len(problem.gains), len(problem.count) - 1))


def _steeper(ratio, times: int) -> Any:
    """Returns the ratio squared `times` times, at most 4: in sparse values the price changes faster than the cube."""
    for _ in range(max(min(times, 4), 0)):
        ratio = ratio * ratio
    return ratio


def _gain(begin_count, begin_total, end_count, end_total, weighty: bool) -> Any:
    """Returns S²/n of intervals, 0 for those of weight 0."""
    n, s = end_count - begin_count, end_total - begin_total
    s = s.astype(np.float64, copy=False)
    np.multiply(s, s, out=s)
    if not weighty:
        np.copyto(n, 1.0, where=n <= 0)
    return np.divide(s, n, out=s)


def _reached(begun, gain, price, holds_zero) -> Any:
    """Returns the costs of paths of cost `begun` continued by intervals of these gains; `gain` is overwritten."""
    np.subtract(begun, gain, out=gain)
    np.add(gain, price, out=gain)
    if holds_zero is not None:
        np.copyto(gain, np.broadcast_to(begun, gain.shape), where=holds_zero)
    return gain


def _least(begun, gain, price, holds_zero) -> Any:
    """Returns the least costs of `_reached` over the first axis; adding the price after the minimum changes no bit."""
    if holds_zero is not None:
        return _reached(begun, gain, price, holds_zero).min(axis=0)
    return np.subtract(begun, gain, out=gain).min(axis=0) + price


def _narrow_path(problem: _Problem, price) -> _Path | None:
    """Returns the shortest path to each cut from the gains of intervals up to a width; None if that may be too narrow.

    The best beginning never moves back. So the best interval to a cut is within the width if that to the cut before is
    narrower than the width.
    """
    zero, gains = problem.zero, problem.gains
    width, length, number = gains.shape
    potential = np.full((width + length, number), np.inf)  # padded for cuts before the first
    potential[width] = 0.0
    if number == 1:
        _settle_each_of_one(potential[:, 0], gains[:, :, 0], price[0], -1 if zero is None else int(zero[0]))
    else:
        _settle_each(potential, gains, price, zero)
    begun = potential[:length]  # at the cut as many cells before each cut as the width
    widest = begun - gains[0] + price
    if zero is not None:
        end = np.arange(length)[:, None]
        widest = np.where((end - width <= zero) & (end > zero), begun, widest)
    inner = slice(width, length - 1)
    if (widest[inner] <= potential[width:][inner]).any():
        return None
    return _Path(potential[width:], None, None)


def _settle_each(potential, gains, price, zero) -> None:
    """Computes the paths to one cut after the other, in place, from the gains of the intervals that end there."""
    width, length, number = gains.shape
    lag = np.arange(width, 0, -1)[:, None]
    zero = np.zeros(0, np.int64) if zero is None else zero
    holds_zero_from, holds_zero_to = int(zero.min(initial=length)) + 1, int(zero.max(initial=-1)) + 1 + width
    reached, least = np.empty((width, number)), np.empty(number)
    for end in range(1, length):
        begun = potential[end : end + width]
        np.subtract(begun, gains[:, end], out=reached)
        if holds_zero_from <= end < holds_zero_to:
            reached += price
            np.copyto(reached, begun, where=(end - lag <= zero) & (end > zero))
            np.minimum.reduce(reached, axis=0, out=potential[end + width])
        else:
            np.minimum.reduce(reached, axis=0, out=least)
            np.add(least, price, out=potential[end + width])


def _settle_each_of_one(potential, gains, price, zero: int) -> None:
    """Computes `_settle_each` for one row, whose gains to a cut are put next to each other."""
    width = len(gains)
    lag, reached = np.arange(width, 0, -1), np.empty(width)
    holds_zero = range(zero + 1, zero + 1 + width) if zero >= 0 else ()
    for end, to_end in enumerate(np.ascontiguousarray(gains.T[1:]), 1):
        begun = potential[end : end + width]
        np.subtract(begun, to_end, out=reached)
        if end in holds_zero:
            reached += price
            np.copyto(reached, begun, where=end - lag <= zero)
            potential[end + width] = np.minimum.reduce(reached)
        else:
            potential[end + width] = np.minimum.reduce(reached) + price


def schedule(cuts: int, most: int | np.ndarray) -> list[int]:
    """Returns where blocks of at most `most` cuts end, or of at most `most[cut]` where they differ along the row.

    Blocks are smaller near the ends of the row, as intervals are.
    """
    limits = (np.full(cuts, most) if isinstance(most, int) else most).tolist()
    ends = [0]
    while ends[-1] < cuts:
        start = ends[-1]
        near = min(start, cuts - start) // _PER_BLOCK
        size = min(1 << max(near, LEAST_BLOCK).bit_length() - 1, limits[start])
        size = min(size, limits[min(start + size, cuts) - 1])
        ends.append(min(start + size, cuts))
    return ends


class _Window(NamedTuple):
    """Costs of the paths to the cuts at which intervals may begin, and the sums below these cuts; all `[w, R]`."""

    begun: np.ndarray
    count: np.ndarray
    total: np.ndarray

    def part(self, index) -> "_Window":
        """Returns the window with its arrays indexed along the first axis."""
        return _Window(*(x[index] for x in self))


class _Sums(NamedTuple):
    """Costs and running sums, flat; a window takes its sums relative to a cut, as small ones are exact in float64."""

    potential: np.ndarray
    count: np.ndarray
    total: np.ndarray
    number: int

    def window(self, begin, lanes, reference) -> _Window:
        """Returns the window of the cuts `begin [w, L]` of the rows `lanes [L]`."""
        place = begin * self.number + lanes
        total = self.total.take(place)
        if total.dtype != np.float64:
            total -= reference
        return _Window(self.potential.take(place), self.count.take(place), total)


def _floats(*totals) -> tuple[Any, ...]:
    """Returns integers as float64 if their differences stay exact, else unchanged."""
    if totals[0].dtype == np.float64 or any(max(int(x.max()), -int(x.min())) >= _EXACT for x in totals):
        return totals
    return tuple(x.astype(np.float64) for x in totals)


def _wide_path(problem: _Problem, price) -> _Path:
    """Returns the shortest path to each cut, computed a block of cuts at a time."""
    count, total, zero, _, weighty, most = problem
    length, number = count.shape
    every = np.arange(number)
    potential = np.full(count.shape, np.inf)
    potential[0] = 0.0
    ends = schedule(length - 1, most)
    firsts = np.zeros((len(ends), number), np.int64)
    sums = _Sums(potential.reshape(-1), count.reshape(-1), total.reshape(-1), number)
    steps = np.arange(length)[:, None]

    def held(begin, end) -> Any:
        return None if zero is None else (begin <= zero) & (end > zero)

    for block, (below, last) in enumerate(itertools.pairwise(ends)):
        first, reference = firsts[block], total[below]
        begin = np.minimum(first + steps[: below - int(first.min()) + 1], below)
        window = sums.window(begin, every, reference)
        stops = [*range(below + _BLOCK, last, _BLOCK), last]
        here = total[below + 1 : last + 1]
        here = here if here.dtype == np.float64 else here - reference
        begun_totals, here = _floats(window.total, here)
        window = window._replace(total=begun_totals)
        n_end = count[below + 1 : last + 1]
        # Find where the best interval to the last cut begins, then those to the other stops, which begin no later.
        gain = _gain(window.count, window.total, n_end[-1], here[-1], weighty)
        at = np.argmin(_reached(window.begun, gain, price, held(begin, last)), axis=0)
        begins = [np.zeros_like(at)]
        near = int(at.max()) + 1
        for stop in stops[:-1]:
            part, place = window.part(slice(near)), stop - below - 1
            gain = _gain(part.count, part.total, n_end[place], here[place], weighty)
            begins.append(np.argmin(_reached(part.begun, gain, price, held(begin[:near], stop)), axis=0))
        begins.append(at)
        firsts[block + 1] = first + at
        for number_, stop in enumerate(stops):
            start = stops[number_ - 1] if number_ else below
            low, high = begins[number_], begins[number_ + 1]
            _settle(problem, price, window, begin, low, high, start, stop, below, n_end, here, potential)
        if last - below > 1:
            # A beginning inside the block that beats all before it for any cut of the block does so for the last too.
            best = potential[below + 1 : last + 1]
            within = np.flatnonzero((_on_to(problem, price, below, last, best, every) < best[-1]).any(axis=0))
            if len(within):
                _settle_within(problem, price, below, last, potential, firsts[block + 1], within)
    blocks = np.zeros(length, np.int64)
    blocks[1:] = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    return _Path(potential, blocks, firsts)


def _settle(problem: _Problem, price, window, begin, low, high, start, stop, below, n_end, here, potential) -> None:
    """Computes paths to the cuts after `start`, up to `stop`, that begin their last interval in `low` to `high`.

    `low` and `high` are places in the window. The costs are written to `potential`. Rows are handled in groups whose
    ranges have similar widths.
    """
    zero = problem.zero
    ends = slice(start - below, stop - below)
    width = np.maximum(high - low, 0)
    order = np.argsort(width, kind="stable")
    steps = np.arange(int(width.max()) + 1)[:, None]
    number = len(width)
    flat = [x.reshape(-1) for x in window]
    for group in range(0, number, _GROUP):
        lanes = order[group : group + _GROUP]
        place = np.minimum(low[lanes] + steps[: int(width[lanes[-1]]) + 1], len(begin) - 1)
        at = place * number + lanes
        begun, n, s = (x.take(at)[:, None] for x in flat)
        gain = _gain(n, s, n_end[ends, lanes], here[ends, lanes], problem.weighty)
        holds_zero = None
        if zero is not None:
            of_cuts = np.arange(start + 1, stop + 1)[:, None]
            holds_zero = (begin.reshape(-1).take(at)[:, None] <= zero[lanes]) & (of_cuts > zero[lanes])
        potential[start + 1 : stop + 1, lanes] = _least(begun, gain, price[lanes], holds_zero)


def _path_of_one(problem: _Problem, price) -> _Path:
    """Computes `_wide_path` for one row, in which windows are slices."""
    count, total, zero = problem.count[:, 0], problem.total[:, 0], -1 if problem.zero is None else int(problem.zero[0])
    weighty, length, paid = problem.weighty, len(count), price[0]
    potential = np.full(length, np.inf)
    potential[0] = 0.0
    ends = schedule(length - 1, problem.block)
    firsts = np.zeros(len(ends), np.int64)
    for block, (below, last) in enumerate(itertools.pairwise(ends)):
        first = firsts[block]
        n, s = count[first : last + 1], total[first : last + 1]
        if s.dtype != np.float64:
            (s,) = _floats(s - s[below - first])
        begins = below - first + 1
        crossed = first <= zero < last  # by intervals that contain the held zero
        begin = np.arange(first, below + 1)
        held: Any = begin <= zero if crossed else None
        gain = _gain(n[:begins], s[:begins], n[-1], s[-1], weighty)
        at = int(np.argmin(_reached(potential[first : below + 1], gain, paid, held)))
        near, end = slice(at + 1), slice(begins, None)
        gain = _gain(n[near, None], s[near, None], n[end], s[end], weighty)
        if crossed:
            held = held[near, None] & (np.arange(below + 1, last + 1) > zero)
        potential[below + 1 : last + 1] = _least(potential[first : first + at + 1, None], gain, paid, held)
        firsts[block + 1] = first + at
        if last - below > 1:
            best, inner = potential[below + 1 : last + 1], slice(begins, -1)
            gain = _gain(n[inner], s[inner], n[-1], s[-1], weighty)
            if crossed:
                held = np.arange(below + 1, last) <= zero
            if (_reached(best[:-1], gain, paid, held) < best[-1]).any():
                of_one = firsts[block + 1 : block + 2]
                _settle_within(problem, price, below, last, potential[:, None], of_one, np.zeros(1, np.int64))
    blocks = np.zeros(length, np.int64)
    blocks[1:] = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    return _Path(potential[:, None], blocks, firsts[:, None])


def _on_to(problem: _Problem, price, below: int, last: int, best, lanes) -> Any:
    """Returns the costs of paths to `last` whose last interval begins at a cut between `below` and `last`."""
    count, total, zero, _, weighty, _ = problem
    begin = slice(below + 1, last)
    holds_zero = None
    if zero is not None:
        holds_zero = (np.arange(below + 1, last)[:, None] <= zero[lanes]) & (last > zero[lanes])
    gain = _gain(count[begin, lanes], total[begin, lanes], count[last, lanes], total[last, lanes], weighty)
    return _reached(best[:-1], gain, price[lanes], holds_zero)


def _settle_within(problem: _Problem, price, below: int, last: int, potential, first, lanes) -> None:
    """Updates, in place and cut by cut, the paths of some rows whose last interval may begin inside the block too."""
    count, total, zero, _, weighty, _ = problem
    rows = slice(below + 1, last + 1)
    n, s, best, paid = count[rows, lanes], total[rows, lanes], potential[rows, lanes], price[lanes]
    held = None if zero is None else np.arange(below + 1, last + 1)[:, None] <= zero[lanes]
    for place in range(1, last - below):
        holds_zero = None if held is None else held[:place] & ~held[place]
        gain = _gain(n[:place], s[:place], n[place], s[place], weighty)
        reached = _least(best[:place], gain, paid, holds_zero)
        np.minimum(best[place], reached, out=best[place])
    potential[rows, lanes] = best
    first[lanes] = below + 1 + np.argmin(_on_to(problem, price, below, last, best, lanes), axis=0)


def _traced_back(problem: _Problem, price, path: _Path, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cuts of each path, from its end, and how many of its intervals have a price."""
    zero, gains = problem.zero, problem.gains
    number = problem.count.shape[1]
    if gains is not None and gains.size <= steps * (_STEP + 2 * len(gains) * number):
        chain = _through_every_cut(problem, price, path, steps)
    elif gains is None and number == 1:
        chain = _chain_of_one(problem, price, path, steps)
    else:
        chain = _chain(problem, price, path, steps)
    priced = chain[:, :-1] > 0
    if zero is not None:
        priced &= (chain[:, 1:] > zero[:, None]) | (chain[:, :-1] <= zero[:, None])
    return chain, np.where(chain[:, -1] > 0, steps + 1, priced.sum(axis=1))  # more than were traced


def _chain(problem: _Problem, price, path: _Path, steps: int) -> np.ndarray:
    """Returns `[R, steps + 1]` the cuts of each path, from its end: all rows go back an interval at a time."""
    count, total, zero, gains, weighty, _ = problem
    length, number = count.shape
    lane = np.arange(number)
    chain = np.zeros((steps + 1, number), np.int64)
    chain[0] = end = np.full(number, length - 1)
    potential, *sums = (np.ascontiguousarray(x).reshape(-1) for x in (path.potential, count, total))
    if gains is not None:
        width, gains = len(gains), gains.reshape(-1)
        potential = np.concatenate([np.full(width * number, np.inf), potential])
        to_begin, to_gain = (np.arange(width)[:, None] * size for size in (number, length * number))
    for step in range(1, steps + 1):
        if gains is not None:
            here = end * number + lane
            begun, gain = potential.take(to_begin + here), gains.take(to_gain + here)
            first, last = end - width, np.maximum(end - 1, 0)
        else:
            last = np.maximum(end - 1, 0)
            first = np.minimum(path.firsts[path.block[end], lane], last)
            begin = np.minimum(first + np.arange(int((last - first).max()) + 1)[:, None], last)
            place = begin * number + lane
            begun, n, s = potential.take(place), *(x.take(place) for x in sums)
            gain = _gain(n, s, count[last + 1, lane], total[last + 1, lane], weighty)
        holds_zero = None
        if zero is not None:
            begin = np.minimum(first + np.arange(len(gain))[:, None], last)
            holds_zero = (begin <= zero) & (end > zero)
        at = np.argmin(_reached(begun, gain, price, holds_zero), axis=0)
        chain[step] = end = np.where(end > 0, np.minimum(first + at, last), 0)
        if not end.any():
            break
    return chain.T


def _chain_of_one(problem: _Problem, price, path: _Path, steps: int) -> np.ndarray:
    """Computes `_chain` for one row, in which the beginnings of an interval are a slice."""
    count, total, potential = problem.count[:, 0], problem.total[:, 0], path.potential[:, 0]
    zero = -1 if problem.zero is None else int(problem.zero[0])
    firsts, blocks, paid = path.firsts[:, 0].tolist(), path.block, price[0]
    chain = np.zeros((1, steps + 1), np.int64)
    chain[0, 0] = end = len(count) - 1
    for step in range(1, steps + 1):
        first = min(firsts[blocks[end]], end - 1)
        gain = _gain(count[first:end], total[first:end], count[end], total[end], problem.weighty)
        holds_zero = np.arange(first, end) <= zero if first <= zero < end else None
        end = first + int(np.argmin(_reached(potential[first:end], gain, paid, holds_zero)))
        chain[0, step] = end
        if not end:
            break
    return chain


def _through_every_cut(problem: _Problem, price, path: _Path, steps: int) -> np.ndarray:
    """Computes `_chain` from the best beginning of the last interval to every cut, a few cuts at a time."""
    _, _, zero, gains, _, _ = problem
    width, length, number = gains.shape
    padded = np.concatenate([np.full((width, number), np.inf), path.potential])
    before = np.zeros((length, number), np.int64)
    lag = np.arange(width, 0, -1)[:, None, None]
    cuts = max(1, _AT_ONCE // (width * number))
    for start in range(1, length, cuts):
        end = np.arange(start, min(start + cuts, length))[:, None]
        begun = np.lib.stride_tricks.sliding_window_view(padded[start : start + len(end) + width - 1], len(end), axis=0)
        begun = begun.transpose(0, 2, 1)
        holds_zero = None if zero is None else (end - lag <= zero) & (end > zero)
        reached = _reached(begun, gains[:, start : start + len(end)].copy(), price, holds_zero)
        before[start : start + len(end)] = end - width + np.argmin(reached, axis=0)
    chain = np.empty((steps + 1, number), np.int64)
    chain[0] = length - 1
    for step in range(steps):
        chain[step + 1] = before[chain[step], np.arange(number)]
    return chain.T
