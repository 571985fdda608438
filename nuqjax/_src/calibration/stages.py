"""The stages of the solver: evaluate a solution, and improve its indices, levels and scales."""

from typing import Any, NamedTuple

import numpy as np

from nuqjax._src.calibration.level_formats import rounded_levels, rounded_scale, scale_dtype
from nuqjax._src.calibration.places import Places
from nuqjax._src.calibration.squares import least_squares
from nuqjax._src.calibration.sweeps import Choice, sweep

_LEVEL_STEPS = 4  # steps of conjugate gradients in a round; the next round continues from the result


class State(NamedTuple):
    """A solution in the order of visit, with its errors and costs."""

    levels: np.ndarray  # [R, K] float32
    scale: np.ndarray | None  # [O · S] float32
    indices: np.ndarray  # [G, I, P] uint8
    errors: np.ndarray  # [G, I, P] w − ŵ
    pull: np.ndarray  # [G, I, P] H (w − ŵ)
    cost: np.ndarray  # [G, P] (w − ŵ) H (w − ŵ)ᵀ


class Task(NamedTuple):
    """The data that all stages share, in units that keep weights and moments within the range of float32."""

    weights: np.ndarray  # [G, I, P] float32
    hessian: np.ndarray  # [G, I, I] float32
    places: Places
    held_zeros: np.ndarray | None  # [G, I, P] bool: held zeros, weights of exactly 0 that stay 0
    codebook_format: Any
    dtype: np.dtype
    level_unit: float  # factor of the stored levels
    scale_unit: float  # factor of the stored scales; the weights were divided by the product of both factors
    form: str = "free"  # what refit may change of the levels, as `form_of` tells


def form_of(method: str) -> str:
    """Returns what refit may change of a method's levels.

    `"free"`: each level (those of `knq` and `enq` are means of the weights that they represent). `"grid"`: middle and
    step of levels at equal distances. `"fixed"`: nothing; only scales are refitted.

    >>> form_of("uniform")
    'grid'
    """
    return {"knq": "free", "enq": "free", "uniform": "grid"}.get(method, "fixed")


def stored_levels(task: Task, levels: np.ndarray) -> np.ndarray:
    """Returns levels rounded to their stored format, in the units of the solver."""
    stored = rounded_levels(levels * task.level_unit, task.codebook_format, task.dtype)
    return (stored / task.level_unit).astype(np.float32)


def stored_scale(task: Task, scale: np.ndarray) -> np.ndarray:
    """Returns scales rounded to their stored dtype, in the units of the solver."""
    stored = rounded_scale(scale * task.scale_unit, scale_dtype(task.codebook_format, task.dtype))
    return (stored / task.scale_unit).astype(np.float32)


class Prices(NamedTuple):
    """The prices of indices, which are added to their errors.

    Attributes:
      of_index: `[K]` float32, the price of each index in units of the error.
      squares: `[G, I]` the factor that turns a squared distance from a target into an error.
    """

    of_index: np.ndarray
    squares: np.ndarray


