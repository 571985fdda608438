"""Peers beside compression with data: the same network and images, their weights taken back, all counted alike.

    python -m experiments.studies.peers_with_data --network tiny_darknet --bits 4,3 --learn 128

Everything as in `studies.calibrated`. Beside `knq` by the weights alone, by Fisher information and with data, and a
grid with data, there are

- the palettizers of coremltools and coreai-opt: one table a tensor, or one for each group of at least 2^bits output
  channels, so that the tables take no more bytes than a scale for each channel would;
- coreai-opt's with one table a tensor and a scale for each channel, which is the layout of `knq` here; by the weights
  alone, and by the Fisher information that `knq` has;
- qwix's GPTQ, given the second moments that `knq` has: a grid with a scale for each channel.

Indices, tables and scales are counted as ours, 16 bits a level or scale, however the peer stores them. A peer that
does not run is named with the reason. No peer corrects offsets, so that each is measured a second time with offsets by
`correct_bias`. Install the peers beside this library, or put them on PYTHONPATH: coremltools, coreai-opt (with torch)
and qwix.
"""

import argparse
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.networks import Network
from experiments.record.intervals import between, paired
from experiments.record.results import circumstances, keeper
from experiments.record.settings import listed
from experiments.record.terminal import mistakes, show
from experiments.studies.calibrated import Cell, Measures, Setting, compressed, setting

PACKAGES = ("coremltools", "coreai-opt", "torch", "qwix")
Kernels = dict[str, np.ndarray]  # float32 `[O, I]` by path


class Task(NamedTuple):
    """What a peer is given.

    Attributes:
      kernels: those to compress.
      moments: by path, `[G, I, I]`: the second moments of what each group of output channels multiplies.
      importances: by path, `[O, I]`: the Fisher diagonal.
    """

    kernels: Kernels
    moments: dict[str, np.ndarray]
    importances: Kernels


class Peer(NamedTuple):
    """Another tool.

    Attributes:
      make: of a task and bits, the kernels that the tool's compressed ones decode to.
      side: of the number of output channels and bits, how many levels and scales are stored for a kernel.
    """

    make: Callable[[Task, int], Kernels]
    side: Callable[[int, int], int]


def group_size(outputs: int, bits: int) -> int:
    """The fewest output channels, 2^bits or more, that can share a table: the tools want groups of one size.

    >>> group_size(64, 4), group_size(1000, 4), group_size(10, 4)
    (16, 20, 10)
    """
    return next(n for n in range(min(2**bits, outputs), outputs + 1) if outputs % n == 0)


def checked(kernels: Kernels, found: Kernels, bits: int) -> Kernels:
    """The kernels that a peer found.

    Raises:
      ValueError: one is missing, is not finite, or is not compressed: a channel has more than 2^bits values.
    """
    for name, kernel in kernels.items():
        if name not in found or found[name].shape != kernel.shape or not np.isfinite(found[name]).all():
            raise ValueError(f"{name} is missing or not finite")
        if (most := max(len(np.unique(channel)) for channel in found[name])) > 2**bits:
            raise ValueError(f"{name} is left with {most} values in a channel")
    return found


def stored_bytes(kernels: Kernels, bits: int, side: Callable[[int, int], int]) -> int:
    """Bytes of indices, and of levels and scales of 16 bits.

    >>> stored_bytes({"w": np.zeros((4, 3))}, 2, lambda outputs, bits: outputs + 2**bits)
    19
    """
    return sum(-(-each.size * bits // 8) + 2 * side(len(each), bits) for each in kernels.values())


def _coremltools(grouped: bool) -> Callable[[Task, int], Kernels]:
    def make(task: Task, bits: int) -> Kernels:
        ct = import_module("coremltools")
        optimize, builder = ct.optimize.coreml, import_module("coremltools.converters.mil").Builder
        target, names = ct.target.iOS18, {f"w{n:04}": name for n, name in enumerate(task.kernels)}

        @builder.program(input_specs=[builder.TensorSpec(shape=(1, 1))], opset_version=target)
        def program(x: Any) -> Any:
            return tuple(
                builder.add(x=builder.const(val=task.kernels[name], name=short), y=x, name=f"{short}_sum")
                for short, name in names.items()
            )

        def config(outputs: int) -> Any:
            layout = {"granularity": "per_grouped_channel", "group_size": group_size(outputs, bits)} if grouped else {}
            return optimize.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=0, **layout)

        def weights(model: Any) -> dict[str, np.ndarray]:
            return {name: each.val for name, each in optimize.get_weights_metadata(model, weight_threshold=0).items()}

        model = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True)
        configs = {name: config(len(value)) for name, value in weights(model).items()}
        small = optimize.palettize_weights(model, optimize.OptimizationConfig(op_name_configs=configs))
        found = weights(optimize.decompress_weights(small))
        return {names[short[:5]]: np.asarray(value, np.float32) for short, value in found.items()}

    return make


