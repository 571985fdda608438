"""KNQ's pure path leaves the process and comes back: one exported program for CPU, GPU and TPU, the same bits."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from nuqjax import Fit, fit

PLATFORMS = ("cpu", "cuda", "tpu")
LENGTHS = {64: 8, 1000: 2, 5000: 1}  # values in a row to rows
cases = pytest.mark.parametrize(
    ("num_levels", "length", "weighted"),
    [
        (16, 64, True),
        (16, 1000, False),
        # On the other versions the two above are enough, and they are quicker to compile.
        pytest.param(16, 5000, True, marks=[pytest.mark.slow, pytest.mark.versionless]),
        pytest.param(256, 5000, True, marks=[pytest.mark.slow, pytest.mark.versionless]),
    ],
)


def arrays_of(length, weighted):
    """Heavy-tailed rows; a tenth of the weights are zero, and a tenth of the values is masked."""
    generator = np.random.default_rng(length)
    rows = generator.standard_t(3, (LENGTHS[length], length)).astype(np.float32)
    if not weighted:
        return {"rows": rows}
    weights = np.where(generator.uniform(size=rows.shape) < 0.1, 0, generator.exponential(size=rows.shape))
    return {
        "rows": rows,
        "weights": weights.astype(np.float32),
        "mask": generator.uniform(size=rows.shape) < 0.9,
    }


def program(num_levels, weighted):
    return jax.jit(lambda arrays: tuple(fit(num_levels=num_levels, keep_zero=weighted, **arrays)))


@functools.cache
def traced_result(num_levels, length, weighted):
    """Compiled once for both tests."""
    return program(num_levels, weighted)(arrays_of(length, weighted))


def same_bits(first, second, fields=Fit._fields):
    for name in fields:
        one, other = (np.asarray(getattr(Fit(*fitted), name)) for fitted in (first, second))
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32), err_msg=name)


@cases
def test_export_gives_the_same_bits(num_levels, length, weighted):
    arrays = arrays_of(length, weighted)
    exported = jax.export.export(program(num_levels, weighted), platforms=PLATFORMS)(arrays)
    assert exported.platforms == PLATFORMS
    again = jax.export.deserialize(exported.serialize())
    fitted = again.call(arrays)
    same_bits(fitted, traced_result(num_levels, length, weighted))
    bound, sse = np.asarray(fitted[2]), np.asarray(fitted[1])
    assert (bound <= sse).all()
    assert (np.asarray(fitted[0]) == 0).any(axis=1).all() or not weighted


@cases
def test_arrays_at_hand_give_the_same_levels_as_traced_ones(num_levels, length, weighted):
    """What is known of a bound may differ by path; what is fitted may not."""
    arrays = arrays_of(length, weighted)
    traced = traced_result(num_levels, length, weighted)
    at_hand = {name: jnp.asarray(array) for name, array in arrays.items()}
    same_bits(fit(num_levels=num_levels, keep_zero=weighted, **at_hand), traced, ("levels", "scale"))
