"""Meshes as `jax.make_mesh` makes them, with explicit axes (of devices forced on the host: in a process of its own)."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nuqjax
from nuqjax._src.platform.meshes import explicit_sharding, typed_spec

_PROGRAM = """
import sys

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import nuqjax
from nuqjax import Rule

rng = np.random.default_rng(0)
params = {
    "kernel": rng.standard_normal((64, 32), np.float32),
    "table": rng.standard_normal((16, 32), np.float32),
    "layers": rng.standard_normal((2, 16, 64), np.float32),
    "bias": np.zeros(32, np.float32),
}
knq = dict(bits=4, rules=[Rule("layers", stack_axes=1, skip=False)])
others = [
    dict(knq, granularity=nuqjax.InputGroups(12), method="normal"),
    dict(knq, granularity="channel", method="normal", scale="channel", codebook_format=nuqjax.QFormat(8, 5)),
]
x, ids = rng.integers(-3, 4, (8, 64)).astype(np.float32), np.array([3, 1, 15, 3])


def same(many, one):
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


def spec(x):
    return tuple(jax.typeof(x).sharding.spec)


def placed(mesh, specs, tree=params):
    return {name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P()))) for name, x in tree.items()}


def compressed(mesh, specs, options):
    one, many = nuqjax.compress(params, **options), nuqjax.compress(placed(mesh, specs), **options)
    same(many, one)
    wanted = nuqjax.shardings(one, {name: NamedSharding(mesh, specs.get(name, P())) for name in params})
    for a, sharding in zip(jax.tree.leaves(many), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.is_equivalent_to(sharding, a.ndim) and a.sharding.mesh == mesh
    dense = nuqjax.decompress(many)
    same(dense, nuqjax.decompress(one))
    return one, many, dense


def model(params, x, ids):
    def layer(h, kernel):
        return h, jnp.sum(kernel, axis=0)

    _, sums = jax.lax.scan(layer, 0.0, params["layers"])
    hidden = jax.jit(lambda x: jax.nn.relu(x @ params["kernel"] + params["bias"][None]))(x)  # a call inside
    return hidden, sums, params["table"].T[:, 3], params["table"][2:5] * 2, jnp.take(params["table"], ids, axis=0)


E = AxisType.Explicit
line = {"kernel": P("m", None), "table": P(None, "m"), "layers": P(None, None, "m")}
square = {"kernel": P("n", "m"), "table": P(None, "m"), "layers": P(None, "n", "m")}
for shape, specs in (((2,), line), ((8,), line), ((2, 2), square)):
    names, devices = ("n", "m")[2 - len(shape) :], jax.devices()[: np.prod(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(E,) * len(shape), devices=devices)
    one, many, dense = compressed(mesh, specs, knq)
    assert spec(dense["table"]) == (None, "m") and spec(dense["layers"])[2] == "m", jax.tree.map(spec, dense)
    on = NamedSharding(mesh, P())
    given = jax.device_put(x, on), jax.device_put(ids, on)
    outputs = jax.jit(nuqjax.apply(model))(many, *given)
    for n, (a, b) in enumerate(zip(outputs, model(nuqjax.decompress(one), x, ids), strict=True)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=0 if n > 1 else 1e-5)

assert [*map(spec, outputs)] == [*map(spec, jax.jit(model)(dense, *given))]
same(nuqjax.apply(model)(many, *given)[2:], outputs[2:])
for options in others:
    one, many, dense = compressed(mesh, specs, options)

# Under jit, where types alone say where an array is.
same(jax.jit(nuqjax.decompress)(many), nuqjax.decompress(one))
traced = lambda params: nuqjax.compress(params, **others[1])
same(jax.jit(traced)(placed(mesh, specs)), jax.jit(traced)(params))
levels = nuqjax.codebooks(many)
same(levels, nuqjax.codebooks(one))
same(nuqjax.decompress(nuqjax.with_codebooks(many, levels)), nuqjax.decompress(one))


def loss(levels, cparams):
    return jnp.sum(nuqjax.decompress(nuqjax.with_codebooks(cparams, levels))["kernel"] ** 2)


slopes, wanted = jax.jit(jax.grad(loss))(levels, many), jax.grad(loss)(nuqjax.codebooks(one), one)
np.testing.assert_allclose(slopes["kernel"], wanted["kernel"], rtol=1e-5)
assert spec(slopes["kernel"]) == spec(levels["kernel"])

where = placed(mesh, specs)
assert str(nuqjax.report(where, many)) == str(nuqjax.report(params, one))
assert str(nuqjax.plan(where, **knq)) == str(nuqjax.plan(params, **knq))
nuqjax.save(sys.argv[1], many)
read = nuqjax.load(sys.argv[1], sharding=jax.tree.map(lambda x: x.sharding, where))
same(read, one)
assert [*map(spec, jax.tree.leaves(read))] == [*map(spec, jax.tree.leaves(many))]
same(jax.device_put(one, nuqjax.shardings(one, on)), one)
importances = jax.tree.map(lambda x: rng.uniform(size=x.shape).astype(np.float32), params)
weighted = nuqjax.compress(where, sensitivity=placed(mesh, specs, importances), **knq)
same(weighted, nuqjax.compress(params, sensitivity=importances, **knq))
squares = lambda params, x: jnp.sum((x @ params["kernel"]) ** 2)
mattering = nuqjax.fisher(squares, where, [given[0]])["kernel"]
assert spec(mattering) == ("n", "m")
alone = nuqjax.fisher(squares, params, [x])["kernel"]
np.testing.assert_allclose(mattering, alone, atol=1e-5 * alone.max())

rows, mask, levels = where["kernel"], rng.random((64, 32)) < 0.8, np.sort(rng.standard_normal((64, 4), np.float32))
fitted, alone = (nuqjax.fit(r, 4, "normal", mask=mask) for r in (rows, params["kernel"]))
same(fitted.levels, alone.levels)
np.testing.assert_allclose(fitted.sse, alone.sse, rtol=1e-6)
assert spec(fitted.levels) == ("n", None) and spec(fitted.sse) == ("n",)
for run in (nuqjax.assign, jax.jit(nuqjax.assign)):
    indices = run(rows, jax.device_put(levels, on))
    same(indices, nuqjax.assign(params["kernel"], levels))
    assert spec(indices) == ("n", "m")

dot = lambda params, x: jax.nn.relu(x @ params["kernel"])
formats = nuqjax.calibrate(dot, many, given[0])
assert formats == nuqjax.calibrate(dot, one, x)
words = nuqjax.emulate(dot, formats)
same(words(many, given[0]), words(one, x))
programs = [nuqjax.export(dot, *args, platforms=["cpu"]).program.mlir_module() for args in ((many, given[0]), (one, x))]
assert programs[0] == programs[1]


@jax.numpy_rank_promotion("allow")  # as batch-norms of users do
def normed(p, x):
    return (x @ p["kernel"] - p["bias"]) * (1 / jnp.sqrt(p["bias"] + 1e-3))


folded, leaves = nuqjax.fold_batch_norm(normed, where, given[0])
alone, wanted = nuqjax.fold_batch_norm(normed, params, x)
same(leaves, wanted)
assert spec(leaves["kernel"]) == ("n", "m")
np.testing.assert_allclose(jax.jit(folded)(leaves, given[0]), alone(wanted, x), rtol=1e-4, atol=1e-4)

# Eager fits with a proof, and meshes of which some axes alone are explicit.
long = rng.standard_normal((4, 600), np.float32)
mixed = jax.make_mesh((2, 2), ("n", "m"), axis_types=(E, AxisType.Auto), devices=jax.devices()[:4])
alone, crossed = nuqjax.fit(long, 4), {"kernel": P("m", "n"), "table": P("n"), "layers": P(None, ("n", "m"))}
for on_mesh, of_rows in ((mesh, P("n", "m")), (mesh, P(None, ("n", "m"))), (mixed, P("n", "m")), (mixed, P("m", "n"))):
    fitted = nuqjax.fit(jax.device_put(long, NamedSharding(on_mesh, of_rows)), 4)
    same(fitted.levels, alone.levels)
    assert (fitted.lower_bound >= fitted.sse * (1 - 2e-6)).all() and fitted.levels.sharding.mesh == on_mesh
    assert spec(fitted.levels) == ("n" if of_rows[0] == "n" else None, None)
_, leaves, values = compressed(mixed, crossed, others[1])
output = jax.jit(nuqjax.apply(lambda p, x: x @ p["kernel"]))(leaves, jax.device_put(x, NamedSharding(mixed, P("m"))))
np.testing.assert_allclose(output, x @ np.asarray(values["kernel"]), rtol=1e-5, atol=1e-5)

with jax.set_mesh(mesh):  # every array is on it by default
    compressed(mesh, specs, knq)
    look_up = lambda p, ids: p["table"].at[ids].get(out_sharding=P("n", "m"))
    for lift in (lambda f: f, jax.jit):
        found = lift(nuqjax.apply(look_up))(many, given[1])
        same(found, np.asarray(dense["table"])[ids])
        assert spec(found) == ("n", "m")
print("the same bits")
"""


def test_every_public_function_takes_leaves_on_meshes_with_explicit_axes(tmp_path):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # it mostly compiles
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "many.safetensors")]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "the same bits"


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_only_explicit_axes_are_in_types(kind):
    sharding = NamedSharding(jax.make_mesh((1,), ("m",), axis_types=(kind,)), P("m"))
    array = jax.device_put(np.ones((2, 3), np.float32), sharding)
    explicit = kind == AxisType.Explicit
    assert explicit_sharding(None, np.ones(3), array) == (sharding if explicit else None)
    assert tuple(typed_spec(array)) == ("m" if explicit else None, None)
    assert tuple(typed_spec(np.ones((2, 3)))) == (None, None)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_leaf_on_one_device_of_a_mesh_is_dense_where_its_array_was(granularity):
    mesh = jax.make_mesh((1, 1), ("n", "m"), axis_types=(AxisType.Explicit,) * 2)
    for spec in (P("n", "m"), P(None, "n"), P()):
        params = {"w": jax.device_put(np.arange(1024, dtype=np.float32).reshape(32, 32), NamedSharding(mesh, spec))}
        cparams = nuqjax.compress(params, granularity=granularity)
        for dense in (nuqjax.decompress(cparams), jax.jit(nuqjax.decompress)(cparams)):
            assert jax.typeof(dense["w"]).sharding.spec == jax.typeof(params["w"]).sharding.spec
            assert jnp.abs(dense["w"] - params["w"]).max() < 64
        spec = jax.typeof(params["w"]).sharding.spec
        fitted = nuqjax.fit(params["w"], 4)
        assert jax.typeof(fitted.levels).sharding.spec == P(spec[0], None)
        assert jax.typeof(nuqjax.assign(params["w"], fitted.levels)).sharding.spec == spec
