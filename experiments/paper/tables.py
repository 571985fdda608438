"""The study in Markdown: the summary, and all tables, of `docs/results/study.md`."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.paper import answers as paper_answers
from experiments.paper import calibrated
from experiments.paper import study as paper
from experiments.paper.answers import Answer, answers, name_of
from experiments.paper.plots import PLAIN
from experiments.paper.theory import reference_db
from experiments.record.markdown import commands, markdown, percent

_SIZE = "stored_bytes"
_BUDGET = 1.0  # points, in the summary
_FREEST = "uniform"  # of the fixed-point baselines: any step
_LESS = 0.98  # a smaller difference is one of tables, and counts as none
_USUAL = "dfp"  # Ristretto's rule
_WORDS = ("float", "16", "12", "8", "6")  # of a codebook's levels, and
_GRANULARITIES = ("tensor", "channel")  # what the whole study crosses with every method


def summary(all_results: Sequence[dict[str, Any]]) -> str:
    """What came out, in three sentences and a row for each network."""
    scored = [results for results in all_results if results["float"]["top1"] is not None]
    rows, found = [], []
    for results in scored:
        of = {a.method: a for a in answers(results, _SIZE) if (a.criterion, a.budget) == ("top1", _BUDGET)}
        found.append((results, of))
        rows.append(
            [
                results["title"],
                f"{results['images']:,}",
                percent(results["float"]["top1"]),
                *(_least(of.get(method)) for method in ("knq", "enq", _FREEST, _USUAL)),
                *(_ratio(of.get("knq"), baseline) for baseline in (_FREEST, _USUAL)),
            ]
        )
    head = ["network", "images", "float top-1", "knq", "enq", _FREEST, _USUAL]
    table = markdown([*head, f"knq / {_FREEST}", f"knq / {_USUAL}"], rows, left=1)
    caption = (
        f"Least kilobytes of parameters, tables included, within {_BUDGET:g} point of the float network's top-1 (index "
        "bits), and their ratio with its 95 % interval over the images drawn again."
    )
    return "\n\n".join([_sentences(found), caption, table]) + "\n"


def _sentences(found: Sequence[tuple[dict[str, Any], dict[str, Answer]]]) -> str:
    """Three sentences, whose numbers and names are all counted here."""
    against: dict[str, list[float]] = {name: [] for name in (_FREEST, _USUAL)}
    for _, of in found:
        for baseline, ratios in against.items():
            if (knq := of.get("knq")) and (ratio := knq.ratios.get(baseline)) is not None:
                ratios.append(ratio)
    half = {name: sum(ratio <= 0.5 for ratio in ratios) for name, ratios in against.items()}
    smaller, equal = [], []
    for results, of in found:
        knq, enq = (of[method].cell if method in of else None for method in ("knq", "enq"))
        if knq and (enq is None or knq[_SIZE] < _LESS * enq[_SIZE]):
            smaller.append(results["title"])
        elif knq and enq and _LESS * knq[_SIZE] <= enq[_SIZE]:
            equal.append(results["title"])
    useless = [results["title"] for results, of in found if not _helps(of)]
    ratios = " and ".join(
        f"{min(values):.2f} to {max(values):.2f} times (median {statistics.median(values):.2f}) what `{name}` takes"
        for name, values in against.items()
        if values
    )
    held = " and ".join(
        f"on {half[name]} of {len(values)} networks against `{name}`" for name, values in against.items() if values
    )
    return (
        f"Within {_BUDGET:g} point of top-1, `knq` takes {ratios}; half the memory holds {held}. "
        f"It needs less memory than `enq` on {_listed(smaller)}"
        + (f", and the same to 2 % on {_listed(equal)}. " if equal else ". ")
        + f"Neither saves as much as 2 % of the best fixed point on {_listed(useless)}."
    )


def _helps(of: dict[str, Answer]) -> bool:
    """Whether a codebook needs less than every fixed-point baseline."""

    def least(methods: Sequence[str]) -> float:
        cells = [of[method].cell for method in methods if method in of]
        return min((cell[_SIZE] for cell in cells if cell is not None), default=math.inf)

    return least(("knq", "enq")) < _LESS * least(paper_answers.BASELINES)


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> _listed(["A", "B", "C"]), _listed([])
    ('A, B and C', 'none of the networks')
    """
    if not names:
        return "none of the networks"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _least(answer: Answer | None, named: bool = False) -> str:
    if answer is None or answer.cell is None:
        return "none"
    cell = answer.cell["cell"]
    words = [cell["method"]] if named else []
    words.append(cell.get("budget") or str(cell["bits"]))
    if cell["granularity"] != "tensor":
        words.append(f"per {cell['granularity']}")
    if cell["scale"] != "none" and "budget" not in cell:  # with data, every codebook has scales
        words.append(f"scale per {cell['scale']}")
    kind, _, word = cell["codebook_format"].partition(":")
    if kind == "fixed":
        words.append(f"{word}-bit levels")
    return f"{answer.cell[_SIZE] / 1e3:,.0f} ({', '.join(words)})"


