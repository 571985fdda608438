"""Bits for each leaf: measures the loss from each leaf at each width, and chooses widths within a budget."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

from nuqjax._src.calibration.biases import corrected
from nuqjax._src.calibration.layers import solved
from nuqjax._src.calibration.layouts import as_used, with_scales
from nuqjax._src.calibration.level_formats import scale_dtype
from nuqjax._src.calibration.measures import measured
from nuqjax._src.calibration.programs import Programs, checked_batches, fingerprint
from nuqjax._src.calibration.second_moments import LeafMoments, Moments
from nuqjax._src.calibration.stages import form_of
from nuqjax._src.compress.plan import LeafPlan, plan_leaves, replanned, scale_groups
from nuqjax._src.compress.rules import Options, Rule
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.codebooks import decompress
from nuqjax._src.leaf.rows import channel_shape
from nuqjax._src.report.render import add_row, render

WIDTHS = (2, 3, 4, 5, 6, 7, 8)

# The least mean squared errors of 2^bits levels for a normal distribution (Max, 1960): the effect of a bit on a loss.
_NORMAL = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 6.442e-4, 7: 1.637e-4, 8: 4.13e-5}
# The same of levels at equal distances (the same source to 5 bits; beyond, the same minimum by quadrature).
_NORMAL_UNIFORM = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 1.040e-3, 7: 3.043e-4, 8: 8.77e-5}


def sensitivity(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    moments: Moments,
    *,
    bits: Sequence[int] = (2, 3),
    output: Callable[[Any], Any] | None = None,
    rules: Rule | Sequence[Rule] = (),
    **options: Any,
) -> dict[str, dict[int, float]]:
    """Measures the KL divergence of the outputs, in nats, that compressing each leaf alone causes at each width.

    One leaf at a time is compressed (with feedback, one round of refit, corrected offsets), and `fn` runs. The
    divergences of all leaves add up to about that of the whole tree while they are small (docs/calibration.md).

    Args:
      fn: `fn(params, *inputs)`.
      params: the dense tree.
      batches: inputs that are **not** those of the moments: on those, a leaf seems up to ten times as good as it is.
      moments: the moments of the leaves.
      bits: the widths to measure; the divergences at other widths are inferred from the nearest of them.
      output: as in `nuqjax.compress`.
      rules: as in `nuqjax.compress`.
      **options: options of the layout, as in `nuqjax.compress`.

    Returns:
      For each compressed leaf, by path, the divergence at each width from 2 to 8 bits (for outputs with a single value
      along the last axis, the relative squared error).

    Raises:
      ValueError: a batch was also used for the moments; there are no batches; `fn` fails.
    """
    programs = Programs(fn, params, "sensitivity", output)
    for number, batch in enumerate(checked_batches(batches, "sensitivity")):
        if fingerprint(batch) in moments.seen:
            raise ValueError(
                f"sensitivity: batch {number} was also used for the moments, and a leaf seems better than it is there; "
                "give other batches"
            )
    plans = [as_used(plan, moments) for plan in plan_leaves(params, with_scales(Options(**options)), rules)]
    return sensitivities(programs, batches, moments, plans, bits)[0]


def sensitivities(
    programs: Programs,
    batches: Iterable[Any],
    moments: Moments,
    plans: Sequence[LeafPlan],
    bits: Sequence[int],
    shown: Callable[..., Iterable[Any]] = lambda work, name, count: work,
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Returns the `sensitivity` of planned leaves, and by path the loss of the outputs per unit of a layer's error."""
    leaves, structure = jax.tree.flatten(programs.params, is_leaf=is_codebook_array)
    exact = [programs.outputs(programs.params, batch) for batch in batches]
    work = [n for n, plan in enumerate(plans) if plan.reason is None]
    known: dict[tuple[int, str], tuple[dict[int, float], float]] = {}
    table, prices = {}, {}
    for n in shown(work, "sensitivity", len(work)):
        same = id(leaves[n]), repr(plans[n].options)  # a tied array is measured once
        if same not in known:
            losses, price = {}, 0.0
            for width in sorted(bits):
                plan = replanned_to(plans[n], width)
                found = moments.of(plan.path, plan.axes, plan.options.stack_axes)
                one = solved(leaves[n], plan, found if isinstance(found, LeafMoments) else None, refit=1)
                swapped = [one.leaf if x is leaves[n] else x for x in leaves]
                dense = decompress(corrected(programs.params, structure.unflatten(swapped), moments)[0])
                outputs = (programs.outputs(dense, batch) for batch in batches)
                losses[width] = measured(zip(exact, outputs, strict=True)).loss
                price = losses[width] / one.error if one.error > 0 else 0.0
            known[same] = _at_every_width(losses, plans[n].options.method), price
        table[plans[n].path], prices[plans[n].path] = known[same]
    return table, prices


