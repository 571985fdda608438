"""Runs an unchanged function on raw integers, with the same words that fixed-point hardware would compute.

The function is traced to a `Program`, and its input is encoded. Every node then computes raw integers from raw integers
and rounds them to its site's format, if it has one. Weights are codebook words looked up by their indices. Between the
encoding of the input and the decoding of the output, floats appear only in sums that the formats prove exact, and where
`fallback="float"` allows them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from nuqjax._src.emulate.bounds import Site, Words, as_words, format_words, reciprocals, sites
from nuqjax._src.emulate.formats import Formats, SiteFormat
from nuqjax._src.emulate.program import LINEAR, MOVING, TELLING, Node, Program, build, whole_numbers
from nuqjax._src.emulate.sums import products_sum, scanned_sum, wrapped
from nuqjax._src.leaf import fixed_point
from nuqjax._src.leaf.codebook_array import CodebookArray, decode, is_codebook_array, level_values
from nuqjax._src.leaf.qformat import QFormat
from nuqjax._src.leaf.words import divide, drop_bits, drop_bits_twice, into_range, outside
from nuqjax._src.platform.compat import enable_x64
from nuqjax._src.platform.host import x64
from nuqjax._src.platform.meshes import as_on_automatic
from nuqjax._src.trace.interpret import bind


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("words", "accumulator_overflows", "output_overflows"),
    meta_fields=("formats",),
)
@dataclass(frozen=True)
class Trace:
    """What an emulation computed, site by site.

    Attributes:
      words: the raw int32 words that leave each traced site.
      accumulator_overflows: how many additions of each dot or convolution saturated, or how many of its sums wrapped.
      output_overflows: how many words of each site were outside the range of its output format. Unsigned words that
        saturate at zero act as a rectifier, so values below zero are not counted.
      formats: the format of each site's words.

    >>> import jax.numpy as jnp, nuqjax
    >>> predict = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.linspace(-1, 1, 32).reshape(16, 2)}, jnp.ones((1, 16))
    >>> formats = nuqjax.calibrate(predict, params, x)
    >>> _, trace = emulate(predict, formats, trace=["w"])(params, x)
    >>> list(trace.words), dict(trace.formats)["w"].word
    (['w'], 8)
    """

    words: Mapping[str, jax.Array]
    accumulator_overflows: Mapping[str, jax.Array]
    output_overflows: Mapping[str, jax.Array]
    formats: tuple[tuple[str, QFormat], ...]

    def save(self, path: str | Path) -> None:
        """Writes the words: one array per site to an `.npz` file; else hexadecimal text files to a folder of that name.

        A text file begins with a comment that gives the site, its format and its shape. Each further line is one word,
        in row-major order, in two's complement with as many digits as the format needs, as Verilog's `$readmemh` reads.
        """
        path = Path(path)
        if path.suffix == ".npz":
            with path.open("wb") as file:
                arrays: dict[str, Any] = {k: np.asarray(words) for k, words in self.words.items()}
                np.savez_compressed(file, **arrays)
            return
        path.mkdir(parents=True, exist_ok=True)
        formats = dict(self.formats)
        for number, (site, words) in enumerate(self.words.items()):
            fmt, array = formats[site], np.asarray(words)
            kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in site)
            lines = [f"// {site}, word={fmt.word} frac={fmt.frac} signed={fmt.signed}, shape {list(array.shape)}"]
            digits, mask = -(-fmt.word // 4), (1 << fmt.word) - 1
            lines += [f"{int(word) & mask:0{digits}x}" for word in array.reshape(-1)]
            (path / f"{number:03d}_{kept}.hex").write_text("\n".join(lines) + "\n", encoding="utf-8")


def emulate(
    fn: Callable[..., Any],
    formats: Formats,
    *,
    output: str = "decoded",
    trace: Sequence[str] | None = None,
) -> Callable[..., Any]:
    """Lifts a function of dense arrays to one that computes on raw fixed-point integers.

    The function is not changed. It may be a Flax `model.apply`, an NNX call, or any JAX code built from dots,
    convolutions, additions, rectifiers, pools, means, concatenations, selections and changes of shape. Its first
    argument is the tree of parameters, compressed or dense; every other array is an input. The words follow from
    `formats` and do not depend on the batch size, the device, `jit` or x64 mode.

    The bounds that `calibrate` proves hold for the parameters that it is given. Call it again for other parameters.

    Args:
      fn: a function that JAX can trace.
      formats: the formats from `calibrate`, possibly edited.
      output: `"decoded"` for float32 outputs, `"raw"` for their int32 words.
      trace: parts of the names of the sites to trace; `[""]` selects all sites, None traces none.

    Returns:
      A function of the same arguments. With `trace` it returns the outputs and a `Trace`. On a mesh with explicit axes
      both are replicated.

    Raises:
      ValueError: `output` is unknown; or, when the result is called, the formats do not fit the function (the message
        names the site), or the function changes its arguments in place.
      NotImplementedError: when the result is called, an operation has no exact rule and the formats have no `fallback`.

    >>> import jax, jax.numpy as jnp, nuqjax
    >>> predict = lambda params, x: jax.nn.relu(x @ params["w"] + params["b"])
    >>> params = {"w": jnp.linspace(-1, 1, 512).reshape(16, 32), "b": jnp.zeros(32)}
    >>> cparams, x = nuqjax.compress(params, bits=4), jnp.linspace(-1, 1, 32).reshape(2, 16)
    >>> formats = nuqjax.calibrate(predict, cparams, x)
    >>> words, trace = emulate(predict, formats, output="raw", trace=["w"])(cparams, x)
    >>> words.shape, words.dtype, list(trace.words)
    ((2, 32), dtype('int32'), ['w'])
    """
    if output not in ("decoded", "raw"):
        raise ValueError(f"unknown output {output!r}; known: decoded, raw")

    @as_on_automatic(PartitionSpec())
    @functools.wraps(fn)
    def run(*args, **kwargs):
        program, arrays = build(fn, args, kwargs)
        known = sites(program, formats)
        with x64():
            recorder = _Recorder(trace)
            values = _evaluate(program, known, arrays, recorder)
            outputs = [_output(node, values, known, output) for node in program.outputs]
        result = jax.tree.unflatten(program.structure, outputs)
        return result if trace is None else (result, recorder.trace())

    return run


class _Recorder:
    """Collects the words of the requested sites, and every site's overflows."""

    def __init__(self, wanted: Sequence[str] | None):
        self.wanted = wanted
        self.words: dict[str, jax.Array] = {}
        self.formats: list[tuple[str, QFormat]] = []
        self.accumulators: dict[str, jax.Array] = {}
        self.outputs: dict[str, jax.Array] = {}

    def words_of(self, node: Node, row: SiteFormat, words: jax.Array) -> None:
        if self.wanted is not None and any(part in node.name for part in self.wanted):
            self.words[node.name] = words.astype(jnp.int32)
            self.formats.append((node.name, row.output))  # pyright: ignore[reportArgumentType]

    def count(self, counts: dict[str, jax.Array], node: Node, over: Callable[[], jax.Array]) -> None:
        if self.wanted is not None:
            counts[node.name] = over()

    def trace(self) -> Trace:
        return Trace(self.words, self.accumulators, self.outputs, tuple(self.formats))


