"""Renders tables as text: cells are not read as markup, and do not move a terminal's cursor."""

import io
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nuqjax._src.leaf.paths import printable


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def add_row(table: Table, *cells: Any) -> None:
    """Adds a row of plain text: cells are not read as markup, and do not move a terminal's cursor."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def plain_console(**options: Any) -> Console:
    """Returns a console that prints text as it is: no markup, emoji or highlighting."""
    return Console(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)


def render(table: Table) -> str:
    """Returns a rich table as text, as wide as it needs to be, up to 200 columns."""
    console = plain_console(file=io.StringIO(), width=200, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
