"""Fixed point: every rounding and overflow against APyTypes, against Python integers, and by the published vectors."""

import itertools
import math
from fractions import Fraction

import apytypes
import fxpmath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apytypes import OverflowMode, QuantizationMode
from hypothesis import given, settings
from hypothesis import strategies as st

from nuqjax import AutoQFormat, QFormat
from nuqjax._src.platform.host import x64
from nuqjax.fixed_point import OVERFLOW, ROUNDING, check_modes, decode, encode, overflows, requantize

jit_encode = jax.jit(encode, static_argnames=("fmt", "rounding", "overflow"))
jit_decode = jax.jit(decode, static_argnames="fmt")
jit_overflows = jax.jit(overflows, static_argnames="fmt")
jit_requantize = jax.jit(requantize, static_argnames=("source", "target", "rounding", "overflow"))
MODES = list(itertools.product(ROUNDING, OVERFLOW))
APYTYPES_ROUNDING = {
    "floor": QuantizationMode.TO_NEG,
    "toward_zero": QuantizationMode.TO_ZERO,
    "half_up": QuantizationMode.TIES_POS,
    "half_down": QuantizationMode.TIES_NEG,
    "half_away": QuantizationMode.TIES_AWAY,
    "half_toward_zero": QuantizationMode.TIES_ZERO,
    "half_even": QuantizationMode.TIES_EVEN,
}
APYTYPES_OVERFLOW = {"saturate": OverflowMode.SAT, "wrap": OverflowMode.WRAP}

# All 12-bit words with 6 fraction bits, and formats that drop bits, keep them, or add some; short and long words,
# signed and not, with no integer bits at all and with trailing zeros.
WORDS = np.arange(-2048, 2048)
SOURCE = QFormat(12, 6)
TARGETS = (
    QFormat(6, 3),
    QFormat(8, 3),
    QFormat(4, 0),
    QFormat(12, 6),
    QFormat(5, 6),
    QFormat(9, 8),
    QFormat(3, -2),
    QFormat(1, 1),
    QFormat(7, 3, signed=False),
    QFormat(3, 5, signed=False),
)


def rounded(value: Fraction, rounding: str) -> int:
    """A fraction to a whole number, in exact arithmetic."""
    below = math.floor(value)
    rest = value - below
    if rest == 0:
        return below
    half = Fraction(1, 2)
    if rest != half and rounding not in ("floor", "toward_zero"):
        return below + (rest > half)
    away, toward = (below + 1, below) if value > 0 else (below, below + 1)
    return {
        "floor": below,
        "toward_zero": toward,
        "half_up": below + 1,
        "half_down": below,
        "half_away": away,
        "half_toward_zero": toward,
        "half_even": below + below % 2,
    }[rounding]


def in_range(whole: int, word: int, signed: bool, overflow: str) -> int:
    """A whole number brought into the range of a word."""
    least, largest = (-(2 ** (word - 1)), 2 ** (word - 1) - 1) if signed else (0, 2**word - 1)
    if least <= whole <= largest and not (overflow == "saturate_symmetric" and signed and whole == least):
        return whole
    match overflow:
        case "saturate":
            return largest if whole > 0 else least
        case "saturate_symmetric":
            return largest if whole > 0 else -largest if signed else 0
        case "saturate_zero":
            return 0
        case "wrap":
            return (whole - least) % 2**word + least
    raise AssertionError(overflow)


@jax.jit
def encode_words(x):
    """Every mode and target of the exhaustive test in one compilation."""
    return [encode(x, f, rounding=r, overflow=o) for f, (r, o) in itertools.product(TARGETS, MODES)]


@jax.jit
def requantize_words(raw):
    """The same from the raw words: no float in between."""
    return [requantize(raw, SOURCE, f, rounding=r, overflow=o) for f, (r, o) in itertools.product(TARGETS, MODES)]


