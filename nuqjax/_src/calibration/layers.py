"""Compresses one leaf to a `CodebookArray` by its moments."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from nuqjax._src.calibration.problem import Problem, Solution, shrunk, target
from nuqjax._src.calibration.second_moments import LeafMoments
from nuqjax._src.calibration.solver import quantize
from nuqjax._src.compress.leaf import compress_leaf, leaf_of
from nuqjax._src.compress.plan import LeafPlan
from nuqjax._src.compress.view import check_finite
from nuqjax._src.leaf import rows
from nuqjax._src.leaf.codebook_array import CodebookArray
from nuqjax._src.leaf.shardings import shardings
from nuqjax._src.platform.host import native_dtype


class Solved(NamedTuple):
    """A compressed leaf, and how it was made.

    Attributes:
      leaf: the compressed leaf.
      method: the method that fitted its levels and indices.
      errors: the layer's squared error after each stage, summed over slices; empty if at most a diagonal is known.
      certificate: the certificate of a proven fit, else None.
      code_bits: total bits of the indices after entropy coding.
    """

    leaf: CodebookArray
    method: str
    errors: dict[str, float]
    certificate: float | None
    code_bits: float

    @property
    def error(self) -> float:
        """The layer's final squared error (with a rate, the sum of the error and the cost of the code)."""
        return list(self.errors.values())[-1] if self.errors else 0.0


def problems(array: np.ndarray, plan: LeafPlan, found: LeafMoments, cross: np.ndarray | None = None) -> list[Problem]:
    """Returns the layer-wise problem of each slice of a leaf; with cross moments, that of its `target`."""
    slices = array.reshape(-1, *plan.slice_shape)
    groups = found.mean.shape[-2]
    second = found.second.reshape(len(slices), groups, *found.second.shape[found.mean.ndim - 1 :])
    crossed = [None] * len(slices) if cross is None else cross.reshape(second.shape)
    positions = max(1, round(found.positions))
    made = []
    for one, moment, other in zip(slices, second, crossed, strict=True):
        hessian = shrunk(moment.reshape(-1, *moment.shape[-2:]), found.images, positions).reshape(moment.shape)
        weights = np.ascontiguousarray(rows.to_channels(one, plan.axes))
        if other is not None:
            moved = target(weights, moment, other, _ridged(hessian)).astype(weights.dtype)
            weights = np.where(weights == 0, weights, moved) if plan.options.keep_zero else moved
        made.append(Problem(weights, hessian))
    return made


def _ridged(hessian: np.ndarray) -> np.ndarray:
    size = hessian.shape[-1]
    return hessian + RIDGE * np.einsum("...ii->...", hessian)[..., None, None] / max(size, 1) * np.eye(size)


RIDGE = 1.0  # of the mean of the diagonal; with 0.1 weights follow what few inputs show by chance


def solved(
    leaf: Any, plan: LeafPlan, found: LeafMoments | None, *, cross: np.ndarray | None = None, **stages: Any
) -> Solved:
    """Compresses the leaf for small output error, or by its weights alone if there are no moments.

    Args:
      leaf: the dense leaf.
      plan: its options.
      found: its moments; with None the result is that of `compress` without data.
      cross: moments E[f xᵀ], laid out as `found.second`, where f is what the leaf multiplies in the float function.
      **stages: `feedback`, `refit` and `rate` of `quantize`.

    Raises:
      ValueError: a value is NaN or infinite. The message names the leaf.
    """
    if found is None or 0 in plan.shape:
        return _swapped(compress_leaf(leaf, None, plan), plan.options.method)
    array = np.asarray(leaf)
    check_finite(array, plan.path)
    if found.is_diagonal:
        importance = _importance(plan, found)
        return _swapped(compress_leaf(array, importance, plan), f"{plan.options.method}, weighted")
    array = array.astype(native_dtype(array.dtype), copy=False)
    options = plan.options
    given = {"bits": options.bits, "granularity": options.granularity, "scale": options.scale} | stages
    given |= {"method": options.method, "keep_zero": options.keep_zero}
    each = problems(array, plan, found, cross)
    made = [quantize(problem, codebook_format=options.codebook_format, **given) for problem in each]
    made = _of_one_format(each, made, given)
    scale = None if made[0].scale is None else np.stack([one.scale for one in made if one.scale is not None])
    levels, indices = np.stack([one.levels for one in made]), np.stack([one.indices for one in made])
    result = leaf_of(plan, levels, indices, scale, made[0].codebook_format)
    if rows.on_mesh(leaf):
        result = jax.device_put(result, shardings(result, leaf.sharding))
    names = list(dict.fromkeys(name for one in made for name in one.errors))
    errors = {name: math.fsum(_after(one, names, name) for one in made) for name in names}
    start = options.method if stages.get("rate") is None else "rated"
    method = "+".join([start, *(name for name in names if name != "nearest")])
    return Solved(result, method, errors, None, sum(one.bits_per_weight * one.indices.size for one in made))


def _swapped(made: tuple[CodebookArray, float | None], method: str) -> Solved:
    leaf, certificate = made
    return Solved(leaf, method, {}, certificate, float(leaf.size * leaf.bits))


def _after(solution: Solution, names: list[str], name: str) -> float:
    """Returns the error after a stage; if the stage was left out, the error after the last one before it."""
    return next(solution.errors[n] for n in names[names.index(name) :: -1] if n in solution.errors)


def _of_one_format(each: list[Problem], made: list[Solution], given: dict[str, Any]) -> list[Solution]:
    """Returns solutions whose levels have one format in all slices: the one with the widest range."""
    fracs = {one.codebook_format.frac for one in made if hasattr(one.codebook_format, "frac")}
    if len(fracs) < 2:
        return made
    widest = next(one.codebook_format for one in made if one.codebook_format.frac == min(fracs))
    return [
        one if one.codebook_format == widest else quantize(problem, codebook_format=widest, **given)
        for problem, one in zip(each, made, strict=True)
    ]


def _importance(plan: LeafPlan, found: LeafMoments) -> np.ndarray:
    """Returns the importance of each value of a leaf, in its shape: the mean square of what it multiplies.

    Other inputs may look up a table's entry that these never did: it counts half as much as an average one.
    """
    second = found.second.reshape(-1, *found.second.shape[-2:])
    floor = 1.0 if found.look_up else 0.01
    mean = second.mean(axis=-1, keepdims=True)
    weights = second / np.where(mean > 0, mean, 1) + floor
    outputs = rows.channel_shape(plan.slice_shape, plan.axes)[0]
    of_channels = np.repeat(weights, outputs // weights.shape[1], axis=1).astype(np.float32)
    dense = [rows.from_channels(one, plan.slice_shape, plan.axes) for one in of_channels]
    return np.stack(dense).reshape(plan.shape)
