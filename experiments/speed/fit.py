"""How long `nuqjax.fit` takes, beside other tools on the same data in the same run, and how good the levels are.

    python -m experiments.speed.fit                                # every section
    python -m experiments.speed.fit rows --sizes 1e6 --levels 16   # one cell
    python -m experiments.speed.fit --json FILE --data PATH --budget 200

Sections:
  rows: one row of float32 values, Student t with 3 degrees of freedom.
  half: one row of bfloat16 or float16 values, t with 5 degrees; the others cluster `numpy.unique` with its counts.
  channels: a codebook of 16 levels for each output channel: `[512, 4608]`, and the 13 convolutions of VGG-16.
  groups: a codebook of 16 levels for each run of 64 values.
  tree: `nuqjax.compress` of a whole VGG-16, 4 bits per tensor, in a new process: seconds from its start to the result,
    imports and compilation included, and peak memory. Its dense layers are Student-t values with 5 degrees of freedom;
    so are its convolutions where the trained ones are missing.
  curve: `nuqjax.fit` of one row of 10⁶ to 10⁹ values, 16 levels, each in a new process.

In the first four every tool is called once (`first call`: imports and compilation included), then `--repeats` times,
of which the median counts. What a tool must do is to return levels: indices are asked of none, though some make them as
well. A tool's squared error is summed here in float64 from its levels (`squared_error`), and its excess is over the
lower bound that `nuqjax.fit` proves: at least 0, and an upper limit of how far the levels are from the best.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from rich.console import Console
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.record.results import circumstances, write
from experiments.speed import fresh_process
from experiments.speed.draws import student_t
from experiments.speed.fresh_process import TOLERANCE
from experiments.speed.peers import (
    CHANNEL_TOOLS,
    DISTRIBUTIONS,
    GROUP_TOOLS,
    HALF_TOOLS,
    ROW_TOOLS,
    Tool,
)
from experiments.speed.tables import rates

_BLOCK = 2**20  # values whose float64 errors are held at once
_SAMPLE = 20  # a slow tool's time is predicted from one part in so many
_UNPREDICTED = 10**4  # so few values are fitted without predicting the time


# --- What is fitted.


@dataclass(frozen=True)
class Options:
    """What is measured, and how often.

    Attributes:
      sizes: numbers of values; None for each section's own.
      levels: K of the sections `rows` and `half`.
      repeats: calls of which the median is taken.
      budget: seconds; a slow tool is left out where one call is predicted to take longer, and no tool is called again
        when it has taken as much.
      data: folder with `weights/` of the trained networks, or None.
    """

    sizes: tuple[int, ...] | None = None
    levels: tuple[int, ...] = (4, 16, 64, 256)
    repeats: int = 3
    budget: float = 30.0
    data: Path | None = None


class Case(NamedTuple):
    """Matrices `[R, N]` whose rows are fitted with `num_levels` levels each, by us and by `tools`."""

    name: str
    matrices: Sequence[np.ndarray]
    num_levels: int
    tools: Sequence[Tool]


def kernel_rows(params: Any) -> list[np.ndarray]:
    """The kernels of a tree of convolutions (HWIO) as matrices with a row for each output channel."""
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
    return [np.ascontiguousarray(np.asarray(leaf).reshape(-1, leaf.shape[-1]).T) for leaf in kernels]


def _rows(options: Options) -> Iterator[Case]:
    for size in options.sizes or (10**6, 10**7):
        values = student_t(3, (1, size))
        for num_levels in options.levels:
            yield Case("t3 float32", [values], num_levels, ROW_TOOLS)


def _half(options: Options) -> Iterator[Case]:
    for dtype in (ml_dtypes.bfloat16, np.float16):
        for size in options.sizes or (10**6, 10**7):
            values = student_t(5, (1, size), dtype)
            for num_levels in options.levels:
                yield Case(f"t5 {np.dtype(dtype).name}", [values], num_levels, HALF_TOOLS)


def channel_cases(options: Options) -> Iterator[Case]:
    """What the section `channels` fits."""
    for size in options.sizes or (512 * 4608,):
        yield Case("t5 float32", [student_t(5, (max(size // 4608, 1), 4608))], 16, CHANNEL_TOOLS)
    if options.data is not None:
        params = networks.load_features(networks.get("vgg16"), options.data)["params"]
        yield Case("VGG-16 convolutions", kernel_rows(params), 16, CHANNEL_TOOLS)


def _groups(options: Options) -> Iterator[Case]:
    for size in options.sizes or (10**7,):
        yield Case("t5 float32", [student_t(5, (max(size // 64, 1), 64))], 16, GROUP_TOOLS)


# --- Measuring.


def squared_error(values: np.ndarray, levels: np.ndarray) -> float:
    """Σ (value − nearest level)², each term and the sum in float64.

    Args:
      values: `[N]` of any floating dtype.
      levels: `[K]` in any order.

    >>> squared_error(np.array([0.0, 1.0, 10.0, 12.0], np.float32), np.array([11.0, 0.5]))
    2.5
    """
    levels = np.sort(np.asarray(levels, np.float64))
    middles = (levels[1:] + levels[:-1]) / 2
    sums = []
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK].astype(np.float64)
        sums.append(np.sum(np.square(block - levels[np.searchsorted(middles, block)])))
    return math.fsum(sums)


def _errors(matrices: Sequence[np.ndarray], levels: Sequence[Any]) -> np.ndarray:
    """The squared error of every row of every matrix, one after the other."""
    return np.array(
        [squared_error(row, fitted) for rows, each in zip(matrices, levels, strict=True)
         for row, fitted in zip(rows, each, strict=True)]
    )  # fmt: skip


def measure(call: Callable[[], Any], repeats: int, budget: float = math.inf) -> tuple[dict[str, Any], Any]:
    """The seconds that a call takes, and what it returned: a first call, then at least one and at most `repeats`."""
    start = time.perf_counter()
    result = call()
    first = time.perf_counter() - start
    runs = []
    while len(runs) < repeats and (not runs or first + sum(runs) < budget):
        start = time.perf_counter()
        call()
        runs.append(time.perf_counter() - start)
    return {"first_call": first, "runs": runs, "seconds": statistics.median(runs)}, result


def predicted_seconds(tool: Tool, case: Case) -> float:
    """How long one call would take, from that of a part of the data and in proportion to it; 0 for little data."""
    total = sum(rows.size for rows in case.matrices)
    if total <= _UNPREDICTED:
        return 0.0
    tool.fit(case.matrices[0][:1, :1024], case.num_levels)  # imports
    part = [
        rows[:, : rows.shape[1] // _SAMPLE] if len(rows) == 1 else rows[: -(-len(rows) // _SAMPLE)]
        for rows in case.matrices
    ]
    start = time.perf_counter()
    for rows in part:
        tool.fit(rows, case.num_levels)
    return (time.perf_counter() - start) * total / sum(rows.size for rows in part)


def _left_out(tool: Tool, case: Case, budget: float) -> str | None:
    """Why a tool is not measured, or None."""
    if any(importlib.util.find_spec(package) is None for package in (tool.package, *tool.needs)):
        return "not installed"
    if case.num_levels > tool.most_levels:
        return f"takes at most {tool.most_levels} levels"
    if tool.longest is not None and max(rows.shape[1] for rows in case.matrices) > tool.longest:
        return f"skipped: more than {tool.longest:,} values"
    if tool.slow and (predicted := predicted_seconds(tool, case)) > budget:
        return f"skipped: predicted {predicted:.0f} s"
    return None


def run_case(case: Case, options: Options) -> dict[str, Any]:
    """Measures one case: us without and with the proof, and every tool.

    Returns:
      A JSON-ready dict: what was fitted, `lower_bound` (of the squared error of all rows together), `gap` (the largest
      (sse − lower_bound) / sse of a row fitted with the proof) and `entries`, one for each tool, ours first: its
      `status` (`"measured"`, or why not), and if it was measured `first_call`, `runs` and their median `seconds`,
      `ratio` (its seconds to ours), `weights_per_second`, `sse`, `excess` (sse / lower_bound − 1) and
      `over_best` (sse / the least of the entries − 1).
    """
    total = sum(rows.size for rows in case.matrices)
    arrays = [jnp.asarray(rows) for rows in case.matrices]

    def ours(tolerance):
        fits = [nuqjax.fit(rows, case.num_levels, tolerance=tolerance) for rows in arrays]
        return jax.block_until_ready(fits)

    plain, fits = measure(lambda: ours(None), options.repeats)
    proven, proofs = measure(lambda: ours(TOLERANCE), options.repeats, options.budget)
    bounds = np.concatenate([np.float64(fit.lower_bound) * np.float64(fit.scale) ** 2 for fit in proofs])
    bound = math.fsum(bounds)
    proven_errors = _errors(case.matrices, [np.asarray(fit.levels) for fit in proofs])

    def entry(name: str, times: dict[str, Any], errors: np.ndarray) -> dict[str, Any]:
        error, seconds = math.fsum(errors), times["seconds"]
        return {
            "tool": name,
            "status": "measured",
            **times,
            "ratio": seconds / plain["seconds"],
            "weights_per_second": total / seconds,
            "sse": error,
            "excess": error / bound - 1 if bound else None,
        }

    entries = [
        entry("nuqjax", plain, _errors(case.matrices, [np.asarray(fit.levels) for fit in fits])),
        entry(f"nuqjax, proven to {TOLERANCE:g}", proven, proven_errors),
    ]
    for tool in case.tools:
        reason = _left_out(tool, case, options.budget)
        if reason is not None:
            entries.append({"tool": tool.name, "status": reason})
            continue
        times, levels = measure(
            lambda tool=tool: [tool.fit(rows, case.num_levels) for rows in case.matrices],
            options.repeats,
            options.budget,
        )
        entries.append(entry(tool.name, times, _errors(case.matrices, levels)))
    measured = [each for each in entries if each["status"] == "measured"]
    best = min(each["sse"] for each in measured)
    for each in measured:
        each["over_best"] = each["sse"] / best - 1 if best else None
    inexact = proven_errors > 0
    return {
        "data": case.name,
        "rows": sum(len(rows) for rows in case.matrices),
        "values": total,
        "num_levels": case.num_levels,
        "lower_bound": bound,
        "gap": float(np.max(1 - bounds[inexact] / proven_errors[inexact], initial=0)),
        "entries": entries,
    }


def _measured(cases: Callable[[Options], Iterator[Case]]) -> Callable[[Options], Iterator[dict[str, Any]]]:
    return lambda options: (run_case(case, options) for case in cases(options))


def vgg16_tree(data: Path | None, size: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of VGG-16 by path.

    Args:
      data: the data folder with the trained convolutions; None draws these too.
      size: draws a narrower network of about so many parameters, for a trial.
    """
    network = networks.get("vgg16")
    inputs = jnp.zeros((1, network.size, network.size, 3))
    params: Any = jax.eval_shape(network.module.init, jax.random.key(0), inputs)["params"]
    shapes: dict[Any, Any] = traverse_util.flatten_dict(params)
    total = sum(leaf.size for leaf in shapes.values())
    trained: dict[Any, Any] = {}
    if data is not None and size is None:
        trained = traverse_util.flatten_dict({"features": networks.load_features(network, data)["params"]})
    width = 1 if size is None else math.sqrt(size / total)
    drawn = student_t(5, (sum(leaf.size for path, leaf in shapes.items() if path not in trained),))
    start = 0
    for path, leaf in shapes.items():
        if path in trained:
            yield ".".join(path), np.asarray(trained[path])
            continue
        shape = (*leaf.shape[:-2], *(max(round(axis * width), 1) for axis in leaf.shape[-2:]))
        yield ".".join(path), drawn[start : start + math.prod(shape)].reshape(shape)
        start += leaf.size


