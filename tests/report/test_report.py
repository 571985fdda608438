"""The report's numbers, each against NumPy."""

import html.parser
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from nuqjax import ChannelGroups, CodebookArray, InputGroups, QFormat, Rule
from nuqjax._src.report import comparison
from nuqjax._src.report.leaf_report import sqnr_db


@pytest.fixture(scope="module")
def tree():
    """Leaves of every kind, compressed, with the report that compress returns."""
    rng = np.random.default_rng(0)
    params = {
        "stack": rng.normal(size=(2, 3, 4, 7)).astype(np.float32),
        "groups": rng.normal(size=(12, 7)).astype(np.float32),
        "fixed": rng.normal(size=(12, 7)).astype(np.float32),
        "half": jnp.asarray(rng.normal(size=(5, 12, 7)), jnp.bfloat16),
        "wide": rng.normal(size=(12, 7)),  # float64
        "bias": rng.normal(size=7).astype(np.float32),
        "step": 3,
        "count": np.int32(7),
    }
    rules = [
        Rule("stack", skip=False, stack_axes=1, granularity=ChannelGroups(3)),
        Rule("groups", skip=False, granularity=InputGroups(5), scale=InputGroups(4)),
        Rule("fixed", skip=False, granularity="channel", codebook_format=QFormat(6, 4)),
        Rule("half", skip=False, axis=(0, 1), method="enq"),
        Rule("wide", skip=False),
        Rule("bias", skip=True),
    ]
    cparams, report = nuqjax.compress(params, 3, "normal", rules=rules, return_report=True)
    return params, cparams, report


def each(tree):
    params, cparams, report = tree
    return [(params[leaf.path], cparams[leaf.path], leaf) for leaf in report.leaves]


def indices(packed, bits, count):
    """The indices of each storage row, bit by bit."""
    bit = np.unpackbits(packed, axis=-1, bitorder="little")[..., : count * bits]
    return (bit.reshape(*packed.shape[:-1], count, bits) << np.arange(bits)).sum(axis=-1)


def test_every_leaf_is_listed(tree):
    params, _, report = tree
    assert [leaf.path for leaf in report.leaves] == sorted(params)
    assert {leaf.path: leaf.reason for leaf in report.dense} == {
        "bias": "rule 'bias'", "step": "not an array", "count": "dtype int32 is not floating",
    }  # fmt: skip
    assert len(report.compressed) + len(report.dense) == len(params)


def test_sizes_are_those_of_the_arrays(tree):
    for dense, leaf, row in each(tree):
        if row.path == "step":
            assert (row.nbytes_before, row.nbytes_after, row.weights) == (0, 0, 0)
            continue
        assert row.nbytes_before == dense.nbytes
        assert row.nbytes_after == sum(np.asarray(a).nbytes for a in jax.tree.leaves(leaf))
        assert row.weights == dense.size
        assert (row.shape, row.dtype) == (leaf.shape, str(leaf.dtype))
        assert row.bits_per_weight == 8 * row.nbytes_after / row.weights


def test_payload_counts_words_without_padding(tree):
    for dense, leaf, row in each(tree):
        if isinstance(leaf, CodebookArray):
            word = 6 if row.path == "fixed" else leaf.levels.dtype.itemsize * 8
            scales = 32 * leaf.scale.size if leaf.scale is not None else 0
            assert row.payload_bits == 3 * dense.size + word * leaf.levels.size + scales


def test_distortion(tree):
    for dense, leaf, row in each(tree):
        if isinstance(leaf, CodebookArray):
            x, y = np.asarray(dense).astype(np.float64), np.asarray(nuqjax.decompress(leaf)).astype(np.float64)
            np.testing.assert_allclose(row.signal, (x**2).sum(), rtol=1e-13)
            np.testing.assert_allclose(row.noise, ((x - y) ** 2).sum(), rtol=1e-13)
            np.testing.assert_allclose(row.sqnr_db, 10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), rtol=1e-12)
            assert row.largest_error == abs(x - y).max()


