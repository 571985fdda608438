"""The tables of the documents, from the results that the experiments wrote.

    python -m experiments.documents.tables                                 # prints them
    python -m experiments.documents.tables --check docs/results/speed.md   # fails if that page's differ
    python -m experiments.documents.tables --write docs/results/speed.md   # puts them into the page

There are blocks of tables, each of what one or two commands (modules of `experiments`) measured:

- `headlines`: six results, for the README;
- `accuracy` against size (`studies.accuracy`), and what Fisher weights bring: `sensitivity` (`studies.sensitivity`);
- `data`: compression with data beside compression without (`studies.calibrated`, `studies.transformer`);
- `scales`: scales of channels by the weights alone (`studies.scales`);
- `peers`: other tools beside compression with data (`studies.peers_with_data`);
- `emulation`: networks on raw integers (`studies.emulation`), and the time it takes (`speed.emulation`);
- `first_call` (`speed.first_call`), and the speed of the fit: `benchmark` (`speed.fit`);
- `paper`: the paper's study in short (`paper.study`); `study`: all of it; `with_data`: the same question with data
  (`paper.calibrated`).

`BLOCKS` names the document of each. There a block stands between a line `<!-- NAME tables: begin -->` and a line
`<!-- NAME tables: end -->`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.documents import headlines
from experiments.paper import tables as paper_tables
from experiments.record.intervals import between
from experiments.record.markdown import commands, markdown, percent
from experiments.record.results import RESULTS
from experiments.speed import tables as speed_tables


def accuracy(results: Iterable[dict[str, Any]]) -> str:
    """Markdown of all results: a table of methods by bits for each network, and one of the settings with rules."""
    return "\n\n".join(_network(result) for result in results) + "\n"


def _network(result: dict[str, Any]) -> str:
    float_scores = result["float"]
    plain = [cell for cell in result["cells"] if not cell["setting"]["rules"]]
    ruled = [cell for cell in result["cells"] if cell["setting"]["rules"]]
    parts = [
        f"**{result['title']}**, {result['images']:,} images; float32: {float_scores['bytes']:,} bytes, "
        f"top-1 {percent(float_scores['top1'])}, top-5 {percent(float_scores['top5'])}."
    ]
    if plain:
        parts.append(_by_bits(plain))
    if ruled:
        parts.append(_one_by_one(ruled))
    parts.append(commands([result]))
    return "\n\n".join(parts)


def calibrated(results: Iterable[dict[str, Any]]) -> str:
    """Markdown of what data bring: a table for each network, a row for each form."""
    return "\n\n".join(_with_data(result) for result in results) + "\n"


def _with_data(result: dict[str, Any]) -> str:
    whole, pairs = result["float"], result.get("pairs", [])
    task = "top1" if "top1" in whole else "nats"
    shown = percent if task == "top1" else "{:.3f}".format
    title = (
        f"**{result['title']}**: {result['images']:,} inputs evaluate, {result['learned']:,} others without labels are "
        f"learned from; float32: {whole['bytes']:,} bytes, {_TASKS[task]} {shown(whole[task])}."
    )
    rows = []
    for cell in result["cells"]:
        levels, predicted = cell.get("levels", "knq"), cell["predicted_kl"]
        less = between(pairs, cell["size"], f"{cell['method']} {levels}")
        rows.append(
            [
                levels, _WAYS[cell["method"]], f"{cell['bits_per_weight']:.2f}", shown(cell[task]),
                percent(cell["agreement"]), f"{cell['kl']:.4f}", "" if predicted is None else f"{predicted:.4f}",
                "" if less is None else "{:.4f} [{:.4f}, {:.4f}]".format(*less),
            ]
        )  # fmt: skip
    header = [
        "levels",
        "how",
        "bits a weight",
        _TASKS[task],
        "as float",
        "KL",
        "predicted",
        "`knq` with data less this",
    ]
    return "\n\n".join([title, markdown(header, rows, left=2), commands([result])])


def scales(results: Iterable[dict[str, Any]]) -> str:
    """Markdown of scales by power means, by the weights alone: a row for each network, width and power."""
    results = list(results)
    rows = [
        [
            each["title"], str(cell["bits"]), _power(cell["power"]), f"{cell['sqnr_db']:.2f}", f"{cell['kl']:.3f}",
            "" if cell["power"] == "largest" else "{:.3f} [{:.3f}, {:.3f}]".format(*cell["kl_less_largest"]),
            percent(cell["agreement"]), percent(cell["top1"]),
        ]
        for result in results for each in result["networks"] for cell in each["cells"]
    ]  # fmt: skip
    header = ["network", "bits", "scale", "SQNR, dB", "KL", "KL less the first's", "as float", "top-1"]
    return "\n\n".join([markdown(header, rows, left=3), commands(results)]) + "\n"


def _power(power: float | str) -> str:
    return {"largest": "largest magnitude", 2.0: "root mean square"}.get(power) or f"power {power:g}"


def peers(results: Iterable[dict[str, Any]]) -> str:
    """Markdown of peers beside compression with data, and of those that did not run."""
    return "\n\n".join(_with_data(result) + _missing(result["missing"]) for result in results) + "\n"


def _missing(missing: Sequence[dict[str, str]]) -> str:
    lines = [f"- {each['levels']}, {each['size']} bits: {each['why']}" for each in missing]
    return "\n\nDid not run:\n\n" + "\n".join(lines) if lines else ""


_TASKS = {"top1": "top-1", "nats": "nats a character"}
_WAYS = {
    "plain": "by the weights alone",
    "corrected": "the same, `correct_bias`",
    "calibrated": "with data, one width",
    "budget": "with data, a budget",
    "fisher": "by Fisher information",
    "peer": "theirs",
    "peer corrected": "theirs, then `correct_bias`",
}


def _by_bits(cells: Sequence[dict[str, Any]]) -> str:
    """A row for each way to compress, a column for each index width: top-1 (bits a weight)."""
    widths = sorted({cell["setting"]["bits"] for cell in cells})
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for cell in cells:
        setting = cell["setting"]
        entry = f"{percent(cell['top1'])} ({cell['bits_per_weight']:.2f})"
        rows.setdefault((setting["method"], _codebooks(setting)), {})[setting["bits"]] = entry
    return markdown(
        ["method", "codebooks", *(f"{width} bits" for width in widths)],
        [[*name, *(row.get(width, "") for width in widths)] for name, row in rows.items()],
        left=2,
    )


def _one_by_one(cells: Sequence[dict[str, Any]]) -> str:
    """A row for each setting, the smallest first."""
    return markdown(
        ["method", "codebooks", "bits", "bits a weight", "bytes", "ratio", "top-1", "top-5", "as float"],
        [
            [
                cell["setting"]["method"],
                _codebooks(cell["setting"]),
                _widths(cell["setting"]),
                f"{cell['bits_per_weight']:.2f}",
                f"{cell['bytes']:,}",
                f"{cell['ratio']:.2f}×",
                percent(cell["top1"]),
                percent(cell["top5"]),
                percent(cell["agreement"]),
            ]
            for cell in sorted(cells, key=lambda cell: cell["bytes"])
        ],
        left=3,
    )


def _codebooks(setting: dict[str, Any]) -> str:
    """What shares a codebook, and how it is stored."""
    words = [setting["granularity"].replace("_", " ").replace(":", " of ")]
    if setting["scale"] != "none":
        words.append(f"scale per {setting['scale'].replace('_', ' ').replace(':', ' of ')}")
    if setting["codebook_format"] != "float32":
        words.append(f"{setting['codebook_format']} levels")
    return ", ".join(words)


def _widths(setting: dict[str, Any]) -> str:
    """All index widths that a setting uses: its own, and its rules'."""
    words = [word for rule in setting["rules"] for word in rule[1:] if word.startswith("bits=")]
    return ", ".join(map(str, sorted({setting["bits"], *(int(word.removeprefix("bits=")) for word in words)})))


