"""The experiment with Fisher weights: images kept apart, the diagonal, its weightings, the command line."""

import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nuqjax
from experiments import networks
from experiments.data import images
from experiments.data.images import LabelledImages
from experiments.studies import sensitivity
from experiments.studies.sensitivity import expected_loss, log_loss, split, weighted

SIZE = 32


@pytest.fixture
def network(cifar_folder, random_arrays, monkeypatch):
    """ResNet-20 under random weights, in a data folder with 24 images."""
    network = networks.get("resnet20")
    shapes = jax.eval_shape(network.module.init, jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if name.endswith("['kernel']"):
            return random_arrays.kernel(name, leaf.shape, math.prod(leaf.shape[:-1]))
        return random_arrays.vector(name, leaf.shape[0], centre=1.0)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    monkeypatch.setattr(networks, "load_features", lambda network, data: variables)
    return network


def _run(folder, *arguments):
    file = folder / "results.json"
    command = ["--network", "resnet20", "--data", str(folder), "--batch", "6", "--json", str(file), *arguments]
    assert sensitivity.main(command) == 0
    return json.loads(file.read_text())


def test_weights_of_importance_lessen_the_error_that_they_weight(network, cifar_folder):
    results = _run(cifar_folder, "--calibration", "3", "--bits", "2", "--granularity", "tensor")
    assert (results["calibration_images"], results["images"]) == (3, 12)
    cells = {cell["weighting"]: cell for cell in results["cells"]}
    assert list(cells) == ["none", "fisher", "damped:1", "power:0.5"]
    # Each is the optimum of its own weighted error, so none is better than another in that other's measure.
    assert cells["fisher"]["expected_loss"] == min(cell["expected_loss"] for cell in cells.values())
    assert cells["none"]["sqnr_db"] == max(cell["sqnr_db"] for cell in cells.values())
    assert all(cell["bytes"] == cells["none"]["bytes"] for cell in cells.values())
    assert results["float"]["agreement"] == 1


def test_the_diagonal_is_the_mean_of_the_squared_gradients(network, cifar_folder):
    labelled = images.load_images(network, cifar_folder, 2)
    variables = networks.load_features(network, cifar_folder)
    got = sensitivity.diagonal(network, variables, labelled)

    def loss(kernel, image, label):
        params = {**variables["params"], "Dense_0": {**variables["params"]["Dense_0"], "kernel": kernel}}
        logits = network.module.apply(variables | {"params": params}, network.preprocess(image[None]))
        return -jax.nn.log_softmax(logits)[0, label]

    kernel = variables["params"]["Dense_0"]["kernel"]
    gradients = [jax.grad(loss)(kernel, *example) for example in zip(*labelled, strict=True)]
    expected = np.mean(np.square(gradients), axis=0)
    np.testing.assert_allclose(got["Dense_0"]["kernel"], expected, rtol=1e-3, atol=1e-6 * expected.max())


@given(st.integers(2, 60), st.data())
def test_images_for_calibration_are_never_scored(count, data):
    labelled = LabelledImages(np.zeros((count, 1, 1, 3), np.uint8), np.arange(count))
    calibration = data.draw(st.integers(1, count // 2))
    shown, held_out = split(labelled, calibration)
    assert len(set(shown.labels)) == calibration == len(shown.pixels)
    assert len(held_out.labels) == -(-count // 2)
    assert not set(shown.labels) & set(held_out.labels)


def test_the_loss_is_that_of_jax():
    random = np.random.default_rng(0)
    logits, labels = random.normal(0, 30, (20, 7)).astype(np.float32), random.integers(0, 7, 20)
    expected = -np.asarray(jax.nn.log_softmax(logits))[np.arange(20), labels].mean()
    assert log_loss(logits, labels) == pytest.approx(float(expected), rel=1e-6)


def test_the_expected_loss_is_half_the_weighted_squared_error():
    params = {"w": np.arange(512, dtype=np.float32).reshape(16, 32), "b": np.ones(3, np.float32)}
    fisher = {"w": np.full((16, 32), 0.5, np.float32), "b": np.ones(3, np.float32)}
    cparams = nuqjax.compress(params, bits=2)
    lost = nuqjax.decompress(cparams)["w"] - params["w"]
    assert expected_loss(fisher, params, cparams) == pytest.approx(0.25 * float((lost**2).sum()), rel=1e-5)


@pytest.mark.parametrize("weighting", ["none:1", "damped", "power:x", "power:-1", "hessian", "power:nan"])
def test_unknown_weightings_are_an_error(weighting):
    with pytest.raises(ValueError, match=r"unknown weighting .*known are none, fisher, damped:X and power:X"):
        weighted({}, weighting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration", "13"], "13 images for calibration wanted, but half of 24 is 12"),
        (["--weighting", "none,all"], "unknown weighting 'all'"),
        (["--network", "vgg16"], "vgg16: its dense layers are not trained"),
    ],
)
def test_bad_arguments_end_with_status_2_and_say_why(arguments, message, network, cifar_folder, capsys):
    with pytest.raises(SystemExit) as error:
        _run(cifar_folder, *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
