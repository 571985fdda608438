"""The formats of an emulation: their JSON, their edits, their table."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuqjax import Accumulator, Formats, QFormat, SiteFormat
from nuqjax._src.emulate.formats import ACCUMULATOR_MODES, SITE_ROUNDING
from nuqjax.fixed_point import OVERFLOW, ROUNDING

qformats = st.builds(QFormat, st.integers(1, 31), st.integers(-64, 64), st.booleans())
accumulators = st.builds(
    Accumulator,
    st.integers(2, 62),
    st.sampled_from(ACCUMULATOR_MODES),
    st.none() | st.integers(-40, 40),
    st.sampled_from(ROUNDING),
) | st.just(Accumulator())


def optional(values):
    return st.none() | values


site_formats = st.builds(
    SiteFormat,
    st.text(min_size=1),
    st.text(),
    optional(qformats),
    optional(qformats),
    optional(qformats),
    optional(accumulators),
    st.sampled_from(SITE_ROUNDING),
    st.sampled_from(OVERFLOW),
    *[optional(st.integers(0, 2**62))] * 4,
    optional(st.sampled_from(["float32", "int8", "scan"])),
)
formats = st.builds(
    lambda rows, fallback: Formats({row.site: row for row in rows}, fallback),
    st.lists(site_formats, max_size=4),
    st.sampled_from([None, "float"]),
)


@given(formats)
def test_json_gives_back_the_formats(given):
    text = given.to_json()
    assert Formats.from_json(text) == given
    assert list(Formats.from_json(text).rows) == list(given.rows)
    json.loads(text)


def test_a_file_gives_back_the_formats(tmp_path):
    for name in ("formats.json", tmp_path / "formats.json"):
        path = tmp_path / name
        FORMATS.save(str(path))
        assert Formats.load(path) == FORMATS


FORMATS = Formats(
    {
        row.site: row
        for row in (
            SiteFormat("input", "input", QFormat(8, 5)),
            SiteFormat(
                "conv/kernel",
                "conv_general_dilated",
                QFormat(8, 4, signed=False),
                QFormat(8, 7),
                QFormat(16, 12),
                Accumulator(20, "saturate", 10),
                "half_up",
                "saturate_symmetric",
                weight_sum=300,
                bias_peak=9,
                bound=2**17,
                route="scan",
            ),
            SiteFormat(
                "dense/kernel", "dot_general", QFormat(16, -4), QFormat(4, 9), accumulator=Accumulator(), bound=5
            ),
            SiteFormat("block:mul", "mul", weight=QFormat(16, 16), bound=70, rounding="floor"),
        )
    }
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not the JSON"),
        ("[]", "not the JSON"),
        ("5", "not the JSON"),
        ("{}", "not the JSON"),
        ('{"version": 1}', "not the JSON"),
        ('{"version": 1, "rows": [{"site": "a"}]}', "not the JSON"),
        ('{"version": 1, "rows": [{"site": "a", "operation": "b", "colour": 3}]}', "not the JSON"),
        ('{"version": 2, "rows": []}', "version 2, but this nuqjax reads version 1"),
        ('{"version": null, "rows": []}', "version None"),
        ('{"version": 1, "rows": [{"site": "a", "operation": "b", "rounding": "up"}]}', "a: unknown rounding 'up'"),
        ('{"version": 1, "rows": [{"site": "a", "operation": "b", "output": {"word": 99, "frac": 0}}]}', "99 bits"),
    ],
)
def test_other_text_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        Formats.from_json(text)


def test_replace_changes_the_sites_named_and_forgets_every_bound():
    changed = FORMATS.replace("kernel", output=QFormat(9, 3), rounding="floor")
    assert [row.output for row in changed] == [QFormat(8, 5), QFormat(9, 3), QFormat(9, 3), None]
    assert [row.rounding for row in changed] == ["half_even", "floor", "floor", "floor"]
    assert {(row.weight_sum, row.bias_peak, row.bound, row.route, row.needed_bits) for row in changed} == {(None,) * 5}
    assert changed["conv/kernel"].accumulator == FORMATS["conv/kernel"].accumulator
    assert FORMATS["conv/kernel"].rounding == "half_up"  # the old are as they were
    assert FORMATS["conv/kernel"].bound == 2**17


def test_replace_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"'nowhere'.*input, conv/kernel, dense/kernel, block:mul"):
        FORMATS.replace("nowhere", rounding="floor")
    for field in ("colour", "bound", "route", "operation"):
        with pytest.raises(TypeError, match=f"unknown fields {field}"):
            FORMATS.replace("input", **{field: 1})
    with pytest.raises(ValueError, match="input: unknown overflow 'modulo'"):
        FORMATS.replace("input", overflow="modulo")


def test_a_missing_row_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match=r"no row for 'conv'.*input, conv/kernel, dense/kernel, block:mul"):
        FORMATS["conv"]
    with pytest.raises(ValueError, match="none"):
        Formats({})["conv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "modulo"}, "unknown accumulator mode 'modulo'; known: exact, wrap, saturate"),
        ({"word": 8, "mode": "wrap", "rounding": "up"}, "unknown rounding 'up'"),
        ({"rounding": "gemmlowp"}, "unknown rounding 'gemmlowp'"),
        ({"mode": "wrap"}, "mode='wrap' needs a word length"),
        ({"mode": "saturate"}, "mode='saturate' needs a word length"),
        ({"word": 1}, "1 bits, but 2 to 62"),
        ({"word": 63}, "63 bits, but 2 to 62"),
    ],
)
def test_accumulators_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Accumulator(**options)


def test_a_row_says_how_many_bits_it_needs():
    for bound, bits in ((0, 1), (1, 2), (127, 8), (128, 9), (5171, 14)):
        assert SiteFormat("a", "b", bound=bound).needed_bits == bits
    assert SiteFormat("a", "b").needed_bits is None


def test_the_table_shows_every_row():
    lines = str(FORMATS).splitlines()
    assert "4 sites" in lines[0]
    assert "floats allowed" not in lines[0]
    [conv] = [line for line in lines if "conv/kernel" in line]
    cells = [cell.strip() for cell in conv.strip("│ ").split("│")]
    assert cells[:9] == [
        "conv/kernel",
        "conv_general_dilated",
        "u8.4",
        "s8.7",
        "s16.12",
        "20.10 saturate",
        "half_up",
        "saturate_symmetric",
        "19 bits",
    ]
    assert "scan" in cells
    [mul] = [line for line in lines if "block:mul" in line]
    assert "s16.16" in mul
    assert "floor" not in mul  # which rounds nothing
    [dense] = [line for line in lines if "dense/kernel" in line]
    assert "s16.-4" in dense
    assert "any exact" in dense
    assert "floats allowed" in str(Formats(FORMATS.rows, "float"))
    assert repr(FORMATS) == "Formats(4 sites)"
    assert len(FORMATS) == 4