def _tree(options: Options) -> Iterator[dict[str, Any]]:
    for size in options.sizes or (None,):
        name = "VGG-16" if size is None else "VGG-16, narrowed"
        if options.data is None or size is not None:
            name += ", no trained layers"
        with tempfile.TemporaryDirectory() as folder:
            for path, leaf in vgg16_tree(options.data, size):
                np.save(Path(folder) / f"{path}.npy", np.ascontiguousarray(leaf))
            measured = fresh_process.measure("tree", folder=folder, bits=4, repeats=options.repeats)
        yield {"data": name, "bits": 4, **measured}


_CURVE_LEVELS = 16


def _curve(options: Options) -> Iterator[dict[str, Any]]:
    default = [("float32", 10**power) for power in (6, 7, 8)] + [("bfloat16", 10**power) for power in (6, 7, 8, 9)]
    sizes = default if options.sizes is None else itertools.product(("float32", "bfloat16"), options.sizes)
    for dtype, size in sizes:
        measured = fresh_process.measure(
            "row", size=size, dtype=dtype, num_levels=_CURVE_LEVELS, repeats=options.repeats
        )
        yield {"data": f"t3 {dtype}", "num_levels": _CURVE_LEVELS, **measured}


SECTIONS: dict[str, Callable[[Options], Iterator[dict[str, Any]]]] = {
    "rows": _measured(_rows),
    "half": _measured(_half),
    "channels": _measured(channel_cases),
    "groups": _measured(_groups),
    "tree": _tree,
    "curve": _curve,
}


