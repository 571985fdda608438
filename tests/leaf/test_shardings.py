"""Placing a compressed tree on a mesh of eight devices (forced on the host, so in a process of its own)."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import nuqjax

_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import nuqjax

assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
shapes = {"w": (64, 32), "v": (32, 16)}
params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
specs = {"w": P(None, "model"), "v": P("model", None)}
placed = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
x = jax.device_put(rng.normal(size=(8, 64)).astype(np.float32), NamedSharding(mesh, P("data", None)))
lifted = jax.jit(nuqjax.apply(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]))
for options in (dict(granularity="channel"), dict(), dict(scale="channel")):
    cparams = nuqjax.compress(params, bits=4, method="normal", **options)
    shardings = nuqjax.shardings(cparams, placed)
    on_mesh = jax.device_put(cparams, shardings)
    assert on_mesh["w"].packed.addressable_shards[0].data.shape[0] == 8  # 32 channels on four devices
    assert on_mesh["v"].packed.addressable_shards[0].data.shape[1] == 4  # 32 indices of four bits on four devices
    for a, b in zip(jax.tree.leaves(nuqjax.decompress(on_mesh)), jax.tree.leaves(nuqjax.decompress(cparams))):
        np.testing.assert_array_equal(a, b)
    expected = lifted(cparams, np.asarray(x))
    np.testing.assert_allclose(lifted(on_mesh, x), expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
print("placed")
"""


def test_on_a_mesh_of_eight():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _PROGRAM]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "placed" in finished.stdout


@pytest.fixture(scope="module")
def one_device():
    return jax.make_mesh((1,), ("model",))


def test_stack_axes_keep_their_places(one_device):
    params = {"w": jnp.zeros((3, 16, 32))}
    cparams = nuqjax.compress(params, method="normal", rules=[nuqjax.Rule("w", stack_axes=1)])
    placed = nuqjax.shardings(cparams, NamedSharding(one_device, P("model", None, None)))["w"]
    assert placed.packed.spec == P("model", None, None)
    assert placed.levels.spec == P("model", None, None)


def test_errors(one_device):
    cparams = nuqjax.compress({"w": jnp.zeros((16, 32))}, method="normal")
    with pytest.raises(ValueError, match="the trees differ"):
        nuqjax.shardings(cparams, {"v": NamedSharding(one_device, P())})
    with pytest.raises(ValueError, match="not a NamedSharding"):
        nuqjax.shardings(cparams, SingleDeviceSharding(jax.devices()[0]))


@pytest.mark.parametrize(
    ("shape", "axis", "spec", "packed"),
    [
        ((16, 8), -1, P("m", None), P(None, "m")),  # 8 indices of 3 bits on each device: 3 bytes
        ((8, 16), -1, P("m", None), P(None, None)),  # 4 of 3 bits are no whole bytes
        ((8, 15), -1, P(None, "m"), P(None, None)),  # 15 channels are not parted in two
        ((15, 8), -1, P("m", None), P(None, None)),
        ((4, 4, 8), -1, P("m", None, None), P(None, "m")),  # the first of the flattened axes: a run of each
        ((4, 4, 8), -1, P(None, "m", None), P(None, None)),  # the second: not a run
        ((8, 4, 4), (1, 2), P(None, "m", None), P("m", None)),
        ((8, 4, 4), (1, 2), P(None, None, "m"), P(None, None)),
    ],
)
def test_an_axis_is_parted_only_where_each_part_is_a_run_of_whole_bytes(shape, axis, spec, packed):
    mesh = jax.sharding.AbstractMesh((2,), ("m",))
    leaf = nuqjax.compress({"w": jnp.ones(shape)}, 3, "normal", axis=axis, rules=nuqjax.Rule("w", skip=False))["w"]
    assert nuqjax.shardings(leaf, NamedSharding(mesh, spec)).packed.spec == packed
