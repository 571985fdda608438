"""Finds leaves that are not weights, and leaves that look like stacked layers, by the shapes and names of a tree."""

import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from nuqjax._src.leaf.paths import path_name

_NO_PARAMETERS = ("cache", "batch_stats")  # Flax's collections, which may be given without "params"
_DEEPEST = 32  # most keys above a stack: an untrusted file may nest without limit


class Stack(NamedTuple):
    """A sub-tree whose leaves look like those of `length` layers, stacked along their first axis."""

    path: str
    length: int

    @property
    def pattern(self) -> str:
        """The pattern by which a rule matches its leaves."""
        return f"^{re.escape(self.path)}/" if self.path else "."

    @property
    def note(self) -> str:
        """What a user should know about it."""
        where = repr(self.path) if self.path else "the tree"
        return (
            f"{where} looks like {self.length} stacked layers (scanned ones or experts), but their weights would share "
            f"codebooks: rules=[nuqjax.Rule({self.pattern!r}, stack_axes=1)] gives each layer its own, and skip=False "
            "in a rule says that it is not a stack"
        )


def likely_stacks(shapes: dict[str, tuple[int, ...]]) -> list[Stack]:
    """Returns the outermost sub-trees that look like stacked layers.

    In such a sub-tree all floating leaves have the same first length, above 1, and further axes. Some leaf has a single
    further axis, as a bias has, whose length is also that of a further axis of a leaf with several.

    Args:
      shapes: the shapes of all floating leaves, by path.

    >>> likely_stacks({"layers/kernel": (6, 8, 16), "layers/bias": (6, 16), "head/kernel": (16, 4)})
    [Stack(path='layers', length=6)]
    """
    below: dict[tuple[str, ...], dict[tuple[str, ...], tuple[int, ...]]] = {}
    for path, shape in shapes.items():
        *keys, _ = parts = path.split("/")
        for depth in range(min(len(keys), _DEEPEST) + 1):
            below.setdefault(tuple(keys[:depth]), {})[tuple(parts)] = shape
    taken: set[tuple[str, ...]] = set()
    found: list[Stack] = []
    for inside in sorted(below.values(), key=len, reverse=True):
        if taken.isdisjoint(inside) and _is_stack(inside.values()):
            taken |= inside.keys()
            first, last = min(inside)[:-1], max(inside)[:-1]  # the keys that these two share, all share
            alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
            found.append(Stack("/".join(key for key, _ in alike), next(iter(inside.values()))[0]))
    return found


def _is_stack(shapes: Iterable[tuple[int, ...]]) -> bool:
    shapes = list(shapes)
    lengths = {shape[0] if len(shape) > 1 else 0 for shape in shapes}
    several = {n for shape in shapes if len(shape) > 2 for n in shape[1:]}
    return len(lengths) == 1 and min(lengths) > 1 and any(len(shape) == 2 and shape[1] in several for shape in shapes)


def stack_of(path: str, stacks: Sequence[Stack]) -> Stack | None:
    """Returns the stack that a leaf belongs to, or None."""
    return next((stack for stack in stacks if not stack.path or path.startswith(f"{stack.path}/")), None)


def no_parameters(params: Any) -> dict[str, str]:
    """Returns by path why leaves are not weights: they are not in the collection "params", or not in an `nnx.Param`.

    >>> no_parameters({"params": {"w": 1.0}, "cache": {"keys": 2.0}})
    {'cache/keys': "in the collection 'cache', not in 'params'"}
    """
    variable = _flax_variable()
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, variable))
    first = {path_name(path[:1]) for path, _ in flat}
    found = {}
    for path, node in flat:
        collection = path_name(path[:1])
        if isinstance(node, variable):
            why = None if isinstance(node, _flax_param()) else f"an nnx.{type(node).__name__}, not an nnx.Param"
        elif collection != "params" and ("params" in first or collection in _NO_PARAMETERS):
            why = f"in the collection {collection!r}, not in 'params'"
        else:
            why = None
        if why is None:
            continue
        for inner, _ in jax.tree_util.tree_flatten_with_path(node)[0]:
            found[path_name((*path, *inner))] = why
    return found


def _flax_variable() -> tuple[type, ...]:
    """Returns `(nnx.Variable,)` if this program has imported it; else (), as no leaf can be one."""
    nnx = sys.modules.get("flax.nnx")
    return () if nnx is None else (nnx.Variable,)


def _flax_param() -> type:
    return sys.modules["flax.nnx"].Param
