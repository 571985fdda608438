"""A function of parameters and inputs, compiled once for each shape of a batch, and the batches themselves."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.calibration.convolutions import with_fast_convolutions
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.platform.meshes import on_automatic
from nuqjax._src.trace.interpret import Traced, trace

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


def fingerprint(batch: Any) -> str:
    """What tells a batch from others: a digest of its first array."""
    first = next((x for x in jax.tree.leaves(inputs_of(batch)) if isinstance(x, _ARRAYS)), np.zeros(0))
    data = np.ascontiguousarray(np.asarray(first)).view(np.uint8).reshape(-1)
    digest = hashlib.sha1(data[: 2**16].tobytes() + data[-(2**16) :].tobytes(), usedforsecurity=False)
    return f"{first.dtype}{first.shape}{digest.hexdigest()}"


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
      collectors: programs that gather moments, by what they are for.
    """

    fn: Callable[..., Any]
    params: Any
    caller: str
    output: Callable[[Any], Any] | None = None
    collectors: dict[Any, Any] = field(default_factory=dict)
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
                args = jax.tree.map(on_automatic, (self.params, *inputs_of(batch)))
                self._traced[key] = trace(self.fn, args, {}, lambda x: False)
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
        return [on_automatic(x) for x in jax.tree.leaves((params, *inputs_of(batch))) if isinstance(x, _ARRAYS)]

    def outputs(self, params: Any, batch: Any) -> np.ndarray:
        """The output that is compared, of parameters like the function's own."""
        key = self.key(batch)
        if key not in self._compiled:
            jaxpr = self.traced(batch).jaxpr
            self._compiled[key] = jax.jit(lambda *arrays: with_fast_convolutions(jaxpr, arrays))
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


class Split(NamedTuple):
    """Batches by number: learned from, tried leaf by leaf, and measured on."""

    learned: tuple[int, ...]
    tried: tuple[int, ...]
    measured: tuple[int, ...]


def split_off(batches: Iterable[Any], thirds: bool = False) -> Split:
    """A fifth of the batches, evenly spread, is held out if there are two; with `thirds` two fifths if there are three.

    >>> split_off(range(10))
    Split(learned=(0, 1, 2, 3, 5, 6, 7, 8), tried=(4, 9), measured=(4, 9))
    >>> split_off(range(10), thirds=True)
    Split(learned=(0, 1, 3, 5, 6, 8), tried=(4, 9), measured=(2, 7))
    """
    count = sum(1 for _ in batches)
    parts = 2 if thirds and count > 2 else 1
    each = max(1, round(count / 5)) if count > 1 else 0
    held = [count - 1 - n * count // (each * parts) for n in range(each * parts)]
    tried, measured = (tuple(sorted(held[n::parts])) for n in (0, parts - 1))
    return Split(tuple(n for n in range(count) if n not in held), tried, measured)


@dataclass(frozen=True)
class Some:
    """Some of the batches, by number: they are gone through anew each time."""

    batches: Iterable[Any]
    numbers: tuple[int, ...]

    def __iter__(self) -> Iterator[Any]:
        wanted = frozenset(self.numbers)
        return (batch for n, batch in enumerate(self.batches) if n in wanted)
