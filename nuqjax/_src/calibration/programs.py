"""A function of parameters and inputs, compiled once for each shape of a batch; checks and splits of batches."""

import hashlib
import re
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
from nuqjax._src.trace.traced import Traced, trace

ARRAYS = (jax.Array, np.ndarray, np.generic)


def checked_batches(batches: Any, caller: str) -> Iterable[Any]:
    """Returns the batches, checked to be an iterable that allows more than one pass.

    Raises:
      ValueError: they are not such an iterable, or there are none.
    """
    wanted = "a sequence of inputs is wanted, each an array or a tuple of arrays: batches=[images[:32], images[32:64]]"
    if isinstance(batches, ARRAYS):
        raise ValueError(f"{caller}: batches is one array of shape {batches.shape}, but {wanted}")
    if isinstance(batches, Iterator):
        raise ValueError(f"{caller}: batches is an iterator, which one pass uses up; give list(batches)")
    if not isinstance(batches, Iterable) or isinstance(batches, str | dict):
        raise ValueError(f"{caller}: batches is a {type(batches).__name__}, but {wanted}")
    if next(iter(batches), None) is None:
        raise ValueError(f"{caller}: there are no batches; {wanted}")
    return batches


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """Returns the inputs of a batch: the items of a tuple or a list, else the batch itself."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def example_count(batch: Any) -> int:
    """Returns the number of examples in a batch: the length of its first array, at least 1."""
    shapes = [np.shape(x) for x in jax.tree.leaves(inputs_of(batch)) if isinstance(x, ARRAYS)]
    return max(1, next((shape[0] for shape in shapes if shape), 1))


def fingerprint(batch: Any) -> str:
    """Returns a text that identifies a batch: dtype, shape and a digest of its first array."""
    first = next((x for x in jax.tree.leaves(inputs_of(batch)) if isinstance(x, ARRAYS)), np.zeros(0))
    data = np.ascontiguousarray(np.asarray(first)).view(np.uint8).reshape(-1)
    digest = hashlib.sha1(data[: 2**16].tobytes() + data[-(2**16) :].tobytes(), usedforsecurity=False)
    return f"{first.dtype}{first.shape}{digest.hexdigest()}"


def shapes_of(batch: Any) -> str:
    """Describes the inputs of a batch for messages: `float32[32, 8], int32[32]`."""
    leaves = jax.tree.leaves(inputs_of(batch))
    return ", ".join(f"{x.dtype}{list(x.shape)}" if isinstance(x, ARRAYS) else type(x).__name__ for x in leaves)


@dataclass(eq=False)
class Programs:
    """`fn(params, *inputs)` for trees like `params`, traced once for each shape of its inputs.

    Attributes:
      fn: the function.
      params: the tree, with dense leaves.
      caller: the name with which messages begin.
      output: a function that selects the output to compare; None for the first array.
      collectors: the compiled programs that gather moments, by shapes and options.
    """

    fn: Callable[..., Any]
    params: Any
    caller: str
    output: Callable[[Any], Any] | None = None
    collectors: dict[Any, Any] = field(default_factory=dict)
    _traced: dict[Any, Traced] = field(default_factory=dict)
    _compiled: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.params, is_leaf=is_codebook_array)[0]:
            if is_codebook_array(leaf):
                raise ValueError(f"{self.caller}: {path_name(path)} is compressed; dense parameters are wanted")

    def key(self, batch: Any) -> Any:
        """Returns a key that is equal for batches that share a program: structure, shapes, dtypes, other values."""
        leaves, structure = jax.tree.flatten(inputs_of(batch))
        return structure, tuple((np.shape(x), x.dtype) if isinstance(x, ARRAYS) else x for x in leaves)

    def traced(self, batch: Any) -> Traced:
        """Returns the function traced for inputs with the shapes of a batch.

        Raises:
          ValueError: the function fails.
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
        """Returns, for each array that the function takes, its path if it is a floating parameter, else None."""
        return [
            path_name(path[2:]) if path[1].idx == 0 and jnp.issubdtype(x.dtype, jnp.floating) else None
            for path, x in self.traced(batch).arrays
        ]

    def arrays(self, params: Any, batch: Any) -> list[Any]:
        """Returns the arrays that the traced function takes, in order."""
        return [on_automatic(x) for x in jax.tree.leaves((params, *inputs_of(batch))) if isinstance(x, ARRAYS)]

    def outputs(self, params: Any, batch: Any) -> np.ndarray:
        """Runs the function with other parameters of the same structure; returns the output to compare."""
        key = self.key(batch)
        if key not in self._compiled:
            jaxpr = self.traced(batch).jaxpr
            self._compiled[key] = jax.jit(lambda *arrays: with_fast_convolutions(jaxpr, arrays))
        return self.compared(batch, self._compiled[key](*self.arrays(params, batch)))

    def compared(self, batch: Any, outputs: Sequence[Any]) -> np.ndarray:
        """Selects the output to compare from all outputs, as `chosen` does, and returns its values."""
        return np.asarray(self.chosen(batch, outputs))

    def chosen(self, batch: Any, outputs: Sequence[Any]) -> Any:
        """Selects the output to compare from all outputs, which may be traced.

        Raises:
          ValueError: no output is an array of floating values.
        """
        tree = jax.tree.unflatten(self.traced(batch).outputs, list(outputs)[: self.traced(batch).outputs.num_leaves])
        chosen = tree if self.output is None else self.output(tree)
        found = next((x for x in jax.tree.leaves(chosen) if isinstance(x, ARRAYS)), None)
        if found is None or not jnp.issubdtype(found.dtype, jnp.floating) or found.size == 0:
            got = "no array" if found is None else f"{found.dtype}{list(found.shape)}"
            raise ValueError(
                f"{self.caller}: the output to compare is {got}, but floating values are wanted: "
                "output=lambda outputs: … chooses them among what fn gives"
            )
        return found


