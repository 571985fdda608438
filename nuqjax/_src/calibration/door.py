"""`nuqjax.compress`: a tree alone, or with a function and some inputs that tell what its leaves are used for."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.core
import numpy as np

from nuqjax._src.calibration.biases import corrected
from nuqjax._src.calibration.layers import Solved, solved
from nuqjax._src.calibration.measures import Measured, as_numbers, finite, measured
from nuqjax._src.calibration.programs import Programs, Some, checked_batches, example_count, split_off
from nuqjax._src.calibration.second_moments import LeafMoments, Moments, gather_moments, sums_of_uses
from nuqjax.codebook_array import is_codebook_array
from nuqjax.compress import check_arrays, compress_tree, decompress
from nuqjax.plan import LeafPlan, Plan, plan_leaves, replanned
from nuqjax.report import build_report
from nuqjax.rows import ChannelGroups
from nuqjax.rules import Options, Rule, path_name


def compress(
    params: Any,
    bits: int = 4,
    method: str = "knq",
    *,
    granularity="tensor",
    axis: int | Sequence[int] = -1,
    scale=None,
    codebook_format=None,
    keep_zero: bool = False,
    rules: Rule | Sequence[Rule] = (),
    sensitivity: Any = None,
    tolerance: float | None = 1e-6,
    min_size: int = 256,
    return_report: bool = False,
    progress: bool = False,
    fn: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    output: Callable[[Any], Any] | None = None,
) -> Any:
    """Compresses a parameter tree: the same tree, its large floating leaves as `CodebookArray`.

    A leaf is compressed if it is floating, has two or more axes (stack axes not counted) and at least `min_size`
    values, and gets smaller; `plan` shows the choice, the report gives the reason for every leaf left dense, and a
    `Rule` can overrule it. What is no parameter stays dense: Flax's other collections beside "params", and NNX
    variables that are no `Param`. Stacked layers need a `Rule` with `stack_axes`; a sub-tree that looks like some is
    named in a warning, in the plan and in the report. An array that stands at several places is compressed once, and
    the result stands at all of them. The input is never changed; leaves that stay dense are the caller's own arrays, so
    a later change in place of one that NumPy holds changes both trees. Leaves on the host, which NumPy holds or JAX on
    one CPU, are compressed by NumPy, and nothing is compiled for them. Under `jit` (and `jax.eval_shape`) everything
    works but what needs values: NaN cannot be reported, and `AutoQFormat` cannot choose.

    With `fn` and `batches`, some hundred inputs without labels, it is the outputs of the layers that are kept, not the
    weights: at 3 and 4 bits that decides whether a network survives. Each leaf is followed to where `fn` uses it; its
    indices are chosen with error feedback, its levels and scales refitted, both for what it multiplies there, and the
    offsets after it take up the rest (the parts are in `nuqjax.calibration`; guide: docs/calibration.md). Then
    `scale=None` stands for `"channel"` where a codebook is shared by channels (a rule with `scale=None` leaves scales
    out), and axes are those of the use: output axes where `axis` is −1, stack axes where a loop runs through a leaf. A
    fifth of the batches is held out: the report says how far outputs are from the float ones on those.

    Args:
      params: any pytree of arrays: Flax linen variables, NNX modules and states, equinox modules, dicts.
      bits: index width, 1 to 8; a codebook has 2^bits levels.
      method: `"knq"` (global k-means optimum), `"enq"`, `"uniform"`, `"uniform_pow2"`, `"dfp"`, `"normal"`,
        `"quantile"` or `"pow2"`; see `nuqjax.fit`.
      granularity: which values share a codebook: `"tensor"`, `"channel"` (each output channel its own),
        `ChannelGroups(n)` (n neighbouring output channels) or `InputGroups(n)` (runs of n along the other axes of each
        output channel).
      axis: the output axis or axes of a leaf, stack axes not counted: −1 for Flax kernels, several for attention's
        `DenseGeneral`, 0 for `[out, in]` layouts.
      scale: None, `"channel"` or `InputGroups(n)`: the values of a channel (or of a run of n) are divided by their
        largest magnitude before a shared codebook is fitted, in such a way that the leaf's squared error is minimised.
      codebook_format: how levels are stored: None for the leaf's dtype, a floating dtype (such as `jnp.bfloat16` or
        `"float8_e4m3fn"`, into whose range levels saturate), a `QFormat`, or `AutoQFormat(word)`, which chooses each
        leaf's fraction bits to minimise its squared error. Indices are assigned to the rounded levels.
      keep_zero: one level is exactly 0, so that pruned weights stay pruned.
      rules: `Rule`s, or a single one; the first that matches a leaf's path sets its options.
      sensitivity: a tree like `params` of non-negative importances (missing leaves: every value counts the same): the
        squared error of each value is weighted by its own. Not with `fn`.
      tolerance: each `"knq"` fit is proven to be within this share of the least squared error of any levels, and the
        relative gap that is left is reported as `certificate`. None leaves the proof out, and what it costs: on one
        long row up to half the fit's time for 16 levels, on many rows of some thousand values twice it
        (`python -m experiments.benchmark_fit rows channels`); `nuqjax.fit` says what levels are then worth. Under
        `jit`, of arrays that several processes hold, or of levels fitted to `batches`, nothing is proven.
      min_size: leaves with fewer values stay dense.
      return_report: return `(cparams, Report)`; this report has the methods and certificates too.
      progress: show a progress bar.
      fn: `fn(params, *inputs)`, any function that JAX can trace, such as `model.apply`.
      batches: inputs for it, each an array or a tuple of arrays: a sequence, or an iterable that can be gone through
        again.
      output: which of the outputs of `fn` is compared on the batches held out: a function of them; None takes the
        first array.

    Returns:
      The compressed tree, or with `return_report` the pair of it and its `Report`.

    Raises:
      ValueError: no leaf is an array, NaN or infinity in a leaf, an option out of range, an unknown method, a rule that
        matches nothing or is always overruled, a negative or misshaped sensitivity. The message names the leaf. With
        data: no batches, or an iterator; `fn` fails, uses no leaf, or gives what is not finite.

    >>> import jax.numpy as jnp, nuqjax
    >>> params = {"kernel": jnp.linspace(-1, 1, 4096).reshape(64, 64), "bias": jnp.zeros(64)}
    >>> nuqjax.compress(params, bits=4)["kernel"]
    CodebookArray(float32[64, 64], bits=4, granularity='tensor', 2112 bytes)

    With data:

    >>> fn = lambda params, x: x @ params["kernel"] + params["bias"]
    >>> batches = [jnp.sin(jnp.arange(1024.0) * n).reshape(16, 64) for n in (1, 2, 3)]
    >>> cparams, report = nuqjax.compress(params, bits=4, fn=fn, batches=batches, return_report=True)
    >>> cparams["kernel"].scale.shape, report.leaves[1].method
    ((64, 1), 'knq+feedback+refit')
    """
    options = Options(
        bits=bits, method=method, granularity=granularity, axis=axis, scale=scale, codebook_format=codebook_format,
        keep_zero=keep_zero, tolerance=tolerance, min_size=min_size,
    )  # fmt: skip
    if fn is None and batches is None:
        if output is not None:
            raise ValueError("compress: output= is given, but no fn and batches: compress(params, fn=…, batches=…)")
        return compress_tree(params, options, rules, sensitivity, return_report=return_report, progress=progress)
    _check_data(fn, batches, sensitivity, options, params)
    assert fn is not None
    programs = Programs(fn, params, "compress", output)
    cparams, report, notes = _calibrated(programs, batches, options, rules, progress)
    for note in notes:
        warnings.warn(f"compress: {note}", stacklevel=2)
    return (cparams, report()) if return_report else cparams


def _check_data(fn: Any, batches: Any, sensitivity: Any, options: Options, params: Any) -> None:
    call = "nuqjax.compress(params, bits=4, fn=model.apply, batches=batches)"
    if fn is None or batches is None:
        missing, given = ("fn", "batches") if fn is None else ("batches", "fn")
        raise ValueError(f"compress: {given} is given, but no {missing}: {call}")
    if not callable(fn) or callable(getattr(fn, "init", None)):
        raise ValueError(f"compress: fn is a {type(fn).__name__}, but a function fn(params, *inputs) is wanted: {call}")
    if sensitivity is not None:
        raise ValueError("compress: sensitivity and fn are both given: the batches tell what counts; give one of them")
    if options.method != "knq":
        raise ValueError(f'compress: method={options.method!r} with fn, but levels are fitted to data by "knq" only')
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError("compress: with fn and batches values are needed: call it outside of jit")


@contextmanager
def _bars(show: bool) -> Iterator[Callable[[Sequence[Any] | Iterable[Any], str, int], Iterable[Any]]]:
    """A function that shows how far one has come with some work of a known number of steps."""
    if not show:
        yield lambda work, name, count: work
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as bars:
        yield lambda work, name, count: bars.track(work, total=count, description=name)


@dataclass(frozen=True)
class _Counted:
    """Batches whose every pass is shown."""

    batches: Some
    shown: Callable[..., Iterable[Any]]
    name: str

    def __iter__(self) -> Iterator[Any]:
        return iter(self.shown(self.batches, self.name, len(self.batches.numbers)))


def _calibrated(
    programs: Programs, batches: Any, options: Options, rules: Any, progress: bool
) -> tuple[Any, Callable[[], Any], tuple[str, ...]]:
    """The compressed tree, what gives its report, and what to warn of."""
    params = programs.params
    if options.scale is None and (options.granularity == "tensor" or isinstance(options.granularity, ChannelGroups)):
        options = replace(options, scale="channel")
    flat, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_codebook_array)
    leaves = [leaf for _, leaf in flat]
    plans = plan_leaves(params, options, rules)
    check_arrays(leaves, plans)
    batches = checked_batches(batches, programs.caller)
    learn, held = split_off(batches)
    first = next(iter(batches))
    sizes = sums_of_uses(programs, first)
    if not sizes:
        raise ValueError(
            "compress: fn uses no leaf of params in a dot, a convolution or a look-up; params is to be its first "
            "argument: fn(params, *inputs)"
        )
    tied = _tied(flat)
    made: dict[str, Solved] = {}
    reasons: dict[str, str] = {}
    found: dict[str, LeafMoments | str] = {}
    means: Moments | None = None
    with _bars(progress) as shown:
        for group in _groups(plans, sizes, tied):
            learned = _Counted(Some(batches, tuple(learn)), shown, "moments")
            moments = _gathered(programs, learned, group).joined(tied)
            means = moments.without_second() if means is None else means.merged(moments.without_second())
            if len(made) == 0:
                plans = [_as_used(plan, means) for plan in plans]
            work = [n for n, plan in enumerate(plans) if plan.reason is None and plan.path in group]
            for n in shown(work, "leaves", len(work)):
                plan = plans[n]
                same = tied.get(plan.path, (plan.path,))[0]
                if same in made:
                    made[plan.path], found[plan.path] = made[same], found[same]
                    continue
                now = moments.of(plan.path, plan.axes, plan.options.stack_axes)
                found[plan.path] = now
                made[plan.path] = solved(leaves[n], plan, now if isinstance(now, LeafMoments) else None)
            for path in group:  # the matrices of one group at a time
                if isinstance(here := found.get(path), LeafMoments):
                    found[path] = replace(here, second=np.zeros(0), mean=np.zeros(0))
        assert means is not None
        results = [made[plan.path].leaf if plan.reason is None else x for plan, x in zip(plans, leaves, strict=True)]
        cparams, uncorrected = corrected(params, structure.unflatten(results), means)
        score = _measured(programs, cparams, Some(batches, tuple(held)), shown) if held else None
    for plan in plans:
        if plan.reason is not None:
            reasons[plan.path] = plan.reason
    notes = (*Plan(tuple(plans)).notes, *_few(found, plans))
    examples = [example_count(batch) for batch in batches]
    told = _Told(
        sum(examples[n] for n in learn),
        sum(examples[n] for n in held),
        score,
        {path: text for path, text in found.items() if isinstance(text, str)},
        uncorrected,
        {path: one.errors for path, one in made.items() if one.errors},
    )

    def report() -> Any:
        fits = {path: (one.method, one.certificate) for path, one in made.items()}
        whole = build_report(params, cparams, reasons, fits, (*notes, *told.lines()))
        return replace(whole, calibration=told.numbers())

    return cparams, report, notes


@dataclass(frozen=True)
class _Told:
    """What the report says of the data."""

    learned: int
    held: int
    score: Measured | None
    alone: Mapping[str, str]
    uncorrected: Mapping[str, str]
    errors: Mapping[str, Mapping[str, float]]

    def lines(self) -> list[str]:
        """In words."""
        lines = [f"levels, scales and indices were fitted to {self.learned} examples"]
        if self.score is not None:
            lines.append(f"on {self.held} examples that were held out, beside the float outputs: {self.score}")
        else:
            lines.append("nothing was measured: with two batches or more, some are held out")
        lines += [f"{path}: by its weights alone: {why}" for path, why in self.alone.items()]
        lines += [f"{path}: the mean of its output is not corrected: {why}" for path, why in self.uncorrected.items()]
        return lines

    def numbers(self) -> dict[str, Any]:
        """As plain numbers and strings."""
        return {
            "examples": self.learned,
            "held_out": self.held,
            "measured": None if self.score is None else as_numbers(self.score),
            "by_weights_alone": dict(self.alone),
            "uncorrected": dict(self.uncorrected),
            "layer_errors": {path: dict(errors) for path, errors in self.errors.items()},
        }


def _gathered(programs: Programs, batches: Any, group: frozenset[str]) -> Moments:
    """The moments of some leaves, with float outputs known to be finite."""

    def check(number: int, batch: Any, outputs: Sequence[Any]) -> None:
        finite(programs.compared(batch, outputs), f"batch {number} and the parameters as they are", programs.caller)

    return gather_moments(programs, batches, wanted=group.__contains__, seen=check)


def _measured(programs: Programs, cparams: Any, held: Some, shown: Callable[..., Iterable[Any]]) -> Measured:
    dense = decompress(cparams)

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in shown(held, "measured on what was held out", len(held.numbers)):
            yield tuple(
                finite(programs.outputs(tree, batch), f"{what} parameters", programs.caller)
                for tree, what in ((programs.params, "the float"), (dense, "the compressed"))
            )  # pyright: ignore[reportReturnType]

    return measured(pairs())


def _tied(flat: Sequence[tuple[Any, Any]]) -> dict[str, tuple[str, ...]]:
    """By path, all the paths at which the same array stands, where there are several."""
    places: dict[int, list[str]] = {}
    for path, leaf in flat:
        if hasattr(leaf, "shape"):
            places.setdefault(id(leaf), []).append(path_name(path))
    return {path: tuple(paths) for paths in places.values() if len(paths) > 1 for path in paths}


def _groups(
    plans: Sequence[LeafPlan], sizes: Mapping[str, int], tied: Mapping[str, Sequence[str]]
) -> list[frozenset[str]]:
    """The leaves whose moments are held in memory together: all that is compressed, mostly."""
    groups: list[set[str]] = [set()]
    room, seen = _MOMENT_VALUES, set()
    for plan in plans:
        if plan.path in seen:
            continue
        together = {plan.path, *tied.get(plan.path, ())}
        seen |= together
        size = sum(sizes.get(path, 0) for path in together) if plan.reason is None else 0
        if size > room and groups[-1]:
            groups.append(set())
            room = _MOMENT_VALUES
        room -= size
        groups[-1] |= together
    return [frozenset(group) for group in groups]


_MOMENT_VALUES = 2**27  # a gigabyte in float64


def _as_used(plan: LeafPlan, moments: Moments) -> LeafPlan:
    """The plan with the axes that the function's use shows, where the user has said nothing of them."""
    if plan.reason is not None:
        return plan
    options, shown = plan.options, moments.axes(plan.path)
    if shown is None:
        stacked = len(plan.shape) > 1 and plan.path in {slot.name for slot in moments.slots}
        if stacked and options.skip is not False:
            return replace(plan, reason="it is an offset, which takes corrections", nbytes_after=plan.nbytes_before)
        return plan
    axes, stack = shown
    if options.stack_axes == 0 and stack and options.skip is not False:
        options = replace(options, stack_axes=stack)
    if options.axis == -1:
        axes = axes if options.stack_axes == stack else tuple(a + stack - options.stack_axes for a in axes)
        axes = axes if all(a >= 0 for a in axes) else tuple(a for a in axes if a >= 0)
        options = replace(options, axis=axes)
    return replanned(plan, options)


def _few(found: Mapping[str, LeafMoments | str], plans: Sequence[LeafPlan]) -> list[str]:
    """Which layers have far more inputs than these examples can tell apart."""
    worst: tuple[float, str] | None = None
    for plan in plans:
        here = found.get(plan.path)
        if not isinstance(here, LeafMoments) or here.look_up or plan.reason is not None:
            continue
        shape = plan.slice_shape
        inputs = int(np.prod([n for a, n in enumerate(shape) if a not in plan.axes]))
        places = min(max(here.positions, 1), 16)
        if inputs > 4 * here.images * places:
            wanted = int(np.ceil(inputs / (4 * places)))
            worst = max(worst or (0, ""), (wanted, f"{plan.path} has {inputs} inputs, seen in {here.images} examples"))
    return [f"{worst[1]}: {int(worst[0])} or more would tell them apart better"] if worst else []
