"""The demo: a small network on scanned digits at 1 to 4 bits a weight, where the choice of the levels decides.

`python -m experiments.studies.digits` (or `make demo`) trains the network, compresses it with k-means (`knq`), the
means of equal intervals (`enq`) and two kinds of fixed-point words without a codebook (`uniform`, `dfp`), and with
levels fitted to unlabelled images (`data`). It runs every result on the test images, prints a table and draws
`demo/accuracy.png` and `demo/levels.png`.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, PercentFormatter
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nuqjax

METHODS = ("knq", "enq", "uniform", "dfp")
GRIDS = ("uniform", "dfp")  # fixed-point words, without a codebook
WAYS = (*METHODS, "data")  # METHODS see the weights alone
IMAGES = 500  # that `data` sees, of those that the network was trained on, without their labels
SEED = 0

# The first and the last layer hold 3 % of the weights and are the most sensitive: they keep 4 bits in every cell.
ENDS = nuqjax.Rule("Conv_0|Dense_1", bits=4)
WITHIN = 1.0  # points of accuracy that the headline's result may lose

# Okabe and Ito's colours, told apart by colour-blind readers; the markers tell the methods apart in grey.
STYLES = {"knq": ("#0072B2", "o"), "enq": ("#D55E00", "s"), "uniform": ("#009E73", "^"), "dfp": ("#CC79A7", "v")}
STYLES["data"] = ("black", "D")
MEANINGS = {
    "knq": "k-means levels",
    "enq": "means of equal intervals",
    "uniform": "fixed point, the step of least error",
    "dfp": "fixed point, Ristretto's step",
    "data": f"k-means levels, fitted to {IMAGES} unlabelled images",
}


class Digits(NamedTuple):
    """Images `[N, 8, 8, 1]` float32 in [0, 1] and labels `[N]` int32; the test images take no part in training."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def digits() -> Digits:
    """scikit-learn's 1797 scanned digits: 1000 to train on, 797 held out, every class in its share."""
    bundled: Any = load_digits()
    images = (bundled.images[..., None] / 16).astype(np.float32)
    split: Any = train_test_split(
        images, bundled.target.astype(np.int32), train_size=1000, stratify=bundled.target, random_state=SEED
    )
    train_images, test_images, train_labels, test_labels = split
    return Digits(train_images, train_labels, test_images, test_labels)


