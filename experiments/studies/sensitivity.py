"""What weights of importance bring: `knq` with and without the Fisher diagonal, on images that it never saw.

    python -m experiments.studies.sensitivity --network tiny_darknet --data PATH --bits 3,4 --granularity tensor,channel

`nuqjax.fisher` takes the mean squared gradient of −log p(label | image) over the calibration images, one image at a
time; `nuqjax.compress(sensitivity=…)` then weights each parameter's squared error by it. Every second labelled image is
for calibration, the others alone are scored. Half the weighted squared error (`expected_loss`) is how much the loss
should grow if it were quadratic around the trained weights, the Fisher diagonal its curvature (Kim et al.,
*SqueezeLLM*, section 4.1); beside the loss that was measured it tells where that holds.

Weightings:
  none: every weight counts the same.
  fisher: as it is.
  damped:X: plus X times its mean over the leaf, so that no weight counts for nothing.
  power:X: raised to the power X: between all the same (0) and the Fisher diagonal (1).
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.data.images import LabelledImages
from experiments.networks import Network, Variables
from experiments.record.results import circumstances, keeper
from experiments.record.settings import command_of, listed, parse_granularity
from experiments.record.terminal import mistakes, progress_bars, show
from experiments.studies.accuracy import scores, sizes

WEIGHTINGS = ("none", "fisher", "damped:1", "power:0.5")


def split(labelled: LabelledImages, calibration: int) -> tuple[LabelledImages, LabelledImages]:
    """Images for calibration, evenly spread over every second one, and the other half.

    Raises:
      ValueError: `calibration` is below 1 or more than half of the images.
    """
    half = len(labelled.labels) // 2
    if not 1 <= calibration <= half:
        raise ValueError(f"{calibration} images for calibration wanted, but half of {len(labelled.labels)} is {half}")
    chosen = 1 + 2 * (np.arange(calibration) * half // calibration)
    others = slice(0, None, 2)
    return (
        LabelledImages(labelled.pixels[chosen], labelled.labels[chosen]),
        LabelledImages(labelled.pixels[others], labelled.labels[others]),
    )


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean of −log softmax(logits)[label], in nats.

    >>> log_loss(np.array([[0.0, 0.0], [100.0, 0.0]]), np.array([0, 0])) / math.log(2)
    0.5
    """
    logits = logits.astype(np.float64)
    largest = logits.max(axis=1)
    totals = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    return float(np.mean(totals - logits[np.arange(len(labels)), labels]))


def diagonal(
    network: Network, variables: Variables, labelled: LabelledImages, on_image: Callable[[], None] = lambda: None
) -> Any:
    """The Fisher diagonal of the parameters over labelled images: a tree like them, of numpy arrays."""
    apply: Callable = network.fastest.apply

    def loss(params, example):
        pixels, label = example
        logits = apply(variables | {"params": params}, pixels)
        return -jax.nn.log_softmax(logits)[0, label]

    def examples():
        for (pixels, _), label in zip(images.batches(network, labelled.pixels, 1), labelled.labels, strict=True):
            yield pixels, jnp.asarray(label)
            on_image()

    return jax.tree.map(np.asarray, nuqjax.fisher(loss, variables["params"], examples()))


def weighted(fisher: Any, weighting: str) -> Any:
    """The sensitivity to give to `nuqjax.compress`, or None.

    Args:
      fisher: a tree of non-negative arrays.
      weighting: one of those in the module's text.

    Raises:
      ValueError: an unknown weighting.

    >>> weighted({"w": np.array([0.0, 4.0])}, "power:0.5")["w"].tolist()
    [0.0, 2.0]
    >>> weighted({"w": np.array([0.0, 4.0])}, "damped:1")["w"].tolist()
    [2.0, 6.0]
    """
    name, _, number = weighting.partition(":")
    try:
        amount = float(number) if number else None
    except ValueError:
        amount = math.nan
    if name in ("none", "fisher") and amount is None:
        return None if name == "none" else fisher
    if name in ("damped", "power") and amount is not None and amount >= 0:
        change = (lambda x: x + x.mean() * x.dtype.type(amount)) if name == "damped" else (lambda x: x**amount)
        return jax.tree.map(change, fisher)
    raise ValueError(f"unknown weighting {weighting!r}: the known are none, fisher, damped:X and power:X, X at least 0")


