"""`emulate`: unchanged functions on raw integers, against the published vectors and an independent NumPy oracle."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend import core

import nuqjax
from nuqjax import Accumulator, CodebookArray, Formats, QFormat, SiteFormat, calibrate, emulate
from nuqjax._src.emulate.program import build, operands
from nuqjax._src.leaf import packing
from nuqjax._src.platform.host import x64
from nuqjax.fixed_point import (
    OVERFLOW,
    ROUNDING,
    rounding_divide_by_power_of_two,
    saturating_rounding_doubling_high_mul,
)
from tests import draws
from tests.fixed_point_oracle import Oracle, same_padding

pytestmark = pytest.mark.promotes  # the models do; tests/laws/test_flags.py has one that does not

NHWC = ("NHWC", "HWIO", "NHWC")


def codebook_array(indices, levels, fmt=None):
    """One codebook for an array whose last axis is the output channels; `levels` are words where `fmt` is given."""
    indices = np.asarray(indices, np.uint8)
    bits = max(int(len(levels) - 1).bit_length(), 1)
    packed = packing.pack(np.moveaxis(indices, -1, 0).reshape(indices.shape[-1], -1), bits)
    padded = np.pad(np.asarray(levels), (0, 2**bits - len(levels)), mode="edge")[None]
    return CodebookArray(
        levels=jnp.asarray(padded, jnp.float32 if fmt is None else jnp.int32),
        packed=jnp.asarray(packed),
        scale=None,
        slice_shape=indices.shape,
        dtype=np.dtype(np.float32),
        bits=bits,
        granularity="tensor",
        axes=(indices.ndim - 1,),
        codebook_format=fmt,
    )


def rows(*given):
    """The formats of these rows; rows that are not proven."""
    return Formats({row.site: row for row in given})


def row_of_input(word, frac, signed=True):
    return SiteFormat("input", "input", QFormat(word, frac, signed))


def raw(fn, formats, params, x, trace=("",)):
    """Raw outputs and the trace, jitted."""
    return jax.jit(emulate(fn, formats, output="raw", trace=trace))(params, x)


# ---------------------------------------------------------------------------------------------------------------------
# Published vectors.


def dense(params, x):
    y = x @ params["kernel"]
    return y + params["bias"] if "bias" in params else y


def conv(params, x):
    y = lax.conv_general_dilated(x, params["kernel"], (1, 1), "VALID", dimension_numbers=NHWC)
    return y + params["bias"] if "bias" in params else y


def each(fn):
    """The function for several trees of parameters at once, so that one compilation serves many formats."""
    return lambda params, x: {name: fn(leaves, x) for name, leaves in params.items()}


V3 = {
    "kernel": codebook_array([[3], [0], [2], [1], [3]], [-96, -13, 22, 101], QFormat(8, 7)),
    "bias": jnp.array([-11 / 32]),
}
V3_X = jnp.array([[15, 7, 9, 12, 4]]) / 4
V3_ROW = SiteFormat("kernel", "", QFormat(6, 3), QFormat(8, 7), QFormat(8, 5), Accumulator())


@pytest.mark.parametrize("proven", [False, True])
def test_vector_3_a_dot_with_a_bias(proven):
    cases = {
        "exact": (Accumulator(), 1113, 17, 0),
        "exact, of 16 bits": (Accumulator(16), 1113, 17, 0),
        "saturate, of 12 bits": (Accumulator(12, "saturate"), 1113, 17, 0),
        "wrap, of 12 bits": (Accumulator(12, "wrap"), 1113, 17, 0),
        "saturate, of 11 bits": (Accumulator(11, "saturate"), 797, 12, 1),
        "wrap, of 11 bits": (Accumulator(11, "wrap"), -935, -15, 1),
    }
    params = {f"{kind} {name}": V3 for name in cases for kind in ("sum", "word")}
    formats = rows(
        row_of_input(4, 2, False),
        *(replace(V3_ROW, site=f"word {name}/kernel", accumulator=case[0]) for name, case in cases.items()),
        *(
            replace(V3_ROW, site=f"sum {name}/kernel", accumulator=case[0], output=QFormat(16, 9))
            for name, case in cases.items()
        ),
    )
    if proven:
        formats = calibrate(each(dense), params, V3_X, formats=formats)
    out, trace = raw(each(dense), formats, params, V3_X)
    got = {
        name: (out[f"sum {name}"].item(), out[f"word {name}"].item(), count(trace, f"word {name}/kernel"))
        for name in cases
    }
    assert got == {name: case[1:] for name, case in cases.items()}


def count(trace, site):
    return int(trace.accumulator_overflows.get(site, 0))


def test_vector_3_an_exact_accumulator_has_to_hold_every_sum_that_could_be():
    """Of these inputs the sums fit 12 bits; of all, max|x| Σ|w| + |b| = 15 · 333 + 176 needs 14."""
    formats = rows(row_of_input(4, 2, False), V3_ROW)
    with pytest.raises(ValueError, match=r"kernel: .* 14 bits, but have 13"):
        calibrate(dense, V3, V3_X, formats=formats.replace("kernel", accumulator=Accumulator(13)))
    proven = calibrate(dense, V3, V3_X, formats=formats.replace("kernel", accumulator=Accumulator(14)))["kernel"]
    assert (proven.bound, proven.needed_bits) == (15 * 333 + 176, 14)


@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_vectors_4_and_5_accumulators_that_saturate_in_order(axis):
    """Along the kernel's rows, its columns, its input channels, and as a dot."""
    cases = [
        (0, [100, 100, -120], "saturate", 7, 1),
        (0, [100, -120, 100], "saturate", 80, 0),
        (0, [100, 100, -120], "wrap", 80, 0),
        (0, [100, -120, 100], "wrap", 80, 0),
        (0, [100, 100, 100], "saturate", 127, 2),
        (0, [100, 100, 100], "wrap", 44, 1),
        (0, [100, 100, 100], "exact", 300, 0),
        (100, [100, -120, 0], "saturate", 7, 1),  # from the bias on
        (100, [-120, 100, 0], "saturate", 80, 0),
        (-100, [-100, 120, 0], "saturate", -8, 1),
    ]
    shape = [3] if axis is None else [3 if d == axis else 1 for d in range(3)]
    params, given, expected = {}, [row_of_input(1, 0, False)], {}
    for number, (bias, weights, mode, *answer) in enumerate(cases):
        name = f"{number}"
        params[name] = {"kernel": jnp.array(weights, jnp.float32).reshape(*shape, 1), "bias": jnp.array([1.0 * bias])}
        register = Accumulator(None if mode == "exact" else 8, mode)
        given.append(SiteFormat(f"{name}/kernel", "", QFormat(16, 0), QFormat(8, 0), QFormat(8, 0), register))
        expected[name] = answer
    out, trace = raw(each(dense if axis is None else conv), rows(*given), params, jnp.ones((1, *shape)))
    assert {name: [out[name].item(), count(trace, f"{name}/kernel")] for name in params} == expected