def run(
    sections: Sequence[str], options: Options, on_cell: Callable[[dict[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """Measures the named sections.

    Args:
      sections: keys of `SECTIONS`.
      options: sizes and limits.
      on_cell: called with the results so far after each case.

    Returns:
      A JSON-ready dict: versions, platform, options and `sections`, a list of cells for each name (see `run_case`, and
      for the last two sections `experiments.speed.fresh_process`).
    """
    results: dict[str, Any] = {**_circumstances(options), "sections": {}}
    for name in sections:
        cells = results["sections"][name] = []
        for cell in SECTIONS[name](options):
            cells.append(cell)
            on_cell(results)
    return results


def _circumstances(options: Options) -> dict[str, Any]:
    tools = (*ROW_TOOLS, *HALF_TOOLS, *CHANNEL_TOOLS)
    packages = dict.fromkeys(package for tool in tools for package in (tool.package, *tool.needs))
    peers = (DISTRIBUTIONS.get(package, package) for package in packages)
    return {
        "repeats": options.repeats,
        "budget_seconds": options.budget,
        **circumstances("nuqjax", "jax", "jaxlib", "numpy", *peers),
    }


def table(section: str, cells: Sequence[dict[str, Any]]) -> Table:
    """A section's cells as a table for the terminal, a line for each tool."""
    out = Table(
        title=section,
        caption="ratio: to nuqjax without the proof; excess: squared error over the lower bound that nuqjax proves; "
        "over best: over the least in the run; gap: of the proof, its worst row",
    )
    for name in ("data", "tool"):
        out.add_column(name)
    for name in (
        "rows",
        "values",
        "levels",
        "seconds",
        "first call s",
        "ratio",
        "M weights/s",
        "excess",
        "over best",
        "gap",
    ):
        out.add_column(name, justify="right")
    for cell in cells:
        for entry in cell["entries"]:
            measured = entry["status"] == "measured"
            tool = entry["tool"] if measured else f"{entry['tool']}: {entry['status']}"
            named = [cell["data"], tool, f"{cell['rows']:,}", f"{cell['values']:,}", str(cell["num_levels"])]
            if not measured:
                out.add_row(*named)
                continue
            out.add_row(
                *named,
                f"{entry['seconds']:.4f}",
                f"{entry['first_call']:.3f}",
                f"{entry['ratio']:.2f}",
                f"{entry['weights_per_second'] / 1e6:.2f}",
                *("–" if entry[name] is None else f"{entry[name]:.1e}" for name in ("excess", "over_best")),
                f"{cell['gap']:.1e}" if "proven" in entry["tool"] else "",
            )
        out.add_section()
    return out


def tree_table(section: str, cells: Sequence[dict[str, Any]]) -> Table:
    """The section `tree` for the terminal."""
    out = Table(title=section, caption="from the start of the process; peak: resident memory, beside the tree's bytes")
    out.add_column("data")
    for name in ("weights", "imports s", "loaded s", "result s", "warm s", "loaded peak", "peak", "MB before", "after"):
        out.add_column(name, justify="right")
    for cell in cells:
        out.add_row(
            cell["data"],
            f"{cell['values']:,}",
            *(f"{cell[name]:.2f}" for name in ("imported", "loaded", "cold", "seconds")),
            *(f"{cell[name] / cell['bytes']:.2f}×" for name in ("peak_before_bytes", "peak_bytes")),
            *(f"{cell[name] / 1e6:.1f}" for name in ("bytes", "compressed_bytes")),
        )
    return out


def curve_table(section: str, cells: Sequence[dict[str, Any]]) -> Table:
    """The section `curve` for the terminal."""
    out = Table(title=section, caption="peak: resident memory beside the row's bytes; the process alone takes some")
    out.add_column("data")
    for name in ("values", "s", "ns a value", "first call s", "proven s", "ns a value", "peak MB", "peak"):
        out.add_column(name, justify="right")
    for cell in cells:
        out.add_row(
            cell["data"],
            f"{cell['values']:,}",
            f"{cell['seconds']:.3f}",
            f"{1e9 * cell['seconds'] / cell['values']:.1f}",
            f"{cell['first_call']:.3f}",
            f"{cell['proven_seconds']:.3f}",
            f"{1e9 * cell['proven_seconds'] / cell['values']:.1f}",
            f"{cell['peak_bytes'] / 1e6:,.0f}",
            f"{cell['peak_bytes'] / cell['bytes']:.2f}×",
        )
    return out


_TABLES: dict[str, Callable[[str, Sequence[dict[str, Any]]], Table]] = {"tree": tree_table, "curve": curve_table}


def _numbers(text: str) -> tuple[int, ...]:
    """Whole positive numbers with commas between, also as 1e6.

    >>> _numbers("16,1e6")
    (16, 1000000)
    """
    numbers = [float(word) for word in text.split(",") if word]
    if not numbers or any(number < 1 or number != int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}, but whole positive numbers with commas are wanted")
    return tuple(int(number) for number in numbers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.fit",
        description="Times nuqjax.fit beside other tools on the same data. Options that take a list take it with "
        "commas.",
    )
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--sizes", type=_numbers, help="numbers of values, as 1e6,1e7 (default: each section's own)")
    parser.add_argument(
        "--levels", type=_numbers, default=Options.levels, help="K of rows and half (default: 4,16,64,256)"
    )
    parser.add_argument("--repeats", type=int, default=Options.repeats, help="calls after the first (default: 3)")
    parser.add_argument(
        "--budget",
        type=float,
        default=Options.budget,
        help="seconds; leaves out slow tools that are predicted to take longer for one call (default: 30)",
    )
    parser.add_argument(
        "--data", help="folder with weights/, for VGG-16 (default: $NUQJAX_DATA, else ../shared/data, where it is)"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file, after every case")
    return parser


def _command(args: argparse.Namespace) -> str:
    """The command line that measures the same, without what differs from machine to machine."""
    words = ["python", "-m", "experiments.speed.fit", *args.sections]
    for name in ("sizes", "levels", "repeats", "budget"):
        value = getattr(args, name)
        if value != _parser().get_default(name):
            words += ["--" + name, ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"]
    return shlex.join(words)


def _vgg16_folder(path: str | None) -> Path | None:
    """The data folder; None where none was given and there is none at the usual place."""
    try:
        return images.data_folder(path)
    except FileNotFoundError:
        if path is not None:
            raise
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    unknown = sorted(set(args.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}: the known are {', '.join(SECTIONS)}")
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}, but at least 1 is wanted")
    if max(args.levels) > 256 or min(args.levels) < 2:
        parser.error(f"--levels are {args.levels}, but 2 to 256 are wanted")
    sections = args.sections or list(SECTIONS)
    data = None
    needs_data = {"channels", "tree"} & set(sections)
    if needs_data and (args.sizes is None or args.data is not None):
        try:
            data = _vgg16_folder(args.data)
        except FileNotFoundError as error:
            parser.error(str(error))
    options = Options(args.sizes, args.levels, args.repeats, args.budget, data)
    progress = Console(stderr=True)
    if needs_data and data is None:
        progress.print("VGG-16's trained layers are not measured: no --data, or --sizes without --data")

    def keep(results: dict[str, Any]) -> None:
        section, cells = list(results["sections"].items())[-1]
        cell = cells[-1]
        seconds = cell["entries"][0]["seconds"] if "entries" in cell else cell["seconds"]
        levels = cell.get("num_levels", 2 ** cell.get("bits", 0))
        progress.print(f"{section}: {cell['data']}, {cell['values']:,} values, K={levels}: {seconds:.4f} s")
        if args.json is not None:
            write(args.json, {"commands": [_command(args)], **results})

    results = run(sections, options, keep)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for section, cells in results["sections"].items():
        console.print(_TABLES.get(section, table)(section, cells))
    for line in rates(results["sections"].get("channels", [])):
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
