"""Converts a tree's structure to plain JSON and back.

The structure is a list of nodes in pre-order, so that its JSON is flat even for a deep tree:

    "leaf"                      a leaf; the leaves come in the order in which JAX flattens the tree
    null                        None
    ["dict", [key, …]]          a dict; its children follow in the order of the keys
    ["OrderedDict", [key, …]]
    ["list", n], ["tuple", n]   n children follow
    ["node", type, [name, …]]   any other node: the name of its type, for people, and the names of its children

A key is a string, an integer, true, false, or {"tuple": [key, …]}.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import jax

from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import path_name

MAX_DEPTH = 256
MAX_KEY_DEPTH = 8  # nesting of tuples in a key
_MAX_EQUAL_HASHES = 64  # in one dict: a few occur by chance or for small floats; n of them take n² steps
_KEYED = {"dict": dict, "OrderedDict": OrderedDict}
_COUNTED = {"list": list, "tuple": tuple}


def tree_to_nodes(tree: Any) -> tuple[list[Any], list[tuple[str, Any]]]:
    """Returns the nodes of a tree, and its leaves with their paths, in JAX's order.

    Raises:
      ValueError: a key is of a type that the format does not hold, or the tree is deeper than `MAX_DEPTH`.

    >>> tree_to_nodes({"b": [1, None], "a": 2})
    ([['dict', ['a', 'b']], 'leaf', ['list', 2], 'leaf', None], [('a', 2), ('b/0', 1)])
    """
    nodes: list[Any] = []
    leaves: list[tuple[str, Any]] = []
    stack: list[tuple[tuple[Any, ...], Any]] = [((), tree)]
    while stack:
        path, here = stack.pop()
        if here is None:
            nodes.append(None)
            continue
        children = [] if is_codebook_array(here) else _children(here)
        if is_codebook_array(here) or (len(children) == 1 and children[0][0] == ()):
            nodes.append("leaf")
            leaves.append((path_name(path), here))
            continue
        if len(path) >= MAX_DEPTH:
            raise ValueError(f"{path_name(path)}: a tree deeper than {MAX_DEPTH} levels, which the format cannot store")
        kind, name = type(here).__name__, path_name(path)
        if type(here) in _KEYED.values():
            nodes.append([kind, [_key_to_json(entry[-1].key, name) for entry, _ in children]])
        elif type(here) in _COUNTED.values():
            nodes.append([kind, len(children)])
        else:
            names = [path_name(entry) for entry, _ in children]
            for child in names:
                _check_text(child, name)
            nodes.append(["node", f"{type(here).__module__}.{type(here).__qualname__}", names])
        stack.extend(((*path, *entry), child) for entry, child in reversed(children))
    return nodes, leaves


def _children(node: Any) -> list[tuple[Any, Any]]:
    """Returns the children of a node with their keys; for a leaf, the leaf itself with an empty key."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]


def _key_to_json(key: Any, path: str, depth: int = 0) -> Any:
    if type(key) is tuple and depth < MAX_KEY_DEPTH:
        return {"tuple": [_key_to_json(part, path, depth + 1) for part in key]}
    if type(key) not in (str, int, bool):
        raise ValueError(
            f"{path or 'the tree'}: a dict with the key {key!r} of type {type(key).__name__}; "
            "a file holds keys that are str, int, bool or tuples of these"
        )
    if isinstance(key, str):
        _check_text(key, path)
    return key


def _check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path or 'the tree'}: the key {text!r} is not valid Unicode") from error


