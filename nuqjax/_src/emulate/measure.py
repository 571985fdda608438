"""Measures a function's values on a batch, and chooses the formats that suit them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nuqjax._src.emulate.parameters import Parameters
from nuqjax._src.emulate.presets import Preset
from nuqjax._src.emulate.program import Node, Program, consumers
from nuqjax._src.leaf import fixed_point
from nuqjax._src.leaf.qformat import QFormat, of_least_error
from nuqjax._src.leaf.words import rounds_up


class Wanted(NamedTuple):
    """A format to choose: the site and the field of its row, the nodes with its words, and the word length in bits."""

    site: str
    field: str
    nodes: tuple[Node, ...]
    word: int


def measured(program: Program, arrays: Any, wanted: Sequence[Wanted], modes: Preset) -> list[QFormat]:
    """Returns a format for each entry of `wanted`."""
    uses = consumers(program.nodes)

    def values_of(arrays) -> list[jax.Array]:
        floats = _floats(program, arrays)
        return [
            jnp.concatenate([jnp.clip(floats(node), *_clip(node, uses)).reshape(-1) for node in entry.nodes])
            for entry in wanted
        ]

    def extremes(arrays) -> list[tuple[jax.Array, jax.Array]]:
        return [(v.min(initial=jnp.inf), v.max(initial=-jnp.inf)) for v in values_of(arrays)]

    chosen = []
    for entry, ends in zip(wanted, jax.device_get(jax.jit(extremes)(arrays)), strict=True):
        low, high = (float(end) for end in ends)
        if low > high:  # no values
            low = high = 0.0
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{entry.site}: the batch gives values that are not finite ({entry.field})")
        chosen.append(_first_choice(entry, low, high, modes))
    if modes.choose != "error":
        return chosen
    candidates = [
        [replace(fmt, frac=fmt.frac + more) for more in range(_FINER if entry.nodes[0].op != "constant" else 1)]
        for entry, fmt in zip(wanted, chosen, strict=True)
    ]

    def errors(arrays) -> list[list[jax.Array]]:
        values = values_of(arrays)
        return [[_squared_error(v, fmt, modes) for fmt in fmts] for v, fmts in zip(values, candidates, strict=True)]

    found = jax.device_get(jax.jit(errors)(arrays))
    by_format = [dict(zip(*pair, strict=True)) for pair in zip(candidates, found, strict=True)]
    return [of_least_error(known, lambda fmt, _, known=known: known[fmt]) for known in by_format]


def _first_choice(entry: Wanted, low: float, high: float, modes: Preset) -> QFormat:
    """Returns the format that follows from the extremes alone."""
    parameter = entry.nodes[0].role != "activation"
    rectified = low >= 0 and not parameter and modes.overflow != "wrap" and modes.choose != "ristretto"
    unsigned = rectified and entry.word < 32  # unsigned words have at most 31 bits
    constant = entry.nodes[0].op == "constant"
    rule = "ristretto" if modes.choose == "ristretto" and not constant else "range"
    rounding = "half_even" if parameter else modes.rounding
    fmt = format_for(low, high, entry.word, not unsigned, rule, parameter, rounding)
    if constant and low == high:  # as short as possible: a slope of 1/8 takes one bit and a sign
        raw = round(low * 2.0**fmt.frac)
        zeros = (raw & -raw).bit_length() - 1 if raw else 0
        fmt = QFormat(max(fmt.word - zeros, 2), fmt.frac - zeros + max(2 - (fmt.word - zeros), 0), fmt.signed)
    return fmt


_FINER = 5  # how many formats are tried: that of the range and finer ones


def _squared_error(value: jax.Array, fmt: QFormat, modes: Preset) -> jax.Array:
    rounding = "half_away" if modes.rounding == "gemmlowp" else modes.rounding
    words = fixed_point.encode(value, fmt, rounding=rounding, overflow=modes.overflow)
    return jnp.sum((fixed_point.decode(words, fmt) - value) ** 2)


def _floats(program: Program, arrays: Any) -> Callable[[Node], Any]:
    """Returns a function from a node to its value in the floating-point run."""
    values: dict[Node, Any] = dict(zip(program.arrays, arrays, strict=True))
    parameters = Parameters(dict(values))
    computed: dict[Node, Any] = {}
    for node in program.nodes:
        if node.role != "activation":
            continue
        if node.op == "input":
            computed[node] = jnp.asarray(values[node])
        else:
            taken = [computed[n] if n.role == "activation" else parameters.floats(n) for n in node.inputs]
            computed[node] = node.floating(*taken)
    return lambda node: computed[node] if node.role == "activation" else parameters.floats(node)


def _clip(node: Node, uses: Mapping[Node, Any]) -> tuple[float, float]:
    """Returns the interval outside which the node's users do not distinguish values: [0, 6] before a relu6."""
    low, high = -math.inf, math.inf
    while True:
        takers = uses[node]
        if not takers or any(t.op not in ("max", "min", "clamp") for t in takers) or len(takers) > 1:
            return low, high
        [taker] = takers
        constants = [n for n in taker.inputs if n is not node]
        if any(n.op != "constant" or n.value.size != 1 for n in constants):
            return low, high
        bounds = [float(n.value.reshape(())) for n in constants]
        if taker.op == "max":
            low = max(low, min(bounds[0], high))
        elif taker.op == "min":
            high = min(high, max(bounds[0], low))
        else:
            low, high = max(low, bounds[0]), min(high, bounds[-1])
        node = taker


def format_for(
    low: float,
    high: float,
    word: int,
    signed: bool,
    choose: str = "range",
    parameter: bool = False,
    rounding: str = "half_even",
) -> QFormat:
    """Returns the format of `word` bits for values from `low` to `high`.

    Args:
      low: the least value.
      high: the largest value.
      word: word length in bits.
      signed: whether words are two's complement.
      choose: `"range"`: the most fraction bits with which neither rounded end overflows; `"ristretto"`: by its rule.
      parameter: whether to use Ristretto's rule for parameters instead of that for activations.
      rounding: the mode that rounds the ends, one of a site's modes.

    >>> format_for(-1.0, 1.0, 8, signed=True)
    QFormat(word=8, frac=6, signed=True)
    """
    peak = max(abs(low), abs(high))
    if peak == 0:
        return QFormat(word, word - signed, signed)
    if choose == "ristretto":
        return QFormat(word, word - math.ceil(math.log2(peak) + parameter), signed)
    frac = word - signed - math.frexp(peak)[1] + 1
    while True:
        fmt = QFormat(word, min(max(frac, -512), 512), signed)
        ends = (_whole(end * 2.0**frac, rounding) for end in (low, high))
        if all(fmt.least <= end <= fmt.largest for end in ends) or frac <= -512:
            return fmt
        frac -= 1


def _whole(value: float, rounding: str) -> int:
    """Rounds a value to a whole number; for gemmlowp's two roundings, to the farthest from zero that they can give."""
    if rounding == "gemmlowp":
        value, rounding = value + 0.25 * (value > 0), "half_away"
    below = math.floor(value)
    rest = value - below
    return below + int(rounds_up(below, value < 0, rest > 0, rest > 0.5, rest == 0.5, rounding))