@pytest.fixture(scope="module", params=["encode", "encode on the host", "requantize"])
def encoded_words(request):
    keys = [(f, *modes) for f, modes in itertools.product(TARGETS, MODES)]
    if request.param == "requantize":
        words = requantize_words(WORDS)
    else:  # what jit wraps is NumPy's on the host
        words = (encode_words if request.param == "encode" else encode_words.__wrapped__)(np.float32(WORDS / 64))
    return dict(zip(keys, jax.device_get(words), strict=True))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_12_bit_word_against_python_integers(encoded_words, target):
    exact = [Fraction(int(word), 64) * Fraction(2) ** target.frac for word in WORDS]
    for rounding in ROUNDING:
        whole = [rounded(value, rounding) for value in exact]
        for overflow in OVERFLOW:
            raw = encoded_words[target, rounding, overflow]
            assert raw.dtype == np.int32
            wanted = [in_range(w, target.word, target.signed, overflow) for w in whole]
            np.testing.assert_array_equal(raw, wanted, err_msg=f"{rounding}, {overflow}")


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_12_bit_word_against_apytypes(encoded_words, target):
    source = apytypes.APyFixedArray(WORDS.tolist(), bits=SOURCE.word, frac_bits=SOURCE.frac)
    # APyTypes has signed words only: for an unsigned target it rounds into a wide word, and the range is taken here.
    wide = target.word if target.signed else 40
    for rounding, overflow in itertools.product(APYTYPES_ROUNDING, APYTYPES_OVERFLOW):
        cast = source.cast(
            bits=wide,
            frac_bits=target.frac,
            quantization=APYTYPES_ROUNDING[rounding],
            overflow=APYTYPES_OVERFLOW[overflow],
        )
        bits = np.array(cast.to_bits(), np.int64)
        wanted = np.where(bits >= 2 ** (wide - 1), bits - 2**wide, bits)
        if not target.signed:
            wanted = np.clip(wanted, 0, target.largest) if overflow == "saturate" else wanted % 2**target.word
        np.testing.assert_array_equal(
            encoded_words[target, rounding, overflow], wanted, err_msg=f"{rounding}, {overflow}"
        )


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_12_bit_word_against_fxpmath(encoded_words, target):
    """Where its modes overlap: its "trunc" is toward zero, its "around" half to even."""
    modes = {"floor": "floor", "toward_zero": "trunc", "half_even": "around"}
    options = {"signed": target.signed, "n_word": target.word, "n_frac": target.frac}
    for (rounding, theirs), overflow in itertools.product(modes.items(), ("saturate", "wrap")):
        wanted = fxpmath.Fxp(WORDS / 64, **options, rounding=theirs, overflow=overflow).raw()
        np.testing.assert_array_equal(
            encoded_words[target, rounding, overflow], wanted, err_msg=f"{rounding}, {overflow}"
        )


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        (20, [2, 2, 3, 2, 3, 2, 2]),
        (-20, [-3, -2, -2, -2, -3, -3, -2]),
        (-28, [-4, -3, -3, -3, -4, -4, -4]),
        (-1, [-1, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_rounding_vectors(word, wanted):
    """Three fraction bits dropped, by ap_fixed's modes in their order there."""
    order = ("floor", "toward_zero", "half_up", "half_toward_zero", "half_away", "half_down", "half_even")
    got = [jit_encode(jnp.float32(word / 8), QFormat(16, 0), rounding=mode).item() for mode in order]
    assert got == wanted
    got = [jit_requantize(jnp.int32(word), QFormat(16, 3), QFormat(16, 0), rounding=mode).item() for mode in order]
    assert got == wanted


@pytest.mark.parametrize(
    ("word", "rounding", "overflow", "wanted"),
    [
        (60, "half_up", "wrap", -8),
        (60, "half_up", "saturate", 7),
        (60, "half_up", "saturate_zero", 0),
        (-68, "floor", "wrap", 7),
        (-68, "floor", "saturate", -8),
        (-68, "floor", "saturate_symmetric", -7),
    ],
)
def test_overflow_vectors(word, rounding, overflow, wanted):
    assert jit_encode(jnp.float32(word / 8), QFormat(4, 0), rounding=rounding, overflow=overflow).item() == wanted
    raw = jit_requantize(jnp.int32(word), QFormat(8, 3), QFormat(4, 0), rounding=rounding, overflow=overflow)
    assert raw.item() == wanted


@pytest.mark.parametrize(
    ("word", "source", "target", "overflow", "wanted"),
    [
        (1113, QFormat(12, 9), QFormat(6, 3), "saturate", 17),  # an accumulator to activation words
        (797, QFormat(11, 9), QFormat(6, 3), "saturate", 12),
        (-935, QFormat(11, 9), QFormat(6, 3), "saturate", -15),
        (-3, QFormat(8, 4), QFormat(16, 10), "saturate", -192),  # a bias to the accumulator's fraction
        *(
            (word, QFormat(8, 12), QFormat(16, 10), "saturate", to)
            for word, to in zip((5, 6, 2, -2, -6), (1, 2, 0, 0, -2), strict=True)
        ),
        (300, QFormat(32, 0), QFormat(8, 0), "saturate", 127),
        (300, QFormat(32, 0), QFormat(8, 0), "wrap", 44),
    ],
)
def test_requantization_vectors(word, source, target, overflow, wanted):
    assert jit_requantize(jnp.int32(word), source, target, overflow=overflow).item() == wanted


SHIFTS = (-70, -31, -1, 1, 31, 63, 64, 65)
WIDE = [QFormat(8, 0), QFormat(32, 0)]


@jax.jit
def requantize_any(raw):
    return [
        requantize(raw, QFormat(32, shift), f, rounding=r, overflow=o)
        for (shift, f), (r, o) in itertools.product(zip(SHIFTS, WIDE * 4, strict=True), MODES)
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300), min_size=8, max_size=8))
def test_any_int64_is_requantized_exactly(words):
    words += [2**62, -(2**62), 2**63 - 1, -(2**63), 2**30, -(2**30), 3 * 2**30, -3 * 2**61]
    with x64():
        got = jax.device_get(requantize_any(np.array(words, np.int64)))
    cells = itertools.product(zip(SHIFTS, WIDE * 4, strict=True), MODES)
    for ((shift, fmt), (rounding, overflow)), raw in zip(cells, got, strict=True):
        whole = [rounded(Fraction(word) / Fraction(2) ** shift, rounding) for word in words]
        assert raw.dtype == np.int64
        wanted = [in_range(w, fmt.word, fmt.signed, overflow) for w in whole]
        assert raw.tolist() == wanted, (shift, fmt, rounding, overflow)