def test_a_saturating_convolution_goes_by_rows_then_columns_then_channels():
    """Weights of which every other order of the three axes gives another word."""
    kernel = np.zeros((2, 2, 2, 1))
    kernel[..., 0] = [[[90, -100], [120, 70]], [[-128, 40], [-30, 50]]]
    words = {}
    for order in itertools.permutations(range(3)):
        total = 100
        for weight in kernel[..., 0].transpose(order).reshape(-1):
            total = min(max(total + int(weight), -128), 127)
        words[order] = total
    assert list(words.values()).count(words[0, 1, 2]) == 1
    row = SiteFormat("kernel", "", QFormat(8, 0), QFormat(8, 0), QFormat(8, 0), Accumulator(8, "saturate"))
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.array([100.0])}
    out, _ = raw(conv, rows(row_of_input(1, 0, False), row), params, jnp.ones((1, 2, 2, 2)))
    assert out.reshape(-1).tolist() == [words[0, 1, 2]]


def test_vector_7_a_convolution_with_a_bias_then_relu_and_max_pool():
    def conv_relu_pool(params, x):
        y = jax.nn.relu(conv(params, x))
        return y, lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    kernel = codebook_array(np.array([[3, 0], [1, 2]]).reshape(2, 2, 1, 1), [-7, -2, 3, 6], QFormat(4, 3))
    x = jnp.array([[3, -1, 4], [0, 5, -6], [7, -8, 2]]).reshape(1, 3, 3, 1) / 4
    expected = {
        "half_even": ([6, -7, -8, 12], [6, 0, 0, 12]),
        "floor": ([5, -8, -9, 12], [5, 0, 0, 12]),
        "half_away": ([6, -7, -9, 12], [6, 0, 0, 12]),
        "sum": ([45, -57, -68, 99], [45, 0, 0, 99]),
    }
    row = SiteFormat("", "", QFormat(5, 2), QFormat(4, 3), QFormat(8, 5), Accumulator())
    given = [replace(row, site=f"{mode}/kernel", rounding=mode) for mode in list(expected)[:3]]
    given.append(replace(row, site="sum/kernel", output=QFormat(16, 5)))
    params = {mode: {"kernel": kernel, "bias": jnp.array([5 / 32])} for mode in expected}
    out, trace = raw(each(conv_relu_pool), rows(row_of_input(5, 2), *given), params, x)
    for mode, (words, rectified) in expected.items():
        assert trace.words[f"{mode}/kernel"].reshape(-1).tolist() == words
        assert [y.reshape(-1).tolist() for y in out[mode]] == [rectified, [max(words)]]


@pytest.mark.parametrize("kind", ["mean", "pool"])
def test_vector_8_averages(kind):
    modes = ("floor", "half_up", "half_away", "half_even", "half_up by reciprocal")
    for side, answers in (
        (2, {7: (1, 2, 2, 2, 2), -6: (-2, -1, -2, -2, -1), 10: (2, 3, 3, 2, 3)}),
        (6, {18: (0, 1, 1, 0, 0)}),
    ):
        window = (1, side, side, 1)
        x = jnp.zeros((len(answers), side, side, 1)).at[:, 0, 0, 0].set(jnp.array(list(answers)))

        def averages(params, x, side=side, window=window):
            out = {}
            for mode in modes:
                with jax.named_scope(mode):
                    pooled = (
                        x.mean((1, 2))
                        if kind == "mean"
                        else lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / side**2
                    )
                    out[mode] = pooled.reshape(-1)
            return out

        given = []
        for node in build(averages, ({}, x), {})[0].nodes:
            if node.op == "div":
                [mode] = [m for m in modes if node.name.split(":")[0].split("/")[0] == m]
                reciprocal = 16 if "reciprocal" in mode else None
                given.append(SiteFormat(node.name, "", QFormat(8, 0), rounding=mode.split()[0], reciprocal=reciprocal))
        out, _ = raw(averages, rows(row_of_input(8, 0), *given), {}, x)
        assert [out[mode].tolist() for mode in modes] == list(map(list, zip(*answers.values(), strict=True)))


def test_vector_9_a_long_int8_dot():
    params, x = {"kernel": jnp.full((4608, 1), 127.0)}, jnp.full((1, 4608), 127.0)
    row = SiteFormat("kernel", "", QFormat(32, 0), QFormat(8, 0), accumulator=Accumulator())
    formats = calibrate(dense, params, x, formats=rows(row_of_input(7, 0, False), row))
    assert raw(dense, formats, params, x)[0].item() == 74_322_432
    assert formats["kernel"].bound == 74_322_432
    assert formats["kernel"].needed_bits == 28


def test_vector_10_gemmlowp():
    least, half = -(2**31), 2**30
    products = saturating_rounding_doubling_high_mul(jnp.array([least, 1, -1]), jnp.array([least, half, half]))
    assert products.tolist() == [2**31 - 1, 1, 0]
    assert rounding_divide_by_power_of_two(jnp.array([5, -5]), 1).tolist() == [3, -3]
    expected = {"gemmlowp": [2, 3, -2, -1], "half_away": [1, 3, -2, -1], "half_up": [1, 3, -1, -1]}
    row = SiteFormat("", "", QFormat(8, 0), QFormat(8, 2), accumulator=Accumulator())
    given = [replace(row, site=f"{mode}/kernel", rounding=mode) for mode in expected]
    params = {mode: {"kernel": jnp.array([[0.25]])} for mode in expected}
    x = jnp.array([[5.0], [10.0], [-6.0], [-5.0]])
    out, _ = raw(each(dense), rows(row_of_input(8, 0), *given), params, x)
    assert {mode: words.reshape(-1).tolist() for mode, words in out.items()} == expected


# ---------------------------------------------------------------------------------------------------------------------
# Networks of random layers, formats and modes.
#
# A kind of layer is three functions: `options(draw, shape)`, static; `model(options, params, y)`, JAX; and
# `words(options, oracle, site, weights, y)`, the same on integers. Layer 3 runs in the scope "l3" and has its
# parameters under "l3", which names its sites: "l3/kernel", "l3:add".


SLOW = settings(phases=(Phase.explicit, Phase.generate))  # every example is compiled: too slow to shrink


