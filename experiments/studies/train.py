"""Trains LeNet-5 or the MLP on MNIST-like IDX files, and keeps the weights.

    python -m experiments.studies.train --network lenet5 --source idx:FOLDER --out lenet5_fashion_mnist.npz

Adam on a cosine schedule, the same batches in the same order on every run. The test images take no part but are scored
at the end. Fashion-MNIST is the Debian package `dataset-fashion-mnist` (/usr/share/datasets/fashion-mnist).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from rich.console import Console

from experiments import networks
from experiments.data import sources
from experiments.data.images import LabelledImages
from experiments.networks import Network
from experiments.record.terminal import progress_bars


def train(
    network: Network,
    images: LabelledImages,
    *,
    epochs: int,
    batch: int,
    seed: int = 0,
    learning_rate: float = 1e-3,
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> Any:
    """The network's variables after training.

    Args:
      network: which; its parameters are drawn from `seed`.
      images: labelled images of its input's shape.
      epochs: times that every image is seen, less a last part of a batch.
      batch: images a step.
      seed: of the parameters and of the order of the images.
      learning_rate: of Adam, at the start; it falls to 0 along a cosine.
      on_epoch: called after each with the mean loss, in nats.

    Returns:
      The variables: `{"params": …}`.
    """
    steps = len(images.labels) // batch
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, epochs * steps))
    variables = jax.jit(network.module.init)(jax.random.key(seed), jnp.zeros((1, *network.input_shape)))

    def loss(variables, inputs, labels):
        logits = jnp.asarray(network.module.apply(variables, inputs))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(variables, state, inputs, labels):
        value, gradient = jax.value_and_grad(loss)(variables, inputs, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, value

    state, shuffle = optimizer.init(variables), np.random.default_rng(seed)
    for _ in range(epochs):
        losses = []
        for chosen in shuffle.permutation(len(images.labels))[: steps * batch].reshape(steps, batch):
            inputs = network.preprocess(images.pixels[chosen])
            variables, state, value = step(variables, state, inputs, images.labels[chosen])
            losses.append(value)
        on_epoch(float(np.mean(jax.device_get(losses))))
    return variables


def save(variables: Any, path: Path) -> None:
    """Writes `Layer/parameter` arrays as `.npz`, as `experiments.networks.importing` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in flat.items()}
    np.savez(path, **arrays)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.train", description="Trains a small network.")
    parser.add_argument("--network", required=True, choices=networks.TRAINED_IN_PLACE)
    parser.add_argument("--source", required=True, help="idx:FOLDER with the training and the test files")
    parser.add_argument("--out", type=Path, required=True, help="the weights file to write (.npz)")
    parser.add_argument("--epochs", type=int, default=10, help="(default: 10)")
    parser.add_argument("--batch", type=int, default=128, help="images a step (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args(argv)
    network = networks.get(args.network)
    try:
        shown = sources.kept(sources.load(f"{args.source}:train", network))
        held_out = sources.kept(sources.load(args.source, network))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    assert isinstance(shown, LabelledImages)
    assert isinstance(held_out, LabelledImages)
    with progress_bars() as progress:
        bar = progress.add_task("training", total=args.epochs)
        variables = train(
            network,
            shown,
            epochs=args.epochs,
            batch=args.batch,
            seed=args.seed,
            on_epoch=lambda loss: progress.update(bar, advance=1, description=f"loss {loss:.4f}"),
        )
    save(variables, args.out)
    program = jax.jit(network.module.apply)
    right = sum(
        int((np.asarray(program(variables, network.preprocess(pixels))).argmax(axis=1) == labels).sum())
        for pixels, labels in sources.batches(held_out, 500)
    )
    count = len(held_out.labels)
    Console().print(f"{network.title}: {right} of {count} held-out images right ({right / count:.2%}); {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
