"""Where the weights of a leaf find their codebook and their scale, in the order in which they are visited.

Values are held as `[G, I, P]`: G groups of outputs that share their inputs, the I inputs in the order of visit (of
each group its own), and the P = O/G outputs of a group side by side, so that a step for one input is one for many
outputs.
"""

from typing import Any, NamedTuple

import numpy as np

from nuqjax.rows import ChannelGroups, InputGroups, row_shape


class Places(NamedTuple):
    """Codebook and scale of the value at `[g, i, p]`: the sums of a part by output and a part by input.

    Attributes:
      order: `[G, I]` the input that is visited at each step.
      book_of_output: `[G, P]`, `book_of_input`: `[G, I]`: their sum is the codebook.
      scale_of_output: `[G, P]`, `scale_of_input`: `[G, I]`: their sum is the scale, counted in `[O, S]` row by row.
      books: R, the number of codebooks.
      scales: S, the scales of an output; 0 where there are none.
    """

    order: np.ndarray
    book_of_output: np.ndarray
    book_of_input: np.ndarray
    scale_of_output: np.ndarray
    scale_of_input: np.ndarray
    books: int
    scales: int


def places_of(outputs: int, order: np.ndarray, granularity: Any, scale: Any) -> Places:
    """The places of `[O, I]` weights whose inputs are visited in the order `[G, I]`."""
    groups, inputs = order.shape
    output = np.arange(outputs).reshape(groups, -1)
    nothing = np.zeros_like(output), np.zeros_like(order)
    match granularity:
        case "tensor":
            books = nothing
        case "channel":
            books = output, nothing[1]
        case ChannelGroups(size):
            books = output // size, nothing[1]
        case InputGroups(size):
            books = output * -(-inputs // size), order // size
        case _:
            raise ValueError(f"unknown granularity {granularity!r}")
    match scale:
        case None:
            count, scales = 0, nothing
        case "channel":
            count, scales = 1, (output, nothing[1])
        case InputGroups(size):
            count = -(-inputs // size)
            scales = output * count, order // size
        case _:
            raise ValueError(f'scale {scale!r}, but it must be None, "channel" or InputGroups(n)')
    return Places(order, *books, *scales, books=row_shape(outputs, inputs, granularity)[0], scales=count)


def visited(channels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`[O, I]` values as `[G, I, P]`, in the order of visit."""
    groups, inputs = order.shape
    values = channels.reshape(groups, -1, inputs).transpose(0, 2, 1)
    return np.take_along_axis(values, order[:, :, None], axis=1)


def channels_of(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The inverse of `visited`."""
    channels = np.empty_like(values)
    np.put_along_axis(channels, order[:, :, None], values, axis=1)
    return np.ascontiguousarray(channels.transpose(0, 2, 1)).reshape(-1, order.shape[1])
