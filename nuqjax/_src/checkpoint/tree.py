"""An open checkpoint of any format: a checked tree of leaves that are read on request."""

import errno
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from nuqjax._src.leaf.paths import nearest, path_name
from nuqjax._src.store.dtypes import is_stored
from nuqjax._src.store.tree import MAX_DEPTH, PathRoom

_SYSTEM = {getattr(errno, name) for name in ("EACCES", "EPERM", "EIO", "EMFILE", "ENFILE", "ETIMEDOUT")}
MOST_INFLATED = 1032  # the most bytes that one byte of zlib can expand to


class Leaf(NamedTuple):
    """A leaf of a checkpoint: its path, its shape and dtype (None if it is not an array), and a function to read it.

    If the leaf cannot be read, `problem` says what it holds and `read` raises ValueError. Other leaves stay readable.
    """

    path: str
    shape: tuple[int, ...] | None
    dtype: np.dtype | None
    read: Callable[[], Any]
    problem: str | None = None

    @property
    def nbytes(self) -> int:
        """Number of bytes of the array; 0 if the leaf is not an array."""
        return 0 if self.shape is None or self.dtype is None else math.prod(self.shape) * self.dtype.itemsize

    @property
    def spec(self) -> Any:
        """A `jax.ShapeDtypeStruct` of the array; the value itself if the leaf is not an array."""
        return self.read() if self.shape is None else jax.ShapeDtypeStruct(self.shape, self.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its format, its leaves in JAX's order, their structure, and its files.

    Attributes:
      path: the file or folder; for a folder of steps, the newest step.
      format: one of `FORMATS`, "npy", "h5", or "nuqjax" for a file written by `save`.
      leaves: a `Leaf` for each leaf.
      structure: the leaves' `PyTreeDef`.
      files: the files of the checkpoint; if one changes, it is no longer the same checkpoint.
      separator: the text at which tensors' names were split into keys; None if the format stores keys itself.
      metadata: the metadata of the file, such as `{"format": "pt"}`, without those of this library.
      skipped: the paths of the leaves that `skip` left out.
    """

    path: str
    format: str
    leaves: tuple[Leaf, ...]
    structure: Any
    files: tuple[str, ...]
    separator: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def tree(self, leaves: Iterable[Any]) -> Any:
        """Returns the tree with the given values in place of its leaves."""
        return jax.tree.unflatten(self.structure, leaves)

    def read(self) -> Any:
        """Reads all leaves and returns the tree."""
        return self.tree(leaf.read() for leaf in self.leaves)

    @property
    def keys(self) -> list[tuple[Any, ...]]:
        """The keys that lead to each leaf: the keys of dicts, and positions in lists and tuples."""
        flat, _ = jax.tree_util.tree_flatten_with_path(self.tree(range(len(self.leaves))))
        return [tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path) for path, _ in flat]


@contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """Turns any error about a file's contents into a ValueError that begins with the file's name.

    Errors of the system (no permission, a failing disk) and of missing libraries pass unchanged.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        if isinstance(error, OSError) and error.errno in _SYSTEM:
            raise
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: {what}: {text or type(error).__name__}") from error


def array_leaf(where: str, name: str, shape: Iterable[int], dtype: np.dtype, read: Callable[[], Any]) -> Leaf:
    """Returns a leaf that reads an array in native byte order; if the dtype is not supported, an unreadable leaf.

    Args:
      where: the file, for messages.
      name: the path of the leaf.
      shape: the shape of the array.
      dtype: the dtype in the file.
      read: returns the array as it is in the file.
    """
    if not is_stored(dtype):
        text = dtype.kind in "SUTO"
        return unreadable(where, name, f"{'text or Python objects' if text else 'values'} of dtype {dtype}", shape)
    native = dtype.newbyteorder("=")

    def read_native() -> np.ndarray:
        with reading(f"{where}: {name[:200]!r}", "cannot be read"):
            return np.ascontiguousarray(np.asarray(read()).astype(native, copy=False)).reshape(tuple(shape))

    shape = tuple(shape)
    return Leaf(name, shape, native, read_native)


def unreadable(where: str, name: str, what: str, shape: Iterable[int] | None = None) -> Leaf:
    """Returns a leaf that cannot be read: its `read` raises ValueError and says what the leaf holds."""

    def read() -> Any:
        raise ValueError(f"{where}: {name[:200]!r} holds {what}, which is not read; skip={name[:200]!r} leaves it out")

    return Leaf(name, None if shape is None else tuple(shape), None, read, what)


def nested(where: str, named: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Returns leaves by name as a tree of dicts whose keys are the parts of the names, split at the separator.

    Raises:
      ValueError: a name is a prefix of another, or has more parts than a tree may have levels.
    """
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *keys, last = name.split(separator) if separator else [name]
        if len(keys) >= MAX_DEPTH:
            raise ValueError(
                f"{where}: the tensor {name[:200]!r} has {len(keys) + 1} parts, but a tree has at most {MAX_DEPTH} "
                'levels; separator="" (--separator "") keeps names whole'
            )
        here = tree
        for key in keys:
            here = here.setdefault(key, {})
            if not isinstance(here, dict):
                break
        if not isinstance(here, dict) or last in here:
            raise ValueError(
                f"{where}: the tensor {name[:200]!r} and another one cannot be in one tree: one name is the "
                f'beginning of the other when split at {separator!r}; separator="" (--separator "") keeps names whole'
            )
        here[last] = leaf
    return tree


def guessed_separator(names: Iterable[str]) -> str:
    """Guesses the separator from the names: "/" if any name contains it, else "."."""
    return "/" if any("/" in name for name in names) else "."


def checkpoint_of(
    path: str,
    format: str,
    tree: Any,
    nbytes: int,
    skip: str | None,
    *,
    files: Iterable[str] = (),
    separator: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Returns a checkpoint from a tree of `Leaf` in dicts, lists and tuples, with None, read from `nbytes` bytes.

    Raises:
      ValueError: the tree is too deep, has keys without a common order, or paths far longer than the file; `skip` is
        not a regular expression, or matches no leaf.
    """
    check_tree(path, tree, nbytes)
    with reading(path, "a tree that JAX does not take"):
        flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    leaves = [
        leaf._replace(path=path_name(keys))
        if leaf.problem is None
        else unreadable(path, path_name(keys), leaf.problem, leaf.shape)
        for keys, leaf in flat
    ]
    skipped: list[str] = []
    if skip is not None:
        skipped = _matching(path, skip, [leaf.path for leaf in leaves])
        out = set(skipped)
        marked = jax.tree.unflatten(structure, [None if leaf.path in out else leaf for leaf in leaves])
        marked = _without(tree, marked)
        structure = jax.tree.structure(marked, is_leaf=_is_leaf)
        leaves = [leaf for leaf in leaves if leaf.path not in out]
    return Checkpoint(
        path, format, tuple(leaves), structure, tuple(files) or (path,), separator, dict(metadata or {}), tuple(skipped)
    )


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Leaf)


def check_tree(where: str, tree: Any, nbytes: int) -> None:
    """Raises ValueError for a tree that is too deep, or whose paths are far longer than `nbytes` in total."""
    room = PathRoom(nbytes)
    stack: list[tuple[Any, int, int]] = [(tree, 0, 0)]
    while stack:
        here, depth, length = stack.pop()
        if isinstance(here, dict):
            children: Iterable[tuple[Any, Any]] = here.items()
        elif type(here) in (list, tuple):
            children = enumerate(here)
        else:
            continue
        if depth >= MAX_DEPTH:
            raise ValueError(f"{where}: a tree deeper than {MAX_DEPTH} levels")
        for key, child in children:
            taken = length + 1 + (len(key) if isinstance(key, str) else len(str(key)))
            try:
                room.take(taken)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            stack.append((child, depth + 1, taken))


def _matching(where: str, skip: str, paths: list[str]) -> list[str]:
    try:
        pattern = re.compile(skip)
    except re.error as error:
        raise ValueError(f"skip={skip!r} is not a regular expression: {error}") from error
    found = [path for path in paths if pattern.search(path)]
    if not found:
        near = ", ".join(map(repr, nearest(skip, paths)))
        raise ValueError(
            f"{where}: skip={skip!r} matches none of the {len(paths)} leaves; the nearest paths are {near}"
        )
    return found


def _without(tree: Any, marked: Any) -> Any:
    """Returns the tree without the leaves that are None in `marked`; lists and tuples keep None at these places."""
    if isinstance(tree, dict):
        both = {key: (child, marked[key]) for key, child in tree.items()}
        return type(tree)((k, _without(a, b)) for k, (a, b) in both.items() if not (_is_leaf(a) and b is None))
    if type(tree) in (list, tuple):
        return type(tree)(_without(a, b) for a, b in zip(tree, marked, strict=True))
    return marked
