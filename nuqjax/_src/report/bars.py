"""Progress bars, on terminals and in notebooks."""

import io
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'


def progress_bars(*columns: ProgressColumn) -> Progress:
    """Returns rich's progress bars with these columns, for a `with` statement, wherever Python runs."""
    if not Console().is_jupyter:
        return Progress(*columns)
    unused = Console(file=io.StringIO(), force_jupyter=False)  # bars in a notebook are drawn by `_NotebookBars` alone
    return _NotebookBars(*columns, auto_refresh=False, console=unused)


class _NotebookBars(Progress):
    """Bars in one output of a cell. Rich's own need ipywidgets, and do not draw the last step in a notebook."""

    _output: Any = None  # IPython's handle of what the cell shows

    def start(self) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self._output = display(self._drawn(), raw=True, display_id=True)

    def refresh(self) -> None:
        if self._output is not None:
            self._output.update(self._drawn(), raw=True)

    def stop(self) -> None:
        self.refresh()

    def _drawn(self) -> dict[str, str]:
        console = Console(file=io.StringIO(), record=True, width=100, force_terminal=True, force_jupyter=False)
        console.print(self.get_renderable())
        text = console.export_text(clear=False)
        return {"text/plain": text, "text/html": console.export_html(inline_styles=True, code_format=_HTML)}