def nearest(task: Task, levels: np.ndarray, scale: np.ndarray | None, prices: Prices | None = None) -> Choice:
    """Returns a function that chooses the level nearest to a target, the lower one of two equally near.

    With prices it chooses among some levels the one of least error plus price.
    """
    places, (count, num_levels) = task.places, levels.shape
    flat, cuts = levels.reshape(-1), (levels[:, :-1] + levels[:, 1:]) / 2
    zero = (levels == 0).argmax(axis=1)

    def find(target: np.ndarray, book: np.ndarray) -> np.ndarray:
        if count == 1:
            return cuts[0].searchsorted(target)
        index = np.zeros(target.shape, np.intp)
        for step in reversed(range(num_levels.bit_length() - 1)):
            index += (target > cuts[book, index + ((1 << step) - 1)]).astype(np.intp) << step
        return index

    def choose(j: int, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        book = places.book_of_output + places.book_of_input[:, j, None]
        factor = 1 if scale is None else scale[places.scale_of_output + places.scale_of_input[:, j, None]]
        target = target if scale is None else target / np.where(factor > 0, factor, 1)
        index = find(target, book)
        if prices is not None:
            weight = np.maximum(prices.squares[:, j, None] * np.square(factor), np.finfo(np.float32).tiny)
            index = _cheaper(index, target, flat, book * num_levels, prices.of_index, weight)
        if task.held_zeros is not None:
            index = np.where(task.held_zeros[:, j], zero[book], index)
        return index, flat[book * num_levels + index] * factor

    return choose


_NEIGHBOURS = 1  # more are never better where levels are spaced like these (`experiments.speed.constants`)


def _cheaper(
    index: np.ndarray, target: np.ndarray, levels: np.ndarray, start: np.ndarray, prices: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Returns the best of the nearest level, the cheapest level, and a few levels from the nearest to the cheapest."""
    cheapest = int(prices.argmin())
    away = np.abs(cheapest - index)
    toward = np.sign(cheapest - index)
    best, least = index, np.full(target.shape, np.inf)
    for steps in (*range(_NEIGHBOURS + 1), len(prices)):
        other = index + toward * np.minimum(away, steps)
        cost = weight * np.square(target - levels[start + other]) + prices[other]
        lower = cost < least
        best, least = np.where(lower, other, best), np.where(lower, cost, least)
    return best


def book_of(places: Places) -> np.ndarray:
    """Returns the number of each weight's codebook, `[G, I, P]`."""
    return places.book_of_output[:, None, :] + places.book_of_input[:, :, None]


def scale_of(places: Places) -> np.ndarray:
    """Returns the number of each weight's scale, `[G, I, P]`."""
    return places.scale_of_output[:, None, :] + places.scale_of_input[:, :, None]


def _factors(task: Task, scale: np.ndarray | None) -> np.ndarray:
    """Returns the factors that multiply the levels of the weights, in a shape that broadcasts to `[G, I, P]`."""
    if scale is None:
        return np.ones((1, 1, 1), np.float32)
    if task.places.scales == 1:
        return scale[task.places.scale_of_output][:, None, :]
    return scale[scale_of(task.places)]


def evaluated(task: Task, levels: np.ndarray, scale: np.ndarray | None, indices: np.ndarray) -> State:
    values = levels.reshape(-1)[book_of(task.places) * levels.shape[1] + indices] * _factors(task, scale)
    errors = task.weights - values
    pull = task.hessian @ errors
    cost = np.maximum((errors * pull).sum(axis=1, dtype=np.float64), 0)
    return State(levels, scale, indices, errors, pull, cost)


def better_indices(one: State, other: State) -> State:
    """Returns the better of two solutions with the same levels and scales, for each output in each group separately."""
    lower = other.cost < one.cost
    return other if lower.all() else _mixed(one, other, lower)


def better_values(one: State, other: State, system: np.ndarray, systems: int) -> State:
    """Returns the better of two solutions for each system of outputs, `system` `[G, P]`, with its levels and scales."""
    lower = np.bincount(system.reshape(-1), (other.cost - one.cost).reshape(-1), systems) < 0
    if lower.all():
        return other

    def of_systems(a: Any, b: Any) -> Any:
        if a is b:
            return a
        return np.where(np.repeat(lower, len(a) // systems).reshape(-1, *[1] * (a.ndim - 1)), b, a)

    mixed = _mixed(one, other, lower[system])
    levels, scale = of_systems(one.levels, other.levels), of_systems(one.scale, other.scale)
    return mixed._replace(levels=levels, scale=scale)


def _mixed(one: State, other: State, lower: np.ndarray) -> State:
    each = lower[:, None, :]
    return one._replace(
        indices=np.where(each, other.indices, one.indices),
        errors=np.where(each, other.errors, one.errors),
        pull=np.where(each, other.pull, one.pull),
        cost=np.where(lower, other.cost, one.cost),
    )


def refitted(task: Task, state: State, descent: np.ndarray) -> State:
    """Runs one round of refit: improves levels, then scales, then indices."""
    state = with_better_values(task, state)
    indices, _ = sweep(task.weights, descent, nearest(task, state.levels, state.scale), state.errors)
    return better_indices(state, evaluated(task, state.levels, state.scale, indices))


def with_better_values(task: Task, state: State) -> State:
    """Improves levels, then scales, by least squares for the current indices."""
    places = task.places
    steps = {"free": [_with_better_levels], "grid": [_with_better_middle, _with_better_step], "fixed": []}
    for better in steps[task.form]:
        state = better_values(state, better(task, state), places.system, places.systems)
    if state.scale is None:
        return state
    return better_values(state, _with_better_scales(task, state), places.output, _outputs(places))


def _outputs(places: Places) -> int:
    return places.output.size // places.stretches


def _with_better_levels(task: Task, state: State) -> State:
    num_levels = state.levels.shape[1]
    books = book_of(task.places)
    held = None if task.held_zeros is None else state.levels.reshape(-1) == 0
    found = least_squares(
        state.levels.reshape(-1), books * num_levels + state.indices, _factors(task, state.scale), state.pull,
        task.hessian, systems=task.places.systems, steps=_LEVEL_STEPS, held=held,
    )  # fmt: skip
    levels = stored_levels(task, found.reshape(state.levels.shape))
    order = np.argsort(levels, axis=1, kind="stable")
    rank = np.argsort(order, axis=1).astype(np.uint8)
    indices = rank.reshape(-1)[books * num_levels + state.indices]
    return evaluated(task, np.take_along_axis(levels, order, axis=1), state.scale, indices)


def _with_better_middle(task: Task, state: State) -> State:
    """Moves grids by least squares, unless one of their levels is to stay 0."""
    if task.held_zeros is not None:
        return state
    moved = _least_squares_of_grids(task, state, np.zeros(task.places.books), np.ones(1, np.float32))
    return evaluated(task, stored_levels(task, state.levels + moved[:, None]), state.scale, state.indices)


def _with_better_step(task: Task, state: State) -> State:
    """Widens or narrows grids by least squares, around their middle or the level that is to stay 0."""
    num_levels = state.levels.shape[1]
    still = (num_levels - 1) / 2 if task.held_zeros is None else num_levels // 2
    place = (np.arange(num_levels) - still).astype(np.float32)
    step = (state.levels[:, -1] - state.levels[:, 0]).astype(np.float64) / (num_levels - 1)
    middle = state.levels.mean(axis=1, dtype=np.float64) if task.held_zeros is None else np.zeros(len(step))
    found = np.clip(_least_squares_of_grids(task, state, step, place), 0.3 * step, 3 * step)  # as scales
    levels = stored_levels(task, middle[:, None] + found[:, None] * place)
    return evaluated(task, levels, state.scale, state.indices)


def _least_squares_of_grids(task: Task, state: State, values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Returns one number x for each codebook, such that levels which contain x · `place` lower the error."""
    factors = _factors(task, state.scale) * (place[state.indices] if place.size > 1 else place)
    several = min(task.places.books // task.places.systems, _LEVEL_STEPS)
    return least_squares(
        values, book_of(task.places), factors, state.pull, task.hessian, systems=task.places.systems, steps=several
    )


def _with_better_scales(task: Task, state: State) -> State:
    assert state.scale is not None
    values = state.levels.reshape(-1)[book_of(task.places) * state.levels.shape[1] + state.indices]
    found = least_squares(
        state.scale, scale_of(task.places), values, state.pull, task.hessian,
        systems=_outputs(task.places), steps=min(task.places.scales, _LEVEL_STEPS),
    )  # fmt: skip
    # A scale that changes sign or grows without bound fits only the current indices, which are about to change.
    scale = np.clip(found, state.scale * np.float32(0.3), state.scale * np.float32(3)).astype(np.float32)
    return evaluated(task, state.levels, stored_scale(task, scale), state.indices)
