"""What the proof asks of a sorted row, and the row that NumPy holds.

A *cut* is a number of values: those below it. The proof (`proof.proof`) asks for the values beside cuts, for the cuts
beside values, and for the weight, mean and squared error of the values between cuts, and so does not care where they
are: `HostRow` has them in an array, `proof.mesh_row.MeshRow` on the devices of a mesh.
"""

import math
from typing import NamedTuple, Protocol

import numpy as np

CHUNK = 2**17  # values in hand at once


class Row(Protocol):
    """A sorted row."""

    @property
    def size(self) -> int:
        """The number of values: the last cut."""
        ...

    @property
    def unit(self) -> float:
        """A power of two: the proof works on values / unit."""
        ...

    @property
    def pin(self) -> tuple[int, int] | None:
        """Where a level is held at 0, the cuts below and above a value 0, which is there, maybe with weight 0."""
        ...

    def settled(self, cuts: np.ndarray) -> np.ndarray:
        """Ascending cuts, each moved below the values equal to that below it, if the row cannot part those."""
        ...

    def values_at(self, places: np.ndarray) -> np.ndarray:
        """The value above each cut, in float64; of a cut below the last."""
        ...

    def cuts_below(self, values: np.ndarray) -> np.ndarray:
        """The number of values of the row below each of the given, which are rounded to its dtype."""
        ...

    def cuts_above(self, values: np.ndarray) -> np.ndarray:
        """The number not above."""
        ...

    def measure(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weight, mean and squared error of the values / unit between cuts `low` and `high`, ascending and apart.

        Means are relative to `origin`.
        """
        ...

    def slack(self, cuts: np.ndarray, weight: np.ndarray, width: np.ndarray, top: float) -> float:
        """What `measure` may have added to a bound, besides what `proof.proof` knows of rounding.

        `weight` and `width` (of the values / unit) are those of the cells between the cuts; `top` is the largest sum of
        squared errors that matters.
        """
        ...


def origin(row: Row) -> float:
    """What means are relative to: the middle value / unit, or 0 where a level is held there."""
    return 0.0 if row.pin is not None else float(row.values_at(np.array([row.size // 2]))[0]) / row.unit


class HostRow(NamedTuple):
    """A sorted row in NumPy arrays.

    Attributes:
      values: `[n]` ascending float32 or float64; equal values may repeat.
      unit: as in `Row`.
      weight: `[n]` non-negative float64, or None for 1 each.
      zero: where one level is held at 0, the cut below a value 0, which must be there (its weight may be 0).
    """

    values: np.ndarray
    unit: float
    weight: np.ndarray | None
    zero: int | None

    @property
    def size(self) -> int:
        """The last cut."""
        return len(self.values)

    @property
    def pin(self) -> tuple[int, int] | None:
        """The cuts about a value zero."""
        return None if self.zero is None else (self.zero, self.zero + 1)

    def settled(self, cuts: np.ndarray) -> np.ndarray:
        """The cuts: the array parts equal values by their places."""
        return cuts

    def values_at(self, places: np.ndarray) -> np.ndarray:
        """The values at these places."""
        return self.values[places].astype(np.float64)

    def cuts_below(self, values: np.ndarray) -> np.ndarray:
        """By binary search in the row's own dtype, as of another the whole row would be converted."""
        return np.searchsorted(self.values, values.astype(self.values.dtype))

    def cuts_above(self, values: np.ndarray) -> np.ndarray:
        """The same."""
        return np.searchsorted(self.values, values.astype(self.values.dtype), side="right")

    def measure(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In two passes over some values at a time, of larger cells the parts merged."""
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
        """What values are off by that `search.gaps` moved."""
        return moved_slack(self, weight, top)


def moved_slack(row: Row, weight: np.ndarray, top: float) -> float:
    """How much a bound may be off where every value is, by two units in the last place of the largest."""
    largest = float(np.abs(row.values_at(np.array([0, row.size - 1]))).max()) / row.unit
    moved = float(weight.sum()) * (largest * 2.0**-51) ** 2
    return 2 * math.sqrt(top * moved) + moved


def merged(
    weight: np.ndarray, mean: np.ndarray, square: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells from each of `starts` to the next as one (Chan, Golub and LeVeque 1983)."""
    counts = np.diff(np.append(starts, len(weight)))
    total = np.add.reduceat(weight, starts)
    first = mean[starts]
    away = mean - np.repeat(first, counts)
    shift = np.add.reduceat(away * weight, starts) / np.where(total > 0, total, 1.0)
    away -= np.repeat(shift, counts)
    return total, first + shift, np.add.reduceat(square + away * away * weight, starts)
