"""What some hundred unlabelled inputs bring: compression with data beside compression without, at equal bytes.

    python -m experiments.studies.calibrated --network tiny_darknet --bits 4,3 --budget 4bpw,3.5bpw,3bpw
    python -m experiments.studies.calibrated --network tiny_darknet --bits 4,3 --levels knq,uniform,enq

Batch-norms are folded, and the leaves that this makes neutral are left out; offsets, levels and scales are float16, and
all of it is counted. Half of the images tell what the layers multiply, the other half, which are disjoint, evaluate.
Labels are used for top-1 alone. KL is the mean divergence of the softmax from the float network's, in nats: differences
of some hundredths tell more than those of top-1 on 500 images. Forms of one size are compared in pairs, image by image,
with 95 % intervals: `--levels uniform` is the fair baseline, a grid that is given the same treatment.
"""

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.networks import Network
from experiments.record.intervals import between, paired
from experiments.record.results import circumstances, keeper
from experiments.record.settings import listed
from experiments.record.terminal import mistakes, show

WAYS = ("plain", "corrected", "calibrated")  # of compression to a number of bits
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Cell:
    """A way to compress.

    Attributes:
      method: "plain", "corrected" (its offsets by `correct_bias`), "calibrated" or "budget".
      size: bits, or the budget.
      levels: the method that fits them.
    """

    method: str
    size: str
    levels: str = "knq"

    @property
    def name(self) -> str:
        """What it is called where it is one of a pair."""
        return f"{self.method} {self.levels}"


Measures = dict[str, np.ndarray]  # what is measured of each example, by name


def compare(
    fn: Callable[..., Any],
    params: Any,
    batches: Sequence[Any],
    cells: Sequence[Cell],
    measure: Callable[[Any], Measures],
    *,
    on_cell: Callable[[dict[str, Any]], None] = lambda results: None,
    **options: Any,
) -> dict[str, Any]:
    """Compresses in each way, and measures.

    Args:
      fn: the function of parameters and inputs.
      params: its parameters.
      batches: the inputs that are learned from.
      cells: the ways.
      measure: what is measured of each of the examples that evaluate, for a dense tree; among it "kl".
      on_cell: called with the results so far after each cell.
      **options: of `nuqjax.compress`, for all.

    Returns:
      A JSON-ready dict: `float`; `cells`, each with the means and the "kl" predicted; `pairs`, for two of one size (or
      one and the float network) the mean differences of all measures with the ends of their intervals.
    """
    whole = measure(params)
    results: dict[str, Any] = {
        "float": {"bytes": sum(x.nbytes for x in jax.tree.leaves(params)), **_means(whole)},
        "cells": [],
        "pairs": [],
    }
    made: list[tuple[Cell, Measures]] = []
    for cell in cells:
        start = time.perf_counter()
        cparams, predicted = compressed(cell, fn, params, batches, options)
        seconds = time.perf_counter() - start
        total, got = nuqjax.report(params, cparams).total, measure(nuqjax.decompress(cparams))
        results["cells"].append(
            {
                **dataclasses.asdict(cell),
                "bytes": total["nbytes_after"],
                "bits_per_weight": total["bits_per_weight"],
                "sqnr_db": total["sqnr_db"],
                "predicted_kl": predicted,
                **_means(got),
                "seconds": round(seconds, 1),
            }
        )
        for name, other in [("float", whole), *((c.name, m) for c, m in made if c.size == cell.size)]:
            between = {measure: paired(got[measure], other[measure]) for measure in got}
            results["pairs"].append({"size": cell.size, "one": cell.name, "other": name, **between})
        made.append((cell, got))
        on_cell(results)
    return results


def _means(measures: Measures) -> dict[str, float]:
    return {name: float(each.mean()) for name, each in measures.items()}


def kept_leaves(fn: Callable[..., Any], params: Any, x: np.ndarray) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The leaves that a function needs, those that stay dense in float16, and what makes the whole tree of them."""
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    inner = jax.make_jaxpr(fn)(params, x).jaxpr
    used = {v for eqn in inner.eqns for v in eqn.invars if not isinstance(v, core.Literal)}
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    needed = [v in used for v in inner.invars[: len(flat)]]
    kept = {
        name: jnp.asarray(leaf, jnp.float32 if leaf.ndim > 1 and leaf.size >= 256 else jnp.float16)
        for name, (_, leaf), is_needed in zip(names, flat, needed, strict=True)
        if is_needed
    }

    def whole(kept: Mapping[str, Any]) -> Any:
        return structure.unflatten([kept.get(name, leaf) for name, (_, leaf) in zip(names, flat, strict=True)])

    return kept, whole


class Setting(NamedTuple):
    """A folded network with what it learns from, and what is measured of it.

    Attributes:
      fn: the function of parameters and images.
      params: the parameters that it needs, by path.
      batches: images that are learned from.
      measure: what is measured of each image that evaluates, for dense parameters.
      told: the network, the counts of images and the circumstances, JSON-ready.
    """

    fn: Callable[..., Any]
    params: dict[str, Any]
    batches: list[np.ndarray]
    measure: Callable[[Any], Measures]
    told: dict[str, Any]


def setting(network: Network, data: Path, *, learn: int = 256, count: int | None = None) -> Setting:
    """What every form of a network is compared on.

    Args:
      network: which network.
      data: the data folder.
      learn: images that are learned from, at most.
      count: images in all; None takes all. Half of them evaluate.
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

    def measure(params: Any) -> Measures:
        got = outputs(params)
        hits = np.argsort(-got, axis=1, kind="stable")[:, :5] == labels[:, None]
        same = got.argmax(axis=1) == reference.argmax(axis=1)
        return {"top1": hits[:, 0], "top5": hits.any(axis=1), "agreement": same, "kl": divergences(reference, got)}

    told = {
        "network": network.name,
        "title": network.title,
        "learned": len(learned),
        "images": len(labels),
        **circumstances("jax", "flax", "numpy"),
    }
    return Setting(fn, params, batches, measure, told)


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
    fn, params, batches, measure, told = setting(network, data, learn=learn, count=count)
    return told | compare(
        fn, params, batches, cells, measure, on_cell=lambda results: on_cell(told | results), scale="channel"
    )


