"""Two views of a *slice* (a leaf without its stack axes), and the conversions between them.

- Channels `[O, I]`: the output axes flattened to O, and the other axes, in the leaf's own order, flattened to I. This
  is the order in which indices are stored.
- Rows `[R, N]`: the channels regrouped so that each row holds exactly the values that share a codebook. A short last
  group is padded, and `row_mask` says where.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nuqjax._src.platform.host import over_blocks
from nuqjax._src.platform.types import A


@dataclass(frozen=True)
class ChannelGroups:
    """One codebook for every `size` neighbouring output channels; the last group may be short.

    >>> ChannelGroups(8)
    ChannelGroups(size=8)
    """

    size: int

    def __post_init__(self) -> None:
        _check_size(self)


@dataclass(frozen=True)
class InputGroups:
    """One codebook (or scale) for every run of `size` values along the flattened other axes of each output channel.

    The last run of a channel may be short.

    >>> InputGroups(64)
    InputGroups(size=64)
    """

    size: int

    def __post_init__(self) -> None:
        _check_size(self)


def _check_size(groups: ChannelGroups | InputGroups) -> None:
    name = type(groups).__name__
    if isinstance(groups.size, bool) or not isinstance(groups.size, int) or groups.size < 1:
        raise ValueError(f"{name}: a group size of {groups.size!r}, but it must be a whole number, 1 or more")


Granularity: TypeAlias = Literal["tensor", "channel"] | ChannelGroups | InputGroups
"""Which values share a codebook."""
Scale: TypeAlias = Literal["channel"] | InputGroups | None
"""Which values share a scale."""


_INT32_MAX = 2**31 - 1


def namespace(array: object) -> Any:
    """Returns `numpy` for a NumPy array or number, else `jax.numpy`."""
    return np if isinstance(array, np.ndarray | np.generic) else jnp


def on_mesh(array: object) -> bool:
    """Returns whether an array is distributed over several devices of a mesh; False for a traced array."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array) or len(array.devices()) == 1:
        return False
    return isinstance(array.sharding, jax.sharding.NamedSharding)


def check_granularity(granularity: object) -> None:
    """Raises ValueError unless `granularity` is one of the four kinds."""
    if not (granularity in ("tensor", "channel") or isinstance(granularity, ChannelGroups | InputGroups)):
        raise ValueError(
            f'granularity {granularity!r}, but it must be "tensor", "channel", ChannelGroups(n) or InputGroups(n)'
        )


def output_axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Returns the output axes of a slice of `ndim` axes, ascending and counted from the front.

    Raises:
      ValueError: an axis is out of range or named twice.

    >>> output_axes((-1, -2), 3)
    (1, 2)
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    wrong = [a for a in axes if not isinstance(a, int) or not -ndim <= a < ndim]
    if wrong:
        raise ValueError(f"output axis {wrong[0]!r}, but the array has {ndim} axes")
    positive = tuple(sorted(a % ndim for a in axes))
    if len(set(positive)) != len(positive):
        raise ValueError(f"output axes {axes} name an axis twice")
    return positive


def channel_shape(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, int]:
    """Returns `(O, I)`: the number of output channels of a slice and the number of values in each."""
    outputs = math.prod(shape[a] for a in axes)
    inputs = math.prod(n for a, n in enumerate(shape) if a not in axes)
    return outputs, inputs


def to_channels(array: A, axes: Sequence[int]) -> A:
    """Reorders a slice `[…]` into its channels `[O, I]`.

    >>> import jax.numpy as jnp
    >>> to_channels(jnp.arange(6).reshape(2, 3), (1,)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    order = (*axes, *(a for a in range(array.ndim) if a not in axes))
    return array.transpose(order).reshape(channel_shape(array.shape, axes))


def from_channels(channels: A, shape: Sequence[int], axes: Sequence[int]) -> A:
    """Reorders channels `[O, I]` into a slice of `shape`: the inverse of `to_channels`."""
    order = (*axes, *(a for a in range(len(shape)) if a not in axes))
    return channels.reshape([shape[a] for a in order]).transpose([order.index(a) for a in range(len(shape))])


def row_shape(outputs: int, inputs: int, granularity: Granularity) -> tuple[int, int]:
    """Returns `(R, N)`: the number of rows, so of codebooks, of channels `[O, I]`, and the values in a full row."""
    match granularity:
        case "tensor":
            return 1, outputs * inputs
        case "channel":
            return outputs, inputs
        case ChannelGroups(size):
            return -(-outputs // size), min(size, max(outputs, 1)) * inputs
        case InputGroups(size):
            return outputs * -(-inputs // size), min(size, max(inputs, 1))
    raise ValueError(f"unknown granularity {granularity!r}")


def to_rows(channels: A, granularity: Granularity) -> A:
    """Regroups channels `[O, I]` into rows `[R, N]`, with 0 where a short group is padded."""
    outputs, inputs = channels.shape
    rows, length = row_shape(outputs, inputs, granularity)
    if isinstance(granularity, ChannelGroups) and inputs:
        channels = namespace(channels).pad(channels, ((0, rows * length // inputs - outputs), (0, 0)))
    elif isinstance(granularity, InputGroups) and outputs:
        channels = namespace(channels).pad(channels, ((0, 0), (0, rows * length // outputs - inputs)))
    return channels.reshape(rows, length)


def from_rows(rows: A, outputs: int, inputs: int, granularity: Granularity) -> A:
    """Regroups rows into channels `[O, I]` and drops the padding: the inverse of `to_rows`."""
    if isinstance(granularity, InputGroups) and outputs:
        return rows.reshape(outputs, -1)[:, :inputs]
    if isinstance(granularity, ChannelGroups) and inputs:
        return rows.reshape(-1, inputs)[:outputs]
    return rows.reshape(outputs, inputs)


def row_mask(outputs: int, inputs: int, granularity: Granularity) -> np.ndarray | None:
    """Returns `[R, N]` bool, False on padding; None where no group is short."""
    rows, length = row_shape(outputs, inputs, granularity)
    if rows * length == outputs * inputs:
        return None
    return to_rows(np.ones((outputs, inputs), bool), granularity)


def row_of(output: jax.Array, input: jax.Array, inputs: int, granularity: Granularity) -> jax.Array:
    """Returns the int32 row, and so the codebook, of the value at channel `output` and position `input`.

    Args:
      output: channel numbers.
      input: positions inside the channel; the two broadcast.
      inputs: I, the number of values in a channel.
      granularity: which values share a codebook.
    """
    match granularity:
        case "tensor":
            return jnp.zeros_like(output)
        case "channel":
            return output
        case ChannelGroups(size):
            return output // min(size, _INT32_MAX)
        case InputGroups(size):
            return output * -(-inputs // size) + input // min(size, _INT32_MAX)
    raise ValueError(f"unknown granularity {granularity!r}")


def look_up(levels: A, indices: A) -> A:
    """Returns `[R, N]` the level of each index, from levels `[R, K]` and uint8 indices `[R, N]`."""
    if not isinstance(levels, np.ndarray):
        return jnp.take_along_axis(levels, indices.astype(jnp.int32), axis=-1, mode="promise_in_bounds")
    found = np.empty(indices.shape, levels.dtype)

    def block(some: slice, columns: slice) -> None:
        place = indices[some, columns] + np.arange(some.stop - some.start)[:, None] * levels.shape[-1]
        found[some, columns] = levels[some].reshape(-1)[place]

    over_blocks(block, *indices.shape)
    return found
