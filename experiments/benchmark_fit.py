"""How long `nuqjax.fit` takes, beside other tools on the same data in the same run, and how good the levels are.

    python -m experiments.benchmark_fit                                # every section
    python -m experiments.benchmark_fit rows --sizes 1e6 --levels 16   # one cell
    python -m experiments.benchmark_fit --json FILE --data PATH --budget 200

Sections:
  rows: one row of float32 values, Student t with 3 degrees of freedom.
  half: one row of bfloat16 or float16 values, t with 5 degrees; the others cluster `numpy.unique` with its counts.
  channels: a codebook of 16 levels for each output channel: `[512, 4608]`, and the 13 convolutions of VGG-16.
  groups: a codebook of 16 levels for each run of 64 values.

Every tool is called once (`first call`: imports and compilation included), then `--repeats` times, of which the median
counts. What a tool must do is to return levels: indices are asked of none, though some make them as well. A tool's
squared error is summed here in float64 from its levels (`squared_error`), and its excess is over the lower bound that
`nuqjax.fit` proves: at least 0, and an upper limit of how far the levels are from the best.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import nuqjax
from experiments import images, networks
from experiments.accuracy import write

_TOLERANCE = 1e-6
_BLOCK = 2**20  # values whose float64 errors are held at once
_SAMPLE = 20  # a slow tool's time is predicted from one part in so many
_UNPREDICTED = 10**4  # so few values are fitted without predicting the time


# --- The other tools: each takes rows `[R, N]` of numpy values and gives the levels of each row. They are imported by
# name as they are first called: none of them need be installed.


class Tool(NamedTuple):
    """Another implementation of one-dimensional k-means.

    Attributes:
      name: what the table calls it.
      package: what must be importable.
      fit: rows `[R, N]` and K to R arrays of at most K levels.
      slow: not called where its predicted time exceeds the budget.
      longest: the longest row that it is given.
      most_levels: the largest K that it accepts.
    """

    name: str
    package: str
    fit: Callable[[np.ndarray, int], Sequence[np.ndarray]]
    slow: bool = True
    longest: int | None = None
    most_levels: int = 256


def _by_row(fit_row: Callable[[np.ndarray, int], Any]) -> Callable[[np.ndarray, int], Sequence[np.ndarray]]:
    return lambda rows, num_levels: [np.asarray(fit_row(row, num_levels)) for row in rows]


def _by_count(fit_counted: Callable[[np.ndarray, np.ndarray, int], Any]):
    """On the distinct values of a row of 16-bit floats and their counts; numpy sorts bit patterns fastest."""

    def fit_row(row: np.ndarray, num_levels: int):
        patterns, counts = np.unique(row.view(np.uint16), return_counts=True)
        return fit_counted(patterns.view(row.dtype).astype(np.float32), counts, num_levels)

    return _by_row(fit_row)


def _flash1dkmeans(row, num_levels):
    return import_module("flash1dkmeans").kmeans_1d(row, num_levels, random_state=0)[0]


def _flash1dkmeans_sorted(row, num_levels):
    """Without the argsort that only the labels need; its other way to leave labels out logs a warning every time."""
    return import_module("flash1dkmeans").kmeans_1d(np.sort(row), num_levels, is_sorted=True, random_state=0)[0]


def _flash1dkmeans_counted(values, counts, num_levels):
    return import_module("flash1dkmeans").kmeans_1d(values, num_levels, sample_weights=counts, random_state=0)[0]


def _kmeans1d(row, num_levels):
    return import_module("kmeans1d").cluster(row.tolist(), num_levels).centroids


def _ckmeans(row, num_levels):
    clusters = import_module("ckmeans").ckmeans(row.astype(np.float64), num_levels)
    return [cluster.mean() for cluster in clusters]


def _sklearn(row, num_levels):
    return _sklearn_counted(row, None, num_levels)


def _sklearn_counted(values, counts, num_levels):
    fitted = (
        import_module("sklearn.cluster")
        .KMeans(num_levels, n_init=1, random_state=0)
        .fit(values[:, None], sample_weight=counts)
    )
    return fitted.cluster_centers_[:, 0]


def _coremltools_counted(values, counts, num_levels):
    """What its palettizers call for the distinct values of a float16 weight."""
    return import_module("coremltools._deps.kmeans1d").cluster(values, num_levels, weights=counts).centroids


def _coremltools_channels(rows, num_levels):
    """Its palettizer of arrays, one look-up table for each row."""
    passes = import_module("coremltools.optimize.coreml._quantization_passes")
    bits = num_levels.bit_length() - 1
    return passes.palettize_weights.blockwise_compress(rows, "KMEANS", bits, [1, 0]).lut.reshape(len(rows), -1)


_FLASH = Tool("flash1dkmeans", "flash1dkmeans", _by_row(_flash1dkmeans), slow=False)
_FLASH_SORTED = Tool("flash1dkmeans of sorted", "flash1dkmeans", _by_row(_flash1dkmeans_sorted), slow=False)
_KMEANS1D = Tool("kmeans1d", "kmeans1d", _by_row(_kmeans1d), longest=10**6)
_CKMEANS = Tool("ckmeans", "ckmeans", _by_row(_ckmeans), longest=10**6, most_levels=255)
_SKLEARN = Tool("scikit-learn", "sklearn", _by_row(_sklearn))

ROW_TOOLS = (_FLASH, _FLASH_SORTED, _KMEANS1D, _CKMEANS, _SKLEARN)
HALF_TOOLS = (
    Tool("unique + coremltools' kmeans1d", "coremltools", _by_count(_coremltools_counted), slow=False),
    Tool("unique + flash1dkmeans", "flash1dkmeans", _by_count(_flash1dkmeans_counted), slow=False),
    Tool("unique + scikit-learn", "sklearn", _by_count(_sklearn_counted), slow=False),
)
CHANNEL_TOOLS = (
    Tool("coremltools palettize_weights", "coremltools", _coremltools_channels), _FLASH_SORTED, _KMEANS1D, _CKMEANS,
    _SKLEARN,
)  # fmt: skip
GROUP_TOOLS = CHANNEL_TOOLS
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where a package is not called what it is imported as


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


def student_t(degrees: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Student-t values, the same at every call; drawn in blocks, so that 10⁸ take no more memory than they must."""
    random = np.random.default_rng(20170427 + degrees)
    values = np.empty(math.prod(shape), dtype)
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        block[:] = random.standard_t(degrees, block.size).astype(dtype)
    return values.reshape(shape)


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


