"""Bounds the raw integers of a program before it runs, and chooses how each sum is computed.

Every word of a node lies in an interval of raw integers. Take a dot or a convolution whose activations lie in the
interval X, and let S be the largest sum of weight magnitudes for one output. The result is at most max|X|·S in
magnitude. This bound gives the register that the sum needs, and the cheapest arithmetic in which every partial sum, in
any order, is exact.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nuqjax._src.emulate.formats import Accumulator, Formats, SiteFormat
from nuqjax._src.emulate.program import LOOKING_UP, MOVING, Node, Program, whole_numbers
from nuqjax._src.leaf.qformat import QFormat
from nuqjax._src.trace.operations import LINEAR

_WIDEST = 62  # bits of magnitude that int64 words may have, so that a doubled word and a sum of two words still fit
_FLOAT32, _FLOAT64 = 24, 53  # bits of the significands
LIMB = 8  # bits of a limb


@dataclass(frozen=True)
class Words:
    """The words of a node: they stand for raw · 2^−frac / divisor, with least ≤ raw ≤ largest.

    Attributes:
      frac: fraction bits.
      least: lower bound of the raw integers.
      largest: upper bound of the raw integers.
      divisor: positive whole numbers, broadcast against the words; None means 1.
    """

    frac: int
    least: int
    largest: int
    divisor: np.ndarray | None = None

    @property
    def peak(self) -> int:
        """The largest magnitude of a raw integer."""
        return max(abs(self.least), abs(self.largest))

    @property
    def dtype(self) -> str:
        """The dtype that holds the raw integers."""
        return "int32" if self.least >= -(2**31) and self.largest < 2**31 else "int64"

    def shifted(self, frac: int) -> "Words":
        """Returns the same values with `frac` fraction bits, which must not be fewer than now."""
        up = frac - self.frac
        return replace(self, frac=frac, least=self.least << up, largest=self.largest << up)


@dataclass(frozen=True)
class SiteBounds:
    """What is known about a node before it runs.

    Attributes:
      exact: its words before any rounding.
      words: its words as they leave it, after any rounding.
      row: its row of the formats; None where it needs none.
      route: how its sums are computed; "" where it computes none.
      bound: the largest magnitude that its exact raw integers can have.
    """

    exact: Words
    words: Words
    row: SiteFormat | None
    route: str
    bound: int


def sites(program: Program, formats: Formats) -> dict[Node, SiteBounds]:
    """Returns a `SiteBounds` for every node that has words.

    Raises:
      ValueError: a site has no row or lacks a format; an exact accumulator is too narrow; words would be longer than
        62 bits. The message names the site.
      NotImplementedError: a node has no exact rule, and the formats do not allow floats.
    """
    if program.floats and formats.fallback != "float":
        node = next(n for n in program.nodes if n in program.floats)
        raise NotImplementedError(
            f"{node.name}: there is no exact rule for {node.op} here; fallback='float' computes it in floating point"
        )
    found: dict[Node, SiteBounds] = {}
    for node in program.nodes:
        if node.role != "activation" or not node.real:
            continue
        if node in program.floats:
            if node in program.rounded:
                row = formats[node.name]
                words = format_words(_need(row, "output"))
                found[node] = SiteBounds(words, words, row, "", words.peak)
            continue
        found[node] = _site(node, program, formats, found)
    return found


def _site(node: Node, program: Program, formats: Formats, found: Mapping[Node, SiteBounds]) -> SiteBounds:
    rounds = node in program.rounded
    row = formats.rows.get(node.name)
    if rounds:
        row = formats[node.name]
    route, bound = "", None
    if node.op == "input":
        exact = format_words(_need(row, "output"))
    elif node.op in LINEAR:
        exact, route, bound = _linear(node, formats[node.name], found)
    else:
        exact = _exact(node, row, found)
    most = max(exact.peak, bound or 0).bit_length()
    if rounds and exact.divisor is not None and row is not None and row.output is not None:
        drop = exact.frac - row.output.frac
        most = max(most + max(-drop, 0), int(exact.divisor.max()).bit_length() + max(drop, 0) + 1)
    if most > _WIDEST:
        raise ValueError(f"{node.name}: its exact words would need {most + 1} bits; shorten its operands' formats")
    words = _after_rounding(exact, row) if rounds and node.op != "input" else exact
    return SiteBounds(exact, words, row, route, exact.peak if bound is None else bound)


def _need(row: SiteFormat | None, name: str, site: str = "") -> QFormat:
    fmt = row and getattr(row, name)
    if not fmt:
        raise ValueError(f"{row.site if row else site}: its row has no format for {name}")
    return fmt


def format_words(fmt: QFormat) -> Words:
    """Returns the `Words` that cover every word of a format."""
    return Words(fmt.frac, fmt.least, fmt.largest)


def _after_rounding(exact: Words, row: SiteFormat | None) -> Words:
    """Returns the words after rounding and overflow: within the format, and within the rounded exact interval."""
    fmt = _need(row, "output")
    drop = exact.frac - fmt.frac
    ends = (exact.least, exact.largest)
    if exact.divisor is not None:
        small, large = int(exact.divisor.min()), int(exact.divisor.max())
        low, high = ends
        ends = (low // (small if low < 0 else large), -(-high // (small if high > 0 else large)))
    low, high = (ends[0] << -drop, ends[1] << -drop) if drop < 0 else (ends[0] >> drop, -(-ends[1] >> drop))
    if row and row.overflow == "wrap" and (low < fmt.least or high > fmt.largest):
        return format_words(fmt)
    least = min(max(low, fmt.least), fmt.largest)
    largest = max(min(high, fmt.largest), fmt.least)
    if row and row.overflow == "saturate_zero":
        least, largest = min(least, 0), max(largest, 0)
    return Words(fmt.frac, least, largest)


def _linear(node: Node, row: SiteFormat, found: Mapping[Node, SiteBounds]) -> tuple[Words, str, int]:
    """Returns the accumulator's words, the route, and the bound without loss of bits, of a dot or a convolution."""
    terms = terms_of(node)
    words = [found[n].words if n.role == "activation" else format_words(_need(row, "weight")) for n in node.inputs[:2]]
    frac = words[0].frac + words[1].frac
    number = split_operand(node)
    total = terms * words[1 - number].peak if row.weight_sum is None else row.weight_sum
    products = words[number].peak * total
    accumulator = row.accumulator
    if accumulator is None:
        raise ValueError(f"{node.name}: its row has no accumulator")
    start = 0
    if len(node.inputs) == 3:
        bias = _need(row, "bias")
        start = _bias_peak(row, bias, frac if accumulator.frac is None else accumulator.frac)
    if accumulator.frac is not None and accumulator.frac != frac:
        drop = frac - accumulator.frac
        if drop < 0:
            raise ValueError(
                f"{node.name}: an accumulator of {accumulator.frac} fraction bits, but products have {frac}"
            )
        bound = (products >> drop) + terms + start
        return _scanned(node, accumulator, Words(accumulator.frac, -bound, bound)), "scan", bound
    bound = products + start
    exact = Words(frac, -bound, bound)
    if accumulator.mode == "saturate" and not _fits(exact, accumulator.word):
        return _scanned(node, accumulator, exact), "scan", bound
    route = _route(node, words, total)
    if accumulator.mode == "wrap" and not _fits(exact, accumulator.word):
        return _register_words(accumulator, frac), route, bound
    _require_fit(node, exact, accumulator.word)
    return exact, route, bound