class Structure:
    """The checked nodes of a tree; `paths` are the paths of its leaves, and `build` makes the tree from leaves."""

    def __init__(self, nodes: Any, nbytes: int) -> None:
        """Checks nodes that come from `nbytes` bytes of a file.

        Raises:
          ValueError: a node is wrong; the message says how, and names it.
        """
        if not isinstance(nodes, list):
            raise ValueError(f"the tree is {_kind(nodes)}, not a list of nodes")
        room = PathRoom(nbytes)
        self._nodes: list[tuple[str, list[Any] | int]] = []
        self.paths: list[str] = []
        open_: list[tuple[str, list[str]]] = [("", ["tree"])]  # prefixes, and the names of children that must follow
        for number, node in enumerate(nodes):
            while open_ and not open_[-1][1]:
                open_.pop()
            if not open_:
                raise ValueError(f"the tree has nodes after its end, from node {number} on")
            prefix, waiting = open_[-1]
            name = waiting.pop()
            room.take(len(prefix) + len(name))
            path = f"{prefix}/{name}" if len(open_) > 2 else name if len(open_) > 1 else ""
            if node == "leaf":
                self._nodes.append(("leaf", 0))
                self.paths.append(path)
                continue
            if node is None:
                self._nodes.append(("none", 0))
                continue
            kind, content, names = _check_node(node, f"node {number} of the tree", len(nodes) - number - 1)
            if len(open_) > MAX_DEPTH:
                raise ValueError(f"node {number} of the tree is deeper than {MAX_DEPTH} levels")
            self._nodes.append((kind, content))
            open_.append((path, names[::-1]))
        if any(waiting for _, waiting in open_):
            raise ValueError("the tree ends before the children of its nodes do")

    def build(self, leaves: Sequence[Any]) -> Any:
        """Builds the tree with these leaves; a node that is not a Python container becomes a dict of its children.

        Raises:
          ValueError: two children of such a node have the same name.
        """
        waiting = list(leaves)
        stack: list[Any] = []
        for kind, content in reversed(self._nodes):
            if kind == "leaf":
                stack.append(waiting.pop())
            elif kind == "none":
                stack.append(None)
            elif isinstance(content, int):
                children = [stack.pop() for _ in range(content)]
                stack.append(children if kind == "list" else tuple(children))
            else:
                made = OrderedDict() if kind == "OrderedDict" else {}
                for key in content:
                    made[key] = stack.pop()
                if len(made) < len(content):
                    raise ValueError("a node has two children of the same name: like=… tells them apart")
                stack.append(made)
        return stack.pop()


def _check_node(node: Any, where: str, following: int) -> tuple[str, list[Any] | int, list[str]]:
    """Returns `(kind, keys or count, names of children)` of a node with children; `following` nodes come after it."""
    if not isinstance(node, list) or not node or not isinstance(node[0], str):
        raise ValueError(f'{where} is {_kind(node)}, not "leaf", null or a list that begins with its kind')
    kind, *rest = node
    count = rest[-1] if rest and type(rest[-1]) is int else len(rest[-1]) if rest and type(rest[-1]) is list else -1
    if count > following:
        raise ValueError(f"{where} has {count} children, but {following} nodes follow it")
    if kind in _COUNTED and len(rest) == 1 and type(rest[0]) is int and count >= 0:
        return kind, count, list(map(str, range(count)))
    if kind in _KEYED and len(rest) == 1 and isinstance(rest[0], list):
        keys = [_key_from_json(key, where) for key in rest[0]]
        check_hashes(keys, where)
        try:
            ordered = kind == "OrderedDict" or all(a < b for a, b in pairwise(keys))
        except TypeError as error:
            raise ValueError(f"{where}: keys of types that have no common order") from error
        if not ordered or len(set(keys)) < len(keys):
            raise ValueError(f"{where}: keys that are not in order, or repeat")
        return kind, keys, list(map(str, keys))
    if kind == "node" and len(rest) == 2 and isinstance(rest[0], str) and isinstance(rest[1], list):
        if not all(isinstance(name, str) for name in rest[1]):
            raise ValueError(f"{where}: a child's name that is not a string")
        return kind, rest[1], list(rest[1])
    raise ValueError(f"{where}: {kind[:40]!r} with {len(rest)} fields is not a node of the format")


def check_hashes(keys: Iterable[Any], where: str) -> None:
    """Raises ValueError for keys chosen to have equal hashes: building a dict of n such keys takes n² steps.

    >>> check_hashes(range(1000), "here")
    >>> check_hashes([n * (2**61 - 1) for n in range(1000)], "here")
    Traceback (most recent call last):
    ValueError: here: 1000 keys have equal hashes, which only a forged file has
    """
    count = max(Counter(map(hash, keys)).values(), default=0)
    if count > _MAX_EQUAL_HASHES:
        raise ValueError(f"{where}: {count} keys have equal hashes, which only a forged file has")


class PathRoom:
    """A limit on the length of all paths: many leaves below a long key could need the square of the file's bytes."""

    def __init__(self, nbytes: int) -> None:
        """Sets the limit for a tree that is described by `nbytes` bytes of a file."""
        self._nbytes, self._left = nbytes, 16 * nbytes + (1 << 20)

    def take(self, length: int) -> None:
        """Subtracts `length` characters from what is left; raises ValueError if that is not enough."""
        self._left -= length
        if self._left < 0:
            raise ValueError(f"the paths of the leaves are far longer than the {self._nbytes} bytes that describe them")


def _key_from_json(key: Any, where: str, depth: int = 0) -> Any:
    if isinstance(key, dict) and list(key) == ["tuple"] and isinstance(key["tuple"], list) and depth < MAX_KEY_DEPTH:
        return tuple(_key_from_json(part, where, depth + 1) for part in key["tuple"])
    if isinstance(key, str | int):  # bool is an int
        return key
    raise ValueError(f"{where}: a key that is {_kind(key)}")


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
