"""For the API reference: an example in a docstring becomes a block of code, of which Markdown would make quotations."""

import re

import griffe


def fenced(text: str) -> str:
    r"""A docstring with its examples in fences: what begins with `>>>`, up to an empty line.

    >>> print(fenced("Adds.\n\n>>> 1 + 1\n2"))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    return re.sub(r"^>>> (?:.+\n?)+", lambda block: f"```pycon\n{block[0].rstrip()}\n```\n", text, flags=re.M).rstrip()


class Examples(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called for each object once it is read."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
