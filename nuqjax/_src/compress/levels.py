"""Fits the levels of a leaf, with a certificate: on the host, while tracing, or on the mesh that holds the leaf."""

from functools import partial
from typing import Any

import jax
import jax.core
import numpy as np

from nuqjax._src.compress.plan import LeafPlan
from nuqjax._src.compress.rules import Options
from nuqjax._src.compress.view import View
from nuqjax._src.fit.leaf_on_mesh import fit_leaf_on_mesh
from nuqjax._src.fit.methods import fit, levels_on_host
from nuqjax._src.leaf import rows


@partial(jax.jit, static_argnames=("num_levels", "method", "keep_zero", "tolerance"))
def _jit_levels(rows, num_levels, **options) -> jax.Array:
    """Returns the levels alone, so that XLA omits what only their error needs."""
    return fit(rows, num_levels, **options).levels


def fit_on_mesh(array: Any, importance: Any, plan: LeafPlan) -> tuple[jax.Array, float | None] | None:
    """As `fit_view`, for a leaf on a mesh, without moving its values; None if it must be arranged in rows first."""
    options = plan.options
    if not rows.on_mesh(array) or options.method != "knq" or options.scale is not None:
        return None
    if options.granularity not in ("tensor", "channel"):
        return None
    tolerance = options.tolerance if array.is_fully_addressable else None  # no process sees all bounds
    fitted = fit_leaf_on_mesh(
        array, importance, 2**options.bits, stack_axes=options.stack_axes, axes=plan.axes,
        by_channel=options.granularity == "channel", keep_zero=options.keep_zero, tolerance=tolerance,
    )  # fmt: skip
    return fitted.levels, None if tolerance is None else certificate_of(fitted)


def fit_view(view: View, num_levels: int, options: Options) -> tuple[Any, float | None]:
    """Returns the levels `[S·R, K]`, in NumPy where the rows are, and the leaf's certificate if it is requested."""
    values, traced = view.values, isinstance(view.values, jax.core.Tracer)
    tolerance = None if traced else options.tolerance  # a certificate is a number, which a trace does not have
    given = {"method": options.method, "keep_zero": options.keep_zero, "tolerance": tolerance}
    if options.method == "knq" or traced:
        fitted = fit(values, num_levels, weights=view.weights, mask=view.mask, **given)
        proven = options.method == "knq" and tolerance is not None
        levels = np.asarray(fitted.levels) if isinstance(values, np.ndarray) else fitted.levels
        return levels, certificate_of(fitted) if proven else None
    if not isinstance(values, np.ndarray):
        return _jit_levels(values, num_levels, weights=view.weights, mask=view.mask, **given), None
    levels = levels_on_host(
        values, num_levels, options.method, weights=view.weights, mask=view.mask, keep_zero=options.keep_zero
    )
    return levels, None


def certificate_of(fitted) -> float:
    """Returns the relative gap Σ (sse − lower_bound) / Σ sse over a leaf's rows."""
    scale = np.asarray(fitted.scale, np.float64) ** 2
    sse = float((np.asarray(fitted.sse, np.float64) * scale).sum())
    bound = float((np.asarray(fitted.lower_bound, np.float64) * scale).sum())
    return (sse - bound) / sse if sse > 0 else 0.0
