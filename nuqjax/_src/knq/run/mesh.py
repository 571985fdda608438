"""Rows on a mesh, fitted where they are.

Short rows, and most rows without a proof, are fitted by one compiled program (`fit_knq_part` on every device). The
proof of other rows runs on the host. What it transfers depends on the row:

- A row of at most 65,536 values, or one that a device holds whole, is copied to the host, some rows at a time.
- For a row of 16-bit values, the counts of its bit patterns are copied.
- For any other row, only the answers to the proof's questions are copied (`proof.mesh_row`): no device, nor the host,
  ever holds the whole row. Even without a proof, the host decides whether it is searched again with narrower gaps.

The levels are bit for bit those of the same rows on one device.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nuqjax._src.knq.proof.mesh_row import Held, MeshRow, Place, held_rows, hold
from nuqjax._src.knq.proof.proof import better_of, prove
from nuqjax._src.knq.rows.long import ShardedRows, sort_long_rows
from nuqjax._src.knq.rows.sorted import LONG, pattern_counts, take
from nuqjax._src.knq.run.host import fit_counted, fit_on_host, rounded_fit
from nuqjax._src.knq.run.levels import SHORT, FitOptions, dense_cuts, interval_means
from nuqjax._src.knq.run.light import settled
from nuqjax._src.knq.run.traced import fit_knq_part
from nuqjax._src.knq.search.gaps import SEARCHES, Gaps, chosen, next_gaps, no_gaps
from nuqjax._src.knq.search.search import Partition, partition, polish
from nuqjax._src.leaf.assign import Fit, assign, row_scale, working_dtype
from nuqjax._src.platform.host import x64

_BROUGHT = 2**22  # values of a device's rows that are copied to the host at once
_COUNTED_AT_ONCE = 16  # rows of a group of devices whose counts are copied to the host at once


class MeshLayout(NamedTuple):
    """How rows lie in an array on a mesh. The devices that hold parts of the same rows are a *group*.

    Attributes:
      sharding: the array's sharding.
      shape: the array's shape.
      of_rows: its axes along which rows differ, ascending; the others hold the values of a row, in any order.
    """

    sharding: NamedSharding
    shape: tuple[int, ...]
    of_rows: tuple[int, ...]

    @property
    def of_values(self) -> tuple[int, ...]:
        """The axes that hold the values of a row."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.of_rows)

    @property
    def spec(self) -> PartitionSpec:
        """The array's partition spec, with an entry for every axis."""
        return PartitionSpec(*(*self.sharding.spec, *[None] * len(self.shape))[: len(self.shape)])

    @property
    def by_row(self) -> PartitionSpec:
        """The partition spec of arrays whose first axes are those of the rows."""
        return PartitionSpec(*(self.spec[axis] for axis in self.of_rows))

    @property
    def count(self) -> int:
        """The number of rows."""
        return math.prod(self.shape[axis] for axis in self.of_rows)

    @property
    def shards(self) -> list[int]:
        """The number of shards along each axis of the rows."""
        return [math.prod(self.sharding.mesh.shape[name] for name in _names(entry)) for entry in self.by_row]

    @property
    def place(self) -> Place:
        """The mesh and its axes over which the rows are distributed."""
        row_axes, value_axes = (
            tuple(name for axis in axes for name in _names(self.spec[axis])) for axes in (self.of_rows, self.of_values)
        )
        length = math.prod(self.shape[axis] for axis in self.of_values)
        mesh = self.sharding.mesh
        assert isinstance(mesh, Mesh)
        return Place(mesh, row_axes, value_axes, length)

    def rows(self, block: Any) -> Any:
        """Returns the rows `[L, n]` of one device's block of the array, inside `jax.shard_map`."""
        if block is None:
            return None
        moved = block.transpose(*self.of_rows, *self.of_values)
        return moved.reshape(math.prod(moved.shape[: len(self.of_rows)]), -1)

    def some_rows(self, block: Any, start: Any, number: int) -> Any:
        """Returns `number` of the rows of a block, from row `start` on."""
        return None if block is None else lax.dynamic_slice_in_dim(self.rows(block), start, number)

    def run(self, part, arrays: Sequence[Any], out_specs, *others: Any) -> Any:
        """Runs `part` on the devices' blocks of the arrays (or None), and on others that all devices have alike."""
        specs = [None if array is None else self.spec for array in arrays]
        return self.place.run(part, (*specs, *[PartitionSpec()] * len(others)), out_specs)(*arrays, *others)


