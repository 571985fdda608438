"""The flow with data: split the batches, gather moments, choose widths, solve leaf by leaf, correct biases, measure."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from nuqjax._src.calibration.biases import corrected
from nuqjax._src.calibration.layers import Solved, solved
from nuqjax._src.calibration.layouts import as_used, with_scales
from nuqjax._src.calibration.measures import Measured, as_numbers, finite, measured
from nuqjax._src.calibration.pairs import NotMapped
from nuqjax._src.calibration.programs import Programs, Some, checked_batches, example_count, split_off
from nuqjax._src.calibration.progress import Counted, bars
from nuqjax._src.calibration.second_moments import LeafMoments, Moments, gather_moments, sums_of_uses
from nuqjax._src.calibration.sequential import solved_in_order
from nuqjax._src.calibration.stages import form_of
from nuqjax._src.calibration.widths import Goal, allocated, loss_of_one, replanned_to, sensitivities
from nuqjax._src.compress.compress import check_arrays
from nuqjax._src.compress.plan import LeafPlan, Plan, plan_leaves
from nuqjax._src.compress.rules import Options, Rule
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.codebooks import decompress
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.store.compared import build_report
from nuqjax._src.store.store import file_sizes

Once = Callable[[Any, Callable[[], Any]], Any]
"""Returns what the function makes, or what was kept for the key that comes before it."""


def _at_once(key: Any, make: Callable[[], Any]) -> Any:
    return make()


def calibrated(
    programs: Programs,
    batches: Any,
    options: Options,
    rules: Any,
    goal: Goal | None,
    progress: bool,
    once: Once = _at_once,
) -> tuple[Any, Callable[[], Any], tuple[str, ...]]:
    """Returns a compressed tree, a function that makes its report, and the warnings.

    Args:
      programs: the function and the dense tree.
      batches: inputs of the function.
      options: the user's options.
      rules: the user's rules.
      goal: the budget or rate that decides the bits of each leaf; None leaves this to the options and rules.
      progress: whether to show progress bars.
      once: keeps finished parts. Keys are unique within a call.
    """
    options = with_scales(options)
    flat, structure = jax.tree_util.tree_flatten_with_path(programs.params, is_leaf=is_codebook_array)
    leaves = [leaf for _, leaf in flat]
    planned = plan_leaves(programs.params, options, rules)
    check_arrays(leaves, planned)
    if goal is not None and goal.kind == "rate":
        _check_rated(planned)
    batches = checked_batches(batches, programs.caller)
    split = split_off(batches, thirds=goal is not None)
    if goal is not None and not split.tried:
        raise ValueError(f"compress: {goal.text} needs two batches or more: some are held out to measure on")
    learned = _Learned(programs, Some(batches, split.learned), planned, leaves, _tied(flat), once)
    allocation, rates, predicted = None, None, None
    with bars(progress) as shown:
        if goal is None:
            made, found = learned.solved(shown)
        else:
            table, prices = learned.sensitivities(Some(batches, split.tried), shown)
            if split.tried != split.measured:  # the tried batches are no longer held out: learn from them, too
                learned = learned.of_more(Some(batches, tuple(sorted(split.learned + split.tried))), shown)
            if goal.kind == "rate":
                made, found, rates = _at_rate(learned, structure, table, prices, goal, shown)
                predicted = _predicted_at(made, rates, prices, table)
            else:
                allocation = allocated(planned, learned.plans(learned.means), table, goal, options)
                learned.bits = allocation.bits
                made, found = learned.solved(shown)
                predicted = {path: table[path][bits] for path, bits in allocation.bits.items()}
        plans, first = learned.plans(learned.means), made
        cparams, uncorrected = corrected(programs.params, structure.unflatten(learned.leaves_of(made)), learned.means)
        score, ways = None, ""
        if split.measured:
            held = Some(batches, split.measured)
            score = _measured(programs, cparams, held, shown)
            try:
                in_order = learned.solved_in_order(plans, shown, rates)
                other = _measured(programs, in_order[1], held, shown, "then measured")
                over = rates is not None and goal is not None and learned.file_bits(in_order[1]) > goal.amount
                better = other.loss < score.loss and not over
                ways = _ways(score, other, better)
                if better:
                    (made, cparams, uncorrected), score = in_order, other
            except (NotMapped, ValueError) as error:  # the first way is at hand, and was measured
                ways = f"leaves could not be compressed in the order of use, too: {error}"
    notes = (*Plan(tuple(plans)).notes, *_few(found, plans))

    def report() -> Any:
        fits = {path: (one.method, one.certificate) for path, one in made.items()}
        reasons = {plan.path: plan.reason for plan in plans if plan.reason is not None}
        whole = build_report(programs.params, cparams, reasons, fits, notes)
        tried, by_leaf = Some(batches, split.tried), predicted
        if goal is None and split.measured:
            tried = _at_least(_TRIED, batches, split.measured)
            with bars(progress) as shown:
                by_leaf = learned.losses(first, tried, shown)
        told = _Told(
            learned.means.images,
            _examples(tried) if by_leaf is not None else 0,
            _examples(Some(batches, split.measured)),
            goal is not None and split.tried == split.measured,
            score,
            goal,
            by_leaf,
            () if allocation is None else allocation.rules,
            learned.file_bits(cparams, 0) if goal is not None and goal.kind == "rate" else None,
            {path: text for path, text in found.items() if isinstance(text, str)},
            uncorrected,
            {path: one.errors for path, one in made.items() if one.errors},
            ways,
        )
        return replace(whole, notes=(*notes, *told.lines()), calibration=told.numbers())

    return cparams, report, notes


def _check_rated(planned: Sequence[LeafPlan]) -> None:
    """Raises ValueError for a leaf whose levels cannot begin at equal distances."""
    for plan in planned:
        if plan.reason is None and form_of(plan.options.method) == "fixed":
            raise ValueError(
                f"compress: {plan.path}: method={plan.options.method!r} with rate=, which begins with levels at equal "
                'distances; method="knq", "enq" or "uniform" goes with it'
            )


_TRIED = 32  # examples that tell what each leaf alone costs, where nothing was to be decided by it


def _at_least(count: int, batches: Iterable[Any], numbers: Sequence[int]) -> Some:
    """Returns the first of these batches that have this many examples together, or all of them."""
    taken, examples = [], 0
    for number in numbers:
        if examples < count:
            taken.append(number)
            examples += _examples(Some(batches, (number,)))
    return Some(batches, tuple(taken))


def _predicted_at(
    made: Mapping[str, Solved],
    rates: Mapping[str, float],
    prices: Mapping[str, float],
    table: Mapping[str, Mapping[int, float]],
) -> dict[str, float]:
    """Returns by path the loss that each leaf is expected to cause: its layer's error at the price of an error."""
    return {
        path: prices[path] * max(one.error - rates[path] * one.code_bits, 0)
        if one.errors
        else table[path][one.leaf.bits]
        for path, one in made.items()
    }


