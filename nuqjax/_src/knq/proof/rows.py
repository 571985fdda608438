"""The proof's interface to a sorted row (`Row`), and the row that NumPy arrays hold (`HostRow`).

A *cut* is a place between two sorted values, given as the number of values below it. The proof (`proof.proof`) asks for
the values beside cuts, for the cuts beside values, and for the weight, mean and squared error of the values between
cuts. So it does not depend on where the values are: `HostRow` has them in an array, `proof.mesh_row.MeshRow` on the
devices of a mesh.
"""

import math
from typing import NamedTuple, Protocol

import numpy as np

CHUNK = 2**17  # values in memory at once


class Row(Protocol):
    """A sorted row."""

    @property
    def size(self) -> int:
        """The number of values, which is the last cut."""
        ...

    @property
    def unit(self) -> float:
        """A power of two: the proof works on values / unit."""
        ...

    @property
    def held_zero(self) -> tuple[int, int] | None:
        """The cuts below and above the held zero, a value 0 of the row whose weight may be 0; None without one."""
        ...

    def settled(self, cuts: np.ndarray) -> np.ndarray:
        """Returns ascending cuts, each moved below all equal values around it if the row cannot split those."""
        ...

    def values_at(self, places: np.ndarray) -> np.ndarray:
        """Returns the value above each cut, in float64; every cut must be below the last."""
        ...

    def cuts_below(self, values: np.ndarray) -> np.ndarray:
        """Returns the number of values of the row below each given value, which is rounded to the row's dtype."""
        ...

    def cuts_above(self, values: np.ndarray) -> np.ndarray:
        """Returns the number of values of the row not above each given value, which is rounded to the row's dtype."""
        ...

    def measure(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Computes weight, mean and squared error of the values / unit between cuts `low` and `high`.

        These ranges ascend and do not overlap. Means are relative to `origin`.
        """
        ...

    def slack(self, cuts: np.ndarray, weight: np.ndarray, width: np.ndarray, top: float) -> float:
        """Bounds what `measure` may have added to a bound, besides the rounding that `proof.proof` accounts for.

        `weight` and `width` (of the values / unit) are those of the cells between the cuts; `top` is the largest sum of
        squared errors that matters.
        """
        ...


def origin(row: Row) -> float:
    """Returns what means are relative to: the middle value / unit, or 0 where there is a held zero."""
    return 0.0 if row.held_zero is not None else float(row.values_at(np.array([row.size // 2]))[0]) / row.unit


class HostRow(NamedTuple):
    """A sorted row in NumPy arrays.

    Attributes:
      values: `[n]` ascending float32 or float64; equal values may repeat.
      unit: as in `Row`.
      weight: `[n]` non-negative float64, or None for 1 each.
      zero: the cut below the held zero, a value 0 that must be in `values` (its weight may be 0); None without one.
      moved: whether `search.gaps` moved the values, which rounded them.
    """

    values: np.ndarray
    unit: float
    weight: np.ndarray | None
    zero: int | None
    moved: bool = False

    @property
    def size(self) -> int:
        """The number of values, which is the last cut."""
        return len(self.values)

    @property
    def held_zero(self) -> tuple[int, int] | None:
        """The cuts below and above the held zero; None without one."""
        return None if self.zero is None else (self.zero, self.zero + 1)

    def settled(self, cuts: np.ndarray) -> np.ndarray:
        """Returns the cuts unchanged: equal values are split by their places in the array."""
        return cuts

    def values_at(self, places: np.ndarray) -> np.ndarray:
        """Returns the value above each cut, in float64."""
        return self.values[places].astype(np.float64)

    def cuts_below(self, values: np.ndarray) -> np.ndarray:
        """Returns the number of values below each given value, by binary search in the row's dtype."""
        # NumPy would convert the whole row to search for values of another dtype.
        return np.searchsorted(self.values, values.astype(self.values.dtype))

    def cuts_above(self, values: np.ndarray) -> np.ndarray:
        """Returns the number of values not above each given value, by binary search in the row's dtype."""
        return np.searchsorted(self.values, values.astype(self.values.dtype), side="right")

    def measure(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Computes weight, mean and squared error in two passes over `CHUNK` values at a time; merges larger cells."""
        pieces = -(-(high - low) // CHUNK)
        owner = np.repeat(np.arange(len(low)), pieces)
        first_piece = np.cumsum(pieces) - pieces
        start = low[owner] + (np.arange(len(owner)) - first_piece[owner]) * CHUNK
        end = np.minimum(start + CHUNK, high[owner])
        found = np.empty((3, len(start)))
        total = np.cumsum(end - start)
        here = 0
        while here < len(start):
            known = total[here - 1] if here else 0
            following = max(int(np.searchsorted(total, known + CHUNK, side="right")), here + 1)
            found[:, here:following] = self._measure_at_once(start[here:following], end[here:following])
            here = following
        weight, mean, square = found
        return (weight, mean, square) if len(start) == len(low) else merged(weight, mean, square, first_piece)

    def _measure_at_once(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = end - start
        starts = np.cumsum(counts) - counts
        if (end[:-1] == start[1:]).all():
            place = slice(start[0], end[-1])
        else:
            place = np.repeat(start - starts, counts) + np.arange(counts.sum())
        away = self.values[place].astype(np.float64)
        away /= self.unit
        first = away[starts]
        away -= np.repeat(first, counts)
        if self.weight is None:
            total = counts.astype(np.float64)
            shift = np.add.reduceat(away, starts) / total
        else:
            weight = self.weight[place]
            total = np.add.reduceat(weight, starts)
            shift = np.add.reduceat(away * weight, starts) / np.where(total > 0, total, 1.0)
        away -= np.repeat(shift, counts)
        away *= away
        if self.weight is not None:
            away *= weight
        return total, (first - origin(self)) + shift, np.add.reduceat(away, starts)

    def slack(self, cuts: np.ndarray, weight: np.ndarray, width: np.ndarray, top: float) -> float:
        """Bounds the effect of rounding in values that `search.gaps` moved."""
        return moved_slack(self, weight, top) if self.moved else 0.0


def moved_slack(row: Row, weight: np.ndarray, top: float) -> float:
    """Returns how much a bound may be off if every value is off by two units in the last place of the largest."""
    largest = float(np.abs(row.values_at(np.array([0, row.size - 1]))).max()) / row.unit
    moved = float(weight.sum()) * (largest * 2.0**-51) ** 2
    return 2 * math.sqrt(top * moved) + moved


def merged(
    weight: np.ndarray, mean: np.ndarray, square: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merges the cells from each of `starts` to the next into one cell (Chan, Golub and LeVeque 1983)."""
    counts = np.diff(np.append(starts, len(weight)))
    total = np.add.reduceat(weight, starts)
    first = mean[starts]
    away = mean - np.repeat(first, counts)
    shift = np.add.reduceat(away * weight, starts) / np.where(total > 0, total, 1.0)
    away -= np.repeat(shift, counts)
    return total, first + shift, np.add.reduceat(square + away * away * weight, starts)
