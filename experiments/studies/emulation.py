"""What fixed-point arithmetic costs a trained network: accuracy of the raw integers beside float.

    python -m experiments.studies.emulation --network resnet20 --bits 4,8 --word 8,16 --images 2000

Batch-norms are folded, the convolutions and dense layers compressed to codebooks of fixed-point words
(`codebook_format=AutoQFormat(weight word)`), formats calibrated on images of their own where there are enough, and the
unchanged module runs on raw integers (`nuqjax.emulate`). Beside its top-1 stand those of the float network and of the
float network on the same codebooks. `--formats DIR` keeps every table of formats; `--per-layer` shows what each site's
words cost: the SQNR of the float network's values at that site against the words. `--alone` shows which sites hurt: the
outputs' SQNR when all sites have 16-bit words but one.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.networks import Network
from experiments.record.results import circumstances, write
from experiments.record.settings import command_of, listed
from experiments.record.terminal import progress_bars
from experiments.studies.accuracy import scores

_WIDE = 16  # bits of words that cost no accuracy


def folded(network: Network, data: Path) -> tuple[Callable[..., jax.Array], Any]:
    """The network without its batch-norms: a function of variables and images, and the variables."""
    inputs = jax.ShapeDtypeStruct((1, network.size, network.size, 3), np.float32)
    return nuqjax.fold_batch_norm(network.trained.apply, networks.load_features(network, data), inputs)


def compressed(variables: Any, bits: int, weight_word: int, granularity: Literal["tensor", "channel"]) -> Any:
    """The variables with the kernels as codebooks of `weight_word`-bit words."""
    words = nuqjax.AutoQFormat(weight_word)
    return nuqjax.compress(variables, bits, granularity=granularity, codebook_format=words)


def run(
    network: Network,
    data: Path,
    cells: Sequence[dict[str, Any]],
    *,
    count: int | None,
    batch: int,
    calibration: int,
    formats_folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates the float network, its codebooks and its integers on the same images.

    Args:
      network: which network.
      data: the data folder.
      cells: settings: `bits`, `weight_word`, `word`, `granularity`, `choose`, and maybe `wide`.
      count: number of images; None takes all.
      batch: images a step.
      calibration: images that formats are chosen from.
      formats_folder: where every table of formats is written as JSON, if given.
      progress: bars to advance.

    Returns:
      A JSON-ready dict: circumstances, the float network's scores, and for each cell its setting, the scores of the
      codebooks in float (`decoded`) and on raw integers (`emulated`), and seconds,
      compilation included.
    """
    labelled = images.load_images(network, data, count)
    fn, variables = folded(network, data)
    calibrating = _calibration_inputs(network, data, calibration)
    bars = progress or Progress(disable=True)
    bar = bars.add_task("float", total=len(labelled.labels))

    def outputs(program: Callable, variables: Any, description: str) -> tuple[np.ndarray, float]:
        bars.reset(bar, description=description)
        parts, start = [], time.perf_counter()
        for inputs, valid in images.batches(network, labelled.pixels, batch):
            parts.append(np.asarray(program(variables, inputs))[:valid])
            bars.advance(bar, valid)
        return np.concatenate(parts).reshape(len(labelled.labels), -1), round(time.perf_counter() - start, 1)

    reference, seconds = outputs(jax.jit(network.fastest.apply), networks.load_features(network, data), "float")
    labels = labelled.labels if network.complete else None
    results = {
        "network": network.name,
        "title": network.title,
        "images": len(labelled.labels),
        "calibration_images": calibration,
        "batch": batch,
        **circumstances("jax", "flax", "numpy"),
        "float": {**scores(reference, reference, labels), "seconds": seconds},
        "cells": [],
    }
    decode = jax.jit(nuqjax.apply(fn))
    for cell in cells:
        cparams = compressed(variables, cell["bits"], cell["weight_word"], cell["granularity"])
        decoded, _ = outputs(decode, cparams, f"{_describe(cell)}: decoded")
        formats = formats_of(fn, cparams, calibrating, cell)
        if formats_folder is not None:
            formats_folder.mkdir(parents=True, exist_ok=True)
            name = "_".join([network.name, *(f"{key}-{value}" for key, value in cell.items())])
            formats.save(formats_folder / f"{name}.json")
        emulated, seconds = outputs(jax.jit(nuqjax.emulate(fn, formats)), cparams, f"{_describe(cell)}: emulated")
        routes = [row.route for row in formats if row.route]
        results["cells"].append(
            {
                "setting": cell,
                "decoded": scores(decoded, reference, labels),
                "emulated": scores(emulated, reference, labels),
                "routes": {route: routes.count(route) for route in sorted(set(routes))},
                "accumulator_bits": max(row.needed_bits or 0 for row in formats if row.accumulator),
                "seconds": seconds,
            }
        )
    return results


