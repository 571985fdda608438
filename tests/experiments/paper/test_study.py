"""The study's command on a network and images made here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import nuqjax
from experiments import networks
from experiments.networks import ResNet50
from experiments.paper import study
from experiments.paper.scores import unpack
from experiments.record.settings import Setting
from experiments.studies import train
from tests.experiments.conftest import RandomArrays
from tests.experiments.data.test_sources import random_pixels, write_idx
from tests.experiments.networks.test_networks import resnet50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 images, and a LeNet-5 each of whose kernels holds at most 8 distinct values."""
    place = tmp_path_factory.mktemp("paper")
    write_idx(place / "t10k-images-idx3-ubyte", random_pixels(60, 28, 28))
    write_idx(place / "t10k-labels-idx1-ubyte", (np.arange(60) % 10).astype(np.uint8))
    random = np.random.default_rng(5)
    shapes = jax.eval_shape(networks.get("lenet5").module.init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))

    def draw(path, leaf):
        if len(leaf.shape) < 2:
            return random.normal(0, 0.1, leaf.shape).astype(np.float32)
        return random.choice(random.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, 8), leaf.shape).astype(np.float32)

    train.save(jax.tree_util.tree_map_with_path(draw, shapes), place / "lenet5.npz")
    return place


def command(folder, *options, network="lenet5"):
    return [
        "--network", network, "--weights", str(folder / "lenet5.npz"), "--source", f"idx:{folder}", "--batch", "16",
        *options,
    ]  # fmt: skip


def run(folder, file, *options):
    assert study.main(command(folder, "--json", str(file), *options)) == 0
    return json.loads(file.read_text())


def test_what_loses_nothing_costs_nothing_and_less_costs_more(folder, tmp_path, capsys):
    options = ["--method", "knq,dfp", "--bits", "2,3", "--csv", str(tmp_path / "cells.csv")]
    results = run(folder, tmp_path / "r.json", *options, "--plots", str(tmp_path / "plots"))
    cells = {(c["cell"]["method"], c["cell"]["bits"]): c for c in results["cells"]}
    assert list(cells) == [("knq", 2), ("knq", 3), ("dfp", 2), ("dfp", 3)]
    whole = cells["knq", 3]  # 8 distinct values, 8 levels
    assert whole["agreement"] == 1
    assert whole["loss"] == 0
    assert whole["kl"] == 0
    assert whole["layers"] == {}  # without noise there is no finite ratio
    assert unpack(whole["right"]).mean() == results["float"]["top1"]
    assert cells["knq", 2]["kl"] > 0
    assert set(cells["dfp", 3]["layers"]) == {f"params/{name}/kernel".removeprefix("params/") for name in KERNELS}
    printed = capsys.readouterr().out
    assert "least memory within each loss" in printed
    assert (tmp_path / "cells.csv").read_text().count("\n") == 5
    written = {path.name for path in (tmp_path / "plots").iterdir()}
    assert written == {f"lenet5_{name}.{kind}" for name in ("accuracy", "memory", "layers") for kind in ("png", "pdf")}


KERNELS = ("Conv_1", "Dense_0", "Dense_1", "Dense_2")  # the first kernel has too few values
SIZES = {"Conv_1": 5 * 5 * 6 * 16, "Dense_0": 400 * 120, "Dense_1": 120 * 84, "Dense_2": 84 * 10}
CHANNELS = {"Conv_1": 16, "Dense_0": 120, "Dense_1": 84, "Dense_2": 10}
DENSE = 4 * (150 + 6 + 16 + 120 + 84 + 10)  # bytes of the first kernel and the biases


