"""Chooses the formats of a fixed-point emulation from a batch of data, and proves the bounds of its sums."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.emulate.bounds import sites
from nuqjax._src.emulate.emulate import Parameters
from nuqjax._src.emulate.formats import Accumulator, Formats, SiteFormat
from nuqjax._src.emulate.program import LINEAR, MOVING, Node, Program, build, consumers, operands
from nuqjax._src.emulate.sums import weight_sums
from nuqjax._src.leaf import fixed_point
from nuqjax._src.leaf.codebook_array import CodebookArray
from nuqjax._src.leaf.qformat import QFormat, check_modes
from nuqjax._src.leaf.words import rounds_up
from nuqjax._src.platform.meshes import as_on_automatic

CHOICES = ("range", "error", "ristretto")


@dataclass(frozen=True)
class Preset:
    """A named set of modes.

    Attributes:
      choose: how fraction bits are chosen: `"range"`, `"error"` or `"ristretto"`.
      rounding: the rounding mode at each site.
      overflow: the overflow mode at each site.
      accumulator: the accumulator of each dot and convolution.
      reciprocal: fraction bits of the reciprocals that replace divisions; None divides exactly and rounds once.
      shared_bias: whether a bias has as many integer bits as the words of its weights.
    """

    choose: str = "range"
    rounding: str = "half_even"
    overflow: str = "saturate"
    accumulator: Accumulator = field(default_factory=Accumulator)
    reciprocal: int | None = None
    shared_bias: bool = False


PRESETS: Mapping[str, Preset] = {
    "nuqjax": Preset(),
    "ap_fixed": Preset(rounding="floor", overflow="wrap", accumulator=Accumulator(32, "wrap")),
    "ristretto": Preset(choose="ristretto", rounding="half_away", shared_bias=True),
    "gemmlowp": Preset(rounding="gemmlowp", accumulator=Accumulator(32)),
}


def calibrate(
    fn: Callable[..., Any],
    cparams: Any,
    *inputs: Any,
    word: int = 8,
    weight_word: int = 8,
    bias_word: int = 16,
    constant_word: int = 16,
    input_word: int | None = None,
    preset: str = "nuqjax",
    choose: str | None = None,
    rounding: str | None = None,
    overflow: str | None = None,
    accumulator: Accumulator | None = None,
    fallback: str | None = None,
    formats: Formats | None = None,
    **options: Any,
) -> Formats:
    """Chooses a format for every site of `fn` from its values on a batch, and proves that its sums are exact.

    The function runs once in floating point on the decoded tree, and each site's fraction bits are chosen to suit its
    values there. A site whose values are not negative, or whose only use is a rectifier, gets unsigned words, unless
    overflow wraps or `choose` is `"ristretto"`. Weights that have a `QFormat` codebook keep that format.

    Args:
      fn: the function to emulate: `fn(params, *inputs)`.
      cparams: its tree, compressed or dense.
      *inputs: a batch of its inputs.
      word: bits of every site's words, 2 to 32.
      weight_word: bits of the weights' words.
      bias_word: bits of the biases' words.
      constant_word: bits of the words of constants in the function itself, such as a slope.
      input_word: bits of the inputs' words; None for `word`.
      preset: `"nuqjax"` (half even, saturate), `"ap_fixed"` (its defaults: floor, wrap), `"ristretto"` (its rule for
        fraction bits, half away) or `"gemmlowp"` (its double rounding). The next four arguments override it.
      choose: `"range"`: the most fraction bits with which no value of the batch overflows; `"error"`: those with the
        least squared error on the batch, where values may overflow; `"ristretto"`: word − ⌈log2 max⌉ for activations
        and word − ⌈log2 max + 1⌉ for parameters.
      rounding: the mode at each site: one of those of `nuqjax.fixed_point`, or `"gemmlowp"`.
      overflow: the mode at each site.
      accumulator: the accumulator of every dot and convolution.
      fallback: `"float"` computes operations without an exact rule in floating point; None makes them errors.
      formats: formats to keep; then only their bounds are proven, for this tree.
      **options: further arguments of `fn`.

    Returns:
      The formats, with what is proven about every sum: the bits that it needs and the route that computes it.

    Raises:
      ValueError: an option is unknown; a value on the batch is not finite; an exact accumulator would not hold every
        sum. The message names the site.
      NotImplementedError: an operation has no exact rule and `fallback` is None.

    >>> import jax, jax.numpy as jnp, nuqjax
    >>> predict = lambda params, x: jax.nn.relu(x @ params["w"])
    >>> cparams = nuqjax.compress({"w": jnp.linspace(-1, 1, 512).reshape(16, 32)}, bits=4)
    >>> formats = calibrate(predict, cparams, jnp.linspace(-1, 1, 32).reshape(2, 16))
    >>> formats["w"].weight, formats["w"].output.signed, formats["w"].route
    (QFormat(word=8, frac=7, signed=True), False, 'float32')
    """
    if fallback not in (None, "float"):
        raise ValueError(f"unknown fallback {fallback!r}; known: None, 'float'")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    given = {"choose": choose, "rounding": rounding, "overflow": overflow, "accumulator": accumulator}
    modes = replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})
    if modes.choose not in CHOICES:
        raise ValueError(f"unknown choose {modes.choose!r}; known: {', '.join(CHOICES)}")
    check_modes("half_even" if modes.rounding == "gemmlowp" else modes.rounding, modes.overflow)
    words = {"word": word, "weight": weight_word, "bias": bias_word, "constant": constant_word}
    words["input"] = word if input_word is None else input_word

    @as_on_automatic(None)
    def proven(*args, **options) -> Formats:
        program, arrays = build(fn, args, options)
        chosen = _choose(program, arrays, modes, words, fallback) if formats is None else formats
        return prove(program, chosen, arrays)

    return proven(cparams, *inputs, **options)


def prove(program: Program, formats: Formats, arrays: Any) -> Formats:
    """Returns the formats with each row's weight sum, bias peak, bound and route, for these parameters."""
    parameters = Parameters(dict(zip(program.arrays, arrays, strict=True)))
    rows = dict(formats.rows)
    for node in program.nodes:
        if node in program.floats:
            continue
        for role, operand in operands(node):
            row = formats[node.name]
            fmt = getattr(row, role)
            if node.op not in LINEAR or fmt is None:
                continue
            words = np.asarray(parameters.words(operand, fmt))
            if role == "weight":
                facts = weight_sums(node, words)
            else:
                facts = {"bias_peak": int(np.abs(words.astype(np.int64)).max(initial=0))}
            rows[node.name] = replace(rows[node.name], **facts)
    known = sites(program, replace(formats, rows=rows))
    for node, site in known.items():
        if node.name in rows:
            rows[node.name] = replace(rows[node.name], bound=site.bound, route=site.route or None)
    return replace(formats, rows=rows)


