"""The paper's question, asked again: how little memory does each method need for a given accuracy?

    python -m experiments.paper.study --network resnet20 --images 2000 --bits 3,4,5 --codebook-word float,8 --json FILE
    python -m experiments.paper.study --network vgg16 --weights vgg16-397923af.pth \\
        --source tfds:imagenet2012/5.1.0:validation

Sweeps methods × index bits × codebook words × granularity, and activation words where asked for. The file that `--json`
names is kept after every cell, and the same command goes on where it stopped. Every cell sees the same images.

Codebooks (`knq`, `enq`) take their levels as float32 or as fixed-point words whose fraction bits fit each layer. The
fixed-point baselines have no codebook: `uniform_pow2` and `dfp` are words of as many bits as the index, `uniform` has a
float step; their words are their own, so `--codebook-word` does not multiply them. They may be longer than 8 bits.

A compressed network runs as its decoded weights (`nuqjax.decompress`) in one compiled float program, so no cell
compiles anew; `nuqjax.apply` on the packed tree computes the same from the same weights. Activation words (`--word`)
run in the fixed-point emulation, batch-norms folded, and compile for every cell.
"""

import argparse
import dataclasses
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress

import nuqjax
from experiments import networks
from experiments.data import images, sources
from experiments.data.sources import Source
from experiments.networks import Network, Variables
from experiments.networks.importing import load_file
from experiments.paper import answers, plots, wide_words
from experiments.paper.scores import outcomes, summary
from experiments.record.results import circumstances, keeper, read
from experiments.record.settings import Setting, listed
from experiments.record.terminal import progress_bars
from experiments.studies.accuracy import describe, sizes

CODEBOOKS = ("knq", "enq")
FIXED_POINT = ("uniform", "uniform_pow2", "dfp")
METHODS = (*CODEBOOKS, *FIXED_POINT)
_EXPONENTS = ("uniform_pow2", "dfp")  # their steps are powers of two
_INSIST = (("kernel", "skip=false"),)
_MOST_BITS = 8  # of an index; words of fixed point may be longer (`experiments.paper.wide_words`)


class Cell(NamedTuple):
    """One way to run a network.

    Attributes:
      setting: how its kernels are compressed.
      word: bits of the activations' words; None runs in float32.
    """

    setting: Setting
    word: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON gives it back: what a results file knows it by."""
        fields = dataclasses.asdict(self.setting)
        return fields | {"rules": [list(words) for words in self.setting.rules], "word": self.word}

    def __str__(self) -> str:
        return describe(self.setting) + (f", {self.word}-bit activations" if self.word else "")


def grid(
    methods: Sequence[str],
    bits: Sequence[int],
    codebook_words: Sequence[str] = ("float",),
    granularities: Sequence[str] = ("tensor",),
    words: Sequence[int | None] = (None,),
    scales: Sequence[str] = ("none",),
) -> list[Cell]:
    """Every cell that means something.

    Args:
      methods: some of `METHODS`.
      bits: index widths, 1 to 8; of fixed-point methods, words of 2 to 16.
      codebook_words: `"float"` or a number of bits. A word shorter than the index cannot tell its levels apart, so
        those cells are left out; fixed-point methods take part once, with their own words.
      granularities: as in `experiments.record.settings`.
      words: bits of the activations; None for float32.
      scales: of codebooks: `"none"`, or `"channel"`: each output channel over its largest magnitude. (A fixed-point
        step a channel is the granularity `"channel"`.)

    >>> [str(cell) for cell in grid(["knq", "dfp"], [6], ["float", "8", "4"])]
    ['knq 6 bits tensor', 'knq 6 bits tensor fixed:8', 'dfp 6 bits tensor']
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"unknown method {unknown[0]!r}: the known are {', '.join(METHODS)}")
    for method, width in itertools.product(methods, bits):
        most = wide_words.MOST_BITS if method in FIXED_POINT else _MOST_BITS
        if not 1 <= width <= most:
            raise ValueError(f"{method} of {width} bits, but 1 to {most} are wanted")
    cells = []
    for granularity, method, width, word in itertools.product(granularities, methods, bits, words):
        if method in FIXED_POINT:
            # A step a channel is cheap where a codebook a channel is not. So kernels that are too narrow for codebooks,
            # which stay dense by default, are compressed in a cell of their own; which pays more is measured.
            choices = [(), _INSIST] if granularity != "tensor" else [()]
            if width > _MOST_BITS:
                choices = choices[-1:]
            cells += [Cell(Setting(method, width, granularity, rules=rules), word) for rules in choices]
            continue
        for scale, codebook_word in itertools.product(scales, codebook_words):
            if scale not in ("none", "channel"):
                raise ValueError(f"unknown scale {scale!r}: wanted is none or channel")
            setting = Setting(method, width, granularity, scale)
            if codebook_word == "float":
                cells.append(Cell(setting, word))
            elif not codebook_word.isdigit():
                raise ValueError(f"unknown codebook word {codebook_word!r}: wanted is float or a number of bits")
            elif int(codebook_word) >= width:
                cells.append(Cell(dataclasses.replace(setting, codebook_format=f"fixed:{codebook_word}"), word))
    return list(dict.fromkeys(cells))