def leaves_of(options, draw, kernel_shape):
    """Indices, levels and bias of a kernel, not on the grid of any format."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    levels = np.sort(rng.choice([1, 1, 8]) * rng.normal(size=2 ** int(rng.integers(1, 5))))
    bias = rng.normal(size=kernel_shape[-1]) if options["bias"] else None
    indices = rng.integers(0, len(levels), kernel_shape)
    return indices, levels.astype(np.float32), None if bias is None else bias.astype(np.float32)


def conv_options(draw, shape, depthwise=False):
    height, width, channels = shape
    window = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    options: dict[str, Any] = {
        "strides": (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        "lhs_dilation": (1, 1) if draw(st.booleans()) else (2, draw(st.integers(1, 2))),
        "rhs_dilation": (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        "bias": draw(st.booleans()),
        "subtract": draw(st.integers(0, 3)) == 3,
    }
    padding = draw(st.sampled_from(["SAME", "VALID", ((1, 2), (0, 1)), ((0, 1), (-1, 2))]))
    sizes = [(n - 1) * d + 1 for n, d in zip((height, width), options["lhs_dilation"], strict=True)]
    reach = [(w - 1) * d + 1 for w, d in zip(window, options["rhs_dilation"], strict=True)]
    if padding == "VALID":
        padding = ((0, 0), (0, 0))
    elif padding == "SAME":
        padding = same_padding(sizes, reach, options["strides"])
    if any(n + sum(p) < r for n, p, r in zip(sizes, padding, reach, strict=True)):
        padding = same_padding(sizes, reach, options["strides"])
    options["padding"] = tuple(map(tuple, padding))
    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    options["groups"] = channels if depthwise else draw(st.sampled_from(divisors))
    outputs = options["groups"] * draw(st.integers(1, 2))
    options["leaves"] = leaves_of(options, draw, (*window, channels // options["groups"], outputs))
    return options


def with_bias(options, params, y):
    if not options["bias"]:
        return y
    return y - params["bias"] if options.get("subtract") else y + params["bias"]


def conv_model(options, params, y):
    names = ("lhs_dilation", "rhs_dilation")
    y = lax.conv_general_dilated(
        y,
        params["kernel"],
        options["strides"],
        options["padding"],
        dimension_numbers=NHWC,
        feature_group_count=options["groups"],
        **{name: options[name] for name in names},
    )
    return with_bias(options, params, y)


def bias_words(options, oracle, site):
    bias = options["leaves"][2]
    if bias is None:
        return None
    words = oracle.constant(site, "bias", bias)
    return words.shaped(-words.raw) if options.get("subtract") else words


def kernel_words(options, oracle, site):
    indices, levels, _ = options["leaves"]
    return oracle.weights(site, indices, levels)


def conv_words(options, oracle, scope, y):
    site = f"{scope}/kernel"
    names = ("strides", "padding", "lhs_dilation", "rhs_dilation", "groups")
    kernel, bias = kernel_words(options, oracle, site), bias_words(options, oracle, site)
    return oracle.conv(site, y, kernel, bias, **{name: options[name] for name in names})


def dense_options(draw, shape):
    options: dict[str, Any] = {"bias": draw(st.booleans())}
    options["leaves"] = leaves_of(options, draw, (shape[-1], draw(st.integers(1, 5))))
    return options


def dense_words(options, oracle, scope, y):
    site = f"{scope}/kernel"
    return oracle.dot(site, y, kernel_words(options, oracle, site), bias_words(options, oracle, site))


def residual_options(draw, shape):
    options: dict[str, Any] = {"bias": draw(st.booleans())}
    options["leaves"] = leaves_of(options, draw, (shape[-1], shape[-1]))
    return options


def dense_model(options, params, y):
    with jax.named_scope("dense"):  # where the addition of a bias has its name
        return with_bias(options, params, y @ params["kernel"])


def window_options(draw, shape):
    window = (draw(st.integers(1, min(3, shape[0]))), draw(st.integers(1, min(3, shape[1]))))
    strides = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = draw(st.sampled_from([((0, 0), (0, 0)), tuple(same_padding(shape[:2], window, strides))]))
    return {"window": window, "strides": strides, "padding": padding, "bias": False}


def pool_model(combine, start):
    def model(options, params, y):
        window, strides = (1, *options["window"], 1), (1, *options["strides"], 1)
        y = lax.reduce_window(y, start, combine, window, strides, ((0, 0), *options["padding"], (0, 0)))
        return y / np.prod(window) if combine is lax.add else y

    return model


def max_pool_words(options, oracle, scope, y):
    return oracle.pooled(y, options["window"], options["strides"], options["padding"], "max")


def min_pool_words(options, oracle, scope, y):
    return oracle.pooled(y, options["window"], options["strides"], options["padding"], "min")


def average_pool_words(options, oracle, scope, y):
    sums = oracle.pooled(y, options["window"], options["strides"], options["padding"], "sum")
    sums = oracle.site(f"{scope}:reduce_window_sum", sums)
    return oracle.divided(f"{scope}:div", sums, np.prod(options["window"]))


def with_axes(y, axes):
    return y.shaped(np.expand_dims(y.raw, axes))


def leaky_words(options, oracle, scope, y):
    scaled = oracle.times(f"{scope}:mul", y, oracle.constant(f"{scope}:mul", "weight", np.float32(options["slope"])))
    combine = lambda y, scaled: np.where(np.asarray(y >= 0, bool), y, scaled)  # noqa: E731
    return oracle.joined(f"{scope}:select_n", [y, scaled], combine)


def scale_words(options, oracle, scope, y):
    return oracle.times(f"{scope}:mul", y, oracle.constant(f"{scope}:mul", "weight", options["leaves"][2]))


def shift_words(options, oracle, scope, y):
    offset = oracle.constant(f"{scope}:sub", "bias", options["leaves"][2])
    return oracle.add(f"{scope}:sub", offset, y.shaped(-y.raw))


def where_words(options, oracle, scope, y):
    other = oracle.constant(f"{scope}:select_n", "bias", np.float32(-1.5))
    above = y.real > np.float64(np.float32(0.3))
    return oracle.joined(f"{scope}:select_n", [other, y], lambda other, y: np.where(above, y, other))


def vector_options(draw, shape):
    options: dict[str, Any] = {"bias": True}
    options["leaves"] = leaves_of(options, draw, (1, shape[-1]))
    return options


def attention_words(options, oracle, scope, y):
    flat = y.shaped(y.raw.reshape(y.raw.shape[0], -1, y.raw.shape[-1]))
    scores = oracle.batched_dot(f"{scope}/bnc,bmc->bnm:dot_general", flat, flat)
    return scores.shaped(scores.raw[..., None])


def attention_model(options, params, y):
    flat = y.reshape(y.shape[0], -1, y.shape[-1])
    return jnp.einsum("bnc,bmc->bnm", flat, flat)[..., None]


def clip_words(options, oracle, scope, y):
    return oracle.bounded(y, -0.7, 1.2)


def no_options(draw, shape):
    return {"bias": False}


def slope_options(draw, shape):
    return {"bias": False, "slope": draw(st.sampled_from([0.125, 0.01, 0.3]))}


def moved(xp, y):
    """The same moves in JAX and NumPy: 2 rows and columns at most are left, the channels reversed."""
    y = xp.transpose(y, (0, 2, 1, 3))[:, :2, ::2, ::-1]
    return xp.broadcast_to(
        y.reshape(y.shape[0], -1, 1, y.shape[-1]), (y.shape[0], y.shape[1] * y.shape[2], 2, y.shape[-1])
    )


def pad_words(options, oracle, scope, y):
    value = int(np.rint(np.ldexp(0.7, y.frac))) if abs(y.frac) < 64 else 0
    widths = [(0, 0), (1, 0), (0, 2), (0, 0)]
    return y.shaped(np.pad(y.raw, widths, constant_values=value))


KINDS = {
    "convolution": (conv_options, conv_model, conv_words),
    "depthwise": (lambda draw, shape: conv_options(draw, shape, depthwise=True), conv_model, conv_words),
    "dense": (dense_options, dense_model, dense_words),
    "residual": (
        residual_options,
        lambda options, params, y: y + dense_model(options, params, y),
        lambda options, oracle, scope, y: oracle.add(f"{scope}:add", y, dense_words(options, oracle, scope, y)),
    ),
    "concatenate": (
        dense_options,
        lambda options, params, y: jnp.concatenate([y, dense_model(options, params, y)], -1),
        lambda options, oracle, scope, y: oracle.joined(
            f"{scope}:concatenate",
            [y, dense_words(options, oracle, scope, y)],
            lambda *parts: np.concatenate(parts, -1),
        ),
    ),
    "maximum": (
        residual_options,
        lambda options, params, y: jnp.maximum(y, dense_model(options, params, y)),
        lambda options, oracle, scope, y: oracle.joined(
            f"{scope}:max", [y, dense_words(options, oracle, scope, y)], np.maximum
        ),
    ),
    "product": (
        residual_options,
        lambda options, params, y: y * dense_model(options, params, y),
        lambda options, oracle, scope, y: oracle.times(f"{scope}:mul", y, dense_words(options, oracle, scope, y)),
    ),
    "relu": (
        no_options,
        lambda options, params, y: jax.nn.relu(y),
        lambda options, oracle, scope, y: oracle.bounded(y, 0.0),
    ),
    "relu6": (
        no_options,
        lambda options, params, y: jax.nn.relu6(y),
        lambda options, oracle, scope, y: oracle.bounded(y, 0.0, 6.0),
    ),
    "leaky relu": (
        slope_options,
        lambda options, params, y: jax.nn.leaky_relu(y, options["slope"]),
        leaky_words,
    ),
    "clip": (no_options, lambda options, params, y: jnp.clip(y, -0.7, 1.2), clip_words),
    "max-pool": (window_options, pool_model(lax.max, -np.inf), max_pool_words),
    "min-pool": (window_options, pool_model(lax.min, np.inf), min_pool_words),
    "average-pool": (window_options, pool_model(lax.add, 0.0), average_pool_words),
    "mean": (
        no_options,
        lambda options, params, y: y.mean((1, 2), keepdims=True),
        lambda options, oracle, scope, y: oracle.divided(
            f"{scope}:div",
            with_axes(oracle.site(f"{scope}:reduce_sum", oracle.summed(y, (1, 2))), (1, 2)),
            y.raw.shape[1] * y.raw.shape[2],
        ),
    ),
    "sum": (
        no_options,
        lambda options, params, y: y.sum(1, keepdims=True),
        lambda options, oracle, scope, y: with_axes(oracle.site(f"{scope}:reduce_sum", oracle.summed(y, (1,))), (1,)),
    ),
    "scale": (vector_options, lambda options, params, y: y * params["bias"], scale_words),
    "shift": (vector_options, lambda options, params, y: params["bias"] - y, shift_words),
    "square": (
        no_options,
        lambda options, params, y: jnp.square(y),
        lambda options, oracle, scope, y: oracle.times(f"{scope}:square", y, y),
    ),
    "magnitude": (
        no_options,
        lambda options, params, y: jnp.abs(y),
        lambda options, oracle, scope, y: y.shaped(abs(y.raw)),
    ),
    "negative": (
        no_options,
        lambda options, params, y: -y,
        lambda options, oracle, scope, y: oracle.site(f"{scope}:neg", y.shaped(-y.raw)),
    ),
    "where": (no_options, lambda options, params, y: jnp.where(y > 0.3, y, -1.5), where_words),
    "moves": (
        no_options,
        lambda options, params, y: moved(jnp, y),
        lambda options, oracle, scope, y: y.shaped(moved(np, y.raw)),
    ),
    "pad": (
        no_options,
        lambda options, params, y: jnp.pad(y, [(0, 0), (1, 0), (0, 2), (0, 0)], constant_values=0.7),
        pad_words,
    ),
    "attention": (no_options, attention_model, attention_words),
}


class Drawing(Oracle):
    """Draws a site's accumulator and output when it meets it, so that words neither vanish nor all saturate."""

    def __init__(self, draw, rounded, text):
        super().__init__(text)
        self.draw, self.rounded = draw, rounded

    def accumulated(self, site, taps, frac, shape, bias):
        row, taps = self.rows[site], list(taps)
        coarser = self.draw(st.sampled_from([None, None, 0, 1, 5]))
        register = {"mode": "exact", "word": None, "rounding": self.draw(st.sampled_from(ROUNDING))}
        row["accumulator"] = register | {"frac": None if coarser is None else frac - coarser}
        sums = super().accumulated(site, taps, frac, shape, bias)
        mode = self.draw(st.sampled_from(["exact", "wrap", "saturate", "saturate"]))
        if mode != "exact":
            bits = self.accumulator_peaks[site].bit_length() + 1
            row["accumulator"] |= {"mode": mode, "word": max(bits + self.draw(st.integers(-4, 1)), 2)}
            sums = super().accumulated(site, taps, frac, shape, bias)
        return sums

    def site(self, site, exact):
        if site in self.rounded:
            bits = int(abs(exact.raw).max(initial=0)).bit_length() - int(np.max(exact.divisor)).bit_length()
            word = self.draw(st.sampled_from([2, 5, 8, 8, 8, 12, 16]))
            signed = self.draw(st.integers(0, 3)) > 0
            frac = exact.frac - (bits - (word - signed)) + self.draw(st.integers(-3, 2))
            self.rows[site] |= self.modes() | {"output": {"word": word, "frac": frac, "signed": signed}}
        return super().site(site, exact)

    def modes(self):
        return {
            "rounding": self.draw(st.sampled_from((*ROUNDING, "gemmlowp"))),
            "overflow": self.draw(st.sampled_from(OVERFLOW)),
        }


