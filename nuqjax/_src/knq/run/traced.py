"""Rows fitted by XLA: traced rows, rows on devices other than a CPU, and parts of rows on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nuqjax._src.knq.rows.sorted import LONG
from nuqjax._src.knq.run.levels import FitOptions, dense_cuts, fit_sorted, ordered_rows, row_length
from nuqjax._src.knq.run.light import settled
from nuqjax._src.leaf.assign import Fit, distortion, row_scale, working_dtype
from nuqjax._src.platform.host import x64


def fit_knq_part(
    rows: jax.Array,
    num_levels: int,
    weights: jax.Array | None,
    mask: jax.Array | None,
    *,
    keep_zero: bool,
    tolerance: float | None,
    count: int,
    axes: tuple[str, ...] = (),
) -> Fit:
    """Fits one device's part of rows on a mesh as `knq.knq` fits whole rows, inside `jax.shard_map`.

    Args:
      rows: `[R, n]` this device's part.
      num_levels: K.
      weights: `[R, n]` or None.
      mask: `[R, n]` or None.
      keep_zero: as in `knq.knq`.
      tolerance: as in `knq.knq`.
      count: number of rows on all devices.
      axes: names of the mesh axes over which the values of a row are distributed; every device along them returns the
        same. For rows longer than 65,536 values, or of 16-bit values, devices exchange only counts and sums.
    """
    options = FitOptions(num_levels, keep_zero, tolerance, dense_cuts(count, row_length(rows, axes)))
    return fit_traced(rows, weights, mask, options, working_dtype(rows.dtype), axes)


def fit_traced(rows, weights, mask, options: FitOptions, dtype, axes=()) -> Fit:
    """Fits JAX rows `[R, N]`, traced or not; with `axes`, parts of rows that are distributed over these mesh axes."""
    scale = row_scale(rows, mask)
    scale = lax.pmax(scale, axes) if axes else scale
    rows = jnp.where(jnp.abs(rows) < float(jnp.finfo(dtype).tiny), 0, rows)
    inputs = [x for x in (rows, scale, weights, mask) if x is not None]

    def one(inputs) -> tuple[Any, Any]:
        given = iter(inputs)
        values, unit = next(given), lax.convert_element_type(next(given), jnp.float64)
        heavy = None if weights is None else next(given)
        counted = None if mask is None else next(given)
        ordered = ordered_rows(values, dtype, unit, heavy, counted, options.keep_zero, axes=axes)
        levels, bound = fit_sorted(ordered, options)
        if heavy is not None:
            heavy = lax.convert_element_type(heavy, jnp.float64)
            heaviest = jnp.max(heavy if counted is None else jnp.where(counted, heavy, 0.0), axis=1)
            bound = bound * (lax.pmax(heaviest, axes) if axes else heaviest)
        return levels, bound

    length = row_length(rows, axes)
    with x64():
        # As many rows at once as need some 8 MiB; long rows are handled one at a time.
        chunk = 1 if length > LONG else min(max(1, 2**20 // min(length, options.dense_cuts) ** 2), rows.shape[0])
        whole = rows.shape[0] // chunk * chunk
        grouped = [x[:whole].reshape(-1, chunk, *x.shape[1:]) for x in inputs]
        levels, bound = lax.map(one, grouped)
        levels, bound = levels.reshape(whole, -1), bound.reshape(whole)
        if whole < rows.shape[0]:
            rest = one([x[whole:] for x in inputs])
            levels, bound = jnp.concatenate([levels, rest[0]]), jnp.concatenate([bound, rest[1]])
        levels = (levels * lax.convert_element_type(scale, jnp.float64)[:, None]).astype(dtype)
        bound = lax.convert_element_type(bound, dtype)
    if weights is not None:
        levels = settled(rows, levels, weights, mask, scale, options.keep_zero, axes)
    unit = 1 / scale[:, None]
    error = distortion(rows.astype(dtype) * unit, levels * unit, weights, mask)
    error = lax.psum(error, axes) if axes else error
    bound = jnp.nextafter(jnp.minimum(bound, error), jnp.zeros_like(bound))
    return Fit(levels, error, bound, scale)
