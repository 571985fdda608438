"""Two forms on the same examples: the mean of what lies between them, with its interval."""

from typing import NamedTuple

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
