"""Compression of the leaves in the order of their use, each with the inputs that those before it leave it.

Compressed leaves change what later ones multiply. Here a later leaf's moments are those of its inputs x in the
compressed function, and its weights W are replaced, before they are compressed, by those that come closest to the float
outputs: W* = W C H⁻¹ with H = E[x xᵀ] and C = E[f xᵀ], where f are the inputs in the float function.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from nuqjax._src.calibration.biases import with_offsets
from nuqjax._src.calibration.layers import Solved, solved
from nuqjax._src.calibration.pairs import gather_pair
from nuqjax._src.calibration.programs import Programs
from nuqjax._src.calibration.second_moments import LeafMoments
from nuqjax._src.compress.plan import LeafPlan
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.codebooks import decompress

_STAGES = 8  # groups of leaves, each with a pass of both functions over the batches


def stages_of(order: Sequence[str], groups: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    """Splits leaves in their order of use into stages: of about equal numbers, none with leaves of two groups.

    >>> [sorted(stage) for stage in stages_of("abcdefghijkl", [frozenset("abcdefghijkl")])][:3]
    [['a'], ['b', 'c'], ['d']]
    """
    stages = []
    for group in groups:
        leaves = [path for path in order if path in group]
        parts = min(len(leaves), max(1, round(_STAGES * len(leaves) / max(len(order), 1))))
        edges = [len(leaves) * n // parts for n in range(parts + 1)] if parts else [0]
        stages += [frozenset(leaves[a:b]) for a, b in itertools.pairwise(edges)]
    return sorted(stages, key=lambda stage: min(order.index(path) for path in stage))


def solved_in_order(
    programs: Programs,
    batches: Any,
    plans: Sequence[LeafPlan],
    leaves: Sequence[Any],
    tied: Mapping[str, Sequence[str]],
    groups: Sequence[frozenset[str]],
    order: Sequence[str],
    rates: Mapping[str, float] | None,
    shown: Callable[..., Iterable[Any]],
    solve: Callable[..., Solved] = solved,
) -> tuple[dict[str, Solved], Any, dict[str, str]]:
    """Compresses the leaves stage by stage; returns them by path, the tree, and by path why no offset takes a shift.

    Args:
      programs: the function and the dense tree.
      batches: the batches to learn from.
      plans: the plans of the leaves.
      leaves: the arrays of the leaves.
      tied: by path, all paths of the same array.
      groups: leaves whose moments fit in memory together.
      order: the paths in the order of their use.
      rates: by path, prices of a bit of code in units of each layer's error; None without a rate.
      shown: shows progress.
      solve: does what `solved` does.
    """
    structure = jax.tree.structure(programs.params, is_leaf=is_codebook_array)
    number = {plan.path: n for n, plan in enumerate(plans)}
    now, made, why = list(leaves), {}, {}
    work = [path for path in order if plans[number[path]].reason is None]
    others = [plan for plan in plans if plan.reason is None and plan.path not in work]
    for plan in others:  # no use of theirs is known: by their weights alone
        made[plan.path] = solve(leaves[number[plan.path]], plan, None)
        now[number[plan.path]] = made[plan.path].leaf
    places = {path: tied.get(path, (path,)) for path in work}  # an array is fitted to what it multiplies in all of them
    wanted = frozenset(other for path in work for other in places[path])
    stages = stages_of(work, [group & frozenset(work) for group in groups])
    for stage in shown(stages, "in order of use", len(stages)):
        dense = decompress(structure.unflatten(now))
        seen = frozenset(other for path in stage for other in places[path])
        pair = gather_pair(programs, dense, batches, wanted=wanted, now=seen).joined(tied)
        for path in (path for path in work if path in stage):
            n, plan = number[path], plans[number[path]]
            twin = next((other for other in places[path] if other in made), None)
            if twin is not None and repr(plans[number[twin]].options) == repr(plan.options):
                made[path] = made[twin]
            else:
                here = pair.seen.of(path, plan.axes, plan.options.stack_axes)
                cross = pair.cross.of(path, plan.axes, plan.options.stack_axes)
                given: dict[str, Any] = {} if rates is None else {"rate": rates.get(path)}
                if isinstance(here, LeafMoments) and isinstance(cross, LeafMoments) and not here.is_diagonal:
                    given["cross"] = cross.second
                made[path] = solve(leaves[n], plan, here if isinstance(here, LeafMoments) else None, **given)
            now[n] = made[path].leaf
        tree, uncorrected = with_offsets(programs.params, structure.unflatten(now), pair.exact, pair.seen, stage)
        now = jax.tree.leaves(tree, is_leaf=is_codebook_array)
        why |= uncorrected
    return made, structure.unflatten(now), why
