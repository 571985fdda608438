"""Globally optimal one-dimensional k-means (stage 1: exact solution by sorting; see the functions below)."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax.assign import Fit, row_scale, thresholds, working_dtype

_LIMB = 30  # bits of one fixed-point limb
_INFINITE = 2.0**80  # the weight of the point that pins a level to zero: n·_INFINITE/(n + _INFINITE) = n in float64


class Row(NamedTuple):
    """One sorted row in blocks, with what is needed to sum any run of its values exactly.

    A *cut* r parts the row after its r smallest distinct values. All sums are of integers, hence order-free.

    Attributes:
      values: `[B, W]` float ascending values over the row's scale, infinity where there is none (at least one).
      weights: `[B, W]` float64 in [0, 1], or None for 1 each.
      heads: `[B]` int64 distinct values that begin in the blocks before.
      sums: `[B, L]` int64 limbs of (weight and) weight·value, summed over the blocks before.
      distinct: `[]` int64 number of distinct values.
      zero: `[]` int64 cut just below the value zero where a level is pinned there, else −1.
    """

    values: jax.Array
    weights: jax.Array | None
    heads: jax.Array
    sums: jax.Array
    distinct: jax.Array
    zero: jax.Array


def _limbs(value: jax.Array, count: int) -> jax.Array:
    """float64 in (−8, 8) → `[..., count]` int64 digits in base 2^30: Σ digitᵢ·2^(−30(i+1)), exactly but for the last."""
    digits = []
    for _ in range(count):
        value = value * 2.0**_LIMB
        digit = jnp.floor(value)
        value = value - digit
        digits.append(lax.convert_element_type(digit, jnp.int64))
    return jnp.stack(digits, axis=-1)


def _from_limbs(digits: jax.Array) -> jax.Array:
    total = jnp.zeros(digits.shape[:-1], jnp.float64)
    for i in reversed(range(digits.shape[-1])):
        total = total + lax.convert_element_type(digits[..., i], jnp.float64) * 2.0 ** (-_LIMB * (i + 1))
    return total


def _moments(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The limbs of each value's moments: (1, x) or (w, w·x); zero for a value that is not there."""
    there = values < jnp.inf
    x = jnp.where(there, lax.convert_element_type(values, jnp.float64), 0.0)
    if weights is None:
        return jnp.concatenate([lax.convert_element_type(there, jnp.int64)[..., None], _limbs(x, 2)], axis=-1)
    w = jnp.where(there, weights, 0.0)
    return jnp.concatenate([_limbs(w, 3), _limbs(w * x, 3)], axis=-1)


