"""The least memory of each method within each loss of accuracy, and how it compares with fixed point.

A cell is *within* a budget if it loses no more of the images than that (top-1), or agrees with the float network on all
but so many (agreement). It is *surely* within if the upper end of the 95 % interval of the loss is: paired with the
float network for top-1, Wilson's for agreement. The ratio of two methods' least memory has an interval of its own, from
images drawn again with replacement: the whole search is done anew for each draw (a percentile bootstrap).
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from experiments.paper.scores import CONFIDENCE, unpack

BUDGETS = {  # points: percent of the images; few cells choose as the float network does on all but one in a hundred
    "top1": (0.0, 0.5, 1.0),
    "agreement": (0.0, 0.5, 1.0, 2.0, 5.0, 10.0),
}
SIZES = ("stored_bytes", "bytes")
BASELINES = ("uniform", "uniform_pow2", "dfp")
EACH: Mapping[str, Sequence[str]] = {name: (name,) for name in BASELINES}
_DRAWS = 1000
_NOTHING = np.iinfo(np.int64).max


class Answer(NamedTuple):
    """The smallest cell of one method within one budget.

    Attributes:
      method: whose.
      criterion: `"top1"` or `"agreement"`.
      budget: points that may be lost.
      cell: the results file's entry; None where none is within.
      sure: the smallest that is surely within; None where none is.
      ratios: by baseline, this method's bytes over the baseline's; None where either is missing.
      intervals: by baseline, the ratio's 95 % interval; None where in more than a twentieth of the draws either method
        has no cell within.
    """

    method: str
    criterion: str
    budget: float
    cell: dict[str, Any] | None
    sure: dict[str, Any] | None
    ratios: dict[str, float | None]
    intervals: dict[str, list[float] | None]


def answers(
    results: dict[str, Any], size: str = "stored_bytes", baselines: Mapping[str, Sequence[str]] = EACH
) -> list[Answer]:
    """The answers of a results file, of the cells in float activations.

    Args:
      results: what `experiments.paper.study.run` gives.
      size: which bytes are compared, one of `SIZES`.
      baselines: by name, methods of which the one that needs least is the baseline.
    """
    cells = [cell for cell in results["cells"] if cell["cell"]["word"] is None]
    methods = list(dict.fromkeys(cell["cell"]["method"] for cell in cells))
    found = []
    for criterion in criteria(results):
        draws = losses_of_draws(results, cells, criterion)
        for budget in BUDGETS[criterion]:
            least = {method: smallest(cells, method, criterion, budget, size) for method in methods}
            resampled = {
                method: _least_of_draws(cells, draws, method, budget, size) for method in methods
            }  # of each draw, bytes
            for method in methods:
                ratios: dict[str, float | None] = {}
                intervals: dict[str, list[float] | None] = {}
                for baseline, names in baselines.items():
                    others = [name for name in names if name in methods]
                    if not others or method in others:
                        continue
                    mine, sizes = least[method], [cell[size] for name in others if (cell := least[name])]
                    ratios[baseline] = mine[size] / min(sizes) if mine and sizes else None
                    of_draws = np.min([resampled[name] for name in others], axis=0)
                    intervals[baseline] = _interval(resampled[method], of_draws)
                sure = smallest(cells, method, criterion, budget, size, surely=True)
                found.append(Answer(method, criterion, budget, least[method], sure, ratios, intervals))
    return found


def criteria(results: dict[str, Any]) -> list[str]:
    """What the network can be judged by: features have no top-1."""
    return [name for name in BUDGETS if name != "top1" or results["float"]["top1"] is not None]


def loss(cell: dict[str, Any], criterion: str, surely: bool = False) -> float:
    """Points that a cell loses; `surely`, the upper end of the interval."""
    if criterion == "top1":
        return 100 * (cell["loss_interval"][1] if surely else cell["loss"])
    return 100 * (1 - (cell["agreement_interval"][0] if surely else cell["agreement"]))


def smallest(
    cells: Sequence[dict[str, Any]], method: str, criterion: str, budget: float, size: str, surely: bool = False
) -> dict[str, Any] | None:
    """The cell of least memory of a method within a budget; of equal memory, that which loses least."""
    within = [
        cell
        for cell in cells
        # A share of the images is a multiple of one image; what float subtraction adds to it is far less.
        if cell["cell"]["method"] == method and loss(cell, criterion, surely) <= budget + 1e-9
    ]
    return min(within, key=lambda cell: (cell[size], loss(cell, criterion)), default=None)


def losses_of_draws(results: dict[str, Any], cells: Sequence[dict[str, Any]], criterion: str) -> np.ndarray:
    """`[draws, cells]` points lost, each draw on as many images as there are, with replacement; the same every time."""
    field = "right" if criterion == "top1" else "agrees"
    reference = unpack(results["float"][field]).astype(np.float64)
    lost = np.stack([reference - unpack(cell[field]) for cell in cells])  # [cells, N] of −1, 0, 1
    count = reference.size
    random = np.random.default_rng(0)
    times = random.multinomial(count, np.full(count, 1 / count), size=_DRAWS).astype(np.float64)
    return 100 * (times @ lost.T) / count


def _least_of_draws(
    cells: Sequence[dict[str, Any]], draws: np.ndarray, method: str, budget: float, size: str
) -> np.ndarray:
    """`[draws]` least bytes of a method within a budget, `_NOTHING` where no cell is."""
    mine = [i for i, cell in enumerate(cells) if cell["cell"]["method"] == method]
    held = np.array([cells[i][size] for i in mine])
    return np.where(draws[:, mine] <= budget + 1e-9, held, _NOTHING).min(axis=1)


def _interval(mine: np.ndarray, other: np.ndarray) -> list[float] | None:
    both = (mine != _NOTHING) & (other != _NOTHING)
    if both.mean() < CONFIDENCE:
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(mine[both] / other[both], [tail, 100 - tail])
    return [float(low), float(high)]


def name_of(cell: dict[str, Any]) -> str:
    """A cell's bits, codebooks and words, without its method.

    >>> name_of({"bits": 5, "granularity": "channel", "codebook_format": "fixed:8", "word": None})
    '5 bits, channel, 8-bit levels'
    """
    words = [cell.get("budget") or f"{cell['bits']} bits", cell["granularity"]]
    if cell.get("scale", "none") != "none":
        words.append(f"scale per {cell['scale']}")
    kind, _, word = cell["codebook_format"].partition(":")
    if kind == "fixed":
        words.append(f"{word}-bit levels")
    if cell.get("rules"):
        words.append("every kernel")
    if cell["word"]:
        words.append(f"{cell['word']}-bit activations")
    return ", ".join(words)


_COLUMNS: tuple[str, ...] = (
    "method", "bits", "granularity", "scale", "codebook_format", "word", "stored_bytes", "bytes", "bits_per_weight",
    "sqnr_db", "top1", "top1_low", "top1_high", "top5", "loss", "loss_low", "loss_high", "agreement", "agreement_low",
    "agreement_high", "kl", "output_sqnr_db",
)  # fmt: skip


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of numbers for each cell, as in the CSV file."""
    found = []
    for cell in results["cells"]:
        flat = cell["cell"] | cell
        for name in ("top1", "loss", "agreement"):
            flat[f"{name}_low"], flat[f"{name}_high"] = cell.get(f"{name}_interval", (None, None))
        found.append({name: flat.get(name) for name in _COLUMNS})
    return found


