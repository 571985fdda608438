"""Finds values of leaves that turn what is left of a folded batch-norm into an identity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from nuqjax._src.fold.program import Flat, Values
from nuqjax._src.trace.operations import MOVING

# By operation: the first operand from the result and the second, and the second from the result and the first.
_SOLVED: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add": (lambda result, other: result - other, lambda result, other: result - other),
    "sub": (lambda result, other: result + other, lambda result, other: other - result),
    "mul": (lambda result, other: result / other, lambda result, other: result / other),
    "div": (lambda result, other: result * other, lambda result, other: other / result),
    "max": (
        lambda result, other: result if result >= other else np.nan,
        lambda result, other: result if result >= other else np.nan,
    ),
    "pow": (lambda result, other: result ** (1 / other), lambda result, other: np.nan),
}
_INVERSE: Mapping[str, Callable[..., Any]] = {
    "rsqrt": lambda result: 1 / result**2,
    "sqrt": np.square,
    "square": np.sqrt,
    "exp": np.log,
    "log": np.exp,
    "neg": np.negative,
}
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}


@dataclass(frozen=True)
class Solver:
    """Finds values of leaves, the same in all entries of a leaf, that give expressions their target values.

    Attributes:
      program: the function.
      leaves: the leaves' own values.
      fixed: leaves that keep their own values.
      taken: leaves that hold scaled kernels or offsets.
      known: the new values found, by leaf.
    """

    program: Flat
    leaves: Mapping[Any, np.ndarray]
    fixed: frozenset[Any]
    taken: frozenset[Any]
    known: dict[Any, float]

    def value(self, atom: Any) -> float | None:
        """Returns the value of an expression if it is known and the same in all entries, else None."""
        origins = self.program.leaves_of(atom)
        if not origins <= self.fixed | self.known.keys():
            return None
        new = {v: np.broadcast_to(np.float64(self.known[v]), v.aval.shape) for v in origins if v in self.known}
        found = Values(self.program, {**{v: self.leaves[v] for v in origins}, **new}).of(atom)
        return float(found.flat[0]) if found.size and (found == found.flat[0]).all() else None

    def precision(self, atom: Any) -> float:
        """Returns the relative difference up to which values count as equal, from the dtypes of the known leaves."""
        return 4 * max(
            (float(jnp.finfo(v.aval.dtype).eps) for v in self.program.leaves_of(atom) & self.known.keys()), default=0
        )

    def solve(self, atom: Any, target: float) -> bool:
        """Sets the free leaves of an expression so that its value is `target`; returns False if that is impossible."""
        value = self.value(atom)
        if value is not None:
            return abs(value - target) <= self.precision(atom) * max(1, abs(target))
        if not np.isfinite(target) or isinstance(atom, core.Literal):
            return False
        eqn = self.program.made_by(atom)
        if eqn is None:
            if atom not in self.program.leaves or atom in self.taken | self.fixed:
                return False
            self.known[atom] = float(np.asarray(target).astype(atom.aval.dtype))
            return True
        name, parts = eqn.primitive.name, eqn.invars
        with np.errstate(all="ignore"):
            if name in MOVING:
                return self.solve(parts[0], target)
            if name in _INVERSE:
                return self.solve(parts[0], _INVERSE[name](np.float64(target)))
            if name == "integer_pow":
                return self.solve(parts[0], np.float64(target) ** (1 / eqn.params["y"]))
            if name not in _SOLVED:
                return False
            if all(self.value(v) is None for v in parts) and not self.solve(parts[1], _NEUTRAL.get(name, np.nan)):
                return False
            for n in (0, 1):
                other = self.value(parts[1 - n])
                if other is not None:
                    return self.solve(parts[n], _SOLVED[name][n](np.float64(target), other))
        return False
