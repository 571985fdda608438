"""Recognizes files of other formats by their first bytes, so that the message can say what they are."""

import re
import zipfile

_SAFE = "save its weights as safetensors or npz where they were made"
_PICKLE = f"which can run code and is never loaded: {_SAFE}"
# The first bytes of a file as a pattern; what the file is, and what to do. No pattern matches a msgpack file, or a
# safetensors file whose header is below 16 MB.
_SIGNS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", "a git-LFS pointer to a file that is not here: `git lfs pull` fetches it"),
    (rb"\x89HDF\r\n\x1a\n", 'an HDF5 file: `nuqjax.open_checkpoint` and `nuqjax compress` read it as format "h5"'),
    (rb"\x93NUMPY", 'a NumPy array: `nuqjax.open_checkpoint` and `nuqjax compress` read it as format "npy"'),
    (rb"\x80[\x02-\x05].", f"a pickle, {_PICKLE}"),
    (rb"GGUF", "a GGUF file, whose weights are quantized: take the model's safetensors"),
    (rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]", f"an ONNX model, a graph: {_SAFE}"),
    (rb"....TFL3", f"a TFLite model, a graph: {_SAFE}"),
    (rb"\x1f\x8b", "gzip: unpack it first"),
    (rb"\x28\xb5\x2f\xfd", "zstd: unpack it first"),
    (rb"BZh[1-9]", "bzip2: unpack it first"),
    (rb"\xfd7zXZ", "xz: unpack it first"),
    (rb".{257}ustar", "a tar archive: unpack it first"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a page of HTML or XML, as a failed download leaves it: fetch it again"),
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive: an npz file is read by `nuqjax.open_checkpoint` and `nuqjax compress`"),
)
SIGNED = 512  # number of first bytes to compare


def foreign_file(path: str) -> str | None:
    """Returns what the file at a path is and what to do; None where its first bytes match no known format."""
    with open(path, "rb") as file:
        start = file.read(SIGNED)
    if not start.startswith(b"PK") or start[8:9] == b"{":
        return foreign(start)
    try:
        with zipfile.ZipFile(path) as archive:
            return foreign_zip(archive) or foreign(start)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return foreign(start)


def foreign(start: bytes) -> str | None:
    """Returns what a file with these first bytes is and what to do; None where they match no known format.

    >>> foreign(b"GGUF" + bytes(12))
    "a GGUF file, whose weights are quantized: take the model's safetensors"
    """
    if start[8:9] == b"{":  # a safetensors file, even if the length of its header looks like a sign above
        return None
    return next((what for sign, what in _SIGNS if re.match(sign, start, re.DOTALL)), None)


def foreign_zip(archive: zipfile.ZipFile) -> str | None:
    """Returns what a zip archive is and what to do; None for an npz file or an empty archive."""
    names = archive.namelist()
    if any(name.endswith("data.pkl") for name in names):
        return f"a PyTorch file, a pickle in a zip, {_PICKLE} (`safetensors.torch.save_file`)"
    if any(name.endswith(".dist-info/WHEEL") for name in names):
        return "a Python wheel: `pip install` takes it"
    if "model.weights.h5" in names:
        return "a Keras model: unpack it and give its model.weights.h5"
    if names and not any(name.endswith(".npy") for name in names):
        return "a zip archive without an array (.npy) in it"
    return None