def peak_of(node, params):
    """The largest magnitude of a parameter or constant, to draw a format about it."""
    if node.op == "constant":
        return float(abs(node.value).max())
    while node.op != "leaf":
        node = node.inputs[0]
    leaf = params
    for part in node.name.split("/"):
        leaf = leaf[part]
    return float(abs(np.asarray(leaf)).max())


def network(draw, kinds):
    """Layers `(kind, options)`, the model, its parameters and an input."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    x = rng.normal(size=(2, 5, 5, draw(st.sampled_from([1, 2, 4])))).astype(np.float32)
    layers, params, shape = [], {}, x.shape
    for number, kind in enumerate(kinds):
        options_of, model, _ = KINDS[kind]
        options = options_of(draw, shape[1:])
        layers.append((kind, options))
        leaves = options.get("leaves")
        params[f"l{number}"] = mine = {}
        if leaves is not None:
            if kind not in ("scale", "shift"):
                mine["kernel"] = codebook_array(*leaves[:2])
            if leaves[2] is not None:
                mine["bias"] = jnp.asarray(leaves[2])
        dense_leaves = jax.tree.map(lambda leaf: np.asarray(leaf), mine, is_leaf=lambda v: isinstance(v, CodebookArray))
        shape = jax.eval_shape(lambda p, y: model(options, p, y), dense_leaves, jnp.zeros(shape)).shape  # noqa: B023

    def fn(params, y):
        for number, (kind, options) in enumerate(layers):
            with jax.named_scope(f"l{number}"):
                y = KINDS[kind][1](options, params[f"l{number}"], y)
        return y

    return layers, fn, params, x


def run_oracle(oracle, layers, x):
    y = oracle.input(x)
    for number, (kind, options) in enumerate(layers):
        y = KINDS[kind][2](options, oracle, f"l{number}", y)
    return y


def drawn_formats(draw, layers, fn, params, x):
    """The JSON of formats for every site, drawn."""
    program, _ = build(fn, (params, x), {})
    rounded = {node.name for node in program.rounded}
    given: dict[str, dict[str, Any]] = {}
    for node in program.nodes:
        still = list(operands(node))
        if node.name not in rounded and not still:
            continue
        row = given[node.name] = {
            "site": node.name,
            "operation": node.op,
            "rounding": "half_even",
            "overflow": "saturate",
        }
        for role, operand in still:
            word = draw(st.sampled_from([2, 4, 8, 8, 12]))
            frac = word - 1 - int(np.frexp(peak_of(operand, params))[1]) + draw(st.sampled_from([-4, -1, 0, 0, 0, 1]))
            row[role] = {"word": word, "frac": frac, "signed": draw(st.integers(0, 7)) > 0}
        if node.op == "div" and draw(st.booleans()):
            row["reciprocal"] = draw(st.integers(1, 16))
    drawing = Drawing(draw, rounded, json.dumps({"rows": list(given.values())}))
    word = draw(st.sampled_from([3, 8, 8, 12]))
    drawing.rows["input"] |= drawing.modes()
    if drawing.rows["input"]["overflow"] == "saturate_symmetric":  # counted otherwise than at other sites: see below
        drawing.rows["input"]["overflow"] = "saturate"
    drawing.rows["input"]["output"] = {
        "word": word,
        "frac": word - 3 + draw(st.integers(-2, 2)),
        "signed": draw(st.integers(0, 3)) > 0,
    }
    run_oracle(drawing, layers, x)
    return json.dumps({"version": 1, "fallback": None, "rows": list(drawing.rows.values())})


def assert_same_words(layers, fn, params, x, formats):
    """Every word of every site, and every overflow, as the oracle has them; returns the oracle."""
    oracle = Oracle(formats.to_json())
    expected = run_oracle(oracle, layers, x)
    out, trace = raw(fn, formats, params, x)
    for site, words in oracle.words.items():
        np.testing.assert_array_equal(trace.words[site], words, err_msg=site)
    assert set(trace.words) == set(oracle.words)
    np.testing.assert_array_equal(out, expected.raw)
    assert out.dtype == jnp.int32
    assert {site: int(n) for site, n in trace.output_overflows.items()} == oracle.output_overflows, formats.to_json()
    for site, expected_count in oracle.accumulator_overflows.items():
        register = oracle.rows[site]["accumulator"]
        if register["mode"] != "wrap" or register["frac"] is None:  # the others are counted by addition: see below
            assert count(trace, site) == expected_count, site
    assert not any(
        count(trace, site) for site in trace.accumulator_overflows if site not in oracle.accumulator_overflows
    )
    return oracle


@pytest.mark.parametrize("kind", KINDS)
@settings(SLOW, max_examples=2)
@given(data=st.data())
def test_every_layer_gives_the_oracles_words(kind, data):
    layers, fn, params, x = network(data.draw, ["dense", kind])
    formats = Formats.from_json(drawn_formats(data.draw, layers, fn, params, x))
    assert_same_words(layers, fn, params, x, formats)


@settings(SLOW, max_examples=12)
@given(data=st.data())
def test_networks_give_the_oracles_words_and_stay_within_their_proven_bounds(data):
    kinds = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=5))
    layers, fn, params, x = network(data.draw, ["convolution", *kinds])
    drawn = Formats.from_json(drawn_formats(data.draw, layers, fn, params, x))
    proven = calibrate(fn, params, x, formats=drawn)
    oracle = assert_same_words(layers, fn, params, x, proven)
    for row in proven:
        if row.bound is not None:
            peak = oracle.accumulator_peaks.get(row.site, oracle.exact_peaks.get(row.site, 0))
            assert peak <= row.bound, row.site
            assert peak < 2 ** (row.needed_bits - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The same words however it is run.


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="first")(x))
        x = x + nn.leaky_relu(nn.Conv(6, (3, 3), feature_group_count=2, name="second")(x))
        x = nn.avg_pool(x, (2, 2))
        return nn.Dense(5, name="last")(x.reshape(x.shape[0], -1))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(6, 6, (3, 3), feature_group_count=2, rngs=rngs)
        self.last = nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        x = x + nnx.leaky_relu(self.second(x))
        x = nnx.avg_pool(x, (2, 2))
        return self.last(x.reshape(x.shape[0], -1))


def plain(params, x):
    def conv(layer, x, strides, groups):
        y = lax.conv_general_dilated(
            x, layer["kernel"], strides, "SAME", dimension_numbers=NHWC, feature_group_count=groups
        )
        return y + layer["bias"]

    x = jax.nn.relu(conv(params["first"], x, (2, 2), 1))
    x = x + jax.nn.leaky_relu(conv(params["second"], x, (1, 1), 2))
    x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID") / 4
    return x.reshape(x.shape[0], -1) @ params["last"]["kernel"] + params["last"]["bias"]


IMAGES = draws.normal(3, 4, 5, 5, 4)


def small_network():
    """The linen model's compressed variables, biases not zero."""
    variables = draws.variables(Linen().init, IMAGES)
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else draws.normal(1, *leaf.shape), variables)
    return nuqjax.compress(params, bits=4, min_size=0)


