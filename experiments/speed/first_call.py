"""What the first call costs: CPU seconds after the imports, each column in a fresh process, and what is compiled.

    python -m experiments.speed.first_call                                # this version
    python -m experiments.speed.first_call --beside OTHER/bin/python      # and another version, in turn with it
    python -m experiments.speed.first_call --warm                         # also what many calls cost
    python -m experiments.speed.first_call --only small                   # the cases with this in their names
    python -m experiments.speed.first_call --json FILE --data PATH

The small network has four kernels of 142,000 weights (two convolutions, two dense layers; Student t with 5 degrees of
freedom). A process compresses it once, then in other ways, one codebook per channel or per tensor; another reads and
compresses a trained network per channel. `--beside` names the Python of an environment in which another version is
installed; this file runs there as it is.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import nuqjax

_COMPILATION = "/jax/core/compile/backend_compile_duration"
_SHAPES = {"conv1": (3, 3, 3, 16), "conv2": (3, 3, 16, 64), "dense1": (1024, 128), "dense2": (128, 10)}
_NETWORKS = {"resnet20": "resnet20_cifar10.npz", "efficientnet_lite0": "efficientnet_lite0_imagenet.npz"}
_WAYS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "5 bits": {"bits": 5},
    "8 bits": {"bits": 8},
    "enq": {"method": "enq"},
    "uniform": {"method": "uniform"},
    'scale="channel"': {"scale": "channel"},
    "AutoQFormat(8)": {"codebook_format": nuqjax.AutoQFormat(8)},
}


def small_network() -> dict[str, np.ndarray]:
    """Kernels of 142,000 weights in all."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_t(5, shape).astype(np.float32) for name, shape in _SHAPES.items()}


def _small(granularity: Literal["tensor", "channel"]) -> dict[str, list[float]]:
    params = small_network()
    return {
        name: measured(lambda o=o: nuqjax.compress(params, granularity=granularity, **o)) for name, o in _WAYS.items()
    }


def _trained(path: str) -> dict[str, list[float]]:
    with np.load(path) as file:
        params = {name: file[name] for name in file.files}
    call = lambda: nuqjax.compress(params, granularity="channel", axis=0)  # noqa: E731  (OIHW)
    return {"first": measured(call), "second": measured(call)}


def _warm(path: str) -> dict[str, list[float]]:
    """Many calls of `nuqjax.fit`: the least of three after a first."""
    rng = np.random.default_rng(0)
    cases = {"groups of 64, 10^6": (rng.standard_t(5, (15625, 64)), 16)}
    for length in (131_072, 10**6):
        for levels in (16, 256):
            cases[f"1 row of {length:,}, {levels} levels"] = rng.standard_t(3, (1, length)), levels
    cases["217 rows of 4,608, 16 levels"] = rng.standard_t(5, (217, 4608)), 16
    fits = {name: ([rows.astype(np.float32)], levels) for name, (rows, levels) in cases.items()}
    if os.path.exists(path):
        with np.load(path) as file:
            kernels = [file[name] for name in file.files if file[name].ndim == 4]
        fits["VGG-16 convolutions per channel"] = (
            [np.ascontiguousarray(k.reshape(-1, k.shape[-1]).T) for k in kernels],
            16,
        )
    found = {}
    for name, (matrices, levels) in fits.items():
        for proof, tolerance in (("", None), (", proven", 1e-6)):
            call = lambda m=matrices, k=levels, t=tolerance: [nuqjax.fit(x, k, tolerance=t) for x in m]  # noqa: E731
            measured(call)
            found[name + proof] = min(measured(call) for _ in range(3))
    return found


def measured(call) -> list[float]:
    """CPU seconds, seconds and compilations."""
    before, cpu, wall = len(_COMPILED), time.process_time(), time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(call()))
    return [time.process_time() - cpu, time.perf_counter() - wall, len(_COMPILED) - before]


_COMPILED: list[str] = []
TASKS = {"small": _small, "trained": _trained, "warm": _warm}


def listen() -> None:
    """Begins to count compilations."""

    def heard(event: str, duration: float, **_: Any) -> None:
        if event == _COMPILATION:
            _COMPILED.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)  # pyright: ignore[reportArgumentType]


def _task(words: list[str]) -> None:
    """What a fresh process does: prints JSON."""
    listen()
    print(json.dumps(TASKS[words[0]](*words[1:])))


def _run(python: str, *words: str) -> dict[str, list[float]]:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [python, __file__, "--task", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment, cwd=Path(__file__).parents[2])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    from experiments.data import images
    from experiments.record import results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", help="the Python of an environment with another version")
    parser.add_argument("--warm", action="store_true", help="also measure many calls")
    parser.add_argument("--only", default="", help="measure the cases with this in their names alone")
    parser.add_argument("--data", help="the data folder (default: as experiments.data.images finds it)")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args()
    try:
        weights = images.data_folder(options.data) / "weights"
    except FileNotFoundError:
        weights = Path("nowhere")
    tasks = {f"small network per {each}": ("small", each) for each in ("channel", "tensor")}
    tasks |= {
        f"{name} per channel": ("trained", str(weights / file))
        for name, file in _NETWORKS.items()
        if (weights / file).exists()
    }
    if options.warm:
        tasks["warm"] = ("warm", str(weights / "vgg16_conv_imagenet.npz"))
    pythons = {"this version": sys.executable} | ({"the other": options.beside} if options.beside else {})
    tasks = {name: words for name, words in tasks.items() if options.only in name}
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, words in tasks.items():
        found[name] = {version: _run(python, *words) for version, python in pythons.items()}
    table = Table("", "", title="CPU seconds, seconds, compilations", title_justify="left")
    for version in pythons:
        table.add_column(version, justify="right")
    if options.beside:
        table.add_column("CPU ratio", justify="right")
    for name, versions in found.items():
        table.add_section()
        for number, way in enumerate(versions["this version"]):
            cells = [versions[version].get(way, [math.nan] * 3) for version in pythons]
            shown = [f"{cpu:.3f}  {wall:.3f}  {count:.0f}" for cpu, wall, count in cells]
            ratio = [f"{cells[0][0] / cells[1][0]:.3f}"] if options.beside else []
            table.add_row("" if number else name, way, *shown, *ratio)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.json is not None:
        words = ["--warm"] * options.warm + [f"--only {options.only}"] * bool(options.only)
        words += ["--beside OTHER/bin/python"] * bool(options.beside)
        command = " ".join(["python -m experiments.speed.first_call", *words])
        record = results.circumstances("nuqjax", "jax", "numpy")
        results.write(options.json, {"commands": [command], **record, "cases": found})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        _task(sys.argv[2:])
    else:
        main()
