"""Rows: each granularity's groups against a plain description of them, and the way back."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuqjax._src.leaf.rows import (
    ChannelGroups,
    InputGroups,
    channel_shape,
    check_granularity,
    from_channels,
    from_rows,
    output_axes,
    row_mask,
    row_of,
    row_shape,
    to_channels,
    to_rows,
)

SIZES = (1, 2, 3, 5, 64)
GRANULARITIES = ("tensor", "channel", *map(ChannelGroups, SIZES), *map(InputGroups, SIZES))
granularities = st.sampled_from(GRANULARITIES)
sizes = st.integers(0, 7)


def described_rows(outputs: int, inputs: int, granularity) -> list[list[tuple[int, int]]]:
    """The (channel, position) pairs that share each codebook, in order, from the meaning of each granularity."""
    channels = [[(o, i) for i in range(inputs)] for o in range(outputs)]
    match granularity:
        case "tensor":
            return [list(itertools.chain(*channels))]
        case "channel":
            return channels
        case ChannelGroups(size):
            return [list(itertools.chain(*channels[start : start + size])) for start in range(0, outputs, size)]
        case InputGroups(size):
            return [channel[start : start + size] for channel in channels for start in range(0, inputs, size)]


@given(sizes, sizes, granularities)
def test_rows_hold_what_shares_a_codebook(outputs, inputs, granularity):
    channels = np.arange(1, outputs * inputs + 1).reshape(outputs, inputs)
    rows = to_rows(channels, granularity)
    mask = row_mask(outputs, inputs, granularity)
    wanted = described_rows(outputs, inputs, granularity)
    assert rows.shape == row_shape(outputs, inputs, granularity)
    assert rows.shape[0] == len(wanted)
    full = np.ones(rows.shape, bool) if mask is None else mask
    assert (mask is None) == all(len(group) == rows.shape[1] for group in wanted)
    for row, counted, group in zip(rows, full, wanted, strict=True):
        assert row[counted].tolist() == [channels[place] for place in group]
        assert not row[~counted].any()
        assert not np.diff(counted.astype(int)).max(initial=0) > 0, "the padding is at the end"
    np.testing.assert_array_equal(from_rows(rows, outputs, inputs, granularity), channels)


@given(sizes, sizes, granularities)
def test_row_of_agrees_with_to_rows(outputs, inputs, granularity):
    number, position = np.indices((outputs, inputs), np.int32)
    row = np.broadcast_to(row_of(number, position, inputs, granularity), number.shape)
    rows, length = row_shape(outputs, inputs, granularity)
    numbered = np.repeat(np.arange(rows), length).reshape(rows, length)
    np.testing.assert_array_equal(row, from_rows(numbered, outputs, inputs, granularity))


def test_row_of_is_int32_and_broadcasts():
    outputs, inputs = jnp.arange(6, dtype=jnp.int32)[:, None], jnp.arange(10, dtype=jnp.int32)[None]
    for granularity in GRANULARITIES:
        row = row_of(outputs, inputs, 10, granularity)
        assert row.dtype == jnp.int32
        full = row_of(*jnp.broadcast_arrays(outputs, inputs), 10, granularity)
        np.testing.assert_array_equal(jnp.broadcast_to(row, (6, 10)), full)


@pytest.mark.parametrize("granularity", [ChannelGroups(2**40), InputGroups(2**40)], ids=str)
def test_a_group_of_any_size_may_hold_everything(granularity):
    outputs, inputs = jnp.arange(3, dtype=jnp.int32)[:, None], jnp.arange(5, dtype=jnp.int32)[None]
    channels = np.arange(15).reshape(3, 5)
    rows = to_rows(channels, granularity)
    assert rows.shape == ((1, 15) if isinstance(granularity, ChannelGroups) else (3, 5))
    wanted = np.zeros((3, 5)) if isinstance(granularity, ChannelGroups) else np.arange(3)[:, None] + np.zeros((3, 5))
    np.testing.assert_array_equal(np.broadcast_to(row_of(outputs, inputs, 5, granularity), (3, 5)), wanted)


@st.composite
def slices(draw):
    """A shape of up to four axes, some of them of size zero, and any choice of its axes."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)))
    axes = draw(st.lists(st.integers(0, len(shape) - 1), unique=True, max_size=len(shape)))
    return shape, tuple(sorted(axes))


@given(slices())
def test_channels_are_the_output_axes_first_and_the_others_in_their_order(drawn):
    shape, axes = drawn
    array = np.arange(math.prod(shape)).reshape(shape)
    channels = to_channels(array, axes)
    assert channels.shape == channel_shape(shape, axes)
    others = [a for a in range(len(shape)) if a not in axes]
    position = itertools.product(*(range(shape[a]) for a in others))
    wanted = np.zeros(channels.shape, array.dtype)
    for i, place in enumerate(position):
        for o, channel in enumerate(itertools.product(*(range(shape[a]) for a in axes))):
            index = dict(zip(others, place, strict=True)) | dict(zip(axes, channel, strict=True))
            wanted[o, i] = array[tuple(index[a] for a in range(len(shape)))]
    np.testing.assert_array_equal(channels, wanted)
    np.testing.assert_array_equal(from_channels(channels, shape, axes), array)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (0, 7), (5, 0), (0, 0)], ids=str)
def test_jax_arrays_give_what_numpy_arrays_give(granularity, shape):
    channels = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    wanted = to_rows(channels, granularity)
    for rows in (
        to_rows(jnp.asarray(channels), granularity),
        jax.jit(to_rows, static_argnums=1)(channels, granularity),
    ):
        assert isinstance(rows, jax.Array)
        np.testing.assert_array_equal(rows, wanted)
        back = from_rows(rows, *shape, granularity)
        assert isinstance(back, jax.Array)
        np.testing.assert_array_equal(back, channels)
    assert jax.eval_shape(lambda x: to_rows(x, granularity), channels).shape == row_shape(*shape, granularity)


@pytest.mark.parametrize(("axis", "ndim", "wanted"), [(-1, 4, (3,)), (0, 2, (0,)), ((-1, 1), 3, (1, 2)), ((), 2, ())])
def test_output_axes_count_from_the_front(axis, ndim, wanted):
    assert output_axes(axis, ndim) == wanted


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (2, "output axis 2, but the array has 2 axes"),
        (-3, "output axis -3, but the array has 2 axes"),
        ((0, "a"), "output axis 'a', but the array has 2 axes"),
        ((0, -2), r"output axes \(0, -2\) name an axis twice"),
    ],
)
def test_wrong_output_axes(axis, message):
    with pytest.raises(ValueError, match=message):
        output_axes(axis, 2)


@pytest.mark.parametrize("kind", [ChannelGroups, InputGroups])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8", None])
def test_wrong_group_sizes(kind, size):
    with pytest.raises(
        ValueError, match=f"{kind.__name__}: a group size of {size!r}, but it must be a whole number, 1"
    ):
        kind(size)


@pytest.mark.parametrize("granularity", ["tensors", None, 8, ChannelGroups])
def test_wrong_granularities(granularity):
    with pytest.raises(ValueError, match='but it must be "tensor", "channel", ChannelGroups'):
        check_granularity(granularity)


def test_known_granularities():
    for granularity in GRANULARITIES:
        check_granularity(granularity)
