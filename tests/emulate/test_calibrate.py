"""`calibrate`: the formats it chooses from a batch, and the bounds it proves, against the NumPy oracle."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nuqjax
from nuqjax import Accumulator, AutoQFormat, CodebookArray, QFormat, calibrate, emulate
from nuqjax._src.emulate.measure import format_for
from nuqjax._src.emulate.presets import PRESETS
from nuqjax.fixed_point import encode
from tests import draws
from tests.fixed_point_oracle import Format, Oracle, encoded

pytestmark = pytest.mark.promotes  # the models do; tests/laws/test_flags.py has one that does not

PARAMS = {
    "first": {"kernel": draws.normal(0, 12, 16), "bias": draws.normal(1, 16)},
    "second": {"kernel": 5 * draws.normal(2, 16, 16), "bias": draws.normal(3, 16)},
    "third": {"kernel": draws.normal(4, 16, 4) / 9, "bias": 20 * draws.normal(5, 4)},
}
X = draws.normal(6, 64, 12)
CPARAMS = nuqjax.compress(PARAMS, bits=4, min_size=0)


def predict(params, x):
    """Three layers, a residual, rectified once."""
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    hidden = hidden + (hidden @ params["second"]["kernel"] + params["second"]["bias"])
    return hidden @ params["third"]["kernel"] + params["third"]["bias"]


def floats_of(params, x):
    """What each site's words stand for, as the function computes it."""
    first = x @ params["first"]["kernel"] + params["first"]["bias"]
    second = jax.nn.relu(first) @ params["second"]["kernel"] + params["second"]["bias"]
    add = jax.nn.relu(first) + second
    third = add @ params["third"]["kernel"] + params["third"]["bias"]
    return {"input": x, "first/kernel": first, "second/kernel": second, "add": add, "third/kernel": third}


def sites_of(formats):
    """The site whose operation is the residual's addition."""
    [site] = [row.site for row in formats if row.operation == "add"]
    return site


def decoded(params):
    return nuqjax.decompress(params)


def run_oracle(formats, params, x):
    """The network on the oracle."""
    oracle = Oracle(formats.to_json())

    def layer(name, y):
        leaf, site = params[name], f"{name}/kernel"
        kernel = oracle.constant(site, "weight", np.asarray(decoded(leaf["kernel"])))
        return oracle.dot(site, y, kernel, oracle.constant(site, "bias", np.asarray(leaf["bias"])))

    hidden = oracle.bounded(layer("first", oracle.input(np.asarray(x))), 0.0)
    hidden = oracle.add(sites_of(formats), hidden, layer("second", hidden))
    layer("third", hidden)
    return oracle


def raw(formats, params, x):
    return jax.jit(emulate(predict, formats, output="raw", trace=[""]))(params, x)


# ---------------------------------------------------------------------------------------------------------------------
# The choice of fraction bits.


@given(
    st.floats(-(2.0**20), 2.0**20),
    st.floats(-(2.0**20), 2.0**20),
    st.integers(2, 32),
    st.booleans(),
)
def test_the_format_of_a_range_is_the_finest_that_holds_it(a, b, word, signed):
    low, high = sorted((a, b) if signed else (abs(a), abs(b)))
    word = min(word, 31 + signed)
    if max(abs(low), abs(high)) < 2.0**-400:
        return
    fmt = format_for(low, high, word, signed)
    assert (fmt.word, fmt.signed) == (word, signed)

    def holds(frac):
        shape = Format(word, frac, signed)
        return encoded([low, high], shape)[1] == 0

    assert holds(fmt.frac)
    assert not holds(fmt.frac + 1)


def test_words_of_32_bits_are_signed():
    fn = lambda params, x: jax.nn.relu(x)  # noqa: E731
    formats = calibrate(fn, {}, jnp.array([0.5, 1.0]), word=32)
    assert formats["input"].output == QFormat(32, 30)


@pytest.mark.parametrize(("word", "signed", "frac"), [(8, True, 7), (8, False, 8), (1, False, 1)])
def test_the_format_of_nothing_but_zeros(word, signed, frac):
    assert format_for(0.0, 0.0, word, signed) == QFormat(word, frac, signed)