def formats_of(
    fn: Callable, cparams: Any, calibrating: np.ndarray, cell: dict[str, Any], bias_word: int = 16
) -> nuqjax.Formats:
    """The formats of a setting: words of `word` bits, but of 16 at the sites in whose names `wide` is found."""

    def chosen(word: int) -> nuqjax.Formats:
        options = {"weight_word": cell["weight_word"], "bias_word": bias_word, "choose": cell["choose"]}
        return nuqjax.calibrate(fn, cparams, calibrating, word=word, **options)

    formats = chosen(cell["word"])
    if not cell.get("wide"):
        return formats
    rows = {row.site: row for row in chosen(_WIDE) if row.output is not None and re.search(cell["wide"], row.site)}
    if not rows:
        raise ValueError(f"{cell['wide']!r} is in no site's name; the sites are {', '.join(formats.rows)}")
    changed = {site: replace(formats[site], output=row.output) for site, row in rows.items()}
    return nuqjax.calibrate(fn, cparams, calibrating, formats=replace(formats, rows={**formats.rows, **changed}))


def _calibration_inputs(network: Network, data: Path, count: int) -> np.ndarray:
    """Images to choose formats from: of CIFAR-10 others than `load_images` takes, else some of the same thousand."""
    pixels = images.load_images(network, data).pixels
    step = len(pixels) // count
    return network.preprocess(pixels[np.arange(count) * step + step - 1])


def per_layer(network: Network, data: Path, cell: dict[str, Any], count: int, calibration: int) -> list[dict[str, Any]]:
    """By site, in dB: the power of what the float network computes there over that of the words' difference from it.

    The float network runs on the same codebooks, so what is lost is the words' doing: at `here` when the inputs of the
    whole network alone are words, so with all that came before.
    """
    fn, variables = folded(network, data)
    cparams = compressed(variables, cell["bits"], cell["weight_word"], cell["granularity"])
    calibrating = _calibration_inputs(network, data, calibration)
    inputs = next(images.batches(network, images.load_images(network, data, count).pixels, count))[0]
    traced = []
    for word in (cell["word"], 24):  # words of 24 bits stand for the float network's values
        formats = formats_of(fn, cparams, calibrating, cell | {"word": word}, 32)
        _, trace = jax.jit(nuqjax.emulate(fn, formats, trace=[""]))(cparams, inputs)
        units = {site: 2.0**-fmt.frac for site, fmt in trace.formats}
        traced.append((formats, {site: np.asarray(words) * units[site] for site, words in trace.words.items()}, trace))
    (formats, words, trace), (_, wide, _) = traced
    found = []
    for site in (row.site for row in formats if row.site in words):  # in the order of the program
        values = words[site]
        noise = np.square(values - wide[site]).sum()
        signal = np.square(wide[site]).sum()
        found.append(
            {
                "site": site,
                "sqnr_db": float(10 * np.log10(signal / noise)) if noise and signal else None,
                "overflows": int(trace.output_overflows[site]) / values.size,
                "needed_bits": formats[site].needed_bits,
                "route": formats[site].route,
            }
        )
    return found


def alone(network: Network, data: Path, cell: dict[str, Any], count: int, calibration: int) -> list[dict[str, Any]]:
    """By site: how far the outputs are from those of 16-bit words throughout when this site alone has `word` bits.

    `sqnr_db` is the power of the outputs over that of their change, `agreement` the share of images with the same first
    choice. The sites of the lowest SQNR hurt most.
    """
    fn, variables = folded(network, data)
    cparams = compressed(variables, cell["bits"], cell["weight_word"], cell["granularity"])
    calibrating = _calibration_inputs(network, data, calibration)
    inputs = next(images.batches(network, images.load_images(network, data, count).pixels, count))[0]
    wide, narrow = (formats_of(fn, cparams, calibrating, cell | {"word": word}, 32) for word in (_WIDE, cell["word"]))

    def outputs(formats: nuqjax.Formats) -> np.ndarray:
        return np.asarray(jax.jit(nuqjax.emulate(fn, formats))(cparams, inputs)).reshape(count, -1)

    reference = outputs(wide)
    found = []
    for site in (row.site for row in wide if row.output is not None):
        rows = {**wide.rows, site: replace(wide[site], output=narrow[site].output)}
        changed = outputs(nuqjax.calibrate(fn, cparams, calibrating, formats=replace(wide, rows=rows)))  # bounds anew
        noise = np.square(changed - reference).sum()
        found.append(
            {
                "site": site,
                "sqnr_db": float(10 * np.log10(np.square(reference).sum() / noise)) if noise else None,
                "agreement": float((changed.argmax(-1) == reference.argmax(-1)).mean()),
            }
        )
    return found


def _describe(cell: dict[str, Any]) -> str:
    wide = f", {_WIDE} at {cell['wide']}" if cell.get("wide") else ""
    return f"{cell['bits']} bits, {cell['weight_word']}-bit levels, {cell['word']}-bit words{wide}"