def sensitivity(results: Iterable[dict[str, Any]]) -> str:
    """A table for each network: a row for each weighting, columns for each granularity and width, then the commands."""
    return "\n\n".join(_weightings(result) for result in results) + "\n"


def _weightings(result: dict[str, Any]) -> str:
    """Top-1 (and the share of images on which the first choice is the float network's)."""
    columns: dict[tuple[str, int], str] = {}
    rows: dict[str, dict[tuple[str, int], str]] = {}
    for cell in result["cells"]:
        column = cell["granularity"], cell["bits"]
        columns[column] = f"{cell['granularity']}, {cell['bits']} bits"
        entry = f"{percent(cell['top1'])} ({percent(cell['agreement'])})"
        rows.setdefault(cell["weighting"], {})[column] = entry
    table = markdown(
        ["weights", *columns.values()],
        [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()],
        left=1,
    )
    head = (
        f"**{result['title']}**, {result['images']:,} images (float32: top-1 {percent(result['float']['top1'])}), "
        f"Fisher diagonal of {result['calibration_images']:,} others: top-1 (same first choice as float32)."
    )
    return "\n\n".join([head, table, commands([result])])


def emulation(results: Iterable[dict[str, Any]]) -> str:
    """A table of all networks on raw integers, one of what that costs in time, then the commands."""
    results = list(results)
    scored = [result for result in results if "network" in result]
    timed = [cell for result in results if "network" not in result for cell in result["cells"]]
    parts = [
        markdown(
            [
                "network",
                "images",
                "float",
                "index bits",
                "words",
                "codebooks in float",
                "on integers",
                "out",
                "widest sum",
            ],
            [_on_integers(result, cell) for result in scored for cell in result["cells"]],
            left=1,
        )
    ]
    if timed:
        head = ["network", "batch", "words", "float, ms", "emulated, ms", "ratio", "compilation, s"]
        parts.append(markdown(head, [_times(cell) for cell in timed], left=1))
    return "\n\n".join([*parts, commands(results)]) + "\n"


