"""Sums of products: every route gives the integers that NumPy gives, whatever the shape of the dot or convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nuqjax import Accumulator
from nuqjax._src.emulate.bounds import Words, is_depthwise
from nuqjax._src.emulate.program import build
from nuqjax._src.emulate.sums import by_int8_limbs, products_sum, scanned_sum
from nuqjax._src.platform.host import x64
from nuqjax._src.trace.operations import LINEAR
from tests.fixed_point_oracle import Format as OracleFormat
from tests.fixed_point_oracle import in_range, padded, spread, window_at

# The words that a route is given: bounds of the activations and of the weights, within which its sums are exact.
ROUTES = {
    "float32": (127, 127),
    "int8": (128, 128),
    "limbs": (32767, 127),
    "float64": (32767, 32767),
    "int64": (2**31, 2**12),
    "int32": (2**11, 2**11),
}


def conv(x_layout, w_layout, y_layout, x_shape, w_shape, **options):
    """A function, its operands' shapes and how the oracle sees it."""
    given = {"window_strides": (1, 1), "padding": "VALID"} | options

    def fn(params, x):
        return lax.conv_general_dilated(x, params["w"], dimension_numbers=(x_layout, w_layout, y_layout), **given)

    return fn, x_shape, w_shape


def dot(dimension_numbers, x_shape, w_shape):
    return (lambda params, x: lax.dot_general(x, params["w"], dimension_numbers)), x_shape, w_shape


NHWC, HWIO, NCHW, OIHW = "NHWC", "HWIO", "NCHW", "OIHW"
CASES = {
    "convolution": conv(NHWC, HWIO, NHWC, (2, 6, 5, 3), (3, 2, 3, 4)),
    "strided, padded": conv(
        NHWC, HWIO, NHWC, (2, 6, 5, 3), (3, 3, 3, 4), window_strides=(2, 1), padding=((1, 2), (0, 1))
    ),
    "dilated": conv(NHWC, HWIO, NHWC, (2, 7, 6, 2), (3, 2, 2, 4), rhs_dilation=(2, 3), padding="SAME"),
    "transposed": conv(NHWC, HWIO, NHWC, (2, 4, 3, 2), (3, 3, 2, 3), lhs_dilation=(2, 3), padding=((2, 1), (1, 1))),
    "dilated twice": conv(
        NHWC,
        HWIO,
        NHWC,
        (2, 5, 4, 2),
        (2, 2, 2, 3),
        lhs_dilation=(2, 1),
        rhs_dilation=(1, 2),
        window_strides=(2, 2),
        padding=((1, 0), (1, 1)),
    ),
    "grouped": conv(NHWC, HWIO, NHWC, (2, 5, 5, 6), (2, 3, 2, 9), feature_group_count=3, window_strides=(1, 2)),
    "depthwise": conv(NHWC, HWIO, NHWC, (2, 5, 5, 4), (3, 3, 1, 4), feature_group_count=4, padding="SAME"),
    "depthwise, several outputs": conv(
        NHWC, HWIO, NHWC, (2, 5, 5, 4), (3, 2, 1, 8), feature_group_count=4, rhs_dilation=(1, 2)
    ),
    "other layouts, cut": conv(NCHW, OIHW, NCHW, (2, 3, 6, 5), (4, 3, 2, 3), padding=((-1, 0), (2, -2))),
    "mixed layouts": conv("HWCN", "IHWO", "CNHW", (6, 5, 4, 2), (2, 2, 3, 6), feature_group_count=2),
    "dot": dot((((1,), (0,)), ((), ())), (3, 6), (6, 4)),
    "dot of many axes": dot((((1, 3), (2, 0)), ((), ())), (2, 3, 4, 5), (5, 2, 3)),
    "dot with batches": dot((((2,), (1,)), ((0,), (2,))), (3, 4, 5), (2, 5, 3)),
    "dot with batches and axes": dot((((3, 1), (0, 2)), ((0, 4), (3, 1))), (2, 3, 4, 5, 2), (5, 2, 3, 2, 6)),
}


def node_of(name):
    fn, x_shape, w_shape = CASES[name]
    program, _ = build(fn, ({"w": jnp.zeros(w_shape)}, jnp.zeros(x_shape)), {})
    [node] = [n for n in program.nodes if n.op in LINEAR]
    return node