def replanned_to(plan: LeafPlan, bits: int) -> LeafPlan:
    """Returns the plan at another width, for a leaf that a rule or a budget has decided to compress."""
    return replanned(plan, replace(plan.options, bits=bits, skip=False))


def _at_every_width(losses: Mapping[int, float], method: str) -> dict[int, float]:
    """Returns the loss at every width: as measured, or inferred from the nearest measured width; it never rises."""
    table, least, normal = {}, math.inf, _NORMAL_UNIFORM if form_of(method) == "grid" else _NORMAL
    for width in WIDTHS:
        near = min(losses, key=lambda b: (abs(b - width), b))
        least = table[width] = min(least, max(losses[near], 1e-12) * normal[width] / normal[near])
    return table


@dataclass(frozen=True)
class Allocation:
    """Bits for each leaf; `str` gives a table.

    Attributes:
      rules: for `nuqjax.compress(params, rules=allocation.rules, …)`: one for each leaf that is compressed or skipped.
      bits: the width of each compressed leaf, by path.
      predicted: the sum of the sensitivities, which is the expected KL divergence in nats.
      nbytes: bytes of the compressed tree.
      weights: number of values in the tree.
    """

    rules: tuple[Rule, ...]
    bits: Mapping[str, int]
    predicted: float
    nbytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of the whole tree, everything counted."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        table = Table(title="allocation")
        for name in ("leaf", "bits"):
            table.add_column(name, justify="left" if name == "leaf" else "right")
        for path, bits in self.bits.items():
            add_row(table, path, str(bits))
        line = f"{self.nbytes:,} bytes, {self.bits_per_weight:.3f} bits a weight all counted; predicted KL "
        return f"{render(table)}\n{line}{self.predicted:.4g}"


class Goal(NamedTuple):
    """The budget or rate that decides the bits of the leaves.

    Attributes:
      kind: "bytes", "bpw" (bits a weight, everything counted), "kl" (nats of divergence), or "rate" (bits a weight of
        the coded file).
      amount: the amount in the unit of `kind`.
      text: the user's argument, for messages.
    """

    kind: str
    amount: float
    text: str


def goal_of(budget: Any, rate: Any) -> Goal | None:
    """Returns the goal that a budget or a rate states; None if neither is given.

    Raises:
      ValueError: both are given, or the given one is not valid.

    >>> goal_of("3bpw", None)[:2], goal_of(2_000_000, None)[:2], goal_of("kl=0.05", None)[:2], goal_of(None, "2bpw")[:2]
    (('bpw', 3.0), ('bytes', 2000000.0), ('kl', 0.05), ('rate', 2.0))
    """
    if budget is None and rate is None:
        return None
    if budget is not None and rate is not None:
        raise ValueError(f"budget={budget!r} and rate={rate!r} are both given; give one of them")
    if rate is not None:
        if bits := _amount(rate, r"([0-9.]+)bpw"):
            return Goal("rate", bits, f"rate={rate!r}")
        raise ValueError(f'rate={rate!r}, but bits a weight are wanted: rate="2.5bpw"')
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return Goal("bytes", float(budget), f"budget={budget!r}")
    for kind, pattern in (("bpw", r"([0-9.]+)bpw"), ("kl", r"kl=([0-9.eE+-]+)")):
        if amount := _amount(budget, pattern):
            return Goal(kind, amount, f"budget={budget!r}")
    wanted = 'bits a weight ("3bpw"), bytes (2_000_000) or a divergence in nats ("kl=0.05") are wanted'
    raise ValueError(f"budget={budget!r}, but {wanted}")


def _amount(text: Any, pattern: str) -> float | None:
    """Returns the positive number in a text of this pattern; None if there is none."""
    match = re.fullmatch(pattern, text.replace(" ", "")) if isinstance(text, str) else None
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def allocate(
    params: Any,
    sensitivity: Mapping[str, Mapping[int, float]],
    budget: Any,
    *,
    moments: Moments | None = None,
    rules: Rule | Sequence[Rule] = (),
    **options: Any,
) -> Allocation:
    """Chooses widths of least divergence within a budget of bytes, or of least size within one of divergence.

    Args:
      params: the dense tree.
      sensitivity: the divergence from each leaf at each width, as `sensitivity` returns it.
      budget: `"3bpw"` (bits a weight, everything counted), bytes, or `"kl=0.05"` (nats).
      moments: the moments of the leaves, whose uses give the axes; None takes the axes from the options.
      rules: as in `nuqjax.compress`.
      **options: as in `nuqjax.compress`.

    Returns:
      An `Allocation`, with the rules.

    Raises:
      ValueError: the budget is not valid, or cannot be met.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    >>> cost = lambda scale: {bits: scale * 4.0**-bits for bits in range(2, 9)}
    >>> allocate(params, {"a": cost(1.0), "b": cost(100.0)}, "4.8bpw").bits
    {'a': 2, 'b': 6}
    """
    planned = plan_leaves(params, with_scales(Options(**options)), rules)
    used = planned if moments is None else [as_used(plan, moments) for plan in planned]
    goal = goal_of(budget, None)
    if goal is None:
        raise ValueError('allocate: a budget is wanted, such as "3bpw"')
    return allocated(planned, used, sensitivity, goal, Options(**options))


