"""Rows sorted into distinct values with exact running sums: all that the optimum of 1-D k-means depends on.

The cost of a partition depends on the values below a cut only through their weight and their weighted sum. Both are
stored as integers (values in units of 2^−frac of the row's scale), so the order of addition changes no bit of them, and
the difference of two running sums is exact.

The same code runs on NumPy arrays, whose sort is much faster than XLA's on a CPU, and on JAX arrays. Rows longer than
`LONG` have another class with the same methods (`rows.long`).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.leaf.rows import namespace
from nuqjax._src.platform.rounding import rounded_first

_STRETCH = 2**20  # 16-bit values counted at once: NumPy makes them 64 bits wide
_FAR = np.int32(2**30)  # greater than every place
_BY_ROW = 1024  # rows on the host of this length or more are sorted one after the other
LONG = 2**16  # longer rows are stored as `rows.long.LongRows`


def take(array, index) -> np.ndarray | jax.Array:
    """Returns `array[r, index[r, …]]` for `array [R, D]` and `index [R, …]`."""
    flat = index.reshape(index.shape[0], -1)
    if namespace(array) is np:
        return np.take_along_axis(array, flat, 1).reshape(index.shape)
    taken = jnp.take_along_axis(array, flat.astype(jnp.int32), axis=1, mode="promise_in_bounds")
    return taken.reshape(index.shape)


def windows(arrays, start, size: int) -> tuple[jax.Array, ...]:
    """Slices `[R, size]` from each of several JAX arrays `[R, m]`; row r starts at the place `start[r]`."""
    if start.shape[0] == 1:
        return tuple(lax.dynamic_slice_in_dim(x, start[0], size, axis=1) for x in arrays)
    own = jax.vmap(lambda row, place: lax.dynamic_slice_in_dim(row, place, size))
    return tuple(own(x, start) for x in arrays)


def first_least(costs, places, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns the least of JAX `costs` along a kept axis, and the first of ascending int32 `places` that has it."""
    least = jnp.min(costs, axis=axis, keepdims=True)
    return least, jnp.min(jnp.where(costs == least, places, _FAR), axis=axis, keepdims=True)


class SortedRows(NamedTuple):
    """Rows as ascending distinct values; a *cut* c separates the c smallest of them from the others.

    Attributes:
      values: `[R, D]` the distinct values over the row's scale, then repetitions of the last; float64.
      count: `[R, D + 1]` weight below each cut: int64 where all weights are 1, else float64.
      total: `[R, D + 1]` sum of weight times value below each cut, in units of 2^−frac; of the same dtype.
      weight: `[R, D]` float64 weight of each distinct value, unrounded, over the row's largest weight; None where all
        weights are 1, and for JAX rows.
      mass: `[R, D]` int64 the same weight in units of 2^−frac; None where all weights are 1.
      size: `[R]` int64 number of distinct values, which is the last cut.
      zero: `[R]` int64 cut just below the value zero. With a held zero that value is in the row, maybe with weight 0.
      square: `[R]` float64 Σ weight · value².
      slack: `[R]` float64 the most by which rounding to units may change the squared error of any partition.
      frac: fraction bits of `total`.
      nominal: number of values of a row, counted or not. Decisions depend on it, as the length of arrays may vary.
    """

    values: Any
    count: Any
    total: Any
    weight: Any
    mass: Any
    size: Any
    zero: Any
    square: Any
    slack: Any
    frac: int
    nominal: int

    @property
    def length(self) -> int:
        """The length of the arrays: no row's last cut is greater."""
        return self.values.shape[1]

    def with_values(self, moved: Callable) -> "SortedRows":
        """Returns the rows with values `moved(values)`, which ascend and are off by a few units in the last place."""
        xp = namespace(self.values)
        values = moved(self.values)
        mass = self.count[:, 1:] - self.count[:, :-1] if self.mass is None else self.mass
        moments, heavy, off = _in_units(values, mass, self.mass is not None, self.frac)
        total = _from_nothing(xp.cumsum(moments, axis=1))
        square, slack = _square_and_slack(values, heavy, off)
        if self.mass is not None:
            total = total.astype(xp.float64)
        slack = slack + 8 * self.nominal * 2.0**-self.frac  # the rounding of weights and of moved values
        return self._replace(values=values, total=total, square=square, slack=slack)

    def greatest(self, moved: Callable) -> tuple[Any, Any] | None:
        """Returns `[R]` the greatest weight · |v| and weight · v² of v = `moved(values)`; None where all weigh 1.

        Weights are those of distinct values, over the row's largest weight.
        """
        if self.mass is None:
            return None
        xp = namespace(self.values)
        size = xp.abs(moved(self.values))
        moment = self.mass.astype(xp.float64) * 2.0**-self.frac * size
        return xp.max(moment, axis=1), xp.max(moment * size, axis=1)

    def value_at(self, places) -> np.ndarray | jax.Array:
        """Returns the value above each cut `[R, …]`; for the last cut, the greatest value."""
        xp = namespace(self.values)
        last = (self.size - 1).reshape(-1, *[1] * (places.ndim - 1))
        return take(self.values, xp.clip(places, 0, xp.maximum(last, 0)))

    def sums_below(self, cuts) -> tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]:
        """Returns, for the values below each cut `[R, …]`, their weight and Σ weight · value in units of 2^−frac."""
        return take(self.count, cuts), take(self.total, cuts)

    def cut_below(self, wanted) -> Any:
        """Returns `[R, m]` the number of distinct values below each of `wanted [R, m]`."""
        xp = namespace(self.values)
        if xp is np:
            return places_of_rows(self.values, self.size, wanted, "left")
        return binary_search(lambda middle: self.value_at(middle) < wanted, wanted.shape, self.size, self.length)

    def before_ties(self, cuts) -> Any:
        """Returns `cuts`: values are distinct here, so no cut separates equal values."""
        return cuts

    def after_ties(self, cuts) -> Any:
        """Returns `cuts`, for the same reason."""
        return cuts

    def every_cut(self, limit: int) -> tuple[Any, Any]:
        """Returns `[R, limit + 1]` ascending cuts between different values, the last repeated, and `[R]` if all fit."""
        xp = namespace(self.values)
        every = xp.minimum(xp.arange(limit + 1, dtype=xp.int64), self.size[:, None])
        return every, self.size <= limit


