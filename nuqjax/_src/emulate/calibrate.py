"""Chooses the formats of a fixed-point emulation from a batch of data, and proves the bounds of its sums."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nuqjax._src.emulate.bounds import sites
from nuqjax._src.emulate.formats import Accumulator, Formats, SiteFormat
from nuqjax._src.emulate.measure import Wanted, measured
from nuqjax._src.emulate.parameters import Parameters
from nuqjax._src.emulate.presets import CHOICES, PRESETS, Preset
from nuqjax._src.emulate.program import MOVING, Node, Program, build, operands
from nuqjax._src.emulate.sums import weight_sums
from nuqjax._src.leaf.codebook_array import CodebookArray
from nuqjax._src.leaf.qformat import QFormat, check_modes
from nuqjax._src.platform.meshes import as_on_automatic
from nuqjax._src.trace.operations import LINEAR


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
        return with_bounds(program, chosen, arrays)

    return proven(cparams, *inputs, **options)


def with_bounds(program: Program, formats: Formats, arrays: Any) -> Formats:
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


def _choose(program: Program, arrays: Any, modes: Preset, words: Mapping[str, int], fallback: str | None) -> Formats:
    """Returns formats with a row for every site that needs one."""
    rows: dict[str, SiteFormat] = {}
    wanted: list[Wanted] = []
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
            wanted.append(Wanted(node.name, "output", (node,), words["input" if node.op == "input" else "word"]))
        for role, nodes in own.items():
            kind = role if nodes[0].role == "parameter" else "constant"
            wanted.append(Wanted(node.name, role, nodes, words[kind]))
    for (site, role, nodes, _), fmt in zip(wanted, measured(program, arrays, wanted, modes), strict=True):
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
