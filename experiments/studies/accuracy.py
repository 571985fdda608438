"""What compression costs a trained network: accuracy on real images against bytes.

    python -m experiments.studies.accuracy --network efficientnet_lite0 --data PATH --method knq --bits 4,5,6,8 \\
        --granularity channel

The float network and every compressed one see the same images through `jax.jit(nuqjax.apply(module.apply))`, the
compressed tree being an argument: settings of one layout share one compiled program. Only `params` are compressed.
Of AlexNet and VGG-16 only the convolutions are trained, so the features are compressed and compared with those of the
float network (`output_sqnr_db`), and there is no top-1.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.networks import Network
from experiments.record.results import circumstances, keeper
from experiments.record.settings import Setting, command_of, listed, product
from experiments.record.terminal import mistakes, progress_bars, show


def run(
    network: Network,
    data: Path,
    settings: Sequence[Setting],
    *,
    count: int | None = None,
    batch: int = 25,
    known: Sequence[dict[str, Any]] = (),
    on_cell: Callable[[dict[str, Any]], None] = lambda results: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates the float network and its compressed forms on the same images.

    Args:
      network: which network.
      data: the data folder.
      settings: ways to compress it, in order.
      count: number of images; None takes all.
      batch: images a step.
      known: cells measured before; those settings are not measured again, and keep their place at the front.
      on_cell: called with the results so far after each cell.
      progress: bars to advance.

    Returns:
      A JSON-ready dict: the circumstances, `float` (the scores of the float network) and `cells`, one for each
      setting: the setting, sizes, distortion, scores and seconds.
    """
    module = network.fastest
    variables = networks.load_features(network, data)
    labelled = images.load_images(network, data, count)
    params = variables["params"]
    remaining = [s for s in settings if dataclasses.asdict(s) not in [_plain(cell["setting"]) for cell in known]]

    bars = progress or Progress(disable=True)
    cell_bar = bars.add_task("cells", total=len(remaining) + 1)
    image_bar = bars.add_task("float", total=len(labelled.labels))

    def outputs(program: Callable, params: Any, description: str) -> np.ndarray:
        bars.reset(image_bar, description=description)
        parts = []
        for inputs, valid in images.batches(network, labelled.pixels, batch):
            parts.append(np.asarray(program(variables | {"params": params}, inputs))[:valid])
            bars.advance(image_bar, valid)
        bars.advance(cell_bar)
        return np.concatenate(parts).reshape(len(labelled.labels), -1)

    labels = labelled.labels if network.complete else None
    reference = outputs(jax.jit(module.apply), params, "float")
    dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    results = {
        **_circumstances(network, len(labelled.labels), batch),
        "float": {"bytes": dense_bytes, **scores(reference, reference, labels)},
        "cells": list(known),
    }
    program = jax.jit(nuqjax.apply(module.apply))
    for setting in remaining:
        start = time.perf_counter()
        bars.reset(image_bar, description=f"compress {describe(setting)}")
        cparams = nuqjax.compress(params, **setting.options())
        jax.block_until_ready(cparams)
        middle = time.perf_counter()
        measured = scores(outputs(program, cparams, describe(setting)), reference, labels)
        end = time.perf_counter()
        results["cells"].append(
            {
                "setting": dataclasses.asdict(setting),
                **sizes(params, cparams),
                **measured,
                "compress_seconds": round(middle - start, 3),
                "evaluate_seconds": round(end - middle, 3),
            }
        )
        on_cell(results)
    return results


