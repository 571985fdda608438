"""Scales of output channels without data: the largest magnitude of a channel beside power means of its magnitudes.

    python -m experiments.studies.scales --networks tiny_darknet,resnet20 --bits 4,3

One codebook a tensor, levels of least squared error for the weights divided by their scales, both in float16; biases
stay. Power 2 is the root mean square. SQNR is that of all weights; KL, agreement and top-1 are as in
`studies.calibrated`.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.record.intervals import paired
from experiments.record.results import keeper
from experiments.record.settings import listed
from experiments.record.terminal import mistakes, show
from experiments.studies.calibrated import setting


def power_mean(channels: np.ndarray, power: float) -> np.ndarray:
    """Returns `[O, 1]` (mean |w|^power)^(1/power) of `[O, I]`; an infinite power gives the largest magnitude.

    >>> power_mean(np.array([[3.0, -4.0]]), 2).round(3), power_mean(np.array([[3.0, -4.0]]), np.inf)
    (array([[3.536]]), array([[4.]]))
    """
    largest = np.abs(channels).max(axis=1, keepdims=True)
    if np.isinf(power):
        return largest
    share = np.abs(channels) / np.where(largest > 0, largest, 1)
    return largest * (share**power).mean(axis=1, keepdims=True) ** (1 / power)


def quantized(leaf: np.ndarray, bits: int, power: float) -> np.ndarray:
    """Returns a kernel, output channels last, with the values of 2^bits levels times a scale for each channel."""
    channels = np.asarray(leaf, np.float32).reshape(-1, leaf.shape[-1]).T
    scale = power_mean(channels, power).astype(np.float16).astype(np.float32)
    scale = np.where(scale > 0, scale, 1)
    rows = (channels / scale).reshape(1, -1)
    weights = np.broadcast_to(scale**2, channels.shape).reshape(1, -1)
    levels = np.asarray(nuqjax.fit(rows, 2**bits, weights=weights / weights.max()).levels).astype(np.float16)
    nearest = np.abs(rows[0][:, None] - levels[0].astype(np.float32)).argmin(axis=1)
    values = levels[0].astype(np.float32)[nearest].reshape(channels.shape) * scale
    return values.T.reshape(leaf.shape)


def run(
    names: Iterable[str],
    data: Path,
    bits: Sequence[int],
    *,
    count: int | None = None,
    on_network: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measures each power at each width; the results are JSON-ready, a part for each network."""
    results: dict[str, Any] = {"networks": []}
    for name in names:
        _, params, _, measure, told = setting(networks.get(name), data, learn=1, count=count)
        cells = []
        for width in bits:
            first = None
            for power in (np.inf, 2.0, 2.0 * width):
                given = {k: quantized(np.asarray(v), width, power) if v.ndim > 1 else v for k, v in params.items()}
                pairs = [(np.asarray(params[k]), given[k]) for k in params if params[k].ndim > 1]
                noise = sum(float(((a - b) ** 2).sum(dtype=np.float64)) for a, b in pairs)
                signal = sum(float((a**2).sum(dtype=np.float64)) for a, _ in pairs)
                got = measure({k: jnp.asarray(v) for k, v in given.items()})
                first = got if first is None else first
                cells.append(
                    {
                        "bits": width,
                        "power": "largest" if np.isinf(power) else power,
                        "sqnr_db": 10 * np.log10(signal / noise),
                        **{k: float(v.mean()) for k, v in got.items()},
                        "kl_less_largest": list(paired(got["kl"], first["kl"])),
                    }
                )
        results["networks"].append({**told, "cells": cells})
        on_network(results)
    return results


def table(results: dict[str, Any]) -> Table:
    """The results for a terminal."""
    made = Table(title="Scales of output channels, by the weights alone")
    for name in ("network", "bits", "scale", "SQNR dB", "KL", "KL less that of largest", "agree %", "top-1 %"):
        made.add_column(name, justify="left" if name in ("network", "scale") else "right")
    for each in results["networks"]:
        for cell in each["cells"]:
            power, less = cell["power"], "{:.3f} ({:.3f} to {:.3f})".format(*cell["kl_less_largest"])
            made.add_row(
                each["network"], str(cell["bits"]), power if power == "largest" else f"power {power:g}",
                f"{cell['sqnr_db']:.2f}", f"{cell['kl']:.4f}", less,
                f"{100 * cell['agreement']:.1f}", f"{100 * cell['top1']:.1f}",
            )  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", type=listed, required=True, help=f"of {', '.join(networks.NETWORKS)}")
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--bits", type=listed, default=["4", "3"], help="index widths (default: 4,3)")
    parser.add_argument("--images", type=int, help="labelled images in all; half evaluate (default: all)")
    parser.add_argument("--json", type=Path, help="write the results to this file, after every network")
    args = parser.parse_args(argv)
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    keep = keeper(args.json, [f"python -m experiments.studies.scales {given}"])
    with mistakes(parser):
        results = run(
            args.networks,
            images.data_folder(args.data),
            [int(b) for b in args.bits],
            count=args.images,
            on_network=keep,
        )
        show(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
