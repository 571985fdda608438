"""Scans unrolled: the same results as the scan, step by step, in both directions and for no steps at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nuqjax._src.fold.program import flatten
from nuqjax._src.trace.operations import MOVING, move


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_an_unrolled_scan_gives_what_the_scan_gives(length, reverse):
    def run(kernel, start, rows):
        def step(carry, row):
            carry = carry @ kernel + row
            return carry, (carry.sum(), row)

        return lax.scan(step, start, rows, reverse=reverse)

    rng = np.random.default_rng(0)
    arrays = [rng.integers(-3, 4, shape).astype(np.float32) for shape in ((2, 2), (2,), (length, 2))]
    scanned = jax.make_jaxpr(run)(*arrays)
    unrolled = flatten(scanned, unroll=True)
    assert "scan" not in {eqn.primitive.name for eqn in unrolled.jaxpr.eqns}
    for got, wanted in zip(
        jax.core.eval_jaxpr(unrolled.jaxpr, unrolled.consts, *arrays), jax.tree.leaves(run(*arrays)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted, strict=True)


MOVES = {
    "broadcast_in_dim": lambda x: lax.broadcast_in_dim(x, (3, 4, 2), (0, 2)),
    "convert_element_type": lambda x: x.astype(jnp.float16),
    "copy": lambda x: jnp.array(x, copy=True),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 7),
    "reshape": lambda x: x.reshape(2, 3),
    "rev": lambda x: lax.rev(x, (0,)),
    "sharding_constraint": lambda x: lax.with_sharding_constraint(
        x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "slice": lambda x: lax.slice(x, (0, 1), (3, 2), (2, 1)),
    "squeeze": lambda x: lax.squeeze(x[:, :1], (1,)),
    "transpose": lambda x: x.T,
}


@pytest.mark.parametrize("name", sorted(MOVES))
def test_a_move_says_where_each_value_goes(name):
    """Up to axes along which `broadcast_in_dim` stretches: there the array keeps length 1."""
    x = jnp.arange(6.0).reshape(3, 2)
    jaxpr = jax.make_jaxpr(MOVES[name])(x)
    found = np.asarray(x)
    for eqn in jaxpr.jaxpr.eqns:
        assert eqn.primitive.name in MOVING
        found = move(eqn, found)
    assert name in {eqn.primitive.name for eqn in jaxpr.jaxpr.eqns}
    wanted = np.asarray(MOVES[name](x))
    np.testing.assert_array_equal(np.broadcast_to(found, wanted.shape), wanted)