def test_requantized_words_have_the_dtype_of_words():
    for dtype in (np.int8, np.uint8, np.int16, np.int32):
        raw = requantize(np.array([100, 3], dtype), QFormat(8, 2), QFormat(8, 0))
        assert raw.dtype == np.int32
        assert raw.tolist() == [25, 1]
    with pytest.raises(TypeError, match="requantize: raw words are integers, not float32"):
        requantize(jnp.ones(2), QFormat(8, 2), QFormat(8, 0))


FORMATS = (QFormat(8, 7), QFormat(24, 0), QFormat(32, 40), QFormat(31, 3, signed=False))


@jax.jit
def encode_any(x):
    return [encode(x, f, rounding=r, overflow=o) for f, (r, o) in itertools.product(FORMATS, MODES)]


def check_any(values):
    """All modes on the given values, of float32 or float64, traced and on the host, against exact arithmetic."""
    traced, host = jax.device_get((encode_any(values), encode_any.__wrapped__(values)))
    for (fmt, (rounding, overflow)), raw, same in zip(itertools.product(FORMATS, MODES), traced, host, strict=True):
        exact = [Fraction(float(v)) * Fraction(2) ** fmt.frac for v in values]
        wanted = [in_range(rounded(v, rounding), fmt.word, fmt.signed, overflow) for v in exact]
        assert raw.dtype == same.dtype == np.int32
        assert raw.tolist() == same.tolist() == wanted, (fmt, rounding, overflow)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
halves = st.builds(math.ldexp, st.integers(-(2**23), 2**23), st.sampled_from([-1, -4, -8, -41]))


@given(st.lists(floats | halves, min_size=8, max_size=8))
def test_any_float32_is_rounded_once_and_exactly(values):
    check_any(np.float32(values))


def test_float64_beside_a_half_is_rounded_exactly():
    at = np.array([0.5, 1.5, 2.5, 1.0, 1e15 + 0.5, 0.25])
    at = np.concatenate([at, -at])
    values = np.concatenate([at, np.nextafter(at, np.inf), np.nextafter(at, -np.inf)])
    with x64():
        check_any(np.concatenate([values * 2.0**-f.frac for f in FORMATS]))


def test_defaults_are_half_even_and_saturate():
    x = np.float32(WORDS / 64)
    for target in TARGETS[:2]:
        explicit = jit_encode(x, target, rounding="half_even", overflow="saturate")
        np.testing.assert_array_equal(jit_encode(x, target), explicit)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_encoded_by_their_exact_values(dtype):
    x = jnp.asarray(np.linspace(-3, 3, 500), dtype)
    np.testing.assert_array_equal(jit_encode(x, QFormat(9, 6)), jit_encode(x.astype(jnp.float32), QFormat(9, 6)))


@pytest.mark.parametrize(
    "fmt", [QFormat(1, 0), QFormat(8, 6), QFormat(12, 20), QFormat(12, -7), QFormat(12, 3, signed=False)], ids=str
)
def test_every_word_comes_back(fmt):
    words = np.arange(fmt.least, fmt.largest + 1)
    values = jit_decode(jnp.asarray(words), fmt)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, words * 2.0**-fmt.frac)
    assert (values[0], values[-1]) == fmt.range
    for rounding, overflow in [("half_even", "saturate"), ("floor", "wrap"), ("toward_zero", "saturate_zero")]:
        np.testing.assert_array_equal(jit_encode(values, fmt, rounding=rounding, overflow=overflow), words)
    stored = words.astype(fmt.storage_dtype)
    np.testing.assert_array_equal(stored, words)
    np.testing.assert_array_equal(jit_decode(jnp.asarray(stored), fmt), values)


