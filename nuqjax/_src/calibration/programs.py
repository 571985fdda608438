"""A function of parameters and inputs, compiled once for each shape of a batch, and the batches themselves."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from nuqjax.codebook_array import is_codebook_array
from nuqjax.interpret import Traced, trace
from nuqjax.rules import path_name

_ARRAYS = (jax.Array, np.ndarray, np.generic)


def checked_batches(batches: Any, caller: str) -> Iterable[Any]:
    """The batches, which can be gone through more than once.

    Raises:
      ValueError: they cannot, or there are none.
    """
    wanted = "a sequence of inputs is wanted, each an array or a tuple of arrays: batches=[images[:32], images[32:64]]"
    if isinstance(batches, _ARRAYS):
        raise ValueError(f"{caller}: batches is one array of shape {batches.shape}, but {wanted}")
    if isinstance(batches, Iterator):
        raise ValueError(f"{caller}: batches is an iterator, which is used up by one pass; give list(batches)")
    if not isinstance(batches, Iterable) or isinstance(batches, str | dict):
        raise ValueError(f"{caller}: batches is a {type(batches).__name__}, but {wanted}")
    if next(iter(batches), None) is None:
        raise ValueError(f"{caller}: there are no batches; {wanted}")
    return batches


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """The inputs of a batch: the items of a tuple or a list, else the batch itself."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def example_count(batch: Any) -> int:
    """How many examples a batch has: the length of its first array, at least 1."""
    shapes = [np.shape(x) for x in jax.tree.leaves(inputs_of(batch)) if isinstance(x, _ARRAYS)]
    return max(1, next((shape[0] for shape in shapes if shape), 1))


def shapes_of(batch: Any) -> str:
    """The inputs of a batch, for messages: `float32[32, 8], int32[32]`."""
    leaves = jax.tree.leaves(inputs_of(batch))
    return ", ".join(f"{x.dtype}{list(x.shape)}" if isinstance(x, _ARRAYS) else type(x).__name__ for x in leaves)


@dataclass(eq=False)
class Programs:
    """`fn(params, *inputs)`, traced once for each shape of its inputs, of trees like `params`.

    Attributes:
      fn: the function.
      params: the tree, of dense leaves.
      caller: what messages begin with.
      output: which of the outputs is compared: a function of them; None for the first array.
    """

    fn: Callable[..., Any]
    params: Any
    caller: str
    output: Callable[[Any], Any] | None = None
    _traced: dict[Any, Traced] = field(default_factory=dict)
    _compiled: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self):
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.params, is_leaf=is_codebook_array)[0]:
            if is_codebook_array(leaf):
                raise ValueError(f"{self.caller}: {path_name(path)} is compressed; dense parameters are wanted")

    def key(self, batch: Any) -> Any:
        """What batches that share a program have in common."""
        leaves, structure = jax.tree.flatten(inputs_of(batch))
        return structure, tuple((np.shape(x), x.dtype) if isinstance(x, _ARRAYS) else x for x in leaves)

    def traced(self, batch: Any) -> Traced:
        """The function for inputs of a batch's shapes.

        Raises:
          ValueError: it fails.
        """
        key = self.key(batch)
        if key not in self._traced:
            try:
                self._traced[key] = trace(self.fn, (self.params, *inputs_of(batch)), {}, lambda x: False)
            except Exception as error:
                raise ValueError(
                    f"{self.caller}: fn(params, *inputs) fails with a batch of {shapes_of(batch)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return self._traced[key]

    def names(self, batch: Any) -> list[str | None]:
        """Of each array that the function takes, its path if it is a floating parameter."""
        return [
            path_name(path[2:]) if path[1].idx == 0 and jnp.issubdtype(x.dtype, jnp.floating) else None
            for path, x in self.traced(batch).arrays
        ]

    def arrays(self, params: Any, batch: Any) -> list[Any]:
        """What the traced function takes, in order."""
        return [x for x in jax.tree.leaves((params, *inputs_of(batch))) if isinstance(x, _ARRAYS)]

    def outputs(self, params: Any, batch: Any) -> np.ndarray:
        """The output that is compared, of parameters like the function's own."""
        key = self.key(batch)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(core.jaxpr_as_fun(self.traced(batch).jaxpr))
        return self.compared(batch, self._compiled[key](*self.arrays(params, batch)))

    def compared(self, batch: Any, outputs: Sequence[Any]) -> np.ndarray:
        """The output that is compared, among all.

        Raises:
          ValueError: there is none.
        """
        tree = jax.tree.unflatten(self.traced(batch).outputs, list(outputs)[: self.traced(batch).outputs.num_leaves])
        chosen = tree if self.output is None else self.output(tree)
        found = next((x for x in jax.tree.leaves(chosen) if isinstance(x, _ARRAYS)), None)
        if found is None or not jnp.issubdtype(found.dtype, jnp.floating) or found.size == 0:
            got = "no array" if found is None else f"{found.dtype}{list(found.shape)}"
            raise ValueError(
                f"{self.caller}: the output to compare is {got}, but floating values are wanted: "
                "output=lambda outputs: … chooses them among what fn gives"
            )
        return np.asarray(found)


def split_off(batches: Iterable[Any], share: float = 0.2) -> tuple[list[int], list[int]]:
    """The numbers of the batches to learn from, and of those that are held out: every fifth or so, if there are two."""
    count = sum(1 for _ in batches)
    held = max(1, round(count * share)) if count > 1 else 0
    chosen = {count - 1 - round(n * count / held) for n in range(held)} if held else set()
    return [n for n in range(count) if n not in chosen], sorted(chosen)


@dataclass(frozen=True)
class Some:
    """Some of the batches, by number: they are gone through anew each time."""

    batches: Iterable[Any]
    numbers: tuple[int, ...]

    def __iter__(self) -> Iterator[Any]:
        wanted = frozenset(self.numbers)
        return (batch for n, batch in enumerate(self.batches) if n in wanted)