def test_levels_used_and_entropy(tree):
    rows_of = {"stack": lambda o, i: o // 3, "groups": lambda o, i: o * 3 + i // 5, "fixed": lambda o, i: o}
    for _, leaf, row in each(tree):
        if not isinstance(leaf, CodebookArray):
            continue
        outputs = leaf.packed.shape[-2]
        count = row.weights // (outputs * math.prod(leaf.stack_shape))
        index = indices(np.asarray(leaf.packed).reshape(-1, leaf.packed.shape[-1]), 3, count)
        storage_row, position = np.indices(index.shape)
        codebook = rows_of.get(row.path, lambda o, i: o * 0)(storage_row % outputs, position)
        named = {*zip((storage_row // outputs).flat, codebook.flat, index.flat, strict=True)}
        assert row.levels_used == len(named)
        assert row.levels_available == leaf.levels.size
        share = np.bincount(index.reshape(-1)) / index.size
        share = share[share > 0]
        np.testing.assert_allclose(row.entropy, -(share * np.log2(share)).sum(), rtol=1e-12)
        assert 0 <= row.entropy <= row.bits


def test_what_was_chosen(tree):
    _, _, report = tree
    rows = {leaf.path: leaf for leaf in report.leaves}
    assert (rows["half"].method, rows["stack"].method, rows["bias"].method) == ("enq", "normal", None)
    assert (rows["fixed"].bits, rows["fixed"].granularity) == (3, "channel")
    assert rows["fixed"].codebook_format == "QFormat(word=6, frac=4, signed=True)"
    assert rows["half"].codebook_format == "bfloat16"
    assert rows["stack"].certificate is None


def test_the_total_is_of_all_leaves(tree):
    _, _, report = tree
    total, rows, compressed = report.total, report.leaves, report.compressed
    weights = sum(leaf.weights for leaf in compressed)
    after = sum(leaf.nbytes_after for leaf in compressed)
    assert total["nbytes_before"] == sum(leaf.nbytes_before for leaf in rows)
    assert total["nbytes_after"] == sum(leaf.nbytes_after for leaf in rows)
    assert total["ratio"] == total["nbytes_before"] / total["nbytes_after"]
    assert total["weights"] == sum(leaf.weights for leaf in rows)
    assert (total["compressed_weights"], total["compressed_bits_per_weight"]) == (weights, 8 * after / weights)
    assert total["bits_per_weight"] == 8 * total["nbytes_after"] / total["weights"]
    noise, signal = sum(leaf.noise for leaf in compressed), sum(leaf.signal for leaf in compressed)
    assert total["sqnr_db"] == 10 * math.log10(signal / noise)
    assert total["largest_error"] == max(leaf.largest_error for leaf in compressed)
    assert total["payload_bits"] == sum(leaf.payload_bits for leaf in compressed)
    np.testing.assert_allclose(total["entropy"], sum(x.entropy * x.weights for x in compressed) / weights)
    assert total["certificate"] is None


def test_report_measures_the_same_without_what_only_compress_knows(tree):
    params, cparams, report = tree
    measured = nuqjax.report(params, cparams)
    for first, second in zip(measured.compressed, report.compressed, strict=True):
        assert vars(first) | {"method": second.method} == vars(second)
    assert [leaf.reason for leaf in measured.dense] == ["left dense", "dtype int32 is not floating", "not an array"]


def test_long_leaves_are_compared_in_blocks(tree, monkeypatch):
    """The same numbers, to the rounding of sums in another order, whatever the block."""
    params, cparams, report = tree
    monkeypatch.setattr(comparison, "_CHUNK", 20)
    for first, second in zip(nuqjax.report(params, cparams).compressed, report.compressed, strict=True):
        sums = {"noise", "signal", "method"}
        assert {k: v for k, v in vars(first).items() if k not in sums} == {
            k: v for k, v in vars(second).items() if k not in sums
        }
        np.testing.assert_allclose((first.noise, first.signal), (second.noise, second.signal), rtol=1e-13)


MEMORY_SCRIPT = """
import sys
import numpy as np, jax.numpy as jnp, nuqjax
from tests.peak import peak_bytes
from nuqjax import CodebookArray

def leaf(inputs):
    packed = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2048, inputs // 2), np.uint8))
    levels = jnp.linspace(-1, 1, 16)[None]
    return CodebookArray(levels, packed, None, (inputs, 2048), np.dtype("float32"), 4, "tensor", (1,))

def measure(inputs):
    dense = np.broadcast_to(np.float32(0.5), (inputs, 2048))
    compressed = leaf(inputs)
    before = peak_bytes()
    report = nuqjax.report({"w": dense}, {"w": compressed})
    assert report.leaves[0].weights == inputs * 2048
    return peak_bytes() - before

measure(512)
print(measure(int(sys.argv[1])))
"""


def test_the_report_of_a_large_leaf_takes_little_memory(numbers_printed):
    """33.5 M weights, of which the dense array alone would take 128 MiB: compared within 64 MiB."""
    (peak,) = numbers_printed(MEMORY_SCRIPT, 16 * 1024)
    assert peak < 64 * 2**20


def test_lossless_and_empty_leaves_have_numbers():
    exact = {"w": np.repeat(np.float32([1, -1]), 200).reshape(20, 20)}
    row = nuqjax.report(exact, nuqjax.compress(exact, 1, "enq")).leaves[0]
    assert (row.noise, row.sqnr_db, row.largest_error, row.entropy) == (0, math.inf, 0, 1)
    empty = {"w": np.zeros((0, 4), np.float32)}
    report = nuqjax.report(empty, nuqjax.compress(empty, 1, "enq", rules=[Rule("w", skip=False)]))
    assert (report.leaves[0].levels_used, report.leaves[0].entropy, report.leaves[0].bits_per_weight) == (0, 0, 0)
    assert "w" in str(report)


def test_sqnr_of_nothing():
    assert sqnr_db(1.0, 0.0) == math.inf
    assert sqnr_db(0.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == -math.inf


def test_the_dict_is_plain(tree):
    _, _, report = tree
    table = json.loads(json.dumps(report.to_dict()))
    assert [leaf["path"] for leaf in table["leaves"]] == [leaf.path for leaf in report.leaves]
    assert table["total"] == report.total
    assert table["leaves"][1]["sqnr_db"] == report.leaves[1].sqnr_db


def test_the_table_shows_every_leaf_with_reasons_and_sums(tree):
    _, _, report = tree
    text = str(report)
    for leaf in report.leaves:
        assert leaf.path in text
        assert f"{leaf.nbytes_after:,}" in text
    for shown in (
        "rule 'bias'",
        "not an array",
        "2×3×4×7",
        f"{report.total['sqnr_db']:.2f} dB",
        "ChannelGroups(size=3)",
    ):
        assert shown in text
    assert max(map(len, text.splitlines())) <= 200


def test_a_tree_without_compressed_leaves_has_a_report():
    params = {"b": jnp.ones(3)}
    report = nuqjax.report(params, params)
    assert report.total["ratio"] == 1
    assert report.total["sqnr_db"] is report.total["certificate"] is None
    assert "left dense" in str(report)


def test_trees_that_do_not_match_are_refused(tree):
    params, cparams, _ = tree
    with pytest.raises(ValueError, match="report: the trees differ"):
        nuqjax.report({"other": params["bias"]}, {"bias": cparams["bias"]})
    with pytest.raises(ValueError, match=r"report: groups has shape \(7, 12\) in one tree and \(12, 7\) in the other"):
        nuqjax.report({"groups": params["groups"].T}, {"groups": cparams["groups"]})


class Page(html.parser.HTMLParser):
    """The tags of a page, and the text of each cell and line."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *attrs))
        if tag in ("caption", "th", "td", "p"):
            self.texts.append("")

    def handle_data(self, data):
        self.texts[-1] += data


HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'[red]\x1b[31m\u202e"


def shown():
    """What a notebook shows as a table, each with a name that no page may take for its own."""
    params = {HOSTILE: np.ones((32, 32), np.float32), "b": {HOSTILE: np.ones(3, np.float32)}, "n": {HOSTILE: HOSTILE}}
    stacks = {HOSTILE: {"a": np.ones((3, 32, 32), np.float32), "b": np.ones((3, 32), np.float32)}}
    row = nuqjax.SiteFormat(HOSTILE, HOSTILE, output=QFormat(8, 4), route=HOSTILE)
    return {
        "report": nuqjax.compress(params, return_report=True)[1],
        "plan": nuqjax.plan(params),
        "plan with notes": nuqjax.plan(stacks),
        "formats": nuqjax.Formats({HOSTILE: row}, fallback="float"),
    }


@pytest.mark.parametrize("name", ["report", "plan", "plan with notes", "formats"])
def test_a_notebook_shows_a_table_and_every_name_in_it_is_text(name):
    thing = shown()[name]
    page = Page(thing._repr_html_())
    known = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert {tag for tag, *_ in page.tags} <= known
    assert {attribute for _, *attributes in page.tags for attribute in attributes} <= {
        ("style", f"text-align:{side}") for side in ("left", "right")
    }
    assert any("<img src=x onerror=alert(1)>&amp;\"'[red]" in text for text in page.texts)
    assert all(character.isprintable() for text in page.texts for character in text)


def test_a_notebook_shows_what_is_printed(tree):
    """Word for word: the printed table has box characters between, and lines of any length."""
    *_, report = tree
    for thing in (report, nuqjax.plan(tree[0])):
        words = " ".join(Page(thing._repr_html_()).texts).split()
        assert words == re.sub("[┏━┳┓┃┡╇┩│└┴┘─├┼┤]", " ", str(thing)).split()