def _evaluate(
    program: Program, known: Mapping[Node, Site], arrays: Sequence[Any], recorder: _Recorder
) -> dict[Node, Any]:
    """Returns each node's value: raw integers, floats where it runs in floating point, else what the function gives."""
    values: dict[Node, Any] = dict(zip(program.arrays, arrays, strict=True))
    parameters = Parameters(values)
    for node in program.nodes:
        if node.role != "activation":
            continue
        site = known.get(node)
        if node.op == "input":
            if site is not None:
                values[node] = _encode_input(node, site, values[node], recorder)
        elif node in program.floats:
            values[node] = _in_floats(node, known, values, parameters)
        elif site is not None:
            values[node] = _words(node, site, known, values, parameters, recorder)
        elif node.op in TELLING and any(n in known and n not in program.floats for n in node.inputs):
            values[node] = _telling(node, known, values, parameters)
        else:
            with enable_x64(False):
                values[node] = node.floating(*(_plain(n, values, parameters) for n in node.inputs))
    return values


def _plain(node: Node, values: Mapping[Node, Any], parameters: "Parameters") -> Any:
    return values[node] if node.role == "activation" else parameters.floats(node)


def _encode_input(node: Node, site: Site, x: Any, recorder: _Recorder) -> jax.Array:
    words = _encoded(site.row, x)
    fmt = site.row.output  # pyright: ignore[reportOptionalMemberAccess]
    assert fmt is not None
    over = functools.partial(fixed_point.overflows, jnp.asarray(x), fmt, rounding=_one(site.row.rounding))  # pyright: ignore[reportOptionalMemberAccess]
    recorder.count(recorder.outputs, node, lambda: over().sum(dtype=jnp.int32))
    recorder.words_of(node, site.row, words)  # pyright: ignore[reportArgumentType]
    return words


