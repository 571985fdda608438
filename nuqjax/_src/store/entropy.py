"""Entropy coding of packed indices: asymmetric numeral systems, by the `constriction` library.

A leaf has one model for all its indices. The file stores the model as small integer weights `w[k]`. With K = 2^bits
and W = Σ w, index k has the frequency `F[k+1] − F[k]` out of 2^24, where

    F[k] = k + ⌊(w[0] + … + w[k−1]) · (2^24 − K) / W⌋

in integer arithmetic, so that every machine computes the same. Indices are coded in the order in which they are packed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nuqjax._src.leaf import packing

_PRECISION = 24
_STRETCH = 1 << 21  # indices coded or decoded at once
_EXPANSION, _FREE = 64, 1 << 16
"""A stream of n bytes never stands for more than 64·n + 65,536 bytes of packed indices: what would, is not coded."""


def constriction_library() -> Any:
    """Returns the `constriction` module; where it is missing, the ImportError says how to install it."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError("entropy coding needs constriction: pip install 'nuqjax[entropy]'") from error
    return constriction


def encode(packed: np.ndarray, bits: int, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the coded stream of packed rows and the model's weights; None where they take as much room or more.

    Args:
      packed: `[…, B]` uint8, rows of packed indices.
      bits: index width in bits.
      count: number of indices in a row.

    Returns:
      `[n]` uint32 words and `[K]` uint8 or uint16 weights, or None.

    Raises:
      ImportError: `constriction` is not installed.

    >>> indices = np.repeat(np.array([[0, 1, 3]], np.uint8), [2000, 300, 50], axis=-1)
    >>> stream, weights = encode(packing.pack(indices, 2), 2, 2350)
    >>> stream.nbytes + weights.nbytes, packing.packed_size(2350, 2)
    (212, 588)
    """
    library = constriction_library()
    if packed.size == 0:
        return None
    rows = packed.reshape(-1, packed.shape[-1])
    if _padding(rows, bits, count):
        return None
    counts = np.zeros(1 << bits, np.int64)
    for row, column in _stretches(rows.shape[0], count, bits):
        counts += np.bincount(_unpack(rows, bits, row, column).reshape(-1), minlength=1 << bits)
    weights = _weights(counts)
    model, coder = _model(library, weights), library.stream.stack.AnsCoder()
    for row, column in reversed(list(_stretches(rows.shape[0], count, bits))):
        coder.encode_reverse(_unpack(rows, bits, row, column).reshape(-1).astype(np.int32), model)
    stream = coder.get_compressed()
    if stream.nbytes + weights.nbytes >= rows.size or rows.size > _EXPANSION * stream.nbytes + _FREE:
        return None
    return stream, weights


def decode(stream: np.ndarray, weights: np.ndarray, bits: int, rows: int, count: int) -> np.ndarray:
    """Returns the packed indices that `encode` was given, `[rows, B]` uint8.

    Args:
      stream: `[n]` uint32 words.
      weights: `[K]` unsigned weights of the model.
      bits: index width in bits.
      rows: number of rows.
      count: number of indices in a row.

    Raises:
      ImportError: `constriction` is not installed.
      ValueError: the stream is too short for so many indices, or does not end with the last of them.
    """
    size = rows * packing.packed_size(count, bits)
    if size == 0:
        raise ValueError("a stream of no indices")
    if size > _EXPANSION * stream.nbytes + _FREE:
        raise ValueError(f"a stream of {stream.nbytes} bytes that would expand to {size}, more than {_EXPANSION}-fold")
    if weights.shape != (1 << bits,) or not weights.any():
        raise ValueError(f"model weights of shape {weights.shape}, but {1 << bits} are wanted that are not all zero")
    library = constriction_library()
    model = _model(library, weights)
    coder = library.stream.stack.AnsCoder(np.array(stream, np.uint32))  # refuses a last word of zero
    packed = np.empty((rows, packing.packed_size(count, bits)), np.uint8)
    for row, column in _stretches(rows, count, bits):
        shape = row.stop - row.start, column.stop - column.start
        indices = coder.decode(model, shape[0] * shape[1]).reshape(shape).astype(np.uint8)
        packed[row, column.start * bits // 8 : packing.packed_size(column.stop, bits)] = packing.pack(indices, bits)
    if not coder.is_empty():
        raise ValueError("a stream that does not end where the indices do")
    return packed


def _padding(rows: np.ndarray, bits: int, count: int) -> bool:
    """Returns whether any padding bit after the last index of a row is set: a stream would lose it."""
    rest = count * bits % 8
    return bool(rest) and bool((rows[:, -1] >> rest).any())


def _stretches(rows: int, count: int, bits: int) -> Iterator[tuple[slice, slice]]:
    """Yields blocks of rows, or of columns of one long row, in coding order; each begins on a whole byte."""
    height, width = max(1, _STRETCH // count), min(count, _STRETCH)
    for row in range(0, rows, height):
        for column in range(0, count, width):
            yield slice(row, min(row + height, rows)), slice(column, min(column + width, count))


def _unpack(rows: np.ndarray, bits: int, row: slice, column: slice) -> np.ndarray:
    part = rows[row, column.start * bits // 8 : packing.packed_size(column.stop, bits)]
    return packing.unpack(part, bits, column.stop - column.start)


def _weights(counts: np.ndarray) -> np.ndarray:
    """Scales the counts to uint8 or uint16 weights, whichever makes the stream and the weights smaller in total."""
    made = []
    for dtype in (np.uint8, np.uint16):
        most = int(np.iinfo(dtype).max)
        scaled = np.where(counts > 0, np.maximum(np.rint(counts / counts.max() * most), 1), 0).astype(dtype)
        spent = float((counts * (_PRECISION - np.log2(_frequencies(scaled)))).sum()) + 8 * scaled.nbytes
        made.append((spent, scaled))
    return min(made, key=lambda pair: pair[0])[1]


def _frequencies(weights: np.ndarray) -> np.ndarray:
    """Returns the `[K]` frequencies out of 2^24 of the module docstring, each at least 1."""
    levels = weights.size
    before = np.concatenate([[0], np.cumsum(weights, dtype=np.int64)])
    return np.diff(np.arange(levels + 1) + before * ((1 << _PRECISION) - levels) // int(before[-1]))


def _model(library: Any, weights: np.ndarray) -> Any:
    # The library gives symbol k the share p[k]/Σp of 2^24 − K, rounded down cumulatively, plus 1. For integers p that
    # sum to 2^24 − K nothing is rounded: the frequencies are exactly those of `_frequencies`.
    return library.stream.model.Categorical((_frequencies(weights) - 1).astype(np.float64), lazy=False, perfect=False)
