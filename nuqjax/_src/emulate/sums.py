"""Exact sums of products of raw integers: dots and convolutions by several routes, which agree bit for bit.

On CPUs the routes are those that XLA runs fast: int8 operands with int32 sums, float32 or float64 where every partial
sum fits the significand, and two float32 sums of balanced limbs. On other devices float sums may be inexact
(reduced-precision operands, Winograd and Fourier convolutions) and integer convolutions do not exist. There a
convolution is a sum of dots, one for each tap of its window, of balanced int8 limbs with int32 sums. Saturating sums
are computed by a scan over their terms in order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nuqjax._src.emulate.bounds import LIMB, Words, is_depthwise, limb_count, split_operand, terms_of
from nuqjax._src.emulate.formats import Accumulator
from nuqjax._src.emulate.program import Node
from nuqjax._src.leaf.words import drop_bits

_FLOATS = {"float32": jnp.float32, "float64": jnp.float64}


def products_sum(
    node: Node, lhs: jax.Array, rhs: jax.Array, words: Sequence[Words], route: str, dtype: str
) -> jax.Array:
    """Computes the sums of a dot or a convolution of raw integers, by a route that is proven exact for their bound.

    Args:
      node: the dot or the convolution.
      lhs: raw integers of its first operand.
      rhs: raw integers of its second operand.
      words: the bounds of both operands.
      route: one of those of `SiteFormat`.
      dtype: `"int32"` or `"int64"`: the dtype of the result, which must hold every sum.
    """
    if is_depthwise(node):
        kind = _FLOATS.get(route, jnp.dtype(dtype))
        return _by_taps(node, lhs.astype(kind), rhs.astype(kind), lambda a, b: a * b).astype(dtype)
    return lax.platform_dependent(
        lhs,
        rhs,
        cpu=lambda lhs, rhs: _on_cpu(node, lhs, rhs, route, dtype),
        default=lambda lhs, rhs: by_int8_limbs(node, lhs, rhs, words, dtype),
    )


def _on_cpu(node: Node, lhs: jax.Array, rhs: jax.Array, route: str, dtype: str) -> jax.Array:
    if route == "int8":
        return _primitive(node, lhs.astype(jnp.int8), rhs.astype(jnp.int8), jnp.int32).astype(dtype)
    if route in ("float32", "float64"):
        kind = _FLOATS[route]
        return _primitive(node, lhs.astype(kind), rhs.astype(kind), kind).astype(dtype)
    if route == "limbs":
        operands = [lhs, rhs]
        number = split_operand(node)
        low, high = _balanced(operands[number], 2)
        sums = []
        for limb in (high, low):
            operands[number] = limb
            a, b = (x.astype(jnp.float32) for x in operands)
            sums.append(_primitive(node, a, b, jnp.float32).astype(dtype))
        return (sums[0] << LIMB) + sums[1]
    return _primitive(node, lhs.astype(jnp.int64), rhs.astype(jnp.int64), jnp.int64).astype(dtype)


def _primitive(node: Node, lhs: jax.Array, rhs: jax.Array, dtype: Any) -> jax.Array:
    """Applies the node's own dot or convolution, with sums of `dtype`."""
    params = node.params
    options = {"preferred_element_type": dtype, "precision": lax.Precision.HIGHEST}
    if node.op == "dot_general":
        return lax.dot_general(lhs, rhs, params["dimension_numbers"], **options)
    names = ["window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count"]
    return lax.conv_general_dilated(lhs, rhs, **{name: params[name] for name in names}, **options)


def _balanced(x: jax.Array, count: int) -> list[jax.Array]:
    """Splits x into `count` limbs, least first: x = Σ limb_i · 2^(8·i), all but the last in −128 … 127."""
    limbs = []
    for _ in range(count - 1):
        low = ((x + (1 << (LIMB - 1))) & ((1 << LIMB) - 1)) - (1 << (LIMB - 1))
        limbs.append(low)
        x = (x - low) >> LIMB
    return [*limbs, x]


def by_int8_limbs(node: Node, lhs: jax.Array, rhs: jax.Array, words: Sequence[Words], dtype: str) -> jax.Array:
    """Computes the sums by int8 dots with int32 sums, with as many limbs as the words need: exact on any platform."""
    a, b = (_limbs(x, limb_count(known)) for x, known in zip((lhs, rhs), words, strict=True))
    total = None
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            part = _int8_sum(node, left, right).astype(dtype) << LIMB * (i + j)
            total = part if total is None else total + part
    assert total is not None
    return total


