"""The codebook and the scale of each weight of a leaf, in the order in which weights are visited.

Values are held as `[G, I, P]`: G groups of weights that multiply the same inputs, the I inputs of a group in the order
of visit, and its P outputs next to one another, so that a step for one input serves many outputs. If moments are known
only within stretches of inputs, each stretch of a group is a group of its own.
"""

from typing import Any, NamedTuple

import numpy as np

from nuqjax._src.leaf.rows import ChannelGroups, InputGroups, row_shape


class Places(NamedTuple):
    """Codebook and scale of the value at `[g, i, p]`, each as the sum of a part by output and a part by input.

    Attributes:
      order: `[G, I]` the input of the group that is visited at each step.
      stretches: the number of consecutive groups that have the same outputs.
      output: `[G, P]` the number of the output.
      book_of_output: `[G, P]`, `book_of_input`: `[G, I]`: their sum is the number of the codebook.
      scale_of_output: `[G, P]`, `scale_of_input`: `[G, I]`: their sum is the index of the scale in flattened `[O, S]`.
      books: R, the number of codebooks.
      scales: S, the number of scales of an output; 0 without scales.
      system: `[G, P]` the number of the system of least squares for levels to which an output belongs. Outputs that
        share a codebook are in one system; if outputs have several codebooks, each output is its own system.
      systems: the number of systems; all have the same number of codebooks.
    """

    order: np.ndarray
    stretches: int
    output: np.ndarray
    book_of_output: np.ndarray
    book_of_input: np.ndarray
    scale_of_output: np.ndarray
    scale_of_input: np.ndarray
    books: int
    scales: int
    system: np.ndarray
    systems: int


def places_of(outputs: int, order: np.ndarray, stretches: int, granularity: Any, scale: Any) -> Places:
    """Returns the places of `[O, I]` weights; `order` `[G, I/stretches]` is the order of visit in each group."""
    groups, size = order.shape
    inputs = size * stretches
    output = np.repeat(np.arange(outputs).reshape(groups // stretches, -1), stretches, axis=0)
    column = order + size * (np.arange(groups) % stretches)[:, None]
    zeros = np.zeros_like(column)
    match granularity:
        case "tensor":
            books = np.zeros_like(output), zeros
        case "channel":
            books = output, zeros
        case ChannelGroups(run):
            books = output // run, zeros
        case InputGroups(run):
            books = output * -(-inputs // run), column // run
        case _:
            raise ValueError(f"unknown granularity {granularity!r}")
    match scale:
        case None:
            count, scales = 0, (np.zeros_like(output), zeros)
        case "channel":
            count, scales = 1, (output, zeros)
        case InputGroups(run):
            count = -(-inputs // run)
            scales = output * count, column // run
        case _:
            raise ValueError(f'scale {scale!r}, but it must be None, "channel" or InputGroups(n)')
    several = isinstance(granularity, InputGroups)
    number = row_shape(outputs, inputs, granularity)[0]
    return Places(
        order, stretches, output, *books, *scales, books=number, scales=count,
        system=output if several else books[0], systems=outputs if several else number,
    )  # fmt: skip


def visited(channels: np.ndarray, places: Places) -> np.ndarray:
    """Returns `[O, I]` values as `[G, I, P]`, in the order of visit."""
    groups, size = places.order.shape
    values = channels.reshape(groups // places.stretches, -1, places.stretches, size).transpose(0, 2, 3, 1)
    return np.take_along_axis(values.reshape(groups, size, -1), places.order[:, :, None], axis=1)


def channels_of(values: np.ndarray, places: Places) -> np.ndarray:
    """Returns `[G, I, P]` values in the order of visit as `[O, I]`; the inverse of `visited`."""
    groups, size, outputs = values.shape
    channels = np.empty_like(values)
    np.put_along_axis(channels, places.order[:, :, None], values, axis=1)
    channels = channels.reshape(groups // places.stretches, places.stretches, size, outputs).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(channels).reshape(-1, places.stretches * size)