def _names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a spec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def fit_on_mesh(
    array: jax.Array,
    weights: jax.Array | None,
    mask: jax.Array | None,
    of_rows: tuple[int, ...],
    *,
    num_levels: int,
    keep_zero: bool,
    tolerance: float | None,
) -> Fit:
    """Fits levels to the rows of an array with a `NamedSharding`.

    Rows of at most 256 values have the bound of one dense program, and are copied to the host where it misses the
    tolerance. Where several processes hold the array, such a bound is all that a `tolerance` asks for.

    Args:
      array: `[…]` floating.
      weights: non-negative, of the same shape, or None.
      mask: bool, of the same shape, or None.
      of_rows: the axes along which rows differ, ascending.
      num_levels: K.
      keep_zero: as in `knq.knq`.
      tolerance: as in `knq.knq`.

    Returns:
      A `Fit` whose arrays begin with the axes of the rows `[R₁, R₂, …]`, and are distributed as these axes are.
    """
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    layout = MeshLayout(sharding, array.shape, of_rows)
    weights, mask = (None if x is None else jax.device_put(x, sharding) for x in (weights, mask))
    place, arrays = layout.place, (array, weights, mask)
    counted = place.length > LONG and weights is None and array.dtype.itemsize == 2
    held = place.length > LONG and place.value_axes and not counted
    if place.length <= SHORT or not array.is_fully_addressable or (tolerance is None and not held):
        fitted = fit_at_once(*arrays, layout=layout, num_levels=num_levels, keep_zero=keep_zero, tolerance=tolerance)
        if tolerance is None or not array.is_fully_addressable or _is_proven(fitted, tolerance):
            return fitted
    options = FitOptions(num_levels, keep_zero, tolerance, dense_cuts(layout.count, place.length))
    if held:
        fitted = _fit_held(arrays, layout, options)
    elif counted:
        fitted = _fit_counts(arrays, layout, options)
    else:
        fitted = _fit_brought(arrays, layout, options)
    placed = NamedSharding(sharding.mesh, layout.by_row)
    return Fit(*(jax.device_put(_in_order(x, layout), placed) for x in fitted))


def _is_proven(fitted: Fit, tolerance: float) -> bool:
    """Returns whether every bound is within half the tolerance, which leaves room for rounding in the host's test."""
    return bool(jnp.all(fitted.lower_bound >= fitted.sse * (1 - tolerance / 2)))


@functools.partial(jax.jit, static_argnames=("layout", "num_levels", "keep_zero", "tolerance"))
def fit_at_once(
    array, weights, mask, *, layout: MeshLayout, num_levels: int, keep_zero: bool, tolerance: float | None
) -> Any:
    """Fits levels as `fit_on_mesh` does, in one compiled program."""

    def part(*blocks) -> Fit:
        shape = [blocks[0].shape[axis] for axis in layout.of_rows]
        rows, heavy, counted = (layout.rows(block) for block in blocks)
        fitted = fit_knq_part(
            rows, num_levels, heavy, counted,
            keep_zero=keep_zero, tolerance=tolerance, count=layout.count, axes=layout.place.value_axes,
        )  # fmt: skip
        return Fit(*(x.reshape(*shape, *x.shape[1:]) for x in fitted))

    return layout.run(part, (array, weights, mask), layout.by_row)