def scores(outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray | None) -> dict[str, float | None]:
    """How good outputs are, and how near to the float network's.

    Args:
      outputs: `[N, C]` of the network scored.
      reference: `[N, C]` of the float network.
      labels: `[N]` true classes; None where the outputs are features, which have no accuracy.

    Returns:
      `top1`, `top5` and `agreement` (with the float network's first choice), each a fraction of the images, or None;
      `output_sqnr_db`, the power of `reference` over that of the difference, in dB, or None where they are equal.

    Raises:
      ValueError: an output is NaN or infinite.
    """
    sqnr = output_sqnr_db(outputs, reference)
    if labels is None:
        return {"top1": None, "top5": None, "agreement": None, "output_sqnr_db": sqnr}
    ranked = np.argsort(-outputs, axis=1, kind="stable")[:, :5]
    hits = ranked == labels[:, None]
    return {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits.any(axis=1).mean()),
        "agreement": float((ranked[:, 0] == reference.argmax(axis=1)).mean()),
        "output_sqnr_db": sqnr,
    }


def output_sqnr_db(outputs: np.ndarray, reference: np.ndarray) -> float | None:
    """Power of `reference` over that of the difference, in dB; None where they are equal.

    Raises:
      ValueError: an output is NaN or infinite.

    >>> round(output_sqnr_db(np.array([1.0, 0.9]), np.array([1.0, 1.0])), 6)
    23.0103
    """
    if not np.isfinite(outputs).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(outputs))} of {outputs.size} outputs are not finite")
    noise = np.sum(np.square(outputs - reference, dtype=np.float64))
    return 10 * math.log10(np.sum(np.square(reference, dtype=np.float64)) / noise) if noise else None


def sizes(params: Any, cparams: Any) -> dict[str, Any]:
    """Bytes in memory and distortion of a compressed tree: codebooks, scales and padding counted.

    Returns:
      `bytes`; `ratio` of the dense bytes to them; `bits_per_weight` over all of `params` (dense leaves at their 32
      bits) and `compressed_bits_per_weight` over the compressed leaves; `compressed_fraction` of the values that are
      in compressed leaves; `sqnr_db` of the compressed leaves, None where nothing is lost or compressed.
    """
    total = nuqjax.report(params, cparams).to_dict()["total"]
    sqnr = total["sqnr_db"]
    return {
        "bytes": total["nbytes_after"],
        "ratio": total["ratio"],
        "bits_per_weight": total["bits_per_weight"],
        "compressed_bits_per_weight": total["compressed_bits_per_weight"],
        "compressed_fraction": total["compressed_weights"] / total["weights"],
        "sqnr_db": sqnr if sqnr is not None and math.isfinite(sqnr) else None,
    }


def describe(setting: Setting) -> str:
    """A setting in few words.

    >>> describe(Setting("knq", 4, "channel", codebook_format="bfloat16"))
    'knq 4 bits channel bfloat16'
    """
    words = [setting.method, f"{setting.bits} bits", setting.granularity]
    if setting.scale != "none":
        words.append(f"scale {setting.scale}")
    if setting.codebook_format != "float32":
        words.append(setting.codebook_format)
    if setting.rules:
        words.append(f"{len(setting.rules)} rules")
    return " ".join(words)


def _circumstances(network: Network, count: int, batch: int) -> dict[str, Any]:
    return {
        "network": network.name,
        "title": network.title,
        "images": count,
        "batch": batch,
        **circumstances("jax", "flax", "numpy"),
    }


def _plain(setting: dict[str, Any]) -> dict[str, Any]:
    """A setting read from JSON as `dataclasses.asdict` gives it: with tuples for lists."""
    return dataclasses.asdict(Setting.from_dict(setting))


_CAPTION = (
    "bits/weight and bytes: all parameters, with codebooks, scales and padding; compressed: bits a weight of the "
    "leaves that are compressed, and their share of the weights"
)


