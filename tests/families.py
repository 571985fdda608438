"""Families of rows for tests of fits: `FAMILIES[name](generator, size)` draws an array of a shape or a length."""

from collections.abc import Callable
from typing import Any

import numpy as np

from nuqjax._src.leaf.assign import Fit


def _ended(rows: np.ndarray, *ends: float) -> np.ndarray:
    """Rows with other last values."""
    rows[..., -len(ends) :] = ends
    return rows


def _raised(rows: np.ndarray) -> np.ndarray:
    """Rows of whose values the first third is far from the others and far wider."""
    first = rows[..., : rows.shape[-1] // 3]
    first[...] = 1e12 + 1e8 * first
    return rows


FAMILIES: dict[str, Callable[[np.random.Generator, Any], np.ndarray]] = {
    "normal": lambda g, size: g.standard_normal(size),
    "t3": lambda g, size: g.standard_t(3, size),
    "laplace": lambda g, size: g.laplace(size=size),
    "uniform": lambda g, size: g.uniform(size=size),
    "log-normal": lambda g, size: g.lognormal(size=size),
    "half zeros": lambda g, size: g.standard_normal(size) * (g.uniform(size=size) < 0.5),
    "lattice": lambda g, size: np.round(g.standard_normal(size) * 50),
    "far apart": lambda g, size: g.standard_normal(size) + g.choice([-1e4, 1e4], size),
    "outlier": lambda g, size: _ended(g.standard_normal(size) + g.choice([-10, 10], size), 1e6),
    "outlier below": lambda g, size: _ended(g.standard_normal(size), -1e9),
    "far outlier": lambda g, size: _ended(g.standard_normal(size), 1e12),
    "outliers": lambda g, size: _ended(g.standard_normal(size), -1e12, 3e7, 1e12),
    "scales": lambda g, size: _raised(g.standard_normal(size)),
    "heavy tail": lambda g, size: g.pareto(0.5, size),
    "wide": lambda g, size: g.lognormal(sigma=5, size=size) * g.choice([-1, 1], size),
}


def level_rounding(rows: np.ndarray, weights: np.ndarray | None, fitted: Fit) -> np.ndarray:
    """`[R]` what rounding levels to float32 adds at most to `sse`: half a unit in the last place, for each value."""
    added = []
    for r, levels in enumerate(np.asarray(fitted.levels, np.float64)):
        cuts = (levels[1:] + levels[:-1]) / 2
        moved = levels[np.searchsorted(cuts, rows[r])] / float(fitted.scale[r]) * 2.0**-24
        added.append(float(np.sum(moved * moved * (1 if weights is None else weights[r]))))
    return np.array(added)
