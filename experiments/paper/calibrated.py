"""The paper's question with data: how little memory does each method need where some hundred inputs are at hand?

    python -m experiments.paper.calibrated --network resnet20 --images 2000 --budget 3bpw,4bpw \\
        --study experiments/results/paper/resnet20.json --json FILE

The codebooks `knq` and `enq` and the fixed point `uniform` all get the same treatment by `nuqjax.compress` with data:
error feedback, refitted scales, corrected offsets, the better of two ways on held-out images, and with a budget a
width for each leaf by the sensitivities of that method. Beside them stand the same methods without data. Batch-norms
are folded in every cell, and the leaves that this makes neutral are left out. Half of the images, without labels, are
learned from; the other half evaluates. The file that `--json` names is kept after every cell, and the same command
goes on where it stopped.

Cells without data are measured (`--plain`), or taken from what `experiments.paper.study` measured of fixed point on the
same images (`--study`): with a step a channel, kernels are the same before and after a batch-norm is folded.

Everything counts: indices with the padding of their rows, codebooks, scales, and offsets, which are of 16 bits as
levels are; of fixed point, steps and no tables. With data, methods are called "knq, data" and the like.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import nuqjax
from experiments import networks
from experiments.data import images, sources
from experiments.data.images import LabelledImages
from experiments.networks import Network, Variables
from experiments.networks.importing import load_file
from experiments.paper import study
from experiments.paper.answers import EACH, answers_table, cells_table
from experiments.paper.scores import of_bools, outcomes, summary, unpack
from experiments.record.results import circumstances, keeper, read
from experiments.record.settings import Setting, command_of, listed
from experiments.studies.accuracy import sizes
from experiments.studies.calibrated import kept_leaves

WITH_DATA = ", data"  # behind the name of a method
LEARNING = ("knq", "enq", "uniform")  # methods that take data
OTHERS = tuple(f"{method}{WITH_DATA}" for method in LEARNING[1:])
BASELINES = {"fixed point": tuple(EACH), "fixed point, data": (f"uniform{WITH_DATA}",)}
_BATCH = 32
_FORMAT = "float16"
_MIN_SIZE = 64  # values: kernels too small for levels of 32 bits are not for those of 16


class Cell(NamedTuple):
    """One way to compress.

    Attributes:
      setting: the layout; its width does not count where there is a budget.
      data: whether the inputs are learned from.
      budget: bits a weight of all that is counted, such as "3.5bpw"; None leaves one width to all leaves.
    """

    setting: Setting
    data: bool
    budget: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON gives it back: what a results file knows it by."""
        fields = dataclasses.asdict(self.setting) | {"rules": [list(words) for words in self.setting.rules]}
        fields |= {"bits": None if self.budget else self.setting.bits, "budget": self.budget, "word": None}
        return fields | {"method": self.setting.method + WITH_DATA * self.data}


def grid(
    methods: Sequence[str], bits: Sequence[int] = (), budgets: Sequence[str] = (), plain: Sequence[int] = ()
) -> list[Cell]:
    """Every cell, those without data first.

    Args:
      methods: some of `LEARNING`, for the cells with data.
      bits: one width for all leaves.
      budgets: bits a weight, such as "3.5bpw".
      plain: widths without data, of all methods; of more than 8 bits there is fixed point alone.

    >>> [cell.to_dict()["method"] for cell in grid(["knq"], [4], plain=[9])]
    ['uniform', 'uniform_pow2', 'dfp', 'knq, data']
    """
    if unknown := sorted(set(methods) - set(LEARNING)):
        raise ValueError(f"unknown method {unknown[0]!r}: with data the known are {', '.join(LEARNING)}")
    short = [width for width in plain if width <= 8]
    found = study.grid(study.CODEBOOKS, short, scales=["channel"]) if short else []
    found += study.grid(study.FIXED_POINT, plain, granularities=["channel"]) if plain else []
    settings = [dataclasses.replace(cell.setting, codebook_format=_FORMAT) for cell in found]
    cells = [Cell(setting, data=False) for setting in settings]
    for method, width in itertools.product(methods, bits):
        cells.append(Cell(Setting(method, width, scale="channel", codebook_format=_FORMAT), data=True))
    for method, budget in itertools.product(methods, budgets):
        cells.append(Cell(Setting(method, scale="channel", codebook_format=_FORMAT), data=True, budget=budget))
    return list(dict.fromkeys(cells))


