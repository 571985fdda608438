"""Means and second moments of what each leaf multiplies, along the leaf's own axes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from nuqjax._src.calibration.programs import Programs, checked_batches, example_count, fingerprint, shapes_of
from nuqjax._src.calibration.uses import Bias, Recorder, Slice, Sums, Use, run
from nuqjax._src.leaf import rows
from nuqjax._src.trace.interpret import Site


@dataclass(frozen=True)
class LeafMoments:
    """Moments of what a leaf multiplies; the leaf is seen as `[O, I]`, output channels by inputs in the leaf's order.

    Attributes:
      second: `[*S, G, I, I]` float64, E[x xᵀ], minus μμᵀ if an offset after the layer can correct the error of the
        mean. Rows g·O/G to (g + 1)·O/G share a matrix (G is the number of groups of a grouped convolution, O of a
        depthwise one, else mostly 1). For very many inputs `[*S, G, B, I/B, I/B]`, the moments within B stretches of
        inputs, or `[*S, G, I]`, the diagonal alone, as for look-ups.
      mean: `[*S, G, I]` float64, μ = E[x].
      axes: the output axes of a slice, as the function uses it.
      stack_axes: the number of leading axes that a loop runs through.
      images: the number of examples seen.
      positions: the number of positions taken from each example.
      look_up: whether the leaf is a table with entries to look up; the moments are then counts.
      uses: the places in the program where the leaf is used.
    """

    second: np.ndarray
    mean: np.ndarray
    axes: tuple[int, ...]
    stack_axes: int
    images: int
    positions: float
    look_up: bool
    uses: tuple[str, ...]

    @property
    def is_diagonal(self) -> bool:
        """Whether only the diagonal of the second moments is known."""
        return self.second.ndim == self.mean.ndim

    def without_values(self) -> "LeafMoments":
        """Returns a copy with empty arrays, which takes little memory."""
        return replace(self, second=np.zeros(0), mean=np.zeros(0))


class Record(NamedTuple):
    """Sums for a use over all batches: `first [N·B, I]`, `second [N·B, S, I/S, I/S]` or `[N·B, I]` or None; float64.

    If `second` are sums of f xᵀ, `exact [N·B, I]` are sums of f, else it is None.
    """

    use: Use
    count: int
    first: np.ndarray
    second: np.ndarray | None
    exact: np.ndarray | None = None

    @property
    def mean(self) -> np.ndarray:
        """E[x], `[N·B, I]`."""
        return self.first / max(self.count, 1)

    @property
    def exact_mean(self) -> np.ndarray:
        """E[f] if `second` are sums of f xᵀ, else E[x]; `[N·B, I]`."""
        return self.mean if self.exact is None else self.exact / max(self.count, 1)

    @property
    def diagonal(self) -> np.ndarray:
        """E[x²] (or E[f x]), `[N·B, I]`."""
        assert self.second is not None
        found = np.einsum("nsii->nsi", self.second) if self.use.stretches else self.second
        return found.reshape(self.first.shape) / max(self.count, 1)


@dataclass(frozen=True)
class Moments(Mapping[str, LeafMoments | str]):
    """A mapping from the path of each floating leaf to its `LeafMoments`, or to the reason why it has none.

    Attributes:
      shapes: by path, the shape of the leaf.
      records: by path, the sums for each use of the leaf.
      biases: the leaves that are added to the outputs of others.
      others: by path, the uses that are not understood.
      images: the number of examples seen.
      seen: the fingerprints of the batches seen.
    """

    shapes: Mapping[str, tuple[int, ...]]
    records: Mapping[str, Sequence[Record]]
    biases: Sequence[Bias]
    others: Mapping[str, Sequence[str]]
    images: int
    seen: frozenset[str] = frozenset()

    def __getitem__(self, path: str) -> LeafMoments | str:
        return self.of(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def axes(self, path: str) -> tuple[tuple[int, ...], int] | None:
        """Returns the output axes of a slice of the leaf and its number of stack axes, by its uses; None if unused."""
        records = self.records.get(path, ())
        main = next((r for r in records if r.use.stretches), records[0] if records else None)
        return None if main is None else _axes(main.use, self.shapes[path])

    def of(self, path: str, axes: Sequence[int] | None = None, stack_axes: int | None = None) -> LeafMoments | str:
        """Returns the moments of a leaf, for the given output and stack axes, or else for those that its uses show.

        Raises:
          KeyError: there is no such leaf.
        """
        shape, records = self.shapes[path], self.records.get(path, ())
        shown = self.axes(path)
        if shown is None:
            whys = self.others.get(path, ())
            return f"it enters no dot, convolution or look-up{': ' + ', '.join(whys[:3]) if whys else ' of fn'}"
        axes = tuple(shown[0] if axes is None else axes)
        stack_axes = shown[1] if stack_axes is None else stack_axes
        return _leaf_moments(shape, axes, stack_axes, records, self._repaired(), self.images)

    def joined(self, tied: Mapping[str, Sequence[str]]) -> "Moments":
        """Returns the moments for tied paths, which hold the same array: each gets the uses at all of them."""
        together = {
            path: [r for name in dict.fromkeys(paths) for r in self.records.get(name, ())]
            for path, paths in tied.items()
        }
        return replace(self, records={**self.records, **{path: found for path, found in together.items() if found}})

    def without_second(self) -> "Moments":
        """Returns a copy that has the means only."""
        records = {path: [r._replace(second=None) for r in some] for path, some in self.records.items()}
        return replace(self, records=records)

    def _repaired(self) -> frozenset[Use]:
        """Returns the uses followed by an offset that can correct their mean and corrects no other use."""
        found: dict[str, list[Use]] = {}
        for bias in self.biases:
            found.setdefault(bias.name, []).extend(use for use, _ in bias.uses)
        return frozenset(use for uses in found.values() if len(uses) == 1 for use in uses)


def moments(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    positions: int = 64,
    widest: int = 4096,
) -> Moments:
    """Computes means and second moments of what each leaf of the parameters multiplies in `fn(params, *inputs)`.

    Each leaf is followed through casts, transposes, reshapes, slices, calls and loops to every dot, convolution and
    look-up that it enters; several uses of a leaf add up. Batches are streamed, and `fn` is compiled once for each
    shape. Sums are float32 within a batch and float64 over batches, so the split into batches affects rounding only.

    Args:
      fn: a function that JAX can trace.
      params: its first argument: any tree of dense arrays.
      batches: inputs, each an array or a tuple of arrays; an iterable that can be iterated over more than once.
      positions: the largest number of positions, on a lattice, to take from an example in each layer.
      widest: the largest number of inputs between which to take second moments; a layer with more inputs has its
        moments within stretches of them.

    Returns:
      `Moments`: by path, `LeafMoments`, or the reason why there are none.

    Raises:
      ValueError: there are no batches, `fn` fails, or it computes values that are not finite.

    >>> import jax.numpy as jnp
    >>> found = moments(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, [jnp.array([[1.0, 2.0], [3.0, 4.0]])])
    >>> found["w"].second.tolist()  # no bias could repair the mean's part, so that it is counted
    [[[5.0, 7.0], [7.0, 10.0]]]
    """
    batches = checked_batches(batches, "moments")
    return gather_moments(Programs(fn, params, "moments"), batches, positions=positions, widest=widest)


def gather_moments(
    programs: Programs,
    batches: Iterable[Any],
    *,
    positions: int = 64,
    widest: int = 4096,
    wanted: frozenset[str] | None = None,
    seen: Callable[[int, Any, Sequence[Any]], None] = lambda number, batch, outputs: None,
) -> Moments:
    """Computes `moments` for a program.

    Args:
      programs: the function and its parameters.
      batches: the inputs.
      positions: as in `moments`.
      widest: as in `moments`.
      wanted: the leaves with second moments; the others get means only. None for all leaves.
      seen: a function that is called with each batch's number, the batch and the outputs.
    """

    def program_of(batch: Any) -> tuple[Any, Recorder]:
        key = programs.key(batch), wanted, positions, widest
        if key not in programs.collectors:
            needs = (lambda name: True) if wanted is None else wanted.__contains__
            made = Recorder(needs, example_count(batch), positions, widest)
            programs.collectors[key] = _compile(programs, batch, made), made
        program, made = programs.collectors[key]
        return lambda: program(*programs.arrays(programs.params, batch)), made

    return gathered(programs, batches, program_of, seen)[0]


def gathered(
    programs: Programs,
    batches: Iterable[Any],
    program_of: Callable[[Any], tuple[Any, Recorder]],
    seen: Callable[[int, Any, Sequence[Any]], None] = lambda number, batch, outputs: None,
) -> list[Moments]:
    """Returns the sums over all batches: `Moments`, and for pairs those with the cross moments and the exact means."""
    totals: list[list[Record]] = []
    first, recorder, images, prints = None, None, 0, []
    for number, batch in enumerate(batches):
        first = batch if number == 0 else first
        run_program, made = program_of(batch)
        outputs, sums = run_program()
        added = [_records(use, count, sums_of) for (use, count, _), sums_of in zip(made.records, sums, strict=True)]
        for record in (record for records in added for record in records):
            if not all(np.isfinite(x).all() for x in (record.first, record.second) if x is not None):
                raise ValueError(
                    f"{programs.caller}: batch {number} ({shapes_of(batch)}): what {record.use.name} multiplies at "
                    f"{record.use.site} is not finite, or its squares are not"
                )
        if recorder is None:
            recorder, totals = made, added
        else:
            if [(r[0].use.name, r[0].use.sizes) for r in totals] != [(r[0].use.name, r[0].use.sizes) for r in added]:
                raise ValueError(
                    f"{programs.caller}: with batch {number} ({shapes_of(batch)}) fn uses its parameters in other ways "
                    "than with the first one; give batches for which it does the same"
                )
            totals = [
                [_joined(old, new) for old, new in zip(olds, news, strict=True)]
                for olds, news in zip(totals, added, strict=True)
            ]
        images += example_count(batch)
        prints.append(fingerprint(batch))
        seen(number, batch, outputs)
    assert recorder is not None
    shapes = {
        name: tuple(x.shape)
        for name, (_, x) in zip(programs.names(first), programs.traced(first).arrays, strict=True)
        if name is not None
    }
    result = []
    for kind in zip(*totals, strict=True) if totals else [()]:
        records: dict[str, list[Record]] = {}
        for record in kind:
            records.setdefault(record.use.name, []).append(record)
        result.append(Moments(shapes, records, tuple(recorder.biases), recorder.others, images, frozenset(prints)))
    return result


def sums_of_uses(programs: Programs, batch: Any, widest: int = 4096) -> dict[str, int]:
    """Returns by path the number of values in the second moments of a leaf, from shapes alone."""
    recorder = Recorder(lambda name: True, example_count(batch), 64, widest)
    names, jaxpr = programs.names(batch), programs.traced(batch).jaxpr
    jax.eval_shape(lambda *arrays: run(jaxpr, arrays, names, recorder), *programs.arrays(programs.params, batch))
    sizes: dict[str, int] = {}
    for use, _, sums in recorder.records:
        sizes[use.name] = sizes.get(use.name, 0) + sums.second.size
    return sizes


def _compile(programs: Programs, batch: Any, recorder: Recorder) -> Any:
    names, jaxpr = programs.names(batch), programs.traced(batch).jaxpr

    def collect(*arrays) -> tuple[list[Any], list[Sums]]:
        outputs = run(jaxpr, arrays, names, recorder)
        return outputs, [sums for _, _, sums in recorder.records]

    return jax.jit(collect).lower(*programs.arrays(programs.params, batch)).compile()


def _records(use: Use, count: int, sums: Sums) -> list[Record]:
    """Returns the sums on the host in float64, with `[*, B, …]` reshaped to `[N·B, …]`; three records for a pair."""

    def flat(array: Any, axes: int) -> np.ndarray:
        array = np.asarray(array, np.float64)
        return array.reshape(-1, *array.shape[array.ndim - axes :])

    second, cross = (None if x is None else flat(x, 3 if use.stretches else 1) for x in (sums.second, sums.cross))
    first = flat(sums.first, 1)
    if sums.exact is None:
        return [Record(use, count, first, second)]
    exact = flat(sums.exact, 1)
    return [Record(use, count, first, second), Record(use, count, first, cross, exact), Record(use, count, exact, None)]


def _joined(old: Record, new: Record) -> Record:
    second = None if old.second is None or new.second is None else np.add(old.second, new.second, out=old.second)
    exact = None if old.exact is None or new.exact is None else old.exact + new.exact
    return Record(old.use, old.count + new.count, old.first + new.first, second, exact)


def _axes(use: Use, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Returns the output axes of a slice, and the number of leading axes that loops run through."""
    depth = sum(isinstance(move, Slice) for move in use.moves)
    entries = use.entries(shape)

    def varying(line: np.ndarray) -> set[int]:
        return {a for a, c in enumerate(np.unravel_index(line, shape)) if c.size and (c != c.flat[0]).any()}

    inputs, steps = varying(entries[0, 0, 0]), varying(entries[:, 0, 0, 0])
    stack = depth if depth and steps <= set(range(depth)) and not inputs & set(range(depth)) else 0
    outputs = varying(entries[:, :, :, 0]) - inputs - set(range(stack))
    others = [a for a in range(stack, len(shape)) if a not in inputs and a not in outputs]
    if not outputs and others:  # a single output: take the last axis of length 1
        outputs = {others[-1]}
    return tuple(sorted(a - stack for a in outputs)), stack


