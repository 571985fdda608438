"""Moments where two trees run side by side: the float parameters, and those of which some are compressed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.calibration.programs import Programs, example_count
from nuqjax._src.calibration.second_moments import Moments, gathered
from nuqjax._src.calibration.uses import PATHS, Recorder, Sums, run


class Pair(NamedTuple):
    """Moments where two trees run side by side, with f what a leaf multiplies in the float tree and x in the other.

    Attributes:
      seen: moments of x: means, E[x xᵀ].
      cross: moments E[f xᵀ], and the means of x.
      exact: means of f.
    """

    seen: Moments
    cross: Moments
    exact: Moments

    def joined(self, tied: Mapping[str, Sequence[str]]) -> "Pair":
        """Returns the moments for tied paths, as `Moments.joined` does."""
        return Pair(*(one.joined(tied) for one in self))


class NotMapped(Exception):
    """JAX cannot map the function over two trees."""


def gather_pair(
    programs: Programs,
    other: Any,
    batches: Iterable[Any],
    *,
    wanted: frozenset[str],
    now: frozenset[str],
    positions: int = 64,
    widest: int = 4096,
) -> Pair:
    """Computes moments with the float tree and with another one of the same structure, side by side.

    Both trees are stacked along a new axis, and the function is mapped over it, so that wherever a leaf is used, what
    it multiplies in either tree is at hand.

    Args:
      programs: the function and the float tree.
      other: a dense tree like it.
      batches: the inputs.
      wanted: the leaves with second moments in any run; one program serves all of them.
      now: those of them for which second moments are computed in this run.
      positions: as in `moments`.
      widest: as in `moments`.

    Raises:
      NotMapped: a part of the function has no batched form.
    """

    def program_of(batch: Any) -> tuple[Any, Recorder]:
        key = programs.key(batch), wanted, positions, widest, "pair"
        if key not in programs.collectors:
            made = Recorder(wanted.__contains__, example_count(batch), positions, widest, {})
            programs.collectors[key] = _compile_pair(programs, batch, made), made
        program, made = programs.collectors[key]
        return lambda: (None, program(_flags(programs, batch, now), *_stacked(programs, other, batch))), made

    seen, cross, exact = gathered(programs, batches, program_of)
    return Pair(seen, cross, exact)


def _flags(programs: Programs, batch: Any, now: frozenset[str]) -> dict[str, np.ndarray]:
    return {name: np.asarray(name in now) for name in programs.names(batch) if name is not None}


def _stacked(programs: Programs, other: Any, batch: Any) -> list[Any]:
    """Returns the arrays that the function takes; a parameter is `[2, …]`, that of the float tree and of `other`."""
    arrays = zip(
        programs.names(batch), programs.arrays(programs.params, batch), programs.arrays(other, batch), strict=True
    )
    return [x if name is None else jnp.stack([x, y]) for name, x, y in arrays]


def _compile_pair(programs: Programs, batch: Any, recorder: Recorder) -> Any:
    names, jaxpr = programs.names(batch), programs.traced(batch).jaxpr

    def collect(flags, *arrays) -> list[Sums]:
        recorder.flags = flags

        def both(*arrays) -> list[Sums]:
            run(jaxpr, arrays, names, recorder)
            return [sums for _, _, sums in recorder.records]

        axes = [None if name is None else 0 for name in names]
        return jax.vmap(both, in_axes=axes, out_axes=None, axis_name=PATHS, axis_size=2)(*arrays)

    arrays = _stacked(programs, programs.params, batch)
    try:
        return jax.jit(collect).lower(_flags(programs, batch, frozenset()), *arrays).compile()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise NotMapped(f"fn cannot be mapped over two trees: {text}") from error