def table(results: dict[str, Any]) -> Table:
    """The results as a table for the terminal."""
    float_scores = results["float"]
    title = f"{results['title']} on {results['images']} images, float32 {float_scores['bytes']:,} bytes"
    if float_scores["top1"] is not None:
        title += f", top-1 {float_scores['top1']:.1%}, top-5 {float_scores['top5']:.1%}"
    out = Table(title=title, caption=_CAPTION)
    for name in ("method", "granularity", "scale", "levels", "rules"):
        out.add_column(name)
    numbers = ("bits", "bits/weight", "compressed", "of weights %", "bytes", "ratio", "SQNR dB")
    for name in (*numbers, "top-1 %", "top-5 %", "agree %", "out dB"):
        out.add_column(name, justify="right")
    for cell in results["cells"]:
        setting = cell["setting"]
        out.add_row(
            setting["method"],
            setting["granularity"],
            setting["scale"],
            setting["codebook_format"],
            "; ".join(" ".join(words) for words in setting["rules"]),
            str(setting["bits"]),
            _number(cell["bits_per_weight"]),
            _number(cell["compressed_bits_per_weight"]),
            _number(cell["compressed_fraction"], 1, 100),
            f"{cell['bytes']:,}",
            _number(cell["ratio"]),
            _number(cell["sqnr_db"], 1),
            *(_number(cell[name], 1, 100) for name in ("top1", "top5", "agreement")),
            _number(cell["output_sqnr_db"], 1),
        )
    return out


def _number(value: float | None, digits: int = 2, factor: float = 1) -> str:
    return "–" if value is None else f"{value * factor:.{digits}f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.accuracy",
        description="Accuracy and size of a compressed network on real images. Options that take a list take it with "
        "commas; every combination is measured.",
    )
    parser.add_argument("--network", required=True, choices=networks.NETWORKS)
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--method", type=listed, default=["knq"], help="knq, enq, uniform, … (default: knq)")
    parser.add_argument("--bits", type=listed, default=["4"], help="index widths, 1 to 8 (default: 4)")
    parser.add_argument("--granularity", type=listed, default=["tensor"], help="tensor, channel, channel_groups:N, …")
    parser.add_argument("--scale", type=listed, default=["none"], help="none, channel, input_groups:N")
    parser.add_argument("--codebook-format", type=listed, default=["float32"], help="float32, bfloat16, fixed:8, …")
    parser.add_argument(
        "--rule",
        nargs="+",
        action="append",
        default=[],
        metavar=("PATTERN", "OPTION=VALUE"),
        help="options for the leaves whose path matches, as nuqjax.Rule; may be repeated, first match wins",
    )
    parser.add_argument("--images", type=int, help="how many, evenly spread (default: all)")
    parser.add_argument("--batch", type=int, default=25, help="images a step (default: 25)")
    parser.add_argument("--json", type=Path, help="write the results to this file, after every cell")
    parser.add_argument("--resume", action="store_true", help="keep what --json's file holds of the same images")
    return parser


def _command(args: argparse.Namespace) -> str:
    """The command line that measures the same, without what differs from machine to machine."""
    words = [command_of("experiments.studies.accuracy", args, _parser(), ("data", "json", "resume", "rule"))]
    for rule in args.rule:
        words += ["--rule", shlex.join(rule)]
    return " ".join(words)


def _read_known(path: Path, network: str, count: int | None) -> dict[str, Any]:
    """The results in a file, if they are of the same network and number of images."""
    before = json.loads(path.read_text())
    if before["network"] != network or (count is not None and before["images"] != count):
        raise ValueError(
            f"{path} holds {before['network']} on {before['images']} images, not {network} on {count or 'all'}: "
            "give another --json or leave out --resume"
        )
    return before


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    with mistakes(parser):
        settings = product(
            args.method, [int(b) for b in args.bits], args.granularity, args.scale, args.codebook_format, args.rule
        )
        for setting in settings:
            setting.options()
        network, data = networks.get(args.network), images.data_folder(args.data)
        before = {"commands": [], "cells": []}
        if args.resume and args.json is not None and args.json.exists():
            before = _read_known(args.json, args.network, args.images)
        keep = keeper(args.json, [*before["commands"], _command(args)])
        with progress_bars() as progress:
            results = run(
                network,
                data,
                settings,
                count=args.images,
                batch=args.batch,
                known=before["cells"],
                on_cell=keep,
                progress=progress,
            )
        keep(results)
        show(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
