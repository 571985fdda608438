"""The command `compare`: two checkpoints, tensor by tensor."""

import math
import sys
from typing import Any

from rich.table import Table

import nuqjax
from nuqjax._src.cli.show import as_json, say_skipped
from nuqjax._src.leaf.paths import printable
from nuqjax._src.report.render import add_row, plain_console
from nuqjax._src.report.trees import difference, ratio_db, same_object, total


def compare(first: str, second: str, json: bool, separator: str | None, skip: str | None) -> None:
    """Compares two checkpoints, tensor by tensor."""
    a, b = (nuqjax.open_checkpoint(path, separator=separator, skip=skip) for path in (first, second))
    for checkpoint in (a, b):
        say_skipped(checkpoint)
    others = {leaf.path: leaf for leaf in b.leaves}
    unmatched = sorted({leaf.path for leaf in a.leaves} ^ set(others))
    if unmatched:
        raise ValueError(f"{unmatched[0]!r} is in only one of {first} and {second}")
    rows, sums = [], []
    for leaf in a.leaves:
        other = others[leaf.path]
        row: dict[str, Any] = {"path": leaf.path}
        rows.append(row)
        problem = leaf.problem or other.problem
        if problem is not None:
            row |= {"equal": None, "equal_values": None, "not_read": problem}
            continue
        if leaf.shape != other.shape:
            raise ValueError(f"{leaf.path}: shape {leaf.shape} in {first}, but {other.shape} in {second}")
        if leaf.shape is None:
            row["equal"], row["equal_values"] = same_object(leaf.read(), other.read())
            continue
        found = difference(leaf.read(), other.read())
        if found.signal is not None and found.noise is not None:
            sums.append((found.signal, found.noise))
        row |= {
            "shape": list(leaf.shape), "dtypes": [str(leaf.dtype), str(other.dtype)], "equal": found.equal,
            "equal_values": found.equal_values, "nan": list(found.nan), "sqnr_db": found.sqnr_db,
            "largest_error": found.largest_error,
        }  # fmt: skip
    whole = {
        "sqnr_db": ratio_db(*(total(part) for part in zip(*sums, strict=True)))
        if sums
        else None,  # of floating tensors
        "equal": all(row["equal"] is not False for row in rows),
        "equal_values": all(row["equal_values"] is not False for row in rows),
        "not_read": sum("not_read" in row for row in rows),
        "nan": [sum(row["nan"][side] for row in rows if "nan" in row) for side in (0, 1)],
    }
    if json:
        print(as_json({"leaves": rows, "total": whole}))
        return
    table = Table("tensor", "shape", title=f"{printable(first)} and {printable(second)}")
    nan = any(whole["nan"])
    for name in ("SQNR dB", "largest error", *(["NaN"] if nan else [])):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row["path"], "×".join(map(str, row.get("shape", []))), *_told(row)]
        add_row(table, *cells, *(["/".join(map(str, row.get("nan", [])))] if nan else []))
    plain_console(width=None if sys.stdout.isatty() else 160).print(table)
    print(_summary(whole))


def _told(row: dict[str, Any]) -> tuple[str, str]:
    """Returns what the table shows of a tensor: how alike the two are, and the largest error."""
    if "not_read" in row:
        return "not read", row["not_read"]
    if row["equal"]:
        return "equal", ""
    if row["equal_values"]:
        return "equal values", ""
    number = row.get("sqnr_db")
    error = row.get("largest_error")
    shown = "" if error is None else str(error) if isinstance(error, int) else f"{error:.3g}"
    return "differs" if number is None else f"{number:.2f}", shown


def _summary(whole: dict[str, Any]) -> str:
    if whole["equal"]:
        text = "no bit differs"
    elif whole["equal_values"]:
        text = "no value differs, but dtypes or bits do"
    elif whole["sqnr_db"] is None or whole["sqnr_db"] == math.inf:
        text = "no floating value differs, but others do"
    else:
        text = f"SQNR of all floating tensors {whole['sqnr_db']:.2f} dB"
    if whole["nan"][0] or whole["nan"][1]:
        text += f"; {whole['nan'][0]} and {whole['nan'][1]} NaN"
    return text + (f"; {whole['not_read']} tensors are not read" if whole["not_read"] else "")
