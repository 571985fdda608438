"""Image files to pixels, in processes of their own: this module imports nothing that is slow to start."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


def decode(encoded: bytes, size: int, channels: int, resize: int | None) -> np.ndarray:
    """One image as a network takes it, before its normalisation.

    Args:
      encoded: an image file's bytes.
      size: height and width wanted, in pixels.
      channels: 3 for RGB, 1 for grey.
      resize: the shorter side is brought to this length first (bilinear, smoothed where it shrinks) and the centre
        cut out; None wants images of exactly `size`.

    Returns:
      `[size, size, channels]` uint8.

    Raises:
      ValueError: the image has another size, and `resize` is None.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        image = image.convert("RGB" if channels == 3 else "L")
        if resize is not None:
            short = min(image.size)
            if short != resize:
                image = image.resize([round(side * resize / short) for side in image.size], Image.Resampling.BILINEAR)
            left, top = ((side - size) // 2 for side in image.size)
            image = image.crop((left, top, left + size, top + size))
        pixels = np.asarray(image).reshape(image.height, image.width, channels)
    if pixels.shape[:2] != (size, size):
        raise ValueError(f"an image has {pixels.shape[0]}×{pixels.shape[1]} pixels, the network takes {size}×{size}")
    return pixels


def decode_all(encoded: Sequence[bytes], size: int, channels: int, resize: int | None) -> np.ndarray:
    """`[N, size, size, channels]` of several images."""
    return np.stack([decode(one, size, channels, resize) for one in encoded])
