"""Compares a compressed leaf with the dense array that it came from, and counts how often each level is used."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from nuqjax._src.leaf import packing
from nuqjax._src.leaf import rows as rows_
from nuqjax._src.leaf.codebook_array import CodebookArray, dense_on_host
from nuqjax._src.leaf.take import channel_block

_CHUNK = 1 << 18  # values compared at once in float64 (`experiments.speed.constants`)


class Comparison(NamedTuple):
    """A leaf compared with its dense array; the fields are those of `LeafReport`."""

    signal: float
    noise: float
    largest_error: float
    levels_used: int
    entropy: float


def compare_leaf(dense: np.ndarray, leaf: CodebookArray) -> Comparison:
    """Compares a leaf with its dense array by NumPy in float64, a few output channels at a time."""
    leaf = jax.tree.map(np.asarray, leaf)
    signal = noise = largest = 0.0
    for place in np.ndindex(leaf.stack_shape if leaf.size else (0,)):
        for original, block in _blocks(dense[place], leaf[place]):
            x = original.astype(np.float64)
            error = x - dense_on_host(block).astype(np.float64)
            signal += float(np.vdot(x, x))
            noise += float(np.vdot(error, error))
            largest = max(largest, float(np.max(np.abs(error), initial=0)))
    return Comparison(signal, noise, largest, *usage(leaf))


class Usage(NamedTuple):
    """How a leaf's indices use its levels; the fields are those of `LeafReport`."""

    levels_used: int
    entropy: float


def usage(leaf: CodebookArray) -> Usage:
    """Counts the indices of a leaf of NumPy arrays, a few output channels at a time."""
    used, counts = 0, np.zeros(1 << leaf.bits, np.int64)
    for place in np.ndindex(leaf.stack_shape if leaf.size else (0,)):
        tables = map(_count_indices, _channel_blocks(leaf[place]))
        if leaf.granularity == "tensor":  # the blocks share their codebook
            tables = [sum(tables, np.zeros((1, 1 << leaf.bits), np.int64))]
        for table in tables:
            counts += table.sum(axis=0)
            used += int(np.count_nonzero(table))
    return Usage(used, entropy(counts))


def entropy(counts: np.ndarray) -> float:
    """Returns the empirical entropy of indices that occur so often, in bits per index.

    >>> entropy(np.array([2, 1, 1, 0]))
    1.5
    """
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0


def _channel_blocks(leaf: CodebookArray) -> Iterator[CodebookArray]:
    """Yields output channels of a slice, about `_CHUNK` indices or levels at a time, groups of channels whole."""
    outputs, inputs = rows_.channel_shape(leaf.slice_shape, leaf.axes)
    group = leaf.granularity.size if isinstance(leaf.granularity, rows_.ChannelGroups) else 1
    each = max(inputs, leaf.levels.size // outputs, 1)
    step = max(_CHUNK // each // group, 1) * group
    for start in range(0, outputs, step):
        yield channel_block(leaf, start, min(start + step, outputs))


def _blocks(dense: np.ndarray, leaf: CodebookArray) -> Iterator[tuple[np.ndarray, CodebookArray]]:
    """Yields a slice's output channels, about `_CHUNK` values at a time: the dense array's `[o, I]` and the leaf's."""
    outputs, inputs = rows_.channel_shape(leaf.slice_shape, leaf.axes)
    if not outputs:
        return
    order = (*leaf.axes, *(a for a in range(dense.ndim) if a not in leaf.axes))
    dense = dense.transpose(order) if leaf.axes else dense[None]  # a view: only blocks are copied
    count, _ = rows_.row_shape(outputs, inputs, leaf.granularity)
    table = count * (1 << leaf.bits) // outputs
    width = outputs // dense.shape[0]  # channels for each index of the first output axis
    group = leaf.granularity.size if isinstance(leaf.granularity, rows_.ChannelGroups) else 1
    aligned = group // math.gcd(group, width)  # a block begins where a group begins
    step = max(_CHUNK // max(inputs * width, table * width, 1) // aligned, 1) * aligned
    for start in range(0, dense.shape[0], step):
        part = dense[start : start + step]
        channels = part.shape[0] * width
        yield part.reshape(channels, inputs), channel_block(leaf, start * width, start * width + channels)


def _count_indices(block: CodebookArray) -> np.ndarray:
    """Returns `[R, K]`: how many indices name each level of each codebook."""
    outputs, inputs = block.slice_shape
    indices = rows_.to_rows(packing.unpack(block.packed, block.bits, inputs), block.granularity)
    number = np.arange(indices.shape[0])[:, None] * (1 << block.bits) + indices
    mask = rows_.row_mask(outputs, inputs, block.granularity)
    number = number.reshape(-1) if mask is None else number[mask]
    return np.bincount(number, minlength=indices.shape[0] << block.bits).reshape(-1, 1 << block.bits)