def fingerprint_of_call(programs: Programs, batches: Iterable[Any]) -> str:
    """Returns a text that identifies a function, by its program, and all values of its parameters and inputs."""
    digest = hashlib.sha256(f"{jax.__version__} {np.__version__}".encode())

    def add(text: str, arrays: Iterable[Any]) -> None:
        digest.update(text.encode(errors="surrogatepass"))
        for array in map(np.asarray, arrays):
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())

    known = set()
    for batch in checked_batches(batches, programs.caller):
        traced, key = programs.traced(batch), programs.key(batch)
        if key not in known:
            known.add(key)
            text = re.sub("0x[0-9a-f]+", "", str(traced.jaxpr))  # addresses of functions differ from run to run
            add(text, [*traced.jaxpr.consts, *(x for x in jax.tree.leaves(programs.params) if isinstance(x, ARRAYS))])
        add(repr(key), [x for x in jax.tree.leaves(inputs_of(batch)) if isinstance(x, ARRAYS)])
    names = jax.tree_util.tree_flatten_with_path(programs.params)[0]
    add(repr([path_name(path) for path, _ in names]), [])
    return digest.hexdigest()


class Split(NamedTuple):
    """Numbers of the batches to learn from, to try single leaves on, and to measure the result on."""

    learned: tuple[int, ...]
    tried: tuple[int, ...]
    measured: tuple[int, ...]


def split_off(batches: Iterable[Any], thirds: bool = False) -> Split:
    """Holds out a fifth of two or more batches, evenly spread; with `thirds`, two fifths of three or more.

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
    """Some of the batches, by number; each pass iterates over all batches again."""

    batches: Iterable[Any]
    numbers: tuple[int, ...]

    def __iter__(self) -> Iterator[Any]:
        wanted = frozenset(self.numbers)
        return (batch for n, batch in enumerate(self.batches) if n in wanted)