def _encoded(row: SiteFormat | None, x: Any) -> jax.Array:
    """Encodes floats as words of a row's output format."""
    assert row is not None
    assert row.output is not None
    return fixed_point.encode(jnp.asarray(x), row.output, rounding=_one(row.rounding), overflow=row.overflow)


def _one(rounding: str) -> str:
    """Returns the mode that rounds a real value, once: gemmlowp's two roundings apply to words only."""
    return "half_away" if rounding == "gemmlowp" else rounding


class Parameters:
    """Computes the words and the floats of parameters and constants where they are needed."""

    def __init__(self, arrays: Mapping[Node, Any]):
        self._arrays = arrays

    def floats(self, node: Node) -> Any:
        """Returns the value that the function computes from the decoded leaves."""
        if node.op == "constant":
            return jnp.asarray(node.value)
        if node.op == "leaf":
            x = self._arrays[node]
            return decode(x) if is_codebook_array(x) else jnp.asarray(x)
        with enable_x64(False):
            return node.floating(*(self.floats(n) for n in node.inputs))

    def words(self, node: Node, fmt: QFormat) -> jax.Array:
        """Returns raw words: a leaf's are looked up in its codebook; a value computed from leaves is rounded."""
        if node.op in MOVING and node.role == "parameter" and node.inputs[0].real:
            [inner, *rest] = node.inputs
            if node.op == "index" and inner.op == "leaf" and _is_stacked(self._arrays[inner]):
                return leaf_words(self._arrays[inner][node.index], fmt)
            if node.op in ("convert_element_type", "reduce_precision"):
                return self.words(inner, fmt)
            return node.floating(self.words(inner, fmt), *(self.floats(n) for n in rest))
        if node.op == "leaf" and is_codebook_array(self._arrays[node]):
            return leaf_words(self._arrays[node], fmt)
        return fixed_point.encode(self.floats(node), fmt)


def _is_stacked(x: Any) -> bool:
    return isinstance(x, CodebookArray) and bool(x.stack_shape)


def leaf_words(leaf: CodebookArray, fmt: QFormat) -> jax.Array:
    """Returns a compressed leaf's words: levels rounded once (half even, saturating), looked up by the indices."""
    if leaf.scale is not None:  # scaled levels do not form a small table, so every weight is rounded
        return fixed_point.encode(decode(leaf), fmt)
    words = leaf.levels if leaf.codebook_format == fmt else fixed_point.encode(level_values(leaf), fmt)
    raw = replace(leaf, levels=words.astype(jnp.int32), codebook_format=None, dtype=np.dtype(np.int32))
    return decode(raw)


