"""Draws the results of compression: a report's leaves, and one layer's weights with its levels.

Needs matplotlib (the `plot` extra). Figures are made without pyplot, so that no global state changes. Save a figure
with `figure.savefig("name.png")`; a notebook shows it as it is.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nuqjax._src.leaf.codebook_array import CodebookArray, level_values
from nuqjax._src.leaf.paths import printable
from nuqjax._src.report.leaf_report import LeafReport, summary

# Okabe and Ito's palette: its colours can be told apart with any colour vision.
_BEFORE, _AFTER, _DENSE, _LEVEL = "#BBBBBB", "#0072B2", "#E69F00", "#D55E00"
_UNITS = ("B", "KiB", "MiB", "GiB")
_WIDTH = 10.0  # inches
_DPI = 150
_LONGEST_PATH = 48  # characters
_MOST_LINES = 512  # levels drawn one by one; of more, the density is drawn


def plot_report(leaves: Sequence[LeafReport]) -> Figure:
    """Draws memory before and after, and SQNR, of every leaf: one row per leaf, in the tree's order.

    Args:
      leaves: the leaves of a report from `nuqjax.report` or `compress(…, return_report=True)`.

    Returns:
      A figure whose height grows with the number of leaves. Bytes are on a logarithmic scale; a leaf left dense has
      another colour and no SQNR; a lossless leaf is marked "lossless".

    >>> import jax.numpy as jnp, nuqjax
    >>> params = {"kernel": jnp.linspace(-1, 1, 1024).reshape(32, 32), "bias": jnp.zeros(32)}
    >>> _, report = nuqjax.compress(params, bits=4, method="enq", return_report=True)
    >>> figure = plot_report(report.leaves)
    >>> [axes.get_xlabel() for axes in figure.axes]
    ['memory', 'SQNR in dB']
    """
    figure = Figure(figsize=(_WIDTH, 2.1 + 0.23 * max(len(leaves), 2)), dpi=_DPI, layout="constrained")
    memory, quality = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _plot_memory(memory, leaves)
    _plot_quality(quality, leaves)
    memory.set_yticks(
        range(len(leaves)), [_shortened(printable(leaf.path)) for leaf in leaves], fontsize=8, parse_math=False
    )
    memory.set_ylim(len(leaves) - 0.4, -0.6)
    for axes in (memory, quality):
        axes.grid(axis="x", alpha=0.4)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        for row in range(0, len(leaves), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="0.96", zorder=0)
    total = summary(leaves)
    title = f"{_bytes(total['nbytes_before'])} → {_bytes(total['nbytes_after'])}: {total['ratio']:.2f}× smaller, "
    title += f"{total['bits_per_weight']:.2f} bits a weight all counted"
    if total["sqnr_db"] is not None and math.isfinite(total["sqnr_db"]):
        title += f", SQNR {total['sqnr_db']:.1f} dB"
    figure.suptitle(title, fontsize=11)
    if memory.get_legend_handles_labels()[0]:
        memory.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)
    return figure


def _plot_memory(axes: Axes, leaves: Sequence[LeafReport]) -> None:
    """Draws bytes before and after as the ends of a line, and a leaf left dense as one point."""
    compressed, dense = [], []
    for row, leaf in enumerate(leaves):
        (dense if leaf.reason is not None else compressed).append((row, leaf.nbytes_before, leaf.nbytes_after))
    if compressed:
        rows, before, after = zip(*compressed, strict=True)
        axes.hlines(rows, after, before, color=_BEFORE, linewidth=3)
        axes.plot(before, rows, "o", color=_BEFORE, label="before")
        axes.plot(after, rows, "o", color=_AFTER, label="after")
    held = [(row, after) for row, _, after in dense if after]  # zero bytes have no place on a logarithmic scale
    if held:
        rows, after = zip(*held, strict=True)
        axes.plot(after, rows, "s", color=_DENSE, markersize=5, label="left dense")
    sizes = [size for leaf in leaves for size in (leaf.nbytes_before, leaf.nbytes_after) if size]
    low, high = math.floor(math.log2(min(sizes, default=1))), math.ceil(math.log2(max(sizes, default=2)))
    step = max(2, 2 * math.ceil((high - low) / 14))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0 ** (low - 0.7), 2.0 ** (high + 0.7))
    ticks = [2.0**power for power in range(0, high + 1, step) if power >= low]
    axes.set_xticks(ticks, [_bytes(tick) for tick in ticks])
    axes.set_xlabel("memory")


def _plot_quality(axes: Axes, leaves: Sequence[LeafReport]) -> None:
    """Draws SQNR as points, with the number next to each."""
    values = [leaf.sqnr_db for leaf in leaves]
    finite = [(row, value) for row, value in enumerate(values) if value is not None and math.isfinite(value)]
    low = min(0.0, *(value for _, value in finite)) if finite else 0.0
    high = max((value for _, value in finite), default=1.0)
    axes.set_xlim(low, high + 0.2 * (high - low))
    if finite:
        rows, numbers = zip(*finite, strict=True)
        axes.hlines(rows, low, numbers, color=_AFTER, linewidth=1, alpha=0.5)
        axes.plot(numbers, rows, "o", color=_AFTER, markersize=4)
    for row, value in enumerate(values):
        if value is not None:
            text, x = (f"{value:.1f}", value) if math.isfinite(value) else ("lossless" if value > 0 else "−∞", low)
            axes.annotate(text, (x, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlabel("SQNR in dB")


def plot_levels(weights: Any, levels: Any, *, title: str = "", bins: int = 200) -> Figure:
    """Draws one layer's weights as a histogram, with its levels as lines.

    Args:
      weights: the layer's dense weights, of any shape.
      levels: the `CodebookArray` that stands for them, or levels of any shape `[…]`, all codebooks together.
      title: the title; if it is empty, it is made from the `CodebookArray`.
      bins: number of bins of the histogram.

    Returns:
      A figure: the histogram of all weights and, below it, a line at each distinct level (of very many levels, their
      density). The levels of a `CodebookArray` are multiplied by its scales.

    Raises:
      ValueError: there are no weights, or one is not finite.

    >>> import jax.numpy as jnp, nuqjax
    >>> weights = jnp.sin(jnp.arange(1024.0)).reshape(32, 32)
    >>> figure = plot_levels(weights, nuqjax.compress({"w": weights}, bits=3, method="enq")["w"])
    >>> figure.axes[0].get_title()
    'float32[32, 32], 3 bits, tensor: 8 levels'
    """
    dense = np.asarray(weights).astype(np.float64).reshape(-1)
    if not dense.size or not np.isfinite(dense).all():
        raise ValueError("plot_levels: the weights are empty or hold NaN or infinity")
    if isinstance(levels, CodebookArray):
        values = _decoded_levels(levels)
        shape = ", ".join(map(str, levels.shape))
        kind = str(levels.granularity)
        counted = _counted(len(values), "level" if levels.scale is None else "scaled level")
        title = title or f"{levels.dtype}[{shape}], {levels.bits} bits, {kind}: {counted}"
    else:
        values = np.unique(np.asarray(levels).astype(np.float64))
    figure = Figure(figsize=(8, 4.2), dpi=_DPI, layout="constrained")
    histogram, rug = figure.subplots(2, 1, sharex=True, height_ratios=(6, 1))
    reach = [min(dense.min(), *values[:1]), max(dense.max(), *values[-1:])]
    histogram.hist(dense, bins, color=_AFTER, alpha=0.75)
    histogram.set_ylabel(f"weights per bin (of {dense.size:,})")
    histogram.set_title(title, fontsize=11, parse_math=False)
    if len(values) <= _MOST_LINES:
        rug.vlines(values, 0, 1, color=_LEVEL, linewidth=1 if len(values) > 64 else 1.5)
        if len(values) <= 64:
            for value in values:
                histogram.axvline(value, color=_LEVEL, linewidth=0.8, alpha=0.6)
    else:
        rug.hist(values, bins, color=_LEVEL)
    rug.set_yticks([])
    rug.set_ylabel("levels", rotation=0, ha="right", va="center")
    rug.set_xlabel("weight")
    margin = 0.03 * (reach[1] - reach[0]) or 1.0
    rug.set_xlim(reach[0] - margin, reach[1] + margin)
    for axes in (histogram, rug):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _decoded_levels(leaf: CodebookArray) -> np.ndarray:
    """Returns the distinct values that a leaf can take, ascending; with scales, those that it does take."""
    levels = np.asarray(level_values(leaf)).astype(np.float64)
    if leaf.scale is None:
        return np.unique(levels)
    return np.unique(np.asarray(leaf).astype(np.float64))  # level × scale has too many values to list


def _bytes(value: float) -> str:
    power = min(int(math.log2(value)) // 10, 3) if value >= 1 else 0
    scaled = value / 1024**power
    number = f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"
    return f"{number} {_UNITS[power]}"


def _shortened(path: str) -> str:
    """Returns the path, without its middle where it is long."""
    half = _LONGEST_PATH // 2
    return path if len(path) <= _LONGEST_PATH else f"{path[: half - 1]}…{path[-half:]}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