@pytest.mark.parametrize(
    ("options", "tables"),
    [
        (["--method", "knq"], 4 * 8 * 4),  # 8 levels of float32 a layer
        (["--method", "knq", "--codebook-word", "6"], 4 * (8 * 6 // 8 + 1)),  # 6-bit words, and their fraction bits
        (["--method", "knq", "--scale", "channel"], 4 * 8 * 4 + 4 * 230),  # and a float a channel
        (["--method", "uniform"], 4 * 4),  # a float step
        (["--method", "dfp"], 4),  # an exponent
    ],
)
def test_stored_bytes_are_indices_tables_and_what_stays_dense(options, tables, folder, tmp_path):
    [cell] = run(folder, tmp_path / "r.json", *options, "--bits", "3", "--images", "10")["cells"]
    assert cell["stored_bytes"] == sum(-(-count * 3 // 8) for count in SIZES.values()) + tables + DENSE
    assert cell["bytes"] >= cell["stored_bytes"] - 4 * 9  # memory pads rows and words; fraction bits are not in it


def test_a_grid_a_channel_is_a_step_a_channel_for_every_kernel(folder, tmp_path):
    options = ["--method", "uniform_pow2", "--bits", "3", "--granularity", "channel", "--images", "10"]
    default, every = run(folder, tmp_path / "r.json", *options)["cells"]
    sizes, channels = SIZES | {"Conv_0": 150}, CHANNELS | {"Conv_0": 6}
    dense = DENSE - 4 * 150
    assert every["stored_bytes"] == sum(-(-count * 3 // 8) for count in sizes.values()) + sum(channels.values()) + dense
    # By default the first kernel stays dense, and so would any that a codebook a channel made larger.
    assert (
        default["stored_bytes"] == sum(-(-count * 3 // 8) for count in SIZES.values()) + sum(CHANNELS.values()) + DENSE
    )
    assert (default["cell"]["rules"], every["cell"]["rules"]) == ([], [["kernel", "skip=false"]])


def test_a_rerun_measures_what_is_missing_and_only_that(folder, tmp_path):
    file = tmp_path / "r.json"
    first = run(folder, file, "--method", "enq", "--bits", "2", "--images", "10")
    first["cells"][0]["top1"] = 2.0  # a mark: no fraction of images
    file.write_text(json.dumps(first))
    second = run(folder, file, "--method", "enq", "--bits", "1,2", "--images", "10")
    assert [(c["cell"]["bits"], c["top1"] == 2) for c in second["cells"]] == [(2, True), (1, False)]
    (command,) = second["commands"]  # the first measured nothing that this one does not
    assert "--bits 1,2" in command
    assert "lenet5.npz" in command
    assert str(folder / "lenet5.npz") not in command
    before = file.read_bytes()
    run(folder, file, "--method", "enq", "--bits", "1,2", "--images", "10")
    assert json.loads(file.read_bytes())["cells"] == json.loads(before)["cells"]
    assert len(run(folder, file, "--method", "enq", "--bits", "3", "--images", "10")["commands"]) == 2


def test_results_of_something_else_are_not_gone_on_with(folder, tmp_path, capsys):
    file = tmp_path / "r.json"
    results = run(folder, file, "--method", "enq", "--bits", "2", "--images", "30")
    for change, message in (
        ({}, "the results so far are of images 30, not 10: give another file"),
        ({"images": 10, "float": {"right": "x"}}, "of other weights or images"),
        ({"network": "mlp"}, "of network mlp, not lenet5"),
    ):
        file.write_text(json.dumps(results | change))
        with pytest.raises(SystemExit):
            study.main(command(folder, "--json", str(file), "--method", "enq", "--bits", "2", "--images", "10"))
        assert message in capsys.readouterr().err


def test_activation_words_run_on_integers(folder, tmp_path):
    options = ["--method", "knq,dfp", "--bits", "4", "--codebook-word", "8", "--word", "float,4,16", "--images", "20"]
    cells = run(folder, tmp_path / "r.json", *options)["cells"]
    knq = {cell["cell"]["word"]: cell for cell in cells if cell["cell"]["method"] == "knq"}
    assert set(knq) == {None, 4, 16}
    assert knq[4]["kl"] > knq[16]["kl"]
    assert knq[16]["stored_bytes"] == knq[None]["stored_bytes"]
    assert [cell["cell"]["word"] for cell in cells if cell["cell"]["method"] == "dfp"] == [None, 4, 16]


@pytest.fixture
def resnet50_file(monkeypatch, imagenet_folder):
    """A small ResNet-50 under torchvision's names, and the folder with images for it."""
    small = replace(networks.get("resnet50"), module=ResNet50(5, 8, (1, 1)), size=32)
    monkeypatch.setitem(networks.FROM_FILE, "resnet50", small)
    arrays = RandomArrays(seed=0)
    jax.eval_shape(partial(resnet50, arrays, width=8, blocks=(1, 1), classes=5), np.zeros((1, 32, 32, 3)))
    save_file(dict(arrays), imagenet_folder / "resnet50.safetensors")
    return imagenet_folder


def resnet50_command(folder, *options):
    weights, source = folder / "resnet50.safetensors", f"zip:{folder / 'images' / 'imagenet_1000.zip'}"
    return ["--network", "resnet50", "--weights", str(weights), "--data", str(folder), "--source", source, *options]


def test_a_network_from_torchvision_s_file_is_measured(resnet50_file, tmp_path):
    file = tmp_path / "r.json"
    options = ["--method", "dfp", "--bits", "8", "--batch", "5", "--json", str(file)]
    assert study.main(resnet50_command(resnet50_file, *options, "--resize", "40")) == 0
    results = json.loads(file.read_text())
    assert (results["network"], results["images"]) == ("resnet50", 5)
    [cell] = results["cells"]
    assert "layer2_0/downsample/kernel" in cell["layers"]
    assert results["float"]["top5"] == 1  # of five classes
    assert results["commands"][0].endswith("--resize 40 --method dfp --bits 8 --batch 5")
    assert "resnet50.safetensors" in results["commands"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resize", "31"], "images of 31 pixels are too small: ResNet-50 takes 32"),
        (["--resize", "40", "--source", "data"], "the images of the source 'data' are stored as they are used"),
    ],
)
def test_a_scale_that_cannot_be_is_refused(options, message, resnet50_file, capsys):
    with pytest.raises(SystemExit):
        study.main(resnet50_command(resnet50_file, *options))
    assert message in capsys.readouterr().err


def test_a_network_from_a_file_asks_for_it(capsys):
    with pytest.raises(SystemExit):
        study.main(["--network", "mobilenet_v2"])
    assert "MobileNetV2's weights come from a file of torchvision's: give it with --weights" in capsys.readouterr().err


def test_the_grid_leaves_out_what_means_nothing():
    cells = study.grid(["enq", "uniform"], [4, 8], ["float", "8", "6"], ["tensor", "channel"])
    assert len(cells) == len(set(cells)) == 16
    words = {(c.setting.bits, c.setting.codebook_format) for c in cells if c.setting.method == "enq"}
    assert words == {(4, "float32"), (4, "fixed:8"), (4, "fixed:6"), (8, "float32"), (8, "fixed:8")}
    assert {c.setting.codebook_format for c in cells if c.setting.method == "uniform"} == {"float32"}
    for methods, words, message in ((["kmeans"], ["float"], "unknown method 'kmeans'"), (["knq"], ["half"], "'half'")):
        with pytest.raises(ValueError, match=message):
            study.grid(methods, [4], words)


def test_decoded_weights_and_the_packed_tree_give_the_same_logits(folder):
    network = networks.get("lenet5")
    variables = jax.tree.map(np.asarray, study.load_file(network, folder / "lenet5.npz")[1])
    inputs = network.preprocess(random_pixels(8, 28, 28, 1))
    cparams = nuqjax.compress(variables["params"], **Setting("enq", 2).options())
    decoded = jax.jit(network.module.apply)({"params": study._decompress(cparams)}, inputs)
    packed = jax.jit(nuqjax.apply(network.module.apply))({"params": cparams}, inputs)
    # The same weights in two programs: sums of 400 products at most, five layers deep.
    np.testing.assert_allclose(decoded, packed, rtol=0, atol=5 * 400 * 2**-24 * np.abs(np.asarray(packed)).max())


_PROGRAM = """
import sys
import jax
from experiments.paper import study
assert jax.local_device_count() == int(sys.argv[1])
sys.exit(study.main(sys.argv[2:]))
"""


def test_three_devices_see_the_images_that_one_sees(folder, tmp_path):
    options = ["--method", "uniform", "--bits", "2,3"]
    here = run(folder, tmp_path / "one.json", *options)
    file = tmp_path / "three.json"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", _PROGRAM, "3", *command(folder, "--json", str(file), *options)]
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    there = json.loads(file.read_text())
    assert there["devices"] == 3
    for one, three in zip([here["float"], *here["cells"]], [there["float"], *there["cells"]], strict=True):
        assert (one["right"], one["agrees"]) == (three["right"], three["agrees"])


def test_long_words_are_stored_as_long_as_they_are(folder, tmp_path):
    options = ["--method", "uniform,dfp", "--bits", "8,12", "--images", "10"]
    cells = {(c["cell"]["method"], c["cell"]["bits"]): c for c in run(folder, tmp_path / "r.json", *options)["cells"]}
    assert cells["dfp", 12]["stored_bytes"] == sum(SIZES.values()) * 12 // 8 + 4 + DENSE
    for method in ("uniform", "dfp"):
        assert cells[method, 12]["sqnr_db"] > cells[method, 8]["sqnr_db"] + 20
        assert cells[method, 12]["kl"] < cells[method, 8]["kl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "nine"], "nine"),
        (["--bits", "9"], "knq of 9 bits, but 1 to 8 are wanted"),
        (["--method", "kmeans"], "unknown method 'kmeans'"),
        (["--codebook-word", "half"], "unknown codebook word 'half'"),
        (["--scale", "tensor"], "unknown scale 'tensor': wanted is none or channel"),
        (["--granularity", "layer"], "unknown granularity 'layer'"),
        (["--images", "61"], "61 images wanted, but there are 60"),
        (["--weights", "nowhere.npz"], "the weights file nowhere.npz is missing"),
        (["--source", "folder:nowhere"], "the folder nowhere is missing"),
    ],
)
def test_bad_arguments_end_with_status_2_and_say_why(options, message, folder, capsys):
    with pytest.raises(SystemExit) as error:
        study.main(command(folder, *options))
    assert error.value.code == 2
    assert message in capsys.readouterr().err