# ---------------------------------------------------------------------------------------------------------------------
# The integer rules.


def _words(
    node: Node,
    site: Site,
    known: Mapping[Node, Site],
    values: Mapping[Node, Any],
    parameters: Parameters,
    recorder: _Recorder,
) -> jax.Array:
    """Returns the raw words that leave a node."""
    if node.op in LINEAR:
        exact = _linear(node, site, known, values, parameters, recorder)
    else:
        exact = _exact(node, site, known, values, parameters)
    if site.row is None or site.row.output is None or site.words is site.exact:
        return exact.astype(site.exact.dtype)
    words = _round(node, site, exact, recorder)
    recorder.words_of(node, site.row, words)
    return words


def _round(node: Node, site: Site, exact: jax.Array, recorder: _Recorder) -> jax.Array:
    """Applies the single rounding of a site, then its overflow."""
    row, fmt, words = site.row, site.row.output, site.exact  # pyright: ignore[reportOptionalMemberAccess]
    assert row is not None
    assert fmt is not None
    drop = words.frac - fmt.frac
    reach = max(words.peak, 1).bit_length() + max(-drop, 0)
    exact = exact.astype(jnp.int32 if reach < 31 and fmt.word < 31 and words.divisor is None else jnp.int64)
    if words.divisor is not None:
        if drop < 0:
            exact, drop = exact << -drop, 0
        whole = divide(exact, jnp.asarray(words.divisor << drop), _one(row.rounding))
        drop = 0
    elif row.rounding == "gemmlowp":
        whole = drop_bits_twice(exact, drop)
    else:
        whole = drop_bits(exact, drop, row.rounding)
    up = max(-drop, 0)
    rectifies = not fmt.signed and row.overflow != "wrap"
    recorder.count(
        recorder.outputs, node, lambda: (outside(whole, up, fmt) & ~(rectifies & (whole < 0))).sum(dtype=jnp.int32)
    )
    return into_range(whole, up, fmt, row.overflow).astype(jnp.int32)


def _linear(
    node: Node,
    site: Site,
    known: Mapping[Node, Site],
    values: Mapping[Node, Any],
    parameters: Parameters,
    recorder: _Recorder,
) -> jax.Array:
    row = site.row
    assert row is not None
    operands, spans = [], []
    for n in node.inputs[:2]:
        if n.role != "activation":
            assert row.weight is not None
            operands.append(parameters.words(n, row.weight))
            spans.append(format_words(row.weight))
        else:
            x = values[n]
            operands.append(_encoded(known[n].row, x) if jnp.issubdtype(x.dtype, jnp.floating) else x)
            spans.append(known[n].words)
    [lhs, rhs], frac, accumulator = operands, sum(words.frac for words in spans), row.accumulator
    assert accumulator is not None
    target = frac if accumulator.frac is None else accumulator.frac
    start: Any = 0
    if len(node.inputs) == 3:
        assert row.bias is not None
        start = parameters.words(node.inputs[2], row.bias).astype(jnp.int64)
        up = target - row.bias.frac
        start = start << up if up >= 0 else drop_bits(start, -up, "half_even")
        start = -start if node.subtracts_bias else start
    if site.route == "scan":
        scanned = scanned_sum(node, lhs, rhs, start, frac, accumulator)
        recorder.count(recorder.accumulators, node, lambda: scanned.overflows)
        return scanned.words
    dtype = "int32" if site.bound < 2**31 else "int64"
    total = products_sum(node, lhs, rhs, spans, site.route, dtype) + jnp.asarray(start, dtype)
    if accumulator.mode == "wrap" and site.bound >= 1 << (accumulator.word - 1):  # pyright: ignore[reportOptionalOperand]
        kept = wrapped(total.astype(jnp.int64), accumulator.word)  # pyright: ignore[reportArgumentType]
        recorder.count(recorder.accumulators, node, lambda: (kept != total).sum(dtype=jnp.int32))
        return kept
    return total


