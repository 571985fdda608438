"""How often `fit` without a proof (`tolerance=None`) is not the optimum.

    python -m experiments.optimality --json FILE

Rows of several families, lengths and numbers of levels are fitted without a proof and with one, which takes better
levels where it comes upon them. A row is missed if its squared error without is more than 10⁻⁶ above that with.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import nuqjax

FAMILIES = {
    "normal": lambda g, size: g.standard_normal(size),
    "t3": lambda g, size: g.standard_t(3, size),
    "laplace": lambda g, size: g.laplace(size=size),
    "uniform": lambda g, size: g.uniform(size=size),
    "log-normal": lambda g, size: g.lognormal(size=size),
    "half zeros": lambda g, size: g.standard_normal(size) * (g.uniform(size=size) < 0.5),
}
_LENGTHS = {300: 200, 1000: 100, 4608: 50, 20_000: 20, 100_000: 4}  # and how many rows of each


def survey(levels: list[int], lengths: dict[int, int], seed: int) -> list[dict]:
    """One entry for each family, length and number of levels."""
    cells = [(f, n, k) for f in FAMILIES for n in lengths for k in levels]
    found = []
    for family, length, num_levels in track(cells, "fitting"):
        size = lengths[length], length
        rows = FAMILIES[family](np.random.default_rng([seed, length]), size).astype(np.float32)
        free = np.asarray(nuqjax.fit(rows, num_levels, tolerance=None).sse, np.float64)
        proven = nuqjax.fit(rows, num_levels, tolerance=1e-6)
        best = np.asarray(proven.sse, np.float64)
        excess = np.where(best > 0, free / np.where(best > 0, best, 1) - 1, 0.0)
        gap = np.where(best > 0, 1 - np.asarray(proven.lower_bound, np.float64) / np.where(best > 0, best, 1), 0.0)
        found.append(
            {
                "family": family, "length": length, "levels": num_levels, "rows": size[0],
                "missed": int((excess > 1e-6).sum()), "worst": float(excess.max()),
                "unproven": int((gap > 1.2e-6).sum()),
            }
        )  # fmt: skip
    return found


def _lengths(text: str) -> dict[int, int]:
    return {int(length): int(rows) for length, rows in (part.split(":") for part in text.split(","))}


def main() -> None:
    """Prints the survey, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", default="4,8,16,64,256", help="numbers of levels, by commas")
    parser.add_argument(
        "--lengths", type=_lengths, default=_LENGTHS, help="lengths and rows of each, as 1000:50,4608:20"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    found = survey([int(k) for k in options.levels.split(",")], options.lengths, options.seed)
    table = Table("family", "length", "levels", "rows", "missed", "worst excess", "gap above 1.2e-6")
    for cell in found:
        if cell["missed"] or cell["unproven"]:
            worst = f"{cell['worst']:.1e}"
            table.add_row(*map(str, (*list(cell.values())[:5], worst, cell["unproven"])))
    console = Console()
    if table.row_count:
        console.print(table)
    total, missed = (sum(cell[name] for cell in found) for name in ("rows", "missed"))
    console.print(f"{missed} of {total} rows were missed, by at most {max(cell['worst'] for cell in found):.1e}")
    if options.json:
        options.json.write_text(
            json.dumps(
                {"levels": options.levels, "lengths": options.lengths, "seed": options.seed, "cells": found}, indent=1
            )
        )


if __name__ == "__main__":
    main()