def _split(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Limbs → weight and first moment in float64, each correctly rounded but for the last bit."""
    if sums.shape[-1] == 3:
        return lax.convert_element_type(sums[..., 0], jnp.float64), _from_limbs(sums[..., 1:])
    return _from_limbs(sums[..., :3]), _from_limbs(sums[..., 3:])


def _argmin(x: jax.Array) -> jax.Array:
    """The first index of the least along the leading axis. (`argmin` is lowered late, when 64 bits may be off again.)"""
    index = jnp.arange(x.shape[0], dtype=jnp.int64).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.min(jnp.where(x == jnp.min(x, axis=0), index, x.shape[0] - 1), axis=0)


def _exclusive(x: jax.Array) -> jax.Array:
    return jnp.cumsum(x, axis=0) - x


def _build(values: jax.Array, weights: jax.Array | None, keep_zero: bool, width: int) -> Row:
    values = values.reshape(-1, width)
    if weights is not None:
        weights = weights.reshape(values.shape)
    flat = values.reshape(-1)
    before = jnp.concatenate([jnp.full(1, -jnp.inf, flat.dtype), flat[:-1]]).reshape(values.shape)
    head = jnp.sum((values != before) & (values < jnp.inf), axis=1, dtype=jnp.int64)
    heads = _exclusive(head)
    row = Row(
        values,
        weights,
        heads,
        _exclusive(jnp.sum(_moments(values, weights), axis=1)),
        heads[-1] + head[-1],
        jnp.int64(-1),
    )
    if keep_zero:
        below = _cut_at(row, jnp.full(1, -np.finfo(np.float64).tiny))
        row = row._replace(zero=below[0])
    return row


def _block(row: Row, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values of some blocks, and the number of distinct values up to and with each."""
    values = row.values[index]
    last = row.values.reshape(-1)[jnp.maximum(index * values.shape[-1] - 1, 0)]
    last = jnp.where(index == 0, jnp.full_like(last, -jnp.inf), last)
    before = jnp.concatenate([last[..., None], values[..., :-1]], axis=-1)
    return values, row.heads[index][..., None] + jnp.cumsum(values != before, axis=-1, dtype=jnp.int64)


def _sums_at(row: Row, cuts: jax.Array) -> jax.Array:
    """`[...]` cuts → `[..., L]` exact sums over the values below each cut."""
    shape = cuts.shape
    cuts = cuts.reshape(-1)
    block = jnp.searchsorted(row.heads, cuts, side="right", method="scan") - 1
    values, rank = _block(row, block)
    weights = None if row.weights is None else row.weights[block]
    below = rank <= cuts[:, None]
    inside = jnp.sum(jnp.where(below[..., None], _moments(values, weights), 0), axis=1)
    return (row.sums[block] + inside).reshape(*shape, -1)


def _values_at(row: Row, cuts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest value below each cut and the smallest above it, in float64."""

    def nth(index):  # the distinct value number `index`
        block = jnp.searchsorted(row.heads, index, side="right", method="scan") - 1
        values, rank = _block(row, block)
        found = jnp.max(jnp.where((rank <= index[:, None] + 1) & (values < jnp.inf), values, -jnp.inf), axis=1)
        return lax.convert_element_type(found, jnp.float64)

    flat = cuts.reshape(-1)
    low = nth(jnp.maximum(flat - 1, 0)).reshape(cuts.shape)
    high = nth(jnp.minimum(flat, row.distinct - 1)).reshape(cuts.shape)
    return low, high


def _cut_at(row: Row, limits: jax.Array) -> jax.Array:
    """The cut above the values ≤ each limit (in the dtype of the values)."""
    limits = limits.astype(row.values.dtype)
    block = jnp.maximum(jnp.searchsorted(row.values[:, 0], limits, side="right", method="scan") - 1, 0)
    values, rank = _block(row, block)
    return jnp.max(jnp.where(values <= limits[:, None], rank, row.heads[block][:, None]), axis=1)


def _coarse_cuts(row: Row, count: int) -> jax.Array:
    """`count` + 1 ascending cuts from 0 to all whose cells hold about equal errors: half of the cells even in rank, then
    the cells of the largest error are parted at their means until the others are used up."""
    first = jnp.minimum(_rank_cuts(row, count // 2), row.distinct)
    cuts = jnp.concatenate([first, jnp.full(count - count // 2, row.distinct)])

    def unfinished(state):
        cuts, left, i = state
        return (left > 0) & (i < 64)

    def part(state):
        cuts, _, i = state
        mass, moment = _split(jnp.diff(_sums_at(row, cuts), axis=0))
        mean = moment / jnp.where(mass > 0, mass, 1)
        low, high = _values_at(row, cuts)
        low, high = high[:-1], low[1:]
        several = jnp.diff(cuts) > 1
        # A bound on the cell's error (Bhatia and Davis 2000).
        error = jnp.where(several, mass * jnp.maximum((mean - low) * (high - mean), 1e-300), 0.0)
        room = count - jnp.sum(cuts < row.distinct)
        wanted = error * 8 > jnp.max(error)
        taken = wanted & (jnp.cumsum(wanted) <= room)
        new = jnp.clip(_cut_at(row, mean), cuts[:-1] + 1, jnp.maximum(cuts[1:] - 1, cuts[:-1] + 1))
        # Both the old and the new cuts move up by the number of new ones before.
        place = jnp.arange(count + 1) + jnp.concatenate([jnp.zeros(1, jnp.int64), jnp.cumsum(taken)])
        merged = jnp.full(count + 1, row.distinct).at[place].set(cuts, mode="drop")
        merged = merged.at[jnp.where(taken, place[:-1] + 1, count + 1)].set(new, mode="drop")
        return merged, jnp.where(jnp.any(taken), room - jnp.sum(taken), 0), i + 1

    cuts, _, _ = lax.while_loop(unfinished, part, (cuts, jnp.int64(1), jnp.int32(0)))
    return jnp.where(row.distinct <= count, jnp.minimum(jnp.arange(count + 1), row.distinct), cuts)


def _rank_cuts(row: Row, count: int) -> jax.Array:
    """`[count + 1]` cuts even in rank, the first 0 and the last all."""
    flat = row.values.reshape(-1)
    there = jnp.sum(flat < jnp.inf, dtype=jnp.int64)
    ranks = jnp.arange(1, count, dtype=jnp.int64) * there // count
    cuts = _cut_at(row, flat[jnp.maximum(ranks - 1, 0)])
    return jnp.concatenate([jnp.zeros(1, jnp.int64), cuts, row.distinct[None]])


def _pinned(row: Row, left: jax.Array, right: jax.Array) -> jax.Array:
    """Whether the values between two cuts hold the level pinned to zero."""
    return (row.zero >= left) & (row.zero < right)


def _interval_costs(mass: jax.Array, mean: jax.Array, band: int) -> jax.Array:
    """`[M, band]` squared error about their mean of the cells q − band + d + 1 … q, by Welford's update."""

    def step(state, cell):
        n, mu, error = state
        n, mu, error = (jnp.concatenate([s[1:], jnp.zeros(1)]) for s in (n, mu, error))
        cell_n, cell_mu = cell
        total = n + cell_n
        share = cell_n / jnp.where(total > 0, total, 1)
        delta = cell_mu - mu
        error = error + delta * delta * n * share
        return (total, mu + delta * share, error), error

    zero = jnp.zeros(band)
    return lax.scan(step, (zero, zero, zero), (mass, mean))[1]


def _coarse_partition(row: Row, num_levels: int, count: int, band: int) -> jax.Array:
    """The best cuts among coarse ones: `[K + 1]` ascending, from 0 to all. One pass over cells, all layers at once."""
    cuts = _coarse_cuts(row, count)
    mass, moment = _split(_sums_at(row, cuts))
    mass, moment = jnp.diff(mass), jnp.diff(moment)
    mean = moment / jnp.where(mass > 0, mass, 1)
    pinned = _pinned(row, cuts[:-1], cuts[1:])
    mass, mean = jnp.where(pinned, _INFINITE, mass), jnp.where(pinned, 0.0, mean)
    costs = _interval_costs(mass, mean, band)
    # best[q, j]: the least error of the cells before q in at most j intervals.
    start = jnp.concatenate([jnp.full((band - 1, num_levels + 1), jnp.inf), jnp.zeros((1, num_levels + 1))])

    def step(window, cost):
        best = jnp.min(window[:, :-1] + cost[:, None], axis=0)
        best = jnp.concatenate([jnp.full(1, jnp.inf), best])
        return jnp.concatenate([window[1:], best[None]]), best

    _, best = lax.scan(step, start, costs)
    table = jnp.concatenate([start, best])  # row q + band − 1 for the first q cells

    def back(q, j):
        window = lax.dynamic_slice(table, (q - 1, 0), (band, num_levels + 1))[:, j - 1] + costs[q - 1]
        a = jnp.where(q > 0, jnp.maximum(q - band + _argmin(window), 0), 0)
        return a, a

    _, ends = lax.scan(back, jnp.int64(count), jnp.arange(num_levels, 0, -1))
    return cuts[jnp.concatenate([ends[::-1], jnp.full(1, count, ends.dtype)])]


def _means(row: Row, cuts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weight and mean of the values between neighbouring cuts (the mean 0 where pinned or empty)."""
    sums = jnp.diff(_sums_at(row, cuts), axis=0)
    mass, moment = _split(sums)
    pinned = _pinned(row, cuts[:-1], cuts[1:])
    return mass, jnp.where(pinned | (mass <= 0), 0.0, moment / jnp.where(mass > 0, mass, 1))


def _windowed(row: Row, cuts: jax.Array, steps: jax.Array, reach: int) -> jax.Array:
    """The best of the partitions whose cut j is cuts[j] + i·steps[j], |i| ≤ reach (Viterbi): the chosen i, `[K + 1]`.

    All is counted from the present partition and its means a: a partition costs as much as the present one with levels
    a, plus what each value costs more that changes its interval, less what moving each level to its mean gains, s²/n.
    Nothing cancels, wherever on the axis the values lie.
    """
    num_levels = cuts.shape[0] - 1
    offsets = jnp.arange(-reach, reach + 1)
    moves = jnp.clip(cuts[:, None] + offsets * steps[:, None], 0, row.distinct)
    moves = moves.at[0].set(0).at[-1].set(row.distinct)
    sums = _sums_at(row, moves)
    mass, moment = _split(sums - sums[:, reach, None])
    base_mass, base_moment = _split(jnp.diff(sums[:, reach], axis=0))
    pinned = _pinned(row, cuts[:-1], cuts[1:])
    level = jnp.where(pinned | (base_mass <= 0), 0.0, base_moment / jnp.where(base_mass > 0, base_mass, 1))
    # An empty interval has no level of its own: it borrows its left neighbour's.
    level = level[jnp.maximum(lax.cummax(jnp.where(base_mass > 0, jnp.arange(num_levels), -1)), 0)]
    rest = base_moment - base_mass * level
    # What it costs to give a value between cuts[j] and the move to the other level.
    gap, middle = jnp.diff(level), (level[1:] + level[:-1]) / 2
    node = jnp.zeros(moves.shape).at[1:-1].set(
        2 * gap[:, None] * (moment[1:-1] - mass[1:-1] * middle[:, None]) if num_levels > 1 else 0.0
    )

    def step(best, j):
        a = level[j]
        n = base_mass[j] + mass[j + 1][None, :] - mass[j][:, None]
        s = rest[j] + (moment[j + 1] - a * mass[j + 1])[None, :] - (moment[j] - a * mass[j])[:, None]
        left, right = moves[j][:, None], moves[j + 1][None, :]
        gain = jnp.where(n > 0, s * s / jnp.where(n > 0, n, 1), 0.0)
        # The pinned level stays at 0: s counts from a, which is 0 only if it was pinned before.
        shift = base_mass[j] * 0 + a
        pinned_cost = n * shift * shift + 2 * shift * s
        cost = jnp.where(_pinned(row, left, right), pinned_cost, -gain)
        total = jnp.where(left <= right, best[:, None] + cost, jnp.inf) + node[j + 1][None, :]
        return jnp.min(total, axis=0), _argmin(total)

    start = jnp.where(jnp.arange(2 * reach + 1) == reach, 0.0, jnp.inf)
    best, choice = lax.scan(step, start, jnp.arange(num_levels))
    last = jnp.where(best[reach] < 0, jnp.int64(reach), jnp.int64(reach))

    def back(i, row_choice):
        i = lax.convert_element_type(row_choice[i], jnp.int64)
        return i, i

    _, chosen = lax.scan(back, last, choice, reverse=True)
    chosen = jnp.concatenate([chosen, last[None]]) - reach
    return jnp.where(best[reach] < 0, chosen, 0), moves[jnp.arange(num_levels + 1), chosen + reach]


def _zoom(row: Row, cuts: jax.Array, steps: jax.Array, reach: int, rounds: int) -> jax.Array:
    """Windowed Viterbi with steps that halve once a window's best lies inside it, down to single distinct values."""

    def unfinished(state):
        _, _, finished, i = state
        return ~finished & (i < rounds)

    def refine(state):
        cuts, steps, _, i = state
        chosen, moved = _windowed(row, cuts, steps, reach)
        better = jnp.any(chosen != 0)
        moved = jnp.where(better, moved, cuts)
        inside = jnp.abs(chosen) < reach
        finished = ~better & jnp.all(steps == 1)
        steps = jnp.where(inside, (steps + 1) // 2, steps)
        return moved, steps, finished, i + 1

    return lax.while_loop(unfinished, refine, (cuts, steps, jnp.bool_(False), jnp.int32(0)))[0]


def _levels(row: Row, cuts: jax.Array, dtype) -> jax.Array:
    """`[K]` the means of the intervals, rounded once, spare ones at the end."""
    mass, mean = _means(row, cuts)
    low, _ = _values_at(row, cuts[1:])
    _, high = _values_at(row, cuts[:-1])
    mean = jnp.where((low == high) & ~_pinned(row, cuts[:-1], cuts[1:]), low, mean)  # one value is its own mean, exactly
    there = cuts[1:] > cuts[:-1]
    last = jnp.max(jnp.where(there, mean, -jnp.inf))
    levels = jnp.sort(jnp.where(there, mean, last))
    return lax.convert_element_type(jnp.where(row.distinct > 0, levels, 0.0), dtype)


def _error(row: Row, levels: jax.Array) -> jax.Array:
    """The squared error of rounded levels, each value at its nearest."""
    num_levels = levels.shape[0]
    limits = thresholds(levels)
    flat = row.values.reshape(-1)
    width = row.values.shape[1]
    levels = lax.convert_element_type(levels, jnp.float64)

    def error(values, weights, index):
        square = jnp.where(values < jnp.inf, lax.convert_element_type(values, jnp.float64), 0.0) - levels[index]
        square = jnp.where(values < jnp.inf, square * square, 0.0)
        return square if weights is None else square * weights

    if flat.shape[0] <= 4096 or num_levels <= 8:
        index = jnp.searchsorted(limits, flat, side="left", method="compare_all" if num_levels <= 32 else "scan")
        return jnp.sum(error(flat, None if row.weights is None else row.weights.reshape(-1), index))
    first = jnp.searchsorted(limits, row.values[:, 0], side="left", method="scan")
    end = jnp.searchsorted(limits, row.values[:, -1], side="left", method="scan")
    whole = first == end
    square = error(row.values, row.weights, first[:, None])
    total = jnp.sum(jnp.where(whole[:, None], square, 0.0))
    # The blocks with a boundary inside, at most K − 1 of them.
    mixed = jnp.nonzero(~whole, size=min(num_levels, whole.shape[0]), fill_value=0)[0]
    values = row.values[mixed]
    index = jnp.searchsorted(limits, values.reshape(-1), side="left", method="scan").reshape(values.shape)
    square = error(values, None if row.weights is None else row.weights[mixed], index)
    there = jnp.arange(mixed.shape[0]) < jnp.sum(~whole)
    return total + jnp.sum(jnp.where(there[:, None], square, 0.0))


def _fit_row(values, weights, *, num_levels: int, keep_zero: bool, width: int):
    """One sorted, scaled row `[N]` → levels `[K]` and squared error."""
    row = _build(values, weights, keep_zero, width)
    size = values.shape[0]
    count = min(max(16 * num_levels, 1024 if size <= 1024 else 256), size)
    band = min(count, max(128, 8 * (-(-count // num_levels))))
    cuts = _coarse_partition(row, num_levels, count, band)
    room = jnp.diff(cuts)
    room = jnp.concatenate([jnp.ones(1, jnp.int64), jnp.minimum(room[1:], room[:-1]), jnp.ones(1, jnp.int64)])
    steps = jnp.maximum(room // 32, 1)
    cuts = _zoom(row, cuts, steps, 8, 200)
    levels = _levels(row, cuts, values.dtype)
    return levels, _error(row, levels)


def _block_width(size: int) -> int:
    return 16 if size <= 8192 else 64


def _padded_size(size: int) -> int:
    """The next size of the form 2^i or 3·2^(i − 1), at least 16: few shapes, few compilations."""
    size = max(size, 16)
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 and power >= 64 else power


@functools.partial(jax.jit, static_argnames=("num_levels", "keep_zero"))
def _fit_sorted(values: jax.Array, weights: jax.Array | None, *, num_levels: int, keep_zero: bool):
    """Sorted rows `[R, N]` of scaled values, infinity last, → levels `[R, K]` and squared errors `[R]`."""
    dtype = values.dtype
    width = _block_width(values.shape[1])
    with jax.enable_x64(True):
        if weights is not None:
            weights = lax.convert_element_type(weights, jnp.float64)
        one = functools.partial(_fit_row, num_levels=num_levels, keep_zero=keep_zero, width=width)
        if values.shape[0] == 1:
            levels, error = one(values[0], None if weights is None else weights[0])
            levels, error = levels[None], error[None]
        elif weights is None:
            levels, error = jax.vmap(lambda v: one(v, None))(values)
        else:
            levels, error = jax.vmap(one)(values, weights)
        return levels, lax.convert_element_type(error, dtype)


def fit_knq(rows, num_levels, *, weights=None, mask=None, keep_zero=False, tolerance=1e-6) -> Fit:
    """Levels that minimise Σ wᵢ (xᵢ − nearest level)² over all codebooks.

    Args:
      rows: `[R, N]` finite values of any floating dtype.
      num_levels: levels per row, 1 to 256.
      weights: `[R, N]` non-negative weights, or None for 1 each; a value of weight 0 does not count.
      mask: `[R, N]` bool, False where a value does not count, or None.
      keep_zero: whether one level must be exactly 0.
      tolerance: how close the proof must come, (sse − lower_bound)/sse; None leaves the proof out.

    Returns:
      The `Fit`.

    >>> import jax.numpy as jnp
    >>> fit_knq(jnp.array([[0.0, 1.0, 9.0, 11.0]]), 2).levels.tolist()
    [[0.5, 10.0]]
    """
    rows = jnp.asarray(rows)
    dtype = working_dtype(rows.dtype)
    rows = rows.astype(dtype)
    there = None if mask is None else jnp.asarray(mask)
    if weights is not None:
        weights = jnp.asarray(weights).astype(dtype)
        there = (weights > 0) if there is None else there & (weights > 0)
    scale = row_scale(rows, there)
    values = rows / scale[:, None] + 0.0
    values = jnp.where(jnp.abs(values) < jnp.finfo(dtype).tiny, 0, values)
    if weights is not None:
        top = row_scale(weights, there)
        shrunk = weights / (4 * top[:, None])
        there = there & (shrunk > 0)
        weights = jnp.where(there, shrunk, 0)
    if there is not None:
        values = jnp.where(there, values, jnp.inf)
    extra = 1 + int(keep_zero)
    padding = _padded_size(rows.shape[1] + extra) - rows.shape[1]
    values = jnp.pad(values, ((0, 0), (0, padding)), constant_values=jnp.inf)
    if weights is not None:
        weights = jnp.pad(weights, ((0, 0), (0, padding)))
    if keep_zero:
        values = values.at[:, -1].set(0)
        weights = None if weights is None else weights.at[:, -1].set(1)
    if weights is None:
        values = lax.sort(values)
    else:
        values, weights = lax.sort((values, weights), num_keys=2)
    levels, error = _fit_sorted(values, weights, num_levels=num_levels, keep_zero=keep_zero)
    if weights is not None:
        error = error * (4 * top)
    return Fit(levels * scale[:, None], error, jnp.zeros_like(error), scale)