def _placed(use: Use, shape: Sequence[int], axes: Sequence[int], stack: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns which rows and inputs of a leaf the entries of a use are.

    The rows are `[N·B, O]` (slice · O + output channel), the inputs `[N·B, I]`. The result is None if the entries do
    not form rows and inputs of the leaf, because the use has other axes as its inputs.
    """
    slice_shape = tuple(shape[stack:])
    number = np.arange(math.prod(shape)).reshape(-1, *slice_shape)
    order = np.stack([rows.to_channels(one, axes) for one in number])
    place = np.empty(order.size, np.int64)
    place[order.reshape(-1)] = np.arange(order.size)
    entries = use.entries(shape)
    found = place[entries.reshape(-1, *entries.shape[2:])]
    row, column = np.divmod(found, order.shape[-1])
    if (row != row[:, :, :1]).any() or (column != column[:, :1]).any():
        return None
    return row[:, :, 0], column[:, 0]


def _leaf_moments(
    shape: Sequence[int],
    axes: Sequence[int],
    stack: int,
    records: Sequence[Record],
    repaired: frozenset[Use],
    images: int,
) -> LeafMoments | str:
    outputs, inputs = rows.channel_shape(shape[stack:], axes)
    slices = math.prod(shape[:stack])
    label, parts, spread = [], [], 0.0
    total = sum(record.count for record in records)
    for record in records:
        share = record.count / total if total else 0.0
        placed = _placed(record.use, shape, axes, stack)
        if placed is None:
            spread += share * float(record.diagonal.mean())
            continue
        row, column = placed
        second, diagonal, mean = record.second, record.diagonal, record.mean
        assert second is not None
        second = second / max(record.count, 1)
        exact = record.exact_mean
        if len(row) > 1 and (row == row[0]).all() and (column == column[0]).all():  # copies of the same rows
            row, column = row[:1], column[:1]
            second, diagonal = second.sum(axis=0)[None], diagonal.sum(axis=0)[None]
            mean, exact = mean.mean(axis=0)[None], exact.mean(axis=0)[None]
        if np.bincount(row.reshape(-1)).max() > 1:
            return "the same weights meet several inputs in one use"
        if record.use in repaired:
            diagonal = diagonal - exact * mean
            if record.use.stretches:
                left, right = exact.reshape(second.shape[:-1]), mean.reshape(second.shape[:-1])
                second = second - left[..., :, None] * right[..., None, :]
        of_row = np.full(slices * outputs, -1)
        of_row[row] = np.arange(len(row))[:, None]
        label.append(of_row)
        parts.append((column, second, diagonal, mean, share, record.use.stretches))
    if not parts:
        return f"it is used along other axes than its output axes {tuple(axes)}"
    labels = np.stack(label).reshape(len(label), slices, outputs)
    ends = np.flatnonzero((labels[:, :, 1:] != labels[:, :, :-1]).any(axis=(0, 1))) + 1
    block = math.gcd(outputs, *ends.tolist())
    groups = outputs // block
    stretches = {part[-1] for part in parts}
    kind = stretches.pop() if len(stretches) == 1 else 0
    if kind > 1 and any((column != np.arange(inputs)).any() for column, *_ in parts):
        kind = 0  # stretches of the operand's inputs are not stretches of the leaf's
    if kind and slices * groups * inputs**2 // kind > MOST_VALUES:
        kind = 0
    size = inputs // max(kind, 1)
    made = np.zeros((slices, groups, kind, size, size) if kind else (slices, groups, inputs))
    means = np.zeros((slices, groups, inputs))
    for of_row, (column, second, diagonal, mean, share, _) in zip(label, parts, strict=True):
        first_rows = of_row.reshape(slices, outputs)[:, ::block]
        for s, g in np.ndindex(slices, groups):
            part = first_rows[s, g]
            if part < 0:
                continue
            where = column[part]
            means[s, g, where] += share * mean[part]
            if kind == 1:
                made[s, g, 0][np.ix_(where, where)] += share * second[part, 0]
            elif kind:
                made[s, g] += share * second[part]
            else:
                made[s, g, where] += share * diagonal[part]
    if kind:
        made[..., np.arange(size), np.arange(size)] += spread
        made = made[:, :, 0] if kind == 1 else made
    else:
        made += spread
    stacked = tuple(shape[:stack])
    return LeafMoments(
        made.reshape(*stacked, *made.shape[1:]),
        means.reshape(*stacked, *means.shape[1:]),
        tuple(axes),
        stack,
        images,
        max(record.count for record in records) / max(images, 1),
        all(record.use.site.primitive == "gather" for record in records),
        tuple(_named(record.use.site) for record in records),
    )


MOST_VALUES = 2**27
"""Values of the second moments of one leaf above which only their diagonal is kept: a gigabyte."""


def _named(site: Site) -> str:
    return f"{site.primitive} at {site.scope}" if site.scope else site.primitive
