"""Whether tuned constants still have good values: each in turn is changed, and what depends on it is measured.

    python -m experiments.speed.constants
    python -m experiments.speed.constants --only _COMPARE_CUTS,_FEW_ROWS

A figure is the CPU time (of all threads; the least of nine runs, the values of a constant in turn) or the error or the
bytes, over that with the value in the code: above 1, the value in the code is better.
"""

import argparse
import dataclasses
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import nuqjax
from experiments.record.settings import listed

_RUNS = 9
Task = Callable[[], float | None]  # what is measured; None asks for its CPU time


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tuned constant.

    Attributes:
      module: where it stands, below `nuqjax._src`.
      name: its name there.
      others: values beside the one in the code.
      tasks: by description, what makes the task to measure; called once for each value.
      compiled: whether compiled programs depend on it.
    """

    module: str
    name: str
    others: Sequence[Any]
    tasks: Mapping[str, Callable[[], Task]]
    compiled: bool = False


def inner(module: str) -> Any:
    """A module that is not public, by its name below `nuqjax._src`."""
    return importlib.import_module(f"nuqjax._src.{module}")


def measured(constant: Constant, make: Callable[[], Task], runs: int = _RUNS) -> dict[Any, float]:
    """What a task takes with each value of a constant, the one in the code first.

    Args:
      constant: which one; it is set back in the end.
      make: makes the task.
      runs: how often each is measured.
    """
    module = inner(constant.module)
    own = getattr(module, constant.name)
    values = [own, *(value for value in constant.others if value != own)]
    least = dict.fromkeys(values, float("inf"))

    def made(value: Any) -> Task:
        setattr(module, constant.name, value)
        if constant.compiled:
            jax.clear_caches()
        return make()

    try:
        compiled = {value: made(value) for value in values} if constant.compiled else {}
        for run in range(runs + 1):
            for value in values[run % len(values) :] + values[: run % len(values)]:  # none is always the first
                task = compiled[value] if constant.compiled else made(value)
                start = time.process_time()
                found = task()
                taken = time.process_time() - start if found is None else found
                if run:  # the first warms up
                    least[value] = min(least[value], taken)
    finally:
        setattr(module, constant.name, own)
        if constant.compiled:
            jax.clear_caches()
    return least


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _assign(count: int, length: int, levels: int, *, traced: bool = False) -> Callable[[], Task]:
    rows, table = _normal(count, length), np.sort(_normal(count, levels), axis=-1)
    if not traced:
        return lambda: lambda: _done(nuqjax.assign(rows, table))

    def make() -> Task:
        on_device = jnp.asarray(rows), jnp.asarray(table)
        fitted = jax.jit(nuqjax.assign).lower(*on_device).compile()
        return lambda: _done(jax.block_until_ready(fitted(*on_device)))

    return make


def _done(result: object) -> None:
    del result


def _fit(method: str, count: int, length: int, levels: int, *, traced: bool = False) -> Callable[[], Task]:
    rows = _normal(count, length)
    if not traced:
        return lambda: lambda: _done(nuqjax.fit(rows, levels, method=method, tolerance=None))

    def make() -> Task:
        on_device = jnp.asarray(rows)
        fit = jax.jit(lambda rows: nuqjax.fit(rows, levels, method=method, tolerance=None).levels)
        fitted = fit.lower(on_device).compile()
        return lambda: _done(jax.block_until_ready(fitted(on_device)))

    return make


def _grid_error() -> Task:
    rows = _normal(1, 200_000)
    return lambda: float(nuqjax.fit(rows, 16, method="uniform").sse[0])


def _report() -> Task:
    params = {"w": _normal(2048, 2048)}
    cparams = nuqjax.compress(params, bits=4, method="uniform")
    return lambda: _done(nuqjax.report(params, cparams))


def _difference() -> Task:
    first, second = _normal(2048, 2048), _normal(2048, 2048)[::-1]
    return lambda: _done(inner("report.trees").difference(first, second))


def _save() -> Task:
    params = {"w": _normal(4096, 4096)}

    def task() -> None:
        with tempfile.TemporaryDirectory() as folder:
            nuqjax.save(Path(folder) / "w.safetensors", params)

    return task


def _depthwise(taps: int) -> Callable[[], Task]:
    def make() -> Task:
        x, kernel = jnp.asarray(_normal(8, 28, 28, 96)), jnp.asarray(_normal(taps, taps, 1, 96))
        jaxpr = jax.make_jaxpr(
            lambda x, kernel: jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", feature_group_count=96, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )(x, kernel)
        program = jax.jit(lambda *arrays: inner("calibration.convolutions").with_fast_convolutions(jaxpr, arrays))
        jax.block_until_ready(program(x, kernel))
        return lambda: _done(jax.block_until_ready(program(x, kernel)))

    return make


def _rated(rate: float, *, seconds: bool = False) -> Callable[[], Task]:
    inputs = _normal(512, 256)
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    problem = nuqjax.calibration.Problem(_normal(96, 256), (inputs.T @ inputs / len(inputs))[None])

    def task() -> float | None:
        solution = nuqjax.calibration.quantize(problem, bits=6, rate=rate)
        return None if seconds else list(solution.errors.values())[-1]

    return lambda: task


def _many() -> dict[str, Callable[[], Task]]:
    return {
        "32 rows of 2,304, 16 levels": _fit("knq", 32, 2304, 16),
        "128 rows of 576, 8 levels": _fit("knq", 128, 576, 8),
        "a row of 30,000, 16 levels": _fit("knq", 1, 30_000, 16),
    }


CONSTANTS = (
    Constant(
        "leaf.assign",
        "_COMPARE_LEVELS",
        (16, 64, 256),
        {f"traced, {k} levels": _assign(64, 16_384, k, traced=True) for k in (16, 32, 64, 256)},
        compiled=True,
    ),
    Constant(
        "leaf.assign", "_COMPARE_CUTS", (15, 63, 127), {f"{k} levels": _assign(64, 16_384, k) for k in (32, 64, 128)}
    ),
    Constant("leaf.assign", "_SHORT", (16, 256), {f"rows of {n}": _assign(2**20 // n, n, 16) for n in (32, 128)}),
    Constant(
        "leaf.assign",
        "_TABLE_LENGTH",
        (2**14, 2**18),
        {f"rows of {n}, {k} levels": _assign(2**20 // n, n, k) for n in (2**15, 2**17) for k in (32, 256)},
    ),
    Constant(
        "fit.steps",
        "_DIRECT",
        (2, 32),
        {f"{n} values, 16 levels": _fit("uniform", 2**15 // n, n, 16) for n in (64, 512)},
    ),
    Constant(
        "fit.per_row",
        "_BINS",
        (1024, 16_384),
        {"a row of 200,000": _fit("uniform", 1, 200_000, 16), "its error": _grid_error},
    ),
    Constant(
        "knq.run.levels",
        "_FEW_ROWS",
        (2, 32),
        {f"traced, {r} rows of 1,000": _fit("knq", r, 1000, 16, traced=True) for r in (4, 16)},
        compiled=True,
    ),
    Constant("knq.search.priced_host", "_LANES", (32, 512), _many()),
    Constant("knq.search.priced_host", "_GROUP", (4, 64), _many()),
    Constant("knq.search.priced_host", "_NARROW", (6, 24), _many()),
    Constant("knq.search.priced_host", "_BAND", (1.5, 4.0), _many()),
    Constant("knq.search.priced_host", "_STEP", (2**11, 2**15), _many()),
    Constant("knq.search.dense_host", "_TILE", (4, 64), _many()),
    Constant("knq.search.dense_host", "_MOST", (16, 256), _many()),
    Constant("knq.search.search", "_SPREAD", (6, 24), _many()),
    Constant("knq.search.search", "_CELLS", (24, 96), _many()),
    Constant("knq.search.search", "_PARTS", (4, 16), _many()),
    Constant("report.trees", "_CHUNK", (2**16, 2**18, 2**22), {"compare 4 M values": _difference}),
    Constant("report.comparison", "_CHUNK", (2**16, 2**18, 2**22), {"report of 4 M weights": _report}),
    Constant("store.file", "_CHUNK", (2**18, 2**21, 2**26), {"save 64 MiB": _save}),
    Constant(
        "calibration.convolutions", "_MOST_TAPS", (0, 10**6), {f"{n} × {n} taps": _depthwise(n) for n in (3, 7, 11)}
    ),
    Constant(
        "calibration.stages",
        "_NEIGHBOURS",
        (0, 1, 6),
        {f"error + {r} · bits": _rated(r) for r in (0.02, 0.2, 2.0)} | {"its time": _rated(0.2, seconds=True)},
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=listed, help="names of constants, separated by commas")
    options = parser.parse_args(arguments)
    known = {constant.name for constant in CONSTANTS}
    if unknown := set(options.only or ()) - known:
        sys.exit(f"--only {','.join(sorted(unknown))}: no such constant; there are {', '.join(sorted(known))}")
    console = Console(width=160)
    for constant in CONSTANTS:
        if options.only and constant.name not in options.only:
            continue
        table = Table("task", "value", "other values: what they take over what the value takes", title_justify="left")
        table.title = f"{constant.module}.{constant.name}"
        for description, make in constant.tasks.items():
            (value, own), *others = measured(constant, make).items()
            ratios = ", ".join(f"{other:,}: {taken / own:.4g}" for other, taken in others)
            table.add_row(description, f"{value:,}", ratios)
        console.print(table)


if __name__ == "__main__":
    main()
