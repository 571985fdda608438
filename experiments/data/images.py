"""The labelled images that networks are evaluated on, read from a data folder, in batches ready for a network."""

import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.networks.network import Network

_IMAGENET = "imagenet_1000.zip"
_CIFAR10 = "cifar10_test_jpegcoded.npz"
_CLASSES = "imagenet_classes.json"
_STORED_SIZE = 256  # height and width of the images in the zip, in pixels


class LabelledImages(NamedTuple):
    """Images and the classes they show.

    Attributes:
      pixels: `[N, size, size, 3]` uint8 RGB.
      labels: `[N]` int, the index of the true class in a network's logits.
    """

    pixels: np.ndarray
    labels: np.ndarray


def data_folder(path: str | Path | None = None) -> Path:
    """The data folder: `path`, else the environment variable NUQJAX_DATA, else `../shared/data` beside the repository.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(path or os.environ.get("NUQJAX_DATA") or beside)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the data folder {folder} is missing: give the folder that holds weights/ and images/ with --data or the "
            "environment variable NUQJAX_DATA"
        )
    return folder


def load_images(network: Network, data: Path | str, count: int | None = None) -> LabelledImages:
    """The images that `network` is evaluated on, cropped to its input size.

    Args:
      network: says which data set, which size and which class order.
      data: the data folder.
      count: take this many, evenly spread over the set; None takes all.

    Raises:
      FileNotFoundError: a file is missing from the folder.
      ValueError: `count` is below 1 or more than there are.
    """
    return {"imagenet": _imagenet, "cifar10": _cifar10}[network.images](network, Path(data), count)


def _imagenet(network: Network, data: Path, count: int | None) -> LabelledImages:
    """JPEG files of 256×256 pixels named by their WordNet id, one of each class."""
    assert network.classes is not None
    order = json.loads(_existing(data / _CLASSES).read_text())[network.classes]
    label_of = {wnid: label for label, wnid in enumerate(order)}
    margin = (_STORED_SIZE - network.size) // 2
    box = (margin, margin, margin + network.size, margin + network.size)
    pixels, labels = [], []
    with zipfile.ZipFile(_existing(data / "images" / _IMAGENET)) as archive:
        names = sorted(archive.namelist())
        for i in spread(len(names), count):
            with Image.open(io.BytesIO(archive.read(names[i]))) as image:
                pixels.append(np.asarray(image.convert("RGB").crop(box)))
            labels.append(label_of[Path(names[i]).stem])
    return LabelledImages(np.stack(pixels), np.array(labels))


def _cifar10(network: Network, data: Path, count: int | None) -> LabelledImages:
    """Arrays `x` (uint8) and `y` (class numbers)."""
    del network  # every CIFAR-10 network takes 32×32 pixels and the classes in their own order
    with np.load(_existing(data / "images" / _CIFAR10)) as file:
        pixels, labels = file["x"], file["y"]
    chosen = spread(len(labels), count)
    return LabelledImages(pixels[chosen], labels[chosen])


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"the file {path} is missing: give the data folder, which holds weights/ and images/, with --data or the "
            "environment variable NUQJAX_DATA"
        )
    return path


def spread(total: int, count: int | None) -> np.ndarray:
    """Positions of `count` of `total` items at equal distances.

    >>> spread(10, 3).tolist()
    [0, 3, 6]
    """
    count = total if count is None else count
    if not 1 <= count <= total:
        raise ValueError(f"{count} images wanted, but there are {total}")
    return np.arange(count) * (total // count)


def batches(network: Network, pixels: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """`(inputs, valid)` batches of exactly `size` preprocessed images, so that one compiled program serves all.

    The last batch is filled up by repeating its last image; only its first `valid` rows count.
    """
    for start in range(0, len(pixels), size):
        chunk = pixels[start : start + size]
        valid = len(chunk)
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], size - valid, axis=0)])
        yield network.preprocess(filled), valid
