"""Draws the plots of `docs/choosing.md` from the results: `docs/granularity.png` and `docs/level_formats.png`.

`python -m experiments.documents.guide_pictures`
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from experiments.record.results import RESULTS

COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's
MARKERS = "osDv^"


def curves(cells: Sequence[dict[str, Any]], name: Callable[[dict[str, Any]], str | None]) -> dict[str, list[tuple]]:
    """Bits a weight and top-1 of the cells by name, the fewest bits first; a cell without a name is left out."""
    found: dict[str, list[tuple]] = {}
    for cell in cells:
        if (label := name(cell)) is not None:
            found.setdefault(label, []).append((cell["bits_per_weight"], cell["top1"]))
    return {label: sorted(points) for label, points in found.items()}


def granularity(cell: dict[str, Any]) -> str | None:
    """Of plain `knq`: what has a codebook of its own."""
    setting = cell["setting"]
    if setting["method"] != "knq" or setting["rules"]:
        return None
    scaled = ", a scale a channel" if setting["scale"] == "channel" else ""
    return f"a codebook a {setting['granularity']}{scaled}"


def level_format(cell: dict[str, Any]) -> str | None:
    """Of `knq` with a codebook a channel: the levels' format."""
    setting = cell["cell"]
    if (setting["method"], setting["granularity"], setting["scale"], setting["word"]) != (
        "knq",
        "channel",
        "none",
        None,
    ):
        return None
    kind, _, word = setting["codebook_format"].partition(":")
    return f"levels of {word} bits" if word else f"{kind} levels"


def draw(path: Path, result: dict[str, Any], found: dict[str, list[tuple]]) -> None:
    """Top-1 against bits a weight, a line for each name."""
    figure, axes = plt.subplots(figsize=(7.6, 4.0), layout="constrained")
    axes.axhline(result["float"]["top1"], color="0.4", linestyle="--", linewidth=1, label="the float network")
    for (label, points), colour, marker in zip(found.items(), COLOURS, MARKERS, strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label, alpha=0.9)
    axes.set_xscale("log", base=2)
    axes.set_xticks([3, 4, 6, 8, 12, 16, 24], ["3", "4", "6", "8", "12", "16", "24"])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="bits a weight, all counted", ylabel=f"top-1 of {result['images']:,} images")
    axes.set_title(f"{result['title']}, k-means levels: 3 to 8 bits an index", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(folder: Path = Path("docs")) -> None:
    """Both plots."""
    darknet = json.loads((RESULTS / "accuracy_tiny_darknet.json").read_text())
    draw(folder / "granularity.png", darknet, curves(darknet["cells"], granularity))
    resnet = json.loads((RESULTS / "paper" / "resnet20.json").read_text())
    cells = [
        cell | {"bits_per_weight": 32 * cell["stored_bytes"] / resnet["float"]["bytes"]} for cell in resnet["cells"]
    ]
    draw(folder / "level_formats.png", resnet, curves(cells, level_format))


if __name__ == "__main__":
    main()
