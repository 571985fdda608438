"""Which product with a stored matrix `[O, I]` a `dot_general` is.

A compressed leaf reaches the dot through transposes and reshapes. They are followed as strides over the positions
o·I + i of the stored order, so that nothing is decoded to find out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.extend import core

from nuqjax._src.kernels.products import Over
from nuqjax._src.leaf import rows
from nuqjax._src.leaf.codebook_array import CodebookArray


class View(NamedTuple):
    """An array whose axes run over the stored positions in steps of `strides`."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Contraction(NamedTuple):
    """A product of an array with the matrix.

    Attributes:
      over: the axis of the matrix that is summed over.
      order: the order of the array's axes that makes the summed ones last, and as the matrix has them.
      shape: the shape of the result of `product`, in axes.
      result: the order of these axes that makes the result of the `dot_general`.
    """

    over: Over
    order: tuple[int, ...]
    shape: tuple[int, ...]
    result: tuple[int, ...]


def view_of(leaf: CodebookArray, pending: Sequence[core.JaxprEqn]) -> View | None:
    """Returns the view of a leaf without stack axes after some equations; None if it is no such view."""
    shape, stored = leaf.slice_shape, [*leaf.axes, *(a for a in range(len(leaf.slice_shape)) if a not in leaf.axes)]
    strides = dict(zip(stored, _contiguous([shape[a] for a in stored]), strict=True))
    view: View | None = View(shape, tuple(strides[a] for a in range(len(shape))))
    for eqn in pending:
        view = None if view is None else _moved(eqn, view)
    return view


def contraction_of(
    leaf: CodebookArray, view: View, shape: Sequence[int], eqn: core.JaxprEqn, is_left: bool
) -> Contraction | None:
    """Returns the product that a `dot_general` of a leaf's view and an array of a shape is; None if it is none."""
    summed, batched = eqn.params["dimension_numbers"]
    if any(batched) or 0 in shape or 0 in view.shape:
        return None
    mine, others = summed if is_left else summed[::-1]
    free = [a for a in range(len(view.shape)) if a not in mine]
    outputs, inputs = rows.channel_shape(leaf.slice_shape, leaf.axes)
    ways: dict[Over, tuple[Sequence[int], Sequence[int]]] = {"inputs": (mine, free), "outputs": (free, mine)}
    fitting: list[Over] = [
        over
        for over, (of_inputs, of_outputs) in ways.items()
        if _covers(view, of_inputs, inputs, 1) and _covers(view, of_outputs, outputs, inputs)
    ]
    if not fitting:
        return None
    left = [a for a in range(len(shape)) if a not in others]
    by_stride = sorted(range(len(mine)), key=lambda n: (-view.strides[mine[n]], view.shape[mine[n]]))
    kept = sorted(free, key=lambda a: (-view.strides[a], view.shape[a]))
    first = [len(left) + kept.index(a) for a in free]
    result = [*first, *range(len(left))] if is_left else [*range(len(left)), *first]
    return Contraction(
        fitting[0],
        (*left, *(others[n] for n in by_stride)),
        (*(shape[a] for a in left), *(view.shape[a] for a in kept)),
        tuple(result),
    )


def _covers(view: View, axes: Sequence[int], size: int, step: int) -> bool:
    """Returns whether axes of a view run together over `size` positions of the matrix, `step` stored ones apart."""
    taken = sorted((view.strides[a], view.shape[a]) for a in axes if view.shape[a] > 1)
    for stride, length in taken:
        if stride != step:
            return False
        step *= length
        size, rest = divmod(size, length)
        if rest:
            return False
    return size == 1


def _contiguous(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[n + 1 :]) for n in range(len(shape))]


def _moved(eqn: core.JaxprEqn, view: View) -> View | None:
    """Returns the view after an equation that moves or casts values; None if it is no view, or another equation."""
    params = eqn.params
    match eqn.primitive.name:
        case "copy":
            return view
        case "convert_element_type" if jax.numpy.issubdtype(params["new_dtype"], np.floating):
            return view
        case "transpose":
            return View(*(tuple(part[a] for a in params["permutation"]) for part in view))
        case "squeeze":
            kept = [a for a in range(len(view.shape)) if a not in params["dimensions"]]
            return View(*(tuple(part[a] for a in kept) for part in view))
        case "reshape" if params.get("dimensions") is None:
            return _reshaped(view, params["new_sizes"])
        case "broadcast_in_dim" if math.prod(params["shape"]) == math.prod(view.shape):
            strides = dict(zip(params["broadcast_dimensions"], view.strides, strict=True))
            return View(tuple(params["shape"]), tuple(strides.get(a, 0) for a in range(len(params["shape"]))))
    return None


def _reshaped(view: View, shape: Sequence[int]) -> View | None:
    """Returns a view in another shape, or None where its strides do not allow it."""
    if 0 in shape or 0 in view.shape:
        return None
    runs: list[tuple[int, int]] = []  # (length, stride) of axes, neighbours merged where one goes on in the other
    for length, stride in zip(view.shape, view.strides, strict=True):
        if length == 1:
            continue
        if runs and runs[-1][1] == length * stride:
            runs[-1] = (runs[-1][0] * length, stride)
        else:
            runs.append((length, stride))
    strides = []
    for length in reversed(shape):
        if length == 1:
            strides.append(0)
            continue
        if not runs or runs[-1][0] % length:
            return None
        left, stride = runs.pop()
        strides.append(stride)
        if left > length:
            runs.append((left // length, stride * length))
    return View(tuple(shape), tuple(reversed(strides)))
