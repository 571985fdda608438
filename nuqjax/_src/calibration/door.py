"""`nuqjax.compress`: a tree alone, or with a function and some inputs that tell what its leaves are used for."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.core
import numpy as np

from nuqjax._src.calibration.biases import corrected
from nuqjax._src.calibration.layers import Solved, solved
from nuqjax._src.calibration.layouts import as_used, with_scales
from nuqjax._src.calibration.measures import Measured, as_numbers, finite, measured
from nuqjax._src.calibration.programs import Programs, Some, checked_batches, example_count, split_off
from nuqjax._src.calibration.second_moments import LeafMoments, Moments, gather_moments, sums_of_uses
from nuqjax._src.calibration.widths import Allocation, allocated, parse_budget, replanned_to, sensitivities
from nuqjax.codebook_array import is_codebook_array
from nuqjax.compress import check_arrays, compress_tree, decompress
from nuqjax.plan import LeafPlan, Plan, plan_leaves
from nuqjax.report import build_report
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
    budget: int | str | None = None,
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
    fifth of the batches is held out: the report says how far outputs are from the float ones on those. With a `budget`
    each leaf has a width of its own: what each costs the outputs is measured on inputs that are held out, too.

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
      budget: in place of `bits`: `"3bpw"` (bits a weight of all that is counted), bytes, or `"kl=0.05"` (nats of
        divergence of the outputs); leaves get 2 to 8 bits. The report has them as rules, and what they were predicted
        to cost.

    Returns:
      The compressed tree, or with `return_report` the pair of it and its `Report`.

    Raises:
      ValueError: no leaf is an array, NaN or infinity in a leaf, an option out of range, an unknown method, a rule that
        matches nothing or is always overruled, a negative or misshaped sensitivity. The message names the leaf. With
        data: no batches, or an iterator; `fn` fails, uses no leaf, or gives what is not finite; a budget out of reach.

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
        for name, given in (("output", output), ("budget", budget)):
            if given is not None:
                raise ValueError(f"compress: {name}= needs data: compress(params, {name}=…, fn=…, batches=…)")
        return compress_tree(params, options, rules, sensitivity, return_report=return_report, progress=progress)
    _check_data(fn, batches, sensitivity, options, params)
    assert fn is not None
    programs = Programs(fn, params, "compress", output)
    cparams, report, notes = _calibrated(programs, batches, options, rules, budget, progress)
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
    programs: Programs, batches: Any, options: Options, rules: Any, budget: Any, progress: bool
) -> tuple[Any, Callable[[], Any], tuple[str, ...]]:
    """The compressed tree, what gives its report, and what to warn of."""
    params, options = programs.params, with_scales(options)
    flat, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_codebook_array)
    leaves = [leaf for _, leaf in flat]
    planned = plan_leaves(params, options, rules)
    check_arrays(leaves, planned)
    batches = checked_batches(batches, programs.caller)
    split = split_off(batches, thirds=budget is not None)
    if budget is not None:
        parse_budget(budget)
        if not split.tried:
            raise ValueError("compress: a budget needs two batches or more: some are held out to measure on")
    learned = _Learned(programs, Some(batches, split.learned), planned, _tied(flat))
    allocation = None
    with _bars(progress) as shown:
        if budget is not None:
            table: dict[str, dict[int, float]] = {}
            for group, moments in learned.groups(shown):
                plans = [plan if plan.path in group else _left(plan) for plan in learned.plans(moments)]
                table |= sensitivities(programs, Some(batches, split.tried), moments, plans, (2, 3), shown)
            used = learned.plans(learned.means)
            allocation = allocated(planned, used, table, budget, options)
            learned.bits = allocation.bits
        made: dict[str, Solved] = {}
        plans_of: dict[str, Options] = {}
        found: dict[str, LeafMoments | str] = {}
        for group, moments in learned.groups(shown):
            plans = learned.plans(moments)
            work = [n for n, plan in enumerate(plans) if plan.reason is None and plan.path in group]
            for n in shown(work, "leaves", len(work)):
                plan = plans[n]
                same = learned.tied.get(plan.path, (plan.path,))[0]
                if same not in made or repr(plan.options) != repr(plans_of[same]):
                    here = moments.of(plan.path, plan.axes, plan.options.stack_axes)
                    found[plan.path] = here if isinstance(here, str) else here.without_values()
                    made[plan.path] = solved(leaves[n], plan, None if isinstance(here, str) else here)
                else:
                    made[plan.path], found[plan.path] = made[same], found[same]
                plans_of[plan.path] = plan.options
        plans = learned.plans(learned.means)
        results = [made[plan.path].leaf if plan.reason is None else x for plan, x in zip(plans, leaves, strict=True)]
        cparams, uncorrected = corrected(params, structure.unflatten(results), learned.means)
        score = _measured(programs, cparams, Some(batches, split.measured), shown) if split.measured else None
    notes = (*Plan(tuple(plans)).notes, *_few(found, plans))
    told = _Told(
        learned.means.images,
        _examples(Some(batches, split.tried)) if budget is not None else 0,
        _examples(Some(batches, split.measured)),
        split.tried == split.measured,
        score,
        allocation,
        {path: text for path, text in found.items() if isinstance(text, str)},
        uncorrected,
        {path: one.errors for path, one in made.items() if one.errors},
    )

    def report() -> Any:
        fits = {path: (one.method, one.certificate) for path, one in made.items()}
        reasons = {plan.path: plan.reason for plan in plans if plan.reason is not None}
        whole = build_report(params, cparams, reasons, fits, (*notes, *told.lines()))
        return replace(whole, calibration=told.numbers())

    return cparams, report, notes


@dataclass
class _Learned:
    """The moments of the leaves, as many leaves at a time as memory holds.

    Attributes:
      programs: the function.
      batches: what is learned from.
      planned: the leaves, as the user's options say.
      tied: by path, all the paths at which the same array stands, where there are several.
      bits: of the leaves, where a budget has decided.
      means: of all leaves of which there have been moments.
    """

    programs: Programs
    batches: Some
    planned: Sequence[LeafPlan]
    tied: Mapping[str, Sequence[str]]
    bits: Mapping[str, int] = field(default_factory=dict)
    means: Any = None
    _only: Any = None

    def groups(self, shown: Callable[..., Iterable[Any]]) -> Iterator[tuple[frozenset[str], Moments]]:
        """Leaves and their moments. A single group's are kept, those of several gathered anew each time."""
        if self._only is not None:
            yield self._only
            return
        sizes = sums_of_uses(self.programs, next(iter(self.batches)))
        if not sizes:
            raise ValueError(
                "compress: fn uses no leaf of params in a dot, a convolution or a look-up; params is to be its first "
                "argument: fn(params, *inputs)"
            )
        groups = _groups(self.planned, sizes, self.tied)
        for group in groups:
            moments = self._gathered(_Counted(self.batches, shown, "moments"), group).joined(self.tied)
            means = moments.without_second()
            self.means = means if self.means is None else self.means.merged(means)
            if len(groups) == 1:
                self._only = group, moments
            yield group, moments

    def plans(self, moments: Moments) -> list[LeafPlan]:
        """The leaves' plans, with the axes that moments show and the bits that a budget gives."""
        used = [as_used(plan, moments) for plan in self.planned]
        return [replanned_to(p, self.bits[p.path]) if p.path in self.bits and p.reason is None else p for p in used]

    def _gathered(self, batches: Any, group: frozenset[str]) -> Moments:
        def check(number: int, batch: Any, outputs: Sequence[Any]) -> None:
            what = f"batch {number} and the parameters as they are"
            finite(self.programs.compared(batch, outputs), what, self.programs.caller)

        return gather_moments(self.programs, batches, wanted=group.__contains__, seen=check)


