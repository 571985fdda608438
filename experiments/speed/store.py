"""What files cost: bytes and seconds of a network saved, packed and entropy-coded, beside safetensors, gzip and zstd.

    python -m experiments.speed.store --network efficientnet_lite0,resnet20

Every row is a way to keep the same network: dense in float32 by the safetensors library, compressed and packed,
compressed and entropy-coded; and the packed indices of all layers through gzip and zstd. Seconds are the least of
several runs on files that are in the system's memory; written files are brought to disk where nuqjax writes them.
"""

import argparse
import gzip
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.networks import Network
from experiments.record.results import circumstances, write
from experiments.record.settings import listed

_RUNS = 5


def measure(network: Network, data: Path, bits: int) -> dict[str, Any]:
    """The sizes and times of one network at one index width."""
    zstandard = import_module("zstandard")  # of the benchmark group
    params = jax.tree.map(np.asarray, networks.load_features(network, data))
    cparams, report = nuqjax.compress(params, bits=bits, return_report=True)
    packed = b"".join(
        np.asarray(leaf.packed).tobytes()
        for leaf in jax.tree.leaves(cparams, is_leaf=lambda x: isinstance(x, nuqjax.CodebookArray))
        if isinstance(leaf, nuqjax.CodebookArray)
    )
    indices = sum(leaf.weights for leaf in report.compressed)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "file.safetensors")

        def files(name: str, save: Callable[[], Any], load: Callable[[], Any]) -> None:
            saving = _least(save)
            rows.append({"way": name, "nbytes": os.path.getsize(path), "save_seconds": saving,
                         "load_seconds": _least(lambda: jax.block_until_ready(load()))})  # fmt: skip

        def load_dense() -> Any:
            return jax.tree.map(jax.numpy.asarray, safetensors.numpy.load_file(path))

        files("safetensors, float32", lambda: safetensors.numpy.save_file(flat, path), load_dense)
        files("nuqjax, float32", lambda: nuqjax.save(path, params), lambda: nuqjax.load(path))
        files("nuqjax, packed", lambda: nuqjax.save(path, cparams), lambda: nuqjax.load(path))
        files(
            "nuqjax, entropy-coded",
            lambda: nuqjax.save(path, cparams, entropy_coding=True, report=report),
            lambda: nuqjax.load(path),
        )
        coded = nuqjax.inspect(path).total["nbytes_coded"]
        for name, encode, decode in (
            ("gzip -6 on the indices", lambda b: gzip.compress(b, 6), gzip.decompress),
            ("zstd -3 on the indices", zstandard.ZstdCompressor(3).compress, zstandard.ZstdDecompressor().decompress),
            ("zstd -19 on the indices", zstandard.ZstdCompressor(19).compress, zstandard.ZstdDecompressor().decompress),
        ):
            small = encode(packed)
            rows.append({"way": name, "nbytes": len(small), "save_seconds": _least(lambda e=encode: e(packed), 1),
                         "load_seconds": _least(lambda d=decode, s=small: d(s))})  # fmt: skip
    by_way = {row["way"]: row for row in rows}
    decoding = by_way["nuqjax, entropy-coded"]["load_seconds"] - by_way["nuqjax, packed"]["load_seconds"]
    return {
        "network": network.name,
        "title": network.title,
        "bits": bits,
        "indices": indices,
        "nbytes_packed": report.total["nbytes_packed"],
        "nbytes_coded": coded,
        "nbytes_entropy": report.total["entropy"] * indices / 8,
        "decoded_per_second": indices / decoding,
        "rows": rows,
    }


def _least(function: Callable[[], Any], runs: int = _RUNS) -> float:
    """The least of the seconds of several runs."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def show(cell: dict[str, Any]) -> Table:
    """A network's rows as a table for the terminal."""
    excess = 100 * (cell["nbytes_coded"] / cell["nbytes_entropy"] - 1)
    caption = (
        f"{cell['indices']:,} indices: {cell['nbytes_packed']:,} bytes packed, {cell['nbytes_coded']:,} coded, entropy "
        f"{cell['nbytes_entropy']:,.0f} ({excess:+.2f} %); decoded at {cell['decoded_per_second'] / 1e6:.0f} million/s"
    )
    table = Table("way", title=f"{cell['title']}, {cell['bits']} bits", caption=caption)
    for name in ("bytes", "save ms", "load ms"):
        table.add_column(name, justify="right")
    for row in cell["rows"]:
        times = (f"{1e3 * row[name]:.1f}" for name in ("save_seconds", "load_seconds"))
        table.add_row(row["way"], f"{row['nbytes']:,}", *times)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.store", description="Bytes and seconds of files, beside gzip and zstd."
    )
    parser.add_argument("--network", type=listed, default=["efficientnet_lite0"])
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--bits", type=listed, default=["4"], help="index widths (default: 4)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    try:
        data = images.data_folder(args.data)
        cells = [measure(networks.get(n), data, int(bits)) for n in args.network for bits in args.bits]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.json is not None:
        words = ["python", "-m", "experiments.speed.store"]
        for name in ("network", "bits"):
            if getattr(args, name) != parser.get_default(name):
                words += [f"--{name}", ",".join(getattr(args, name))]
        packages = ("jax", "nuqjax", "numpy", "safetensors", "constriction", "zstandard")
        write(args.json, {"commands": [shlex.join(words)], **circumstances(*packages), "cells": cells})
    for cell in cells:
        Console(width=None if sys.stdout.isatty() else 160).print(show(cell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
