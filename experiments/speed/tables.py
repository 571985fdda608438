"""Markdown of what `experiments.speed.fit` measured, for `docs/results/speed.md` (`experiments.documents.tables`)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.record.markdown import commands, markdown
from experiments.speed.peers import COREMLTOOLS

_EXACT = 1e-6  # an excess up to this is not shown


def tables(results: Iterable[dict[str, Any]]) -> str:
    """A table for each section of any of the results, in their order, then the versions and the commands.

    Raises:
      ValueError: a cell is in two of the results: which of the two should be shown?
    """
    results = list(results)
    sections: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for name, cells in result["sections"].items():
            sections.setdefault(name, []).extend(cells)
    parts = []
    for name, cells in sections.items():
        keys = [(cell["data"], cell["values"], cell.get("num_levels"), cell.get("bits")) for cell in cells]
        twice = sorted({key for key in keys if keys.count(key) > 1}, key=str)
        if twice:
            raise ValueError(f"section {name} of the benchmark has two results for {twice[0]}")
        parts.append(_SECTIONS[name](cells))
    parts += [_circumstances(results), commands(results)]
    return "\n\n".join(parts) + "\n"


def _by_tool(title: str, number: Callable[[dict[str, Any]], str]) -> Callable[[Sequence[dict[str, Any]]], str]:
    """A row for each cell, a column for each tool that was measured in any."""

    def table(cells: Sequence[dict[str, Any]]) -> str:
        tools = list(
            dict.fromkeys(entry["tool"] for cell in cells for entry in cell["entries"] if entry["status"] == "measured")
        )
        rows = []
        for cell in cells:
            entries = {entry["tool"]: entry for entry in cell["entries"]}
            shape = f"{cell['values']:,}" if cell["rows"] == 1 else f"{cell['values']:,} in {cell['rows']:,} rows"
            rows.append(
                [cell["data"], shape, str(cell["num_levels"]), *(_entry(entries.get(tool), number) for tool in tools)]
            )
        return f"{title}\n\n" + markdown(["data", "values", "levels", *tools], rows, left=1)

    return table


def _channels(cells: Sequence[dict[str, Any]]) -> str:
    title = "A codebook for each output channel, millions of weights a second:"
    table = _by_tool(title, lambda entry: _seconds(entry["weights_per_second"] / 1e6))(cells)
    return "\n\n".join([table, *(line + "." for line in rates(cells))])


def _entry(entry: dict[str, Any] | None, number: Callable[[dict[str, Any]], str]) -> str:
    """What a tool took, and in brackets how far it is from the best; or why it was not measured."""
    if entry is None or entry["status"] == "not installed":
        return ""
    if entry["status"] != "measured":
        return entry["status"].removeprefix("skipped: ")
    shown = number(entry)
    return f"{shown} ({entry['excess']:.0e})" if entry["excess"] is not None and entry["excess"] > _EXACT else shown


def rates(cells: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each cell of `channels` in which coremltools was measured: our rate and its share of ours."""
    lines = []
    for cell in cells:
        entries = {entry["tool"]: entry for entry in cell["entries"] if entry["status"] == "measured"}
        if COREMLTOOLS.name in entries:
            ours, its = (entries[name]["weights_per_second"] / 1e6 for name in ("nuqjax", COREMLTOOLS.name))
            lines.append(
                f"{cell['data']}: {ours:.2f} M weights/s, {ours / its:.1f} times {COREMLTOOLS.name}'s {its:.3f}"
            )
    return lines


def _seconds(value: float) -> str:
    """Three digits.

    >>> _seconds(0.01234), _seconds(1234.5)
    ('0.0123', '1234')
    """
    return f"{value:#.3g}".removesuffix(".") if value < 1000 else f"{value:.0f}"


def _tree(cells: Sequence[dict[str, Any]]) -> str:
    header = [
        "tree",
        "weights",
        "bits",
        "imports, s",
        "result, s",
        "again, s",
        "peak memory, MB",
        "of the tree's bytes",
    ]
    rows = [
        [
            cell["data"],
            f"{cell['values']:,}",
            str(cell["bits"]),
            *(_seconds(cell[name]) for name in ("imported", "cold", "seconds")),
            f"{cell['peak_bytes'] / 1e6:,.0f}",
            f"{cell['peak_bytes'] / cell['bytes']:.2f}×",
        ]
        for cell in cells
    ]
    title = "A whole tree, in a new process; seconds from its start, imports, loading and compilation included:"
    return f"{title}\n\n" + markdown(header, rows, left=1)


def _curve(cells: Sequence[dict[str, Any]]) -> str:
    header = ["data", "values", "s", "ns a value", "proven, s", "ns a value", "peak memory, MB", "of the row's bytes"]
    rows = [
        [
            cell["data"],
            f"{cell['values']:,}",
            *(
                text
                for name in ("seconds", "proven_seconds")
                for text in (_seconds(cell[name]), f"{1e9 * cell[name] / cell['values']:.1f}")
            ),
            f"{cell['peak_bytes'] / 1e6:,.0f}",
            f"{cell['peak_bytes'] / cell['bytes']:.1f}×",
        ]
        for cell in cells
    ]
    title = f"One row of growing length, {cells[0]['num_levels']} levels, each in a new process:"
    return f"{title}\n\n" + markdown(header, rows, left=1)


_SECTIONS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "rows": _by_tool("One row, seconds:", lambda entry: _seconds(entry["seconds"])),
    "half": _by_tool("One row of 16-bit floats, seconds:", lambda entry: _seconds(entry["seconds"])),
    "channels": _channels,
    "groups": _by_tool(
        "A codebook for each 64 values, millions of weights a second:",
        lambda entry: _seconds(entry["weights_per_second"] / 1e6),
    ),
    "tree": _tree,
    "curve": _curve,
}


def _circumstances(results: Sequence[dict[str, Any]]) -> str:
    """Where it was measured, and with what: a line for each circumstances that differ."""
    lines = []
    for result in results:
        where = result["platform"]
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version is not None)
        lines.append(f"Measured on {where['cores']} cores ({where['machine']}, {where['backend']}): {versions}.")
    return "\n".join(dict.fromkeys(lines))
