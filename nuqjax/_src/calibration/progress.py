"""Progress bars for passes over leaves and batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nuqjax._src.calibration.programs import Some


@contextmanager
def bars(show: bool) -> Iterator[Callable[[Sequence[Any] | Iterable[Any], str, int], Iterable[Any]]]:
    """Yields a function that shows a progress bar for some work with a known number of steps."""
    if not show:
        yield lambda work, name, count: work
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from nuqjax._src.report.bars import progress_bars

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with progress_bars(*columns) as shown:
        yield lambda work, name, count: shown.track(work, total=count, description=name)


@dataclass(frozen=True)
class Counted:
    """Batches that show a progress bar for each pass over them."""

    batches: Some
    shown: Callable[..., Iterable[Any]]
    name: str

    def __iter__(self) -> Iterator[Any]:
        return iter(self.shown(self.batches, self.name, len(self.batches.numbers)))