def _limbs(x: jax.Array, count: int) -> list[jax.Array]:
    """Returns `count` balanced int8 limbs, least first."""
    return [limb.astype(jnp.int8) for limb in _balanced(x.astype(jnp.int64), count)]


def _int8_sum(node: Node, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    if node.op == "dot_general":
        return _primitive(node, lhs, rhs, jnp.int32)
    return _by_taps(node, lhs, rhs, _int8_dot)


def _int8_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies int8 `[N…, G, C]` by `[G, C, O]`, giving int32 `[N…, G, O]`."""
    lead = x.shape[:-2]
    flat = x.reshape(math.prod(lead), *x.shape[-2:])
    sums = lax.dot_general(flat, w, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.int32)  # [G, N, O]
    return sums.transpose(1, 0, 2).reshape(*lead, *w.shape[::2])


# ---------------------------------------------------------------------------------------------------------------------
# A convolution tap by tap.


class Taps(NamedTuple):
    """A convolution's operands for each tap of its window, in row order.

    Attributes:
      images: for each tap, the inputs that it multiplies, `[batch, *output, G, C]`.
      kernels: for each tap, its weights, `[G, C, O]`.
      restore: brings an output `[batch, *output, G, O]` to the convolution's own layout.
      arrange: brings an output from that layout to `[batch, *output, G, O]`.
    """

    images: list[jax.Array]
    kernels: list[jax.Array]
    restore: Callable[[jax.Array], jax.Array]
    arrange: Callable[[jax.Array], jax.Array]


def taps_of(node: Node, lhs: jax.Array, rhs: jax.Array) -> Taps:
    """Returns the convolution's operands tap by tap; a dot has one tap."""
    if node.op == "dot_general":
        return _dot_tap(node, lhs, rhs)
    params = node.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x, w = lhs.transpose(_last(numbers.lhs_spec)), rhs.transpose(_kernel_last(numbers.rhs_spec))
    outputs, spatial = w.shape[-1], x.ndim - 2
    zero = jnp.zeros((), x.dtype)
    pads = [(*pair, dilation - 1) for pair, dilation in zip(params["padding"], params["lhs_dilation"], strict=True)]
    x = lax.pad(x, zero, [(0, 0, 0), *pads, (0, 0, 0)])
    window, strides, dilations = w.shape[:spatial], params["window_strides"], params["rhs_dilation"]
    sizes = [max((x.shape[1 + d] - (window[d] - 1) * dilations[d] - 1) // strides[d] + 1, 0) for d in range(spatial)]
    images, kernels = [], []
    for number in range(math.prod(window)):
        tap, rest = [], number
        for size in reversed(window):
            tap.insert(0, rest % size)
            rest //= size
        first = [t * d for t, d in zip(tap, dilations, strict=True)]
        last = [f + (n - 1) * s + 1 for f, n, s in zip(first, sizes, strides, strict=True)]
        image = lax.slice(x, (0, *first, 0), (x.shape[0], *last, x.shape[-1]), (1, *strides, 1))
        images.append(image.reshape(*image.shape[:-1], groups, -1))
        kernel = w[tuple(tap)]  # [C, G·O], with the outputs of a group next to each other
        kernels.append(kernel.reshape(kernel.shape[0], groups, outputs // groups).transpose(1, 0, 2))

    order = _last(numbers.out_spec)

    def restore(y) -> Any:
        return y.reshape(*y.shape[:-2], outputs).transpose([order.index(d) for d in range(y.ndim - 1)])

    def arrange(y) -> Any:
        y = y.transpose(order)
        return y.reshape(*y.shape[:-1], groups, outputs // groups)

    return Taps(images, kernels, restore, arrange)


def _last(spec) -> tuple[int, ...]:
    """Returns the permutation to `[batch, *spatial, features]`."""
    return (spec[0], *spec[2:], spec[1])


def _kernel_last(spec) -> tuple[int, ...]:
    """Returns the permutation to `[*spatial, inputs, outputs]`."""
    return (*spec[2:], spec[1], spec[0])


def _dot_tap(node: Node, lhs: jax.Array, rhs: jax.Array) -> Taps:
    """Returns a dot as one tap whose groups are the batch dimensions."""
    (lc, rc), (lb, rb) = node.params["dimension_numbers"]
    lf = [d for d in range(lhs.ndim) if d not in (*lc, *lb)]
    rf = [d for d in range(rhs.ndim) if d not in (*rc, *rb)]
    shape = lambda x, dims: [x.shape[d] for d in dims]  # noqa: E731
    batch, left, right = shape(lhs, lb), shape(lhs, lf), shape(rhs, rf)
    terms = math.prod(shape(lhs, lc))
    x = lhs.transpose(*lf, *lb, *lc).reshape(math.prod(left), math.prod(batch), terms)
    w = rhs.transpose(*rb, *rc, *rf).reshape(math.prod(batch), terms, math.prod(right))

    here, there = range(len(left), len(left) + len(batch)), range(len(batch))

    def restore(y) -> jax.Array:
        return jnp.moveaxis(y.reshape(*left, *batch, *right), here, there)

    def arrange(y) -> jax.Array:
        return jnp.moveaxis(y, there, here).reshape(math.prod(left), math.prod(batch), math.prod(right))

    return Taps([x], [w], restore, arrange)


def _by_taps(node: Node, lhs: jax.Array, rhs: jax.Array, product: Callable[..., jax.Array]) -> jax.Array:
    """Sums `product(image, kernel)` over the taps; with one channel per group, of `[N…, G, 1]` and `[G, O]`."""
    images, kernels, restore, _ = taps_of(node, lhs, rhs)
    if product is not _int8_dot:
        kernels = [kernel[:, 0] for kernel in kernels]
    total = None
    for image, kernel in zip(images, kernels, strict=True):
        part = product(image, kernel)
        total = part if total is None else total + part
    assert total is not None
    return restore(total)


class Scanned(NamedTuple):
    """The result of sums in order: the accumulators' words, and how many additions saturated or sums wrapped."""

    words: jax.Array
    overflows: jax.Array


def scanned_sum(
    node: Node, lhs: jax.Array, rhs: jax.Array, start: jax.Array | int, frac: int, accumulator: Accumulator
) -> Scanned:
    """Computes the sums in int64, from `start`, one product after another: rows, columns, input channels ascending.

    Args:
      node: the dot or the convolution.
      lhs: raw integers of its first operand.
      rhs: raw integers of its second operand.
      start: the initial value of the accumulator, broadcast against the output.
      frac: fraction bits of the products.
      accumulator: its word, mode, fraction bits and rounding of products.
    """
    images, kernels, restore, arrange = taps_of(node, lhs.astype(jnp.int64), rhs.astype(jnp.int64))
    # [taps·C, N…, G, 1] and [taps·C, G, O]
    xs = jnp.concatenate([jnp.moveaxis(image, -1, 0)[..., None] for image in images])
    ws = jnp.concatenate([jnp.moveaxis(kernel, 1, 0) for kernel in kernels])
    drop = 0 if accumulator.frac is None else frac - accumulator.frac
    begin = arrange(jnp.broadcast_to(jnp.asarray(start, jnp.int64), node.shape))
    word = accumulator.word or 63
    least, largest = -(1 << (word - 1)), (1 << (word - 1)) - 1

    def into_register(total, count) -> tuple[tuple[Any, Any], None]:
        if accumulator.mode != "saturate":
            return (total, count), None
        over = (total > largest) | (total < least)
        return (jnp.clip(total, least, largest), count + over.sum(dtype=jnp.int64)), None

    def step(carry, terms) -> tuple[tuple[Any, Any], None]:
        total, count = carry
        x, w = terms
        total = total + drop_bits(x * w, drop, accumulator.rounding)
        return into_register(total, count)

    (total, count), _ = lax.scan(step, into_register(begin, jnp.int64(0))[0], (xs, ws))
    if accumulator.mode == "wrap":  # modulo 2^word, wrapping once at the end gives the same as wrapping each addition
        kept = wrapped(total, word)
        total, count = kept, (kept != total).sum(dtype=jnp.int64)
    return Scanned(restore(total), count)


def wrapped(total: jax.Array, word: int) -> jax.Array:
    """Returns int64 words modulo 2^word, in two's complement."""
    low = total & ((1 << word) - 1)
    return jnp.where(low >= 1 << (word - 1), low - (1 << word), low)


def weight_sums(node: Node, weight: Any) -> Mapping[str, int]:
    """Returns the largest Σ|word| over the products of one output; `weight` is the parameter's words in NumPy."""
    number = 1 - split_operand(node)
    magnitudes = abs(weight.astype("int64"))
    if node.op == "dot_general":
        axes = node.params["dimension_numbers"][0][number]
    elif number == 0:  # a convolution whose image is the parameter
        return {"weight_sum": terms_of(node) * int(magnitudes.max(initial=0))}
    else:
        axes = node.params["dimension_numbers"].rhs_spec[1:]
    sums = magnitudes.sum(axis=tuple(axes))
    return {"weight_sum": int(sums.max(initial=0))}