def expected_loss(fisher: Any, params: Any, cparams: Any) -> float:
    """½ Σ F (w − ŵ)²: by how much a quadratic loss of curvature F grows."""
    dense = nuqjax.decompress(cparams)

    def term(f, w, v):
        return np.sum(f.astype(np.float64) * np.square(np.asarray(w, np.float64) - np.asarray(v)))

    return math.fsum(jax.tree.leaves(jax.tree.map(term, fisher, params, dense))) / 2


def run(
    network: Network,
    data: Path,
    bits: Sequence[int],
    granularities: Sequence[str] = ("tensor", "channel"),
    weightings: Sequence[str] = WEIGHTINGS,
    *,
    calibration: int = 250,
    count: int | None = None,
    batch: int = 25,
    on_cell: Callable[[dict[str, Any]], None] = lambda results: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates the float network and each weighting of `knq` on the same held-out images.

    Args:
      network: which network; its labels must mean something.
      data: the data folder.
      bits: index widths.
      granularities: `"tensor"`, `"channel"`, ….
      weightings: those in the module's text.
      calibration: images for the Fisher diagonal.
      count: labelled images in all, of which half are held out; None takes all.
      batch: images a step of the evaluation.
      on_cell: called with the results so far after each cell.
      progress: bars to advance.

    Returns:
      A JSON-ready dict: the circumstances, `float` (scores and loss of the float network), `fisher` (seconds, and the
      share of the weights whose diagonal is zero) and `cells`: `bits`, `granularity`, `weighting`, sizes, scores,
      `loss`, `expected_loss` and seconds.

    Raises:
      ValueError: a weighting or a number of images that cannot be.
    """
    if not network.complete:
        raise ValueError(f"{network.name}: its dense layers are not trained, so there is no loss to take gradients of")
    for weighting in weightings:
        weighted({}, weighting)
    variables = networks.load_features(network, data)
    params = variables["params"]
    shown, held_out = split(images.load_images(network, data, count), calibration)

    bars = progress or Progress(disable=True)
    cell_bar = bars.add_task("cells", total=len(bits) * len(granularities) * len(weightings))
    image_bar = bars.add_task("gradients", total=calibration)
    start = time.perf_counter()
    fisher = diagonal(network, variables, shown, lambda: bars.advance(image_bar))
    fisher_seconds = time.perf_counter() - start

    def outputs(program: Callable, params: Any, description: str) -> np.ndarray:
        bars.reset(image_bar, description=description, total=len(held_out.labels))
        parts = []
        for inputs, valid in images.batches(network, held_out.pixels, batch):
            parts.append(np.asarray(program(variables | {"params": params}, inputs))[:valid])
            bars.advance(image_bar, valid)
        return np.concatenate(parts)

    module = network.fastest
    reference = outputs(jax.jit(module.apply), params, "float")
    leaves = jax.tree.leaves(fisher)
    results = {
        **_circumstances(network, calibration, len(held_out.labels)),
        "float": {
            **scores(reference, reference, held_out.labels),
            "loss": log_loss(reference, held_out.labels),
        },
        "fisher": {
            "seconds": round(fisher_seconds, 3),
            "zero_share": sum(int(np.sum(f == 0)) for f in leaves) / sum(f.size for f in leaves),
        },
        "cells": [],
    }
    program = jax.jit(nuqjax.apply(module.apply))
    for granularity in granularities:
        for width in bits:
            for weighting in weightings:
                description = f"{width} bits {granularity} {weighting}"
                bars.reset(image_bar, description=f"compress {description}")
                start = time.perf_counter()
                cparams = nuqjax.compress(
                    params, width, granularity=parse_granularity(granularity), sensitivity=weighted(fisher, weighting)
                )
                jax.block_until_ready(cparams)
                seconds = time.perf_counter() - start
                logits = outputs(program, cparams, description)
                results["cells"].append(
                    {
                        "bits": width,
                        "granularity": granularity,
                        "weighting": weighting,
                        **sizes(params, cparams),
                        **scores(logits, reference, held_out.labels),
                        "loss": log_loss(logits, held_out.labels),
                        "expected_loss": expected_loss(fisher, params, cparams),
                        "compress_seconds": round(seconds, 3),
                    }
                )
                bars.advance(cell_bar)
                on_cell(results)
    return results


def _circumstances(network: Network, calibration: int, held_out: int) -> dict[str, Any]:
    return {
        "network": network.name,
        "title": network.title,
        "calibration_images": calibration,
        "images": held_out,
        **circumstances("jax", "flax", "numpy"),
    }


_CAPTION = "expected: loss of the float network and half the Fisher-weighted squared error; loss in nats an image"


def table(results: dict[str, Any]) -> Table:
    """The results as a table for the terminal."""
    plain = results["float"]
    out = Table(
        title=f"{results['title']}: {results['images']} images, Fisher diagonal of {results['calibration_images']} "
        f"others; float32 top-1 {plain['top1']:.1%}, top-5 {plain['top5']:.1%}, loss {plain['loss']:.3f}",
        caption=_CAPTION,
    )
    for name in ("codebooks", "weighting"):
        out.add_column(name)
    for name in ("bits", "SQNR dB", "top-1 %", "top-5 %", "agree %", "out dB", "loss", "expected"):
        out.add_column(name, justify="right")
    before = None
    for cell in results["cells"]:
        if before not in (None, (cell["granularity"], cell["bits"])):
            out.add_section()
        before = cell["granularity"], cell["bits"]
        out.add_row(
            cell["granularity"],
            cell["weighting"],
            str(cell["bits"]),
            _number(cell["sqnr_db"], 1),
            *(f"{100 * cell[name]:.1f}" for name in ("top1", "top5", "agreement")),
            _number(cell["output_sqnr_db"], 1),
            f"{cell['loss']:.3f}",
            f"{plain['loss'] + cell['expected_loss']:.3f}",
        )
    return out


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.sensitivity",
        description="Accuracy of knq weighted by the Fisher diagonal beside plain knq, on held-out images. Options "
        "that take a list take it with commas; every combination is measured.",
    )
    parser.add_argument("--network", required=True, choices=networks.NETWORKS)
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--bits", type=listed, default=["4"], help="index widths, 1 to 8 (default: 4)")
    parser.add_argument(
        "--granularity", type=listed, default=["tensor", "channel"], help="tensor, channel, … (default: both)"
    )
    parser.add_argument("--weighting", type=listed, default=list(WEIGHTINGS), help=f"default: {','.join(WEIGHTINGS)}")
    parser.add_argument("--calibration", type=int, default=250, help="images for the Fisher diagonal (default: 250)")
    parser.add_argument("--images", type=int, help="labelled images in all; half are held out (default: all)")
    parser.add_argument("--batch", type=int, default=25, help="images a step of the evaluation (default: 25)")
    parser.add_argument("--json", type=Path, help="write the results to this file, after every cell")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    keep = keeper(args.json, [command_of("experiments.studies.sensitivity", args, parser)])
    with mistakes(parser):
        with progress_bars() as progress:
            results = run(
                networks.get(args.network),
                images.data_folder(args.data),
                [int(width) for width in args.bits],
                args.granularity,
                args.weighting,
                calibration=args.calibration,
                count=args.images,
                batch=args.batch,
                on_cell=keep,
                progress=progress,
            )
        show(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