class _Wanted(NamedTuple):
    """A format to choose: the site and the field of its row, the nodes with its words, and the word length in bits."""

    site: str
    field: str
    nodes: tuple[Node, ...]
    word: int


def _choose(program: Program, arrays: Any, modes: Preset, words: Mapping[str, int], fallback: str | None) -> Formats:
    """Returns formats with a row for every site that needs one."""
    rows: dict[str, SiteFormat] = {}
    wanted: list[_Wanted] = []
    values = dict(zip(program.arrays, arrays, strict=True))
    for node in program.nodes:
        floats = node in program.floats
        own = {} if floats else _by_role(node)
        told = floats and node.op not in MOVING
        if node not in program.rounded and not own and not told:
            continue
        linear = node.op in LINEAR and not floats
        rows[node.name] = SiteFormat(
            node.name,
            f"float: {node.op}" if floats else node.op,
            accumulator=modes.accumulator if linear else None,
            rounding=modes.rounding,
            overflow=modes.overflow,
            reciprocal=modes.reciprocal if node.op == "div" else None,
        )
        if node in program.rounded:
            wanted.append(_Wanted(node.name, "output", (node,), words["input" if node.op == "input" else "word"]))
        for role, nodes in own.items():
            kind = role if nodes[0].role == "parameter" else "constant"
            wanted.append(_Wanted(node.name, role, nodes, words[kind]))
    for (site, role, nodes, _), fmt in zip(wanted, _measure(program, arrays, wanted, modes), strict=True):
        if role == "weight":
            fmt = _codebook_format(nodes[0], values) or fmt
        rows[site] = replace(rows[site], **{role: fmt})
    for name, row in rows.items():
        if row.accumulator is not None and row.weight is not None and row.bias is not None:
            bias = row.bias
            if modes.shared_bias:
                bias = replace(bias, frac=row.weight.frac + bias.word - row.weight.word)
            rows[name] = replace(row, bias=_no_finer(bias, row, program, rows))
    return Formats(rows, fallback)


