"""The proof's interface to a sorted row that is distributed over the devices of a mesh.

Every device sorts its part of the row and keeps it (`Held`). The proof runs on the host and sends its questions to
compiled programs, some thousand at a time: the value of a rank, the cuts beside a value, and sums over the values
between cuts. Devices exchange only counts and integer sums.

*Sums over cells.* In a cell whose least value is r, every value x becomes t = (x − r) / s, in [0, 1], where s is the
power of two just above the cell's width. A term such as t is split into a few integers of 30 bits, each holding what
rounding left of the one before, and the integers are added up. So a sum does not depend on how the row is distributed,
and a term loses at most half a unit of its last integer. `slack` bounds the effect on a bound (docs/knq.md, part 6).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from nuqjax._src.knq.proof.rows import moved_slack, origin
from nuqjax._src.knq.rows.long import LongRows, ShardedRows
from nuqjax._src.knq.rows.sorted import fraction_bits

_ASKED = 2**12  # questions in one call: one shape to compile
_STRETCH = 2**15  # values whose terms are in memory at once
_UNIT = 2.0**-53
_LIGHT = 2.0**-30  # of a cell's weight may be rounding; where more is, the distance to its level is bounded by the row


class Place(NamedTuple):
    """The mesh on which rows are distributed, and along which of its axes; each device has a part of one row at a time.

    Attributes:
      mesh: the mesh.
      row_axes: names of the mesh axes along which rows differ.
      value_axes: names of the mesh axes over which the values of a row are distributed.
      length: number of values of a row, masked ones included.
    """

    mesh: Mesh
    row_axes: tuple[str, ...]
    value_axes: tuple[str, ...]
    length: int

    @property
    def of_devices(self) -> PartitionSpec:
        """The spec of arrays whose first axis numbers the devices."""
        return PartitionSpec(tuple(self.mesh.axis_names))

    @property
    def of_rows(self) -> PartitionSpec:
        """The spec of arrays whose first axis numbers the rows."""
        return PartitionSpec(self.row_axes or None)

    def run(self, function, in_specs, out_specs) -> Any:
        """Returns `function` under `jax.shard_map` on the mesh."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class Held(NamedTuple):
    """Stores the `ShardedRows` of one row on each device as arrays whose first axis numbers the devices."""

    part: tuple[Any, ...]
    whole: tuple[Any, ...]


def hold(rows: ShardedRows) -> Held:
    """Returns this device's part of a `Held`, inside `jax.shard_map`."""
    held = Held(tuple(rows.part)[:-1], (rows.size, rows.zero, rows.square, rows.slack))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], held)


def held_rows(held: Held, place: Place) -> ShardedRows:
    """Returns the `ShardedRows` of this device from its part of a `Held`: the inverse of `hold`."""
    own = jax.tree.map(lambda x: x[0], held)
    size, zero, square, slack = own.whole
    return ShardedRows(
        LongRows(*own.part, frac=fraction_bits(place.length)), size, zero, square, slack, place.value_axes
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("place",))
def _values(held: Held, row, ranks, *, place: Place) -> Any:
    """Returns `[G, m]` the values of the given ranks in each of the G rows, whatever `row` is; in the rows' dtype."""
    del row

    def part(held, ranks) -> jax.Array:
        return held_rows(held, place).value_of_rank(ranks[None])

    return place.run(part, (place.of_devices, PartitionSpec()), place.of_rows)(held, ranks)


@functools.partial(jax.jit, static_argnames=("place",))
def _cuts(held: Held, row, wanted, *, place: Place) -> Any:
    """Returns `[G, 2, m]` how many values are below each of `wanted`, and how many are not above it."""
    del row

    def part(held, wanted) -> Any:
        rows = held_rows(held, place)
        cuts = [rows.held_below(wanted[None], equal) for equal in (False, True)]
        return lax.psum(jnp.stack(cuts, axis=1), place.value_axes)

    return place.run(part, (place.of_devices, PartitionSpec()), place.of_rows)(held, wanted)