def stored_bytes(setting: Setting, leaves: Sequence[dict[str, Any]]) -> int:
    """Bytes that hardware would store: indices at their bits, levels at their words' bits, no padding but to a byte.

    A fixed-point grid needs no table, only its step: a float of the codebook's format, or a byte for an exponent, as
    many as there would be codebooks. Fixed-point levels need a byte a layer for their fraction bits, scales 4 bytes a
    channel. What stays dense counts as it is.

    Args:
      setting: how the leaves were compressed.
      leaves: of `nuqjax.report(…).to_dict()`.
    """
    total = 0
    kind, _, word = setting.codebook_format.partition(":")
    word_bits = int(word) if kind == "fixed" else 8 * jnp.dtype(kind).itemsize
    for leaf in leaves:
        if leaf["reason"] is not None:
            total += leaf["nbytes_after"]
            continue
        total += -(-leaf["weights"] * leaf["bits"] // 8)
        if setting.scale == "channel":
            total += 4 * leaf["shape"][-1]
        if setting.method in FIXED_POINT:
            steps = leaf["levels_available"] >> leaf["bits"]
            total += steps * (1 if setting.method in _EXPONENTS else word_bits // 8)
        else:
            total += -(-leaf["levels_available"] * word_bits // 8) + (kind == "fixed")
    return total


class Evaluation:
    """A network on the same images again and again, spread over all local devices.

    Attributes:
      network: which.
      source: the images.
      batch: images a step, a multiple of the devices.
      workers: processes that decode images ahead.
    """

    def __init__(self, network: Network, source: Source, batch: int, workers: int = 0):
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), ("images",))
        self.network, self.source, self.workers = network, source, workers
        self.batch = -(-batch // len(devices)) * len(devices)
        self._split = NamedSharding(mesh, PartitionSpec("images"))
        self._whole = NamedSharding(mesh, PartitionSpec())

    def outputs(self, program: Callable[..., jax.Array], variables: Any, on_batch: Callable[[int], None]) -> np.ndarray:
        """`[N, C]` of a jitted program of variables and preprocessed images; `on_batch` hears how many are done."""
        variables = jax.device_put(variables, self._whole)
        parts = []
        for inputs, valid in self._inputs():
            parts.append(np.asarray(program(variables, jax.device_put(inputs, self._split)))[:valid])
            on_batch(valid)
        return np.concatenate(parts).reshape(len(self.source.labels), -1)

    def _inputs(self) -> Iterator[tuple[np.ndarray, int]]:
        for pixels, _ in sources.batches(self.source, self.batch, self.workers):
            yield from images.batches(self.network, pixels, self.batch)


def run(
    network: Network,
    variables: Variables,
    source: Source,
    cells: Sequence[Cell],
    *,
    batch: int = 25,
    workers: int = 0,
    calibration: np.ndarray | None = None,
    known: dict[str, Any] | None = None,
    on_cell: Callable[[dict[str, Any]], None] = lambda results: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates the float network and every cell on the same images.

    Args:
      network: which network.
      variables: of `network.trained`.
      source: the images.
      cells: in order; those in `known` are not measured again.
      batch: images a step.
      workers: processes that decode images ahead.
      calibration: `[M, …]` preprocessed images to choose activation formats from; wanted where a cell has a `word`.
      known: results of before, whose cells stay at the front.
      on_cell: called with the results so far after each cell.
      progress: bars to advance.

    Returns:
      A JSON-ready dict: circumstances, `float` and `cells`.

    Raises:
      ValueError: `known` is of another network, other images or other weights; or a `word` without `calibration`.
    """
    if calibration is None and any(cell.word for cell in cells):
        raise ValueError("activation words need images to choose their formats from")
    measured_before = [] if known is None else known["cells"]
    done = [cell["cell"] for cell in measured_before]
    remaining = [cell for cell in cells if cell.to_dict() not in done]
    evaluation = Evaluation(network, source, batch, workers)
    params = variables["params"]
    labels = source.labels if network.complete else None

    bars = progress or Progress(disable=True)
    cell_bar = bars.add_task("cells", total=len(remaining) + 1)
    image_bar = bars.add_task("float", total=len(source.labels))

    def outputs(program: Callable, variables: Any, description: str) -> np.ndarray:
        bars.reset(image_bar, description=description)
        found = evaluation.outputs(program, variables, lambda count: bars.advance(image_bar, count))
        bars.advance(cell_bar)
        return found

    program = jax.jit(network.fastest.apply)
    reference = outputs(program, variables, "float")
    of_float = outcomes(reference, reference, labels)
    results = {
        "network": network.name,
        "title": network.title,
        "images": len(source.labels),
        **circumstances("jax", "flax", "numpy"),
        "devices": jax.local_device_count(),
        "float": {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), **summary(of_float, of_float)},
        "cells": list(measured_before),
    }
    check_same(known, results)
    folded = _fold(network, variables) if any(cell.word for cell in remaining) else None
    for cell in remaining:
        start = time.perf_counter()
        bars.reset(image_bar, description=f"compress {cell}")
        tree = params if cell.word is None or folded is None else folded[1]["params"]
        compressed = compressed_by(cell.setting, tree)
        if cell.word is None or folded is None:
            found = outputs(program, variables | {"params": compressed.decoded()}, str(cell))
        else:
            assert calibration is not None
            found = outputs(*_emulated(folded, compressed.params, cell, calibration), str(cell))
        leaves = compressed.leaves
        results["cells"].append(
            {
                "cell": cell.to_dict(),
                **compressed.sizes,
                "layers": {
                    leaf["path"]: round(leaf["sqnr_db"], 3)
                    for leaf in leaves
                    if leaf["reason"] is None and np.isfinite(leaf["sqnr_db"])
                },
                **summary(outcomes(found, reference, labels), of_float),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        on_cell(results)
    return results


class Compressed(NamedTuple):
    """A tree as one setting leaves it: compressed, or of long words, which stay dense."""

    params: Any
    leaves: list[dict[str, Any]]
    sizes: dict[str, Any]

    def decoded(self) -> Any:
        return _decompress(self.params)


_decompress = jax.jit(nuqjax.decompress)


def compressed_by(setting: Setting, tree: Any) -> Compressed:
    """A tree as one setting leaves it, with its leaves' sizes and errors."""
    if setting.bits > _MOST_BITS:
        params, leaves = wide_words.quantize(tree, setting.method, setting.bits, setting.granularity)
        stored = stored_bytes(setting, leaves)
        return Compressed(params, leaves, {**wide_words.sizes(leaves, stored), "stored_bytes": stored})
    cparams = nuqjax.compress(tree, **setting.options())
    leaves = nuqjax.report(tree, cparams).to_dict()["leaves"]
    return Compressed(cparams, leaves, {**sizes(tree, cparams), "stored_bytes": stored_bytes(setting, leaves)})


def check_same(known: dict[str, Any] | None, results: dict[str, Any]) -> None:
    """A results file goes on with what it was begun with."""
    if known is None:
        return
    for name in ("network", "images", "learned"):
        if known.get(name) != results.get(name):
            raise ValueError(
                f"the results so far are of {name} {known.get(name)}, not {results.get(name)}: give another file"
            )
    if known["float"].get("right") != results["float"].get("right"):
        raise ValueError("the results so far are of other weights or images: the float network chooses differently")


def _fold(network: Network, variables: Variables) -> tuple[Callable[..., jax.Array], Variables]:
    """The network without its batch-norms, which integers do not have."""
    inputs = jax.ShapeDtypeStruct((1, *network.input_shape), np.float32)
    return nuqjax.fold_batch_norm(network.trained.apply, variables, inputs)


def _emulated(
    folded: tuple[Callable, Variables], cparams: Any, cell: Cell, calibration: np.ndarray
) -> tuple[Callable[..., jax.Array], Any]:
    """A program of raw integers, and its variables."""
    assert cell.word is not None
    fn, variables = folded
    kind, _, word = cell.setting.codebook_format.partition(":")
    own = {"uniform_pow2": cell.setting.bits, "dfp": cell.setting.bits}
    weight_word = int(word) if kind == "fixed" else own.get(cell.setting.method, 16)
    tree = variables | {"params": cparams}
    formats = nuqjax.calibrate(fn, tree, calibration, word=cell.word, weight_word=weight_word)
    return jax.jit(nuqjax.emulate(fn, formats)), tree


def _resized(network: Network, resize: int, source: str) -> Network:
    """The network that sees images at another scale."""
    if source.partition(":")[0] in ("data", "idx"):
        raise ValueError(f"the images of the source {source!r} are stored as they are used: --resize does not apply")
    if resize < network.size:
        raise ValueError(f"images of {resize} pixels are too small: {network.title} takes {network.size}")
    return dataclasses.replace(network, resize=resize)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper.study",
        description="Memory at equal accuracy: codebooks against fixed point. Options that take a list take it with "
        "commas; every combination is measured.",
    )
    everything = [*networks.NETWORKS, *networks.FROM_FILE, *networks.TRAINED_IN_PLACE]
    parser.add_argument("--network", required=True, choices=everything)
    parser.add_argument("--weights", type=Path, help="a weights file (default: the data folder's)")
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--source", default="data", help="data, idx:FOLDER, folder:FOLDER, zip:FILE, tfds:FOLDER:SPLIT")
    parser.add_argument(
        "--resize", type=int, help="bring the shorter side to this many pixels, then cut (default: the network's)"
    )
    parser.add_argument("--method", type=listed, default=list(METHODS), help=f"(default: {','.join(METHODS)})")
    parser.add_argument("--bits", type=listed, default=["4", "5", "6", "8"], help="index widths (default: 4,5,6,8)")
    parser.add_argument(
        "--codebook-word", type=listed, default=["float"], help="float or bits of a level, e.g. float,16,12,8,6"
    )
    parser.add_argument("--granularity", type=listed, default=["tensor"], help="tensor, channel, channel_groups:N, …")
    parser.add_argument("--scale", type=listed, default=["none"], help="none, channel: of the codebooks' weights")
    parser.add_argument("--word", type=listed, default=["float"], help="float or bits of the activations (emulated)")
    parser.add_argument("--calibration-source", help="images for the activations' formats (default: the evaluated)")
    parser.add_argument("--calibration", type=int, default=50, help="how many of them (default: 50)")
    parser.add_argument("--images", type=int, help="how many, evenly spread (default: all)")
    parser.add_argument("--batch", type=int, default=25, help="images a step (default: 25)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (default: 0: this one)")
    parser.add_argument("--size", choices=answers.SIZES, default="stored_bytes", help="which bytes are compared")
    parser.add_argument("--json", type=Path, help="keep the results in this file, and go on from it")
    parser.add_argument("--csv", type=Path, help="write all cells as a table")
    parser.add_argument("--plots", type=Path, help="draw the figures into this folder, as PNG and PDF")
    return parser


def _command(args: argparse.Namespace) -> str:
    """The command line that measures the same, without what differs from machine to machine."""
    words = ["python", "-m", "experiments.paper.study"]
    for name, value in vars(args).items():
        if name in ("network", "weights", "source") or name.startswith("calibration"):
            kept = value.name if isinstance(value, Path) else value
        elif name in ("method", "bits", "codebook_word", "granularity", "scale", "word", "images", "batch", "resize"):
            kept = ",".join(value) if isinstance(value, list) else value
        else:
            continue
        if value != _parser().get_default(name):
            words += ["--" + name.replace("_", "-"), str(kept)]
    return shlex.join(words)


def _cells(args: argparse.Namespace) -> list[Cell]:
    words = [None if word == "float" else int(word) for word in args.word]
    return grid(args.method, [int(b) for b in args.bits], args.codebook_word, args.granularity, words, args.scale)


def _needed(commands: Sequence[str]) -> list[str]:
    """The commands, oldest first, without those all of whose cells a later one measures too."""
    kept: list[tuple[str, list[Cell]]] = []
    for command in commands:
        cells = _cells(_parser().parse_args(shlex.split(command)[3:]))
        kept = [(other, found) for other, found in kept if not all(cell in cells for cell in found)]
        kept.append((command, cells))
    return [command for command, _ in kept]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        cells = _cells(args)
        for cell in cells:
            cell.setting.options()
        network = networks.get(args.network)
        if args.resize is not None:
            network = _resized(network, args.resize, args.source)
        if args.weights is not None:
            network, variables = load_file(network, args.weights)
        elif args.network in networks.FROM_FILE:
            raise ValueError(f"{network.title}'s weights come from a file of torchvision's: give it with --weights")
        else:
            variables = networks.load_features(network, images.data_folder(args.data))
        source = sources.kept(sources.load(args.source, network, args.data, args.images), args.workers)
        calibration = None
        if any(cell.word for cell in cells):
            name = args.calibration_source or args.source
            chosen = sources.kept(sources.load(name, network, args.data, args.calibration))
            calibration = network.preprocess(next(sources.batches(chosen, args.calibration))[0])
        known = read(args.json) if args.json is not None and args.json.exists() else None
        keep = keeper(args.json, _needed([*(known or {}).get("commands", []), _command(args)]))
        with progress_bars() as progress:
            results = run(
                network,
                variables,
                source,
                cells,
                batch=args.batch,
                workers=args.workers,
                calibration=calibration,
                known=known,
                on_cell=keep,
                progress=progress,
            )
        keep(results)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.csv is not None:
        answers.write_csv(results, args.csv)
    if args.plots is not None:
        plots.draw(results, args.plots, args.size)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(answers.cells_table(results))
    console.print(answers.answers_table(results, args.size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