def table(results: dict[str, Any]) -> Table:
    """The results as a table for the terminal."""
    reference = results["float"]
    title = f"{results['title']} on {results['images']} images"
    if reference["top1"] is not None:
        title += f", float top-1 {reference['top1']:.1%}"
    out = Table(title=title)
    for name in ("bits", "codebooks", "levels", "words", "chosen by"):
        out.add_column(name)
    numbers = ("decoded top-1 %", "emulated top-1 %", "same choice %", "out dB", "widest sum")
    for name in numbers:
        out.add_column(name, justify="right")
    out.add_column("routes")
    for cell in results["cells"]:
        setting, emulated = cell["setting"], cell["emulated"]
        out.add_row(
            str(setting["bits"]),
            setting["granularity"],
            f"{setting['weight_word']} bits",
            f"{setting['word']} bits" + (f", {_WIDE} at {setting['wide']}" if setting.get("wide") else ""),
            setting["choose"],
            *(_percent(part["top1"]) for part in (cell["decoded"], emulated)),
            _percent(emulated["agreement"]),
            f"{emulated['output_sqnr_db']:.1f}",
            f"{cell['accumulator_bits']} bits",
            ", ".join(f"{number} {route}" for route, number in cell["routes"].items()),
        )
    return out


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.emulation",
        description="Accuracy of a network on raw fixed-point integers. Options that take a list take it with commas; "
        "every combination is measured.",
    )
    parser.add_argument("--network", required=True, choices=networks.NETWORKS)
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--bits", type=listed, default=["4"], help="index widths, 1 to 8 (default: 4)")
    parser.add_argument("--weight-word", type=listed, default=["8"], help="bits of the levels (default: 8)")
    parser.add_argument("--word", type=listed, default=["8"], help="bits of the activations (default: 8)")
    parser.add_argument("--granularity", type=listed, default=["tensor"], help="tensor, channel")
    parser.add_argument("--choose", type=listed, default=["range"], help="range, error or ristretto (default: range)")
    parser.add_argument("--wide", help=f"sites (a pattern of their names) whose words have {_WIDE} bits nevertheless")
    parser.add_argument("--images", type=int, help="how many, evenly spread (default: all)")
    parser.add_argument("--calibration", type=int, default=50, help="images to choose formats from (default: 50)")
    parser.add_argument("--batch", type=int, default=25, help="images a step (default: 25)")
    parser.add_argument("--formats", type=Path, help="write every table of formats into this folder, as JSON")
    parser.add_argument(
        "--per-layer", action="store_true", help="show what the words of each site cost (first setting)"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="show what each site's words cost alone, among 16-bit words (first setting)",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser


_LEFT_OUT = "data", "json", "formats", "per_layer", "alone"  # of the command that is kept


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    cells = [
        {
            "bits": int(bits),
            "weight_word": int(weight_word),
            "word": int(word),
            "granularity": granularity,
            "choose": choose,
            **({"wide": args.wide} if args.wide else {}),
        }
        for granularity in args.granularity
        for choose in args.choose
        for weight_word in args.weight_word
        for bits in args.bits
        for word in args.word
    ]
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        network, data = networks.get(args.network), images.data_folder(args.data)
        if args.alone:
            sites = alone(network, data, cells[0], args.images or args.batch, args.calibration)
            out = Table("site", title=f"{network.title}: {_describe(cells[0])} at one site, 16-bit words elsewhere")
            for name in ("outputs' SQNR dB", "same choice %"):
                out.add_column(name, justify="right")
            for site in sites:
                sqnr = "the same" if site["sqnr_db"] is None else f"{site['sqnr_db']:.1f}"
                out.add_row(site["site"], sqnr, _percent(site["agreement"]))
            console.print(out)
            return 0
        if args.per_layer:
            sites = per_layer(network, data, cells[0], min(args.images or args.batch, args.batch), args.calibration)
            console.print(_layers(sites, f"{network.title}: {_describe(cells[0])}"))
            return 0
        with progress_bars() as progress:
            results = run(
                network,
                data,
                cells,
                count=args.images,
                batch=args.batch,
                calibration=args.calibration,
                formats_folder=args.formats,
                progress=progress,
            )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.json is not None:
        write(
            args.json, {"commands": [command_of("experiments.studies.emulation", args, parser, _LEFT_OUT)], **results}
        )
    console.print(table(results))
    return 0


def _layers(sites: Sequence[dict[str, Any]], title: str) -> Table:
    out = Table("site", title=title)
    for name in ("SQNR dB", "out of range %", "sum needs"):
        out.add_column(name, justify="right")
    out.add_column("route")
    for site in sites:
        sqnr = "exact" if site["sqnr_db"] is None else f"{site['sqnr_db']:.1f}"
        bits = f"{site['needed_bits']} bits" if site["needed_bits"] else ""
        out.add_row(site["site"], sqnr, f"{100 * site['overflows']:.3f}", bits, site["route"] or "")
    return out


if __name__ == "__main__":
    sys.exit(main())
