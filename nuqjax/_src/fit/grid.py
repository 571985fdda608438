"""The baselines: levels on a grid of given form, of which at most a step or the largest magnitude is fitted.

`uniform`, `uniform_pow2` and `dfp` are K-level two's-complement grids `step · {−⌊K/2⌋ … K − 1 − ⌊K/2⌋}`. `pow2` has 0
and signed powers of two. `normal` follows the normal distribution, and `quantile` that of the data.
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.leaf.assign import fit_by, largest_magnitude, row_scale, working_dtype
from nuqjax._src.leaf.rows import namespace
from nuqjax._src.platform.host import BLOCK, flushed, over_blocks, x64

_BINS = 4096  # longer rows are searched as a histogram of so many bins
_BATCH_VALUES = 2**20  # values searched at once: this bounds the memory
_SEARCH_DEPTH = 8  # octaves of steps searched below the step whose grid just spans the values
_SEARCH_DENSITY = 16  # steps per octave, each of which is improved
_EQUAL = 2.0**-40  # relative difference of errors up to which they count as equal
_POW2_DEPTH = 20  # octaves of power-of-two steps and levels searched


def _grid(num_levels: int) -> tuple[int, int]:
    """Returns the least and the largest multiple of the step in a two's-complement grid of K levels."""
    return -(num_levels // 2), num_levels - 1 - num_levels // 2


def _grid_levels(step: Any, num_levels: int) -> Any:
    low, high = _grid(num_levels)
    most = jnp.finfo(step.dtype).max  # a grid may extend beyond the largest value, and so beyond the dtype
    xp = namespace(step)
    with np.errstate(over="ignore"):
        levels = xp.minimum(step, most)[:, None] * xp.arange(low, high + 1, dtype=step.dtype)[None]
    return _on_grid(xp.clip(levels, -most, most))


def _on_grid(levels: Any) -> Any:
    """Returns the levels; on the host subnormal ones become 0, as in XLA."""
    return flushed(levels) if isinstance(levels, np.ndarray) else levels


def uniform_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the K-level two's-complement grid at the step of least squared error.

    Steps are searched down to a grid that spans 1/256 of the range. A row longer than 4096 is searched as a histogram
    of 4096 bins and their means. Of steps that are equally good but for rounding, the largest is taken.

    >>> import jax.numpy as jnp
    >>> uniform_levels(jnp.array([[-2.0, -1.0, 0.0, 1.0]]), 4).round(6).tolist()
    [[-2.0, -1.0, 0.0, 1.0]]
    """
    if isinstance(rows, np.ndarray):
        return _grid_levels(_per_row(partial(_best_steps, num_levels=num_levels), rows, weights, mask), num_levels)
    return _grid_levels(_uniform_steps(rows, jnp.int32(num_levels), weights, mask), num_levels)


@jax.jit
def _uniform_steps(rows, num_levels, weights, mask) -> jax.Array:
    """Returns the steps of `uniform_levels`; `num_levels` is traced, so that one executable serves every number."""
    return _per_row(partial(_best_step, num_levels=num_levels), rows, weights, mask)


def uniform_pow2_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the K-level two's-complement grid at the power-of-two step of least squared error.

    Steps are searched from the one whose grid holds every value, 20 octaves down. A row longer than 4096 is searched as
    a histogram of 4096 bins and their means.

    >>> import jax.numpy as jnp
    >>> uniform_pow2_levels(jnp.array([[-3.0, -1.4, 0.1, 1.6]]), 4).tolist()
    [[-4.0, -2.0, 0.0, 2.0]]
    """
    step = _per_row(partial(_best_pow2_step, num_levels=num_levels), rows, weights, mask)
    return _grid_levels(step, num_levels)


def dfp_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the grid of Ristretto's dynamic fixed point, whose integer part just holds the largest magnitude.

    Its step is a power of two. The integer part has ⌈log2(largest) + 1⌉ bits, sign included, and the word log2 K bits,
    so a largest magnitude that is itself a power of two saturates (Gysel et al., *Hardware-oriented Approximation of
    CNNs*, section 3).

    Raises:
      ValueError: K is not a power of two, so no word has K levels.

    >>> import jax.numpy as jnp
    >>> dfp_levels(jnp.array([[-3.0, 1.0]]), 8).tolist()
    [[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]]
    """
    del weights
    if num_levels & (num_levels - 1):
        raise ValueError(f'method "dfp": {num_levels} levels, but a fixed-point word has a power of two of them')
    xp = namespace(rows)
    mantissa, exponent = xp.frexp(largest_magnitude(rows, mask))
    exponent = xp.where(mantissa == 0.5, exponent - 1, exponent)  # ⌈log2(largest)⌉
    exponent = exponent + 1 - (num_levels - 1).bit_length()
    step = xp.ldexp(xp.ones_like(mantissa), xp.minimum(exponent, jnp.finfo(mantissa.dtype).maxexp - 1))
    return _grid_levels(_on_grid(step), num_levels)


def pow2_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the levels 0 and ±2^e for consecutive exponents e, the largest chosen by least squared error.

    There are ⌊K/2⌋ positive levels and ⌊(K − 1)/2⌋ negative ones. No exponent is more than 100 below the largest: the
    one at 100 repeats. The largest is searched from twice the row's largest magnitude, 20 octaves down.

    >>> import jax.numpy as jnp
    >>> pow2_levels(jnp.array([[-0.5, 0.0, 0.5, 1.0]]), 4).tolist()
    [[-1.0, 0.0, 0.5, 1.0]]
    """
    positive = [math.ldexp(1.0, -min(i, 100)) for i in range(num_levels // 2)]
    pattern = np.array(sorted([0.0, *positive, *(-p for p in positive[: (num_levels - 1) // 2])]))
    middle = (pattern[:-1] + pattern[1:]) / 2
    xp = namespace(rows)

    def best(values, mass, largest):
        del largest
        tops = xp.asarray(_powers(1))  # in units of the row's scale

        def option(i):
            index = xp.searchsorted(xp.asarray(middle) * tops[i], values)
            return _squared_error(values, mass, (xp.asarray(pattern) * tops[i])[index]), tops[i]

        return _of_least(option, 0, tops.size, values)

    dtype = working_dtype(rows.dtype)
    top = xp.minimum(_per_row(best, rows, weights, mask), 2.0 ** (jnp.finfo(dtype).maxexp - 1))
    return _on_grid(top[:, None] * xp.asarray(pattern, dtype)[None])


def normal_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the normal distribution's quantiles times the row's largest magnitude; NF4's table for 16 levels.

    The construction is that of NF4 (Dettmers et al., *QLoRA*, section 3, and its released code), for any number of
    levels: zero is a level, and for even K the positive side has one level more.

    >>> import jax.numpy as jnp
    >>> normal_levels(jnp.array([[-2.0, 1.0]]), 3).tolist()
    [[-2.0, 0.0, 2.0]]
    """
    del weights
    largest = largest_magnitude(rows, mask)
    return _on_grid(largest[:, None] * namespace(rows).asarray([normal_table(num_levels)], largest.dtype))


def normal_table(num_levels: int) -> list[float]:
    """Returns the K ascending levels of `fit_normal` for a largest magnitude of 1.

    >>> [round(level, 4) for level in normal_table(4)]
    [-1.0, 0.0, 0.4358, 1.0]
    """
    if num_levels <= 2:
        return [[0.0], [-1.0, 1.0]][num_levels - 1]
    positive, negative = num_levels // 2, num_levels - 1 - num_levels // 2
    end = 1 - (1 / (2 * num_levels) + 1 / (2 * (num_levels - 1))) / 2

    def side(count):
        quantiles = [NormalDist().inv_cdf(end + (0.5 - end) * i / count) for i in range(count)]
        return [q / quantiles[0] for q in quantiles]

    return sorted([0.0, *side(positive), *(-level for level in side(negative))])


def quantile_levels(rows: Any, num_levels: int, *, weights: Any = None, mask: Any = None) -> Any:
    """Returns the means of K groups of equal count (or equal weight), in ascending order of value.

    A group may be empty because one value outweighs it; its level repeats the level before.

    >>> import jax.numpy as jnp
    >>> quantile_levels(jnp.array([[5.0, 1.0, 3.0, 9.0]]), 2).tolist()
    [[2.0, 7.0]]
    """
    if isinstance(rows, np.ndarray):
        return _quantile_on_host(rows, num_levels, weights, mask)
    dtype = working_dtype(rows.dtype)
    mass = _mass(rows, weights, mask).astype(dtype)
    values, mass = lax.sort((jnp.where(mass > 0, rows.astype(dtype), jnp.inf), mass), num_keys=2)
    with x64():
        mass = mass.astype(jnp.float64)
        total = mass.sum(axis=-1, keepdims=True)
        middle = jnp.cumsum(mass, axis=-1) - mass / 2
        group = (middle * (1 / jnp.where(total > 0, total, 1)) * num_levels).astype(jnp.int32)
        group = jnp.clip(group, 0, num_levels - 1)
        moment = jnp.where(mass > 0, values.astype(jnp.float64), 0) * mass
        sums = jax.vmap(lambda m, g: jax.ops.segment_sum(m, g, num_levels, indices_are_sorted=True))
        weight = sums(mass, group)
        mean = jnp.where(weight > 0, sums(moment, group) / jnp.where(weight > 0, weight, 1), -jnp.inf)
        first = jnp.min(jnp.where(weight > 0, mean, jnp.inf), axis=-1, keepdims=True)
        return jnp.maximum(lax.cummax(mean, axis=1), jnp.where(jnp.isfinite(first), first, 0)).astype(dtype)


fit_uniform, fit_uniform_pow2, fit_dfp = fit_by(uniform_levels), fit_by(uniform_pow2_levels), fit_by(dfp_levels)
fit_pow2, fit_normal, fit_quantile = fit_by(pow2_levels), fit_by(normal_levels), fit_by(quantile_levels)


def _mass(rows, weights, mask) -> Any:
    """Returns `[R, N]` the weight of each value, zero where it does not count."""
    xp = namespace(rows)
    mass = xp.ones(rows.shape, working_dtype(rows.dtype)) if weights is None else weights
    return mass if mask is None else xp.where(mask, mass, 0)


def _per_row(best: Callable, rows, weights, mask) -> Any:
    """Returns `[R]` what `best(values, mass, largest)` finds for each row, in float64 in units of the row's scale.

    Long rows are searched as histograms, by the means and weights of their bins. Short rows are sorted, so that sums do
    not depend on the order of values. With JAX `best` gets one row at a time, with NumPy `[r, n]`, and None for equal
    masses.
    """
    if isinstance(rows, np.ndarray):
        return _per_row_on_host(best, rows, weights, mask)
    dtype = working_dtype(rows.dtype)
    scale = row_scale(rows, mask)
    mass = _mass(rows, weights, mask).astype(dtype)
    if weights is not None:
        mass = mass / row_scale(mass)[:, None]
    values = jnp.where(mass > 0, rows.astype(dtype), 0) / scale[:, None]
    if rows.shape[-1] <= _BINS:
        values, mass = lax.sort((values, mass), num_keys=2)
    batch = max(1, _BATCH_VALUES // max(1, min(rows.shape[-1], _BINS)))

    def one(row):
        values, mass = row[0].astype(jnp.float64), row[1].astype(jnp.float64)
        largest = jnp.max(jnp.abs(values), initial=0)
        if values.shape[0] > _BINS:
            values, mass = _histogram(values, mass, largest)
        return best(values, mass, largest).astype(dtype)

    with x64():
        found = lax.map(one, (values, mass), batch_size=min(batch, rows.shape[0])) if rows.shape[0] else scale
    return found.astype(dtype) * scale


def _per_row_on_host(best: Callable, rows, weights, mask) -> np.ndarray:
    """Computes `_per_row` for NumPy rows."""
    dtype = working_dtype(rows.dtype)
    if not rows.shape[1]:
        rows, weights, mask = np.zeros((len(rows), 1), dtype), None, None  # rows without values are fitted as zeros
    count, length = rows.shape
    scale = row_scale(rows, mask)
    heaviest: Any = None if weights is None else row_scale(weights, mask)
    found = np.empty(count, dtype)

    def part(some, columns):
        """Returns values and masses in units of their scales; None for the masses if all are equal."""
        values, mass = flushed(rows[some, columns].astype(dtype)), None
        if mask is not None:
            mass = mask[some, columns].astype(dtype)
        if weights is not None:
            weight = weights[some, columns].astype(dtype) / heaviest[some, None]
            mass = flushed(weight if mass is None else weight * mass)
        values = values if mass is None else np.where(mass > 0, values, 0)
        return values / scale[some, None], mass

    def search(some, columns):
        if length > _BINS:
            found[some] = best(*_histogram_on_host(partial(part, some), length))
            return
        values, mass = part(some, columns)
        if mass is None:
            values.sort(axis=-1)
        else:
            values, mass = _sorted_pairs(values, mass)
            mass = mass.astype(np.float64)
        values = values.astype(np.float64)
        found[some] = best(values, mass, np.abs(values).max(axis=-1, keepdims=True))

    over_blocks(search, count, length, length if length > _BINS else BLOCK)
    with np.errstate(over="ignore"):  # a step may exceed every value: see `_grid_levels`
        return flushed(found * scale)


def _sorted_pairs(values, mass):
    """Returns rows `[r, n]` sorted by value, and equal values by mass, in ascending order."""
    if values.dtype != np.float32:
        order = np.lexsort((mass, values), axis=-1)
        return tuple(np.take_along_axis(x, order, axis=-1) for x in (values, mass))
    sortable = lambda bits: bits ^ ((bits >> 31) & 0x7FFFFFFF)  # noqa: E731
    values = values + np.float32(0)  # no negative zeros
    pairs = sortable(values.view(np.int32)).astype(np.int64) << 32 | mass.view(np.int32)  # masses have no sign
    pairs.sort(axis=-1)
    return sortable((pairs >> 32).astype(np.int32)).view(np.float32), pairs.astype(np.int32).view(np.float32)


def _histogram_on_host(part: Callable, length: int):
    """Returns `_histogram` of one NumPy row, read by `part(columns) -> (values, mass)`, and the largest magnitude."""
    unit = 2.0**30

    def most(_, columns):
        return np.abs(part(columns)[0]).max()

    largest = np.float64(max(over_blocks(most, 1, length)))
    width = (largest if largest > 0 else 1.0) * (2 / _BINS)

    def sums(_, columns):
        values, mass = part(columns)
        values = values[0].astype(np.float64)
        bins = np.clip((values * (1 / width)).astype(np.intp) + _BINS // 2 - (values < 0), 0, _BINS - 1)
        total = lambda amount: np.bincount(bins, np.rint(amount * unit), _BINS).astype(np.int64)  # noqa: E731
        if mass is None:
            return np.bincount(bins, minlength=_BINS) << 30, total(values)
        mass = mass[0].astype(np.float64)
        return total(mass), total(mass * values)

    weight, moment = (np.sum(x, axis=0) / unit for x in zip(*over_blocks(sums, 1, length), strict=True))
    edges = (np.arange(_BINS) - _BINS // 2) * width
    means = np.clip(moment / np.where(weight > 0, weight, 1), edges, edges + width)
    return means[None], weight[None], largest.reshape(1, 1)


def _quantile_on_host(rows, num_levels, weights, mask) -> np.ndarray:
    """Computes `quantile_levels` for NumPy rows."""
    dtype = working_dtype(rows.dtype)
    count, length = rows.shape
    scale = row_scale(rows, mask).astype(np.float64)[:, None]  # in these units no sum overflows
    levels = np.zeros((count, num_levels), dtype)

    def search(some, columns):
        values, mass = flushed(rows[some, columns].astype(dtype)), None
        if weights is None and mask is None:
            values.sort(axis=-1)
            mass = np.ones((1, length))
        else:
            mass = _mass(rows[some], *(None if x is None else x[some] for x in (weights, mask))).astype(dtype)
            values, mass = _sorted_pairs(np.where(mass > 0, values, dtype.type(np.inf)), mass)
            mass = mass.astype(np.float64)
        total = mass.sum(axis=-1, keepdims=True)
        middle = np.cumsum(mass, axis=-1) - mass / 2
        group = (middle * (1 / np.where(total > 0, total, 1)) * num_levels).astype(np.intp)
        group = np.clip(group, 0, num_levels - 1) + np.arange(len(values))[:, None] * num_levels
        moment = np.where(mass > 0, values.astype(np.float64), 0) / scale[some] * mass
        weight, moment = (
            np.bincount(group.reshape(-1), np.broadcast_to(x, group.shape).reshape(-1), levels[some].size)
            for x in (mass, moment)
        )
        mean = np.where(weight > 0, moment / np.where(weight > 0, weight, 1), -np.inf).reshape(-1, num_levels)
        first = np.where(mean > -np.inf, mean, np.inf).min(axis=-1, keepdims=True)
        mean = np.maximum(np.maximum.accumulate(mean, axis=-1), np.where(np.isfinite(first), first, 0))
        levels[some] = flushed((mean * scale[some]).astype(dtype))

    over_blocks(search, count, length, max(length, BLOCK))
    return levels


def _histogram(values, mass, largest):
    """Returns means and weights of the bins; summed as integers, so that the order of summation does not matter."""
    unit = 2.0**30
    width = jnp.where(largest > 0, largest, 1) * (2 / _BINS)
    bins = jnp.clip((values * (1 / width)).astype(jnp.int32) + _BINS // 2 - (values < 0), 0, _BINS - 1)

    def total(amount):
        whole = jnp.round(amount * unit).astype(jnp.int64)
        whole = jnp.zeros(_BINS, jnp.int64).at[bins].add(whole, mode="promise_in_bounds")
        return whole.astype(jnp.float64) / unit

    weight, moment = total(mass), total(mass * values)
    edges = (jnp.arange(_BINS, dtype=jnp.int32) - _BINS // 2) * width
    # The mean of values of very small weight may be rounding alone, so it is clipped to the bin.
    return jnp.clip(moment / jnp.where(weight > 0, weight, 1), edges, edges + width), weight


def _of_least(option: Callable, begin, end, values) -> Any:
    """Returns the result of the first option of least error, of `option(i) -> (error, result)` for begin ≤ i < end.

    Errors count as equal if they may differ by rounding alone, which depends on the order of a sum.
    """
    xp = namespace(values)

    def visit(i, best):
        error, result = option(i)
        better = error < best[0] - _EQUAL * xp.abs(best[0])
        return xp.where(better, error, best[0]), xp.where(better, result, best[1])

    none = np.finfo(np.float64).max
    if xp is jnp:
        return lax.fori_loop(begin, end, visit, (jnp.array(none, values.dtype), jnp.array(0, values.dtype)))[1]
    best = np.full(len(values), none), np.zeros(len(values))
    for i in range(begin, end):
        best = visit(i, best)
    return best[1]


def _squared_error(values, mass, nearest):
    square = (values - nearest) ** 2
    return (square if mass is None else mass * square).sum(axis=-1)


def _multiples(values, step, num_levels):
    """Returns which multiple of the step in the grid is nearest to each value.

    It multiplies by 1/step: a compiler may turn many divisions by one number into multiplications, and NumPy does not.
    """
    low, high = _grid(num_levels)
    xp = namespace(values)
    return xp.clip(xp.rint(values * (1 / step)), low, high)


_AROUND = 2 * _SEARCH_DENSITY + 1  # steps of the second search
_RATIOS = np.exp2(np.append(np.linspace(-1, 1, _AROUND), -np.arange(16 * _SEARCH_DENSITY + 1)) / _SEARCH_DENSITY)


def _best_step(values, mass, largest, *, num_levels):
    """Returns the step of least squared error.

    Each of many steps assigns the values to multiples kᵢ. The best step for these is Σ wᵢ xᵢ kᵢ / Σ wᵢ kᵢ²; it lowers
    the squared error of all zeros by (Σ wᵢ xᵢ kᵢ)² / Σ wᵢ kᵢ². A second search, with finer steps, is made around it.
    """

    def improve(step):
        multiple = _multiples(values, step, num_levels)
        return _improved(jnp.sum(mass * values * multiple), jnp.sum(mass * multiple * multiple), step)

    octaves = 32 - lax.clz(num_levels - 1) + _SEARCH_DEPTH  # ⌈log2 K⌉ and more
    ratios = jnp.array(_RATIOS, values.dtype)

    def search(number, center):
        """Makes one of the two searches; one program for both takes half the time to compile."""
        begin = jnp.where(number == 0, _AROUND, 0)
        end = jnp.where(number == 0, _AROUND + octaves * _SEARCH_DENSITY + 1, _AROUND)
        return _of_least(lambda i: improve(center * ratios[i]), begin, end, values)

    return lax.fori_loop(0, 2, search, _widest(largest))


def _improved(moment, square, step):
    """Returns minus what the best step for given multiples takes off the squared error, and that step."""
    xp = namespace(moment)
    square = xp.where(square > 0, square, 1)
    return -moment * moment / square, xp.where(moment > 0, moment / square, step)


def _widest(largest):
    """Returns the step at which, as at every larger one, zero is the nearest multiple of all values."""
    return 2 * namespace(largest).where(largest > 0, largest, 1)


def _best_steps(values, mass, largest, *, num_levels):
    """Returns `_best_step` of each of the sorted NumPy rows `[r, n]`."""
    octaves = (num_levels - 1).bit_length() + _SEARCH_DEPTH
    coarse, fine = _RATIOS[_AROUND : _AROUND + octaves * _SEARCH_DENSITY + 1], _RATIOS[:_AROUND]
    if values.shape[1] <= _DIRECT * num_levels:
        center = _widest(largest[:, 0])
        for ratios in (coarse, fine):

            def option(i, center=center, ratios=ratios):
                step = center * ratios[i]
                multiple = _multiples(values, step[:, None], num_levels)
                heavy = multiple if mass is None else multiple * mass
                moment, square = (np.einsum("rn,rn->r", heavy, x) for x in (values, multiple))
                return _improved(moment, square, step)

            center = _of_least(option, 0, len(ratios), values)
        return center
    steps = np.empty(len(values))
    for row in range(len(values)):
        places = _places(values[row], None if mass is None else mass[row], num_levels)
        center = _widest(largest[row, 0])
        for ratios in (coarse, fine):
            least = np.finfo(np.float64).max
            moment, square = places(center * ratios)
            errors, found = _improved(moment, square, center * ratios)
            for error, step in zip(errors.tolist(), found.tolist(), strict=True):
                if error < least - _EQUAL * abs(least):
                    least, center = error, step
        steps[row] = center
    return steps


_DIRECT = 8  # values per level up to which finding each value's multiple is faster than finding each multiple's values


def _places(row, mass, num_levels):
    """Returns a function of steps `[S]` that computes `Σ wᵢ xᵢ kᵢ` and `Σ wᵢ kᵢ²` of a sorted row.

    In a sorted row each multiple has a run of values, whose sums are differences of running sums. Multiples are added
    one after another, and those without values change no bit. So a step and its half are equally good where they split
    the values in the same way.
    """
    low, high = _grid(num_levels)
    multiples = np.arange(low, high + 1, dtype=np.float64)[:, None]
    heavy = row if mass is None else mass * row
    moments = np.append(0, np.cumsum(heavy))
    weights = None if mass is None else np.append(0, np.cumsum(mass))

    def sums(steps):
        ends = np.zeros((num_levels + 1, len(steps)), np.intp)
        ends[-1] = len(row)
        middle = (multiples[:-1] + 0.5) * steps
        close = np.abs(middle) * 2.0**-50
        ends[1:-1] = places = row.searchsorted(middle - close)
        after = row[np.minimum(places, len(row) - 1)]
        tied = (places < len(row)) & (after <= middle + close)
        tied &= np.rint(after * (1 / steps)) <= multiples[:-1]  # as `_multiples` rounds
        ends[1:-1][tied] = row.searchsorted(after[tied], "right")
        moment = np.diff(moments[ends], axis=0) * multiples
        weight = np.diff(ends if weights is None else weights[ends], axis=0) * (multiples * multiples)
        return np.add.reduce(moment, axis=0), np.add.reduce(weight, axis=0)

    return sums


def _best_pow2_step(values, mass, largest, *, num_levels):
    """Returns the power-of-two step of least squared error."""
    del largest  # less than 4, in units of the row's scale
    steps = namespace(values).asarray(_powers(3 - (num_levels - 1).bit_length()))

    def option(i):
        return _squared_error(values, mass, steps[i] * _multiples(values, steps[i], num_levels)), steps[i]

    return _of_least(option, 0, steps.size, values)


def _powers(top: int) -> np.ndarray:
    """Returns powers of two from 2^top downwards."""
    return 2.0 ** (top - np.arange(_POW2_DEPTH + 1))