def _channels(options: Options) -> Iterator[Case]:
    for size in options.sizes or (512 * 4608,):
        yield Case("t5 float32", [student_t(5, (max(size // 4608, 1), 4608))], 16, CHANNEL_TOOLS)
    if options.data is not None:
        params = networks.load_features(networks.get("vgg16"), options.data)["params"]
        yield Case("VGG-16 convolutions", kernel_rows(params), 16, CHANNEL_TOOLS)


def _groups(options: Options) -> Iterator[Case]:
    for size in options.sizes or (10**7,):
        yield Case("t5 float32", [student_t(5, (max(size // 64, 1), 64))], 16, GROUP_TOOLS)


SECTIONS: dict[str, Callable[[Options], Iterator[Case]]] = {
    "rows": _rows,
    "half": _half,
    "channels": _channels,
    "groups": _groups,
}


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
    if importlib.util.find_spec(tool.package) is None:
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
    proven, proofs = measure(lambda: ours(_TOLERANCE), options.repeats, options.budget)
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
        entry(f"nuqjax, proven to {_TOLERANCE:g}", proven, proven_errors),
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


def run(
    sections: Sequence[str], options: Options, on_cell: Callable[[dict[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """Measures the named sections.

    Args:
      sections: keys of `SECTIONS`.
      options: sizes and limits.
      on_cell: called with the results so far after each case.

    Returns:
      A JSON-ready dict: versions, platform, options and `sections`, a list of cells (see `run_case`) for each name.
    """
    results: dict[str, Any] = {**_circumstances(options), "sections": {}}
    for name in sections:
        cells = results["sections"][name] = []
        for case in SECTIONS[name](options):
            cells.append(run_case(case, options))
            on_cell(results)
    return results


def _circumstances(options: Options) -> dict[str, Any]:
    packages = {tool.package: None for tool in (*ROW_TOOLS, *HALF_TOOLS, *CHANNEL_TOOLS)}
    peers = {_DISTRIBUTIONS.get(package, package): package for package in packages}
    return {
        "repeats": options.repeats,
        "budget_seconds": options.budget,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("nuqjax", "jax", "jaxlib", "numpy")},
            **{
                name: importlib.metadata.version(name) if importlib.util.find_spec(package) else None
                for name, package in peers.items()
            },
        },
        "platform": {
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }


# --- The command line.


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
        prog="python -m experiments.benchmark_fit",
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
    words = ["python", "-m", "experiments.benchmark_fit", *args.sections]
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
    if "channels" in sections and (args.sizes is None or args.data is not None):
        try:
            data = _vgg16_folder(args.data)
        except FileNotFoundError as error:
            parser.error(str(error))
    options = Options(args.sizes, args.levels, args.repeats, args.budget, data)
    progress = Console(stderr=True)
    if "channels" in sections and data is None:
        progress.print("VGG-16 is not measured: no --data, or --sizes without --data")

    def keep(results: dict[str, Any]) -> None:
        section, cells = list(results["sections"].items())[-1]
        cell = cells[-1]
        ours = cell["entries"][0]["seconds"]
        progress.print(f"{section}: {cell['data']}, {cell['values']:,} values, K={cell['num_levels']}: {ours:.4f} s")
        if args.json is not None:
            write(args.json, {"commands": [_command(args)], **results})

    results = run(sections, options, keep)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for section, cells in results["sections"].items():
        console.print(table(section, cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
