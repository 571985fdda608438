"""Images come from every kind of file whole, in order and with the right labels; the files are written here."""

import gzip
import io
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments import networks
from experiments.data import images, sources
from experiments.data.decoding import decode
from experiments.data.images import LabelledImages

SMALL = replace(networks.get("resnet20"), size=8)  # takes RGB of 8×8 pixels as they are


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def loaded(text, network=SMALL, **options) -> LabelledImages:
    source = sources.kept(sources.load(text, network, **options))
    assert isinstance(source, LabelledImages)
    return source


# --- IDX


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("part", "prefix"), [("", "t10k"), (":test", "t10k"), (":train", "train")])
def test_idx_files_come_back_as_they_were(suffix, part, prefix, tmp_path):
    pixels, labels = random_pixels(7, 28, 28), np.arange(7, dtype=np.uint8)
    write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", pixels)
    write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    source = loaded(f"idx:{tmp_path}{part}", networks.get("lenet5"))
    np.testing.assert_array_equal(source.pixels, pixels[..., None])
    np.testing.assert_array_equal(source.labels, labels)
    some = loaded(f"idx:{tmp_path}{part}", networks.get("lenet5"), count=3)
    np.testing.assert_array_equal(some.labels, [0, 2, 4])


def test_idx_files_that_are_wrong_are_named(tmp_path):
    path = tmp_path / "t10k-images-idx3-ubyte"
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte and t10k-images-idx3-ubyte\.gz are missing"):
        sources.load(f"idx:{tmp_path}", networks.get("mlp"))
    path.write_bytes(b"\0\0\x0d\x01\0\0\0\x01")
    with pytest.raises(ValueError, match="no IDX file of unsigned bytes"):
        sources.read_idx(path)
    write_idx(path, random_pixels(2, 3, 3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"holds 17 bytes, but its header says \(2, 3, 3\)"):
        sources.read_idx(path)
    write_idx(path, random_pixels(2, 3, 3))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match=r"LeNet-5 takes \(28, 28, 1\)"):
        sources.load(f"idx:{tmp_path}", networks.get("lenet5"))


# --- Image files