def _ratio(answer: Answer | None, baseline: str) -> str:
    ratio = None if answer is None else answer.ratios.get(baseline)
    if answer is None or ratio is None:
        return "–"
    interval = answer.intervals[baseline]
    return f"{ratio:.2f}" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def with_data(all_results: Sequence[dict[str, Any]]) -> str:
    """What data bring to each method: a sentence for each budget, and a row for each network and budget."""
    sentences, rows = [], []
    for budget in paper_answers.BUDGETS["top1"]:
        against: dict[str, list[tuple[str, Answer]]] = {name: [] for name in calibrated.BASELINES}
        for results in all_results:
            found = answers(results, _SIZE, calibrated.BASELINES)
            of = {a.method: a for a in found if (a.criterion, a.budget) == ("top1", budget)}
            mine = of.get(_LEARNED)
            for name, entries in against.items():
                if mine is not None and mine.ratios.get(name) is not None:
                    entries.append((results["title"], mine))
            least = [_least(of.get(method)) for method in (_LEARNED, *calibrated.OTHERS)]
            plain = min((of[m] for m in calibrated.BASELINES["fixed point"] if m in of), key=_bytes, default=None)
            ratios = [_ratio(mine, name) for name in calibrated.BASELINES]
            rows.append([results["title"], f"{budget:g}", *least, _least(plain, named=True), *ratios])
        sentences.append(f"Within {budget:g} point{'s' * (budget != 1)} of top-1: {_of_halves(against)}.")
    networks = markdown(
        ["network", "images", "learned from", "float top-1", "float bytes"],
        [[r["title"], *map(_thousands, (r["images"], r["learned"])), *_of_float(r["float"])] for r in all_results],
        left=1,
    )
    head = ["network", "points", *(f"{name}" for name in (_LEARNED, *calibrated.OTHERS)), "fixed point"]
    head += [f"{_LEARNED} / {name}" for name in calibrated.BASELINES]
    caption = (
        "Least kilobytes, everything counted, within so many points of the float network's top-1 (bits a weight of a "
        "budget, or index bits), and their ratio with its 95 % interval over the images drawn again. `fixed point` is "
        "the least of `uniform`, `uniform_pow2` and `dfp` without data, `fixed point, data` is `uniform` with data."
    )
    table = markdown(head, sorted(rows, key=lambda row: row[0]), left=1)
    return "\n\n".join([*sentences, caption, table, networks, commands(all_results)]) + "\n"


def _thousands(number: int) -> str:
    return f"{number:,}"


def _of_float(of_float: dict[str, Any]) -> list[str]:
    return [percent(of_float["top1"]), _thousands(of_float["bytes"])]


_LEARNED = f"knq{calibrated.WITH_DATA}"


def _bytes(answer: Answer) -> float:
    return math.inf if answer.cell is None else answer.cell[_SIZE]