def allocated(
    planned: Sequence[LeafPlan],
    used: Sequence[LeafPlan],
    table: Mapping[str, Mapping[int, float]],
    goal: Goal,
    options: Options,
) -> Allocation:
    """Allocates as `allocate` does, for leaves planned by the user's rules, and planned with the axes of their uses."""
    kind, amount = goal.kind, goal.amount
    chosen = {plan.path: plan for plan in used if plan.reason is None and plan.path in table}
    weights = sum(math.prod(plan.shape) for plan in used)
    fixed = sum(plan.nbytes_after for plan in used if plan.path not in chosen)
    sizes = {path: {b: nbytes(replanned_to(plan, b)) for b in WIDTHS} for path, plan in chosen.items()}
    limit = amount * weights / 8 if kind == "bpw" else amount

    def cost(bits: Mapping[str, int]) -> tuple[float, int]:
        return math.fsum(table[p][b] for p, b in bits.items()), fixed + sum(sizes[p][b] for p, b in bits.items())

    least = {path: min(WIDTHS) for path in chosen}
    most = {path: max(WIDTHS) for path in chosen}
    if kind != "kl" and cost(least)[1] > limit:
        raise ValueError(
            f"{goal.text}: {limit:,.0f} bytes, but with {min(WIDTHS)} bits for every leaf the tree takes "
            f"{cost(least)[1]:,} ({8 * cost(least)[1] / max(weights, 1):.3f} bits a weight, of which "
            f"{8 * fixed / max(weights, 1):.3f} stay dense)"
        )
    if kind == "kl" and cost(most)[0] > limit:
        raise ValueError(f"{goal.text}: with {max(WIDTHS)} bits for every leaf {cost(most)[0]:.3g} nats are predicted")

    def at(price: float) -> dict[str, int]:
        return {p: min(WIDTHS, key=lambda b: (table[p][b] + price * sizes[p][b], b)) for p in chosen}

    fits = lambda bits: cost(bits)[0] <= limit if kind == "kl" else cost(bits)[1] <= limit  # noqa: E731
    low, high = 1e-18, 1e6  # prices in nats a byte: the lowest gives most bits, the highest fewest
    for _ in range(100):
        middle = math.sqrt(low * high)
        if fits(at(middle)) == (kind == "kl"):
            low = middle
        else:
            high = middle
    bits = at(low if kind == "kl" else high)
    bits = bits if fits(bits) else dict(most if kind == "kl" else least)
    while better := _step(bits, table, sizes, fits, down=kind == "kl"):  # uses what is left of the budget
        bits = better
    predicted, size = cost(bits)
    return Allocation(tuple(_rules(planned, bits, options)), bits, predicted, size, weights)


def _step(bits, table, sizes, fits, down: bool) -> dict[str, int] | None:
    """Moves one leaf to its next width: the best trade of nats for bytes that still fits; None if none fits."""
    best, result = 0.0, None
    for path, b in bits.items():
        others = [w for w in WIDTHS if (w < b if down else w > b)]
        if not others:
            continue
        to = max(others) if down else min(others)
        trial = bits | {path: to}
        nats, size = abs(table[path][b] - table[path][to]), abs(sizes[path][b] - sizes[path][to])
        worth = size / max(nats, 1e-15) if down else nats / max(size, 1)
        if worth > best and fits(trial):
            best, result = worth, trial
    return result


def nbytes(plan: LeafPlan) -> int:
    """Returns the bytes of a leaf as calibration stores it: like any other, but scales have 16 bits if levels do."""
    options, dtype = plan.options, jnp.dtype(plan.dtype)
    if options.scale is None:
        return plan.nbytes_after
    outputs, inputs = channel_shape(plan.slice_shape, plan.axes)
    scales = math.prod(plan.shape[: options.stack_axes]) * outputs * scale_groups(inputs, options.scale)[0]
    return plan.nbytes_after - scales * (dtype.itemsize - scale_dtype(options.codebook_format, dtype).itemsize)


def _rules(planned: Sequence[LeafPlan], bits: Mapping[str, int], options: Options) -> Iterable[Rule]:
    """Yields a rule for every leaf that is compressed or that a rule skips."""
    names = [f.name for f in fields(Rule) if f.name not in ("pattern", "bits", "skip")]
    options = with_scales(options)
    for plan in planned:
        pattern = f"^{re.escape(plan.path)}$"
        if plan.path in bits:
            given = {n: getattr(plan.options, n) for n in names if getattr(plan.options, n) != getattr(options, n)}
            yield Rule(pattern, bits=bits[plan.path], skip=plan.options.skip, **given)
        elif plan.options.skip:
            yield Rule(pattern, skip=True)
