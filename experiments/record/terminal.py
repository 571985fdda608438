"""What the commands show: progress, tables, and mistakes."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def progress_bars() -> Progress:
    """Progress bars on the standard error stream: what is done, how much of it, and since when."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def show(table: Table, columns: int = 200) -> None:
    """Prints a table as wide as the terminal; where there is none, in so many columns."""
    Console(width=None if sys.stdout.isatty() else columns).print(table)


@contextmanager
def mistakes(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the process with the usage and the reason where what was asked for is wrong or not there."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
