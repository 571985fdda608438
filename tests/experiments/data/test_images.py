"""Images arrive whole, in order, with the right labels, in batches of one shape."""

import numpy as np
import pytest

from experiments import networks
from experiments.data import images
from experiments.networks import NETWORKS

NAMES = ["n0", "n1", "n2", "n3", "n4"]


def test_imagenet_is_cropped_at_the_centre_and_sorted_by_wnid(imagenet_folder):
    loaded = images.load_images(networks.get("efficientnet_lite0"), imagenet_folder)
    whole = np.stack([np.load(imagenet_folder / f"{name}.npy") for name in NAMES])
    np.testing.assert_array_equal(loaded.pixels, whole[:, 16:240, 16:240])
    np.testing.assert_array_equal(loaded.labels, [0, 1, 2, 3, 4])


def test_labels_follow_the_class_order_of_the_network(imagenet_folder):
    loaded = images.load_images(networks.get("tiny_darknet"), imagenet_folder)
    np.testing.assert_array_equal(loaded.labels, [2, 3, 1, 4, 0])


def test_a_part_of_the_images_is_evenly_spread(imagenet_folder, cifar_folder):
    loaded = images.load_images(networks.get("efficientnet_lite0"), imagenet_folder, 2)
    np.testing.assert_array_equal(loaded.labels, [0, 2])
    network = networks.get("resnet20")
    np.testing.assert_array_equal(
        images.load_images(network, cifar_folder, 6).pixels, images.load_images(network, cifar_folder).pixels[::4]
    )


@pytest.mark.parametrize("count", [0, -1, 25])
def test_a_count_out_of_range_is_an_error(count, cifar_folder):
    with pytest.raises(ValueError, match=f"{count} images wanted, but there are 24"):
        images.load_images(networks.get("resnet20"), cifar_folder, count)


@pytest.mark.parametrize("size", [1, 5, 24, 30])
def test_batches_have_one_shape_and_their_valid_rows_are_the_images(size, cifar_folder):
    network = networks.get("resnet20")
    pixels = images.load_images(network, cifar_folder).pixels
    parts = list(images.batches(network, pixels, size))
    assert {inputs.shape for inputs, _ in parts} == {(size, 32, 32, 3)}
    np.testing.assert_array_equal(
        np.concatenate([inputs[:valid] for inputs, valid in parts]), network.preprocess(pixels)
    )


@pytest.mark.parametrize("network", NETWORKS.values(), ids=lambda network: network.name)
def test_preprocessing_gives_float32_of_the_stated_range(network):
    ends = network.preprocess(np.array([0, 255], np.uint8)[:, None, None, None].repeat(3, axis=-1))
    assert ends.dtype == np.float32
    expected = {
        "efficientnet_lite0": ([-127 / 128] * 3, [1.0] * 3),
        "tiny_darknet": ([0.0] * 3, [1.0] * 3),
    }
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    low, high = expected.get(network.name, (-mean / deviation, (1 - mean) / deviation))
    np.testing.assert_allclose(ends[:, 0, 0], [low, high], rtol=2**-21)  # three roundings in float32


def test_missing_files_say_what_to_do(tmp_path, monkeypatch):
    for name in ("efficientnet_lite0", "resnet20"):
        with pytest.raises(FileNotFoundError, match=r"is missing: give the data folder.*--data.*NUQJAX_DATA"):
            images.load_images(networks.get(name), tmp_path)
    monkeypatch.setenv("NUQJAX_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing.*--data.*NUQJAX_DATA"):
        images.data_folder()


def test_the_data_folder_is_the_argument_before_the_environment(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setenv("NUQJAX_DATA", str(tmp_path / "a"))
    assert images.data_folder() == tmp_path / "a"
    assert images.data_folder(tmp_path / "b") == tmp_path / "b"


def test_the_trained_networks_images_are_all_there(data):
    for name, count, classes in (("tiny_darknet", 1000, 1000), ("resnet20", 10_000, 10)):
        loaded = images.load_images(networks.get(name), data)
        assert loaded.pixels.shape[0] == count
        assert len(np.unique(loaded.labels)) == classes