class Learner:
    """Compresses a tree with data; what the budgets of a method share is measured once."""

    def __init__(self, fn: Callable[..., Any], params: Any, inputs: np.ndarray):
        self.fn, self.params = fn, params
        self.batches = [inputs[n : n + _BATCH] for n in range(0, len(inputs), _BATCH)]
        self._sensitivities: dict[str, Any] = {}

    def compress(self, cell: Cell) -> tuple[Any, Any]:
        """The compressed tree, and its report."""
        options = cell.setting.options()
        if cell.budget is not None:
            options["rules"] = self._allocation(cell).rules
        return nuqjax.compress(
            self.params, fn=self.fn, batches=self.batches, return_report=True, min_size=_MIN_SIZE, **options
        )

    def _allocation(self, cell: Cell) -> nuqjax.calibration.Allocation:
        options: dict[str, Any] = cell.setting.options() | {"min_size": _MIN_SIZE}
        del options["bits"], options["rules"]
        if cell.setting.method not in self._sensitivities:
            self._sensitivities[cell.setting.method] = nuqjax.calibration.sensitivity(
                self.fn, self.params, self._tried, self._moments, **options
            )
        table = self._sensitivities[cell.setting.method]
        return nuqjax.calibration.allocate(self.params, table, cell.budget, moments=self._moments, **options)

    @property
    def _tried(self) -> list[np.ndarray]:
        """A quarter of the batches, which the moments do not have."""
        return self.batches[3::4] or self.batches[-1:]

    @functools.cached_property
    def _moments(self) -> nuqjax.calibration.Moments:
        others = [batch for batch in self.batches if not any(batch is tried for tried in self._tried)]
        return nuqjax.calibration.moments(self.fn, self.params, others)


def counted(report: Any, method: str) -> int:
    """Bytes of a tree that was compressed with data; a grid is two numbers of 16 bits, its start and its step."""
    total = sum(leaf.nbytes_after for leaf in report.leaves)
    if method in study.FIXED_POINT:
        tables = [leaf.levels_available for leaf in report.leaves if leaf.reason is None]
        total -= sum(2 * count - 4 for count in tables)
    return total