def write_csv(results: dict[str, Any], path: Path) -> None:
    """All cells as a table; shares are fractions of 1, what is not known is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows(results))


def cells_table(results: dict[str, Any]) -> Table:
    """All cells, for the terminal."""
    of_float = results["float"]
    title = f"{results['title']}: {results['images']:,} images, float32 {of_float['bytes']:,} bytes"
    if of_float["top1"] is not None:
        title += f", top-1 {of_float['top1']:.1%} {_ends(of_float['top1_interval'])}"
    table = Table(title=title, caption="stored: without padding, grids as one step; intervals: 95 %, of losses paired")
    table.add_column("method")
    table.add_column("codebooks")
    for name in ("stored", "in memory", "SQNR dB", "top-1 %", "points lost", "agree %", "KL nats", "out dB"):
        table.add_column(name, justify="right")
    for cell in results["cells"]:
        lost = "–" if cell["top1"] is None else f"{100 * cell['loss']:.2f} {_ends(cell['loss_interval'])}"
        table.add_row(
            cell["cell"]["method"],
            name_of(cell["cell"]),
            f"{cell['stored_bytes']:,}",
            f"{cell['bytes']:,}",
            _number(cell["sqnr_db"], 1),
            _number(cell["top1"], 1, 100),
            lost,
            _number(cell["agreement"], 1, 100),
            _number(cell.get("kl"), 4),
            _number(cell.get("output_sqnr_db"), 1),
        )
    return table


def answers_table(
    results: dict[str, Any], size: str = "stored_bytes", baselines: Mapping[str, Sequence[str]] = EACH
) -> Table:
    """The answers, for the terminal."""
    found = answers(results, size, baselines)
    baselines = {name: of for name, of in baselines.items() if any(name in answer.ratios for answer in found)}
    table = Table(title=f"{results['title']}: least memory within each loss ({size}), over the fixed-point baselines")
    for name in (
        "criterion",
        "points",
        "method",
        "cell",
        "bytes",
        "points lost",
        "surely",
        *(f"/ {b}" for b in baselines),
    ):
        table.add_column(name, justify="left" if name in ("criterion", "method", "cell") else "right")
    before = None
    for answer in found:
        group = answer.criterion, answer.budget
        if before not in (None, group):
            table.add_section()
        before = group
        cell, sure = answer.cell, answer.sure
        table.add_row(
            answer.criterion,
            f"{answer.budget:g}",
            answer.method,
            "none" if cell is None else name_of(cell["cell"]),
            "" if cell is None else f"{cell[size]:,}",
            "" if cell is None else f"{loss(cell, answer.criterion):.2f}",
            "none" if sure is None else f"{sure[size]:,}",
            *(_ratio(answer.ratios.get(name), answer.intervals.get(name)) for name in baselines),
        )
    return table


def _ratio(ratio: float | None, interval: list[float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def _ends(interval: Sequence[float]) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _number(value: float | None, digits: int, factor: float = 1) -> str:
    return "–" if value is None else f"{value * factor:.{digits}f}"