def _of_halves(against: dict[str, list[tuple[str, Answer]]]) -> str:
    """For which networks it is a half, and how sure that is."""
    parts = []
    for name, entries in against.items():
        if not entries:
            parts.append(f"beside {name} nothing can be compared")
            continue
        ratios = [answer.ratios[name] or math.inf for _, answer in entries]
        half = [title for title, answer in entries if (answer.ratios[name] or math.inf) <= 0.5]
        more = [title for title, _ in entries if title not in half]
        sure = [title for title, answer in entries if title in half and (answer.intervals[name] or [0, 1])[1] <= 0.5]
        ends = dict.fromkeys((f"{min(ratios):.2f}", f"{max(ratios):.2f}"))
        words = f"`{_LEARNED}` takes {' to '.join(ends)} times what {name} takes: "
        words += f"half or less on {_listed(half)}" + (f" (surely so on {_listed(sure)})" if half else "")
        parts.append(words + (f", not on {_listed(more)}" if half and more else ""))
    return "; ".join(parts)


def study(all_results: Sequence[dict[str, Any]]) -> str:
    """Every network's answers, its cells on activation words, and the theory beside the layers."""
    parts = [part for results in all_results for part in _network(results)]
    parts += ["#### The layers beside theory", *_theory(all_results)]
    return "\n\n".join(parts) + "\n"


def _network(results: dict[str, Any]) -> list[str]:
    of_float = results["float"]
    head = f"{results['images']:,} images, float32 {of_float['bytes']:,} bytes"
    if of_float["top1"] is None:
        head += ", features alone: the agreement is that of each image's nearest neighbour"
    else:
        low, high = (100 * end for end in of_float["top1_interval"])
        head += (
            f", top-1 {percent(of_float['top1'])} (95 %: {low:.1f} to {high:.1f}), top-5 {percent(of_float['top5'])}"
        )
    cells = len(results["cells"])
    platform = results["platform"]
    head += f"; {cells} cells, jax {results['versions']['jax']} on {platform['cores']} cores ({platform['machine']})."
    parts = [f"#### {results['title']}", head]
    found = answers(results, _SIZE)
    if of_float["top1"] is None:
        parts.append(_features(results))
    for criterion in paper_answers.criteria(results):
        parts.append(_answers(found, criterion))
    words = [cell for cell in results["cells"] if cell["cell"]["word"] is not None]
    if words and of_float["top1"] is not None:
        parts.append(_words(results, words))
    if missing := _missing(results):
        parts.append(missing)
    parts.append(commands([results]))
    return parts


def _missing(results: dict[str, Any]) -> str:
    """Cells of the whole study that these results lack, at the index widths that they have; empty if there are none."""
    measured = [cell["cell"] for cell in results["cells"]]
    bits = sorted({cell["bits"] for cell in measured if cell["method"] in paper.CODEBOOKS})
    lacking: dict[tuple[str, str], dict[str, list[int]]] = {}  # by method and granularity, by word
    for method, granularity, word in itertools.product(paper.METHODS, _GRANULARITIES, _WORDS):
        if word != "float" and method in paper.FIXED_POINT:
            continue
        for one in paper.grid([method], bits, [word], [granularity]):
            if one.to_dict() not in measured:
                kernels = ", every kernel" if one.setting.rules else ""
                row = lacking.setdefault((method, granularity + kernels), {})
                row.setdefault(word, []).append(one.setting.bits)
    alike: dict[tuple[str, ...], list[str]] = {}  # methods that lack the same share a row
    for (method, granularity), row in lacking.items():
        entries = [", ".join(map(str, row.get(word, ()))) or "–" for word in _WORDS]
        alike.setdefault((granularity, *entries), []).append(method)
    if not alike:
        return ""
    head = ["not measured: bits of", "codebooks", "float or no table", *(f"{word}-bit levels" for word in _WORDS[1:])]
    return markdown(head, [[", ".join(methods), *row] for row, methods in alike.items()], left=2)