@pytest.fixture
def folder(tmp_path):
    """Three classes of two images of 8×8 pixels each, the pixels in the order of the labels."""
    pixels = random_pixels(6, 8, 8, 3)
    for i, one in enumerate(pixels):
        place = tmp_path / "photos" / ["cat", "dog", "eel"][i // 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png(one))
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "photos", pixels


def test_a_folder_for_each_class(folder):
    root, pixels = folder
    source = loaded(f"folder:{root}")
    np.testing.assert_array_equal(source.pixels, pixels)
    np.testing.assert_array_equal(source.labels, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(loaded(f"folder:{root}", count=2).pixels, pixels[[0, 3]])


def test_a_zip_gives_what_the_data_folders_own_reader_gives(imagenet_folder):
    for name in ("efficientnet_lite0", "tiny_darknet"):
        network = networks.get(name)
        place = imagenet_folder / "images" / "imagenet_1000.zip"
        source = loaded(f"zip:{place}", network, data=imagenet_folder)
        expected = images.load_images(network, imagenet_folder)
        np.testing.assert_array_equal(source.pixels, expected.pixels)
        np.testing.assert_array_equal(source.labels, expected.labels)


def test_all_thousand_classes_need_no_list(tmp_path):
    network = replace(networks.get("alexnet"), size=8, resize=None)
    for i in range(1000):
        (tmp_path / f"n{i:08}").mkdir()
    (tmp_path / "n00000777" / "a.png").write_bytes(png(random_pixels(8, 8, 3)))
    assert loaded(f"folder:{tmp_path}", network, data=tmp_path / "nowhere").labels.tolist() == [777]


def test_a_class_that_the_network_does_not_have_is_named(imagenet_folder, folder):
    with pytest.raises(ValueError, match="'cat' is no class of Tiny Darknet"):
        sources.load(f"folder:{folder[0]}", networks.get("tiny_darknet"), imagenet_folder)


def test_decoding_resizes_the_shorter_side_and_cuts_out_the_centre():
    pixels = random_pixels(40, 20, 3)
    image = Image.fromarray(pixels).resize((10, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(png(pixels), 8, 3, 10), np.asarray(image)[6:14, 1:9])
    np.testing.assert_array_equal(decode(png(pixels), 16, 3, 20), pixels[12:28, 2:18])  # nothing to resize
    grey = decode(png(pixels[:20]), 20, 1, None)
    np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(pixels[:20]).convert("L")))
    with pytest.raises(ValueError, match="an image has 40×20 pixels, the network takes 20×20"):
        decode(png(pixels), 20, 3, None)


def test_other_processes_decode_the_same_in_order(folder):
    source = sources.load(f"folder:{folder[0]}", SMALL)
    here, there = ([*sources.batches(source, 1, workers)] for workers in (0, 2))
    assert len(here) == len(there) == 6
    for (a, i), (b, j) in zip(here, there, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(i, j)


def test_images_that_do_not_fit_into_memory_stay_in_their_files(folder, monkeypatch):
    source = sources.load(f"folder:{folder[0]}", SMALL)
    monkeypatch.setattr(sources, "_KEPT_BYTES", 6 * 8 * 8 * 3 - 1)
    assert sources.kept(source) is source
    monkeypatch.setattr(sources, "_KEPT_BYTES", 6 * 8 * 8 * 3)
    assert isinstance(sources.kept(source), LabelledImages)


# --- tensorflow-datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set that tensorflow-datasets itself writes: the folder, the pixels and the labels by split."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pixels = {"train": random_pixels(5, 8, 8, 3, seed=1), "test": random_pixels(9, 8, 8, 3, seed=2)}
    labels = {split: np.arange(len(values)) % 3 for split, values in pixels.items()}

    class Beasts(tfds.core.GeneratorBasedBuilder):
        __module__ = "beasts"  # of no package, whose files tensorflow-datasets would look through
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["eel", "cat", "dog"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._examples(split) for split in pixels}

        def _examples(self, split):
            for i, (image, label) in enumerate(zip(pixels[split], labels[split], strict=True)):
                yield i, {"image": io.BytesIO(png(image)), "label": int(label)}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Beasts(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return str(builder.data_dir), pixels, labels


def in_any_order(pixels, labels):
    """tensorflow-datasets shuffles what it writes."""
    return sorted((one.tobytes(), int(label)) for one, label in zip(pixels, labels, strict=True))


def test_tensorflow_datasets_without_tensorflow(prepared):
    folder, pixels, labels = prepared
    for split in ("train", "test"):
        source = loaded(f"tfds:{folder}:{split}")
        assert in_any_order(*source) == in_any_order(pixels[split], labels[split])
    whole, part = loaded(f"tfds:{folder}:test"), loaded(f"tfds:{folder}:test[2:6]")
    np.testing.assert_array_equal(part.pixels, whole.pixels[2:6])
    np.testing.assert_array_equal(part.labels, whole.labels[2:6])


def test_tensorflow_datasets_in_the_networks_own_class_order(prepared, tmp_path):
    folder, *_ = prepared
    (tmp_path / "imagenet_classes.json").write_text('{"tiny_darknet_class_order": ["cat", "bat", "dog", "eel"]}')
    network = replace(networks.get("tiny_darknet"), size=8, resize=None)
    named = loaded(f"tfds:{folder}:test", network, data=tmp_path).labels
    np.testing.assert_array_equal(named, np.array([3, 0, 2])[loaded(f"tfds:{folder}:test").labels])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("files:here", "unknown source 'files:here': the known are data, idx:FOLDER"),
        ("folder", "unknown source 'folder'"),
        ("idx:here:half", "unknown part 'half' of idx:here"),
        ("folder:nowhere", "the folder nowhere is missing"),
        ("zip:nowhere", "the file nowhere is missing"),
        ("tfds:nowhere:test", r"no dataset_info\.json in 'nowhere'; wanted is tfds:FOLDER:SPLIT"),
    ],
)
def test_a_source_that_is_not_there_says_what_is_wanted(text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sources.load(text, SMALL)


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="there are no images in"):
        sources.load(f"folder:{tmp_path}", SMALL)