@given(st.floats(2.0**-60, 2.0**60), st.integers(2, 16))
def test_ristrettos_rule(peak, word):
    for parameter in (False, True):
        bits = math.ceil(math.log2(peak) + parameter)  # il = ⌈log2 max⌉, of parameters ⌈log2 max + 1⌉
        for low, high in ((-peak, peak / 2), (0.0, peak)):
            assert format_for(low, high, word, True, "ristretto", parameter) == QFormat(word, word - bits)


# ---------------------------------------------------------------------------------------------------------------------
# What it chooses for a function.


@pytest.mark.parametrize("word", [5, 12])
def test_by_range_nothing_on_the_batch_overflows_and_one_more_bit_would(word):
    formats = calibrate(predict, CPARAMS, X, word=word, weight_word=7, bias_word=12, input_word=6)
    values = floats_of(decoded(CPARAMS), X)
    values[sites_of(formats)] = values.pop("add")
    assert {row.site for row in formats if row.output} == set(values)
    for site, value in values.items():
        fmt = formats[site].output
        assert fmt.word == (6 if site == "input" else word)
        rectified = site == "first/kernel"
        assert fmt.signed == (not rectified)
        kept = np.maximum(value, 0) if rectified else value
        assert encoded(kept, Format(fmt.word, fmt.frac, fmt.signed))[1] == 0
        assert encoded(kept, Format(fmt.word, fmt.frac + 1, fmt.signed))[1] > 0
    for name in PARAMS:
        row, leaves = formats[f"{name}/kernel"], decoded(CPARAMS[name])
        for fmt, leaf in ((row.weight, leaves["kernel"]), (row.bias, leaves["bias"])):
            assert encoded(leaf, Format(fmt.word, fmt.frac))[1] == 0
        assert row.weight.word == 7
        assert encoded(leaves["kernel"], Format(7, row.weight.frac + 1))[1] > 0
        assert row.bias.word == 12
        assert row.accumulator == Accumulator()


def squared_errors(formats, params, x):
    """Σ (word's value − value)² in float64, by "site field"."""
    values = floats_of(decoded(params), x)
    values[sites_of(formats)] = values.pop("add")
    found = {}
    for site, value in values.items():
        found[f"{site} output"] = (formats[site].output, np.maximum(value, 0) if site == "first/kernel" else value)
    for name in PARAMS:
        leaves, row = decoded(params[name]), formats[f"{name}/kernel"]
        found[f"{name} weight"] = (row.weight, leaves["kernel"])
    errors = {}
    for key, (fmt, value) in found.items():
        words, _ = encoded(value, Format(fmt.word, fmt.frac, fmt.signed))
        errors[key] = ((words * 2.0**-fmt.frac - np.asarray(value, np.float64)) ** 2).sum()
    return errors


def test_by_error_the_squared_error_is_never_larger_than_by_range():
    """But for the rounding of a float32 sum; and heavy tails are cut where that pays."""
    x = X * np.where(np.random.default_rng(9).uniform(size=X.shape) < 0.01, np.float32(8), np.float32(1))
    for word in (3, 6):
        options = {"word": word, "weight_word": 4}
        chosen = {choose: calibrate(predict, CPARAMS, x, choose=choose, **options) for choose in ("range", "error")}
        errors = {choose: squared_errors(formats, CPARAMS, x) for choose, formats in chosen.items()}
        for key, error in errors["error"].items():
            assert error <= errors["range"][key] * (1 + 2.0**-10), key
        assert sum(errors["error"].values()) < sum(errors["range"].values())
        finer = [a.output.frac - b.output.frac for a, b in zip(chosen["error"], chosen["range"], strict=True)]
        assert min(finer) >= 0
        assert max(finer) > 0


def test_ristretto_chooses_by_its_rule():
    formats = calibrate(predict, CPARAMS, X, preset="ristretto", word=9, weight_word=7, bias_word=11)
    values = floats_of(decoded(CPARAMS), X)
    values[sites_of(formats)] = values.pop("add")
    for site, value in values.items():
        value = np.maximum(value, 0) if site == "first/kernel" else np.asarray(value)
        assert formats[site].output == QFormat(9, 9 - math.ceil(math.log2(abs(value).max())))
        assert (formats[site].rounding, formats[site].overflow) == ("half_away", "saturate")
    for name in PARAMS:
        row = formats[f"{name}/kernel"]
        peak = float(jnp.abs(decoded(CPARAMS[name]["kernel"])).max())
        assert row.weight == QFormat(7, 7 - math.ceil(math.log2(peak) + 1))
        act = formats[{"first": "input", "second": "first/kernel", "third": sites_of(formats)}[name]].output
        assert row.bias.frac == min(row.weight.frac + 4, row.weight.frac + act.frac)  # the weights' integer bits


