"""Turns a parameter tree into the same tree with `CodebookArray` leaves.

For each leaf: choose (`plan`) → view as rows (`rows`) → fit levels (`fit`) → round them to their format
(`fixed_point`) → assign against the *rounded* levels (`assign`) → pack (`packing`) → `CodebookArray`.
"""

import difflib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nuqjax._src.compress.leaf import compress_leaf
from nuqjax._src.compress.plan import LeafPlan, Plan, plan_leaves
from nuqjax._src.compress.rules import Options
from nuqjax._src.compress.view import from_host
from nuqjax._src.leaf import rows
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import path_name, printable
from nuqjax._src.store.compared import build_report


def compress_tree(
    params: Any, options: Options, rules: Any, sensitivity: Any, *, return_report: bool, progress: bool
) -> Any:
    """Implements `nuqjax.compress` without data; warnings name the place that calls `nuqjax.compress`.

    Args:
      params: any pytree.
      options: the options that apply where no rule says otherwise.
      rules: `Rule`s, or a single one.
      sensitivity: a tree like `params` of importances, or None.
      return_report: return `(cparams, Report)`.
      progress: show a progress bar.
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=is_codebook_array)
    plans = plan_leaves(params, options, rules)
    check_arrays(leaves, plans)
    notes = Plan(tuple(plans)).notes
    for note in notes:
        warnings.warn(f"compress: {note}", stacklevel=3)
    importances = _importances(sensitivity, plans)
    results, fits, tied = [], {}, {}
    for leaf, plan in _with_progress(list(zip(leaves, plans, strict=True)), progress):
        if plan.reason is None:
            importance = importances.get(plan.path)
            same = id(leaf), id(importance), repr(plan.options)  # an array at two paths, such as a tied embedding
            if same not in tied:
                tied[same] = compress_leaf(leaf, importance, plan)
            leaf, certificate = tied[same]
            fits[plan.path] = (plan.options.method, certificate)
        results.append(leaf)
    cparams = structure.unflatten(results)
    if not return_report:
        return cparams
    reasons = {plan.path: plan.reason for plan in plans if plan.reason is not None}
    return cparams, build_report(params, cparams, reasons, fits, notes)


def check_arrays(leaves: Sequence[Any], plans: Sequence[LeafPlan]) -> None:
    """Raises ValueError for a leaf that is a shape without values."""
    for leaf, plan in zip(leaves, plans, strict=True):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{plan.path}: a ShapeDtypeStruct, but compress needs values; from shapes, nuqjax.plan(params) shows "
                "what it would do, and jax.eval_shape(nuqjax.compress, params) what it would return"
            )


def _importances(sensitivity: Any, plans: Sequence[LeafPlan]) -> dict[str, Any]:
    """Returns the importances by path, checked against the leaves."""
    if sensitivity is None:
        return {}
    flat, _ = jax.tree_util.tree_flatten_with_path(sensitivity)
    given = {path_name(path): leaf for path, leaf in flat}
    shapes = {plan.path: plan.shape for plan in plans}
    result = {}
    for path, importance in given.items():
        if path not in shapes:
            near = difflib.get_close_matches(path, shapes, n=3, cutoff=0.4)
            nearest = f"; the nearest paths are {', '.join(map(repr, near))}" if near else ""
            raise ValueError(f"sensitivity has a leaf {path!r} that the parameters do not have{nearest}")
        shape = shapes[path]
        if jnp.shape(importance) != shape:
            raise ValueError(f"{path}: sensitivity of shape {jnp.shape(importance)}, but the leaf has shape {shape}")
        result[path] = importance = from_host(importance)
        if not isinstance(importance, jax.core.Tracer) and jnp.issubdtype(importance.dtype, np.number):
            xp = rows.namespace(importance)
            bad = ~(xp.isfinite(importance) & (importance >= 0))
            if bad.any():
                first = np.unravel_index(int(np.argmax(bad)), shape)
                raise ValueError(
                    f"{path}: {int(bad.sum())} sensitivities are negative, NaN or infinite, the first "
                    f"{float(np.asarray(importance)[first])} at {[int(i) for i in first]}"
                )
    return result


def _with_progress(work: Sequence[tuple[Any, LeafPlan]], show: bool) -> Iterable[tuple[Any, LeafPlan]]:
    """Returns the work, leaf by leaf; if `show`, under a progress bar that counts weights."""
    return _progress_bar(work) if show else work


def _progress_bar(work: Sequence[tuple[Any, LeafPlan]]) -> Iterator[tuple[Any, LeafPlan]]:
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    from nuqjax._src.report.bars import progress_bars

    total = sum(math.prod(plan.shape) for _, plan in work if plan.reason is None)
    text = TextColumn("{task.completed:,.0f} of {task.total:,.0f} weights, {task.fields[rate]}")
    names = TextColumn("{task.description}", markup=False)
    with progress_bars(names, BarColumn(), text, TimeRemainingColumn()) as bar:
        task = bar.add_task("compress", total=total, rate="")
        for leaf, plan in work:
            bar.update(task, description=printable(plan.path), refresh=True)
            yield leaf, plan
            if plan.reason is None:
                bar.advance(task, math.prod(plan.shape))
                speed = bar.tasks[0].speed
                bar.update(task, rate=f"{speed:,.0f}/s" if speed else "")
