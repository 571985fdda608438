"""Moments where two trees run side by side: the float parameters, and those of which some are compressed.

The function runs once for both trees, stage by stage: it stops before the leaves of a stage meet their inputs, takes
their moments, and continues from there when they are compressed. Between stages the values at hand are kept, for all
batches, unless they take too much memory; then the next stage begins further back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nuqjax._src.calibration.flat import Flat, environment, flat_of, lowered, steps
from nuqjax._src.calibration.programs import Programs, Some, example_count
from nuqjax._src.calibration.second_moments import Moments, gathered
from nuqjax._src.calibration.uses import PATHS, Recorder, Sums

_STATE_BYTES = 2**30


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


@dataclass(eq=False)
class SideBySide:
    """Runs the float tree and another one over batches, stage by stage.

    Attributes:
      programs: the function and the float tree.
      batches: the batches.
      positions: as in `moments`.
      widest: as in `moments`.
    """

    programs: Programs
    batches: Some
    positions: int = 64
    widest: int = 4096
    _flats: dict[Any, Flat] = field(default_factory=dict)
    _begins: dict[Any, int] = field(default_factory=dict)  # by shape: the equation that the values at hand are for
    _values: dict[int, list[Any]] = field(default_factory=dict)  # by batch: the values at hand, `[2, …]` each

    def flat(self, batch: Any) -> Flat:
        """Returns the function as a list of equations, for the shapes of a batch."""
        key = self.programs.key(batch)
        if key not in self._flats:
            jaxpr, names = self.programs.traced(batch).jaxpr, self.programs.names(batch)
            self._flats[key] = flat_of(jaxpr, names, self._recorder(batch, frozenset()))
        return self._flats[key]

    def moments(self, other: Any, stage: frozenset[str]) -> Pair:
        """Computes the moments of a stage's leaves.

        Args:
          other: a dense tree like the float one. From one stage to the next, only leaves change that no equation before
            the next stage reads, other than those of the first.
          stage: paths of leaves.

        Raises:
          NotMapped: a part of the function has no batched form.
        """
        made: dict[Any, tuple[_Segment, Any]] = {}
        numbers = iter(self.batches.numbers)

        def program_of(batch: Any) -> tuple[Any, Recorder]:
            key, number = self.programs.key(batch), next(numbers)
            if key not in made:
                segment = self._segment(batch, stage)
                made[key] = segment, segment.parameters(self.programs.arrays(other, batch))
            segment, parameters = made[key]

            def run() -> tuple[None, Any]:
                inputs = segment.inputs(self.programs.arrays(self.programs.params, batch))
                values = self._values.get(number, []) if segment.start else []
                sums, values = segment.program(parameters, inputs, values)
                if segment.keep is not None:
                    self._values[number] = values
                return None, sums

            return run, segment.recorder

        found = Pair(*gathered(self.programs, self.batches, program_of))
        self._begins |= {key: segment.keep for key, (segment, _) in made.items() if segment.keep is not None}
        return found

    def _recorder(self, batch: Any, wanted: frozenset[str], paired: bool = False) -> Recorder:
        return Recorder(wanted.__contains__, example_count(batch), self.positions, self.widest, paired)

    def _segment(self, batch: Any, stage: frozenset[str]) -> "_Segment":
        """Compiles what to run for a stage: from the values at hand to the last use of its leaves."""
        key, flat = self.programs.key(batch), self.flat(batch)
        start, keep = self._begins.get(key, 0), min(flat.first[path] for path in stage)
        start = start if start <= keep else 0  # a tied array has uses further back
        before, after = flat.live_at(start), flat.live_at(keep)
        if 2 * len(self.batches.numbers) * sum(v.aval.size * v.aval.dtype.itemsize for v in after) > _STATE_BYTES:
            keep, after = None, []
        numbers = flat.needed(range(start, 1 + max(flat.last[path] for path in stage)))
        read = {v for n in numbers for v in flat.variables(n)}
        arrays = zip(flat.jaxpr.jaxpr.invars, self.programs.arrays(self.programs.params, batch), strict=True)
        dense = [x if v in read else None for v, x in arrays]
        recorder = self._recorder(batch, stage, paired=True)
        recorder.biases, recorder.others = list(flat.biases), {path: list(whys) for path, whys in flat.others.items()}
        segment = _Segment(flat, dense, start, keep, recorder, None)

        def one(parameters: Mapping[int, Any], inputs: Mapping[int, Any], values: Sequence[Any]) -> tuple[Any, Any]:
            here = self._recorder(batch, stage, paired=True)
            env = environment(flat, [{**inputs, **parameters}.get(n) for n in range(len(flat.names))])
            env.update(zip(before, values, strict=True))
            recorded = []
            for n, records in steps(flat, numbers, env, here):
                recorded += [(use, *rest) for use, (_, *rest) in zip(flat.uses.get(n, ()), records, strict=True)]
            recorded = [record for record in recorded if record[0].name in stage]
            recorder.records = [(use, count, Sums(None, None)) for use, count, _ in recorded]
            return [sums for *_, sums in recorded], lowered(env[v] for v in after)

        both = jax.vmap(one, in_axes=(0, None, 0), out_axes=(None, 0), axis_name=PATHS, axis_size=2)
        values = [jax.ShapeDtypeStruct((2, *v.aval.shape), v.aval.dtype) for v in before]
        given = segment.parameters(dense), segment.inputs(dense), values
        try:
            return segment._replace(program=jax.jit(both).lower(*given).compile())
        except Exception as error:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise NotMapped(f"fn cannot be mapped over two trees: {text}") from error


class _Segment(NamedTuple):
    """A part of the function, for inputs of one shape.

    Attributes:
      flat: the function.
      dense: the float parameters and the inputs that it reads; None for others.
      start: the equation that it starts with.
      keep: the equation before which values are kept for the next stage; None if they are too large.
      recorder: what it records; no sums.
      program: takes parameters, inputs and the values at hand; returns sums, and the values to keep.
    """

    flat: Flat
    dense: Sequence[Any]
    start: int
    keep: int | None
    recorder: Recorder
    program: Any

    def parameters(self, other: Sequence[Any]) -> dict[int, Any]:
        """Returns by number the parameters, `[2, …]`: of the float tree and of the other one."""
        each = enumerate(zip(self.flat.names, self.dense, other, strict=True))
        return {n: jnp.stack([x, y]) for n, (name, x, y) in each if name is not None and x is not None}

    def inputs(self, arrays: Sequence[Any]) -> dict[int, Any]:
        """Returns by number the arrays that both trees share."""
        each = enumerate(zip(self.flat.names, self.dense, arrays, strict=True))
        return {n: y for n, (name, x, y) in each if name is None and x is not None}
