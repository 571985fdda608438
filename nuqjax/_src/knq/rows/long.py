"""Long sorted rows with running sums at every 16th or 64th place: they take little more memory than the values.

A *cut* is a place in the sorted row. Equal values belong to one interval, so the search uses only cuts between values
that differ; `before_ties` and `after_ties` find them. Weights and sums below a cut are integers, as in `rows.sorted`,
so the order of addition does not change them.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.knq.rows.sorted import binary_search, fraction_bits, over_largest, places_of_rows, take
from nuqjax._src.leaf.rows import namespace
from nuqjax._src.platform.rounding import rounded_first

_BLOCK, _BLOCK_OF_LONGEST = 16, 64  # values between two running sums
_LONGEST = 2**24  # in longer rows memory matters more than the time of the search
_STRETCH = 2**16  # values that NumPy handles at once: a multiple of the block, small enough to stay in the cache


class LongRows(NamedTuple):
    """Rows of ascending values.

    Attributes:
      values: `[R, n]` ascending, infinite from place `size` on, in the units and the dtype of the rows.
      unit: `[R]` float64 powers of two, by which values are divided.
      shares: `[R, n]` float64 weight of each value over the row's largest; None where all weights are 1.
      masses: `[R, n / B + 1]` int64 weight below every B-th place, in units of 2^−frac; None where all are 1.
      moments: `[R, n / B + 1]` int64 sum of weight times value below the same places, in units of 2^−frac.
      size: `[R]` int64 number of values that count, which is the last cut.
      added_zero: 1 if the first value zero is the held zero, which was added and has weight 0; else 0.
      zero: `[R]` int64 cut just below the value zero.
      square: `[R]` float64 Σ weight · value²; None for NumPy rows.
      slack: `[R]` float64 the most by which rounding to units may change the squared error of any partition.
      frac: fraction bits of the sums.
    """

    values: Any
    unit: Any
    shares: Any
    masses: Any
    moments: Any
    size: Any
    added_zero: Any
    zero: Any
    square: Any
    slack: Any
    frac: int

    @property
    def length(self) -> int:
        """The length of the arrays: no row's last cut is greater."""
        return self.values.shape[1]

    @property
    def nominal(self) -> int:
        """The number of values of a row, counted or not, the held zero included."""
        return self.length

    def with_values(self, moved: Callable) -> "LongRows":
        """Returns the rows with `moved` applied to values over the unit: still ascending, float64, of unit 1."""
        xp = namespace(self.values)
        there = self.values < xp.inf
        scaled = moved(xp.where(there, self.values, 0).astype(xp.float64) / self.unit[:, None])
        values = xp.where(there, scaled, xp.inf)
        return _summed(self._replace(values=values, unit=xp.ones_like(self.unit)))

    def greatest(self, moved: Callable) -> tuple[Any, ...] | None:
        """Returns `[R]` the greatest weight · |v| and weight · v² of v = `moved(values)`; None where all weigh 1.

        Weights are over the row's largest.
        """
        if self.shares is None:
            return None
        xp = namespace(self.values)

        def stretch(start) -> tuple[Any, Any]:
            here = slice(start, start + _STRETCH if xp is np else None)
            there = self.values[:, here] < xp.inf
            scaled = xp.where(there, self.values[:, here], 0).astype(xp.float64) / self.unit[:, None]
            size = xp.where(there, xp.abs(moved(scaled)), 0.0)
            moment = self.shares[:, here] * size
            return xp.max(moment, axis=1), xp.max(moment * size, axis=1)

        starts = range(0, self.length, _STRETCH) if xp is np else (0,)
        return tuple(xp.max(xp.stack(x), axis=0) for x in zip(*map(stretch, starts), strict=True))

    def value_at(self, places) -> Any:
        """Returns the value above each cut `[R, …]`, over the unit; for the last cut, the greatest value."""
        xp = namespace(self.values)
        last = xp.maximum(_beside(self.size, places) - 1, 0)
        found = take(self.values, xp.clip(places, 0, last)).astype(xp.float64)
        return xp.where(_beside(self.size, places) > 0, found / _beside(self.unit, places) + 0.0, 0.0)

    def sums_below(self, cuts) -> tuple[Any, Any]:
        """Returns, for the values below each cut `[R, …]`, their weight and Σ weight · value in units of 2^−frac."""
        return self.in_units(self.exact_sums_below(cuts))

    def in_units(self, sums) -> Any:
        """Converts exact sums to those of `sums_below`: floats where values have weights."""
        if self.shares is None:
            return sums
        mass, moment = (x.astype(namespace(x).float64) for x in sums)
        return mass * 2.0**-self.frac, moment

    def exact_sums_below(self, cuts) -> tuple[Any, Any]:
        """Returns weight and moment as integers; where values have weights, the weight is in units of 2^−frac too."""
        if self.shares is None:
            mass = cuts - (cuts > _beside(self.zero, cuts)) * self.added_zero
        else:
            mass = self._running(self.masses, cuts, lambda places: _masses(take(self.shares, places), self.frac))

        def moments(places) -> Any:
            xp = namespace(self.values)
            values = take(self.values, places).astype(xp.float64) / _beside(self.unit, places)
            return _moments(values, None if self.shares is None else take(self.shares, places), self.frac)

        return mass, self._running(self.moments, cuts, moments)

    def _running(self, sums, cuts, amounts) -> Any:
        xp = namespace(self.values)
        size = _block(self.length)
        block = cuts // size
        places = block[..., None] * size + xp.arange(size - 1, dtype=xp.int64)
        counted = places < cuts[..., None]  # no cut is above `size`, so these values count
        here = amounts(xp.where(counted, places, 0))
        return take(sums, block) + xp.sum(xp.where(counted, here, 0), axis=-1)

    def cut_below(self, wanted) -> Any:
        """Returns `[R, …]` the number of values below each of `wanted`."""
        if namespace(self.values) is np:
            return places_of_rows(self.values, self.size, wanted * _beside(self.unit, wanted), "left")
        return binary_search(lambda middle: self.value_at(middle) < wanted, wanted.shape, self.size, self.length)

    def cut_above(self, wanted) -> Any:
        """Returns `[R, …]` the number of values not above each of `wanted`."""
        if namespace(self.values) is np:
            return places_of_rows(self.values, self.size, wanted * _beside(self.unit, wanted), "right")
        return binary_search(lambda middle: self.value_at(middle) <= wanted, wanted.shape, self.size, self.length)

    def before_ties(self, cuts) -> Any:
        """Returns for each of `cuts` the last cut, not above it, between values that differ."""
        return _untied(self, cuts, self.cut_below)

    def after_ties(self, cuts) -> Any:
        """Returns for each of `cuts` the first cut, not below it, between values that differ."""
        return _untied(self, cuts, self.cut_above)

    def every_cut(self, limit: int) -> tuple[Any, Any]:
        """Returns `[R, limit + 1]` ascending cuts between different values, the last repeated, and `[R]` if all fit."""
        return every_cut(self, limit)