def test_linen_nnx_and_a_plain_function_give_the_same_words():
    cparams = small_network()
    formats = calibrate(Linen().apply, cparams, IMAGES)
    expected, trace = raw(Linen().apply, formats, cparams, IMAGES)
    inner = Formats.from_json(formats.to_json().replace("params/", ""))
    graph, state = nnx.split(NNX(nnx.Rngs(0)))
    state = nnx.to_pure_dict(state)
    own = {layer: {leaf: cparams["params"][layer][leaf] for leaf in leaves} for layer, leaves in state.items()}

    def call(state, x):
        return nnx.merge(graph, state)(x)

    for fn, params in ((plain, cparams["params"]), (call, own)):
        given = calibrate(fn, params, IMAGES)
        assert [row.output for row in given] == [row.output for row in inner]
        assert [row.weight for row in given] == [row.weight for row in inner]
        words, others = raw(fn, given, params, IMAGES)
        np.testing.assert_array_equal(words, expected)
        mine = {site: words for site, words in others.words.items() if site.endswith("kernel")}
        assert sorted(mine) == ["first/kernel", "last/kernel", "second/kernel"]
        for site, words in mine.items():
            np.testing.assert_array_equal(words, trace.words[f"params/{site}"])


def test_the_words_do_not_depend_on_jit_nor_x64_nor_the_batch():
    cparams = small_network()
    formats = calibrate(Linen().apply, cparams, IMAGES, word=12)
    many = draws.normal(9, 32, *IMAGES.shape[1:])
    run = emulate(Linen().apply, formats, output="raw", trace=[""])
    expected, trace = jax.jit(run)(cparams, many)
    eager, others = run(cparams, many)
    np.testing.assert_array_equal(eager, expected)
    assert sorted(others.words) == sorted(trace.words)
    for site, words in others.words.items():
        np.testing.assert_array_equal(words, trace.words[site])
    single = jax.jit(run)
    for number in (0, 13, 31):
        alone, others = single(cparams, many[number : number + 1])
        np.testing.assert_array_equal(alone[0], expected[number])
        for site, words in others.words.items():
            np.testing.assert_array_equal(words[0], trace.words[site][number])
    with x64():
        again = calibrate(Linen().apply, cparams, IMAGES, word=12)
        assert again == formats
        wide, others = jax.jit(run)(cparams, many)
        assert wide.dtype == jnp.int32
        np.testing.assert_array_equal(wide, expected)
        for site, words in others.words.items():
            np.testing.assert_array_equal(words, trace.words[site])
        double = jax.jit(run)(cparams, jnp.asarray(np.asarray(many), jnp.float64))[0]
        np.testing.assert_array_equal(double, expected)


