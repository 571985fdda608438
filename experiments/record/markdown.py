"""Small pieces of Markdown that the documents' tables are made of."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are set to the left, the others to the right.

    >>> print(markdown(["method", "bits"], [["knq", "4"]], left=1))
    | method | bits |
    | --- | ---: |
    | knq | 4 |
    """
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def percent(fraction: float | None) -> str:
    """A share of a hundred, or a dash.

    >>> percent(0.5), percent(None)
    ('50.0 %', '–')
    """
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def commands(results: Iterable[dict[str, Any]]) -> str:
    """The commands that remake the results, in a block of shell."""
    return "```sh\n" + "\n".join(command for result in results for command in result["commands"]) + "\n```"