class ShardedRows(NamedTuple):
    """Rows distributed over a mesh: each device holds, sorted, a part of every row. Used inside `jax.shard_map`.

    Cuts count places in the whole row, which no device holds. The value above a cut is found by halving. Devices
    exchange only counts and sums of their values below a few cuts at a time, as exact integers.

    Attributes:
      part: the rows `[R, n]` of the values that this device holds.
      size: `[R]` int64 number of values that count on all devices, which is the last cut.
      zero: `[R]` int64 cut just below the value zero.
      square: `[R]` float64 Σ weight · value².
      slack: `[R]` float64 the most by which rounding to units may change the squared error of any partition.
      axes: names of the mesh axes.
    """

    part: LongRows
    size: Any
    zero: Any
    square: Any
    slack: Any
    axes: tuple[str, ...]

    @property
    def length(self) -> int:
        """The length of the arrays on all devices: no row's last cut is greater."""
        return self.part.length * lax.axis_size(self.axes)

    @property
    def nominal(self) -> int:
        """The number of values of a row, counted or not, the held zero included."""
        return self.length

    @property
    def frac(self) -> int:
        """Fraction bits of the sums."""
        return self.part.frac

    def with_values(self, moved: Callable) -> "ShardedRows":
        """Returns the rows with `moved` applied to values over the unit: still ascending, float64, of unit 1."""
        part = self.part.with_values(moved)
        square, slack = lax.psum((part.square, part.slack), self.axes)
        return self._replace(part=part, square=square, slack=slack)

    def greatest(self, moved: Callable) -> Any:
        """Returns what `LongRows.greatest` returns of the values of all devices."""
        found = self.part.greatest(moved)
        return None if found is None else lax.pmax(found, self.axes)

    def value_at(self, places) -> jax.Array:
        """Returns the value above each cut `[R, …]`, over the unit; for the last cut, the greatest value."""
        places = jnp.clip(places, 0, jnp.maximum(_beside(self.size, places) - 1, 0))
        found = self.value_of_rank(places).astype(jnp.float64)
        return jnp.where(_beside(self.size, places) > 0, found / _beside(self.part.unit, places) + 0.0, 0.0)

    def value_of_rank(self, places) -> jax.Array:
        """Returns the value above each cut, which is below the last, in the units and the dtype of the rows.

        It is the greatest float with no more than `places` values below it. Its bits are found one by one, as floats
        ascend with their bit patterns.
        """
        dtype = self.part.values.dtype
        kind, bits = (jnp.int32, 32) if dtype == jnp.float32 else (jnp.int64, 64)

        def value(key) -> jax.Array:
            return lax.bitcast_convert_type(jnp.where(key < 0, key ^ kind(2 ** (bits - 1) - 1), key), dtype)

        def halve(step, key) -> jax.Array:
            candidate = key + lax.shift_left(kind(1), (bits - 2 - step).astype(kind))
            below = lax.psum(self.held_below(value(candidate)), self.axes)
            return jnp.where((below <= places) & ((candidate < 0) | (value(candidate) < jnp.inf)), candidate, key)

        some = jnp.zeros(places.shape, kind)
        lowest = jnp.full(places.shape, -(2 ** (bits - 1)), kind)
        key = jnp.where(lax.psum(self.held_below(value(some)), self.axes) <= places, some, lowest)
        return value(lax.fori_loop(jnp.int32(0), jnp.int32(bits - 1), halve, key))

    def held_below(self, wanted, equal: bool = False) -> Any:
        """Counts this device's values below each of `wanted`, or with `equal` those not above; of the values' dtype."""
        part = self.part
        before = jnp.less_equal if equal else jnp.less
        below = lambda middle: before(take(part.values, middle), wanted)  # noqa: E731
        return binary_search(below, wanted.shape, part.size, part.length)

    def sums_below(self, cuts) -> Any:
        """Returns, for the values below each cut `[R, …]`, their weight and Σ weight · value in units of 2^−frac."""
        inside = cuts < _beside(self.size, cuts)
        held = jnp.where(inside, self.held_below(self.value_of_rank(cuts)), _beside(self.part.size, cuts))
        return self.part.in_units(lax.psum(self.part.exact_sums_below(held), self.axes))

    def cut_below(self, wanted) -> Any:
        """Returns `[R, …]` the number of values below each of `wanted`."""
        return lax.psum(self.part.cut_below(wanted), self.axes)

    def cut_above(self, wanted) -> Any:
        """Returns `[R, …]` the number of values not above each of `wanted`."""
        return lax.psum(self.part.cut_above(wanted), self.axes)

    def before_ties(self, cuts) -> Any:
        """Returns for each of `cuts` the last cut, not above it, between values that differ."""
        return _untied(self, cuts, self.cut_below)

    def after_ties(self, cuts) -> Any:
        """Returns for each of `cuts` the first cut, not below it, between values that differ."""
        return _untied(self, cuts, self.cut_above)

    def every_cut(self, limit: int) -> tuple[Any, Any]:
        """Returns `[R, limit + 1]` ascending cuts between different values, the last repeated, and `[R]` if all fit."""
        return every_cut(self, limit)


