"""The README's tables of accuracy against size, from the results that `experiments.accuracy` wrote.

    python -m experiments.tables                    # prints them
    python -m experiments.tables --check README.md  # fails if the README's differ
    python -m experiments.tables --write README.md  # puts them into the README

In the README they stand between the lines `<!-- accuracy tables: begin -->` and `<!-- accuracy tables: end -->`.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_BEGIN, _END = "<!-- accuracy tables: begin -->", "<!-- accuracy tables: end -->"


def tables(results: Iterable[dict[str, Any]]) -> str:
    """Markdown of all results: a table of methods by bits for each network, and one of the settings with rules."""
    return "\n\n".join(_network(result) for result in results) + "\n"


def _network(result: dict[str, Any]) -> str:
    float_scores = result["float"]
    plain = [cell for cell in result["cells"] if not cell["setting"]["rules"]]
    ruled = [cell for cell in result["cells"] if cell["setting"]["rules"]]
    parts = [
        f"**{result['title']}**, {result['images']:,} images; float32: {float_scores['bytes']:,} bytes, "
        f"top-1 {_percent(float_scores['top1'])}, top-5 {_percent(float_scores['top5'])}."
    ]
    if plain:
        parts.append(_by_bits(plain))
    if ruled:
        parts.append(_one_by_one(ruled))
    parts.append("```sh\n" + "\n".join(result["commands"]) + "\n```")
    return "\n\n".join(parts)


def _by_bits(cells: Sequence[dict[str, Any]]) -> str:
    """A row for each way to compress, a column for each index width: top-1 (bits a weight)."""
    widths = sorted({cell["setting"]["bits"] for cell in cells})
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for cell in cells:
        setting = cell["setting"]
        entry = f"{_percent(cell['top1'])} ({cell['bits_per_weight']:.2f})"
        rows.setdefault((setting["method"], _codebooks(setting)), {})[setting["bits"]] = entry
    return _markdown(
        ["method", "codebooks", *(f"{width} bits" for width in widths)],
        [[*name, *(row.get(width, "") for width in widths)] for name, row in rows.items()],
        left=2,
    )


def _one_by_one(cells: Sequence[dict[str, Any]]) -> str:
    """A row for each setting, the smallest first."""
    return _markdown(
        ["method", "codebooks", "bits", "bits a weight", "bytes", "ratio", "top-1", "top-5", "as float"],
        [
            [
                cell["setting"]["method"],
                _codebooks(cell["setting"]),
                _widths(cell["setting"]),
                f"{cell['bits_per_weight']:.2f}",
                f"{cell['bytes']:,}",
                f"{cell['ratio']:.2f}×",
                _percent(cell["top1"]),
                _percent(cell["top5"]),
                _percent(cell["agreement"]),
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


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def read(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, by file name.

    Raises:
      FileNotFoundError: there are none.
    """
    files = sorted(folder.glob("accuracy_*.json"))
    if not files:
        raise FileNotFoundError(f"no accuracy_*.json in {folder}: python -m experiments.accuracy --json writes them")
    return [json.loads(file.read_text()) for file in files]


def split(text: str) -> tuple[str, str, str]:
    """A README's text before, between and after the two marks.

    Raises:
      ValueError: a mark is missing, or there are several.
    """
    if text.count(_BEGIN) != 1 or text.count(_END) != 1 or text.index(_BEGIN) > text.index(_END):
        raise ValueError(f"one line {_BEGIN} and after it one line {_END} are wanted")
    before, rest = text.split(_BEGIN)
    between, after = rest.split(_END)
    return before + _BEGIN, between, _END + after


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tables", description="The README's accuracy tables.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with accuracy_*.json")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", type=Path, metavar="README", help="exit with 1 if the tables in this file differ")
    action.add_argument("--write", type=Path, metavar="README", help="put the tables into this file")
    args = parser.parse_args(argv)
    try:
        made = "\n" + tables(read(args.results))
        readme = args.check or args.write
        if readme is None:
            print(made.strip())
            return 0
        before, between, after = split(readme.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if args.write:
        readme.write_text(before + made + after, encoding="utf-8")
    elif between != made:
        print(
            f"{readme}: the accuracy tables differ from {args.results}; --write {readme} renews them", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
