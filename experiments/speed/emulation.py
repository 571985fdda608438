"""What the fixed-point emulation costs in time: batches on raw integers beside the same batches in float.

    python -m experiments.speed.emulation --network resnet20,tiny_darknet,efficientnet_lite0

Both are compiled functions of the tree and the images. They take turns, and the ratio is the median over the turns of
the ratio within one. The float model is the network in the form that is fastest on the platform, batch-norms and all.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.networks import Network
from experiments.record.results import circumstances, write
from experiments.record.settings import listed
from experiments.studies.emulation import compressed, folded

_TURNS = 7


def measure(network: Network, data: Path, words: Sequence[int], batch: int, bits: int) -> list[dict[str, Any]]:
    """Seconds a batch for each length of the activations' words, beside float."""
    inputs = network.preprocess(images.load_images(network, data, batch).pixels)
    reference, variables = jax.jit(network.fastest.apply), networks.load_features(network, data)
    fn, plain = folded(network, data)
    cparams = compressed(plain, bits, 8, "tensor")
    found = []
    for word in words:
        start = time.perf_counter()
        formats = nuqjax.calibrate(fn, cparams, inputs, word=word)
        calibrated = time.perf_counter()
        emulated = jax.jit(nuqjax.emulate(fn, formats))
        jax.block_until_ready(emulated(cparams, inputs))
        compiled = time.perf_counter()
        pairs = _turns(lambda: reference(variables, inputs), lambda emulated=emulated: emulated(cparams, inputs))
        routes = [row.route for row in formats if row.route]
        found.append(
            {
                "network": network.name,
                "title": network.title,
                "batch": batch,
                "bits": bits,
                "word": word,
                "float_seconds": median(a for a, _ in pairs),
                "emulated_seconds": median(b for _, b in pairs),
                "ratio": median(b / a for a, b in pairs),
                "calibrate_seconds": calibrated - start,
                "compile_seconds": compiled - calibrated,
                "routes": {route: routes.count(route) for route in sorted(set(routes))},
            }
        )
    return found


def _turns(first: Callable[[], Any], second: Callable[[], Any]) -> list[tuple[float, float]]:
    """Seconds of both, turn about, after one of each that does not count."""

    def timed(fn):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        return time.perf_counter() - start

    for fn in (first, second):
        timed(fn)
    return [(timed(first), timed(second)) for _ in range(_TURNS)]


def table(cells: Sequence[dict[str, Any]]) -> Table:
    """The times as a table for the terminal."""
    out = Table("network", title="fixed-point emulation beside float, a batch")
    for name in ("batch", "words", "float ms", "emulated ms", "ratio", "calibrate s", "compile s"):
        out.add_column(name, justify="right")
    out.add_column("routes")
    for cell in cells:
        out.add_row(
            cell["title"],
            str(cell["batch"]),
            f"{cell['word']} bits",
            f"{1e3 * cell['float_seconds']:.0f}",
            f"{1e3 * cell['emulated_seconds']:.0f}",
            f"{cell['ratio']:.2f}",
            f"{cell['calibrate_seconds']:.1f}",
            f"{cell['compile_seconds']:.1f}",
            ", ".join(f"{number} {route}" for route, number in cell["routes"].items()),
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.emulation", description="Time of the fixed-point emulation beside float."
    )
    parser.add_argument("--network", type=listed, default=["resnet20", "tiny_darknet", "efficientnet_lite0"])
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--word", type=listed, default=["8", "16"], help="bits of the activations (default: 8,16)")
    parser.add_argument("--bits", type=int, default=6, help="index width (default: 6)")
    parser.add_argument("--batch", type=int, default=32, help="images (default: 32)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    try:
        data = images.data_folder(args.data)
        cells = [
            cell
            for name in args.network
            for cell in measure(networks.get(name), data, [int(w) for w in args.word], args.batch, args.bits)
        ]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.json is not None:
        words = ["python", "-m", "experiments.speed.emulation"]
        for name in ("network", "word", "bits", "batch"):
            value = getattr(args, name)
            if value != parser.get_default(name):
                words += [f"--{name}", ",".join(value) if isinstance(value, list) else str(value)]
        write(args.json, {"commands": [shlex.join(words)], **circumstances("jax", "nuqjax", "numpy"), "cells": cells})
    Console(width=None if sys.stdout.isatty() else 160).print(table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