def _on_integers(result: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    decoded, emulated, setting = cell["decoded"], cell["emulated"], cell["setting"]
    words = f"{setting['weight_word']} × {setting['word']} bits"
    words += ", some 16" * ("wide" in setting) + ", least error" * (setting.get("choose") == "error")
    return [
        result["title"],
        f"{result['images']:,}",
        percent(result["float"]["top1"]),
        str(setting["bits"]),
        words,
        percent(decoded["top1"]),
        percent(emulated["top1"]),
        f"{emulated['output_sqnr_db']:.1f} dB",
        f"{cell['accumulator_bits']} bits",
    ]


def _times(cell: dict[str, Any]) -> list[str]:
    seconds = [f"{1e3 * cell[name]:.0f}" for name in ("float_seconds", "emulated_seconds")]
    return [
        cell["title"],
        str(cell["batch"]),
        f"8 × {cell['word']} bits",
        *seconds,
        f"{cell['ratio']:.2f}",
        f"{cell['compile_seconds']:.1f}",
    ]


def first_call(results: Iterable[dict[str, Any]]) -> str:
    """CPU seconds and compilations of each version, a row for each call; then the commands."""
    results = list(results)
    parts = []
    for result in results:
        rows = [
            [f"{task}: {way}", *(_call(version.get(way)) for version in versions.values())]
            for task, versions in result["cases"].items()
            for way in versions["this version"]
        ]
        parts.append(markdown(["call", *next(iter(result["cases"].values()))], rows, left=1))
    return "\n\n".join([*parts, commands(results)]) + "\n"


def _call(measured: Sequence[float] | None) -> str:
    if measured is None:
        return "–"
    cpu, _, compilations = measured
    return f"{cpu:.3f} s, {compilations:.0f}"


class Block(NamedTuple):
    """Tables that stand together in a document.

    Attributes:
      files: pattern of the names of the results.
      make: results, by file name, to Markdown.
      command: what writes such files.
      document: where the block stands, from the repository's root.
    """

    files: str
    make: Callable[[list[dict[str, Any]]], str]
    command: str
    document: str


def _block(files: str, make: Callable[[list[dict[str, Any]]], str], command: str, document: str) -> Block:
    return Block(files, make, f"python -m experiments.{command} --json", document)


BLOCKS = {
    "headlines": _block("*.json", headlines.table, "studies.accuracy", "README.md"),
    "accuracy": _block("accuracy_*.json", accuracy, "studies.accuracy", "docs/results/accuracy.md"),
    "sensitivity": _block("sensitivity_*.json", sensitivity, "studies.sensitivity", "docs/results/accuracy.md"),
    "data": _block("calibrated_*.json", calibrated, "studies.calibrated", "docs/results/data.md"),
    "scales": _block("scales*.json", scales, "studies.scales", "docs/results/data.md"),
    "peers": _block("peers_with_data_*.json", peers, "studies.peers_with_data", "docs/results/data.md"),
    "emulation": _block("*emulation*.json", emulation, "studies.emulation", "docs/results/integers.md"),
    "first_call": _block("first_call*.json", first_call, "speed.first_call", "docs/results/speed.md"),
    "benchmark": _block("benchmark_fit*.json", speed_tables.tables, "speed.fit", "docs/results/speed.md"),
    "paper": _block("paper/*.json", paper_tables.summary, "paper.study", "docs/results/study.md"),
    "with_data": _block("paper_with_data/*.json", paper_tables.with_data, "paper.calibrated", "docs/results/study.md"),
    "study": _block("paper/*.json", paper_tables.study, "paper.study", "docs/results/study.md"),
}
DOCUMENTS = tuple(dict.fromkeys(block.document for block in BLOCKS.values()))


def blocks_of(document: Path | None) -> list[str]:
    """The blocks that a document holds; of no document, all.

    Raises:
      ValueError: the document is none of those that hold tables.
    """
    path = "" if document is None else document.resolve().as_posix()
    names = [name for name, block in BLOCKS.items() if document is None or path.endswith(f"/{block.document}")]
    if not names:
        raise ValueError(f"{document} holds no tables; {', '.join(DOCUMENTS)} do")
    return names


def make(name: str, folder: Path) -> str:
    """The Markdown of a block from the results in a folder, by file name.

    Raises:
      FileNotFoundError: there are none.
    """
    block = BLOCKS[name]
    files = sorted(folder.glob(block.files))
    if not files:
        raise FileNotFoundError(f"no {block.files} in {folder}: {block.command} writes them")
    return block.make([json.loads(file.read_text()) for file in files])


def split(text: str, name: str) -> tuple[str, str, str]:
    """A document's text before, between and after the two marks of a block.

    Raises:
      ValueError: a mark is missing, or there are several.
    """
    begin, end = f"<!-- {name} tables: begin -->", f"<!-- {name} tables: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"one line {begin} and after it one line {end} are wanted")
    before, rest = text.split(begin)
    between, after = rest.split(end)
    return before + begin, between, end + after


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.documents.tables", description="The tables of the documents."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the results")
    parser.add_argument("--blocks", help=f"some of {','.join(BLOCKS)}, with commas (default: all that the file holds)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", type=Path, metavar="DOCUMENT", help="exit with 1 if the tables in this file differ")
    action.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the tables into this file")
    args = parser.parse_args(argv)
    document, differing = args.check or args.write, []
    try:
        names = args.blocks.split(",") if args.blocks else blocks_of(document)
    except ValueError as error:
        parser.error(str(error))
    if unknown := sorted(set(names) - set(BLOCKS)):
        parser.error(f"unknown tables {', '.join(unknown)}: the known are {', '.join(BLOCKS)}")
    try:
        text = "" if document is None else document.read_text(encoding="utf-8")
        for name in names:
            made = make(name, args.results)
            if document is None:
                print(made)
                continue
            before, between, after = split(text, name)
            if between != "\n" + made:
                differing.append(name)
            text = before + "\n" + made + after
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    elif differing:
        print(
            f"{document}: the {' and '.join(differing)} tables differ from {args.results}; --write {document} renews "
            "them",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
