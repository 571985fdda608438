"""Long words are the library's own methods carried on: the same at 8 bits, and better by 6 dB for each bit beyond."""

import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from experiments.paper import wide_words
from experiments.paper.wide_words import METHODS, quantize, round_rows


def kernel(seed=0):
    random = np.random.default_rng(seed)
    return (random.standard_t(4, (3, 3, 16, 8)) * random.uniform(0.1, 3, 8)).astype(np.float32)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("method", METHODS)
def test_at_8_bits_and_fewer_it_is_nuqjax(method, bits, granularity):
    params = {"kernel": kernel(), "bias": np.ones(8, np.float32)}
    cparams = nuqjax.compress(params, bits, method, granularity=granularity, rules=[nuqjax.Rule("kernel", skip=False)])
    expected = np.asarray(nuqjax.decompress(cparams)["kernel"], np.float64)
    found = quantize(params, method, bits, granularity)
    if method == "uniform":  # another search for the step; the error of 144 values a channel has many minima
        errors = [float(np.sum((kernel() - values) ** 2)) for values in (found.params["kernel"], expected)]
        assert errors[0] == pytest.approx(errors[1], rel=2e-3 if granularity == "tensor" else 0.05)
    else:
        np.testing.assert_array_equal(found.params["kernel"], expected)
    np.testing.assert_array_equal(found.params["bias"], params["bias"])
    of_kernel = {leaf["path"]: leaf for leaf in found.leaves}["kernel"]
    report = {leaf["path"]: leaf for leaf in nuqjax.report(params, cparams).to_dict()["leaves"]}["kernel"]
    assert of_kernel["levels_available"] == report["levels_available"]
    assert of_kernel["sqnr_db"] == pytest.approx(report["sqnr_db"], abs=0.2 if method == "uniform" else 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_words_are_multiples_of_a_step_within_their_range(method):
    rows = kernel().reshape(4, -1)
    for bits in (9, 12, 16):
        words = round_rows(rows, method, bits)
        for row in words:
            step = np.diff(np.unique(row)).min()
            multiples = row / step
            np.testing.assert_allclose(multiples, np.rint(multiples), atol=1e-6 * 2**bits)
            assert -(2 ** (bits - 1)) - 0.5 <= multiples.min()
            assert multiples.max() <= 2 ** (bits - 1) - 0.5
            if method != "uniform":
                assert np.log2(step) == np.rint(np.log2(step))


def test_a_bit_more_is_six_decibels_and_a_free_step_is_best():
    rows = kernel().reshape(1, -1)
    signal = np.sum(rows.astype(np.float64) ** 2)
    ratios = {
        method: [10 * np.log10(signal / np.sum((rows - round_rows(rows, method, bits)) ** 2)) for bits in range(9, 15)]
        for method in METHODS
    }
    for method in METHODS:
        assert np.diff(ratios[method]).min() > 4  # less than 6 where a coarser step still pays
        assert np.diff(ratios[method])[-1] == pytest.approx(6.02, abs=1.1)
    for i in range(6):
        assert ratios["uniform"][i] >= ratios["uniform_pow2"][i] >= ratios["dfp"][i]


def test_small_leaves_stay_dense_and_sizes_count_all():
    params = {"a": jnp.ones((5, 5, 1, 6)), "b": jnp.asarray(kernel())}
    found = quantize(params, "dfp", 12, "tensor")
    assert [leaf["reason"] for leaf in found.leaves] == ["left dense", None]
    sizes = wide_words.sizes(found.leaves, 600 + 1728 + 1)
    assert sizes["compressed_fraction"] == 1152 / 1302
    assert sizes["bits_per_weight"] == 8 * 2329 / 1302
    assert sizes["compressed_bits_per_weight"] == 12
    assert [leaf["reason"] for leaf in quantize(params, "dfp", 12, "channel").leaves] == [None, None]


@pytest.mark.parametrize("options", [("knq", 9, "tensor"), ("dfp", 17, "tensor"), ("dfp", 9, "channel_groups:4")])
def test_other_words_are_an_error(options):
    with pytest.raises(ValueError, match="words: "):
        quantize({"w": jnp.ones((16, 16))}, *options)
