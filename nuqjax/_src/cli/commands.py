"""What each command does, but for `compare`."""

import os
import re
import tempfile
from contextlib import nullcontext
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

import nuqjax
from nuqjax._src.checkpoint.calibrated import compress_with_data
from nuqjax._src.cli.parser import parser
from nuqjax._src.cli.show import as_json, say_skipped
from nuqjax._src.compress.rules import Options
from nuqjax._src.leaf.paths import printable
from nuqjax._src.report.render import plain_console

_DATA = ("fn", "batches", "batch_size", "budget", "rate")


def compress(source: str, target: str, quiet: bool, output_axis: Any, **options: Any) -> None:
    """Compresses a checkpoint tensor by tensor, or with data the whole tree at once."""
    data = {name: options.pop(name) for name in _DATA}
    if any(value is not None for value in data.values()):
        return _compress_with_data(source, target, quiet, options | {"axis": output_axis}, data)
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(),
        TransferSpeedColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=plain_console(stderr=True), disable=quiet,
    )  # fmt: skip
    checkpoint = nuqjax.open_checkpoint(source, options["format"], options["separator"], options["skip"])
    say_skipped(checkpoint)
    total = sum(leaf.nbytes for leaf in checkpoint.leaves)
    with nullcontext() if quiet else bar:  # old releases of rich end a disabled bar with an empty line
        task = bar.add_task("compress", total=total)
        done = 0

        def progress(plan: Any, nbytes: int) -> None:
            nonlocal done
            done += 1
            text = f"{done}/{len(checkpoint.leaves)} {printable(plan.path[-40:])}"
            bar.update(task, advance=nbytes, description=text)

        report = nuqjax.compress_checkpoint(source, target, axis=output_axis, progress=progress, **options)
    if not quiet:
        print(report)


def _compress_with_data(source: str, target: str, quiet: bool, options: dict[str, Any], data: dict[str, Any]) -> None:
    """Compresses the whole tree at once, since only the whole function shows how its leaves are used."""
    if data["fn"] is None or data["batches"] is None:
        raise ValueError("--fn and --batches are given together: --fn module:function --batches inputs.npz")
    size = data["batch_size"] or 32
    with np.load(data["batches"], allow_pickle=False) as file:
        arrays = [file[name] for name in file.files] if hasattr(file, "files") else []
    if not arrays or len({len(x) if x.ndim else 0 for x in arrays}) != 1:
        raise ValueError(
            f"{data['batches']}: arrays with the same number of examples are wanted, got {[x.shape for x in arrays]}"
        )
    if size < 1:
        raise ValueError(f"--batch-size {size}, but 1 or more is wanted")
    batches = [tuple(x[n : n + size] for x in arrays) for n in range(0, len(arrays[0]), size)]
    checkpoint = nuqjax.open_checkpoint(source, *(options.pop(name) for name in ("format", "separator", "skip")))
    say_skipped(checkpoint)
    kept = {name: options.pop(name) for name in ("entropy_coding", "max_shard_size", "resume")}
    given = {name: data[name] for name in ("fn", "budget", "rate")} | {"batches": batches, "progress": not quiet}
    rules = options.pop("rules")
    report = compress_with_data(checkpoint, target, Options(**options), rules, **given, **kept)
    if not quiet:
        print(report)


def decompress(
    source: str, target: str, format: str | None, separator: str | None, max_shard_size: str | None, skip: str | None
) -> None:
    """Writes a compressed file as a dense checkpoint."""
    suffixes = {".safetensors": "safetensors", ".npz": "npz", ".msgpack": "msgpack"}
    format = format or suffixes.get(os.path.splitext(target)[1], "orbax")
    checkpoint = nuqjax.open_checkpoint(source, skip=skip)
    say_skipped(checkpoint)
    if checkpoint.format != "nuqjax":
        raise ValueError(f"{source}: not a compressed file")
    nuqjax.write_checkpoint(target, checkpoint, format, separator=separator, max_shard_size=max_shard_size)


def inspect(file: str, json: bool) -> None:
    """Shows the report of a compressed file."""
    report = nuqjax.inspect(file)
    if json:
        print(as_json(report.to_dict()))
    else:
        print(report)


def plot(file: str, folder: str, source: str | None, leaves: str) -> None:
    """Draws the report of a compressed file and the levels of its tensors."""
    try:
        from nuqjax._src.report.plot import plot_levels
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'nuqjax[plot]'") from error
    report = nuqjax.inspect(file)
    dense = {leaf.path: leaf for leaf in nuqjax.open_checkpoint(source or file).leaves}
    wanted = [leaf.path for leaf in report.compressed if re.search(leaves, leaf.path)]
    missing = [path for path in wanted if path not in dense]
    if missing:
        raise ValueError(f"{source}: no tensor {missing[0]!r}, which {file} has")
    os.makedirs(folder, exist_ok=True)
    report.plot().savefig(os.path.join(folder, "report.png"))
    for path in wanted:
        tree = nuqjax.load(file, leaves=lambda name, path=path: name == path, numpy=True)
        leaf = next(iter(_leaves(tree)))
        weights = np.asarray(dense[path].read())
        if weights.size:
            figure = plot_levels(weights, leaf, title=f"{printable(path)}: {leaf.bits} bits, {leaf.granularity}")
            figure.savefig(os.path.join(folder, f"levels-{re.sub(r'[^A-Za-z0-9_.-]+', '-', path)}.png"))
    print(f"{1 + len(wanted)} pictures in {folder}")


def _leaves(tree: Any) -> list[nuqjax.CodebookArray]:
    import jax

    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nuqjax.CodebookArray))


def demo() -> None:
    """Compresses a small made-up network, and says what happens."""
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": rng.laplace(0, 0.05, (3, 3, 32, 64)).astype(np.float32), "bias": np.zeros(64, np.float32)},
        "dense": {"kernel": rng.normal(0, 0.03, (576, 128)).astype(np.float32), "bias": np.zeros(128, np.float32)},
    }
    print("A made-up network of two layers, compressed to 4 bits a weight and codebooks per output channel:\n")
    cparams, report = nuqjax.compress(params, bits=4, granularity="channel", scale=None, return_report=True)
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "demo.safetensors")
        nuqjax.save(path, cparams, report=report)
        same = nuqjax.load(path)
        print(f"\nSaved, loaded again: {os.path.getsize(path):,} bytes on disk, header and report counted.")
    x = jnp.asarray(rng.normal(size=(8, 576)), jnp.float32)
    exact = x @ params["dense"]["kernel"]
    small = nuqjax.apply(lambda p, x: x @ p["dense"]["kernel"])(same, x)
    error = float(jnp.linalg.norm(small - exact) / jnp.linalg.norm(exact))
    print(f"The dense layer on what was loaded, decoding inside XLA: {100 * error:.1f} % off the exact output.")


def completion(shell: str) -> None:
    """Prints a script that completes this command in a shell."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError("shell completion needs shtab: pip install 'nuqjax[cli]'") from error
    print(shtab.complete(parser(), shell))
