"""Streams of coded indices and their models: round trips, sizes beside the entropy, and damage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax._src.leaf import packing
from nuqjax._src.store import entropy


def decoded(stream, model, bits, rows, count):
    """What a reader makes of a stream and its model."""
    return entropy.decode(stream, entropy.weights_of(model, bits), bits, rows, count)


@settings(max_examples=60)
@given(
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 3000),
    st.floats(0, 1),
    st.integers(0, 99),
    st.integers(16, 999),
)
def test_a_stream_stands_for_its_indices(bits, channels, count, share, seed, stretch):
    """Also where it is coded in several stretches, of rows or of parts of a row."""
    indices = np.random.default_rng(seed).binomial((1 << bits) - 1, share, (channels, count)).astype(np.uint8)
    packed = packing.pack(indices, bits)
    before, entropy._STRETCH = entropy._STRETCH, stretch // 8 * 8
    try:
        coded = entropy.encode(packed, bits, count)
        if coded is not None:
            assert sum(a.nbytes for a in coded) < packed.nbytes
            np.testing.assert_array_equal(decoded(*coded, bits, channels, count), packed)
    finally:
        entropy._STRETCH = before
    if coded is not None:
        np.testing.assert_array_equal(decoded(*coded, bits, channels, count), packed)


def histogram(kind, levels, rng):
    """The shares of levels: any, few, those of a smooth density, nearly all one."""
    at = np.arange(levels) - levels * rng.uniform(0.3, 0.7)
    match kind:
        case "any":
            share = rng.exponential(size=levels)
        case "far apart":
            share = np.exp(rng.uniform(-9, 0, levels)) * (rng.random(levels) < 0.5)
        case "normal":
            share = np.exp(-0.5 * (at / levels * rng.uniform(3, 12)) ** 2)
        case "Laplace":
            share = np.exp(-np.abs(at / levels) * rng.uniform(3, 30))
        case "nearly one":
            share = np.full(levels, 1e-3 / levels)
    share[rng.integers(levels)] += 1.0 if kind == "nearly one" else 1e-3
    return share / share.sum()


@pytest.mark.parametrize("kind", ["any", "far apart", "normal", "Laplace", "nearly one"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_stream_and_model_take_what_the_entropy_says(kind, bits):
    """At most a two-hundredth more, and some bytes: the model's for each level at most, three words of the coder's."""
    rng = np.random.default_rng(bits)
    for size in (100, 1_000, 10_000, 100_000, 1_000_000):
        counts = rng.multinomial(size, histogram(kind, 1 << bits, rng))
        packed = packing.pack(np.repeat(np.arange(1 << bits, dtype=np.uint8), counts)[None], bits)
        coded, told = entropy.encode(packed, bits, size), entropy.sized(packed, bits, size)
        counts = counts[counts > 0]
        ideal = float((counts * np.log2(size / counts)).sum()) / 8
        most = 1.005 * ideal + 2 + (1 << bits) + 3 * 4
        if coded is None:  # the indices stay packed
            assert packed.nbytes <= most or packed.nbytes > 64 * (ideal - 4) + (1 << 16)
            continue
        stream, model = coded
        assert ideal - 4 <= stream.nbytes <= stream.nbytes + model.nbytes <= most
        assert told is not None
        assert abs(told[0].nbytes - stream.nbytes) <= 4
        np.testing.assert_array_equal(told[1], model)
        if size <= 10_000:
            np.testing.assert_array_equal(decoded(stream, model, bits, 1, size), packed)
            again = entropy.encode(packed, bits, size)
            assert again is not None
            assert (again[0].tobytes(), again[1].tobytes()) == (stream.tobytes(), model.tobytes())


def test_few_bytes_describe_a_smooth_histogram():
    levels = np.arange(256)
    for share in (np.exp(-np.abs(levels - 128) / 9), np.exp(-0.5 * ((levels - 128) / 30) ** 2)):
        counts = np.round(1e5 * share / share.sum()).astype(np.int64)
        assert 5 <= entropy._fitted(counts).size <= 30
        assert entropy._fitted(np.maximum(counts, 1) * 10**6).size == 258  # so many that every level's byte pays


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_damage_of_stream_or_model_is_told_or_other_indices(bits):
    """A prefix, a flip or other bytes: a ValueError, or indices of the right shape, all within the levels."""
    rng = np.random.default_rng(bits)
    indices = rng.binomial((1 << bits) - 1, 0.1, (3, 500)).astype(np.uint8)
    coded = entropy.encode(packing.pack(indices, bits), bits, 500)
    assert coded is not None
    stream, model = coded
    others = [(stream[:n], model) for n in range(stream.size)] + [(stream, model[:n]) for n in range(model.size)]
    for _ in range(100):
        words, table = stream.copy(), model.copy()
        words.view(np.uint8)[rng.integers(stream.nbytes)] ^= 1 << rng.integers(8)
        table[rng.integers(model.size)] = rng.integers(256)
        others += [(words, model), (stream, table), (stream, rng.integers(0, 256, 5).astype(np.uint8))]
    told = 0
    for words, table in others:
        try:
            packed = decoded(words, table, bits, 3, 500)
        except ValueError:
            told += 1
        else:
            assert packed.shape == (3, packing.packed_size(500, bits))
            np.testing.assert_array_equal(packing.pack(packing.unpack(packed, bits, 500), bits), packed)
    assert told > len(others) // 2


@pytest.mark.parametrize("span", [1, 2, 3, 17, 256])
def test_control_bytes_are_met_and_what_is_between_lies_between(span):
    rng = np.random.default_rng(span)
    for n in {1, 2, min(span, 7), span} - ({2} if span == 1 else set()):
        controls = rng.integers(0, 256, n)
        found = entropy._between(controls, span)
        assert found.shape == (span,)
        assert found.min() >= controls.min()
        assert found.max() <= controls.max()
        assert found[0] == controls[0]
        assert n == 1 or found[-1] == controls[-1]
        if n == span:
            np.testing.assert_array_equal(found, controls)
