"""Entropy coding of packed indices: asymmetric numeral systems, by the `constriction` library.

A leaf has one model for all its indices: integer weights `w[k]`. With K = 2^bits and W = Σ w, index k has the frequency
`F[k+1] − F[k]` out of 2^24, where

    F[k] = k + ⌊(w[0] + … + w[k−1]) · (2^24 − K) / W⌋

in integer arithmetic, so that every machine computes the same. Indices are coded in the order in which they are packed.

The file stores the weights as bytes `[first, last, control[0], …, control[n−1]]`. Each level from `first` to `last`
has a byte, and the other levels have the weight 0. With n = last − first + 1, these are the control bytes. With fewer,
they stand at equal distances over the range, and the levels between them are interpolated: a byte is nearly
a logarithm, so that straight lines between a few bytes describe a Laplace or a normal distribution. A byte is a float
without sign, of four bits of exponent and four of mantissa: `b` below 16, else `(16 + b % 16) · 2^(b // 16 − 1)`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nuqjax._src.leaf import packing

_PRECISION = 24  # bits of a frequency: what the coder of the library works with
_STRETCH = 1 << 21  # indices coded or decoded at once
_EXPANSION, _FREE = 64, 1 << 16
"""A stream of n bytes never stands for more than 64·n + 65,536 bytes of packed indices: what would, is not coded."""
_CONTROLS = (1, 2, 3, 5, 7, 9, 13, 17, 25, 33)  # numbers of control bytes that are tried
_NEGLIGIBLE = 2.0**-12  # a table that is a smaller share of the code is not made smaller
_VALUES = np.array([b if b < 16 else (16 + b % 16) << (b // 16 - 1) for b in range(256)])


def constriction_library() -> Any:
    """Returns the `constriction` module; where it is missing, the ImportError says how to install it."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError("entropy coding needs constriction: pip install 'nuqjax[entropy]'") from error
    return constriction