class Network(nn.Module):
    """Two convolutions and two dense layers: images `[N, 8, 8, 1]` to logits `[N, 10]`."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(32, (3, 3))(images))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(256)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def train(model: nn.Module, data: Digits, progress: Progress, epochs: int = 12, batch: int = 50) -> Any:
    """The model's variables after training with Adam on a cosine schedule; the same on every run."""
    steps = len(data.train_images) // batch
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, epochs * steps))
    variables = jax.jit(model.init)(jax.random.key(SEED), data.train_images[:1])

    def loss(variables, images, labels):
        logits = jnp.asarray(model.apply(variables, images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(variables, state, images, labels):
        gradient = jax.grad(loss)(variables, images, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state

    state = optimizer.init(variables)
    shuffle = np.random.default_rng(SEED)
    for _ in progress.track(range(epochs), description="training"):
        for chosen in shuffle.permutation(len(data.train_images))[: steps * batch].reshape(steps, batch):
            variables, state = step(variables, state, data.train_images[chosen], data.train_labels[chosen])
    return variables


@dataclass(frozen=True)
class Result:
    """One compressed network: how it was made, what it takes in memory (codebooks and all), and what it still knows."""

    method: str
    bits: int
    accuracy: float
    bytes: int
    ratio: float
    sqnr_db: float


def accuracy(logits: jax.Array, labels: np.ndarray) -> float:
    """The share of images whose largest logit is their label's."""
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


def compressed(model: nn.Module, variables: Any, data: Digits, bits: int, way: str) -> Any:
    """The variables compressed in one of `WAYS`."""
    if way == "data":
        batches = [data.train_images[start : start + 50] for start in range(0, IMAGES, 50)]
        return nuqjax.compress(variables, bits=bits, rules=ENDS, fn=model.apply, batches=batches)
    return nuqjax.compress(variables, bits=bits, method=way, rules=ENDS)


def sweep(model: nn.Module, variables: Any, data: Digits, bits: Sequence[int], progress: Progress) -> list[Result]:
    """Compresses the network in every way and runs each result, unchanged model and all, on the test images.

    The model is compiled once, for decompressed weights: `nuqjax.apply` would compile it anew for each way, to the same
    outputs but for the order of sums.
    """
    forward = jax.jit(model.apply)
    results = []
    for b, way in progress.track([(b, way) for b in bits for way in WAYS], description="compressing"):
        cparams = compressed(model, variables, data, b, way)
        total = nuqjax.report(variables, cparams).total
        results.append(
            Result(
                method=way,
                bits=b,
                accuracy=accuracy(forward(nuqjax.decompress(cparams), data.test_images), data.test_labels),
                bytes=total["nbytes_after"],
                ratio=total["ratio"],
                sqnr_db=total["sqnr_db"],
            )
        )
    return results


def table(results: Iterable[Result], baseline: Result) -> Table:
    """A row for each index width, the methods side by side in it; below it one for `knq` with data, in its columns."""
    rows: dict[tuple, dict[str, Result]] = {}
    for result in results:
        rows.setdefault((result.bits, result.bytes, result.ratio), {})[result.method] = result

    out = Table(title="Test accuracy, and SQNR of the weights", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for heading, width in (("bits", 6), ("bytes", 8), ("ratio", 6)):
        out.add_column(heading, justify="right", min_width=width)
    for unit in ("%", "dB"):
        for method in METHODS:
            out.add_column(f"{method}\n{unit}", justify="right", min_width=5)
    for (bits, size, ratio), by_way in rows.items():
        with_data = by_way.get("data")
        shown = [with_data] if with_data else [by_way[method] for method in METHODS]
        gap = [""] * (len(METHODS) - len(shown))
        out.add_row(
            *(f"{bits} data" if with_data else f"{bits}", f"{size:,}", f"{ratio:.1f}×"),
            *(f"{100 * result.accuracy:.1f}" for result in shown),
            *gap,
            *(f"{result.sqnr_db:.1f}" for result in shown),
        )
    out.add_section()
    out.add_row("float", f"{baseline.bytes:,}", "", f"{100 * baseline.accuracy:.1f}")
    return out


def headline(results: Iterable[Result], baseline: Result) -> str:
    """What the figure shows at the fewest bits at which `knq` loses no more than `WITHIN` points, and so does `data`.

    Every number in it is one of the results'; where no result is within, it makes no claim. What data bring is a claim
    only where they take fewer bits for it than the weights alone.
    """
    cells = {(result.bits, result.method): result for result in results}
    good = [result for result in cells.values() if result.accuracy >= baseline.accuracy - WITHIN / 100]
    fewest = {
        way: min(bits) for way in ("knq", "data") if (bits := [result.bits for result in good if result.method == way])
    }
    lines = []
    if "knq" in fewest:
        best = cells[fewest["knq"], "knq"]
        grids = sorted(cells[best.bits, method].accuracy for method in GRIDS)
        low, high = (f"{100 * accuracy:.1f}" for accuracy in (grids[0], grids[-1]))
        lines.append(
            f"{_bits_a_weight(best)}: k-means levels keep {best.accuracy:.1%}, fixed-point words "
            f"{low if low == high else f'{low} to {high}'}% (float32: {baseline.accuracy:.1%})"
        )
    if fewest.get("data", math.inf) < fewest.get("knq", math.inf):
        best = cells[fewest["data"], "data"]
        lines.append(
            f"{_bits_a_weight(best)}: {best.accuracy:.1%} with {IMAGES} unlabelled images, "
            f"{cells[best.bits, 'knq'].accuracy:.1%} by the weights alone"
        )
    return "\n".join(lines) or "Digits: test accuracy against the memory of the weights"


def _bits_a_weight(result: Result) -> str:
    return f"{result.bits} bit{'s' * (result.bits > 1)} a weight, {result.ratio:.0f} times smaller"


def plot_accuracy(results: Sequence[Result], baseline: Result, images: int, path: Path) -> None:
    """Accuracy against bytes: a line for each method, the bits along the top."""
    figure, axes = plt.subplots(figsize=(9.5, 5.4), layout="constrained")
    figure.suptitle(headline(results, baseline), fontsize=11.5)
    # One standard error of an accuracy measured on so many images: lines that close cannot be told apart.
    noise = math.sqrt(baseline.accuracy * (1 - baseline.accuracy) / images)
    axes.axhspan(baseline.accuracy - noise, baseline.accuracy + noise, color="0.93", zorder=0)
    axes.axhline(baseline.accuracy, color="black", linestyle="--", linewidth=1)
    axes.plot(baseline.bytes, baseline.accuracy, "*", color="black", markersize=13, label="float32", linestyle="--")
    for method in WAYS:
        points = [result for result in results if result.method == method]
        sizes, accuracies = [point.bytes for point in points], [point.accuracy for point in points]
        color, marker = STYLES[method]
        axes.plot(sizes, accuracies, color=color, marker=marker, label=f"{method}: {MEANINGS[method]}", alpha=0.85)
    widths = {(result.bytes, result.bits) for result in results if result.method in METHODS}
    for size, bits in [*sorted(widths), (baseline.bytes, 32)]:
        axes.axvline(size, color="0.92", zorder=0)
        axes.text(size, 1.01, f"{bits}", transform=axes.get_xaxis_transform(), ha="center", color="0.4")
    axes.set_title("bits of each index (first and last layer: 4)", fontsize=10, pad=18, color="0.3")
    axes.grid(axis="y", color="0.92")
    # Errors of 40 % and of 1 % are both to be read off: the axis is logarithmic in the error.
    most = 1 - (1 - max(baseline.accuracy, *(result.accuracy for result in results))) / 2
    axes.set_yscale("function", functions=(lambda a: -np.log(np.maximum(1 - a, 1e-9)), lambda y: 1 - np.exp(-y)))
    axes.set_ylim(0, min(most, 0.9999))
    axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("test images classified right (grey: ± 1 standard error)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1024:.0f} KiB"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("memory of the weights: indices, codebooks, scales and dense biases")
    axes.legend(loc="lower right", framealpha=1, edgecolor="white")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_levels(kernel: jax.Array, bits: int, path: Path) -> None:
    """The histogram of one kernel's weights under the levels of each method."""
    figure, panels = plt.subplots(len(METHODS), 1, figsize=(9, 8), sharex=True, sharey=True, layout="constrained")
    figure.suptitle(
        f"The {kernel.size:,} weights of the second convolution (grey) and the {2**bits} levels of {bits} bits (lines)",
        fontsize=12,
    )
    for panel, method in zip(panels, METHODS, strict=True):
        cparams = nuqjax.compress({"kernel": kernel}, bits=bits, method=method, granularity="tensor")
        levels = nuqjax.codebooks(cparams)["kernel"]
        sqnr = nuqjax.report({"kernel": kernel}, cparams).total["sqnr_db"]
        panel.hist(np.ravel(kernel), bins=200, color="0.75")
        panel.vlines(
            np.ravel(levels), 0, 1, transform=panel.get_xaxis_transform(), color=STYLES[method][0], linewidth=2
        )
        panel.set_title(f"{method}: {MEANINGS[method]}, {sqnr:.1f} dB of signal to noise", loc="left", fontsize=11)
        panel.set_ylabel("weights")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("value of the weight")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(bits: Sequence[int] = range(1, 5), epochs: int = 12, folder: Path = Path("demo")) -> list[Result]:
    """Trains, compresses, tests, tells: see the module. Returns the float network's result, then the others."""
    console = Console()
    data, model = digits(), Network()
    columns = (TextColumn("{task.description:>11}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        variables = train(model, data, progress, epochs)
        results = sweep(model, variables, data, bits, progress)
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables))
    right = accuracy(jax.jit(model.apply)(variables, data.test_images), data.test_labels)
    baseline = Result("float", 32, right, 4 * weights, 1.0, np.inf)

    console.print(table(results, baseline))
    images = len(data.test_labels)
    console.print(
        f"One codebook per tensor; {images} held-out images, of which one is {100 / images:.2f} %. Bytes count "
        "indices, codebooks, scales and the biases, which stay dense. A fixed-point word of 1 bit is 0 or −1 times a "
        f"step. With data, levels are fitted to what layers put out on {IMAGES} training images, without labels."
    )
    console.print(headline(results, baseline))
    folder.mkdir(parents=True, exist_ok=True)
    plot_accuracy(results, baseline, images, folder / "accuracy.png")
    plot_levels(variables["params"]["Conv_1"]["kernel"], 2, folder / "levels.png")
    console.print(f"Pictures: {folder / 'accuracy.png'}, {folder / 'levels.png'}")
    return [baseline, *results]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the pictures go")
    main(folder=parser.parse_args().folder)