def binary_search(below, shape, size, length: int) -> Any:
    """Counts, by halving, the places among the first `size [R]` at which `below(places)` holds for ascending JAX rows.

    The result has the given `shape`, `[R, …]`.
    """
    low = jnp.zeros(shape, jnp.int64)
    high = jnp.broadcast_to(size.reshape(-1, *[1] * (len(shape) - 1)), shape)

    def halve(_, ends) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) >> 1
        more = below(middle) & (low < high)
        return jnp.where(more, middle + 1, low), jnp.where(more, high, middle)

    return lax.fori_loop(jnp.int32(0), jnp.int32(length.bit_length()), halve, (low, high))[0]


def places_of(row: np.ndarray, wanted: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
    """Returns `[m]` how many values of an ascending NumPy `row [n]` are below each of `wanted [m]`.

    With side "right" it counts the values that are not above. `wanted` is first rounded to the dtype of the row, in the
    direction that changes no count; otherwise NumPy would convert the whole row.
    """
    with np.errstate(over="ignore"):
        near = wanted.astype(row.dtype)
        passed, beyond = (near < wanted, np.inf) if side == "left" else (near > wanted, -np.inf)
        near = np.where(passed, np.nextafter(near, near.dtype.type(beyond)), near)
    return np.searchsorted(row, near, side)


def places_of_rows(
    values: np.ndarray, size: np.ndarray, wanted: np.ndarray, side: Literal["left", "right"]
) -> np.ndarray:
    """Returns `places_of` each of `wanted [R, …]` in the first `size [R]` values of each row of `values [R, n]`."""
    rows = zip(values, size, wanted, strict=True)
    return np.stack([places_of(row[:held], here, side) for row, held, here in rows]).astype(np.int64)


def fraction_bits(length: int) -> int:
    """Returns the fraction bits, at most 50, with which twice a sum of `length` values below 2 fits int64."""
    return min(50, 58 - max(length, 1).bit_length())


def over_largest(shares, largest) -> Any:
    """Returns weights `[R, N]` over the largest `[R, 1]`, each quotient rounded once; 0 for 0.

    XLA would multiply by the reciprocal of a divisor that is the same for all of a row, so that weights in units would
    differ from NumPy's in the last place. The divisor is chosen for each weight, which keeps the division.
    """
    return shares / namespace(shares).where(shares > 0, largest, 1.0)


def sort_rows(rows: Any, scale: Any, weights: Any | None, mask: Any | None, keep_zero: bool) -> SortedRows:
    """Sorts rows `[R, N]` and joins equal values; call or trace it where 64-bit types are enabled.

    Args:
      rows: float32 or float64, NumPy or JAX.
      scale: `[R]` float64, powers of two near the rows' largest magnitudes.
      weights: `[R, N]` non-negative, or None for 1 each.
      mask: `[R, N]` bool, or None.
      keep_zero: whether to add the value zero, with weight 0, to each row.
    """
    xp = namespace(rows)
    count, length = rows.shape
    frac = fraction_bits(length)
    if xp is np and length >= _BY_ROW and weights is None and not keep_zero:
        return _sorted_by_row(rows, scale, mask, frac)
    counted = mask
    if weights is not None:
        counted = weights > 0 if mask is None else mask & (weights > 0)
    keys, shares = rows if counted is None else xp.where(counted, rows, xp.inf), None
    if weights is not None:
        shares = xp.where(counted, weights, 0).astype(xp.float64)
        shares = over_largest(shares, xp.max(shares, axis=1, keepdims=True))
    elif keep_zero:
        shares = xp.ones(rows.shape) if counted is None else counted.astype(xp.float64)
    if keep_zero:
        held_zero = xp.zeros((count, 1), keys.dtype)
        keys, shares = (
            xp.concatenate([keys, held_zero], axis=1),
            xp.concatenate([shares, held_zero.astype(xp.float64)], axis=1),
        )
    keys, shares = _sorted(keys, shares)
    there = keys < xp.inf
    values = xp.where(there, keys, 0).astype(xp.float64) / scale[:, None] + 0.0  # −0 is 0
    if weights is None:
        masses, heavy = None, there
        moments = xp.rint(values * 2.0**frac).astype(xp.int64)
        if shares is not None:
            masses, heavy = shares.astype(xp.int64), shares
            moments = moments * masses
        off = xp.abs(values - moments.astype(xp.float64) * 2.0**-frac)
    else:
        assert shares is not None
        rounded = xp.rint(shares * 2.0**frac)
        masses, moments, heavy = rounded.astype(xp.int64), None, rounded * 2.0**-frac
        off = 4 * xp.abs(shares - heavy)  # no value is more than 4 from a level
    new = there & xp.concatenate([xp.ones_like(there[:, :1]), keys[:, 1:] != keys[:, :-1]], axis=1)
    return _joined(values, new, there, masses, moments, heavy, off, None if weights is None else shares, frac, length)


def _sorted_by_row(rows, scale, mask, frac: int) -> SortedRows:
    """Does the work of `sort_rows` for unweighted NumPy rows, one at a time: each stays in the processor's cache."""
    number, length = rows.shape
    values, count = np.empty((number, length)), np.empty((number, length + 1), np.int64)
    total, size, square = np.empty_like(count), np.empty(number, np.int64), np.empty(number)
    for r in range(number):
        row = np.sort(rows[r] if mask is None else rows[r][mask[r]])
        held = len(row)
        first = np.concatenate([[0], np.flatnonzero(row[1:] != row[:-1]) + 1]) if held else np.zeros(0, np.int64)
        distinct = size[r] = len(first)
        scaled = row / scale[r] + 0.0  # float64, and −0 is 0
        below = np.concatenate([[0], np.cumsum(np.rint(scaled * 2.0**frac).astype(np.int64))])
        values[r, :distinct] = scaled[first]
        values[r, distinct:] = scaled[-1] if held else 0.0
        count[r, :distinct], count[r, distinct:] = first, held
        total[r, :distinct], total[r, distinct:] = below[first], below[-1]
        square[r] = np.dot(scaled, scaled)
    most = max(int(size.max()), 1)
    zero = np.array([np.searchsorted(values[r, : size[r]], 0.0) for r in range(number)])
    slack = np.full(number, 2 * length * 2.0**-frac)  # each value is rounded by at most half a unit
    values, count, total = values[:, :most], count[:, : most + 1], total[:, : most + 1]
    return SortedRows(values, count, total, None, None, size, zero, square, slack, frac, length)


def count_rows(
    rows: Any,
    scale: Any,
    mask: Any | None,
    keep_zero: bool,
    axes: tuple[str, ...] = (),
) -> SortedRows:
    """Returns what `sort_rows` returns for unweighted bfloat16 or float16 values, by counting their bit patterns.

    `axes` names the mesh axes over which the values of a row are distributed; their counts are added up.
    """
    counts = pattern_counts(rows, mask)
    counts = lax.psum(counts, axes) if axes else counts
    length = rows.shape[1] * (lax.axis_size(axes) if axes else 1)
    return join_counts(counts, rows.dtype, length, scale, keep_zero)


def join_counts(counts: Any, dtype: Any, length: int, scale: Any, keep_zero: bool) -> SortedRows:
    """Returns rows of `length` values of a 16-bit dtype, given the counts `[R, 2¹⁶]` of their bit patterns."""
    xp = namespace(counts)
    frac = fraction_bits(length)
    patterns, ordered = _ordered_patterns(dtype)
    counts = counts[:, patterns]
    values = xp.asarray(ordered)[None] / scale[:, None]
    masses = counts.astype(xp.int64)
    there = masses > 0
    if keep_zero:
        there = there | (xp.asarray(ordered) == 0)
    values = xp.where(there, values, 0.0)
    moments, heavy, off = _in_units(values, masses, False, frac)
    return _joined(values, there, there, masses, moments, heavy, off, None, frac, length)


@functools.cache
def _ordered_patterns(dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns bit patterns and float64 values, ascending, of all finite values but −0 of a 16-bit dtype."""
    patterns = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # some patterns are NaN
        values = patterns.view(dtype).astype(np.float64)
    patterns, values = patterns[np.isfinite(values)], values[np.isfinite(values)]
    keep = ~((values == 0) & np.signbit(values))
    order = np.argsort(values[keep], kind="stable")
    return patterns[keep][order].astype(np.int32), values[keep][order]


def pattern_counts(rows, mask) -> np.ndarray | jax.Array:
    """Returns `[R, 2¹⁶]` how many values have each bit pattern; −0 is counted as 0."""
    if isinstance(rows, np.ndarray):
        patterns = rows.view(np.uint16)
        counts = np.zeros((len(rows), 2**16), np.int64)
        for start in range(0, rows.shape[1], _STRETCH):
            here = slice(start, start + _STRETCH)
            for r, row in enumerate(patterns[:, here]):
                counts[r] += np.bincount(row if mask is None else row[mask[r, here]], minlength=2**16)
        counts[:, 0] += counts[:, 2**15]
        return counts
    patterns = lax.bitcast_convert_type(rows, jnp.uint16).astype(jnp.int32)
    number = jnp.broadcast_to(jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None], rows.shape)
    one = jnp.int32(1) if mask is None else mask.astype(jnp.int32)
    counts = jnp.zeros((rows.shape[0], 2**16), jnp.int32).at[number, patterns].add(one)
    return counts.at[:, 0].add(counts[:, 2**15])


def _joined(values, new, there, masses, moments, heavy, off, shares, frac: int, nominal: int) -> SortedRows:
    """Joins equal values of ascending rows; `new` marks each value that differs from the one before it.

    All arrays are `[R, N]`: `there` is whether a value counts; `masses` (None for 1 each) and `moments` (None where
    values have weights) are integers; `heavy` is the weight that these stand for; `off` is by how much rounding changed
    them; `shares` is the weight before rounding, or None.
    """
    xp = namespace(values)
    square, slack = _square_and_slack(values, heavy, off)
    size = xp.sum(new, axis=1, dtype=xp.int64)
    most = values.shape[1]
    if xp is np:
        most = max(int(size.max()), 1)
    end = xp.sum(there, axis=1, dtype=xp.int64)
    if masses is not None and shares is None:  # patterns that do not occur lie between patterns that do
        end = xp.full_like(end, values.shape[1])
    first = _first_places(new, end, most)

    def below(amounts) -> np.ndarray | jax.Array:  # running sums at the first of each distinct value
        return take(_from_nothing(xp.cumsum(amounts, axis=1)), xp.minimum(first, values.shape[1]))

    last = xp.maximum(size[:, None] - 1, 0)
    place = xp.arange(most, dtype=xp.int64)
    distinct = take(values, xp.minimum(take(first, xp.minimum(place, last)), values.shape[1] - 1))
    counts, run_weight, run_mass = first if masses is None else below(masses), None, None
    if shares is None:
        totals = below(moments)
    else:
        run_mass = counts[:, 1:] - counts[:, :-1]
        counts = counts.astype(xp.float64) * 2.0**-frac
        moments, _, off = _in_units(distinct, run_mass, True, frac)
        totals, slack = _from_nothing(xp.cumsum(moments, axis=1)).astype(xp.float64), slack + 4 * xp.sum(off, axis=1)
        if xp is np:
            run_weight = _run_sums(shares, new, most)
    zero = xp.sum((distinct < 0) & (place < size[:, None]), axis=1, dtype=xp.int64)
    return SortedRows(distinct, counts, totals, run_weight, run_mass, size, zero, square, slack, frac, nominal)


def _from_nothing(sums) -> Any:
    """Returns `[R, n + 1]`: running sums with a 0 in front."""
    xp = namespace(sums)
    return xp.concatenate([xp.zeros_like(sums[:, :1]), sums], axis=1)


def _square_and_slack(values, heavy, off) -> tuple[Any, Any]:
    """Returns `[R]` Σ weight · value², and the most by which the rounding `off` may change any partition's error."""
    xp = namespace(values)
    square = xp.sum(rounded_first(values * values * heavy), axis=1)
    return square, 4 * xp.sum(rounded_first(off), axis=1)  # magnitudes are below 2, squares below 4


def _in_units(values, masses, weighted: bool, frac: int) -> tuple[Any, Any, Any]:
    """Returns moments in units of 2^−frac, the weights of the integer masses, and how far each moment was rounded."""
    xp = namespace(values)
    if weighted:  # masses are in units of 2^−frac too
        rounded = masses.astype(xp.float64)
        moments, heavy = xp.rint(values * rounded).astype(xp.int64), rounded * 2.0**-frac
        return moments, heavy, xp.abs(values * heavy - moments.astype(xp.float64) * 2.0**-frac)
    single = xp.rint(values * 2.0**frac)
    heavy = masses.astype(xp.float64)
    return single.astype(xp.int64) * masses, heavy, xp.abs(values - single * 2.0**-frac) * heavy


def _sorted(keys, shares) -> tuple[Any, ...]:
    """Returns the keys in ascending order, and the shares in the same order."""
    if isinstance(keys, np.ndarray):
        if shares is None:
            return np.sort(keys, axis=1), None
        order = np.argsort(keys, axis=1, kind="stable")
        return np.take_along_axis(keys, order, axis=1), np.take_along_axis(shares, order, axis=1)
    if shares is None:
        return lax.sort(keys, dimension=1), None
    return lax.sort((keys, shares), dimension=1, num_keys=1)


def _first_places(new, end, most: int) -> np.ndarray | jax.Array:
    """Returns `[R, most + 1]` the places at which distinct values begin, then the end of the row."""
    if isinstance(new, np.ndarray):
        places = np.broadcast_to(end[:, None], (len(end), most + 1)).copy()
        row, place = np.nonzero(new)
        before = np.cumsum(new.sum(axis=1)) - new.sum(axis=1)
        places[row, np.arange(len(row)) - before[row]] = place
        return places
    length = new.shape[1]
    slot = jnp.where(new, jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1, most + 1)
    row = jnp.broadcast_to(jnp.arange(new.shape[0], dtype=jnp.int32)[:, None], new.shape)
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int64), new.shape)
    places = jnp.broadcast_to(end[:, None], (new.shape[0], most + 1))
    return places.at[row, slot].set(place, mode="drop")


def _run_sums(amounts, new, most: int) -> np.ndarray:
    """Returns `[R, most]` sums over runs of equal values."""
    sums = np.zeros((len(new), most))
    row, place = np.nonzero(new)
    if len(row):
        before = np.cumsum(new.sum(axis=1)) - new.sum(axis=1)
        sums[row, np.arange(len(row)) - before[row]] = np.add.reduceat(amounts.ravel(), row * new.shape[1] + place)
    return sums
