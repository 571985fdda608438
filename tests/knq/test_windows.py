"""The window programme of the search against every combination of places, and the same on the host as traced."""

import itertools

import numpy as np
import pytest

from nuqjax._src.knq.search.search import _windows_rows
from nuqjax._src.knq.search.windows_host import windows_rows
from nuqjax._src.platform.host import x64


def windows(seed, boundaries, size, number, weighted, held_zero):
    """The arguments of the programme for rows of sorted values with a window about each of some boundaries."""
    generator = np.random.default_rng(seed)
    cells = 40 * (boundaries + 1)
    values = np.sort(generator.standard_t(3, (number, cells)) * 2**20, axis=1).astype(np.int64)
    mass = generator.exponential(size=values.shape) if weighted else np.ones(values.shape, np.int64)
    nothing = np.zeros((number, 1), mass.dtype)
    count = np.concatenate([nothing, np.cumsum(mass, axis=1)], axis=1)
    total = np.concatenate([nothing, np.cumsum(mass * values, axis=1)], axis=1)
    middle = np.sort(generator.choice(cells - 20, (number, boundaries), replace=True) + 10, axis=1)
    places = np.clip(middle[:, :, None] + np.arange(size) - size // 2, 0, cells)
    whole = np.concatenate([np.zeros((number, 1), int), middle, np.full((number, 1), cells)], axis=1)
    n, s = (np.diff(np.take_along_axis(x, whole, axis=1), axis=1) for x in (count, total))
    reference = s / np.where(n > 0, n, 1)
    reference = reference if weighted else np.rint(reference).astype(np.int64)
    zero = np.array([np.searchsorted(row, 0) for row in values])
    above = places > zero[:, None, None] if held_zero else np.zeros(places.shape, bool)
    at = [np.take_along_axis(x, places.reshape(number, -1), axis=1).reshape(places.shape) for x in (count, total)]
    return (
        *at, above, count[:, -1], total[:, -1], np.full(number, held_zero), reference,
        np.diff(reference, axis=1).astype(float),
    ), (count, total, places, zero)  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("held_zero", [False, True])
def test_the_host_chooses_the_same_places(weighted, held_zero):
    for seed, boundaries in ((0, 15), (1, 15), (2, 3), (3, 1)):
        given, _ = windows(seed, boundaries, 33, 20, weighted, held_zero)
        with x64():
            np.testing.assert_array_equal(windows_rows(*given), np.asarray(_windows_rows(*given)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("held_zero", [False, True])
def test_no_combination_is_better(weighted, held_zero):
    given, (count, total, places, zero) = windows(4, 3, 5, 6, weighted, held_zero)
    for r, chosen in enumerate(windows_rows(*given)):

        def cost(cuts, r=r):
            whole = [0, *cuts, count.shape[1] - 1]
            gain = 0.0
            for a, b in itertools.pairwise(whole):
                if b < a:
                    return np.inf
                n, s = float(count[r, b] - count[r, a]), float(total[r, b] - total[r, a])
                gain += 0.0 if (held_zero and a <= zero[r] < b) or n <= 0 else s * s / n
            return -gain

        found = cost([places[r, j, w] for j, w in enumerate(chosen)])
        least = min(
            cost([places[r, j, w] for j, w in enumerate(all_)]) for all_ in itertools.product(range(5), repeat=3)
        )
        assert found <= least + 1e-12 * abs(least)