def _coreai(grouped: bool = False, scaled: bool = False, fisher: bool = False) -> Callable[[Task, int], Kernels]:
    def make(task: Task, bits: int) -> Kernels:
        torch, tool = import_module("torch"), import_module("coreai_opt.palettization")
        spec, common = import_module("coreai_opt.palettization.spec"), import_module("coreai_opt.common")
        names = {f"w{n:04}": name for n, name in enumerate(task.kernels)}

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for short, name in names.items():
                    outputs, inputs = task.kernels[name].shape
                    layer = torch.nn.Linear(inputs, outputs, bias=False)
                    layer.weight.data = torch.from_numpy(task.kernels[name].copy())
                    setattr(self, short, layer)

            def forward(self, *xs: Any) -> Any:
                return tuple(getattr(self, short)(x) for short, x in zip(names, xs, strict=True))

        def config(outputs: int) -> Any:
            shared = spec.PerTensorGranularity()
            if grouped:
                shared = spec.PerGroupedChannelGranularity(axis=0, group_size=group_size(outputs, bits))
            how = spec.PalettizationSpec(n_bits=bits, granularity=shared, enable_per_channel_scale=scaled)
            return tool.ModuleKMeansPalettizerConfig(op_state_spec={"weight": how}, enable_fast_kmeans_mode=False)

        configs = {short: config(len(task.kernels[name])) for short, name in names.items()}
        palettizer = tool.KMeansPalettizer(
            Model(), tool.KMeansPalettizerConfig(global_config=None, module_name_configs=configs)
        )
        inputs = tuple(torch.zeros(1, kernel.shape[1]) for kernel in task.kernels.values())
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/importances.pt" if fisher else None
            if path is not None:
                given = {
                    f"{short}.parametrizations.weight.original": torch.from_numpy(task.importances[name].copy())
                    for short, name in names.items()
                }
                torch.save(given, path)
            palettizer.prepare(inputs, sensitivity_path=path)
        found = palettizer.finalize(backend=common.ExportBackend.Torch)
        return {name: getattr(found, short).weight.detach().numpy() for short, name in names.items()}

    return make