def compressed(
    cell: Cell, fn: Callable[..., Any], params: Any, batches: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Any, float | None]:
    """The compressed tree, and the divergence that was predicted."""
    given = {"codebook_format": jnp.float16, "method": cell.levels, **options}
    if cell.method in ("plain", "corrected"):
        cparams = nuqjax.compress(params, int(cell.size), **given)
        if cell.method == "corrected":
            cparams = nuqjax.calibration.correct_bias(fn, params, cparams, batches)
        return cparams, None
    size: dict[str, Any] = {"bits": int(cell.size)} if cell.method == "calibrated" else {"budget": cell.size}
    cparams, report = nuqjax.compress(params, fn=fn, batches=batches, return_report=True, **size, **given)
    assert report.calibration is not None  # there are batches
    return cparams, report.calibration["predicted"]


def divergences(exact: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The KL divergence of softmaxes over the last axis of logits `[…, C]`, nats.

    >>> divergences(np.zeros((1, 2)), np.zeros((1, 2)))
    array([0.])
    """
    p, q = (x.astype(np.float64) - x.max(axis=-1, keepdims=True) for x in (exact, other))
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=-1)


_SHARES = {"top1": "top-1 %", "agreement": "agree %"}


def table(results: dict[str, Any]) -> Table:
    """The results for a terminal."""
    made = Table(title=f"{results['title']}: {results['images']} to evaluate, {results['learned']} others learned from")
    measures = [name for name in ("top1", "nats", "agreement") if name in results["float"]]
    for name in (
        "form",
        "size",
        "bytes",
        "bits/w",
        *measures,
        "KL",
        "predicted",
        "KL of knq with data less this",
        "seconds",
    ):
        made.add_column(_SHARES.get(name, name), justify="left" if name == "form" else "right")

    def scores(cell: dict[str, Any]) -> list[str]:
        return [f"{100 * cell[name]:.1f}" if name in _SHARES else f"{cell[name]:.3f}" for name in measures]

    made.add_row("float", "", f"{results['float']['bytes']:,}", "", *scores(results["float"]), *[""] * 4)
    for cell in results["cells"]:
        predicted, form = cell["predicted_kl"], f"{cell['method']} {cell['levels']}"
        less = between(results["pairs"], cell["size"], form)
        made.add_row(
            form, cell["size"], f"{cell['bytes']:,}", f"{cell['bits_per_weight']:.3f}", *scores(cell),
            f"{cell['kl']:.4f}", "" if predicted is None else f"{predicted:.4f}",
            "" if less is None else "{:.3f} ({:.3f} to {:.3f})".format(*less), f"{cell['seconds']:.0f}",
        )  # fmt: skip
    return made


def listed_cells(
    bits: Sequence[str], budgets: Sequence[str], levels: Sequence[str], ways: Sequence[str] = WAYS
) -> list[Cell]:
    """All ways of all widths, then the budgets, of all methods.

    Raises:
      ValueError: there is no such way.

    >>> [f"{cell.method} {cell.size}" for cell in listed_cells(["4"], ["3bpw"], ["knq"])]
    ['plain 4', 'corrected 4', 'calibrated 4', 'budget 3bpw']
    """
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"unknown ways {', '.join(unknown)}: the known are {', '.join(WAYS)}")
    cells = [Cell(way, width, method) for width in bits for method in levels for way in ways]
    return cells + [Cell("budget", budget, method) for budget in budgets for method in levels]


def add_cells(parser: argparse.ArgumentParser, bits: Sequence[str]) -> None:
    """Adds the options that `listed_cells` takes to a command line; `bits` are the default widths."""
    parser.add_argument(
        "--bits", type=listed, default=list(bits), help=f"index widths, 1 to 8 (default: {','.join(bits)})"
    )
    parser.add_argument(
        "--ways", type=listed, default=WAYS, help=f"of compression to --bits (default: {','.join(WAYS)})"
    )
    parser.add_argument("--levels", type=listed, default=["knq"], help="methods that fit them (default: knq)")
    parser.add_argument("--budget", type=listed, default=[], help="budgets, such as 3.5bpw (default: none)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", required=True, choices=networks.NETWORKS)
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    add_cells(parser, ["4", "3"])
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
    with mistakes(parser):
        cells = listed_cells(args.bits, args.budget, args.levels, args.ways)
        results = run(
            networks.get(args.network), images.data_folder(args.data), cells, learn=args.learn, count=args.images,
            on_cell=keep,
        )  # fmt: skip
        show(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
