"""Runs an unchanged function on raw integers, with the same words that fixed-point hardware would compute.

The function is traced to a `Program`, and its input is encoded. Every node then computes raw integers from raw integers
and rounds them to its site's format, if it has one. Weights are codebook words looked up by their indices. Between the
encoding of the input and the decoding of the output, floats appear only in sums that the formats prove exact, and where
`fallback="float"` allows them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nuqjax._src.emulate.bounds import SiteBounds, Words, format_words, sites
from nuqjax._src.emulate.exact import exact_words, plain, telling
from nuqjax._src.emulate.formats import Formats, SiteFormat
from nuqjax._src.emulate.parameters import Parameters
from nuqjax._src.emulate.program import TELLING, Node, Program, build
from nuqjax._src.emulate.sums import products_sum, scanned_sum, wrapped
from nuqjax._src.emulate.trace import Recorder
from nuqjax._src.leaf import fixed_point
from nuqjax._src.leaf.words import divide, drop_bits, drop_bits_twice, into_range, outside
from nuqjax._src.platform.compat import enable_x64
from nuqjax._src.platform.host import x64
from nuqjax._src.platform.meshes import as_on_automatic
from nuqjax._src.trace.operations import LINEAR


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
    def run(*args, **kwargs) -> Any:
        program, arrays = build(fn, args, kwargs)
        known = sites(program, formats)
        with x64():
            recorder = Recorder(trace)
            values = _evaluate(program, known, arrays, recorder)
            outputs = [_output(node, values, known, output) for node in program.outputs]
        result = jax.tree.unflatten(program.structure, outputs)
        return result if trace is None else (result, recorder.trace())

    return run


def _evaluate(
    program: Program, known: Mapping[Node, SiteBounds], arrays: Sequence[Any], recorder: Recorder
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
            values[node] = telling(node, known, values, parameters)
        else:
            with enable_x64(False):
                values[node] = node.floating(*(plain(n, values, parameters) for n in node.inputs))
    return values


def _encode_input(node: Node, site: SiteBounds, x: Any, recorder: Recorder) -> jax.Array:
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


# ---------------------------------------------------------------------------------------------------------------------
# The integer rules.


def _words(
    node: Node,
    site: SiteBounds,
    known: Mapping[Node, SiteBounds],
    values: Mapping[Node, Any],
    parameters: Parameters,
    recorder: Recorder,
) -> jax.Array:
    """Returns the raw words that leave a node."""
    if node.op in LINEAR:
        exact = _linear(node, site, known, values, parameters, recorder)
    else:
        exact = exact_words(node, site, known, values, parameters)
    if site.row is None or site.row.output is None or site.words is site.exact:
        return exact.astype(site.exact.dtype)
    words = _round(node, site, exact, recorder)
    recorder.words_of(node, site.row, words)
    return words


def _round(node: Node, site: SiteBounds, exact: jax.Array, recorder: Recorder) -> jax.Array:
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
    site: SiteBounds,
    known: Mapping[Node, SiteBounds],
    values: Mapping[Node, Any],
    parameters: Parameters,
    recorder: Recorder,
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


# ---------------------------------------------------------------------------------------------------------------------
# Floats: at the outputs, and where the fallback allows them.


def _as_float(node: Node, known: Mapping[Node, SiteBounds], values: Mapping[Node, Any], parameters: Parameters) -> Any:
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


def _in_floats(node: Node, known: Mapping[Node, SiteBounds], values: Mapping[Node, Any], parameters: Parameters) -> Any:
    operands = [_as_float(n, known, values, parameters) for n in node.inputs]
    with enable_x64(False):
        return node.floating(*operands)


def _output(node: Node, values: Mapping[Node, Any], known: Mapping[Node, SiteBounds], output: str) -> Any:
    if node.role != "activation":
        return Parameters(values).floats(node)
    x = values[node]
    if node not in known or jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.int32) if output == "raw" else _decoded(x, known[node].words).astype(jnp.float32)
