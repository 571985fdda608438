"""Runs the notebooks of this folder and keeps their outputs in them: `python -m examples [NAME …]`.

Needs `nbclient` and `ipykernel` (`pip install --group notebooks`). Times of execution and folders of this machine are
not kept.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat  # pyright: ignore[reportMissingImports]
from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

FOLDER = Path(__file__).parent


def execute(path: Path) -> None:
    """Runs a notebook from its first cell to its last and writes the outputs into it."""
    notebook = nbformat.read(path, as_version=4)
    # Commands after "!" are those of this interpreter's environment, and tables have room.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ |= {"COLUMNS": "120", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER.parent)}},
    )
    client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for folder in (FOLDER.parent, Path(sys.prefix), Path.home()):
        if str(folder) in nbformat.writes(notebook):
            raise ValueError(f"{path.name}: an output names {folder}, a folder of this machine")
    nbformat.write(notebook, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples", description="Run notebooks, keep outputs.")
    parser.add_argument("names", nargs="*", help="of notebooks, without .ipynb; all without any")
    names = parser.parse_args(argv).names or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    for name in names:
        execute(FOLDER / f"{name}.ipynb")
        print(f"{name}.ipynb")


if __name__ == "__main__":
    main()
