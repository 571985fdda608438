"""Labelled images from where they are: IDX files, a folder for each class, a zip, tensorflow-datasets.

A source is named on the command line by its kind and place:

  data               the data folder's own images (`experiments.data.images`)
  idx:FOLDER         MNIST's and Fashion-MNIST's files, gzipped or not; `idx:FOLDER:train` the 60,000 others
  folder:FOLDER      a sub-folder of image files for each class
  zip:FILE           image files named by their class (`n01440764.jpg`), or in a folder of that name
  tfds:FOLDER:SPLIT  what tensorflow-datasets prepared with `file_format="array_record"`; TensorFlow is not needed

Files are decoded batch by batch, ahead of their use and in several processes, and kept where they fit into memory.
"""

import dataclasses
import gzip
import importlib
import itertools
import json
import math
import multiprocessing
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import images
from experiments.data.decoding import decode_all
from experiments.data.images import LabelledImages
from experiments.networks.network import Network

_KINDS = "data, idx:FOLDER, folder:FOLDER, zip:FILE, tfds:FOLDER:SPLIT"
_IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
_KEPT_BYTES = 4 << 30  # decoded images up to this size stay in memory


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Labelled images still in their files.

    Attributes:
      read: number of an image to the bytes of its file.
      labels: `[N]` int.
      size, channels, resize: as in `experiments.data.decoding.decode`.
    """

    read: Callable[[int], bytes]
    labels: np.ndarray
    size: int
    channels: int
    resize: int | None


Source = LabelledImages | Encoded


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file (LeCun, http://yann.lecun.com/exdb/mnist), gzipped or not.

    Raises:
      ValueError: it is no such file, or its length is not what its header says.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it begins with {content[:4]!r}")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if len(content) != start + math.prod(shape):
        raise ValueError(f"{path} holds {len(content) - start} bytes, but its header says {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def load(text: str, network: Network, data: Path | None = None, count: int | None = None) -> Source:
    """The images that a source's name stands for.

    Args:
      text: as in the module's text.
      network: says the input's size, and the order of the classes.
      data: the data folder: for the source `data`, and for the class order of networks on ImageNet.
      count: take this many, evenly spread; None takes all.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: an unknown kind, a class that the network does not have, or a wrong `count`.
    """
    kind, _, place = text.partition(":")
    if text == "data":
        return images.load_images(network, images.data_folder(data), count)
    kinds = {"idx": _idx, "folder": _folder, "zip": _zip, "tfds": _tfds}
    if kind not in kinds or not place:
        raise ValueError(f"unknown source {text!r}: the known are {_KINDS}")
    source = kinds[kind](place, network, data)
    chosen = images.spread(len(source.labels), count)
    if isinstance(source, LabelledImages):
        return LabelledImages(source.pixels[chosen], source.labels[chosen])
    read = source.read
    return dataclasses.replace(source, read=lambda i: read(int(chosen[i])), labels=source.labels[chosen])


def _idx(place: str, network: Network, data: Path | None) -> Source:
    del data  # labels are class numbers
    folder, _, part = place.partition(":")
    prefix = {"": "t10k", "test": "t10k", "train": "train"}.get(part)
    if prefix is None:
        raise ValueError(f"unknown part {part!r} of idx:{folder}: the known are test and train")

    def one(name: str) -> np.ndarray:
        found = [path for path in (Path(folder, name), Path(folder, name + ".gz")) if path.is_file()]
        if not found:
            raise FileNotFoundError(f"{Path(folder, name)} and {name}.gz are missing")
        return read_idx(found[0])

    pixels, labels = one(f"{prefix}-images-idx3-ubyte")[..., None], one(f"{prefix}-labels-idx1-ubyte")
    if pixels.shape[1:] != network.input_shape or len(pixels) != len(labels):
        raise ValueError(
            f"{folder}: {pixels.shape} pixels and {labels.shape} labels, but {network.title} takes "
            f"{network.input_shape}, a label each"
        )
    return LabelledImages(pixels, labels.astype(np.int64))


def _folder(place: str, network: Network, data: Path | None) -> Source:
    root = Path(place)
    if not root.is_dir():
        raise FileNotFoundError(f"the folder {root} is missing")
    paths = sorted(path for path in root.glob("*/*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    return _encoded([path.parent.name for path in paths], names, network, data, lambda i: paths[i].read_bytes(), place)


def _zip(place: str, network: Network, data: Path | None) -> Source:
    if not Path(place).is_file():
        raise FileNotFoundError(f"the file {place} is missing")
    archive = zipfile.ZipFile(place)  # open as long as the source is used
    files = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in _IMAGE_SUFFIXES)
    classes = [Path(name).parent.name or Path(name).stem for name in files]
    return _encoded(classes, sorted(set(classes)), network, data, lambda i: archive.read(files[i]), place)


def _tfds(place: str, network: Network, data: Path | None) -> Source:
    # Without TensorFlow; only this kind of source needs it.
    tfds: Any = importlib.import_module("tensorflow_datasets")

    parts = re.fullmatch(r"(.*?):(\w[^/]*)", place)  # a split may have a colon of its own: test[100:200]
    folder, split = parts.groups() if parts else (place, "")
    if not split or not Path(folder, "dataset_info.json").is_file():
        raise FileNotFoundError(f"tfds:{place}: no dataset_info.json in {folder!r}; wanted is tfds:FOLDER:SPLIT")
    builder = tfds.builder_from_directory(folder)
    records: Any = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    names = list(builder.info.features["label"].names)
    classes = [names[records[i]["label"]] for i in range(len(records))]
    return _encoded(classes, names, network, data, lambda i: records[i]["image"], place)


def _encoded(
    classes: Sequence[str],
    names: Sequence[str],
    network: Network,
    data: Path | None,
    read: Callable[[int], bytes],
    place: str,
) -> Encoded:
    """An undecoded source; `classes` names each image's, `names` all in the order of the labels.

    Where the network's classes have names (WordNet ids), labels follow its own order of them: sorted, which needs
    nothing but all thousand, or as the data folder's list says.
    """
    if not classes:
        raise FileNotFoundError(f"there are no images in {place}")
    if network.classes == "wnids_sorted" and len(names) == 1000:
        names = sorted(names)
    elif network.classes is not None:
        order = json.loads((images.data_folder(data) / "imagenet_classes.json").read_text())[network.classes]
        if not set(names) <= set(order):
            raise ValueError(f"{place}: {min(set(names) - set(order))!r} is no class of {network.title}")
        names = order
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of[name] for name in classes])
    return Encoded(read, labels, network.size, network.channels, network.resize)


def kept(source: Source, workers: int = 0) -> Source:
    """The source with its images decoded, where they fit into memory; else as it is."""
    if isinstance(source, LabelledImages):
        return source
    if len(source.labels) * source.size**2 * source.channels > _KEPT_BYTES:
        return source
    parts = [pixels for pixels, _ in batches(source, 64, workers)]
    return LabelledImages(np.concatenate(parts), source.labels)


def batches(source: Source, size: int, workers: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`(pixels, labels)` of up to `size` images each, in order.

    Args:
      source: the images.
      size: images a batch.
      workers: processes that decode ahead; 0 decodes here.
    """
    starts = range(0, len(source.labels), size)
    if isinstance(source, LabelledImages):
        for start in starts:
            yield source.pixels[start : start + size], source.labels[start : start + size]
        return

    def job(start: int) -> tuple[Any, ...]:
        numbers = range(start, min(start + size, len(source.labels)))
        return [source.read(i) for i in numbers], source.size, source.channels, source.resize

    if workers == 0:
        for start in starts:
            yield decode_all(*job(start)), source.labels[start : start + size]
        return
    # JAX's threads forbid forking, so workers start afresh.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: deque[Future] = deque()
        ahead = iter(starts)
        for start in itertools.islice(ahead, 2 * workers):
            waiting.append(pool.submit(decode_all, *job(start)))
        for start in starts:
            pixels = waiting.popleft().result()
            for later in itertools.islice(ahead, 1):
                waiting.append(pool.submit(decode_all, *job(later)))
            yield pixels, source.labels[start : start + size]