def _scanned(node: Node, accumulator: Accumulator, exact: Words) -> Words:
    if accumulator.mode == "exact" or _fits(exact, accumulator.word):
        _require_fit(node, exact, accumulator.word)
        return exact
    return _register_words(accumulator, exact.frac)


def _register_words(accumulator: Accumulator, frac: int) -> Words:
    """Returns the `Words` that cover every value of a register."""
    assert accumulator.word is not None
    least = -(1 << (accumulator.word - 1))
    return Words(frac, least, -least - 1)


def _fits(words: Words, word: int | None) -> bool:
    return word is None or words.peak < 1 << (word - 1)


def _require_fit(node: Node, exact: Words, word: int | None) -> None:
    if not _fits(exact, word):
        raise ValueError(
            f"{node.name}: its exact sums need an accumulator of {exact.peak.bit_length() + 1} bits, but have "
            f"{word}; give it more bits, shorter words, or mode='wrap' or 'saturate'"
        )


def _bias_peak(row: SiteFormat, bias: QFormat, frac: int) -> int:
    """Returns the largest magnitude that a bias can have in an accumulator of `frac` fraction bits."""
    peak = format_words(bias).peak if row.bias_peak is None else row.bias_peak
    up = frac - bias.frac
    return peak << up if up >= 0 else -(-peak >> -up)


