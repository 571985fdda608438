"""Compression of the leaves in the order of their use, each with the inputs that those before it leave it.

Compressed leaves change what later ones multiply. Here a later leaf's moments are those of its inputs x in the
compressed function, and its weights W are replaced, before they are compressed, by those that come closest to the float
outputs: W* = W C H⁻¹ with H = E[x xᵀ] and C = E[f xᵀ], where f are the inputs in the float function.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from nuqjax._src.calibration.biases import with_offsets
from nuqjax._src.calibration.flat import Flat
from nuqjax._src.calibration.layers import Solved, solved
from nuqjax._src.calibration.pairs import SideBySide
from nuqjax._src.calibration.programs import Programs, Some
from nuqjax._src.calibration.second_moments import LeafMoments
from nuqjax._src.compress.plan import LeafPlan
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.codebooks import decompress


def stages_of(flat: Flat, work: Sequence[str], sizes: Mapping[str, int], most: int) -> list[frozenset[str]]:
    """Splits leaves into stages, in the order of their use: what a leaf multiplies depends on no other of its stage.

    Args:
      flat: the function.
      work: the leaves.
      sizes: by path, the number of values in the moments of a leaf.
      most: the most values in the moments of a stage of two leaves or more.
    """
    stages: list[list[str]] = []
    for path in sorted(work, key=lambda path: flat.first[path]):
        now = stages[-1] if stages else []
        apart = not any(other in flat.before[path] or path in flat.before[other] for other in now)
        if now and apart and sum(sizes[other] for other in (path, *now)) <= most:
            now.append(path)
        else:
            stages.append([path])
    return [frozenset(stage) for stage in stages]


def solved_in_order(
    programs: Programs,
    batches: Some,
    plans: Sequence[LeafPlan],
    leaves: Sequence[Any],
    tied: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    most: int,
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
      sizes: by path, the number of values in the moments of a leaf.
      most: the most values in the moments of a stage of two leaves or more.
      rates: by path, prices of a bit of code in units of each layer's error; None without a rate.
      shown: shows progress.
      solve: does what `solved` does.
    """
    structure = jax.tree.structure(programs.params, is_leaf=is_codebook_array)
    number = {plan.path: n for n, plan in enumerate(plans)}
    now, made, why = list(leaves), {}, {}
    together = SideBySide(programs, batches)
    flat = together.flat(next(iter(batches)))
    work = [path for path in flat.last if path in number and plans[number[path]].reason is None]
    others = [plan for plan in plans if plan.reason is None and plan.path not in work]
    for plan in others:  # no use of theirs is known: by their weights alone
        made[plan.path] = solve(leaves[number[plan.path]], plan, None)
        now[number[plan.path]] = made[plan.path].leaf
    stages = stages_of(flat, work, sizes, most)

    def twin(path: str) -> str | None:
        """Returns the path of the same array, compressed by the same options."""
        options = repr(plans[number[path]].options)
        alike = (other for other in tied.get(path, ()) if other in made)
        return next((other for other in alike if repr(plans[number[other]].options) == options), None)

    for stage in shown(stages, "in order of use", len(stages)):
        dense = decompress(structure.unflatten(now))
        # An array is fitted to what it multiplies in all its places.
        places = {path: (path,) if twin(path) else tied.get(path, (path,)) for path in stage}
        pair = together.moments(dense, frozenset().union(*places.values())).joined(tied)
        for path in sorted(stage, key=work.index):
            n, plan = number[path], plans[number[path]]
            if other := twin(path):
                made[path] = made[other]
            else:
                here, cross = (m.of(path, plan.axes, plan.options.stack_axes) for m in (pair.seen, pair.cross))
                given: dict[str, Any] = {} if rates is None else {"rate": rates.get(path)}
                if isinstance(here, LeafMoments) and isinstance(cross, LeafMoments) and not here.is_diagonal:
                    given["cross"] = cross.second
                made[path] = solve(leaves[n], plan, here if isinstance(here, LeafMoments) else None, **given)
            now[n] = made[path].leaf
        tree, uncorrected = with_offsets(programs.params, structure.unflatten(now), pair.exact, pair.seen, stage)
        now = jax.tree.leaves(tree, is_leaf=is_codebook_array)
        why |= uncorrected
    return made, structure.unflatten(now), why
