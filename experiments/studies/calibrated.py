"""What some hundred unlabelled inputs bring: compression with data beside compression without, at equal bytes.

    python -m experiments.studies.calibrated --network tiny_darknet --bits 4,3 --budget 4bpw,3.5bpw,3bpw

Batch-norms are folded, and the leaves that this makes neutral are left out; offsets, levels and scales are float16, and
all of it is counted. Half of the images tell what the layers multiply, the other half, which are disjoint, evaluate.
Labels are used for top-1 alone. KL is the mean divergence of the softmax from the float network's, in nats: differences
of some hundredths tell more than those of top-1 on 500 images.
"""

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from rich.console import Console
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.networks import Network
from experiments.record.results import circumstances, keeper
from experiments.record.settings import listed
from experiments.studies.accuracy import scores

_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Cell:
    """A way to compress: `method` is "plain", "corrected" (its offsets by `correct_bias`), "calibrated" or "budget"."""

    method: str
    size: str


def kept_leaves(fn: Callable[..., Any], params: Any, x: np.ndarray) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The leaves that a function needs, those of one axis in float16, and what makes the whole tree of them."""
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    inner = jax.make_jaxpr(fn)(params, x).jaxpr
    used = {v for eqn in inner.eqns for v in eqn.invars if not isinstance(v, core.Literal)}
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    needed = [v in used for v in inner.invars[: len(flat)]]
    kept = {
        name: jnp.asarray(leaf, jnp.float32 if leaf.ndim > 1 else jnp.float16)
        for name, (_, leaf), is_needed in zip(names, flat, needed, strict=True)
        if is_needed
    }

    def whole(kept: Mapping[str, Any]) -> Any:
        return structure.unflatten([kept.get(name, leaf) for name, (_, leaf) in zip(names, flat, strict=True)])

    return kept, whole


def run(
    network: Network,
    data: Path,
    cells: Sequence[Cell],
    *,
    learn: int = 256,
    count: int | None = None,
    on_cell: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Evaluates each cell on the images that nothing was learned from.

    Args:
      network: which network.
      data: the data folder.
      cells: ways to compress it.
      learn: images that are learned from, at most.
      count: images in all; None takes all.
      on_cell: called with the results so far after each cell.

    Returns:
      A JSON-ready dict: the circumstances, `float` and `cells`.
    """
    labelled = images.load_images(network, data, count)
    pixels, labels = labelled.pixels[::2], labelled.labels[::2]
    learned = network.preprocess(labelled.pixels[1::2][:learn])
    batches = [learned[n : n + _BATCH] for n in range(0, len(learned), _BATCH)]
    variables = networks.load_features(network, data)
    folded, variables = nuqjax.fold_batch_norm(network.module.apply, variables, learned[:1])
    params, whole = kept_leaves(folded, variables, learned[:1])

    def fn(params: Any, x: Any) -> Any:
        return folded(whole(params), x)

    program = jax.jit(lambda params, x: network.fastest.apply(whole(params), x))

    def outputs(params: Any) -> np.ndarray:
        parts = (program(params, x)[:valid] for x, valid in images.batches(network, pixels, 25))
        return np.concatenate([np.asarray(part) for part in parts]).reshape(len(labels), -1)

    reference = outputs(params)
    results = {
        "network": network.name,
        "title": network.title,
        "learned": len(learned),
        "images": len(labels),
        **circumstances("jax", "flax", "numpy"),
        "float": {"bytes": sum(x.nbytes for x in params.values()), **scores(reference, reference, labels)},
        "cells": [],
    }
    for cell in cells:
        start = time.perf_counter()
        cparams, predicted = compressed(cell, fn, params, batches)
        seconds = time.perf_counter() - start
        got = outputs(nuqjax.decompress(cparams))
        total = nuqjax.report(params, cparams).total
        results["cells"].append(
            {
                **dataclasses.asdict(cell),
                "bytes": total["nbytes_after"],
                "bits_per_weight": total["bits_per_weight"],
                "sqnr_db": total["sqnr_db"],
                "kl": divergence(reference, got),
                "predicted_kl": predicted,
                **scores(got, reference, labels),
                "seconds": round(seconds, 1),
            }
        )
        on_cell(results)
    return results


def compressed(cell: Cell, fn: Callable[..., Any], params: Any, batches: Sequence[Any]) -> tuple[Any, float | None]:
    """The compressed tree, and the divergence that was predicted."""
    given: dict[str, Any] = {"codebook_format": jnp.float16, "scale": "channel"}
    if cell.method in ("plain", "corrected"):
        cparams = nuqjax.compress(params, int(cell.size), **given)
        if cell.method == "corrected":
            cparams = nuqjax.calibration.correct_bias(fn, params, cparams, batches)
        return cparams, None
    size: dict[str, Any] = {"bits": int(cell.size)} if cell.method == "calibrated" else {"budget": cell.size}
    cparams, report = nuqjax.compress(params, fn=fn, batches=batches, return_report=True, **size, **given)
    assert report.calibration is not None  # there are batches
    return cparams, report.calibration["predicted"]


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """The mean KL divergence of softmaxes of `[N, C]` logits, nats.

    >>> divergence(np.zeros((1, 2)), np.zeros((1, 2)))
    0.0
    """
    p, q = (x.astype(np.float64) - x.max(axis=1, keepdims=True) for x in (exact, other))
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def table(results: dict[str, Any]) -> Table:
    """The results for a terminal."""
    made = Table(title=f"{results['title']}: {results['images']} images, {results['learned']} others learned from")
    for name in ("method", "size", "bytes", "bits/w", "top-1 %", "agree %", "KL", "predicted", "seconds"):
        made.add_column(name, justify="left" if name == "method" else "right")
    made.add_row(
        "float", "", f"{results['float']['bytes']:,}", "", f"{100 * results['float']['top1']:.1f}", "", "", "", ""
    )
    for cell in results["cells"]:
        predicted = cell["predicted_kl"]
        made.add_row(
            cell["method"], cell["size"], f"{cell['bytes']:,}", f"{cell['bits_per_weight']:.3f}",
            f"{100 * cell['top1']:.1f}", f"{100 * cell['agreement']:.1f}", f"{cell['kl']:.4f}",
            "" if predicted is None else f"{predicted:.4f}", f"{cell['seconds']:.0f}",
        )  # fmt: skip
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", required=True, choices=networks.NETWORKS)
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--bits", type=listed, default=["4", "3"], help="index widths, 1 to 8 (default: 4,3)")
    parser.add_argument("--budget", type=listed, default=[], help="budgets, such as 3.5bpw (default: none)")
    parser.add_argument("--learn", type=int, default=256, help="images that are learned from (default: 256)")
    parser.add_argument("--images", type=int, help="labelled images in all; half evaluate (default: all)")
    parser.add_argument("--json", type=Path, help="write the results to this file, after every cell")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    keep = keeper(args.json, [f"python -m experiments.studies.calibrated {given}"])
    cells = [Cell(method, bits) for bits in args.bits for method in ("plain", "corrected", "calibrated")]
    cells += [Cell("budget", budget) for budget in args.budget]
    try:
        results = run(
            networks.get(args.network), images.data_folder(args.data), cells, learn=args.learn, count=args.images,
            on_cell=keep,
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    Console(width=None if sys.stdout.isatty() else 200).print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