def _exact(
    node: Node, site: Site, known: Mapping[Node, Site], values: Mapping[Node, Any], parameters: Parameters
) -> jax.Array:
    """Returns the exact raw integers of a node that is not a sum of products."""
    dtype = site.exact.dtype
    row = site.row

    def words(n: Node, role: str = "bias") -> jax.Array:
        """Returns an operand's words in the node's dtype."""
        if n.role == "activation":
            return values[n].astype(dtype)
        return parameters.words(n, getattr(row, role)).astype(dtype)

    def aligned(n: Node) -> jax.Array:
        frac = known[n].words.frac if n.role == "activation" else row.bias.frac  # pyright: ignore[reportOptionalMemberAccess]
        return words(n) << (site.exact.frac - frac)

    def constant(n: Node) -> jax.Array:
        """Returns a constant's words at the operand's fraction bits, clipped to the range of the dtype."""
        info = jnp.iinfo(dtype)
        return jnp.asarray(np.clip(as_words(n.value, site.exact.frac), info.min, info.max), dtype)

    acts = [n for n in node.inputs if n.role == "activation" and n.real]
    if node.op in MOVING:
        [first, *rest] = node.inputs
        x = words(first, "weight")
        return _moved(node, x, [_plain(n, values, parameters) for n in rest])
    match node.op:
        case "add":
            return aligned(node.inputs[0]) + aligned(node.inputs[1])
        case "sub":
            return aligned(node.inputs[0]) - aligned(node.inputs[1])
        case "neg":
            return -words(acts[0])
        case "abs":
            return jnp.abs(words(acts[0]))
        case "sign":
            return jnp.sign(words(acts[0]))
        case "square":
            return words(acts[0]) ** 2
        case "integer_pow":
            x = words(acts[0])
            return functools.reduce(lambda a, b: a * b, [x] * node.params["y"])
        case "mul":
            return words(node.inputs[0], "weight") * words(node.inputs[1], "weight")
        case "div":
            if row is None or row.reciprocal is None:
                return words(acts[0])  # `_round` divides
            divisor = whole_numbers(node.inputs[1].value)
            assert divisor is not None
            return words(acts[0]) * jnp.asarray(reciprocals(divisor, row.reciprocal), dtype)
        case "concatenate":
            return lax.concatenate([aligned(n) for n in node.inputs], node.params["dimension"])
        case "stack":
            return jnp.stack([aligned(n) for n in node.inputs], node.params.get("axis", 0))
        case "select_n":
            return lax.select_n(_plain(node.inputs[0], values, parameters), *(aligned(n) for n in node.inputs[1:]))
        case "max" | "min":
            pick = jnp.maximum if node.op == "max" else jnp.minimum
            if len(acts) == 2:
                return pick(aligned(acts[0]), aligned(acts[1]))
            [other] = [n for n in node.inputs if n.role != "activation"]
            return pick(words(acts[0]), constant(other))
        case "clamp":
            low, x, high = node.inputs
            return lax.clamp(constant(low), words(x), constant(high))
        case "pad":
            return lax.pad(words(acts[0]), constant(node.inputs[1]), node.params["padding_config"])
        case "reduce_window_max" | "reduce_window_min":
            return _pooled(node, words(acts[0]), known[acts[0]].words)
        case "reduce_sum":
            return words(acts[0]).sum(axis=node.params["axes"], dtype=dtype)
        case "reduce_max":
            return words(acts[0]).max(axis=node.params["axes"])
        case "reduce_min":
            return words(acts[0]).min(axis=node.params["axes"])
        case "cumsum":
            return lax.cumsum(words(acts[0]), axis=node.params["axis"], reverse=node.params["reverse"])
        case "reduce_window_sum":
            return _windows(node, words(acts[0]), 0, lax.add)
    raise AssertionError(f"{node.name}: {node.op} is listed as exact, but has no rule")