def terms_of(node: Node) -> int:
    """Returns how many products are summed for one output."""
    lhs, rhs = (n.shape for n in node.inputs[:2])
    if node.op == "dot_general":
        (contracted, _), _ = node.params["dimension_numbers"]
        return math.prod(lhs[d] for d in contracted)
    return math.prod(rhs[d] for d in node.params["dimension_numbers"].rhs_spec[1:])


def split_operand(node: Node) -> int:
    """Returns the number of the operand that is the activation, which is split into limbs where it is too wide."""
    return 0 if node.inputs[0].role == "activation" else 1


def _route(node: Node, words: Sequence[Words], total: int) -> str:
    """Returns the cheapest arithmetic with exact partial sums of the products; a bias is added later, to integers."""
    peak = words[split_operand(node)].peak
    products = peak * total
    if products <= 1 << _FLOAT32:
        return "float32"
    if is_depthwise(node):
        return "int32" if products < 2**31 else "int64"
    if all(limb_count(w) == 1 for w in words) and products < 2**31:
        return "int8"
    if total * max(1 << (LIMB - 1), (peak >> LIMB) + 1) <= 1 << _FLOAT32:
        return "limbs"
    return "float64" if products <= 1 << _FLOAT64 else "int64"


def limb_count(words: Words) -> int:
    """Returns how many balanced int8 limbs are needed to hold every word.

    >>> [limb_count(Words(0, -top, top)) for top in (127, 128, 32639, 32640)]
    [1, 2, 2, 3]
    """
    count = 1
    while True:
        ones = ((1 << LIMB * count) - 1) // ((1 << LIMB) - 1)  # the number whose limbs are all 1
        if words.least >= -128 * ones and words.largest <= 127 * ones:
            return count
        count += 1


def is_depthwise(node: Node) -> bool:
    """Returns whether a convolution has one input channel per group, so that it is a sum of shifted products."""
    if node.op != "conv_general_dilated":
        return False
    numbers = node.params["dimension_numbers"]
    return node.params["feature_group_count"] > 1 and node.inputs[1].shape[numbers.rhs_spec[1]] == 1


