"""Tables as text: what stands in them is no markup, and moves no cursor."""

import io
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nuqjax._src.leaf.paths import printable

if TYPE_CHECKING:
    pass


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def add_row(table: Table, *cells: Any) -> None:
    """A row of plain text: nothing in it is markup, or moves a terminal's cursor."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def plain_console(**options: Any) -> Console:
    """A console to which text is text."""
    return Console(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)


def render(table: Table) -> str:
    """A rich table as text, as wide as it needs to be."""
    console = plain_console(file=io.StringIO(), width=200, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