def _qwix(task: Task, bits: int) -> Kernels:
    core, qarray = import_module("qwix.contrib.gptq_core"), import_module("qwix._src.core.qarray")
    if bits not in (2, 4, 8):
        raise NotImplementedError(f"its GPTQ takes types that JAX has, and JAX has none of {bits} bits")
    how = qarray.HowToQuantize(qtype=f"int{bits}", channelwise_axes=(0,), tiled_axes={}, calibration_method="absmax")

    most = max(len(kernel) // len(task.moments[name]) for name, kernel in task.kernels.items())

    def quantized(rows: np.ndarray, second: np.ndarray) -> np.ndarray:
        padded = np.resize(rows, (most, rows.shape[1]))  # each number of rows takes a minute of compilations
        made, _ = core.quantize_weight(jnp.asarray(padded), jnp.asarray(second, jnp.float32), how)
        return np.asarray(qarray.dequantize(made), np.float32)[: len(rows)]

    def whole(kernel: np.ndarray, moments: np.ndarray) -> np.ndarray:
        parts = kernel.reshape(len(moments), -1, kernel.shape[1])
        return np.concatenate([quantized(*each) for each in zip(parts, moments, strict=True)])

    return {name: whole(kernel, task.moments[name]) for name, kernel in task.kernels.items()}


def _table(outputs: int, bits: int) -> int:
    return 2**bits


def _tables(outputs: int, bits: int) -> int:
    return outputs // group_size(outputs, bits) * 2**bits


def _table_and_scales(outputs: int, bits: int) -> int:
    return 2**bits + outputs


PEERS = {
    "coremltools, table per tensor": Peer(_coremltools(grouped=False), _table),
    "coremltools, table per grouped channel": Peer(_coremltools(grouped=True), _tables),
    "coreai-opt, table per tensor": Peer(_coreai(), _table),
    "coreai-opt, table per grouped channel": Peer(_coreai(grouped=True), _tables),
    "coreai-opt, scale per channel": Peer(_coreai(scaled=True), _table_and_scales),
    "coreai-opt, scale per channel, Fisher": Peer(_coreai(scaled=True, fisher=True), _table_and_scales),
    "qwix GPTQ, scale per channel": Peer(_qwix, lambda outputs, bits: outputs),
}


def importances(given: Setting) -> dict[str, Any]:
    """The Fisher diagonal of the network's own first choices of the images that are learned from, without labels."""

    def loss(params: Any, x: Any) -> jax.Array:
        logits = jax.nn.log_softmax(given.fn(params, x).reshape(len(x), -1))
        return -logits.max(axis=-1).mean()

    return nuqjax.fisher(loss, given.params, given.batches, per_example=True)


def channels(leaf: Any) -> np.ndarray:
    """A leaf `[…, O]` as `[O, I]`, float32.

    >>> channels(np.arange(4).reshape(2, 1, 2)).tolist()
    [[0.0, 2.0], [1.0, 3.0]]
    """
    return np.asarray(leaf, np.float32).reshape(-1, leaf.shape[-1]).T.copy()


def with_kernels(params: Mapping[str, Any], found: Kernels) -> dict[str, Any]:
    """The leaves by path, those found put in place of the dense ones."""
    return {
        name: jnp.asarray(found[name].T.reshape(leaf.shape)) if name in found else leaf for name, leaf in params.items()
    }


def as_codebooks(params: Mapping[str, Any], names: Collection[str], bits: int) -> dict[str, Any]:
    """Leaves whose output channels have at most 2^bits values, as they are, for what takes compressed leaves alone.

    Raises:
      ValueError: a leaf would change.
    """
    rules = [nuqjax.Rule(f"^{re.escape(name)}$", bits=bits, granularity="channel", min_size=1) for name in names]
    tree = nuqjax.compress(dict(params), rules=[*rules, nuqjax.Rule("", skip=True)], tolerance=None)
    for name in names:
        if not isinstance(tree[name], nuqjax.CodebookArray) or not np.array_equal(tree[name], params[name]):
            raise ValueError(f"{name} cannot be told by {bits} bits and a codebook for each channel")
    return tree


def run(
    network: Network,
    data: Path,
    bits: Sequence[int],
    *,
    learn: int = 256,
    count: int | None = None,
    peers: Mapping[str, Peer] = PEERS,
    on_cell: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measures every form at every width.

    Args:
      network: which network.
      data: the data folder.
      bits: index widths.
      learn: images that are learned from, at most.
      count: images in all; None takes all.
      peers: the tools, by name.
      on_cell: called with the results so far after each form.

    Returns:
      A JSON-ready dict like that of `studies.calibrated`, its pairs those with `knq` with data alone, and `missing`:
      the peers that did not run, with the reasons.
    """
    given = setting(network, data, learn=learn, count=count)
    params, weights = given.params, sum(x.size for x in given.params.values())
    whole = {name: float(each.mean()) for name, each in given.measure(params).items()}
    results: dict[str, Any] = {
        **given.told,
        **circumstances("jax", "flax", "numpy", *PACKAGES),
        "float": {"bytes": sum(x.nbytes for x in params.values()), **whole},
        "cells": [],
        "pairs": [],
        "missing": [],
    }
    made: list[tuple[Cell, Measures]] = []

    def add(cell: Cell, dense: Any, nbytes: int, seconds: float, predicted: float | None = None) -> None:
        got = given.measure(dense)
        results["cells"].append(
            {
                "method": cell.method, "size": cell.size, "levels": cell.levels, "bytes": nbytes,
                "bits_per_weight": 8 * nbytes / weights, "predicted_kl": predicted,
                **{name: float(each.mean()) for name, each in got.items()}, "seconds": round(seconds, 1),
            }
        )  # fmt: skip
        for other, measures in made if cell.name == "calibrated knq" else ():
            if other.size == cell.size:
                pair = {name: paired(got[name], measures[name]) for name in got}
                results["pairs"].append({"size": cell.size, "one": cell.name, "other": other.name, **pair})
        made.append((cell, got))
        on_cell(results)

    def ours(cell: Cell, way: str, **options: Any) -> Any:
        start = time.perf_counter()
        asked = Cell(way, cell.size, cell.levels)
        tree, predicted = compressed(asked, given.fn, params, given.batches, {"scale": "channel", **options})
        seconds = time.perf_counter() - start
        add(cell, nuqjax.decompress(tree), nuqjax.report(params, tree).total["nbytes_after"], seconds, predicted)
        return tree

    def theirs(name: str, task: Task, width: int) -> None:
        start = time.perf_counter()
        try:
            found = checked(task.kernels, peers[name].make(task, width), width)
        except Exception as error:  # noqa: BLE001 — whatever keeps a peer from running is told
            why = (str(error) or type(error).__name__).splitlines()[0]
            results["missing"].append({"levels": name, "size": str(width), "why": why})
            return
        seconds, dense = time.perf_counter() - start, with_kernels(params, found)
        nbytes = sum(x.nbytes for n, x in params.items() if n not in found)
        nbytes += stored_bytes(task.kernels, width, peers[name].side)
        add(Cell("peer", str(width), name), dense, nbytes, seconds)
        start = time.perf_counter()
        tree = as_codebooks(dense, found, width)
        dense = nuqjax.decompress(nuqjax.calibration.correct_bias(given.fn, params, tree, given.batches))
        add(Cell("peer corrected", str(width), name), dense, nbytes, seconds + time.perf_counter() - start)

    moments = nuqjax.calibration.moments(given.fn, params, given.batches)
    fisher = importances(given)
    for width in bits:
        plain = ours(Cell("plain", str(width)), "plain")
        ours(Cell("corrected", str(width)), "corrected")
        ours(Cell("fisher", str(width)), "plain", sensitivity=fisher)
        names = [name for name, leaf in plain.items() if isinstance(leaf, nuqjax.CodebookArray)]
        task = Task(
            {name: channels(params[name]) for name in names},
            {name: np.asarray(each.second) for name in names if not isinstance(each := moments[name], str)},
            {name: channels(fisher[name]) for name in names},
        )
        for name in peers:
            theirs(name, task, width)
        for levels in ("uniform", "knq"):  # the last of a size is what the others are compared with
            ours(Cell("calibrated", str(width), levels), "calibrated")
    return results


def table(results: dict[str, Any]) -> Table:
    """The results for a terminal."""
    missing = "; ".join(f"{each['levels']} at {each['size']} bits: {each['why']}" for each in results["missing"])
    made = Table(
        title=f"{results['title']}: {results['images']} to evaluate, {results['learned']} others learned from",
        caption=f"did not run: {missing or 'none'}",
    )
    for name in ("form", "bits", "bytes", "bits/w", "top-1 %", "agree %", "KL", "KL of knq with data less this", "s"):
        made.add_column(name, justify="left" if name == "form" else "right")
    for cell in results["cells"]:
        form = f"{cell['method']} {cell['levels']}"
        less = between(results["pairs"], cell["size"], form)
        made.add_row(
            form, cell["size"], f"{cell['bytes']:,}", f"{cell['bits_per_weight']:.3f}", f"{100 * cell['top1']:.1f}",
            f"{100 * cell['agreement']:.1f}", f"{cell['kl']:.4f}",
            "" if less is None else "{:.3f} ({:.3f} to {:.3f})".format(*less), f"{cell['seconds']:.0f}",
        )  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", required=True, choices=networks.NETWORKS)
    parser.add_argument("--data", help="folder with weights/ and images/ (default: $NUQJAX_DATA, else ../shared/data)")
    parser.add_argument("--bits", type=listed, default=["4", "3"], help="index widths (default: 4,3)")
    parser.add_argument("--learn", type=int, default=256, help="images that are learned from (default: 256)")
    parser.add_argument("--images", type=int, help="labelled images in all; half evaluate (default: all)")
    parser.add_argument("--json", type=Path, help="write the results to this file, after every form")
    args = parser.parse_args(argv)
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    keep = keeper(args.json, [f"python -m experiments.studies.peers_with_data {given}"])
    with mistakes(parser):
        results = run(
            networks.get(args.network), images.data_folder(args.data), [int(width) for width in args.bits],
            learn=args.learn, count=args.images, on_cell=keep,
        )  # fmt: skip
        show(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