def test_presets():
    defaults = {"rounding": "half_even", "overflow": "saturate", "accumulator": Accumulator()}
    expected = {
        "nuqjax": defaults,
        "ap_fixed": {"rounding": "floor", "overflow": "wrap", "accumulator": Accumulator(32, "wrap")},
        "ristretto": defaults | {"rounding": "half_away"},
        "gemmlowp": defaults | {"rounding": "gemmlowp", "accumulator": Accumulator(32)},
    }
    assert list(expected) == list(PRESETS)
    for preset, modes in expected.items():
        formats = calibrate(predict, CPARAMS, X, preset=preset)
        assert {row.rounding for row in formats} == {modes["rounding"]}
        assert {row.overflow for row in formats} == {modes["overflow"]}
        assert {row.accumulator for row in formats if row.operation == "dot_general"} == {modes["accumulator"]}
        if preset == "ap_fixed":
            assert all(row.output.signed for row in formats)  # what wraps is no rectifier
    formats = calibrate(predict, CPARAMS, X, preset="gemmlowp", rounding="floor", overflow="wrap")
    assert {(row.rounding, row.overflow) for row in formats} == {("floor", "wrap")}


def test_weights_keep_the_format_of_their_codebook():
    fmt = QFormat(6, 3)
    words = nuqjax.compress(PARAMS, bits=3, min_size=0, codebook_format=fmt)
    assert isinstance(words["first"]["kernel"], CodebookArray)
    assert words["first"]["kernel"].codebook_format == fmt
    for choose in ("range", "error", "ristretto"):
        formats = calibrate(predict, words, X, weight_word=8, choose=choose)
        assert [formats[f"{name}/kernel"].weight for name in PARAMS] == [fmt] * 3


def test_weights_keep_the_format_that_was_chosen_for_their_codebook():
    words = nuqjax.compress(PARAMS, bits=3, min_size=0, codebook_format=AutoQFormat(7))
    formats = calibrate(predict, words, X)
    for name in PARAMS:
        assert formats[f"{name}/kernel"].weight == words[name]["kernel"].codebook_format
    oracle = run_oracle(formats, words, X)
    np.testing.assert_array_equal(raw(formats, words, X)[0], oracle.words["third/kernel"])


def test_unsigned_words_after_a_rectifier_and_bounds_of_relu6():
    params = {"kernel": jnp.linspace(-4.0, 4.0, 12).reshape(4, 3)}
    x = draws.normal(2, 50, 4)
    outputs = {}
    for name, activation in {
        "none": lambda y: y,
        "relu": jax.nn.relu,
        "relu6": jax.nn.relu6,
        "pooled": lambda y: jax.nn.relu(y).max(0),
        "leaky": jax.nn.leaky_relu,
        "both": lambda y: jax.nn.relu(y) - y,
    }.items():
        fn = lambda params, x, activation=activation: activation(x @ params["kernel"])  # noqa: E731
        outputs[name] = calibrate(fn, params, x)["kernel"].output
    peak = float(jnp.abs(x @ params["kernel"]).max())
    assert peak > 8
    assert {name: fmt.signed for name, fmt in outputs.items()} == {
        "none": True,
        "relu": False,
        "relu6": False,
        "pooled": False,
        "leaky": True,
        "both": True,
    }
    assert outputs["relu6"] == QFormat(8, 5, signed=False)  # to 6, whatever comes
    wraps = calibrate(lambda params, x: jax.nn.relu(x @ params["kernel"]), params, x, overflow="wrap")
    assert wraps["kernel"].output.signed