def _at_rate(
    learned: "_Learned",
    structure: Any,
    table: Mapping[str, Mapping[int, float]],
    prices: Mapping[str, float],
    goal: Goal,
    shown: Any,
) -> tuple[dict[str, Solved], dict[str, LeafMoments | str], dict[str, float]]:
    """Compresses the leaves to the rate of `goal` by searching for one price of a bit, in nats of divergence.

    A price four times as high saves about one bit a weight where levels are many, so a few steps of the secant's rule
    find the price for the rate.
    """
    if not table:
        raise ValueError(f"compress: {goal.text}: no leaf is compressed; min_size= and rules choose them")
    weights = sum(math.prod(plan.shape) for plan in learned.planned if plan.path in table)
    least = 1e-3 * sorted(prices.values())[len(prices) // 2] or 1e-12
    start = max(math.fsum(cost[3] for cost in table.values()) / max(weights, 1), 1e-12)
    power, slope, wanted = 2.8 - goal.amount, 1.0, goal.amount * (1 - _CLOSE / 2)
    best, last = None, None
    for _ in range(_RATE_STEPS):
        rates = {path: start * 4.0**power / max(here, least) for path, here in prices.items()}
        made, found = learned.solved(shown, rates)
        bits = learned.file_bits(structure.unflatten(learned.leaves_of(made)))
        if bits <= goal.amount and (best is None or bits > best[0]):
            best = bits, made, found, rates
        if goal.amount * (1 - _CLOSE) < bits <= goal.amount:
            break
        if last is not None and last[0] != power:
            slope = min(max((last[1] - bits) / (power - last[0]), 0.2), 2.0)
        last = power, bits
        power += (bits - wanted) / slope
    if best is None:
        raise ValueError(
            f"compress: {goal.text}: the file takes {bits:.3f} bits a weight, its header and what stays dense counted, "  # pyright: ignore[reportPossiblyUnboundVariable]
            "however high the price of a bit"
        )
    return best[1:]


_RATE_STEPS = 6  # at most: a rate that no price of a bit reaches ends here
_SLACK = 6  # bytes for each coded leaf by which a file may be larger than predicted: a word and some digits
_CLOSE = 0.005  # of the rate: a file that is smaller by no more than this is near enough


@dataclass
class _Learned:
    """Gathers the moments of the leaves, for as many leaves at a time as memory holds.

    Attributes:
      programs: the function and the dense tree.
      batches: the batches to learn from.
      planned: the plans of the leaves by the user's options.
      leaves: the arrays of the leaves.
      tied: by path, all paths of the same array, for arrays that occur more than once.
      once: keeps finished leaves and what was measured.
      bits: by path, the widths that a budget gives; empty without one.
      means: the moments of all leaves without second moments; None before the first pass.
    """

    programs: Programs
    batches: Some
    planned: Sequence[LeafPlan]
    leaves: Sequence[Any]
    tied: Mapping[str, Sequence[str]]
    once: Once = _at_once
    bits: Mapping[str, int] = field(default_factory=dict)
    means: Any = None
    _only: Any = None

    def groups(self, shown: Callable[..., Iterable[Any]]) -> Iterator[tuple[frozenset[str], Moments]]:
        """Yields groups of leaves with their moments; those of a single group are kept, others recomputed each time."""
        if self._only is not None:
            yield self._only
            return
        sizes = sums_of_uses(self.programs, next(iter(self.batches)))
        if not sizes:
            raise ValueError(
                "compress: fn uses no leaf of params in a dot, a convolution or a look-up; params must be its first "
                "argument: fn(params, *inputs)"
            )
        groups = _groups(self.planned, sizes, self.tied)
        for group in groups:
            moments = self._gathered(Counted(self.batches, shown, "moments"), group).joined(self.tied)
            if self.means is None:
                self.means = moments.without_second()
            if len(groups) == 1:
                self._only = group, moments
            yield group, moments

    def of_more(self, batches: Some, shown: Any) -> "_Learned":
        """Returns an object for the same leaves that learns from other batches."""
        more = replace(self, batches=batches, means=None, _only=None)
        next(iter(more.groups(shown)))
        return more

    def plans(self, moments: Moments) -> list[LeafPlan]:
        """Returns the leaves' plans with the axes that the moments show and the bits that a budget gives."""
        used = [as_used(plan, moments) for plan in self.planned]
        return [replanned_to(p, self.bits[p.path]) if p.path in self.bits and p.reason is None else p for p in used]

    def leaves_of(self, made: Mapping[str, Solved]) -> list[Any]:
        """Returns the leaves of the tree, compressed or as they were."""
        return [made[p.path].leaf if p.path in made else x for p, x in zip(self.planned, self.leaves, strict=True)]

    def file_bits(self, tree: Any, slack: int = _SLACK) -> float:
        """Returns the bits a weight of the entropy-coded file of a tree, with some bytes more for each coded leaf."""
        sizes = file_sizes(tree)
        if sizes is None:
            raise ValueError("compress: rate= is for files, but nuqjax.save cannot write this tree")
        weights = sum(math.prod(plan.shape) for plan in self.planned)
        coded = sum(map(is_codebook_array, jax.tree.leaves(tree, is_leaf=is_codebook_array)))
        return 8 * (sizes[1] + slack * (coded + 1)) / max(weights, 1)

    def losses(self, made: Mapping[str, Solved], tried: Some, shown: Any) -> dict[str, float]:
        """Returns by path the loss that each compressed leaf causes alone."""
        exact = [self.programs.outputs(self.programs.params, batch) for batch in tried]
        found: dict[int, float] = {}
        place = {plan.path: n for n, plan in enumerate(self.planned)}
        for path in shown(list(made), "leaf by leaf", len(made)):
            leaf = self.leaves[place[path]]
            if id(leaf) not in found:
                found[id(leaf)] = loss_of_one(self.programs, leaf, made[path].leaf, self.means, tried, exact)
        return {path: found[id(self.leaves[place[path]])] for path in made}

    def sensitivities(self, tried: Some, shown: Any) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
        """Returns by path the loss that each leaf causes at each width, and the loss per unit of its layer's error."""
        table, prices = {}, {}
        for group, moments in self.groups(shown):
            plans = [plan if plan.path in group else _left(plan) for plan in self.plans(moments)]
            make = functools.partial(sensitivities, self.programs, tried, moments, plans, (2, 3), shown)
            found = self.once(("sensitivity", sorted(group)), lambda make=make: dict(zip("tp", make(), strict=True)))
            table |= found["t"]
            prices |= found["p"]
        return table, prices

    def solved(
        self, shown: Any, rates: Mapping[str, float] | None = None
    ) -> tuple[dict[str, Solved], dict[str, LeafMoments | str]]:
        """Compresses every leaf; also returns its moments without values, or why it has none, by path.

        `rates` are the prices of a bit of code in units of each layer's error.
        """
        made: dict[str, Solved] = {}
        found: dict[str, LeafMoments | str] = {}
        options: dict[str, str] = {}
        for group, moments in self.groups(shown):
            plans = self.plans(moments)
            work = [n for n, plan in enumerate(plans) if plan.reason is None and plan.path in group]
            for n in shown(work, "leaves", len(work)):
                plan = plans[n]
                options[plan.path] = repr(plan.options)
                twin = self.tied.get(plan.path, (plan.path,))[0]
                if twin in made and options[twin] == options[plan.path]:
                    made[plan.path], found[plan.path] = made[twin], found[twin]
                    continue
                here = moments.of(plan.path, plan.axes, plan.options.stack_axes)
                found[plan.path] = here if isinstance(here, str) else here.without_values()
                stages: dict[str, Any] = {} if rates is None else {"rate": rates.get(plan.path)}
                given = self.leaves[n], plan, None if isinstance(here, str) else here
                made[plan.path] = self._kept("alone", *given, **stages)
        return made, found

    def solved_in_order(
        self, plans: Sequence[LeafPlan], shown: Any, rates: Mapping[str, float] | None = None
    ) -> tuple[dict[str, Solved], Any, dict[str, str]]:
        """Compresses every leaf with the inputs that the leaves before it leave it; see `sequential`."""
        sizes = sums_of_uses(self.programs, next(iter(self.batches)))
        return solved_in_order(
            self.programs,
            self.batches,
            plans,
            self.leaves,
            self.tied,
            sizes,
            _MOMENT_VALUES // 2,
            rates,
            shown,
            functools.partial(self._kept, f"in order at {sorted((rates or {}).items())}"),
        )

    def _kept(self, way: str, leaf: Any, plan: LeafPlan, found: LeafMoments | None, **stages: Any) -> Solved:
        """Compresses a leaf as `solved` does, unless that was done and kept."""
        key = way, repr(plan), self.batches.numbers, stages.get("rate")
        return Solved(**self.once(key, lambda: solved(leaf, plan, found, **stages)._asdict()))

    def _gathered(self, batches: Any, group: frozenset[str]) -> Moments:
        def check(number: int, batch: Any, outputs: Sequence[Any]) -> None:
            what = f"batch {number} and the parameters as they are"
            finite(self.programs.compared(batch, outputs), what, self.programs.caller)

        return gather_moments(self.programs, batches, wanted=group, seen=check)


def _left(plan: LeafPlan) -> LeafPlan:
    return replace(plan, reason="in another group") if plan.reason is None else plan


def _examples(batches: Some) -> int:
    return sum(example_count(batch) for batch in batches)


@dataclass(frozen=True)
class _Told:
    """What the report says about the data and about the fit to them."""

    learned: int
    tried: int
    held: int
    same: bool
    score: Measured | None
    goal: Goal | None
    by_leaf: Mapping[str, float] | None
    rules: Sequence[Rule]
    file_bits: float | None
    alone: Mapping[str, str]
    uncorrected: Mapping[str, str]
    errors: Mapping[str, Mapping[str, float]]
    ways: str

    @property
    def predicted(self) -> float | None:
        """The sum of what each leaf alone costs the outputs."""
        return None if self.by_leaf is None else math.fsum(self.by_leaf.values())

    def lines(self) -> list[str]:
        """Returns the facts as lines of text."""
        lines = [f"levels, scales and indices were fitted to {self.learned} examples"]
        if self.by_leaf:
            worst, most = max(self.by_leaf.items(), key=lambda item: item[1])
            if self.goal is None:
                how = f"each leaf was compressed alone, on {self.tried} of those that were held out"
            else:
                by = "others" if self.same else "of them, before they were learned from"
                how = f"bits were allocated by {self.tried} {by}"
            what = "a relative error of" if self.score is not None and self.score.kl is None else "a KL of"
            lines.append(f"{how}: {what} {self.predicted:.4g} is predicted, of which {most:.4g} from {worst}")
        if self.file_bits is not None:
            lines.append(
                f"saved with entropy coding, without this report, {self.file_bits:.3f} bits a weight are taken"
            )
        if self.score is not None:
            which = "that decided on bits" if self.same else "that were held out"
            lines.append(f"on {self.held} examples {which}, beside the float outputs: {self.score}")
        else:
            lines.append("nothing was measured: with two batches or more, some are held out")
        lines += [self.ways] if self.ways else []
        lines += [f"{path}: by its weights alone: {why}" for path, why in self.alone.items()]
        lines += [f"{path}: the mean of its output is not corrected: {why}" for path, why in self.uncorrected.items()]
        return lines

    def numbers(self) -> dict[str, Any]:
        """Returns the facts as plain numbers and strings, by name."""
        return {
            "examples": self.learned,
            "tried": self.tried,
            "held_out": self.held,
            "measured": None if self.score is None else as_numbers(self.score),
            "file_bits_per_weight": self.file_bits,
            "predicted": self.predicted,
            "predicted_by_leaf": dict(self.by_leaf or {}),
            "rules": [repr(rule) for rule in self.rules],
            "by_weights_alone": dict(self.alone),
            "uncorrected": dict(self.uncorrected),
            "layer_errors": {path: dict(errors) for path, errors in self.errors.items()},
        }


def _ways(alone: Measured, in_order: Measured, taken: bool) -> str:
    """Says how the two ways of compressing the leaves compare."""
    what = "a relative error" if alone.kl is None else "a KL"
    return (
        f"each leaf by its float inputs gives {what} of {alone.loss:.4g}, in the order of use, by the inputs that "
        f"compressed leaves leave it, {in_order.loss:.4g}: {'the order' if taken else 'the first'} was taken"
    )


def _measured(
    programs: Programs,
    cparams: Any,
    held: Some,
    shown: Callable[..., Iterable[Any]],
    name: str = "measured on what was held out",
) -> Measured:
    dense = decompress(cparams)

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in shown(held, name, len(held.numbers)):
            yield tuple(
                finite(programs.outputs(tree, batch), f"{what} parameters", programs.caller)
                for tree, what in ((programs.params, "the float"), (dense, "the compressed"))
            )  # pyright: ignore[reportReturnType]

    return measured(pairs())


def _tied(flat: Sequence[tuple[Any, Any]]) -> dict[str, tuple[str, ...]]:
    """Returns by path all paths of the same array, for arrays that occur more than once."""
    places: dict[int, list[str]] = {}
    for path, leaf in flat:
        if hasattr(leaf, "shape"):
            places.setdefault(id(leaf), []).append(path_name(path))
    return {path: tuple(paths) for paths in places.values() if len(paths) > 1 for path in paths}


def _groups(
    plans: Sequence[LeafPlan], sizes: Mapping[str, int], tied: Mapping[str, Sequence[str]]
) -> list[frozenset[str]]:
    """Splits the leaves into groups whose moments fit in memory together; usually one group holds all leaves."""
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
    """Returns a note on the layer with far more inputs than its examples can determine; empty if there is none."""
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