def encode(packed: np.ndarray, bits: int, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the coded stream of packed rows and their model; None where they take as much room or more.

    Args:
      packed: `[…, B]` uint8, rows of packed indices.
      bits: index width in bits.
      count: number of indices in a row.

    Returns:
      `[n]` uint32 words and the `[m]` uint8 bytes of the model, or None.

    Raises:
      ImportError: `constriction` is not installed.

    >>> indices = np.repeat(np.array([[0, 1, 3]], np.uint8), [2000, 300, 50], axis=-1)
    >>> stream, model = encode(packing.pack(indices, 2), 2, 2350)
    >>> stream.nbytes + model.nbytes, packing.packed_size(2350, 2)
    (214, 588)
    """
    library = constriction_library()
    rows = _rows(packed, bits, count)
    if rows is None:
        return None
    model = _fitted(_counts(rows, bits, count))
    coder, categorical = library.stream.stack.AnsCoder(), _model(library, weights_of(model, bits))
    for row, column in reversed(list(_stretches(rows.shape[0], count, bits))):
        coder.encode_reverse(_unpack(rows, bits, row, column).reshape(-1).astype(np.int32), categorical)
    stream = coder.get_compressed()
    return (stream, model) if _pays(stream, model, rows) else None


def sized(packed: np.ndarray, bits: int, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns what `encode` does, but the words of the stream are zeros, and there may be one more or less of them.

    It tells sizes without coding, and needs no library.

    >>> indices = np.repeat(np.array([[0, 1, 3]], np.uint8), [2000, 300, 50], axis=-1)
    >>> [part.nbytes for part in sized(packing.pack(indices, 2), 2, 2350)]
    [208, 6]
    """
    rows = _rows(packed, bits, count)
    if rows is None:
        return None
    counts = _counts(rows, bits, count)
    model = _fitted(counts)
    words = np.zeros(int(np.ceil((_code_length(counts, weights_of(model, bits)) + 16) / 32)), np.uint32)
    return (words, model) if _pays(words, model, rows) else None


def _rows(packed: np.ndarray, bits: int, count: int) -> np.ndarray | None:
    """Returns the rows along one axis; None where there are no indices, or bits of padding that a stream would lose."""
    if packed.size == 0:
        return None
    rows, rest = packed.reshape(-1, packed.shape[-1]), count * bits % 8
    return None if rest and (rows[:, -1] >> rest).any() else rows


def _counts(rows: np.ndarray, bits: int, count: int) -> np.ndarray:
    counts = np.zeros(1 << bits, np.int64)
    for row, column in _stretches(rows.shape[0], count, bits):
        counts += np.bincount(_unpack(rows, bits, row, column).reshape(-1), minlength=1 << bits)
    return counts


def _pays(stream: np.ndarray, model: np.ndarray, rows: np.ndarray) -> bool:
    return stream.nbytes + model.nbytes < rows.size <= _EXPANSION * stream.nbytes + _FREE


def decode(stream: np.ndarray, weights: np.ndarray, bits: int, rows: int, count: int) -> np.ndarray:
    """Returns the packed indices that `encode` was given, `[rows, B]` uint8.

    Args:
      stream: `[n]` uint32 words.
      weights: `[K]` weights of the model, from 0 to 2^24.
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


def _stretches(rows: int, count: int, bits: int) -> Iterator[tuple[slice, slice]]:
    """Yields blocks of rows, or of columns of one long row, in coding order; each begins on a whole byte."""
    height, width = max(1, _STRETCH // count), min(count, _STRETCH)
    for row in range(0, rows, height):
        for column in range(0, count, width):
            yield slice(row, min(row + height, rows)), slice(column, min(column + width, count))


def _unpack(rows: np.ndarray, bits: int, row: slice, column: slice) -> np.ndarray:
    part = rows[row, column.start * bits // 8 : packing.packed_size(column.stop, bits)]
    return packing.unpack(part, bits, column.stop - column.start)


# The model


def weights_of(model: np.ndarray, bits: int) -> np.ndarray:
    """Returns the `[K]` weights that the bytes of a model stand for.

    Raises:
      ValueError: the bytes are not a model of so many bits.

    >>> weights_of(np.array([1, 5, 16, 48, 16], np.uint8), 3)
    array([ 0, 16, 32, 64, 32, 16,  0,  0])
    """
    first, last = (int(model[0]), int(model[1])) if model.size > 2 else (1, 0)
    span = last - first + 1
    if model.dtype != np.uint8 or not 0 < span <= (1 << bits) - first or model.size - 2 > span:
        raise ValueError(f"a model of {model.size} bytes for levels {first} to {last} of {1 << bits}")
    weights = np.zeros(1 << bits, np.int64)
    weights[first : last + 1] = _VALUES[_between(model[2:].astype(np.int64), span)]
    return weights


def _between(controls: np.ndarray, span: int) -> np.ndarray:
    """Returns the bytes of `span` levels: control bytes at equal distances, and whole numbers between them."""
    here, rest = np.divmod(np.arange(span) * (controls.size - 1), max(span - 1, 1))
    low, high = controls[here], controls[np.minimum(here + 1, controls.size - 1)]
    return low + (high - low) * rest // max(span - 1, 1)


def _fitted(counts: np.ndarray) -> np.ndarray:
    """Returns the bytes of the model that makes stream and model smallest in total."""
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    counts = counts[first : last + 1]
    wanted = counts * (_VALUES[-1] / counts.max())
    table = np.searchsorted((_VALUES[:-1] + _VALUES[1:]) / 2, wanted)  # the nearest byte
    table = np.where(counts > 0, np.maximum(table, 1), 0)
    best, cost = table, _cost(table, counts)
    tried = [n for n in _CONTROLS if n < table.size] if 8 * table.size > cost * _NEGLIGIBLE else []
    if tried:
        controls = min((_controls(table, counts, n) for n in tried), key=lambda found: _cost(found, counts))
        controls = _descended(controls, counts)
        best = min(best, controls, key=lambda found: _cost(found, counts))
    return np.array([first, last, *best], np.uint8)


def _controls(table: np.ndarray, counts: np.ndarray, n: int) -> np.ndarray:
    """Returns n control bytes: least squares to the levels' bytes, weighted by how often each level is used."""
    at = np.arange(table.size) * ((n - 1) / (table.size - 1))
    hats = np.maximum(1 - np.abs(at[:, None] - np.arange(n)), 0)
    weights = np.sqrt(counts + 1e-3)[:, None]
    solved = np.linalg.lstsq(hats * weights, table[:, None] * weights, rcond=None)[0]
    return np.clip(np.rint(solved[:, 0]), 1, 255).astype(np.int64)


def _descended(controls: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Moves single control bytes up and down for as long as this shortens the code."""
    cost = _cost(controls, counts)
    for step in (8, 4, 2, 1):
        for n in range(controls.size):
            for move in (step, -step):
                other = controls.copy()
                other[n] = np.clip(other[n] + move, 1, 255)
                if _cost(other, counts) < cost:
                    controls, cost = other, _cost(other, counts)
    return controls


def _cost(controls: np.ndarray, counts: np.ndarray) -> float:
    """Returns the bits of stream and control bytes together."""
    return _code_length(counts, _VALUES[_between(controls, counts.size)]) + 8 * controls.size


def _code_length(counts: np.ndarray, weights: np.ndarray) -> float:
    """Returns the bits of the stream of indices that occur so often."""
    return float((counts * (_PRECISION - np.log2(_frequencies(weights)))).sum())


def _frequencies(weights: np.ndarray) -> np.ndarray:
    """Returns the `[K]` frequencies out of 2^24 of the module docstring, each at least 1."""
    levels = weights.size
    before = np.concatenate([[0], np.cumsum(weights, dtype=np.int64)])
    return np.diff(np.arange(levels + 1) + before * ((1 << _PRECISION) - levels) // int(before[-1]))


def _model(library: Any, weights: np.ndarray) -> Any:
    # The library gives symbol k the share p[k]/Σp of 2^24 − K, rounded down cumulatively, plus 1. For integers p that
    # sum to 2^24 − K nothing is rounded: the frequencies are exactly those of `_frequencies`.
    return library.stream.model.Categorical((_frequencies(weights) - 1).astype(np.float64), lazy=False, perfect=False)