def words_of(name, peaks, seed=0):
    """Words up to the peaks, and some at both ends."""
    _, *shapes = CASES[name]
    rng = np.random.default_rng(seed)
    drawn = []
    for shape, peak in zip(shapes, peaks, strict=True):
        words = rng.integers(-peak, peak, shape, dtype=np.int64)
        drawn.append(np.where(rng.random(shape) < 0.3, np.where(rng.random(shape) < 0.7, peak - 1, -peak), words))
    return drawn


def taps_of(node, x, w):
    """Pairs `[*S, G, C]` and `[G, C, O]` in the order of summation, and `[*S, G, O]` to the output's own shape."""
    params = node.params
    if node.op == "dot_general":
        letters = iter("abcdefghijklmnop")
        (lc, rc), (lb, rb) = params["dimension_numbers"]
        lhs, rhs = [next(letters) for _ in x.shape], [next(letters) for _ in w.shape]
        for a, b in [*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)]:
            rhs[b] = lhs[a]
        batch, terms = [lhs[d] for d in lb], [lhs[d] for d in lc]
        left = [s for s in lhs if s not in batch + terms]
        right = [s for s in rhs if s not in batch + terms]
        size = dict(zip(lhs + rhs, x.shape + w.shape, strict=True))
        count = lambda names: int(np.prod([size[s] for s in names]))  # noqa: E731
        a = np.einsum(f"{''.join(lhs)}->{''.join(left + batch + terms)}", x)
        b = np.einsum(f"{''.join(rhs)}->{''.join(batch + terms + right)}", w)
        a = a.reshape(count(left), count(batch), count(terms))
        b = b.reshape(count(batch), count(terms), count(right))
        shape = [size[s] for s in left + batch + right]

        def finish(y):
            y = y.reshape(shape)
            return np.einsum(f"{''.join(left + batch + right)}->{''.join(batch + left + right)}", y)

        return [(a, b)], finish
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x = x.transpose([numbers.lhs_spec[i] for i in (0, 2, 3, 1)])
    w = w.transpose([numbers.rhs_spec[i] for i in (2, 3, 1, 0)])
    x = padded(spread(x, params["lhs_dilation"]), params["padding"], 0)
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    sizes = [(x.shape[1 + d] - (w.shape[d] - 1) * dilation[d] - 1) // strides[d] + 1 for d in (0, 1)]
    taps = []
    for r, c in np.ndindex(w.shape[:2]):
        patch = window_at(x, (r * dilation[0], c * dilation[1]), strides, sizes)
        kernel = w[r, c].reshape(w.shape[2], groups, -1).swapaxes(0, 1)
        taps.append((patch.reshape(*patch.shape[:3], groups, -1), kernel))
    back = np.argsort([numbers.out_spec[i] for i in (0, 2, 3, 1)])
    return taps, lambda y: y.reshape(*y.shape[:3], -1).transpose(back)


def known(*operands):
    """All that the operands' dtypes hold."""
    return [Words(0, int(jnp.iinfo(x.dtype).min), int(jnp.iinfo(x.dtype).max)) for x in operands]


def reference(node, x, w):
    """The sums in Python's integers."""
    taps, finish = taps_of(node, x.astype(object), w.astype(object))
    return finish(sum(np.einsum("...gc,gco->...go", a, b) for a, b in taps))


@pytest.mark.parametrize("name", CASES)
def test_every_route_gives_the_same_integers(name):
    node = node_of(name)
    given, expected = {}, {}
    for route, peaks in ROUTES.items():
        if is_depthwise(node) and route in ("int8", "limbs"):
            continue  # never taken
        if route == "int32" and not is_depthwise(node):
            continue
        x, w = words_of(name, peaks)
        sums = reference(node, x, w)
        assert abs(sums).max() > 0
        if route in ("float32", "limbs"):  # the bounds that the route needs are kept by these shapes
            magnitudes = reference(node, abs(x) if route == "float32" else abs(x) // 256 + 1, abs(w))
            assert magnitudes.max() <= 2**24
        given[route], expected[route] = (x, w), sums

    @jax.jit
    def every(given):
        found = {}
        for route, words in given.items():
            x, w = (jnp.asarray(a, jnp.int64 if route == "int64" else jnp.int32) for a in words)
            for dtype in ("int32", "int64") if route in ("int8", "limbs") else ("int64",):
                found[route, dtype] = products_sum(node, x, w, known(x, w), route, dtype)
        return found

    with x64():
        for (route, dtype), got in every(given).items():
            assert got.dtype == dtype
            if dtype == "int64" or abs(expected[route]).max() < 2**31:
                np.testing.assert_array_equal(got, expected[route].astype(np.int64), err_msg=f"{route} {dtype}")


@pytest.mark.parametrize("name", CASES)
def test_sums_of_int8_limbs_are_the_same_integers(name):
    """The way that other devices than CPUs go: as many limbs as the words need."""
    node = node_of(name)
    cases = [("int8", 127, "int8", 127), ("uint8", 255, "int16", 2**14)]
    if name in ("dot", "dot with batches", "depthwise"):
        cases += [("int16", 32639, "int8", 127), ("uint16", 2**16 - 1, "int8", 127)]
        cases += [("int32", 2**31 - 2**24, "int32", 2**12), ("int32", 2**18, "int32", 2**30)]
    given = []
    for x_type, x_peak, w_type, w_peak in cases:
        x, w = words_of(name, (x_peak, w_peak), seed=x_peak)
        given.append(((abs(x) if x_type.startswith("u") else x).astype(x_type), w.astype(w_type)))

    @jax.jit
    def every(given):
        wide = [by_int8_limbs(node, *words, known(*words), "int64") for words in given]
        return wide, by_int8_limbs(node, *given[0], known(*given[0]), "int32")

    with x64():
        found, narrow = every(given)
    for (x, w), wide in zip(given, found, strict=True):
        np.testing.assert_array_equal(wide, reference(node, x, w).astype(np.int64))
    assert narrow.dtype == jnp.int32
    np.testing.assert_array_equal(narrow, found[0])


@pytest.mark.parametrize("top", [2**15 - 1, 2**31 - 1, -(2**15), -(2**31)])
def test_int8_limbs_hold_the_longest_words(top):
    node = node_of("dot")
    x, w = np.full((3, 6), top, np.int16 if -(2**15) <= top < 2**15 else np.int32), np.full((6, 4), 3, np.int8)
    with x64():
        got = jax.jit(lambda x, w: by_int8_limbs(node, x, w, known(x, w), "int64"))(x, w)
    np.testing.assert_array_equal(got, np.full((3, 4), 18 * top))


@pytest.mark.parametrize("name", CASES)
def test_scanned_sums(name):
    """One product after another, against a loop in NumPy."""
    node = node_of(name)
    x, w = words_of(name, (100, 60))
    start = np.random.default_rng(7).integers(-7000, 7000, node.shape)
    modes = {"exact": None, "wrap": 14, "saturate": 14}
    accumulators = {mode: Accumulator(word, mode, frac=6, rounding="half_up") for mode, word in modes.items()}
    with x64():
        scan = jax.jit(
            lambda x, w, start: {
                mode: scanned_sum(node, x, w, start, 8, accumulator) for mode, accumulator in accumulators.items()
            }
        )
        found = scan(x, w, start)
    taps, finish = taps_of(node, x, w)
    arranged = (*taps[0][0].shape[:-1], taps[0][1].shape[-1])
    place = finish(np.arange(start.size).reshape(arranged)).reshape(-1)
    begin = np.empty(start.size, np.int64)
    begin[place] = start.reshape(-1)
    fmt = OracleFormat(14, 6)
    for mode in modes:
        total, count = begin.reshape(arranged), 0
        for patch, kernel in taps:
            for channel in range(kernel.shape[1]):
                total = total + (patch[..., channel, None] * kernel[:, channel] + 2) // 4  # 8 fraction bits to 6
                if mode == "saturate":
                    count += ((total < fmt.least) | (total > fmt.largest)).sum()
                    total = in_range(total, fmt, mode)
        np.testing.assert_array_equal(
            found[mode].words, finish(in_range(total, fmt, mode) if mode == "wrap" else total)
        )
        if mode == "saturate":
            assert int(found[mode].overflows) == count > 0