def _answers(found: Sequence[Answer], criterion: str) -> str:
    """A row for each method, a column for each budget that any method meets: bytes, cell, ratios."""
    mine = [answer for answer in found if answer.criterion == criterion]
    budgets = [b for b in paper_answers.BUDGETS[criterion] if any(a.cell for a in mine if a.budget == b)]
    methods = list(dict.fromkeys(answer.method for answer in mine))
    at = {(answer.method, answer.budget): answer for answer in mine}
    rows = []
    for method in methods:
        row = [method]
        for budget in budgets:
            answer = at[method, budget]
            if answer.cell is None:
                row.append("none")
                continue
            ratios = [f"{ratio:.2f} of {name}" for name, ratio in answer.ratios.items() if ratio is not None]
            codebook = method not in paper_answers.BASELINES and ratios
            text = f"{answer.cell[_SIZE]:,}: {name_of(answer.cell['cell'])}"
            row.append(text + (f"; {', '.join(ratios)}" if codebook else ""))
        rows.append(row)
    what = "points of top-1" if criterion == "top1" else "points of agreement with float"
    return markdown([f"least bytes within {what}", *(f"{budget:g}" for budget in budgets)], rows, left=1)


def _words(results: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """Cells on raw integers beside the same in float."""
    float_of = {_key(cell): cell for cell in results["cells"] if cell["cell"]["word"] is None}
    rows = []
    for cell in cells:
        plain = float_of.get(_key(cell))
        low, high = (100 * end for end in cell["loss_interval"])
        rows.append(
            [
                cell["cell"]["method"],
                name_of(cell["cell"] | {"word": None}),
                f"{cell['cell']['word']} bits",
                percent(None if plain is None else plain["top1"]),
                percent(cell["top1"]),
                f"{100 * cell['loss']:.2f} [{low:.2f}, {high:.2f}]",
                percent(cell["agreement"]),
            ]
        )
    head = ["method", "weights", "activations", "float activations", "integers", "points lost", "as float"]
    return markdown(head, rows, left=3)


def _key(cell: dict[str, Any]) -> str:
    return repr(sorted((cell["cell"] | {"word": None}).items()))


def _features(results: dict[str, Any]) -> str:
    """Of a network without a top-1: SQNR of the weights and of the features, and the agreement."""
    plain = [cell for cell in results["cells"] if _plain(cell)]
    widths = sorted({cell["cell"]["bits"] for cell in plain})
    rows: dict[str, dict[int, str]] = {}
    for cell in plain:
        values = f"{cell['sqnr_db']:.1f} / {cell['output_sqnr_db']:.1f} dB, {percent(cell['agreement'])}"
        rows.setdefault(cell["cell"]["method"], {})[cell["cell"]["bits"]] = values
    return markdown(
        ["SQNR of weights / features, agreement", *(f"{width} bits" for width in widths)],
        [[method, *(row.get(width, "") for width in widths)] for method, row in rows.items()],
        left=1,
    )


def _theory(all_results: Sequence[dict[str, Any]]) -> list[str]:
    """Median over all layers, by bits, beside the tables."""
    rows = []
    kinds = {"knq": "lloyd_max", "uniform": "uniform", "uniform_pow2": "uniform_pow2"}
    for method, kind in kinds.items():
        for bits in range(2, 9):
            values = [
                value
                for results in all_results
                for cell in results["cells"]
                if _plain(cell) and cell["cell"]["method"] == method and cell["cell"]["bits"] == bits
                for value in cell["layers"].values()
            ]
            if values:
                low, middle, high = (statistics.quantiles(values, n=10)[i] for i in (0, 4, 8))
                theory = [f"{reference_db(density, kind)[bits]:.1f}" for density in ("gauss", "laplace")]
                measured = [f"{value:.1f}" for value in (low, middle, high)]
                rows.append([method, str(bits), str(len(values)), *measured, *theory])
    head = ["method", "bits", "layers", "lowest tenth", "median", "highest tenth", "Gaussian", "Laplacian"]
    text = (
        "SQNR in dB of the layers of all networks, one codebook each, beside the best that there is for a Gaussian and "
        "a Laplacian: Lloyd and Max's quantizer for `knq`, the best grid for `uniform`, the best power-of-two step on "
        "average for `uniform_pow2`."
    )
    return [text, markdown(head, rows, left=1)]


def _plain(cell: dict[str, Any]) -> bool:
    """Whether a cell has one codebook a layer, with float levels, and float activations."""
    return PLAIN.items() <= cell["cell"].items()