def _exact(node: Node, row: SiteFormat | None, found: Mapping[Node, SiteBounds]) -> Words:
    """Returns the words, before any rounding, of a node that is not a sum of products."""
    acts = [found[n].words for n in node.inputs if n.role == "activation" and n.real and n in found]
    if node.op in LOOKING_UP and node.inputs[0].role != "activation":
        return format_words(_need(row, "weight", node.name))
    if node.op in MOVING:
        return acts[0] if acts else _whole_words(node.inputs[0])
    match node.op:
        case "add" | "sub" | "concatenate" | "stack" | "select_n":
            parts = [
                found[n].words if n.role == "activation" else format_words(_need(row, "bias", node.name))
                for n in node.inputs
                if n.real
            ]
            frac = max(p.frac for p in parts)
            parts = [_no_divisor(node, p).shifted(frac) for p in parts]
            if node.op == "add":
                return Words(frac, parts[0].least + parts[1].least, parts[0].largest + parts[1].largest)
            if node.op == "sub":
                return Words(frac, parts[0].least - parts[1].largest, parts[0].largest - parts[1].least)
            return Words(frac, min(p.least for p in parts), max(p.largest for p in parts))
        case "neg":
            return replace(acts[0], least=-acts[0].largest, largest=-acts[0].least)
        case "abs":
            return replace(acts[0], least=0, largest=acts[0].peak)
        case "sign":
            return Words(0, -1, 1)
        case "square" | "integer_pow":
            power = 2 if node.op == "square" else node.params["y"]
            peak = _no_divisor(node, acts[0]).peak ** power
            return Words(acts[0].frac * power, 0 if power % 2 == 0 else -peak, peak)
        case "mul":
            other = acts[1] if len(acts) == 2 else format_words(_need(row, "weight", node.name))
            return _product(_no_divisor(node, acts[0]), other)
        case "div":
            divisor = whole_numbers(node.inputs[1].value)
            assert divisor is not None
            if row is not None and row.reciprocal is not None:
                factor = int(np.max(reciprocals(divisor, row.reciprocal)))
                return _product(_no_divisor(node, acts[0]), Words(row.reciprocal, 0, factor))
            return replace(_no_divisor(node, acts[0]), divisor=divisor)
        case "reduce_sum" | "cumsum" | "reduce_window_sum":
            terms = summed(node)
            return replace(
                _no_divisor(node, acts[0]), least=terms * min(acts[0].least, 0), largest=terms * max(acts[0].largest, 0)
            )
        case "max" | "min" if len(acts) == 2:
            frac = max(w.frac for w in acts)
            a, b = (_no_divisor(node, w).shifted(frac) for w in acts)
            pick = max if node.op == "max" else min
            return Words(frac, pick(a.least, b.least), pick(a.largest, b.largest))
        case "max" | "min":
            constant = next(n for n in node.inputs if n.role != "activation")
            ends = as_words(constant.value, acts[0].frac)
            pick = max if node.op == "max" else min
            low, high = (pick(acts[0].least, int(ends.min())), pick(acts[0].largest, int(ends.max())))
            return replace(acts[0], least=low, largest=high)
        case "clamp":
            low, high = (as_words(node.inputs[k].value, acts[0].frac) for k in (0, 2))
            least = min(max(acts[0].least, int(low.min())), int(high.max()))
            largest = max(min(acts[0].largest, int(high.max())), int(low.min()))
            return replace(acts[0], least=least, largest=largest)
        case "pad":
            value = int(as_words(node.inputs[1].value, acts[0].frac))
            return replace(acts[0], least=min(acts[0].least, value), largest=max(acts[0].largest, value))
    return acts[0]


def _whole_words(node: Node) -> Words:
    """Returns the words of a node of whole numbers or booleans."""
    if node.dtype == bool:
        return Words(0, 0, 1)
    info = np.iinfo(node.dtype)
    return Words(0, int(info.min), int(info.max))


def _no_divisor(node: Node, words: Words) -> Words:
    if words.divisor is not None:
        raise ValueError(f"{node.name}: its input is a quotient that is not rounded")
    return words


def _product(a: Words, b: Words) -> Words:
    ends = [x * y for x in (a.least, a.largest) for y in (b.least, b.largest)]
    return Words(a.frac + b.frac, min(ends), max(ends))


def summed(node: Node) -> int:
    """Returns the largest number of words that one sum adds."""
    shape, params = node.inputs[0].shape, node.params
    match node.op:
        case "reduce_sum":
            return math.prod(shape[a] for a in params["axes"])
        case "cumsum":
            return shape[params["axis"]]
    return math.prod(params["window_dimensions"])


def reciprocals(divisor: np.ndarray, bits: int) -> np.ndarray:
    """Returns round(2^bits / divisor), with halves rounded up, as hardware stores it."""
    return ((2 << bits) // divisor + 1) // 2


def as_words(value: np.ndarray, frac: int) -> np.ndarray:
    """Returns constants as int64 words, rounded once (half even) and saturated at 62 bits."""
    with np.errstate(over="ignore"):
        scaled = np.ldexp(np.asarray(value, np.float64), frac)
    return np.clip(np.rint(scaled), -(2.0**_WIDEST), 2.0**_WIDEST).astype(np.int64)