def test_decoded_outputs_are_the_raw_ones_scaled():
    params = {"kernel": jnp.linspace(-2.0, 3.0, 12).reshape(4, 3), "bias": jnp.array([0.25, -1.0, 3.0])}
    x = draws.normal(5, 7, 4)
    formats = calibrate(dense, params, x)
    words, _ = raw(dense, formats, params, x)
    values = jax.jit(emulate(dense, formats))(params, x)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, np.asarray(words) * 2.0 ** -formats["kernel"].output.frac)


def test_a_scan_over_stacked_layers_gives_the_words_of_the_unrolled_layers():
    params = {"kernel": draws.normal(0, 3, 8, 8) / 3, "bias": draws.normal(1, 3, 8)}
    x = draws.normal(2, 5, 8)

    def layer(x, leaves):
        x = jax.nn.relu(x @ leaves["kernel"] + leaves["bias"])
        return x, x

    def scanned(params, x):
        return lax.scan(layer, x, params)

    def reverse(params, x):
        return lax.scan(layer, x, jax.tree.map(lambda leaf: leaf[::-1], params), reverse=True)

    def unrolled(params, x):
        every = []
        for number in range(3):
            x, y = layer(x, {name: leaf[number] for name, leaf in params.items()})
            every.append(y)
        return x, jnp.stack(every)

    rule = nuqjax.Rule("kernel", stack_axes=1, skip=False)
    cparams = nuqjax.compress(params, bits=3, rules=[rule], min_size=0)
    runs = {}
    for fn in (unrolled, scanned, reverse):
        formats = calibrate(fn, cparams, x)
        outputs = [row.output for row in formats if row.operation == "dot_general"]
        assert len(set(outputs)) > 1  # the layers have formats of their own
        runs[fn] = (outputs, *raw(fn, formats, cparams, x, ())[0])
    for fn, order in ((scanned, 1), (reverse, -1)):
        outputs, last, every = runs[fn]
        assert outputs == runs[unrolled][0]
        np.testing.assert_array_equal(last, runs[unrolled][1])
        np.testing.assert_array_equal(every[::order], runs[unrolled][2])


_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import nuqjax

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))

def fn(params, x):
    y = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(y + params["bias"]).mean((1, 2))

