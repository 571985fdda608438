"""Exact raw integers of operations that are not sums of products, and comparisons of words."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.emulate.bounds import SiteBounds, Words, as_words, reciprocals
from nuqjax._src.emulate.parameters import Parameters
from nuqjax._src.emulate.program import MOVING, Node, whole_numbers
from nuqjax._src.platform.compat import enable_x64
from nuqjax._src.trace.interpret import bind


def plain(node: Node, values: Mapping[Node, Any], parameters: Parameters) -> Any:
    """Returns what the function computes for a node: its value, or the floats of a parameter."""
    return values[node] if node.role == "activation" else parameters.floats(node)


def exact_words(
    node: Node, site: SiteBounds, known: Mapping[Node, SiteBounds], values: Mapping[Node, Any], parameters: Parameters
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
        return _moved(node, x, [plain(n, values, parameters) for n in rest])
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
            return lax.select_n(plain(node.inputs[0], values, parameters), *(aligned(n) for n in node.inputs[1:]))
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


def telling(
    node: Node, known: Mapping[Node, SiteBounds], values: Mapping[Node, Any], parameters: Parameters
) -> jax.Array:
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
