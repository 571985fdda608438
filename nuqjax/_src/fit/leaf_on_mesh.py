"""Fits levels to a leaf that is distributed over a mesh, where its values are: no device receives the whole leaf."""

from typing import Any

import jax

from nuqjax._src.knq.run.mesh import fit_on_mesh
from nuqjax._src.leaf.assign import Fit


def fit_leaf_on_mesh(
    array: jax.Array,
    importance: Any,
    num_levels: int,
    *,
    stack_axes: int,
    axes: tuple[int, ...],
    by_channel: bool,
    keep_zero: bool,
    tolerance: float | None,
) -> Fit:
    """Fits `knq` levels to a leaf, one codebook for each slice or for each output channel of a slice.

    Devices exchange counts and sums of their values, or whole rows if these have fewer than 65,536 float values. The
    levels are bit for bit those of the same leaf on one device. With a `tolerance`, rows that are short, or that one
    device holds whole, are copied to the host a few at a time; of other rows it gets counts and sums (`run.mesh`).

    Args:
      array: `[*S, …]` with a `NamedSharding`.
      importance: non-negative, of the same shape, or None.
      num_levels: K.
      stack_axes: number of leading axes S.
      axes: output axes of a slice.
      by_channel: whether each output channel has its own levels.
      keep_zero: as in `fit`.
      tolerance: as in `fit`.

    Returns:
      A `Fit` with as many rows as there are codebooks.
    """
    outputs = [stack_axes + axis for axis in axes] if by_channel else []
    of_rows = (*range(stack_axes), *outputs)
    fitted = fit_on_mesh(
        array, importance, None, of_rows, num_levels=num_levels, keep_zero=keep_zero, tolerance=tolerance
    )  # fmt: skip
    return Fit(*(x.reshape(-1, *x.shape[len(of_rows) :]) for x in fitted))
