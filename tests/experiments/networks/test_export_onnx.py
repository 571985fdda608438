"""A ResNet as an ONNX file."""

import jax
import numpy as np

import nuqjax
from experiments import networks
from experiments.data import images
from tests import draws
from tests.export.test_onnx_file import assert_same_up_to_order, onnx, onnxruntime, outputs  # noqa: F401


def test_a_resnet(onnx, onnxruntime, tmp_path):  # noqa: F811
    """With its trained weights where they are, else with random ones."""
    network = networks.get("resnet20")
    model = network.trained.apply
    try:
        folder = images.data_folder()
    except FileNotFoundError:
        x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
        variables = draws.variables(network.trained.init, x)
    else:
        x = network.preprocess(images.load_images(network, folder, 4).pixels)
        variables = networks.load_features(network, folder)
    cparams = nuqjax.compress(variables, bits=4)
    nuqjax.export_onnx(model, cparams, x, tmp_path / "model.onnx")
    [found] = outputs(onnxruntime, tmp_path / "model.onnx", x)
    expected = np.asarray(jax.jit(nuqjax.apply(model))(cparams, x))
    assert_same_up_to_order(found, expected, 20, 576)
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
    size = nuqjax.report(variables, cparams).total["nbytes_after"]
    print(f"model.onnx: {(tmp_path / 'model.onnx').stat().st_size:,} bytes; {size:,} in memory; "
          f"largest difference {np.abs(found - expected).max():.2g} of {np.abs(expected).max():.3g}")  # fmt: skip
    assert (tmp_path / "model.onnx").stat().st_size < 3 * size
