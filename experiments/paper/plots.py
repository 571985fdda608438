"""The study's figures: accuracy against memory, memory at equal accuracy, and the quality of each layer.

    python -m experiments.paper.plots experiments/results/paper --out docs/paper

Each is written as PNG (for the web) and PDF (for a paper). Colours are Okabe and Ito's; markers tell the methods apart
in grey.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from experiments.paper import answers
from experiments.paper.theory import reference_db
from experiments.record.results import read

STYLES: dict[str, dict[str, Any]] = {
    "knq": {"color": "#0072B2", "marker": "o"},
    "enq": {"color": "#D55E00", "marker": "s"},
    "uniform": {"color": "#009E73", "marker": "^"},
    "uniform_pow2": {"color": "#CC79A7", "marker": "v"},
    "dfp": {"color": "#E69F00", "marker": "D"},
}
TITLES = {
    "knq": "KNQ (k-means)",
    "enq": "ENQ (equal intervals)",
    "uniform": "uniform, best step",
    "uniform_pow2": "uniform, power-of-two step",
    "dfp": "dynamic fixed point",
}
_DPI = 160
# What the cells of one codebook a layer have, with float levels and activations.
PLAIN = {"granularity": "tensor", "scale": "none", "codebook_format": "float32", "word": None}


def draw(
    results: dict[str, Any], folder: Path, size: str = "stored_bytes", suffixes: Sequence[str] = ("png", "pdf")
) -> list[Path]:
    """Draws all figures of one network.

    Args:
      results: what `experiments.paper.study.run` gives.
      folder: where the files go: `NETWORK_accuracy.png`, ….
      size: which bytes are shown, one of `paper_answers.SIZES`.
      suffixes: kinds of files.

    Returns:
      The files written.
    """
    figures = {"accuracy": accuracy(results, size), "memory": memory(results, size), "layers": layers(results)}
    written = []
    for name, figure in figures.items():
        written += save(figure, folder / f"{results['network']}_{name}", suffixes)
    return written


def save(figure: Figure, path: Path, suffixes: Sequence[str]) -> list[Path]:
    """Writes a figure in each kind of file; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in suffixes:
        file = path.with_name(f"{path.name}.{suffix}")
        # Neither the date nor the version of the program: a figure that did not change is the same file.
        metadata = {"Software": None} if suffix == "png" else {"CreationDate": None, "Producer": None}
        figure.savefig(file, dpi=_DPI, metadata=metadata)
        if suffix == "png":  # few colours are in it: a palette takes a third of the bytes
            with Image.open(file) as image:
                image.convert("RGB").quantize(200, Image.Quantize.MEDIANCUT).save(file, optimize=True)
        written.append(file)
    return written


