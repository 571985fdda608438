"""Training learns, is the same every time, and leaves a file that gives the same network."""

import jax
import numpy as np
import pytest

from experiments import networks
from experiments.data.images import LabelledImages
from experiments.networks.importing import load_file
from experiments.studies import train
from tests.experiments.data.test_sources import write_idx


def stripes(count, seed):
    """Images with a bright band, whose height is their class: learnt in seconds."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count)
    pixels = random.integers(0, 60, (count, 28, 28, 1), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[2 * label + 3 : 2 * label + 5] += 150
    return LabelledImages(pixels, labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("stripes")
    for prefix, images in (("train", stripes(600, 0)), ("t10k", stripes(200, 1))):
        write_idx(place / f"{prefix}-images-idx3-ubyte.gz", images.pixels[..., 0])
        write_idx(place / f"{prefix}-labels-idx1-ubyte", images.labels.astype(np.uint8))
    return place


def test_the_command_trains_scores_and_saves(folder, capsys):
    out = folder / "weights" / "lenet5.npz"
    options = ["--network", "lenet5", "--source", f"idx:{folder}", "--epochs", "12", "--batch", "60"]
    assert train.main([*options, "--out", str(out)]) == 0
    network, variables = load_file(networks.get("lenet5"), out)
    held_out = stripes(200, 1)
    logits = np.asarray(jax.jit(network.module.apply)(variables, network.preprocess(held_out.pixels)))
    right = int((logits.argmax(axis=1) == held_out.labels).sum())
    assert right > 180
    assert f"LeNet-5: {right} of 200 held-out images right" in capsys.readouterr().out
    again = folder / "weights" / "again.npz"
    assert train.main([*options, "--out", str(again)]) == 0
    for name, array in np.load(out).items():
        np.testing.assert_array_equal(np.load(again)[name], array)


def test_the_loss_falls():
    losses = []
    train.train(networks.get("mlp"), stripes(300, 2), epochs=3, batch=50, on_epoch=losses.append)
    assert losses[2] < losses[1] < losses[0]


def test_images_of_another_shape_are_an_error(tmp_path, capsys):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", np.zeros((2, 8, 8), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.zeros(2, np.uint8))
    with pytest.raises(SystemExit):
        train.main(["--network", "mlp", "--source", f"idx:{tmp_path}", "--out", str(tmp_path / "mlp.npz")])
    assert "takes (28, 28, 1)" in capsys.readouterr().err
