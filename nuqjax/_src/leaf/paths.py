"""Paths of leaves as text: their names, safe printing, and the paths most like a pattern."""

import difflib
from collections.abc import Sequence

import jax.tree_util
from jax.tree_util import KeyPath


def path_name(path: KeyPath) -> str:
    """Returns a leaf's path in the form that rules match.

    >>> path_name(jax.tree_util.tree_flatten_with_path({"conv": {"kernel": 0}})[0][0][0])
    'conv/kernel'
    """
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def printable(text: object, longest: int = 400) -> str:
    r"""Returns text that is safe to print: unprintable characters are escaped, and very long text is cut in the middle.

    >>> printable("a\x1b[31m b\u202e")
    'a\\x1b[31m b\\u202e'
    """
    text = str(text)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def nearest(pattern: str, paths: Sequence[str]) -> list[str]:
    """Returns up to three paths like a pattern, else the first three; reads 1000 paths, 200 characters of each.

    >>> nearest("kernal", ["conv/bias", "conv/kernel"])
    ['conv/kernel']
    """
    some = [path[:200] for path in paths[:1000]]
    return difflib.get_close_matches(pattern[:200], some, n=3, cutoff=0.4) or some[:3]