def accuracy(results: dict[str, Any], size: str = "stored_bytes") -> Figure:
    """Accuracy (of features: agreement with float) against memory: every cell a point, each method's best a line.

    What takes more memory than any method's best is beyond the right edge.
    Bars are the 95 % intervals of the difference from the float network, which is measured on the same images; the grey
    band is the interval of the float network's own accuracy.
    """
    by = "top1" if results["float"]["top1"] is not None else "agreement"
    cells = [cell for cell in results["cells"] if cell["cell"]["word"] is None]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    top = results["float"]["top1"] if by == "top1" else 1.0
    largest = 0.0
    for method, style in STYLES.items():
        mine = sorted((cell for cell in cells if cell["cell"]["method"] == method), key=lambda cell: cell[size])
        if not mine:
            continue
        best, frontier = -1.0, []
        for cell in mine:
            if cell[by] > best:
                best = cell[by]
                frontier.append(cell)
        axes.plot(*_points(mine, size, by), style["marker"], color=style["color"], markersize=4, alpha=0.35)
        x, y = _points(frontier, size, by)
        largest = max(largest, x[-1])
        axes.plot(x, y, **style, markersize=5, linewidth=1.5, drawstyle="steps-post", label=TITLES[method])
        if by == "top1":  # of the difference from the float network, on the same images
            ends = np.array([[top - loss for loss in cell["loss_interval"][::-1]] for cell in frontier]).T
            axes.errorbar(x, y, np.abs(ends - y), fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.6)
    axes.axhline(top, color="black", linestyle="--", linewidth=1, label="float32")
    if by == "top1":
        axes.axhspan(*results["float"]["top1_interval"], color="0.93", zorder=0)
    low = max(0.0, top - (0.15 if by == "top1" else 0.4))
    axes.set_ylim(low - 0.005, min(top + 0.02, 1.01))
    shown = [cell[size] / 1e6 for cell in cells if cell[by] >= low]
    if shown:
        axes.set_xlim(min(shown) / 1.05, largest * 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("top-1 accuracy" if by == "top1" else "same nearest neighbour as float32")
    axes.set_xlabel("memory of the parameters (MB)")
    axes.set_title(f"{_title(results)}, {results['images']:,} images: lines join each method's best")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _title(results: dict[str, Any]) -> str:
    return results["title"] + ("" if results["float"]["top1"] is not None else ", convolutions alone")


def _points(cells: Sequence[dict[str, Any]], size: str, by: str) -> tuple[list[float], list[float]]:
    return [cell[size] / 1e6 for cell in cells], [cell[by] for cell in cells]


def memory(results: dict[str, Any], size: str = "stored_bytes") -> Figure:
    """The least memory of each method within each budget, as bars; numbers are bits and granularity of the cell."""
    criteria = answers.criteria(results)
    figure = Figure(figsize=(3 + 3.2 * len(criteria), 4.4), layout="constrained")
    widths = [len(answers.BUDGETS[criterion]) for criterion in criteria]
    panels = np.atleast_1d(np.asarray(figure.subplots(1, len(criteria), sharey=True, width_ratios=widths)))
    found = answers.answers(results, size)
    methods = [method for method in STYLES if any(answer.method == method for answer in found)]
    width = 0.84 / len(methods)
    for panel, criterion in zip(panels, criteria, strict=True):
        budgets = answers.BUDGETS[criterion]
        mine = sorted((a for a in found if a.criterion == criterion), key=lambda a: methods.index(a.method))
        for answer in mine:
            number, place = methods.index(answer.method), budgets.index(answer.budget)
            x = place + (number - (len(methods) - 1) / 2) * width
            height = 0 if answer.cell is None else answer.cell[size] / 1e6
            label = TITLES[answer.method] if place == 0 else None
            panel.bar(x, height, 0.92 * width, color=STYLES[answer.method]["color"], label=label)
            text = "none" if answer.cell is None else _short(answer.cell["cell"])
            options: dict[str, Any] = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 7, "color": "0.3"}
            panel.annotate(text, (x, height), xytext=(0, 3), textcoords="offset points", **options)
        panel.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
        what = "points of top-1 lost at most" if criterion == "top1" else "points of agreement with float lost at most"
        panel.set_xlabel(what)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("memory of the parameters (MB)")
    panels[0].margins(y=0.25)
    figure.suptitle(f"{_title(results)}: least memory at equal accuracy ({results['images']:,} images)", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(methods), 3), frameon=False, fontsize=8)
    return figure


def _short(cell: dict[str, Any]) -> str:
    """`5 b` and what else is not usual."""
    words = [f"{cell['bits']} b"]
    if cell["granularity"] != "tensor":
        words.append(cell["granularity"])
    if cell["scale"] != "none":
        words.append("scaled")
    kind, _, word = cell["codebook_format"].partition(":")
    if kind == "fixed":
        words.append(f"w{word}")
    return " ".join(words)


