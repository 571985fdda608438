"""The pictures hold what the report says, at any number of leaves, and touch no global state."""

import io
import math
import subprocess
import sys
from itertools import pairwise

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import nuqjax
from nuqjax import InputGroups, QFormat, Report, Rule
from nuqjax._src.report.leaf_report import LeafReport
from nuqjax._src.report.plot import plot_levels, plot_report

LAYERS = 30


def drawn(figure):
    """The figure as pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return matplotlib.image.imread(file)


@pytest.fixture(scope="module")
def report():
    """Sixty leaves: a kernel and a bias in each layer, one layer without loss."""
    rows = []
    for i in range(LAYERS):
        size = 1000 * 2 ** (i // 4)
        noise = 0.0 if i == 3 else 10.0 ** (-1 - i / 10)
        rows += [
            LeafReport(f"layer_{i}/bias", (64,), "float32", 64, 256, 256, "one axis"),
            LeafReport(
                f"layer_{i}/a/very/long/path/of/modules/inside/modules/kernel", (size,), "float32", size, 4 * size,
                size // 2, signal=1.0, noise=noise, largest_error=0.1,
            ),
        ]  # fmt: skip
    return Report(tuple(rows))


def points(axes):
    """Every point that is drawn: its row, and its place on the horizontal axis."""
    return {(round(y), float(x)) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}


def test_every_leaf_has_a_row_with_its_bytes_and_its_quality(report):
    memory, quality = plot_report(report.leaves).axes
    assert len(memory.get_yticklabels()) == len(report.leaves)
    sizes = {(i, float(n)) for i, leaf in enumerate(report.leaves) for n in (leaf.nbytes_before, leaf.nbytes_after)}
    assert points(memory) == sizes
    finite = {(i, x.sqnr_db) for i, x in enumerate(report.leaves) if x.sqnr_db is not None and math.isfinite(x.sqnr_db)}
    assert points(quality) == finite
    assert [text.get_text() for text in quality.texts].count("lossless") == 1
    left, right = memory.get_xlim()
    assert all(left < size < right for _, size in sizes)


def test_labels_of_sixty_leaves_do_not_overlap(report):
    figure = plot_report(report.leaves)
    drawn(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    boxes.sort(key=lambda box: -box.y1)
    assert all(lower.y1 <= upper.y0 for upper, lower in pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes)
    assert min(box.height for box in boxes) >= 8  # pixels


def test_long_paths_keep_their_ends(report):
    labels = [label.get_text() for label in plot_report(report.leaves).axes[0].get_yticklabels()]
    assert len(set(labels)) == len(report.leaves)
    assert all(len(label) <= 48 for label in labels)
    assert labels[1].startswith("layer_0/")
    assert labels[1].endswith("/kernel")


def test_the_title_tells_the_total(report):
    title = plot_report(report.leaves).get_suptitle()
    assert f"{report.total['ratio']:.2f}× smaller" in title
    assert f"SQNR {report.total['sqnr_db']:.1f} dB" in title


@pytest.mark.parametrize("leaves", [(), (LeafReport("b", (3,), "float32", 3, 12, 12, "one axis"),),
                                    (LeafReport("n", (), "int", 0, 0, 0, "not an array"),),
                                    (LeafReport("w", (4,), "float32", 4, 16, 9, signal=0.0, noise=1.0),)])  # fmt: skip
def test_small_and_strange_reports_are_drawn(leaves):
    assert drawn(plot_report(leaves)).shape[0] > 100


def test_report_plot_is_plot_report(report):
    assert report.plot().get_suptitle() == plot_report(report.leaves).get_suptitle()


WEIGHTS = np.random.default_rng(0).normal(size=(32, 24)).astype(np.float32)


def lines(figure):
    """The places of the level lines."""
    return [segment[0][0] for line in figure.axes[1].collections for segment in line.get_segments()]


def compressed(**options):
    return nuqjax.compress({"w": WEIGHTS}, 3, "normal", rules=[Rule("w", skip=False)], **options)["w"]


@pytest.mark.parametrize("options", [{}, {"granularity": "channel"}, {"codebook_format": QFormat(6, 4)}], ids=str)
def test_a_line_is_at_each_distinct_level(options):
    leaf = compressed(**options)
    figure = plot_levels(WEIGHTS, leaf)
    expected = np.unique(nuqjax.codebooks(leaf))
    np.testing.assert_allclose(lines(figure), expected, rtol=1e-6)
    assert f"{len(expected)} levels" in figure.axes[0].get_title()
    assert set(np.unique(np.asarray(leaf))) <= set(expected)


def test_the_histogram_counts_every_weight():
    for weights in (WEIGHTS, jnp.asarray(WEIGHTS, jnp.bfloat16)):
        axes = plot_levels(weights, compressed()).axes[0]
        assert sum(bar.get_height() for bar in axes.patches) == WEIGHTS.size


def test_levels_alone_will_do():
    figure = plot_levels(WEIGHTS, [[-1.0, 0.5], [0.5, 2.0]], title="conv1")
    assert lines(figure) == [-1.0, 0.5, 2.0]
    assert figure.axes[0].get_title() == "conv1"
    left, right = figure.axes[1].get_xlim()
    assert left < min(WEIGHTS.min(), -1)
    assert right > max(WEIGHTS.max(), 2)


def test_scales_are_multiplied_in_and_many_levels_become_a_density():
    leaf = compressed(scale=InputGroups(4))
    figure = plot_levels(WEIGHTS, leaf)
    distinct = np.unique(np.asarray(leaf))
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == len(distinct) > 512
    assert f"{len(distinct):,} scaled levels" in figure.axes[0].get_title()


def test_a_constant_layer_is_drawn():
    assert drawn(plot_levels(np.full(5, 2.0), [2.0])).shape[0] > 100


@pytest.mark.parametrize("weights", [np.zeros(0), np.array([1.0, np.nan])], ids=str)
def test_weights_that_cannot_be_drawn_are_refused(weights):
    with pytest.raises(ValueError, match="empty or hold NaN or infinity"):
        plot_levels(weights, [0.0])


def test_pyplot_is_not_touched(tmp_path):
    script = """
import sys, numpy as np
from nuqjax import Report
from nuqjax._src.report.plot import plot_levels, plot_report
from nuqjax._src.report.leaf_report import LeafReport
plot_levels(np.arange(9.0), [1.0, 2.0]).savefig(sys.argv[1])
plot_report([LeafReport("b", (3,), "float32", 3, 12, 12, "one axis")]).savefig(sys.argv[1])
print("matplotlib.pyplot" in sys.modules)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "picture.png")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
