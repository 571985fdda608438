"""What a file is that is none of ours, told by its first bytes, so that a message names it before more is read."""

import re
import zipfile

_SAFE = "save its weights as safetensors or npz where they were made"
_PICKLE = f"which can run code and is never loaded: {_SAFE}"
# The first bytes of a file, what it is, and what to do. None of them begins a safetensors file of less than 16 MB of
# header, or a msgpack file.
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
SIGNED = 512  # bytes that are looked at


def foreign_file(path: str) -> str | None:
    """What the file at a path is, and what to do; None where its first bytes do not tell."""
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
    """What a file with these first bytes is, and what to do; None where they do not tell.

    >>> foreign(b"GGUF" + bytes(12))
    "a GGUF file, whose weights are quantized: take the model's safetensors"
    """
    if start[8:9] == b"{":  # a safetensors file, whatever its length looks like
        return None
    return next((what for sign, what in _SIGNS if re.match(sign, start, re.DOTALL)), None)


def foreign_zip(archive: zipfile.ZipFile) -> str | None:
    """What a zip archive is that is no npz, and what to do."""
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
