"""The demo: its data, its network, its numbers and its pictures."""

import contextlib
import io
import math
from itertools import pairwise

import jax
import matplotlib.image
import numpy as np
import pytest
from rich.progress import Progress
from sklearn.datasets import load_digits

import nuqjax
from experiments.studies import digits

BITS = (2, 4)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run of the demo at fewer widths: the results, what it printed and the folder of pictures."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = digits.main(bits=BITS, folder=folder)
    return results, printed.getvalue(), folder


def test_the_split_holds_every_image_once_and_every_class_in_its_share():
    data = digits.digits()
    images = np.concatenate([data.train_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.test_labels])
    bundled = load_digits()

    def ordered(images, labels):
        return sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))

    assert ordered((images * 16).astype(np.uint8), labels) == ordered(bundled.data.astype(np.uint8), bundled.target)
    shares = np.bincount(data.train_labels) / np.bincount(labels)
    assert np.all(abs(np.bincount(labels) * (shares - 1000 / 1797)) < 1)


def test_the_float_network_is_a_good_one(demo):
    results, _, _ = demo
    assert results[0].method == "float"
    assert results[0].accuracy >= 0.97


def test_every_way_is_measured_once(demo):
    results, _, _ = demo
    ways = [(result.bits, result.method) for result in results[1:]]
    assert len(ways) == len(set(ways)) == len(BITS) * len(digits.WAYS)


def test_more_bits_take_more_bytes_and_keep_more_of_the_weights(demo):
    results, _, _ = demo
    for method in digits.WAYS:
        for fewer, more in pairwise(result for result in results if result.method == method):
            assert fewer.bytes < more.bytes < results[0].bytes
            assert fewer.sqnr_db < more.sqnr_db
            assert fewer.ratio > more.ratio


def test_knq_has_the_least_squared_error(demo):
    """The optimum of each leaf, so of their sum."""
    results, _, _ = demo
    best = {result.bits: result for result in results if result.method == "knq"}
    for result in results[1:]:
        assert best[result.bits].sqnr_db >= result.sqnr_db - 1e-3


def test_four_bits_keep_the_accuracy_with_a_codebook(demo):
    """To within the standard error of an accuracy measured on 797 images."""
    results, _, _ = demo
    right = results[0].accuracy
    for result in results[1:]:
        if result.bits == 4 and result.method not in digits.GRIDS:
            assert result.accuracy >= right - math.sqrt(right * (1 - right) / 797)


def test_few_bits_need_a_codebook(demo):
    """What the demo is there to show: at 2 bits fixed point loses more than twice what k-means does, and data nothing.

    To within the standard error of an accuracy measured on 797 images.
    """
    results, _, _ = demo
    lost = {result.method: results[0].accuracy - result.accuracy for result in results[1:] if result.bits == 2}
    assert lost["knq"] <= 0.02
    assert all(lost[method] > max(2 * lost["knq"], 0.02) for method in digits.GRIDS)
    assert lost["data"] <= math.sqrt(results[0].accuracy * (1 - results[0].accuracy) / 797)


def test_the_sweep_measures_the_compressed_network():
    """Bytes and accuracy again by another way: the arrays' own bytes, the model on the packed tree."""
    data, model = digits.digits(), digits.Network()
    with Progress(disable=True) as progress:
        variables = digits.train(model, data, progress, epochs=1)
        results = digits.sweep(model, variables, data, (3,), progress)
    assert len(results) == len(digits.WAYS)
    for result in results[::4]:
        cparams = digits.compressed(model, variables, data, 3, result.method)
        assert result.bytes == sum(array.nbytes for array in jax.tree.leaves(cparams))
        logits = jax.jit(nuqjax.apply(model.apply))(cparams, data.test_images)
        # Sums of two programs differ in their last bits, which can decide an image whose two best logits are close.
        best_two = np.sort(np.asarray(logits))[:, -2:]
        close = np.sum(best_two[:, 1] - best_two[:, 0] < 1e-4)
        assert abs(result.accuracy - digits.accuracy(logits, data.test_labels)) * len(logits) <= close + 1e-3


def test_the_table_shows_what_was_measured(demo):
    results, printed, _ = demo
    for result in results:
        assert f"{result.bytes:,}" in printed
        assert f"{100 * result.accuracy:.1f}" in printed
    assert "…" not in printed  # no heading is cut short
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("name", ["accuracy.png", "levels.png"])
def test_a_picture_is_drawn(demo, name):
    _, _, folder = demo
    picture = matplotlib.image.imread(folder / name)
    assert min(picture.shape[:2]) > 600
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


def _cells(**accuracies):
    """Results at 1 and 2 bits."""
    return [
        digits.Result(method, bits, accuracy, 100 * bits, 32 / bits, 20.0)
        for method, pair in accuracies.items()
        for bits, accuracy in zip((1, 2), pair, strict=True)
    ]


FLOAT = digits.Result("float", 32, 0.98, 3200, 1.0, math.inf)


def test_the_headline_is_of_the_fewest_bits_that_keep_the_accuracy():
    results = _cells(knq=(0.9, 0.975), enq=(0.9, 0.99), uniform=(0.1, 0.93), dfp=(0.1, 0.86))
    line = digits.headline(results, FLOAT)
    assert line.startswith(
        "2 bits a weight, 16 times smaller: k-means levels keep 97.5%, fixed-point words 86.0 to 93.0%"
    )
    assert digits.headline(_cells(knq=(0.97, 0.97), uniform=(0.1, 0.2), dfp=(0.1, 0.1)), FLOAT).startswith("1 bit a")


def test_a_headline_without_a_result_within_claims_nothing():
    line = digits.headline(_cells(knq=(0.9, 0.969), uniform=(0.99, 0.99), dfp=(0.99, 0.99), data=(0.9, 0.969)), FLOAT)
    assert not any(character.isdigit() for character in line)


def test_data_are_in_the_headline_where_they_save_bits():
    grids = {"uniform": (0.1, 0.2), "dfp": (0.1, 0.1)}
    first, second = digits.headline(_cells(knq=(0.9, 0.975), data=(0.976, 0.98), **grids), FLOAT).splitlines()
    assert first.startswith("2 bits a weight, 16 times smaller: k-means levels keep 97.5%")
    assert second == ("1 bit a weight, 32 times smaller: 97.6% with 500 unlabelled images, 90.0% by the weights alone")
    assert "unlabelled" not in digits.headline(_cells(knq=(0.9, 0.975), data=(0.969, 0.98), **grids), FLOAT)
    assert digits.headline(_cells(knq=(0.9, 0.9), data=(0.9, 0.98), **grids), FLOAT).startswith("2 bits a weight")
