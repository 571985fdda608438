"""What some hundred inputs bring to a transformer: a language model of characters, and a classifier of image patches.

    python -m experiments.studies.transformer --model characters --bits 4,3,2
    python -m experiments.studies.transformer --model vit --bits 4,3,2
    python -m experiments.studies.transformer --model vit --source idx:FOLDER --bits 4,3,2
    python -m experiments.studies.transformer --model stack --layers 24

The first two are trained where no weights are in `--weights`: some minutes on two cores, the same batches in the same
order on every run. The text is that of Python's own help (`pydoc_data.topics`; other releases of Python have other
words); one topic of ten evaluates. The images are the digits of scikit-learn, or those of `--source`.
The third has random weights: it tells how long compression takes.
"""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nuqjax
from experiments import networks
from experiments.data import sources
from experiments.data.images import LabelledImages
from experiments.networks.transformer import Blocks, CharacterModel, VisionTransformer
from experiments.record.results import circumstances, keeper
from experiments.record.terminal import progress_bars
from experiments.studies.calibrated import (
    Cell,
    Measures,
    add_cells,
    compare,
    divergences,
    kept_leaves,
    listed_cells,
    table,
)
from experiments.studies.train import save

_LENGTH = 128  # characters of a sequence


class Text(NamedTuple):
    """Text as numbers of characters: `alphabet` of them, `shown` to train on, `held_out` to evaluate on."""

    alphabet: int
    shown: np.ndarray
    held_out: np.ndarray


def text() -> Text:
    """The topics of Python's help; every tenth is held out."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    characters = sorted(set("".join(topics.values())))
    number = {character: n for n, character in enumerate(characters)}

    def numbers(some: Sequence[str]) -> np.ndarray:
        return np.array([number[c] for name in some for c in topics[name]], np.int32)

    return Text(len(characters), numbers([n for i, n in enumerate(names) if i % 10]), numbers(names[::10]))


def sequences(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`[count, _LENGTH + 1]` stretches of a text, from places drawn at random."""
    starts = np.random.default_rng(seed).integers(0, len(numbers) - _LENGTH, count)
    return numbers[starts[:, None] + np.arange(_LENGTH + 1)]


class Recipe(NamedTuple):
    """How a model is trained: its batches of inputs and labels by number, and how many of them."""

    module: nn.Module
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]]
    steps: int
    rate: float


def of_characters(characters: Text) -> Recipe:
    """The language model: 16 sequences a step."""

    def batch(number: int) -> tuple[np.ndarray, np.ndarray]:
        found = sequences(characters.shown, 16, number)
        return found[:, :-1], found[:, 1:]

    return Recipe(CharacterModel(characters.alphabet), batch, steps=500, rate=3e-3)


