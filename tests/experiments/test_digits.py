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
from experiments import digits

BITS = (2, 5, 8)


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
    ways = [(result.granularity, result.bits, result.method) for result in results[1:]]
    assert len(ways) == len(set(ways)) == len(digits.GRANULARITIES) * len(BITS) * len(digits.METHODS)


def test_more_bits_take_more_bytes_and_keep_more_of_the_weights(demo):
    results, _, _ = demo
    for granularity in digits.GRANULARITIES:
        for method in digits.METHODS:
            rows = [r for r in results if (r.granularity, r.method) == (granularity, method)]
            for fewer, more in pairwise(rows):
                assert fewer.bytes < more.bytes < results[0].bytes
                assert fewer.sqnr_db < more.sqnr_db
                assert fewer.ratio > more.ratio


def test_knq_has_the_least_squared_error(demo):
    """The optimum of each leaf, so of their sum. SQNR is of one network, so the leaves must be the same ones."""
    results, _, _ = demo
    best = {(r.granularity, r.bits): r for r in results if r.method == "knq"}
    for result in results[1:]:
        assert best[result.granularity, result.bits].kernels == result.kernels
        assert best[result.granularity, result.bits].sqnr_db >= result.sqnr_db - 1e-3


def test_eight_bits_keep_the_accuracy(demo):
    """To within the standard error of an accuracy measured on 797 images."""
    results, _, _ = demo
    right = results[0].accuracy
    for result in results[1:]:
        if result.bits == 8:
            assert abs(result.accuracy - right) <= math.sqrt(right * (1 - right) / 797)


def test_the_sweep_measures_the_compressed_network():
    """Bytes and accuracy again by another way: the arrays' own bytes, the model on the packed tree."""
    data, model = digits.digits(), digits.Network()
    with Progress(disable=True) as progress:
        variables = digits.train(model, data, progress, epochs=1)
        results = digits.sweep(model, variables, data, (3,), progress)
    assert len(results) == len(digits.GRANULARITIES) * len(digits.METHODS)
    for result in results:
        cparams = nuqjax.compress(variables, bits=3, method=result.method, granularity=result.granularity)
        assert result.bytes == sum(array.nbytes for array in jax.tree.leaves(cparams))
        logits = jax.jit(nuqjax.apply(model.apply))(cparams, data.test_images)
        # Sums of two programs differ in their last bits, which can decide an image whose two best logits are close.
        best_two = np.sort(np.asarray(logits))[:, -2:]
        close = np.sum(best_two[:, 1] - best_two[:, 0] < 1e-4)
        assert abs(result.accuracy - digits.accuracy(logits, data.test_labels)) * len(logits) <= close + 1e-3


def test_the_tables_show_what_was_measured(demo):
    results, printed, _ = demo
    for result in results:
        assert f"{result.bytes:,}" in printed
        assert f"{100 * result.accuracy:.1f}" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("name", ["accuracy.png", "levels.png"])
def test_a_picture_is_drawn(demo, name):
    _, _, folder = demo
    picture = matplotlib.image.imread(folder / name)
    assert min(picture.shape[:2]) > 600
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


def test_smallest_within_takes_the_most_accurate_of_the_smallest():
    def result(accuracy, size):
        return digits.Result("knq", "tensor", 4, accuracy, size, 4.0, 8.0, 20.0, 4)

    baseline, small, better = result(0.98, 1000), result(0.976, 100), result(0.978, 100)
    assert digits.smallest_within([result(0.99, 200), small, better, result(0.97, 50)], 0.5, baseline) == better
    assert digits.smallest_within([result(0.97, 50)], 0.5, baseline) is None
