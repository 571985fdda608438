"""Two forms on the same examples: the mean of what lies between them, with its interval."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Paired(NamedTuple):
    """The mean of the differences of pairs, and the ends of its interval."""

    difference: float
    low: float
    high: float


def paired(one: np.ndarray, other: np.ndarray, *, share: float = 0.95, draws: int = 4000, seed: int = 0) -> Paired:
    """The mean of `one` − `other` over examples, and the interval of means of examples drawn again (a bootstrap).

    What both forms do alike to an example takes no part: of hits, only the examples that one of them alone has right.

    Args:
      one: `[N]` numbers or truth values, one an example.
      other: `[N]` of the same examples.
      share: of the drawn means that lie in the interval.
      draws: how often N examples are drawn, with replacement.
      seed: of the draws.

    >>> paired(np.array([True, True, False, True]), np.array([True, False, False, True]))
    Paired(difference=0.25, low=0.0, high=0.75)
    """
    each = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    rng, count = np.random.default_rng(seed), len(each)
    means = [each[rng.integers(0, count, count)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return Paired(float(each.mean()), float(low), float(high))


def between(pairs: Sequence[dict[str, Any]], size: str, form: str, measure: str = "kl") -> list[float] | None:
    """What `knq` with data has more than another form of its size, and the ends of the interval; None if not measured.

    >>> pairs = [{"size": "4", "one": "calibrated uniform", "other": "calibrated knq", "kl": [0.5, 0.25, 1.0]}]
    >>> between(pairs, "4", "calibrated uniform")
    [-0.5, -1.0, -0.25]
    """
    best = ("calibrated knq", "budget knq")
    for pair in pairs:
        difference, low, high = pair[measure]
        if pair["size"] == size and pair["other"] == form and pair["one"] in best:
            return [difference, low, high]
        if pair["size"] == size and pair["one"] == form and pair["other"] in best:
            return [-difference, -high, -low]
    return None