def _in_order(results: np.ndarray, layout: MeshLayout) -> np.ndarray:
    """Reorders results `[G, L, …]`, the L rows of each group of devices, to `[R₁, R₂, …]`."""
    parts = layout.shards
    held = [layout.shape[axis] // part for axis, part in zip(layout.of_rows, parts, strict=True)]
    own, many = results.shape[2:], len(parts)
    mixed = results.reshape((*parts, *held, *own))
    order = [axis for pair in zip(range(many), range(many, 2 * many), strict=True) for axis in pair]
    mixed = mixed.transpose((*order, *range(2 * many, mixed.ndim)))
    return mixed.reshape((*(layout.shape[axis] for axis in layout.of_rows), *own))


def _rows_of_each(layout: MeshLayout) -> int:
    """Returns the number of rows of each group of devices."""
    return layout.count // math.prod(layout.shards)


def _joined(parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Joins the fields of a `Fit` for some rows of each group at a time into fields `[G, L, …]`."""
    return [np.concatenate(field, axis=1) for field in zip(*parts, strict=True)]


@functools.partial(jax.jit, static_argnames=("layout", "number"))
def _some_rows(arrays, start, *, layout: MeshLayout, number: int) -> Any:
    """Returns `[G · number, N]` of each array: `number` rows of each group from its row `start` on, left in place."""

    def part(*blocks) -> tuple[Any, ...]:
        *blocks, start = blocks
        return tuple(layout.some_rows(block, start, number) for block in blocks)

    place = layout.place
    spec = PartitionSpec(place.row_axes or None, place.value_axes or None)
    return layout.run(part, arrays, tuple(None if x is None else spec for x in arrays), start)


def _blocks(array: jax.Array | None, groups: int) -> Iterator[np.ndarray | None]:
    """Yields the blocks of an array `[G · c, …]`, group by group, on the host."""
    if array is None:
        yield from [None] * groups
        return
    found: dict[int, list] = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            found.setdefault(shard.index[0].start or 0, []).append(shard)
    for start in sorted(found):
        parts = [np.asarray(shard.data) for shard in sorted(found[start], key=lambda shard: shard.index[1].start or 0)]
        yield parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _by_groups(fetch: Callable, fit: Callable, layout: MeshLayout, number: int) -> list[np.ndarray]:
    """Fetches `number` rows of each group at a time and fits each group's block; returns fields `[G, L, …]`."""
    each, groups = _rows_of_each(layout), math.prod(layout.shards)
    number, parts = min(number, each), []
    for start in range(0, each, number):
        known = max(start + number - each, 0)  # rows that the last call fetches again
        arrays = fetch(np.int32(start - known), number)
        blocks = zip(*(_blocks(array, groups) for array in arrays), strict=True)
        fitted = [fit(*(None if x is None else x[known:] for x in block)) for block in blocks]
        parts.append([np.stack([np.asarray(x) for x in field]) for field in zip(*fitted, strict=True)])
    return _joined(parts)


def _fit_brought(arrays, layout: MeshLayout, options: FitOptions) -> list[np.ndarray]:
    """Fits rows that are copied to the host."""
    dtype = working_dtype(arrays[0].dtype)
    return _by_groups(
        lambda start, number: _some_rows(arrays, start, layout=layout, number=number),
        lambda rows, weights, mask: fit_on_host(rows, weights, mask, options, dtype),
        layout,
        max(1, _BROUGHT // layout.place.length),
    )


@functools.partial(jax.jit, static_argnames=("layout", "number"))
def _some_counts(array, mask, start, *, layout: MeshLayout, number: int) -> Any:
    """Returns `[G · number, 2¹⁶]` how many values of a row have each bit pattern."""

    def part(block, counted, start) -> Any:
        rows, counted = (layout.some_rows(x, start, number) for x in (block, counted))
        counts = pattern_counts(rows, counted)
        return lax.psum(counts, layout.place.value_axes) if layout.place.value_axes else counts

    return layout.run(part, (array, mask), layout.place.of_rows, start)


def _fit_counts(arrays, layout: MeshLayout, options: FitOptions) -> list[np.ndarray]:
    """Fits rows whose bit patterns are counted on the devices."""
    array, _, mask = arrays
    return _by_groups(
        lambda start, number: (_some_counts(array, mask, start, layout=layout, number=number),),
        lambda counts: fit_counted(counts, layout.place.length, options, array.dtype),
        layout,
        _COUNTED_AT_ONCE,
    )


class Known(NamedTuple):
    """What the host knows of rows that devices hold, one row of each group.

    Attributes:
      size: `[G]` int64 number of values that count.
      zero: `[G]` int64 cut just below the value zero.
      unit: `[G]` float64 powers of two, by which values are divided.
      heaviest: `[G]` float64 the largest weight; 1 without weights.
    """

    size: Any
    zero: Any
    unit: Any
    heaviest: Any


@functools.partial(jax.jit, static_argnames=("layout", "options"))
def _searched(arrays, number, *, layout: MeshLayout, options: FitOptions) -> Any:
    """Sorts and searches row `number` of each group.

    Returns what the devices hold of it (`Held`), what the host knows of it (`Known`), no gaps, its partition, and the
    gaps to narrow next with `[G]` whether that is worth a search.
    """
    place, dtype = layout.place, working_dtype(arrays[0].dtype)

    def part(*blocks) -> tuple[Held, Known, Gaps, Partition, tuple[Gaps, Any]]:
        *blocks, number = blocks
        rows, weights, mask = (layout.some_rows(block, number, 1) for block in blocks)
        unit = lax.pmax(row_scale(rows, mask), place.value_axes).astype(jnp.float64)
        rows = jnp.where(jnp.abs(rows) < float(jnp.finfo(dtype).tiny), 0, rows).astype(dtype)
        ordered = sort_long_rows(rows, unit, weights, mask, options.keep_zero, place.value_axes)
        assert isinstance(ordered, ShardedRows)
        heaviest = jnp.ones(1)
        if weights is not None:
            counted = weights if mask is None else jnp.where(mask, weights, 0)
            heaviest = lax.pmax(jnp.max(counted.astype(jnp.float64), axis=1), place.value_axes)
        known = Known(ordered.size, ordered.zero, unit, heaviest)
        found = partition(ordered, options.num_levels, options.keep_zero, options.dense_cuts)
        gaps = no_gaps(ordered, options.num_levels)
        return hold(ordered), known, gaps, found, next_gaps(ordered, found, gaps, options.keep_zero)

    specs = place.of_devices, *[place.of_rows] * 4
    return layout.run(part, arrays, specs, number)


@functools.partial(jax.jit, static_argnames=("place", "options"))
def _searched_again(held: Held, gaps: Gaps, *, place: Place, options: FitOptions) -> Any:
    """Searches rows with narrower gaps; returns their `Held`, their partition, and the gaps to narrow next."""

    def part(held, gaps) -> tuple[Held, Partition, tuple[Gaps, Any]]:
        rows = held_rows(held, place)
        narrowed = rows.with_values(gaps.narrow)
        found = partition(narrowed, options.num_levels, options.keep_zero, options.dense_cuts)
        return hold(narrowed), found, next_gaps(rows, found, gaps, options.keep_zero)

    specs = place.of_devices, place.of_rows, place.of_rows
    return place.run(part, specs[:2], specs)(held, gaps)


@functools.partial(jax.jit, static_argnames=("place", "keep_zero"))
def _polished(held: Held, cuts, *, place: Place, keep_zero: bool) -> Any:
    """Moves cuts `[G, K − 1]` by single values until no combination of small moves is better."""

    def part(held, cuts) -> Any:
        return polish(held_rows(held, place), cuts, keep_zero)

    return place.run(part, (place.of_devices, place.of_rows), place.of_rows)(held, cuts)


@functools.partial(jax.jit, static_argnames=("layout", "keep_zero"))
def _levels(
    arrays, number, held: Held, narrowed: Held, gaps: Gaps, cuts, heaviest, *, layout: MeshLayout, keep_zero: bool
) -> Any:
    """Computes the levels `[G, K]` between cuts of row `number` of each group, and their float64 error `[G]`."""
    place = layout.place

    def part(arrays, number, held, narrowed, gaps, cuts, heaviest) -> tuple[Any, Any]:
        here = held_rows(held, place).part
        levels = gaps.widen(interval_means(held_rows(narrowed, place), cuts, keep_zero))
        levels = (levels * here.unit[:, None]).astype(here.values.dtype)
        rows, weights, mask = (layout.some_rows(block, number, 1) for block in arrays)
        if weights is not None:
            levels = settled(rows, levels, weights, mask, here.unit, keep_zero, place.value_axes)
        there = jnp.arange(here.length) < here.size[:, None]
        values = jnp.where(there, here.values, 0)
        nearest = take(levels, assign(values, levels).astype(jnp.int32))
        away = (values.astype(jnp.float64) - nearest.astype(jnp.float64)) / here.unit[:, None]
        square = away * away
        if here.shares is not None:
            square = square * (here.shares * heaviest[:, None])
        return levels, lax.psum(jnp.sum(jnp.where(there, square, 0.0), axis=1), place.value_axes)

    specs = tuple(None if array is None else layout.spec for array in arrays), PartitionSpec()
    specs = *specs, *[place.of_devices] * 2, *[place.of_rows] * 3
    return place.run(part, specs, place.of_rows)(arrays, number, held, narrowed, gaps, cuts, heaviest)


def _fit_held(arrays, layout: MeshLayout, options: FitOptions) -> list[np.ndarray]:
    """Fits rows that stay distributed, one row of each group at a time."""
    parts = []
    for number in range(_rows_of_each(layout)):
        with x64():
            fitted = _fit_row_held(arrays, number, layout, options)
        parts.append([np.asarray(field)[:, None] for field in fitted])
    return _joined(parts)


def _fit_row_held(arrays, number: int, layout: MeshLayout, options: FitOptions) -> Fit:
    """Fits row `number` of each group."""
    place, keep_zero, to_search = layout.place, options.keep_zero, options._replace(tolerance=None)
    held, *others = _searched(arrays, np.int32(number), layout=layout, options=to_search)
    known, gaps, found, (narrower, worth) = jax.tree.map(np.asarray, others)
    narrowed, unit = held, known.unit
    on_tpu = place.mesh.devices.flat[0].platform == "tpu"  # TPUs cannot find ranks by the bits of a float64
    for _ in range(SEARCHES - 1):
        if options.num_levels == 1 or not worth.any() or on_tpu:
            break
        gaps, unit = chosen(worth, narrower, gaps), np.ones_like(unit)
        narrowed, *others = _searched_again(held, gaps, place=place, options=to_search)
        again, (narrower, next_worth) = jax.tree.map(np.asarray, others)
        found, worth = chosen(worth, again, found), next_worth
    cuts, bound = found.cuts, np.zeros(len(unit))
    if options.tolerance is not None:
        zero, moved = (known.zero.tolist() if keep_zero else [None] * len(unit)), gaps.moves()
        rows = [
            MeshRow(narrowed, place, g, int(known.size[g]), float(unit[g]), zero[g], bool(moved[g]))
            for g in range(len(unit))
        ]
        cuts, bound = prove(rows, found.cuts, options.num_levels, options.tolerance, found.price)
        changed = np.flatnonzero((cuts != found.cuts).any(axis=1))
        if len(changed):
            polished = np.asarray(_polished(narrowed, cuts, place=place, keep_zero=keep_zero))
            for g in changed:
                cuts[g] = better_of(rows[g], polished[g], cuts[g])
    found = held, narrowed, gaps, cuts, known.heaviest
    levels, error = _levels(arrays, np.int32(number), *found, layout=layout, keep_zero=keep_zero)
    bound = bound / gaps.factor**2 * known.heaviest
    return rounded_fit(np.asarray(levels), np.asarray(error), bound, known.unit, working_dtype(arrays[0].dtype))