def _integers(place: Place, weighted: bool) -> tuple[int, int]:
    """Returns the bits of each integer of a term, few enough for a row's sums to fit into int64, and their number."""
    bits = min(30, 61 - place.length.bit_length())
    return bits, -(-(90 if weighted else 60) // bits)


@functools.partial(jax.jit, static_argnames=("place", "squares"))
def _sums(held: Held, row, first, end, inverse, shift, *, place: Place, squares: bool) -> Any:
    """Sums over the values from `first [m]` to below `end [m]` of row number `row`, as integers of decreasing units.

    With `squares` the result is `[G, 1, integers, m]`: the sum of weight · (t − shift)². Without it the result is
    `[G, 2, integers, m]`: the weight and the sum of weight · t; where all values weigh 1, the first integer of the
    weight is the count and the others are 0. t is (value / unit − first / unit) · inverse.
    """

    def part(held, row, first, end, inverse, shift) -> Any:
        rows = held_rows(held, place)
        here = rows.part
        bits, integers = _integers(place, here.shares is not None)
        low, high = (rows.held_below(value[None])[0] for value in (first, end))
        if place.row_axes:
            asked = lax.axis_index(place.row_axes) == row
            low, high = jnp.where(asked, low, 0), jnp.where(asked, high, 0)
        reference = first.astype(jnp.float64) / here.unit[0]
        size = min(_STRETCH, here.length)

        def stretch(number, sums) -> Any:
            base = jnp.minimum(number * size, here.length - size)
            # The cells' ends in this stretch. A stretch that overlaps the one before counts only its own new values.
            begin, until = (jnp.clip(cut - base, number * size - base, size).astype(jnp.int32) for cut in (low, high))
            cell = jnp.cumsum(jnp.zeros(size + 1, jnp.int32).at[begin].add(1)[:size]) - 1
            cell = jnp.maximum(cell, 0)
            value = lax.dynamic_slice_in_dim(here.values[0], base, size).astype(jnp.float64) / here.unit[0]
            term = jnp.clip((value - reference[cell]) * inverse[cell], 0.0, 1.0)
            if squares:
                term = (term - shift[cell]) ** 2
            terms = term[None]
            if here.shares is not None:
                share = lax.dynamic_slice_in_dim(here.shares[0], base, size)
                terms = (term * share)[None] if squares else jnp.stack([share, term * share])
            parted = []
            for _ in range(integers):
                terms = terms * 2.0**bits
                nearest = jnp.rint(terms)
                parted.append(nearest.astype(jnp.int64))
                terms = terms - nearest
            running = jnp.pad(jnp.cumsum(jnp.stack(parted, axis=1), axis=2), ((0, 0), (0, 0), (1, 0)))
            return sums + running[:, :, until] - running[:, :, begin]

        kinds = 2 if here.shares is not None and not squares else 1
        none = jnp.zeros((kinds, integers, len(first)), jnp.int64)
        sums = lax.fori_loop(low[0] // size, -(-high[-1] // size), stretch, none)
        if here.shares is None and not squares:
            holds_zero = (low <= here.zero[0]) & (here.zero[0] < high)
            count = (high - low) - holds_zero * here.added_zero
            sums = jnp.concatenate([jnp.zeros_like(sums).at[0, 0].set(count), sums])
        return lax.psum(sums, place.value_axes)[None]

    one = PartitionSpec()
    return place.run(part, (place.of_devices, *[one] * 5), place.of_rows)(held, row, first, end, inverse, shift)


class MeshRow:
    """A `Row` that the devices of a mesh hold. It needs 64-bit types enabled."""

    def __init__(
        self, held: Held, place: Place, row: int, size: int, unit: float, zero: int | None, moved: bool
    ) -> None:
        self.size, self.unit, self._moved = size, unit, moved
        self._held, self._place, self._row = held, place, row
        self._dtype = np.dtype(held.part[0].dtype)
        self._weighted = held.part[2] is not None
        self._ranks, self._values = np.zeros(0, np.int64), np.zeros(0)  # asked for so far
        self.held_zero = None if zero is None else (zero, int(self.cuts_above(np.zeros(1))[0]))

    def _ask(self, programme, *questions: np.ndarray, **options) -> np.ndarray:
        answers = []
        for start in range(0, len(questions[0]), _ASKED):
            some = [question[start : start + _ASKED] for question in questions]
            count = len(some[0])
            some = [np.pad(question, (0, _ASKED - count), mode="edge") for question in some]
            answer = programme(self._held, np.int32(self._row), *some, place=self._place, **options)
            answers.append(np.asarray(answer)[self._row][..., :count])
        return np.concatenate(answers, axis=-1)

    def values_at(self, places: np.ndarray) -> np.ndarray:
        """Returns the value above each cut; a value is asked for once and then kept."""
        new = np.setdiff1d(places, self._ranks)
        if len(new):
            ranks = np.concatenate([self._ranks, new])
            found = self._ask(_values, new).astype(np.float64)
            found = np.where(np.abs(found) < np.finfo(self._dtype).tiny, 0.0, found)  # rows have no subnormal values
            values = np.concatenate([self._values, found])
            order = np.argsort(ranks)
            self._ranks, self._values = ranks[order], values[order]
        return self._values[np.searchsorted(self._ranks, places)]

    def cuts_below(self, values: np.ndarray) -> np.ndarray:
        """Returns the number of values below each of the given: the sum of the devices' counts."""
        return self._ask(_cuts, values.astype(self._dtype))[0]

    def cuts_above(self, values: np.ndarray) -> np.ndarray:
        """Returns the number of values not above each of the given: the sum of the devices' counts."""
        return self._ask(_cuts, values.astype(self._dtype))[1]

    def settled(self, cuts: np.ndarray) -> np.ndarray:
        """Moves each cut between equal values below all of them: their order over the devices is not defined."""
        value = self.values_at(np.minimum(cuts, self.size - 1))
        tied = (value == self.values_at(np.maximum(cuts - 1, 0))) & (cuts > 0) & (cuts < self.size)
        cuts = cuts.copy()
        if tied.any():
            cuts[tied] = self.cuts_below(value[tied])
        return cuts

    def measure(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Computes weight, mean and squared error from exact sums, in two passes as a `HostRow` does."""
        if not len(low):
            return np.zeros(0), np.zeros(0), np.zeros(0)
        first = self.values_at(low)
        end = np.where(high < self.size, self.values_at(np.minimum(high, self.size - 1)), np.inf)
        width = (self.values_at(high - 1) - first) / self.unit
        exponent = np.where(width > 0, np.maximum(np.frexp(width)[1], -1000), 0)
        asked = first.astype(self._dtype), end.astype(self._dtype), np.ldexp(1.0, -exponent)
        weight, moment = self._ask(_sums, *asked, np.zeros(len(low)), squares=False)
        weight = self._number(weight) if self._weighted else weight[0].astype(np.float64)
        shift = np.clip(self._number(moment) / np.where(weight > 0, weight, 1.0), 0.0, 1.0)
        square = self._number(self._ask(_sums, *asked, shift, squares=True)[0])
        mean = (first / self.unit - origin(self)) + np.ldexp(shift, exponent)
        return weight, mean, np.ldexp(square, 2 * exponent)

    def _number(self, integers: np.ndarray) -> np.ndarray:
        """Returns the number `[m]` that integers `[integers, m]` of decreasing units add up to."""
        bits, count = _integers(self._place, self._weighted)
        units = 2.0 ** -(bits * np.arange(1.0, count + 1))
        return (integers[::-1] * units[::-1, None]).sum(axis=0)

    def slack(self, cuts: np.ndarray, weight: np.ndarray, width: np.ndarray, top: float) -> float:
        """Returns the most that errors in the means and sums of these cells can change a bound by."""
        bits, count = _integers(self._place, self._weighted)
        unit, number = 2.0 ** -(bits * count), np.diff(cuts)
        spread = 4 * unit * float((number * width**2).sum())  # rounding of moments and squares
        moved = float((weight * (8 * _UNIT * width) ** 2).sum())  # Σ weight · (error of the mean)²
        lost = spread
        if self._weighted:
            least, greatest = self.values_at(np.array([0, self.size - 1])) / self.unit
            # What rounding takes off a weight costs as much of the cell's error, or the square of the row's width.
            share = 4 * unit * number / np.where(weight > 0, weight, 1.0)
            light = (weight == 0) | (share > _LIGHT)
            lost += top * float(np.max(share[~light], initial=0.0))
            moved, lost = moved + spread, lost + unit * float(number[light].sum()) * float(greatest - least) ** 2
        rounded = moved_slack(self, weight, top) if self._moved else 0.0
        return 2 * math.sqrt(top * moved) + moved + lost + rounded