# ---------------------------------------------------------------------------------------------------------------------
# What it proves.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"word": 16, "weight_word": 12},
        {"word": 4, "weight_word": 3, "rounding": "floor"},
        {"preset": "ap_fixed", "accumulator": Accumulator(11, "wrap")},
        {"accumulator": Accumulator(12, "saturate")},
    ],
    ids=["8 bits", "16 bits", "4 bits", "wrap", "saturate"],
)
def test_no_sum_exceeds_its_bound(options):
    """Nor for inputs that the batch does not have; and the words are the oracle's."""
    formats = calibrate(predict, CPARAMS, X, **options)
    for x in (X, 50 * X, -50 * X):
        oracle = run_oracle(formats, CPARAMS, x)
        for site, words in raw(formats, CPARAMS, x)[1].words.items():
            np.testing.assert_array_equal(words, oracle.words[site])
        for name in PARAMS:
            row = formats[f"{name}/kernel"]
            assert oracle.accumulator_peaks[row.site] <= row.bound
            assert oracle.accumulator_peaks[row.site] < 2 ** (row.needed_bits - 1)


def test_the_bound_of_a_dot_is_reached():
    """max|x| Σ|w| + |b| by an input that is made for it."""
    kernel = jnp.array([[3.0], [-5.0], [7.0], [-2.0]])
    params = {"kernel": kernel, "bias": jnp.array([11.0])}
    fn = lambda params, x: x @ params["kernel"] + params["bias"]  # noqa: E731
    formats = calibrate(
        fn, params, jnp.where(kernel.T > 0, -128.0, 127.0), word=16, input_word=8, weight_word=8, bias_word=8
    )
    row = formats["kernel"]
    unit = 2 ** (row.weight.frac + formats["input"].output.frac)
    assert formats["input"].output.least * 2.0 ** -formats["input"].output.frac == -128
    assert row.bound == (128 * 17 + 11) * unit


@pytest.mark.parametrize("slack", [0, -1])
def test_an_exact_accumulator_has_the_bits_that_it_needs_or_is_refused(slack):
    needed = max(row.needed_bits for row in calibrate(predict, CPARAMS, X) if row.operation == "dot_general")
    if slack:
        with pytest.raises(ValueError, match=rf"kernel: .* {needed} bits, but have {needed - 1}"):
            calibrate(predict, CPARAMS, X, accumulator=Accumulator(needed - 1))
    else:
        calibrate(predict, CPARAMS, X, accumulator=Accumulator(needed))


def test_given_formats_are_kept_and_only_proven():
    formats = calibrate(predict, CPARAMS, X)
    edited = formats.replace("second", output=QFormat(5, 0), rounding="half_down")
    assert all(row.bound is None for row in edited)
    proven = calibrate(predict, CPARAMS, X, formats=edited)
    forgotten = dict.fromkeys(("weight_sum", "bias_peak", "bound", "route"))
    assert [replace(row, **forgotten) for row in proven] == list(edited)
    assert all(row.route for row in proven if row.operation == "dot_general")
    assert calibrate(predict, CPARAMS, X, formats=formats) == formats
    np.testing.assert_array_equal(raw(proven, CPARAMS, X)[0], raw(edited, CPARAMS, X)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "tflite"}, "unknown preset 'tflite'; known: nuqjax, ap_fixed, ristretto, gemmlowp"),
        ({"choose": "best"}, "unknown choose 'best'; known: range, error, ristretto"),
        ({"fallback": "double"}, "unknown fallback 'double'"),
        ({"rounding": "up"}, "unknown rounding 'up'"),
        ({"overflow": "modulo"}, "unknown overflow 'modulo'"),
        ({"word": 40}, "40 bits"),
    ],
)
def test_options_that_are_unknown(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(predict, CPARAMS, X, **options)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_values_that_are_not_finite(bad):
    with pytest.raises(ValueError, match=r"input.* not finite"):
        calibrate(predict, CPARAMS, X.at[3, 4].set(bad))


def test_what_rounds_away_from_zero_does_not_overflow_on_the_batch():
    """−128.5 rounded half away from zero is no word of 8 bits, though half even it is one."""
    x = jnp.array([[-128.5, 100.0]])
    fn = lambda params, x: -x  # noqa: E731
    for rounding in ("half_even", "half_away"):
        fmt = calibrate(fn, {}, x, rounding=rounding)["input"].output
        words = encode(x, fmt, rounding=rounding)
        assert (words == encode(x, QFormat(32, fmt.frac), rounding=rounding)).all(), rounding