def _by_role(node: Node) -> dict[str, tuple[Node, ...]]:
    """Returns the parameters and constants that need a format of their own, by the row's field for that format."""
    found: dict[str, tuple[Node, ...]] = {}
    for role, operand in operands(node):
        found[role] = (*found.get(role, ()), operand)
    return found


def _no_finer(bias: QFormat, row: SiteFormat, program: Program, rows: Mapping[str, SiteFormat]) -> QFormat:
    """Returns the bias format with at most as many fraction bits as the products: more would be dropped."""
    node = next(n for n in program.nodes if n.name == row.site and n.role == "activation")
    act = next(n for n in node.inputs if n.role == "activation")
    frac = _frac_of(act, rows)
    assert row.weight is not None
    return bias if frac is None else replace(bias, frac=min(bias.frac, row.weight.frac + frac))


def _frac_of(node: Node, rows: Mapping[str, SiteFormat]) -> int | None:
    """Returns the fraction bits of a node's words if they come from a single site, else None."""
    while node.name not in rows or rows[node.name].output is None:
        acts = [n for n in node.inputs if n.role == "activation" and n.real]
        if len(acts) != 1:
            return None
        [node] = acts
    fmt = rows[node.name].output
    return fmt and fmt.frac


def _codebook_format(node: Node, values: Mapping[Node, Any]) -> QFormat | None:
    """Returns the codebook `QFormat` of the leaf that moves alone turn into this parameter, or None."""
    while node.op in MOVING and node.role == "parameter":
        node = node.inputs[0]
    leaf = values.get(node)
    return leaf.codebook_format if isinstance(leaf, CodebookArray) and leaf.scale is None else None


# ---------------------------------------------------------------------------------------------------------------------
# Measurements on the batch.


def _measure(program: Program, arrays: Any, wanted: Sequence[_Wanted], modes: Preset) -> list[QFormat]:
    """Returns a format for each entry of `wanted`."""
    uses = consumers(program.nodes)

    def values_of(arrays) -> list[jax.Array]:
        floats = _floats(program, arrays)
        return [
            jnp.concatenate([jnp.clip(floats(node), *_clip(node, uses)).reshape(-1) for node in entry.nodes])
            for entry in wanted
        ]

    def extremes(arrays):
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

    def errors(arrays):
        values = values_of(arrays)
        return [[_squared_error(v, fmt, modes) for fmt in fmts] for v, fmts in zip(values, candidates, strict=True)]

    found = jax.device_get(jax.jit(errors)(arrays))
    return [fmts[int(np.argmin(error))] for fmts, error in zip(candidates, found, strict=True)]


def _first_choice(entry: _Wanted, low: float, high: float, modes: Preset) -> QFormat:
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
