"""What every results file says of the machine that made it, and how it is written."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).resolve().parents[1] / "results"  # those that the documents show


def circumstances(*packages: str) -> dict[str, Any]:
    """The versions of Python and of the packages (None for one that is not installed), and the machine."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "platform": {
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes JSON; a half-written file never replaces a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def keeper(path: Path | None, commands: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """What writes the results so far into a file, under the commands that made them.

    Args:
      path: the file; None keeps nothing.
      commands: oldest first; one that comes again is named once.
    """
    unique = list(dict.fromkeys(commands))

    def keep(results: dict[str, Any]) -> None:
        if path is not None:
            write(path, {"commands": unique, **results})

    return keep


def read(path: Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
      ValueError: it holds no JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds no results: {error}") from error