def layers(results: dict[str, Any], bits: int | None = None) -> Figure:
    """SQNR of every layer with one codebook each, by path.

    Args:
      results: what `experiments.paper.study.run` gives.
      bits: of an index; None takes 4, or the fewest, of those that most methods were measured at.
    """
    if bits is None:
        found = {width: [_plain_cell(results, method, width) is not None for method in STYLES] for width in range(1, 9)}
        bits = max(found, key=lambda width: (sum(found[width]), width == 4, -width))
    cells = {method: cell for method in STYLES if (cell := _plain_cell(results, method, bits)) is not None}
    # A layer that a method keeps without loss has no finite ratio, and no point.
    paths = sorted({path for cell in cells.values() for path in cell["layers"]}, key=_natural)
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for method, cell in cells.items():
        values = [cell["layers"].get(path, np.nan) for path in paths]
        axes.plot(values, **STYLES[method], markersize=4, linewidth=1, label=TITLES[method])
    axes.set_title(f"{results['title']}: each layer with one codebook of {bits} bits")
    axes.set_ylabel("SQNR of the weights (dB)")
    if len(paths) <= 20:
        names = [path.removesuffix("/kernel") for path in paths]
        axes.set_xticks(range(len(paths)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    else:
        axes.set_xlabel(f"the {len(paths)} layers that are compressed, by path")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if cells:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure


def _plain_cell(results: dict[str, Any], method: str, bits: int) -> dict[str, Any] | None:
    """The cell of a method with float levels, one codebook a layer and float activations."""
    wanted = PLAIN | {"method": method, "bits": bits}
    found = [cell for cell in results["cells"] if wanted.items() <= cell["cell"].items()]
    return found[0] if found else None


def _natural(path: str) -> list[tuple[int, str]]:
    """Numbers within a path count as numbers, so that `Conv_10` comes after `Conv_9`."""
    parts = [""]
    for letter in path:
        if parts[-1] and letter.isdigit() != parts[-1][-1].isdigit():
            parts.append("")
        parts[-1] += letter
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def theory(all_results: Sequence[dict[str, Any]], methods: Sequence[str] = ("knq", "uniform")) -> Figure:
    """SQNR of every layer of all networks by bits, beside what is possible for Gaussian and Laplacian weights.

    Args:
      all_results: a results file for each network.
      methods: `knq` beside Lloyd and Max's quantizers, `uniform` beside the best two's-complement grids.
    """
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = np.atleast_1d(np.asarray(figure.subplots(1, len(methods), sharey=True)))
    markers = "osv^D<>"
    for panel, method in zip(panels, methods, strict=True):
        kind = "lloyd_max" if method == "knq" else "uniform"
        for density, line in (("gauss", "-"), ("laplace", "--")):
            table = reference_db(density, kind)
            panel.plot(list(table), list(table.values()), line, color="black", linewidth=1.2, label=_DENSITIES[density])
        for number, results in enumerate(all_results):
            spread = (number - (len(all_results) - 1) / 2) * 0.09
            points = [
                (bits + spread, value)
                for bits in range(1, 9)
                if (cell := _plain_cell(results, method, bits)) is not None
                for value in cell["layers"].values()
            ]
            if points:
                x, y = zip(*points, strict=True)
                marker = markers[number % len(markers)]
                panel.plot(x, y, marker, markersize=3, alpha=0.55, color=f"C{number}", label=results["title"])
        panel.set_title(TITLES[method])
        panel.set_xlabel("bits of an index")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("SQNR of a layer's weights (dB)")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


_DENSITIES = {"gauss": "best for a Gaussian", "laplace": "best for a Laplacian"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.paper.plots", description="The study's figures.")
    parser.add_argument("results", type=Path, help="folder with results of experiments.paper.study (*.json)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--suffix", default="png", help="kinds of files, with commas (default: png)")
    parser.add_argument("--size", choices=answers.SIZES, default="stored_bytes", help="which bytes are shown")
    args = parser.parse_args(argv)
    suffixes = args.suffix.split(",")
    try:
        files = sorted(args.results.glob("*.json"))
        if not files:
            parser.error(f"there are no results in {args.results}")
        all_results = [read(file) for file in files]
    except ValueError as error:
        parser.error(str(error))
    written = [file for results in all_results for file in draw(results, args.out, args.size, suffixes)]
    written += save(theory(all_results), args.out / "theory", suffixes)
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
