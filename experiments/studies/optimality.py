"""How often `fit` without a proof (`tolerance=None`) is not the optimum.

    python -m experiments.studies.optimality --json FILE

Rows of several families, lengths and numbers of levels are fitted without a proof and with one, which takes better
levels where it comes upon them. A row is missed if its squared error without is more than 10⁻⁶ above that with. It is
unproven if its lower bound is further below than 1.2 · 10⁻⁶ and what rounding the levels to float32 may cost.
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
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
    "lattice": lambda g, size: np.round(g.standard_normal(size) * 50),
    "far apart": lambda g, size: g.standard_normal(size) + g.choice([-1e4, 1e4], size),
    "outlier": lambda g, size: _with_outlier(g.standard_normal(size) + g.choice([-10, 10], size), 1e6),
    "far outlier": lambda g, size: _with_outlier(g.standard_normal(size), 1e12),
    "heavy tail": lambda g, size: g.pareto(0.5, size),
    "wide": lambda g, size: g.lognormal(sigma=5, size=size) * g.choice([-1, 1], size),
}
_LENGTHS = {300: 200, 1000: 100, 4608: 50, 20_000: 20, 100_000: 4}  # and how many rows of each


def _with_outlier(rows: np.ndarray, outlier: float) -> np.ndarray:
    rows[:, -1] = outlier
    return rows


def level_rounding(rows: np.ndarray, weights: np.ndarray | None, fitted: nuqjax.Fit) -> np.ndarray:
    """`[R]` what rounding levels to float32 adds at most to `sse`: (2⁻²⁴ · the level)² for each value."""
    added = []
    for r, levels in enumerate(np.asarray(fitted.levels, np.float64)):
        nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, rows[r])] / float(fitted.scale[r])
        added.append(np.sum((1 if weights is None else weights[r]) * (nearest * 2.0**-24) ** 2))
    return np.array(added)


def survey(levels: list[int], lengths: dict[int, int], seed: int, weighted: bool = False) -> list[dict]:
    """One entry for each family, length and number of levels."""
    cells = [(f, n, k) for f in FAMILIES for n in lengths for k in levels]
    found = []
    for family, length, num_levels in track(cells, "fitting"):
        size = lengths[length], length
        generator = np.random.default_rng([seed, length])
        rows = FAMILIES[family](generator, size).astype(np.float32)
        weights = generator.exponential(size=size).astype(np.float32) if weighted else None
        given = None if weights is None else jnp.asarray(weights)
        free = np.asarray(nuqjax.fit(rows, num_levels, weights=given, tolerance=None).sse, np.float64)
        proven = nuqjax.fit(rows, num_levels, weights=given, tolerance=1e-6)
        best, bound = (np.asarray(x, np.float64) for x in (proven.sse, proven.lower_bound))
        some = np.where(best > 0, best, 1)
        excess, gap = np.where(best > 0, free / some - 1, 0.0), np.where(best > 0, 1 - bound / some, 0.0)
        rounding = level_rounding(rows, weights, proven) / some
        found.append(
            {
                "family": family, "length": length, "levels": num_levels, "rows": size[0],
                "missed": int((excess > 1e-6).sum()), "worst": float(excess.max()),
                "gap": float(gap.max()), "unproven": int((gap > 1.2e-6 + rounding).sum()),
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
    parser.add_argument("--weighted", action="store_true", help="with exponential weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    found = survey([int(k) for k in options.levels.split(",")], options.lengths, options.seed, options.weighted)
    table = Table("family", "length", "levels", "rows", "missed", "worst excess", "largest gap", "unproven")
    for cell in found:
        if cell["missed"] or cell["gap"] > 1.2e-6:
            sizes = f"{cell['worst']:.1e}", f"{cell['gap']:.1e}"
            table.add_row(*map(str, (*list(cell.values())[:5], *sizes, cell["unproven"])))
    console = Console()
    if table.row_count:
        console.print(table)
    total, missed, unproven = (sum(cell[name] for cell in found) for name in ("rows", "missed", "unproven"))
    worst = max(cell["worst"] for cell in found)
    console.print(f"{missed} of {total} rows were missed, by at most {worst:.1e}; {unproven} are unproven")
    if options.json:
        asked = {name: getattr(options, name) for name in ("levels", "lengths", "seed", "weighted")}
        options.json.write_text(json.dumps(asked | {"cells": found}, indent=1))


if __name__ == "__main__":
    main()