def _moved(node: Node, x: jax.Array, rest: Sequence[Any]) -> jax.Array:
    """Returns the operand's words, moved as the function moves its values."""
    if node.op in ("convert_element_type", "reduce_precision"):
        return x
    if node.op == "gather":  # a look-up outside the array gives zero, since words have no NaN
        return node.eqns[0].primitive.bind(x, *rest, **{**node.params, "fill_value": 0})
    return node.floating(x, *rest)


def _pooled(node: Node, x: jax.Array, words: Words) -> jax.Array:
    """Pools windows; places outside the array hold the least word, or the largest for a minimum."""
    if node.op == "reduce_window_max":
        return _windows(node, x, words.least, lax.max)
    return _windows(node, x, words.largest, lax.min)


def _windows(node: Node, x: jax.Array, start: int, combine: Callable[[Any, Any], Any]) -> jax.Array:
    params = node.params
    return lax.reduce_window(
        x,
        jnp.asarray(start, x.dtype),
        combine,
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["base_dilation"],
        params["window_dilation"],
    )


def _telling(node: Node, known: Mapping[Node, Site], values: Mapping[Node, Any], parameters: Parameters) -> jax.Array:
    """Computes comparisons and positions from words, with the same results as from their values."""
    if node.op in ("argmax", "argmin"):
        with enable_x64(False):
            return bind(node.eqns[0], [values[node.inputs[0]].astype(jnp.int32)])[0]
    if node.op == "is_finite":
        return jnp.ones(node.shape, bool)
    compare = {"lt": lax.lt, "le": lax.le, "gt": lax.gt, "ge": lax.ge, "eq": lax.eq, "ne": lax.ne}[node.op]
    a, b = node.inputs
    if a.role == b.role == "activation":
        frac = max(known[a].words.frac, known[b].words.frac)
        return compare(*(values[n].astype(jnp.int64) << (frac - known[n].words.frac) for n in (a, b)))
    act, other = (a, b) if a.role == "activation" else (b, a)
    # Words and threshold are doubled: a threshold between two words becomes the odd number between their doubles.
    with np.errstate(over="ignore"):
        scaled = np.ldexp(np.asarray(other.value, np.float64), known[act].words.frac)
    scaled = np.clip(scaled, -(2.0**52), 2.0**52)
    threshold = jnp.asarray((np.floor(scaled) + np.ceil(scaled)).astype(np.int64))
    doubled = values[act].astype(jnp.int64) * 2
    return compare(doubled, threshold) if act is a else compare(threshold, doubled)


# ---------------------------------------------------------------------------------------------------------------------
# Floats: at the outputs, and where the fallback allows them.


def _as_float(node: Node, known: Mapping[Node, Site], values: Mapping[Node, Any], parameters: Parameters) -> Any:
    """Returns a node's values in the function's own dtype, decoded if they are words."""
    if node.role != "activation":
        return parameters.floats(node)
    x = values[node]
    if node not in known or jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return _decoded(x, known[node].words).astype(node.dtype)


def _decoded(x: jax.Array, words: Words) -> jax.Array:
    value = x.astype(jnp.float64) * 2.0**-words.frac
    return value if words.divisor is None else value / words.divisor


def _in_floats(node: Node, known: Mapping[Node, Site], values: Mapping[Node, Any], parameters: Parameters) -> Any:
    operands = [_as_float(n, known, values, parameters) for n in node.inputs]
    with enable_x64(False):
        return node.floating(*operands)


def _output(node: Node, values: Mapping[Node, Any], known: Mapping[Node, Site], output: str) -> Any:
    if node.role != "activation":
        return Parameters(values).floats(node)
    x = values[node]
    if node not in known or jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.int32) if output == "raw" else _decoded(x, known[node].words).astype(jnp.float32)