def every_cut(rows, limit: int) -> tuple[Any, Any]:
    """Returns `[R, limit + 1]` ascending cuts between different values, the last repeated, and `[R]` whether all fit.

    Where a sample of 2 · `limit` values shows that they do not fit, all cuts but the first are the last.
    """
    xp = namespace(rows.size)
    size = rows.size[:, None]
    looked = rows.value_at(xp.arange(2 * limit, dtype=xp.int64) * size // (2 * limit))
    hopeless = xp.sum(looked[:, 1:] != looked[:, :-1], axis=1, keepdims=True) >= limit
    cuts = xp.concatenate([xp.zeros_like(size), xp.broadcast_to(size, (size.shape[0], limit))], axis=1)

    def next_cut(last) -> Any:
        return xp.where(hopeless, size, rows.cut_above(rows.value_at(last)))

    last = xp.zeros_like(size)
    if xp is np:
        for place in range(1, limit + 1):
            last = next_cut(last)
            cuts[:, place : place + 1] = last
            if (last >= size).all():
                break
    else:

        def wanted(state) -> Any:
            _, last, place = state
            return jnp.any(last < size) & (place <= limit)

        def found(state) -> tuple[jax.Array, Any, Any]:
            cuts, last, place = state
            last = next_cut(last)
            return lax.dynamic_update_slice(cuts, last, (jnp.int32(0), place)), last, place + 1

        cuts, last, _ = lax.while_loop(wanted, found, (cuts, last, jnp.int32(1)))
    return cuts, (last >= size)[:, 0] & ~hopeless[:, 0]


def _untied(rows, cuts, to_value) -> Any:
    """Returns the cuts; where the values next to a cut are equal, `to_value` of that value instead."""
    xp = namespace(cuts)
    value = rows.value_at(cuts)
    tied = (value == rows.value_at(cuts - 1)) & (cuts > 0) & (cuts < _beside(rows.size, cuts))
    if xp is np:
        moved = cuts.copy()
        for r in np.flatnonzero(tied.reshape(len(cuts), -1).any(axis=1)):
            moved[r][tied[r]] = to_value(np.broadcast_to(value[r][tied[r]], (len(cuts), tied[r].sum())))[r]
        return moved
    return xp.where(tied, to_value(value), cuts)


def _beside(of_row, array) -> Any:
    """Reshapes `of_row [R]` so that it broadcasts against `array [R, …]`."""
    return of_row.reshape(-1, *[1] * (array.ndim - 1))


def _masses(shares, frac: int) -> Any:
    return namespace(shares).rint(shares * 2.0**frac).astype(namespace(shares).int64)


def _moments(values, shares, frac: int) -> Any:
    xp = namespace(values)
    scale = 2.0**frac if shares is None else xp.rint(shares * 2.0**frac)
    return xp.rint(values * scale).astype(xp.int64)


def sort_long_rows(
    rows: Any, scale: Any, weights: Any | None, mask: Any | None, keep_zero: bool, axes: tuple[str, ...] = ()
) -> LongRows | ShardedRows:
    """Sorts rows `[R, N]`; call or trace it where 64-bit types are enabled.

    Args:
      rows: float32 or float64, NumPy (one row) or JAX.
      scale: `[R]` float64, powers of two near the rows' largest magnitudes.
      weights: `[R, N]` non-negative, or None for 1 each.
      mask: `[R, N]` bool, or None.
      keep_zero: whether to add the value zero, with weight 0, to each row.
      axes: names of the mesh axes over which the values of each row are distributed; `scale` is that of whole rows.
    """
    xp = namespace(rows)
    frac = fraction_bits(rows.shape[1] * (lax.axis_size(axes) if axes else 1))
    counted = mask
    if weights is not None:
        counted = weights > 0 if mask is None else mask & (weights > 0)
        weights = xp.where(counted, weights, 0).astype(xp.float64)
        largest = xp.max(weights, axis=1, keepdims=True)
        largest = lax.pmax(largest, axes) if axes else largest
        weights = over_largest(weights, largest)
    keys = rows if counted is None else xp.where(counted, rows, xp.inf)
    added_zero = int(keep_zero)
    if keep_zero:
        held_zero = xp.zeros((rows.shape[0], 1), keys.dtype)
        if axes:  # the first device holds the added zero
            added_zero = (lax.axis_index(axes) == 0).astype(jnp.int64)
            held_zero = jnp.where(added_zero > 0, held_zero, jnp.inf)
        keys = xp.concatenate([held_zero, keys], axis=1)  # before the zeros of the row: the sort is stable
        weights = None if weights is None else xp.concatenate([xp.zeros((len(held_zero), 1)), weights], axis=1)
    if xp is np:
        values, shares = _sorted_on_host(keys, weights)
        every = values.shape[1] if counted is None and weights is None else int(np.searchsorted(values[0], np.inf))
        size = np.full(1, every)
    else:
        if weights is None:
            values, shares = lax.sort(keys, dimension=1), None
        else:
            values, shares = lax.sort((keys, weights), dimension=1, num_keys=1)
        size = jnp.sum(values < jnp.inf, axis=1, dtype=jnp.int64)
    nothing = xp.zeros_like(size)
    found = _summed(LongRows(values, scale, shares, None, None, size, added_zero, nothing, None, None, frac))
    found = found._replace(zero=found.cut_below(xp.zeros((rows.shape[0], 1)))[:, 0])
    if not axes:
        return found
    size, zero, square, slack = lax.psum((found.size, found.zero, found.square, found.slack), axes)
    return ShardedRows(found, size, zero, square, slack, axes)


def _summed(rows: LongRows) -> LongRows:
    """Returns the rows with their running sums, slack and, for JAX rows, squares."""
    values, unit, shares, frac = rows.values, rows.unit, rows.shares, rows.frac
    if isinstance(values, np.ndarray):
        masses, moments, off = _sums_on_host(values[:, : int(rows.size[0])], unit, shares, frac)
        return rows._replace(masses=masses, moments=moments, slack=4 * off)
    there = values < jnp.inf
    scaled = jnp.where(there, values, 0).astype(jnp.float64) / unit[:, None]
    heavy = there.astype(jnp.float64) if shares is None else shares
    exact = _moments(scaled, shares, frac)
    off = jnp.sum(rounded_first(jnp.abs(scaled * heavy - exact.astype(jnp.float64) * 2.0**-frac)), axis=1)
    masses = None
    if shares is not None:
        mass = _masses(shares, frac)
        off = off + 4 * jnp.sum(jnp.abs(heavy - mass.astype(jnp.float64) * 2.0**-frac), axis=1)
        masses = _below_blocks(mass)
    square = jnp.sum(rounded_first(scaled * scaled * heavy), axis=1)
    return rows._replace(masses=masses, moments=_below_blocks(exact), square=square, slack=4 * off)


def _sorted_on_host(keys, weights) -> tuple[Any, Any]:
    if weights is not None:
        order = np.argsort(keys[0], kind="stable")
        return keys[:, order], weights[:, order]
    processors = os.cpu_count() or 1
    bounds = [keys.shape[1] * part // processors for part in range(processors + 1)]
    values = np.partition(keys[0], bounds[1:-1]) if processors > 1 else keys[0].copy()
    with ThreadPoolExecutor(processors) as threads:  # each thread sorts one range of values
        list(threads.map(lambda part: values[bounds[part] : bounds[part + 1]].sort(), range(processors)))
    return values[None], None


def _sums_on_host(values, scale, shares, frac: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Returns running sums of a NumPy row at every B-th place, and a bound on the rounding of their terms in all."""
    places = values.shape[1]
    block = _block(places)
    whole = places // block * block
    masses = None if shares is None else np.zeros(places // block + 1, np.int64)
    moments = np.zeros(places // block + 1, np.int64)

    def stretch(start) -> None:
        here = slice(start, min(start + _STRETCH, whole))
        slot = slice(start // block + 1, here.stop // block + 1)
        scaled = values[0, here].astype(np.float64) / scale[0]
        share = None if shares is None else shares[0, here]
        moments[slot] = _moments(scaled, share, frac).reshape(-1, block).sum(axis=1)
        if masses is not None:
            masses[slot] = _masses(share, frac).reshape(-1, block).sum(axis=1)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(stretch, range(0, whole, _STRETCH)))
    # Rounding a moment is off by at most half a unit, and rounding a weight by as much again.
    off = np.full(1, places * 2.0**-frac)
    np.cumsum(moments, out=moments)
    if masses is None:
        return None, moments[None], off
    return np.cumsum(masses)[None], moments[None], off


def _below_blocks(amounts) -> jax.Array:
    """Returns `[R, n / B + 1]` running sums of `amounts [R, n]` at every B-th place."""
    count, places = amounts.shape
    block = _block(places)
    whole = amounts[:, : places // block * block]
    sums = jnp.cumsum(jnp.sum(whole.reshape(count, -1, block), axis=2), axis=1)
    return jnp.concatenate([jnp.zeros((count, 1), jnp.int64), sums], axis=1)


def _block(places: int) -> int:
    """Returns B, the number of values between two running sums in a row of `places` values."""
    return _BLOCK if places <= _LONGEST else _BLOCK_OF_LONGEST
