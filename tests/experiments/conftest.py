"""Where the trained networks are, and random ones in the same file layout for machines without them."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data import images


def pytest_collection_modifyitems(items):
    """Experiments use public names only, and each of these is tested on all versions: once is enough.

    They are a user's programs, whose models promote.
    """
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.versionless)
            item.add_marker(pytest.mark.promotes)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of trained networks and images; the test is skipped where it is missing."""
    try:
        return images.data_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


class RandomArrays(dict):
    """Arrays of a weights file, drawn at random as a forward pass first asks for them by name and shape."""

    def __init__(self, seed: int):
        self._random = np.random.default_rng(seed)

    def kernel(self, name: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        """Normal values that keep the variance through a ReLU."""
        return self._draw(name, lambda: self._random.normal(0, (2 / fan_in) ** 0.5, shape))

    def vector(self, name: str, size: int, centre: float = 0.0) -> np.ndarray:
        """Values within 0.5 of `centre`."""
        return self._draw(name, lambda: self._random.uniform(centre - 0.5, centre + 0.5, size))

    def _draw(self, name, draw):
        if name not in self:
            self[name] = draw().astype(np.float32)
        return self[name]

    def save(self, path: Path) -> None:
        """Writes them as a weights file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **self)


@pytest.fixture
def random_arrays() -> RandomArrays:
    """None drawn yet."""
    return RandomArrays(seed=0)


@pytest.fixture
def cifar_folder(tmp_path) -> Path:
    """A data folder with 24 random 32×32 images, labelled 0 to 9 in turn."""
    pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir(exist_ok=True)
    np.savez(tmp_path / "images" / "cifar10_test_jpegcoded.npz", x=pixels, y=np.arange(24) % 10)
    return tmp_path


@pytest.fixture
def imagenet_folder(tmp_path) -> Path:
    """A data folder with five random 256×256 images, losslessly stored, of classes n0 to n4."""
    random = np.random.default_rng(2)
    (tmp_path / "images").mkdir(exist_ok=True)
    with zipfile.ZipFile(tmp_path / "images" / "imagenet_1000.zip", "w") as archive:
        for wnid in ("n3", "n1", "n0", "n4", "n2"):
            buffer = io.BytesIO()
            pixels = random.integers(0, 256, (256, 256, 3), dtype=np.uint8)
            np.save(tmp_path / f"{wnid}.npy", pixels)
            Image.fromarray(pixels).save(buffer, format="PNG")
            archive.writestr(f"{wnid}.jpg", buffer.getvalue())
    classes = {
        "wnids_sorted": [f"n{i}" for i in range(5)],
        "tiny_darknet_class_order": ["n4", "n2", "n0", "n1", "n3"],
    }
    (tmp_path / "imagenet_classes.json").write_text(json.dumps(classes))
    return tmp_path