def of_images(images: LabelledImages) -> Recipe:
    """The classifier of images, each of which has 4 × 4 patches: 128 images a step."""

    def batch(number: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.random.default_rng(number).integers(0, len(images.labels), 128)
        return as_inputs(images.pixels[chosen]), images.labels[chosen]

    return Recipe(VisionTransformer(patch=images.pixels.shape[1] // 4), batch, steps=500, rate=2e-3)


def as_inputs(pixels: np.ndarray) -> np.ndarray:
    """Grey pixels as numbers from -0.5 to 0.5."""
    return pixels.astype(np.float32) / 255 - np.float32(0.5)


def trained(recipe: Recipe, path: Path, on_step: Callable[[int, float], None] = lambda step, loss: None) -> Any:
    """The variables in the file, or those of training, which the file then holds.

    Training is by AdamW with a rate that rises for a twentieth of the steps and falls along a cosine.
    """
    if path.exists():
        with np.load(path) as arrays:
            return {"params": traverse_util.unflatten_dict({name: arrays[name] for name in arrays.files}, sep="/")}
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.rate, recipe.steps // 20, recipe.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def loss(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = jnp.asarray(recipe.module.apply(variables, x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(variables: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(variables, x, y)
        updates, state = optimizer.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state, value

    variables = jax.jit(recipe.module.init)(jax.random.key(0), recipe.batch(0)[0])
    state = optimizer.init(variables)
    for number in range(recipe.steps):
        variables, state, value = step(variables, state, *recipe.batch(number))
        on_step(number, float(value))
    save(variables, path)
    return variables


class Subject(NamedTuple):
    """A trained model, what is learned from, and what evaluates it: inputs `[N, …]` and labels `[N]` or `[N, T]`."""

    name: str
    title: str
    module: nn.Module
    variables: Any
    learned: np.ndarray
    inputs: np.ndarray
    labels: np.ndarray


_LEARNED, _EVALUATED, _BATCH = 192, 128, 16  # sequences; of images, 256 and 1,000


def characters(weights: Path, on_step: Callable[[int, float], None]) -> Subject:
    """The language model; what it learns from is of the text that it was trained on."""
    words = text()
    recipe = of_characters(words)
    variables = trained(recipe, weights / "transformer_characters.npz", on_step)
    held_out = sequences(words.held_out, _EVALUATED, 1)
    learned = sequences(words.shown, _LEARNED, recipe.steps)[:, :-1]
    title = "Language model of characters"
    return Subject("characters", title, recipe.module, variables, learned, held_out[:, :-1], held_out[:, 1:])


def digits() -> tuple[LabelledImages, LabelledImages]:
    """scikit-learn's scanned digits, 8 × 8 pixels: 1,297 to train on, 500 to evaluate on."""
    found: Any = load_digits()
    pixels = np.round(found.images[..., None] * (255 / 16)).astype(np.uint8)
    parts: Any = train_test_split(pixels, found.target.astype(np.int32), test_size=500, random_state=0)
    return LabelledImages(parts[0], parts[2]), LabelledImages(parts[1], parts[3])


def vit(weights: Path, source: str | None, on_step: Callable[[int, float], None]) -> Subject:
    """The classifier of images; what it learns from is of those that it was trained on."""
    if source is None:
        (shown, held_out), name, what = digits(), "vit_digits", "digits"
    else:
        one, other = (sources.kept(sources.load(part, networks.get("lenet5"))) for part in (f"{source}:train", source))
        assert isinstance(one, LabelledImages)
        assert isinstance(other, LabelledImages)
        shown, held_out, name, what = one, other, "vit", "images"
    recipe = of_images(shown)
    variables = trained(recipe, weights / f"transformer_{name}.npz", on_step)
    learned, inputs = as_inputs(shown.pixels[:256]), as_inputs(held_out.pixels[:1000])
    return Subject(
        name, f"Vision transformer of {what}", recipe.module, variables, learned, inputs, held_out.labels[:1000]
    )


def run(
    subject: Subject, cells: Sequence[Cell], on_cell: Callable[[dict[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """Scores cells by "nats" a character or "top1" of an image, "agreement" and "kl"; a sequence counts as one."""
    params, whole = kept_leaves(subject.module.apply, subject.variables, subject.inputs[:1])

    def fn(params: Any, x: Any) -> Any:
        return subject.module.apply(whole(params), x)

    program = jax.jit(fn)

    def outputs(params: Any) -> np.ndarray:
        starts = range(0, len(subject.inputs), _BATCH)
        return np.concatenate([np.asarray(program(params, subject.inputs[n : n + _BATCH])) for n in starts])

    reference = outputs(params)

    def measure(params: Any) -> Measures:
        got = outputs(params)
        best = got.argmax(axis=-1)
        each = {"agreement": best == reference.argmax(axis=-1), "kl": divergences(reference, got)}
        if subject.labels.ndim == 1:
            return {"top1": best == subject.labels, **each}
        nats = optax.softmax_cross_entropy_with_integer_labels(got, subject.labels)
        return {name: np.mean(x, axis=-1) for name, x in {"nats": nats, **each}.items()}

    told = {
        "network": subject.name,
        "title": subject.title,
        "learned": len(subject.learned),
        "images": len(subject.labels),
        **circumstances("jax", "flax", "numpy", "optax"),
    }
    batches = [subject.learned[n : n + _BATCH] for n in range(0, len(subject.learned), _BATCH)]
    return told | compare(
        fn, params, batches, cells, measure, on_cell=lambda results: on_cell(told | results), scale="channel",
        rules=_rules(params),
    )  # fmt: skip


def _rules(params: Mapping[str, Any]) -> list[nuqjax.Rule]:
    """Output axes for all forms alike, as without data nothing shows them: of heads, and of a table that is a head."""
    rules = [("attention/(query|key|value)/kernel", (-2, -1)), ("table/embedding", 0)]
    return [nuqjax.Rule(x, axis=axis) for x, axis in rules if any(re.search(x, name) for name in params)]


def stack(layers: int, of: int, width: int = 1024, count: int = 32) -> dict[str, Any]:
    """Seconds that `layers` blocks of random weights take at 4 bits with data, and `of` blocks by proportion.

    Args:
      layers: blocks that are compressed.
      of: blocks of the whole stack.
      width: of the blocks.
      count: sequences of 64 places that are learned from.
    """
    rng = np.random.default_rng(0)
    module = Blocks(layers, heads=width // 64)
    x = rng.normal(size=(count, 64, width)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x[:1])
    params = jax.tree.map(lambda s: (rng.normal(size=s.shape) / width**0.5).astype(np.float32), shapes)
    rules = [nuqjax.Rule("attention/(query|key|value)/kernel", axis=(-2, -1))]
    weights = sum(x.size for x in jax.tree.leaves(params))
    told: dict[str, Any] = {"layers": layers, "of": of, "weights": weights, **circumstances("jax", "flax", "numpy")}
    for name, batches in (("by float inputs", [x]), ("both ways", [x[: 3 * count // 4], x[3 * count // 4 :]])):
        start, cpu = time.perf_counter(), time.process_time()
        nuqjax.compress(params, bits=4, fn=module.apply, batches=batches, rules=rules, codebook_format=jnp.float16)
        seconds, busy = time.perf_counter() - start, time.process_time() - cpu
        told[name] = {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(busy, 1),
            "whole": round(seconds * of / layers),
        }
    return told


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, choices=["characters", "vit", "stack"])
    parser.add_argument("--source", help="images for --model vit, such as idx:FOLDER (default: scikit-learn's digits)")
    parser.add_argument(
        "--weights", type=Path, default=Path("build"), help="folder of trained weights (default: build)"
    )
    add_cells(parser, ["4", "3", "2"])
    parser.add_argument("--layers", type=int, default=24, help="blocks of the stack (default: 24)")
    parser.add_argument("--of", type=int, help="blocks of the stack that the time is told for (default: --layers)")
    parser.add_argument("--json", type=Path, help="write the results to this file, after every cell")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    keep = keeper(args.json, [f"python -m experiments.studies.transformer {given}"])
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.model == "stack":
        told = stack(args.layers, args.of or args.layers)
        keep(told)
        console.print(told)
        return 0
    with progress_bars() as progress:
        bar = progress.add_task("training", total=None)

        def on_step(step: int, loss: float) -> None:
            progress.update(bar, completed=step, description=f"training, loss {loss:.3f}")

        try:
            cells = listed_cells(args.bits, args.budget, args.levels, args.ways)
            subject = (
                characters(args.weights, on_step)
                if args.model == "characters"
                else vit(args.weights, args.source, on_step)
            )
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
    results = run(subject, cells, on_cell=keep)
    console.print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
