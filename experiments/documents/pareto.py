"""Draws what data bring to each network at every size: `docs/data_NAME.png`, for each `calibrated_NAME.json`.

`python -m experiments.documents.pareto`

Left the divergence from the float network, right its accuracy (or what a character costs), both against the bits a
weight of all that is counted; a line for each way to compress.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from experiments.record.results import RESULTS

# The colour is that of the levels; the line and marker are those of the way to compress.
COLOURS = {"knq": "#0072B2", "enq": "#D55E00", "uniform": "#009E73"}
LINES = {"plain": ":", "corrected": "-.", "calibrated": "-", "budget": "--"}
MARKERS = {"plain": "v", "corrected": "s", "calibrated": "o", "budget": "D"}
WAYS = {
    "plain": "by the weights alone",
    "corrected": "the same, offsets corrected",
    "calibrated": "with data, one width",
    "budget": "with data, a budget",
}


def lines(result: dict[str, Any], measure: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Bits a weight and a measure of the cells, the fewest bits first, by levels and way."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell in result["cells"]:
        key = cell.get("levels", "knq"), cell["method"]
        found.setdefault(key, []).append((cell["bits_per_weight"], cell[measure]))
    return {key: sorted(points) for key, points in found.items()}


def quality(result: dict[str, Any]) -> str:
    """The measure of the network's own task."""
    return "top1" if "top1" in result["float"] else "nats"


def draw(path: Path, result: dict[str, Any]) -> None:
    """The two plots of one network."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    task = quality(result)
    for axes, measure in ((left, "kl"), (right, task)):
        for (levels, way), points in lines(result, measure).items():
            axes.plot(
                *zip(*points, strict=True), LINES[way], marker=MARKERS[way], color=COLOURS[levels],
                label=f"{levels}, {WAYS[way]}", alpha=0.9, markersize=5,
            )  # fmt: skip
        axes.set(xlabel="bits a weight, all counted")
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yscale("log")
    left.set_ylabel("KL divergence from the float network, nats")
    right.axhline(result["float"][task], color="0.4", linestyle="--", linewidth=1, zorder=0)
    right.annotate(
        "float32", (0.01, result["float"][task]), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
    )
    if task == "top1":
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        right.set_ylabel(f"top-1 of {result['images']:,} images")
    else:
        right.set_ylabel(f"nats a character, of {result['images']:,} sequences")
    figure.suptitle(f"{result['title']}: {result['learned']} unlabelled inputs, no training", fontsize=11)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(folder: Path = Path("docs")) -> None:
    """A picture for each file of results."""
    for path in sorted(RESULTS.glob("calibrated_*.json")):
        draw(folder / f"data_{path.stem.removeprefix('calibrated_')}.png", json.loads(path.read_text()))


if __name__ == "__main__":
    main()