def test_decode_rounds_long_words_once():
    words = np.array([2**31 - 1, 2**30 + 1, -(2**31), 2**24 + 1, 2**25 + 3, -(2**26) - 9], np.int32)
    for frac in (0, 31, -20):
        wanted = (words.astype(np.float64) * 2.0**-frac).astype(np.float32)
        np.testing.assert_array_equal(jit_decode(jnp.asarray(words), QFormat(32, frac)), wanted)


def test_traced_and_on_the_host_the_bits_are_the_same():
    """Subnormal values count as zero, and values that would be subnormal are zero."""
    tiny = np.finfo(np.float32).tiny
    x = np.append(np.random.default_rng(0).normal(size=50), [0, -0.0, tiny, 0.9 * tiny, -0.9 * tiny, 3e38, -3e38])
    for fmt in (QFormat(8, 6), QFormat(16, 140), QFormat(31, -110, signed=False)):
        raw = encode(np.float32(x), fmt)
        assert raw.dtype == jnp.int32
        np.testing.assert_array_equal(raw, jit_encode(np.float32(x), fmt))
        np.testing.assert_array_equal(overflows(np.float32(x), fmt), jit_overflows(np.float32(x), fmt))
        np.testing.assert_array_equal(decode(raw, fmt), jit_decode(raw, fmt))


def test_the_same_bits_with_x64_on():
    x = np.random.default_rng(0).normal(size=200).astype(np.float32)
    fmt = QFormat(8, 6)
    raw, values = jit_encode(x, fmt), jit_decode(jit_encode(x, fmt), fmt)
    with x64():
        assert jit_encode(jnp.asarray(x), fmt).dtype == jnp.int32
        assert jit_decode(raw, fmt).dtype == jnp.float32
        np.testing.assert_array_equal(jit_encode(jnp.asarray(x), fmt), raw)
        np.testing.assert_array_equal(jit_decode(raw, fmt), values)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)])
def test_shapes(shape):
    raw = jit_encode(jnp.ones(shape), QFormat(8, 4))
    assert raw.shape == shape
    assert jit_decode(raw, QFormat(8, 4)).shape == shape


@pytest.mark.parametrize(
    ("word", "signed", "least", "largest", "storage"),
    [
        (1, True, -1, 0, "int8"),
        (8, True, -128, 127, "int8"),
        (9, True, -256, 255, "int16"),
        (17, True, -65536, 65535, "int32"),
        (32, True, -(2**31), 2**31 - 1, "int32"),
        (1, False, 0, 1, "uint8"),
        (8, False, 0, 255, "uint8"),
        (16, False, 0, 65535, "uint16"),
        (31, False, 0, 2**31 - 1, "uint32"),
    ],
)
def test_range_and_storage(word, signed, least, largest, storage):
    fmt = QFormat(word, 3, signed)
    assert (fmt.least, fmt.largest) == (least, largest)
    assert fmt.range == (least / 8, largest / 8)
    assert fmt.storage_dtype == storage


@pytest.mark.parametrize("kind", [lambda *a: QFormat(a[0], 0, *a[1:]), AutoQFormat], ids=["QFormat", "AutoQFormat"])
@pytest.mark.parametrize(
    ("word", "signed", "most"), [(0, True, 32), (33, True, 32), (32, False, 31), (8.0, True, 32), (True, True, 32)]
)
def test_wrong_words(kind, word, signed, most):
    with pytest.raises(ValueError, match=f"QFormat: a word of {word!r} bits, but a whole number from 1 to {most} is"):
        kind(word, signed)


@pytest.mark.parametrize("frac", [513, -513, 1.5, True, None])
def test_wrong_fraction_bits(frac):
    with pytest.raises(ValueError, match=f"QFormat: frac {frac!r}, but a whole number from -512 to 512"):
        QFormat(8, frac)


def test_wrong_modes_are_told_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown rounding 'nearest'; known: floor, .*half_even"):
        encode(jnp.ones(2), QFormat(8, 4), rounding="nearest")
    with pytest.raises(ValueError, match=r"unknown overflow 'clip'; known: saturate, .*wrap"):
        encode(jnp.ones(2), QFormat(8, 4), overflow="clip")
    for rounding, overflow in MODES:
        check_modes(rounding, overflow)
