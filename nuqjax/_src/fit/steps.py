"""The step of least squared error of a grid of equally spaced levels."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.fit.per_row import _EQUAL, of_least, squared_error
from nuqjax._src.leaf.rows import namespace

_SEARCH_DEPTH = 8  # octaves of steps searched below the step whose grid just spans the values
_SEARCH_DENSITY = 16  # steps per octave, each of which is improved
_POW2_DEPTH = 20  # octaves of power-of-two steps and levels searched


def grid_ends(num_levels: int) -> tuple[int, int]:
    """Returns the least and the largest multiple of the step in a two's-complement grid of K levels."""
    return -(num_levels // 2), num_levels - 1 - num_levels // 2


def _multiples(values, step, num_levels) -> Any:
    """Returns which multiple of the step in the grid is nearest to each value.

    It multiplies by 1/step: a compiler may turn many divisions by one number into multiplications, and NumPy does not.
    """
    low, high = grid_ends(num_levels)
    xp = namespace(values)
    return xp.clip(xp.rint(values * (1 / step)), low, high)


_AROUND = 2 * _SEARCH_DENSITY + 1  # steps of the second search
_RATIOS = np.exp2(np.append(np.linspace(-1, 1, _AROUND), -np.arange(16 * _SEARCH_DENSITY + 1)) / _SEARCH_DENSITY)


def best_step(values, mass, largest, *, num_levels) -> Any:
    """Returns the step of least squared error.

    Each of many steps assigns the values to multiples kᵢ. The best step for these is Σ wᵢ xᵢ kᵢ / Σ wᵢ kᵢ²; it lowers
    the squared error of all zeros by (Σ wᵢ xᵢ kᵢ)² / Σ wᵢ kᵢ². A second search, with finer steps, is made around it.
    """

    def improve(step) -> tuple[Any, Any]:
        multiple = _multiples(values, step, num_levels)
        return _improved(jnp.sum(mass * values * multiple), jnp.sum(mass * multiple * multiple), step)

    octaves = 32 - lax.clz(num_levels - 1) + _SEARCH_DEPTH  # ⌈log2 K⌉ and more
    ratios = jnp.array(_RATIOS, values.dtype)

    def one_search(number, center) -> Any:
        """Makes one of the two searches; one program for both takes half the time to compile."""
        begin = jnp.where(number == 0, _AROUND, 0)
        end = jnp.where(number == 0, _AROUND + octaves * _SEARCH_DENSITY + 1, _AROUND)
        return of_least(lambda i: improve(center * ratios[i]), begin, end, values)

    return lax.fori_loop(0, 2, one_search, _widest(largest))


def _improved(moment, square, step) -> tuple[Any, Any]:
    """Returns minus what the best step for given multiples takes off the squared error, and that step."""
    xp = namespace(moment)
    square = xp.where(square > 0, square, 1)
    return -moment * moment / square, xp.where(moment > 0, moment / square, step)


def _widest(largest) -> Any:
    """Returns the step at which, as at every larger one, zero is the nearest multiple of all values."""
    return 2 * namespace(largest).where(largest > 0, largest, 1)


def best_steps(values, mass, largest, *, num_levels) -> Any:
    """Returns `best_step` of each of the sorted NumPy rows `[r, n]`."""
    octaves = (num_levels - 1).bit_length() + _SEARCH_DEPTH
    coarse, fine = _RATIOS[_AROUND : _AROUND + octaves * _SEARCH_DENSITY + 1], _RATIOS[:_AROUND]
    if values.shape[1] <= _DIRECT * num_levels:
        center = _widest(largest[:, 0])
        for ratios in (coarse, fine):

            def option(i, center=center, ratios=ratios) -> tuple[Any, Any]:
                step = center * ratios[i]
                multiple = _multiples(values, step[:, None], num_levels)
                heavy = multiple if mass is None else multiple * mass
                moment, square = (np.einsum("rn,rn->r", heavy, x) for x in (values, multiple))
                return _improved(moment, square, step)

            center = of_least(option, 0, len(ratios), values)
        return center
    steps = np.empty(len(values))
    for row in range(len(values)):
        places = _places(values[row], None if mass is None else mass[row], num_levels)
        center = _widest(largest[row, 0])
        for ratios in (coarse, fine):
            least = np.finfo(np.float64).max
            moment, square = places(center * ratios)
            errors, found = _improved(moment, square, center * ratios)
            for error, step in zip(errors.tolist(), found.tolist(), strict=True):
                if error < least - _EQUAL * abs(least):
                    least, center = error, step
        steps[row] = center
    return steps


_DIRECT = 8  # values per level up to which finding each value's multiple is faster than finding each multiple's values


def _places(row, mass, num_levels) -> Callable[..., tuple[Any, Any]]:
    """Returns a function of steps `[S]` that computes `Σ wᵢ xᵢ kᵢ` and `Σ wᵢ kᵢ²` of a sorted row.

    In a sorted row each multiple has a run of values, whose sums are differences of running sums. Multiples are added
    one after another, and those without values change no bit. So a step and its half are equally good where they split
    the values in the same way.
    """
    low, high = grid_ends(num_levels)
    multiples = np.arange(low, high + 1, dtype=np.float64)[:, None]
    heavy = row if mass is None else mass * row
    moments = np.append(0, np.cumsum(heavy))
    weights = None if mass is None else np.append(0, np.cumsum(mass))

    def sums(steps) -> tuple[Any, Any]:
        ends = np.zeros((num_levels + 1, len(steps)), np.intp)
        ends[-1] = len(row)
        middle = (multiples[:-1] + 0.5) * steps
        close = np.abs(middle) * 2.0**-50
        ends[1:-1] = places = row.searchsorted(middle - close)
        after = row[np.minimum(places, len(row) - 1)]
        tied = (places < len(row)) & (after <= middle + close)
        tied &= np.rint(after * (1 / steps)) <= multiples[:-1]  # as `_multiples` rounds
        ends[1:-1][tied] = row.searchsorted(after[tied], "right")
        moment = np.diff(moments[ends], axis=0) * multiples
        weight = np.diff(ends if weights is None else weights[ends], axis=0) * (multiples * multiples)
        return np.add.reduce(moment, axis=0), np.add.reduce(weight, axis=0)

    return sums


def best_pow2_step(values, mass, largest, *, num_levels) -> Any:
    """Returns the power-of-two step of least squared error."""
    del largest  # less than 4, in units of the row's scale
    steps = namespace(values).asarray(powers(3 - (num_levels - 1).bit_length()))

    def option(i) -> tuple[Any, Any]:
        return squared_error(values, mass, steps[i] * _multiples(values, steps[i], num_levels)), steps[i]

    return of_least(option, 0, steps.size, values)


def powers(top: int) -> np.ndarray:
    """Returns powers of two from 2^top downwards."""
    return 2.0 ** (top - np.arange(_POW2_DEPTH + 1))
