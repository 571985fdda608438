"""Packing: exactly `bits` bits an index, in the documented order, whatever the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuqjax._src.leaf.packing import pack, packed_size, unpack, unpack_at
from nuqjax._src.platform.host import x64

BITS = range(1, 9)
# One compilation for every width and length would take minutes: NumPy covers all lengths up to 70, and JAX those
# around a whole number of bytes, of indices that fill whole bytes, and of nothing.
JAX_LENGTHS = (0, 1, 8, 13, 70)


def random_indices(bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([bits, *shape]).integers(0, 2**bits, shape, dtype=np.uint8)


def reference_pack(indices: np.ndarray, bits: int) -> np.ndarray:
    """By NumPy's own bit packing: each index as `bits` bits from the least significant, zeros at the row's end."""
    parts = np.unpackbits(indices[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(parts.reshape(*indices.shape[:-1], -1), axis=-1, bitorder="little")


@pytest.mark.parametrize("bits", BITS)
def test_numpy_layout_is_that_of_packbits_for_every_length(bits):
    for length in range(71):
        indices = random_indices(bits, 3, length)
        packed = pack(indices, bits)
        assert isinstance(packed, np.ndarray)
        assert packed.dtype == np.uint8
        assert packed.shape == (3, packed_size(length, bits)) == (3, -(-length * bits // 8))
        np.testing.assert_array_equal(packed, reference_pack(indices, bits))
        np.testing.assert_array_equal(unpack(packed, bits, length), indices)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", JAX_LENGTHS)
def test_jax_packs_and_unpacks_as_numpy_does(bits, length):
    indices = random_indices(bits, 2, length)
    packed = jax.jit(pack, static_argnums=1)(indices, bits)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, pack(indices, bits))
    unpacked = jax.jit(unpack, static_argnums=(1, 2))(packed, bits, length)
    assert unpacked.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked, indices)


@pytest.mark.parametrize("bits", BITS)
def test_leading_axes_are_rows_of_their_own(bits):
    indices = random_indices(bits, 2, 3, 5)
    packed = pack(indices, bits)
    assert packed.shape == (2, 3, packed_size(5, bits))
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(packed[i, j], pack(indices[i, j], bits))
    np.testing.assert_array_equal(unpack(packed, bits, 5), indices)
    assert pack(indices[0, :, :0], bits).shape == (3, 0)
    assert pack(indices[:0], bits).shape == (0, 3, packed_size(5, bits))


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
def test_round_trip_of_any_indices(bits, data):
    indices = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), np.uint8)
    packed = pack(indices, bits)
    np.testing.assert_array_equal(unpack(packed, bits, indices.size), indices)
    # Read as one number, a row is Σ index·2^(bits·position): nothing is left of the padding.
    number = sum(int(index) << (bits * i) for i, index in enumerate(indices))
    assert int.from_bytes(packed.tobytes(), "little") == number


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", [1, 13, 70])
def test_unpack_at_reads_any_positions(bits, length):
    indices = random_indices(bits, 2, length)
    rng = np.random.default_rng(length)
    positions = np.concatenate([np.arange(length), rng.integers(0, length, 71 - length), [length - 1]])
    taken = jax.jit(unpack_at, static_argnums=1)(pack(indices, bits), bits, positions)
    assert taken.dtype == jnp.uint8
    np.testing.assert_array_equal(taken, indices[:, positions])
    assert unpack_at(jnp.asarray(pack(indices, bits)), bits, jnp.zeros(0, jnp.int32)).shape == (2, 0)


def test_x64_changes_nothing():
    indices = {bits: random_indices(bits, 2, 21) for bits in BITS}

    @jax.jit
    def there_and_back(indices):
        packed = {bits: pack(i, bits) for bits, i in indices.items()}
        whole = {bits: unpack(p, bits, 21) for bits, p in packed.items()}
        return packed, whole, {bits: unpack_at(p, bits, jnp.arange(21)) for bits, p in packed.items()}

    with x64():
        packed, whole, taken = there_and_back(indices)
    for bits in BITS:
        assert packed[bits].dtype == whole[bits].dtype == taken[bits].dtype == jnp.uint8
        np.testing.assert_array_equal(packed[bits], reference_pack(indices[bits], bits))
        np.testing.assert_array_equal(whole[bits], indices[bits])
        np.testing.assert_array_equal(taken[bits], indices[bits])
