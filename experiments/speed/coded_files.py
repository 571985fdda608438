"""How near entropy-coded files come to the entropy of what they hold, everything counted.

    python -m experiments.speed.coded_files --network tiny_darknet --bits 3,4,6 --rate 2.5bpw,2bpw

Batch-norms are folded and the leaves that this makes neutral are left out; scales are per channel, levels and offsets
float16. The least is the empirical entropy of the indices of each leaf (zero order: each index by itself) and the bytes
of levels, scales and dense leaves. With `--rate`, some images tell what the layers multiply.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.networks import Network
from experiments.record import terminal
from experiments.record.settings import listed
from experiments.studies.calibrated import kept_leaves

_BATCH = 16


def run(network: Network, data: Path, sizes: Sequence[dict[str, Any]], learn: int) -> list[dict[str, Any]]:
    """The bytes of a network's files at each size.

    Args:
      network: which network.
      data: the data folder.
      sizes: each `{"bits": width}` or `{"rate": text}` for `nuqjax.compress`.
      learn: how many images tell what the layers multiply, for rates.
    """
    shown = network.preprocess(images.load_images(network, data, learn).pixels)
    variables = networks.load_features(network, data)
    folded, variables = nuqjax.fold_batch_norm(network.module.apply, variables, shown[:1])
    params, whole = kept_leaves(folded, variables, shown[:1])
    batches = [shown[n : n + _BATCH] for n in range(0, learn, _BATCH)]
    with_data = {"fn": lambda params, x: folded(whole(params), x), "batches": batches}
    rows = []
    for size in sizes:
        options = size | (with_data if "rate" in size else {})
        cparams, report = nuqjax.compress(
            params, scale="channel", codebook_format=jnp.float16, return_report=True, **options
        )
        rows.append({"size": size, **measured(cparams, report)})
    return rows


def measured(cparams: Any, report: nuqjax.Report) -> dict[str, Any]:
    """The bytes of a tree's files, as they are and as the report predicts them, and the least that coding may reach."""
    total = report.total
    entropy = sum((leaf.entropy or 0) * leaf.weights / 8 for leaf in report.compressed)
    written = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "file.safetensors")
        for name, options in {
            "plain": {},
            "coded": {"entropy_coding": True},
            "coded, with report": {"entropy_coding": True, "report": report},
        }.items():
            nuqjax.save(path, cparams, **options)
            written[name] = os.path.getsize(path)
    return {
        "weights": total["weights"],
        "least": entropy + total["nbytes_after"] - total["nbytes_packed"],
        "predicted": {"plain": report.nbytes_saved, "coded": report.nbytes_saved_coded},
        **written,
    }


def show(network: Network, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table for a terminal."""
    table = Table(title=f"{network.title}: bytes of files")
    for name in ("size", "plain", "coded", "predicted", "least", "coded / least", "with report", "bits a weight"):
        table.add_column(name, justify="left" if name == "size" else "right")
    for row in rows:
        ((name, value),) = row["size"].items()
        assert row["predicted"]["plain"] == row["plain"]
        table.add_row(
            f"{value} bits" if name == "bits" else f'rate="{value}"', f"{row['plain']:,}", f"{row['coded']:,}",
            f"{row['predicted']['coded']:,}", f"{row['least']:,.0f}", f"{row['coded'] / row['least']:.4f}",
            f"{row['coded, with report'] / row['least']:.4f}", f"{8 * row['coded'] / row['weights']:.3f}",
        )  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", required=True, choices=networks.NETWORKS)
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--bits", type=listed, default=["3", "4", "6"], help="index widths (default: 3,4,6)")
    parser.add_argument("--rate", type=listed, default=[], help="rates, such as 2.5bpw (default: none)")
    parser.add_argument("--learn", type=int, default=96, help="images that rates are fitted to (default: 96)")
    args = parser.parse_args(argv)
    sizes: list[dict[str, Any]] = [{"bits": int(width)} for width in args.bits]
    sizes += [{"rate": rate} for rate in args.rate]
    with terminal.mistakes(parser):
        network = networks.get(args.network)
        rows = run(network, images.data_folder(args.data), sizes, args.learn)
        terminal.show(show(network, rows), 160)
    return 0


if __name__ == "__main__":
    sys.exit(main())