rng = np.random.default_rng(0)
params = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 8)), jnp.float32), "bias": jnp.linspace(-1, 1, 8)}
cparams = nuqjax.compress(params, bits=4, min_size=0)
x = jnp.asarray(rng.normal(size=(4, 6, 6, 3)), jnp.float32)
exact = nuqjax.calibrate(fn, cparams, x, word=10)
for accumulator in (nuqjax.Accumulator(), nuqjax.Accumulator(15, "saturate")):
    formats = exact.replace("kernel", accumulator=accumulator)
    run = jax.jit(nuqjax.emulate(fn, formats, output="raw", trace=[""]))
    one, two = run(cparams, x), run(cparams, jax.device_put(x, NamedSharding(mesh, P("batch"))))
    assert len(two[0].sharding.device_set) == 2
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert accumulator.mode == "exact" or int(one[1].accumulator_overflows["kernel"]) > 0
print("the same words")
"""


def test_two_devices_give_the_same_words():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", _DEVICES], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "the same words"


# ---------------------------------------------------------------------------------------------------------------------
# Traces, floats and errors.


def test_a_trace_is_saved_as_arrays_and_as_hexadecimal_text(tmp_path):
    params = {"a": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.linspace(-2, 2, 6).reshape(3, 2)}
    x = draws.normal(0, 5, 4)
    fn = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]  # noqa: E731
    formats = calibrate(fn, params, x).replace("a", output=QFormat(11, 7, signed=False))
    formats = formats.replace("b", output=QFormat(5, 0))
    _, trace = raw(fn, formats, params, x)
    assert sorted(trace.words) == ["a", "b", "input"]
    trace.save(tmp_path / "words.npz")
    with np.load(tmp_path / "words.npz") as saved:
        assert sorted(saved) == sorted(trace.words)
        for site, words in trace.words.items():
            np.testing.assert_array_equal(saved[site], words)
    trace.save(tmp_path / "text")
    files = sorted((tmp_path / "text").iterdir())
    assert [file.suffix for file in files] == [".hex"] * 3
    for file in files:
        first, *lines = file.read_text().splitlines()
        site = first.removeprefix("// ").split(",")[0]
        fmt = formats[site].output
        assert f"word={fmt.word} frac={fmt.frac} signed={fmt.signed}" in first
        assert f"shape {list(trace.words[site].shape)}" in first
        assert {len(line) for line in lines} == {-(-fmt.word // 4)}
        words = np.array([int(line, 16) for line in lines])
        words = np.where((words >= 2 ** (fmt.word - 1)) & fmt.signed, words - 2**fmt.word, words)
        np.testing.assert_array_equal(words, np.asarray(trace.words[site]).reshape(-1))
        assert (words < 0).any() == fmt.signed


def test_a_trace_holds_the_sites_that_are_asked_for_and_counts_them_all():
    params = {"first": jnp.ones((4, 3)), "second": jnp.ones((3, 2))}
    fn = lambda params, x: x @ params["first"] @ params["second"]  # noqa: E731
    x = jnp.ones((5, 4))
    formats = calibrate(fn, params, x)
    assert list(raw(fn, formats, params, x, ["second"])[1].words) == ["second"]
    _, trace = raw(fn, formats, params, x, ())
    assert trace.words == {}
    assert sorted(trace.output_overflows) == ["first", "input", "second"]


def test_an_operation_without_an_exact_rule_is_named():
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))

    def fn(params, x):
        with jax.named_scope("block"):
            return jnp.exp(x @ params["w"])

    for run in (lambda: calibrate(fn, params, x), lambda: emulate(fn, rows(row_of_input(8, 0)))(params, x)):
        with pytest.raises(NotImplementedError, match=r"block:exp: .* exp .*fallback='float'"):
            run()


def test_what_has_no_exact_rule_runs_in_floats_where_that_is_asked_for():
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "v": jnp.linspace(-1, 1, 6).reshape(3, 2)}
    x = draws.normal(0, 5, 4)

    def fn(params, x):
        with jax.named_scope("block"):
            return jnp.exp(x @ params["w"]) @ params["v"]

    formats = calibrate(fn, params, x, fallback="float")
    assert formats["block:exp"].operation == "float: exp"
    assert "float: exp" in str(formats)
    assert "floats allowed" in str(formats)
    out, trace = raw(fn, formats, params, x)
    oracle = Oracle(formats.to_json())
    words = oracle.dot("w", oracle.input(np.asarray(x)), oracle.constant("w", "weight", params["w"]))
    np.testing.assert_array_equal(trace.words["w"], words.raw)
    exp = oracle.input(np.asarray(jnp.exp(words.real.astype(np.float32))), "block:exp")
    expected = oracle.dot("v", exp, oracle.constant("v", "weight", params["v"]))
    np.testing.assert_array_equal(out, expected.raw)


def test_errors_name_the_site():
    params, x = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, jnp.ones((2, 4))
    row = SiteFormat("kernel", "", QFormat(8, 0), QFormat(8, 0), QFormat(8, 0), Accumulator())
    good = rows(row_of_input(8, 0), row)
    emulate(dense, good)(params, x)
    for missing in ("output", "weight", "bias", "accumulator"):
        with pytest.raises(ValueError, match=f"kernel: .*{missing}"):
            emulate(dense, good.replace("kernel", **{missing: None}))(params, x)
    with pytest.raises(ValueError, match="no row for 'kernel'"):
        emulate(dense, rows(row_of_input(8, 0)))(params, x)
    with pytest.raises(ValueError, match="no row for 'input'"):
        emulate(dense, rows(row))(params, x)
    with pytest.raises(ValueError, match=r"kernel: .* need an accumulator of 18 bits, but have 17"):
        emulate(dense, good.replace("kernel", accumulator=Accumulator(17)))(params, x)
    with pytest.raises(ValueError, match=r"kernel: .* 3 fraction bits, but products have 0"):
        emulate(dense, good.replace("kernel", accumulator=Accumulator(frac=3)))(params, x)
    wide = good.replace("kernel", weight=QFormat(32, 0)).replace("input", output=QFormat(32, 0))
    with pytest.raises(ValueError, match=r"kernel: its exact words would .* 6\d bits"):
        emulate(dense, wide)(params, x)
    with pytest.raises(ValueError, match="unknown output 'words'; known: decoded, raw"):
        emulate(dense, good, output="words")


# ---------------------------------------------------------------------------------------------------------------------
# Single operations.


def test_a_mean_that_keeps_its_axes_is_rounded_once():
    x = jnp.zeros((1, 2, 2, 3))
    for keepdims in (False, True):
        program, _ = build(lambda p, x, keepdims=keepdims: x.mean((1, 2), keepdims=keepdims), ({}, x), {})
        assert [node.op for node in program.nodes if node in program.rounded] == ["input", "div"]


@pytest.mark.parametrize("divisor", [0.5, 2.5])
def test_division_by_what_is_no_whole_number(divisor):
    x = jnp.array([[1.0, 2.0, -3.0, 4.0]])
    fn = lambda params, x: x / divisor  # noqa: E731
    formats = calibrate(fn, {}, x, word=16)
    np.testing.assert_allclose(emulate(fn, formats)({}, x), x / divisor, rtol=2.0**-12)


def test_selection_by_a_constant_mask():
    x = jnp.array([[1.0, 2.0, -3.0, 4.0]])
    mask = np.array([[True, False, True, False]])
    fn = lambda params, x: jnp.where(mask, x, -7.0)  # noqa: E731
    assert emulate(fn, calibrate(fn, {}, x, word=16))({}, x).tolist() == [[1.0, -7.0, -3.0, -7.0]]


def test_the_smaller_of_words_of_very_different_formats():
    fn = lambda params, x, y: jnp.minimum(x, y)  # noqa: E731
    second = SiteFormat("input1", "", QFormat(8, 4, signed=False))
    formats = rows(row_of_input(31, 0, False), second, SiteFormat("min", "", QFormat(16, 4)))
    out = emulate(fn, formats)({}, jnp.array([2.0**28 + 32, 1.0]), jnp.array([3.0, 4.0]))
    assert out.tolist() == [3.0, 1.0]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stack(axis):
    x = jnp.arange(6.0).reshape(2, 3)
    fn = lambda params, x: jnp.stack([x, -x], axis)  # noqa: E731
    np.testing.assert_array_equal(emulate(fn, calibrate(fn, {}, x))({}, x), fn({}, x))


def test_an_input_word_in_range_is_not_counted():
    """−8 is a word of 4 bits that symmetric saturation avoids; other sites do not count it either."""
    formats = rows(replace(row_of_input(4, 0), overflow="saturate_symmetric"))
    _, trace = raw(lambda params, x: x, formats, {}, jnp.array([-8.0, 3.0, 9.0]))
    assert trace.words["input"].tolist() == [-7, 3, 7]
    assert int(trace.output_overflows["input"]) == 1


def test_wraps_are_counted_by_sum_whatever_the_accumulators_fraction_bits():
    params, x = {"kernel": jnp.array([[100.0], [100.0], [-120.0], [100.0]])}, jnp.ones((1, 4))
    row = SiteFormat("kernel", "", QFormat(8, 0), QFormat(8, 0), accumulator=Accumulator(8, "wrap"))
    for frac, weight in ((None, QFormat(8, 0)), (0, QFormat(9, 1))):
        accumulator = Accumulator(8, "wrap", frac)
        formats = rows(row_of_input(1, 0, False), replace(row, weight=weight, accumulator=accumulator))
        out, trace = raw(dense, formats, params, x)
        assert out.tolist() == [[180 - 256]]
        assert count(trace, "kernel") == 1


def test_floats_that_leave_the_function_are_reported():
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    formats = calibrate(lambda params, x: jnp.exp(x @ params["w"]), params, x, fallback="float")
    assert "float: exp" in str(formats)


def test_words_of_8_bits_are_summed_as_int8_where_float32_does_not_hold_the_sum():
    params, x = {"kernel": jnp.full((4608, 1), 127.0)}, jnp.full((1, 4608), 127.0)
    row = SiteFormat("kernel", "", QFormat(32, 0), QFormat(8, 0), accumulator=Accumulator())
    assert calibrate(dense, params, x, formats=rows(row_of_input(8, 0), row))["kernel"].route == "int8"


def test_the_bound_of_a_convolution_whose_image_is_the_parameter():
    params, x = {"image": jnp.ones((1, 2, 2, 20))}, jnp.ones((1, 1, 20, 4))

    def fn(params, x):
        return lax.conv_general_dilated(params["image"], x, (1, 1), "SAME", dimension_numbers=NHWC)

    row = SiteFormat("image", "", QFormat(8, 0), QFormat(2, 0), accumulator=Accumulator())
    proven = calibrate(fn, params, x, formats=rows(row_of_input(1, 0, False), row))
    assert raw(fn, proven, params, x)[0].max() == 20
    assert proven["image"].bound >= 20


def test_words_between_32_and_62_bits():
    """Sums of 35 bits, the sum of words of 32 bits in a mean, and moves."""
    params = {"kernel": jnp.full((16, 4), 30000.0)}
    x = jnp.arange(3 * 16, dtype=jnp.float32).reshape(3, 16) * 600
    fn = lambda params, x: (x @ params["kernel"]).mean(1)[:, None][::-1]  # noqa: E731
    kernel = SiteFormat("kernel", "", QFormat(32, -4), QFormat(16, 0), accumulator=Accumulator())
    program, _ = build(fn, (params, x), {})
    [div] = [node.name for node in program.nodes if node.op == "div"]
    formats = rows(row_of_input(16, 0), kernel, SiteFormat(div, "", QFormat(32, -4)))
    out, trace = raw(fn, formats, params, x)
    sums = np.asarray(x, np.int64).sum(1) * 30000
    assert sums.max() > 2**32
    np.testing.assert_array_equal(trace.words["kernel"][:, 0], sums // 16)
    np.testing.assert_array_equal(out[:, 0], sums[::-1] // 16)


def floats_made_of_words(fn, *args):
    """The primitives in a function's program that make floats of words: of what began as a float made an integer."""
    found: list[str] = []

    def walk(jaxpr, tainted):
        known = dict(zip(jaxpr.invars, tainted, strict=True))
        of = lambda x: not isinstance(x, core.Literal) and known.get(x, False)  # noqa: E731
        for eqn in jaxpr.eqns:
            taints = [of(x) for x in eqn.invars]
            inner = [
                x for value in eqn.params.values() for x in (value if isinstance(value, tuple | list) else [value])
            ]
            inner = [getattr(x, "jaxpr", x) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")]
            made = any(taints)
            for body in inner:
                given = taints[len(taints) - len(body.invars) :]  # a branch's index comes first
                made = any(walk(body, given)) or made
            for var in eqn.outvars:
                was_float = any(jnp.issubdtype(x.aval.dtype, jnp.floating) for x in eqn.invars)
                is_float = jnp.issubdtype(var.aval.dtype, jnp.floating)
                becomes = eqn.primitive.name == "convert_element_type" and was_float and not is_float
                known[var] = made or becomes
                if made and is_float and not inner:
                    found.append(eqn.primitive.name)
        return [of(x) for x in jaxpr.outvars]

    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    walk(jaxpr, [False] * len(jaxpr.invars))
    return found


@pytest.mark.parametrize("word", [8, 16])
def test_floats_are_made_of_words_only_in_the_sums_that_the_formats_prove(word):
    cparams = small_network()
    formats = calibrate(Linen().apply, cparams, IMAGES, word=word)
    found = floats_made_of_words(emulate(Linen().apply, formats, output="raw"), cparams, IMAGES)
    sums = sum({"float32": 1, "float64": 1, "limbs": 2}.get(row.route or "", 0) for row in formats)
    assert sums
    assert found.count("dot_general") + found.count("conv_general_dilated") == sums
    assert set(found) == {"convert_element_type", "dot_general", "conv_general_dilated"}


def test_a_function_that_changes_its_arguments_in_place_is_refused():
    """What it changed was lost without a word."""
    x, tree = jnp.ones((2, 4)), {"w": jnp.ones((4, 3)), "seen": jnp.float32(0)}
    formats = calibrate(lambda p, x: x @ p["w"], tree, x)

    def seeing(p, x):
        p["seen"] = p["seen"] + 1
        return x @ p["w"]

    for call in (lambda: emulate(seeing, formats)(tree, x), lambda: calibrate(seeing, tree, x)):
        with pytest.raises(ValueError, match=r"the function changes argument 0, seen in place, which raw integers"):
            call()
    with pytest.raises(ValueError, match=r"the function changes argument 0, mean.* in place, .*model.eval"):
        calibrate(lambda model, x: model(x), nnx.BatchNorm(4, rngs=nnx.Rngs(0)), x)
