"""Converts reports to JSON and back, and reports on a leaf from the file alone."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, get_type_hints

import numpy as np

from nuqjax._src.report.comparison import usage
from nuqjax._src.report.leaf_report import LeafReport
from nuqjax._src.report.report import Report
from nuqjax._src.store.dtypes import is_floating
from nuqjax._src.store.entry import Entry


def report_to_json(report: Report) -> list[dict[str, Any]]:
    """Returns a report's leaves as JSON; numbers that are not finite become strings."""

    def plain(value: Any) -> Any:
        return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

    return [{name: plain(value) for name, value in vars(leaf).items()} for leaf in report.leaves]


_HINTS: dict[str, Any] = get_type_hints(LeafReport)
_MOST = 2**63


def report_from_json(value: Any, where: str) -> Report:
    """Returns the report that is stored in a layout.

    Raises:
      ValueError: a field is missing, unknown, or of the wrong type.
    """
    if not isinstance(value, list):
        raise ValueError(f"{where}: the report is not a list")
    known = {f.name: f.default for f in fields(LeafReport)}
    needed = {name for name, default in known.items() if default is MISSING}
    leaves = []
    for number, given in enumerate(value):
        if not isinstance(given, dict) or not needed <= set(given) <= set(known):
            raise ValueError(f"{where}: leaf {number} of the report does not have the fields of one")
        made = {}
        for name, item in given.items():
            good, made[name] = _field(name, item)
            if not good:
                raise ValueError(f"{where}: leaf {number} of the report: {name} is {str(item)[:80]!r}")
        leaves.append(LeafReport(**made))
    return Report(tuple(leaves))


def _field(name: str, item: Any) -> tuple[bool, Any]:
    """Returns whether the item is a valid value of a field, and the value itself."""
    if name == "shape":
        good = isinstance(item, list) and all(type(n) is int and 0 <= n < _MOST for n in item)
        return good, tuple(item) if good else item
    if _HINTS[name] == float | None:
        number = float(item) if isinstance(item, str) and item in ("inf", "-inf", "nan") else item
        if type(number) is float or (type(number) is int and abs(number) < _MOST):
            return name == "certificate" or not number < 0, number
        return number is None, number
    if isinstance(item, int):  # sizes and counts; a bool is not accepted
        return type(item) is int and 0 <= item < _MOST and isinstance(item, _HINTS[name]), item
    return isinstance(item, _HINTS[name]), item


def with_coded_sizes(report: Report, sizes: Mapping[str, int]) -> Report:
    """Returns the report with the sizes of entropy-coded indices, given by path, filled in."""
    return replace(report, leaves=tuple(replace(leaf, nbytes_coded=sizes.get(leaf.path)) for leaf in report.leaves))


def report_entry(entry: Entry, verify: bool) -> LeafReport:
    """Returns the report of a leaf from the file alone, for a file without a stored report."""
    if entry.kind in ("python", "absent", "key"):
        kind = str(entry.layout.get("type", entry.layout.get("impl")))
        size = entry.nbytes("data")
        return LeafReport(entry.path, (), kind, 0, size, size, "not an array" if not size else "random keys")
    shape, dtype = entry.shape_and_dtype() or ((), "")
    size = math.prod(shape)
    before = size * np.dtype(dtype).itemsize
    if entry.kind == "array":
        floating = is_floating(dtype)
        reason = "left dense" if floating else f"dtype {dtype} is not floating"
        return LeafReport(entry.path, shape, dtype, size, before, before, reason)
    leaf = entry.read(verify)
    return LeafReport(
        entry.path, shape, dtype, size, before, leaf.nbytes,
        bits=leaf.bits, granularity=str(leaf.granularity),
        codebook_format=str(leaf.codebook_format or leaf.levels.dtype),
        levels_available=math.prod(leaf.levels.shape), payload_bits=leaf.payload_bits,
        nbytes_packed=int(leaf.packed.nbytes), **usage(leaf)._asdict(),
        nbytes_coded=entry.nbytes("coded", "model", "weights") if "coded" in entry.tensors else None,
    )  # fmt: skip