def _left(plan: LeafPlan) -> LeafPlan:
    return replace(plan, reason="in another group") if plan.reason is None else plan


def _examples(batches: Some) -> int:
    return sum(example_count(batch) for batch in batches)


@dataclass(frozen=True)
class _Told:
    """What the report says of the data."""

    learned: int
    tried: int
    held: int
    same: bool
    score: Measured | None
    allocation: Allocation | None
    alone: Mapping[str, str]
    uncorrected: Mapping[str, str]
    errors: Mapping[str, Mapping[str, float]]

    def lines(self) -> list[str]:
        """In words."""
        lines = [f"levels, scales and indices were fitted to {self.learned} examples"]
        if self.allocation is not None:
            lines.append(
                f"bits were allocated by {self.tried} others: predicted KL {self.allocation.predicted:.4g} nats"
            )
        if self.score is not None:
            which = "the same" if self.same and self.allocation is not None else "that were held out"
            lines.append(f"on {self.held} examples {which}, beside the float outputs: {self.score}")
        else:
            lines.append("nothing was measured: with two batches or more, some are held out")
        lines += [f"{path}: by its weights alone: {why}" for path, why in self.alone.items()]
        lines += [f"{path}: the mean of its output is not corrected: {why}" for path, why in self.uncorrected.items()]
        return lines

    def numbers(self) -> dict[str, Any]:
        """As plain numbers and strings."""
        return {
            "examples": self.learned,
            "tried": self.tried,
            "held_out": self.held,
            "measured": None if self.score is None else as_numbers(self.score),
            "predicted": None if self.allocation is None else self.allocation.predicted,
            "rules": [] if self.allocation is None else [repr(rule) for rule in self.allocation.rules],
            "by_weights_alone": dict(self.alone),
            "uncorrected": dict(self.uncorrected),
            "layer_errors": {path: dict(errors) for path, errors in self.errors.items()},
        }


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
