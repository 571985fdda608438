"""The README's table of six results, and its picture: both of what stands in `experiments/results`.

`python -m experiments.documents.headlines` draws `docs/accuracy.png`; the table is one of those that
`experiments.documents.tables` makes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.record.markdown import markdown, percent
from experiments.record.results import RESULTS

NETWORK = "EfficientNet-Lite0"
STYLES = {"knq": ("#0072B2", "o"), "enq": ("#D55E00", "s"), "uniform": ("#009E73", "^")}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Six results, what was measured of each, and the command that remakes it.

    Raises:
      ValueError: one of them was not measured.
    """
    rows = [
        _five_bits(_by_experiment(results, "studies.accuracy", NETWORK)),
        _as_good_as_float(_by_experiment(results, "studies.accuracy", NETWORK)),
        _with_data(_by_experiment(results, "studies.calibrated", NETWORK)),
        _integers(_by_experiment(results, "studies.emulation", "ResNet-20")),
        _speed(_by_experiment(results, "speed.fit tree", "")),
        _large(_by_experiment(results, "speed.large_checkpoint", "")),
    ]
    return (
        markdown(["result", "measured", "`python -m experiments.…`"], [[*row[:2], f"`{row[2]}`"] for row in rows], 3)
        + "\n"
    )


def _by_experiment(results: Sequence[dict[str, Any]], command: str, title: str) -> dict[str, Any]:
    """The results of a command about a network (or about none, where the title is empty)."""
    start = f"python -m experiments.{command}"
    for result in results:
        if result.get("title", "") == title and any(made.startswith(start) for made in result["commands"]):
            return result
    raise ValueError(f"no results of {start} for {title or 'no network'}")


def _cell(result: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """The one cell that has, in itself or in its setting, all that is wanted."""
    for cell in result["cells"]:
        if wanted.items() <= {k: v for k, v in (cell | cell.get("setting", {})).items() if k in wanted}.items():
            return cell
    raise ValueError(f"{result['title']}: no cell has {wanted}")


def _five_bits(result: dict[str, Any]) -> tuple[str, str, str]:
    plain = {"bits": 5, "granularity": "tensor", "scale": "none", "rules": []}
    top1 = {method: percent(_cell(result, method=method, **plain)["top1"]) for method in STYLES}
    return (
        f"{NETWORK}, 5 bits, one codebook a layer",
        f"top-1 {top1['knq']} with k-means levels, {top1['uniform']} on a uniform grid",
        "studies.accuracy --network efficientnet_lite0 --bits 5 --method knq,uniform",
    )


def _as_good_as_float(result: dict[str, Any]) -> tuple[str, str, str]:
    found = [cell for cell in result["cells"] if cell["setting"]["rules"] and cell["top1"] >= result["float"]["top1"]]
    best = min(found, key=lambda cell: cell["bytes"])
    return (
        f"{NETWORK}, bits chosen by layer",
        f"{best['ratio']:.2f} times smaller at the float network's top-1 ({percent(best['top1'])})",
        "studies.accuracy` with the rules in [Accuracy](docs/results/accuracy.md), `--bits 6 --scale channel",
    )


def _with_data(result: dict[str, Any]) -> tuple[str, str, str]:
    plain, learned = (
        _cell(result, method=way, size=size, levels="knq") for way, size in (("plain", "4"), ("budget", "4bpw"))
    )
    return (
        f"{result['title']} at {learned['bits_per_weight']:.1f} bits a weight, scales and codebooks counted",
        f"top-1 {percent(learned['top1'])} with {result['learned']} unlabelled images, {percent(plain['top1'])} by the "
        f"weights alone ({plain['bits_per_weight']:.1f} bits; float32 {percent(result['float']['top1'])})",
        f"studies.calibrated --network efficientnet_lite0 --bits 4 --budget 4bpw --learn {result['learned']}",
    )


def _integers(result: dict[str, Any]) -> tuple[str, str, str]:
    cell = _cell(result, bits=6, weight_word=8, word=8)
    return (
        "ResNet-20 on raw integers, 8-bit words, 6-bit indices",
        f"top-1 {percent(cell['emulated']['top1'])} (float32 {percent(result['float']['top1'])})",
        "studies.emulation --network resnet20 --bits 6",
    )


def _speed(result: dict[str, Any]) -> tuple[str, str, str]:
    (tree,) = result["sections"]["tree"]
    return (
        f"{tree['data']}'s {tree['values'] / 1e6:.0f} million weights to {tree['bits']} bits",
        f"{tree['cold']:.1f} s from the start of Python on two cores, every fit proven optimal to 10⁻⁶",
        "speed.fit tree",
    )


def _large(result: dict[str, Any]) -> tuple[str, str, str]:
    return (
        f"A checkpoint of {result['gigabytes']:.1f} GB to 4 bits, from disk to disk",
        f"{result['whole']['seconds']:.0f} s in {result['whole']['peak_bytes'] / 1e9:.2f} GB of memory; "
        "killed and resumed, the same bytes",
        "speed.large_checkpoint --folder FOLDER --gigabytes 8",
    )


def draw(path: Path) -> None:
    """Accuracy against bytes: a line for each method, with one codebook a layer and one a channel, and with data.

    With data other images evaluate than without, so accuracy is told as the distance from the float network's.
    """
    result, learned = (
        json.loads((RESULTS / f"{kind}_efficientnet_lite0.json").read_text()) for kind in ("accuracy", "calibrated")
    )
    figure, axes = plt.subplots(figsize=(8.4, 4.4), layout="constrained")

    def line(result: dict[str, Any], cells: Sequence[dict[str, Any]], form: str, **style: Any) -> None:
        points = sorted((cell["bytes"], cell["top1"] - result["float"]["top1"]) for cell in cells)
        axes.plot(*zip(*points, strict=True), form, **style)

    for method, (color, marker) in STYLES.items():
        for granularity, form in (("tensor", "-"), ("channel", "--")):
            setting = {"method": method, "granularity": granularity, "scale": "none", "rules": []}
            cells = [cell for cell in result["cells"] if setting.items() <= cell["setting"].items()]
            line(result, cells, form, color=color, marker=marker, label=f"{method}, a codebook a {granularity}")
    mixed = [cell for cell in result["cells"] if cell["setting"]["rules"]]
    line(result, mixed, ":", color="#0072B2", marker="D", label="knq, bits chosen by layer")
    budgets = [cell for cell in learned["cells"] if cell["method"] == "budget" and cell["levels"] == "knq"]
    label = f"knq, with {learned['learned']} unlabelled images"
    line(learned, budgets, "-", color="black", marker="D", linewidth=2, label=label)
    axes.axhline(0, color="0.6", linestyle="--", linewidth=1, zorder=0)
    axes.plot([result["float"]["bytes"]], [0], "*", color="black", markersize=13, label="float32")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2e6, 3e6, 4e6, 6e6, 8e6, 12e6, 18e6])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1e6:.0f} MB"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f}".replace("-", "−")))
    axes.set(
        xlabel="memory: indices, codebooks and what stays dense",
        ylabel="points of top-1 from float32, on the same images",
    )
    counts = f"{result['images']:,} images, {learned['images']:,} with data"
    axes.set_title(f"{result['title']}: accuracy against memory ({counts})", fontsize=11)
    axes.legend(loc="center right", fontsize=8, frameon=False)
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path("docs/accuracy.png"))
