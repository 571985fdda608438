"""Rows and leaves distributed over meshes (of devices forced on the host, so in a process of its own)."""

import os
import subprocess
import sys

_PROGRAM = """
import re

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

import nuqjax
from nuqjax.fit_knq import _fit_on_mesh

assert jax.device_count() == 8
values = np.random.default_rng(0).standard_t(3, (2, 2**17)).astype(np.float32)


def mesh_of(shape, names):
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, names, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def gathered(rows, num_levels):  # bytes that any one operation brings together from all devices
    given = dict(weights=None, mask=None, sharding=rows.sharding, keep_zero=False, tolerance=None)
    text = _fit_on_mesh.lower(rows, num_levels, **given).compile().as_text()
    kinds = set(re.findall(r" (all-[a-z-]+|collective-[a-z]+)\\(", text))
    assert kinds <= {"all-reduce", "all-reduce-start", "all-reduce-done"}, kinds
    sizes = {"s32": 4, "u32": 4, "s64": 8, "f32": 4, "f64": 8}
    reduced = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\\(", line)]
    assert reduced
    shapes = [shape for line in reduced for shape in re.findall(r"(\\w+)\\[([\\d,]*)\\]", line.split(" all-reduce")[0])]
    return max(sizes[kind] * int(np.prod([int(n) for n in size.split(",") if n])) for kind, size in shapes)


for dtype, num_levels, devices, spec in (
    (np.float32, 4, 2, P(None, "d")),
    (np.float32, 4, 8, P(None, "d")),
    (np.float32, 4, 2, P("d")),
    (np.float32, 16, 4, P(None, "d")),
    (jnp.bfloat16, 16, 8, P(None, "d")),
):
    rows = jnp.asarray(values, dtype)
    one = nuqjax.fit(rows, num_levels, tolerance=None)
    placed = jax.device_put(rows, NamedSharding(mesh_of((devices,), ("d",)), spec))
    fitted = nuqjax.fit(placed, num_levels, tolerance=None)
    np.testing.assert_array_equal(fitted.levels, one.levels)
    np.testing.assert_array_equal(fitted.scale, one.scale)
    if num_levels == 4 and devices == 8:  # counts and sums below some cuts
        assert gathered(placed, num_levels) < rows.nbytes / 10
    if dtype == jnp.bfloat16:  # a table of bit patterns
        assert gathered(placed, num_levels) <= 2 * 4 * 2**16

rng = np.random.default_rng(1)
params = {
    "a": jnp.asarray(rng.standard_t(3, (256, 64)), jnp.float32),
    "b": jnp.asarray(rng.standard_normal((3, 64, 32)), jnp.float32),
}
mesh = mesh_of((2, 4), ("data", "model"))
specs = {"a": P("data", "model"), "b": P(None, "data", "model")}
placed = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
heavy = {name: jnp.asarray(rng.uniform(size=leaf.shape), jnp.float32) for name, leaf in params.items()}
for options in ({"granularity": "channel", "keep_zero": True}, {"sensitivity": heavy}):
    options = {"rules": [nuqjax.Rule("b", stack_axes=1, skip=False)], "bits": 2} | options
    one, many = nuqjax.compress(params, **options), nuqjax.compress(placed, **options)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)
print("the same bits")
"""


def test_levels_and_indices_are_the_same_bits_on_any_mesh_and_no_array_is_gathered():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "the same bits"
