"""A function as one list of equations, and where in it each leaf is used and its changes are felt."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core

from nuqjax._src.calibration.uses import Bias, Output, Parameter, Recorder, Use, collector
from nuqjax._src.trace.interpret import Interpreter, Site, as_written, bind, inline
from nuqjax._src.trace.operations import DERIVED

_CALLS = ("jit", "pjit", "closed_call", "core_call", *DERIVED)


def flattened(jaxpr: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Returns the same function without calls; loops and conditionals remain single equations.

    >>> import jax.numpy as jnp
    >>> inner = jax.jit(lambda x: jnp.sin(x) + 1)
    >>> [eqn.primitive.name for eqn in flattened(jax.make_jaxpr(lambda x: 2 * inner(x))(1.0)).jaxpr.eqns]
    ['sin', 'add', 'mul']
    """

    def rule(interpreter: Any, site: Site, eqn: core.JaxprEqn, *operands: Any) -> Any:
        return bind(eqn, operands)

    rules = {**dict.fromkeys(("scan", "while", "cond"), rule), **dict.fromkeys(_CALLS, inline)}
    interpreter = Interpreter(lambda x: True, lambda value, others: value, rules, rule)
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.jaxpr.invars]  # pyright: ignore[reportAttributeAccessIssue]
    return jax.make_jaxpr(lambda *arrays: interpreter.evaluate(jaxpr, arrays))(*shapes)


@dataclass(frozen=True, eq=False)
class Flat:
    """A function for inputs of one shape, as a list of equations.

    Values are *prepared* if they are computed from parameters and constants alone, and no use is recorded on the way;
    others are *live*. Prepared values can be computed at any time, live ones in the order of the equations.

    Attributes:
      jaxpr: the flattened function.
      names: for each of its inputs its path if it is a parameter, else None.
      uses: by the number of an equation, the uses that are recorded there.
      biases: the leaves that are added to the outputs of others.
      others: by path, the uses that are not understood.
      prepared: the equations that compute prepared values, by number.
      first: by path, the number of the first equation where the leaf meets a live value.
      last: by path, the number of the last equation that records a use of the leaf.
      before: by path, the leaves whose values what this leaf multiplies depends on, at any of its recorded uses.
    """

    jaxpr: core.ClosedJaxpr
    names: Sequence[str | None]
    uses: Mapping[int, Sequence[Use]]
    biases: Sequence[Bias]
    others: Mapping[str, Sequence[str]]
    prepared: frozenset[int]
    first: Mapping[str, int]
    last: Mapping[str, int]
    before: Mapping[str, frozenset[str]]

    def live_at(self, cut: int) -> list[Any]:
        """Returns the live variables, inputs apart, that equations before a cut compute and later ones read."""
        made, read = [], set()
        for number, eqn in enumerate(self.jaxpr.jaxpr.eqns):
            if number not in self.prepared:
                made += eqn.outvars if number < cut else []
                read |= set(_variables(eqn)) if number >= cut else set()
        return [v for v in made if v in read]

    def variables(self, number: int) -> list[Any]:
        """Returns the variables that an equation reads."""
        return _variables(self.jaxpr.jaxpr.eqns[number])

    def needed(self, numbers: range) -> list[int]:
        """Returns the equations to evaluate, in order, for the live values of consecutive equations."""
        needed = [n for n in numbers if n not in self.prepared]
        read = {v for n in needed for v in self.variables(n)}
        for n in sorted(self.prepared, reverse=True):
            if read.intersection(self.jaxpr.jaxpr.eqns[n].outvars):
                needed.append(n)
                read |= set(self.variables(n))
        return sorted(needed)


def steps(
    flat: Flat, numbers: Sequence[int], env: dict[Any, Any], recorder: Recorder
) -> Iterator[tuple[int, list[tuple[Use, int, Any]]]]:
    """Evaluates equations in an environment; yields the number of each, and what it recorded."""
    interpreter = collector(recorder)
    for n in numbers:
        eqn = flat.jaxpr.jaxpr.eqns[n]
        before = len(recorder.records)
        operands = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
        site = Site(str(eqn.source_info.name_stack), eqn.primitive.name, n)
        with as_written(eqn):
            env.update(zip(eqn.outvars, interpreter.step(site, eqn, operands), strict=True))
        yield n, recorder.records[before:]


def flat_of(jaxpr: core.ClosedJaxpr, names: Sequence[str | None], recorder: Recorder) -> Flat:
    """Flattens a function and finds its uses, from shapes alone.

    Args:
      jaxpr: the function.
      names: for each of its inputs its path if it is a parameter, else None.
      recorder: an empty recorder, whose options the uses follow.
    """
    jaxpr = flattened(jaxpr)
    inner = jaxpr.jaxpr
    prepared: set[int] = set()
    uses: dict[int, list[Use]] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    before: dict[str, frozenset[str]] = {}
    # Of each variable: the leaves that it is computed from, and whether it is live.
    sources: dict[Any, frozenset[str]] = dict.fromkeys(inner.constvars, frozenset())
    live = {v for v, name in zip(inner.invars, names, strict=True) if name is None}
    sources |= {v: frozenset(() if n is None else (n,)) for v, n in zip(inner.invars, names, strict=True)}
    whole = Flat(jaxpr, names, uses, recorder.biases, recorder.others, frozenset(), first, last, before)

    def run(*arrays: Any) -> None:
        env = environment(whole, arrays)
        for n, recorded in steps(whole, range(len(inner.eqns)), env, recorder):
            eqn = inner.eqns[n]
            read = _variables(eqn)
            of_live = [v for v in read if v in live]
            felt = frozenset().union(*(sources[v] for v in of_live))
            if of_live or recorded:
                live.update(eqn.outvars)
                for v in (v for v in read if v not in live):
                    for name in sources[v]:
                        first.setdefault(name, n)
            else:
                prepared.add(n)
            for use, *_ in recorded:
                uses.setdefault(n, []).append(use)
                last[use.name] = n
                before[use.name] = before.get(use.name, frozenset()) | felt
            sources.update(dict.fromkeys(eqn.outvars, frozenset().union(*(sources[v] for v in read))))

    jax.eval_shape(run, *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inner.invars))  # pyright: ignore[reportAttributeAccessIssue]
    return Flat(jaxpr, names, uses, recorder.biases, recorder.others, frozenset(prepared), first, last, before)


def environment(flat: Flat, arrays: Sequence[Any]) -> dict[Any, Any]:
    """Returns the values of the function's constants and inputs by variable, its parameters lifted."""
    inner = flat.jaxpr.jaxpr
    lifted = [x if n is None else Parameter(x, n) for n, x in zip(flat.names, arrays, strict=True)]
    return {
        **dict(zip(inner.constvars, flat.jaxpr.consts, strict=True)),
        **dict(zip(inner.invars, lifted, strict=True)),
    }


def lowered(values: Iterable[Any]) -> list[Any]:
    """Returns arrays for values that may be lifted."""
    return [x.array if isinstance(x, Parameter | Output) else x for x in values]


def _variables(eqn: core.JaxprEqn) -> list[Any]:
    return [v for v in eqn.invars if not isinstance(v, core.Literal)]