def of_study(measured: dict[str, Any], params: dict[str, Any], of_float: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of fixed point with a step for each channel of every kernel, on every other image of the study's.

    Args:
      measured: what `experiments.paper.study.run` gave.
      params: the kernels and the offsets, as they are counted here.
      of_float: the summary of the float network here.

    Raises:
      ValueError: the float network of the study is right on other images.
    """
    right = unpack(of_float["right"])
    there = unpack(measured["float"]["right"])[::2] if measured["float"]["top1"] is not None else right[:0]
    if there.size != right.size or np.mean(there != right) > 0.01:
        raise ValueError("the study's results are of other images or weights: its float network is right on others")
    found = []
    for entry in measured["cells"]:
        cell = entry["cell"]
        wanted = cell["method"] in study.FIXED_POINT and cell["granularity"] == "channel" and cell["word"] is None
        if not wanted or not cell["rules"]:
            continue
        step = 2 if cell["method"] == "uniform" else 1
        stored = sum(
            leaf.nbytes if leaf.ndim < 2 else -(-leaf.size * cell["bits"] // 8) + step * leaf.shape[-1]
            for leaf in params.values()
        )
        here, agrees = unpack(entry["right"])[::2], unpack(entry["agrees"])[::2]
        fields = {"cell": cell | {"codebook_format": _FORMAT, "budget": None}, "sqnr_db": entry["sqnr_db"]}
        found.append(fields | {"stored_bytes": stored, "bytes": stored} | of_bools(here, agrees, right))
    return found


def run(
    network: Network,
    variables: Variables,
    source: LabelledImages,
    cells: Sequence[Cell],
    *,
    learn: int = 256,
    batch: int = 25,
    known: dict[str, Any] | None = None,
    measured: dict[str, Any] | None = None,
    on_cell: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Evaluates the float network and every cell on the images that nothing was learned from.

    Args:
      network: which network.
      variables: of `network.trained`.
      source: the images; the odd ones are learned from, the even ones evaluate.
      cells: in order; those in `known` are not measured again.
      learn: images that are learned from, at most.
      batch: images a step of the evaluation.
      known: results of before, whose cells stay at the front.
      measured: results of `experiments.paper.study` on the same images, whose cells of fixed point are taken.
      on_cell: called with the results so far after each cell.

    Returns:
      A JSON-ready dict as `experiments.paper.study.run` gives it.

    Raises:
      ValueError: `known` is of another network, other images or other weights.
    """
    pixels, labels = source.pixels[::2], source.labels[::2] if network.complete else None
    inputs = network.preprocess(source.pixels[1::2][:learn])
    fn = network.trained.apply
    if "batch_stats" in variables:
        fn, variables = nuqjax.fold_batch_norm(fn, variables, inputs[:1])
    params, whole = kept_leaves(fn, variables, inputs[:1])
    program = jax.jit(lambda params, x: network.fastest.apply(whole(params), x))

    def outputs(params: Any) -> np.ndarray:
        parts = [np.asarray(program(params, x))[:valid] for x, valid in images.batches(network, pixels, batch)]
        return np.concatenate(parts).reshape(len(pixels), -1)

    reference = outputs(params)
    of_float = outcomes(reference, reference, labels)
    results = {
        "network": network.name,
        "title": network.title,
        "images": len(pixels),
        "learned": len(inputs),
        **circumstances("jax", "flax", "numpy"),
        "float": {"bytes": sum(leaf.nbytes for leaf in params.values()), **summary(of_float, of_float)},
        "cells": [] if known is None else list(known["cells"]),
    }
    study.check_same(known, results)
    done = [cell["cell"] for cell in results["cells"]]
    if measured is not None:
        results["cells"] += [
            entry for entry in of_study(measured, params, results["float"]) if entry["cell"] not in done
        ]
        on_cell(results)
    learner = Learner(lambda params, x: fn(whole(params), x), params, inputs)
    for cell in cells:
        if cell.to_dict() in done:
            continue
        start = time.perf_counter()
        if cell.data:
            cparams, report = learner.compress(cell)
            dense = nuqjax.decompress(cparams)
            stored = {"stored_bytes": counted(report, cell.setting.method)}
            fields = {**sizes(params, cparams), **stored, "held_out": report.calibration["measured"]}
        else:
            compressed = study.compressed_by(cell.setting, params)
            dense = compressed.decoded()
            # What memory pads counts for codebooks, and grids are given every advantage.
            stored = {} if cell.setting.method in study.FIXED_POINT else {"stored_bytes": compressed.sizes["bytes"]}
            fields = {**compressed.sizes, **stored}
        entry = {"cell": cell.to_dict(), **fields, **summary(outcomes(outputs(dense), reference, labels), of_float)}
        results["cells"].append(entry | {"seconds": round(time.perf_counter() - start, 1)})
        on_cell(results)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper.calibrated",
        description="Memory at equal accuracy with data. Options that take a list take it with commas.",
    )
    everything = [*networks.NETWORKS, *networks.FROM_FILE, *networks.TRAINED_IN_PLACE]
    parser.add_argument("--network", required=True, choices=everything)
    parser.add_argument("--weights", type=Path, help="a weights file (default: the data folder's)")
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--source", default="data", help="data, idx:FOLDER, folder:FOLDER, zip:FILE, tfds:FOLDER:SPLIT")
    parser.add_argument("--method", type=listed, default=list(LEARNING), help=f"(default: {','.join(LEARNING)})")
    parser.add_argument("--bits", type=listed, default=[], help="one width for all leaves, 1 to 8 (default: none)")
    parser.add_argument("--budget", type=listed, default=[], help="bits a weight, such as 3.5bpw (default: none)")
    parser.add_argument("--plain", type=listed, default=[], help="widths without data, 2 to 16 (default: none)")
    parser.add_argument("--study", type=Path, help="results of experiments.paper.study on the same images")
    parser.add_argument("--learn", type=int, default=256, help="images that are learned from (default: 256)")
    parser.add_argument("--images", type=int, help="labelled images in all; half evaluate (default: all)")
    parser.add_argument("--batch", type=int, default=25, help="images a step of the evaluation (default: 25)")
    parser.add_argument("--json", type=Path, help="keep the results in this file, and go on from it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        cells = grid(args.method, [int(b) for b in args.bits], args.budget, [int(b) for b in args.plain])
        network = networks.get(args.network)
        if args.weights is not None:
            network, variables = load_file(network, args.weights)
        else:
            variables = networks.load_features(network, images.data_folder(args.data))
        source = sources.kept(sources.load(args.source, network, args.data, args.images))
        if not isinstance(source, LabelledImages):
            raise ValueError(f"the images of {args.source} do not fit into memory: take fewer with --images")
        known = read(args.json) if args.json is not None and args.json.exists() else None
        keep = keeper(
            args.json, [*(known or {}).get("commands", []), command_of("experiments.paper.calibrated", args, parser)]
        )
        measured = None if args.study is None else read(args.study)
        results = run(
            network, variables, source, cells, learn=args.learn, batch=args.batch, known=known, measured=measured,
            on_cell=keep,
        )  # fmt: skip
        keep(results)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(cells_table(results))
    console.print(answers_table(results, baselines=BASELINES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
