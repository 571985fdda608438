"""`apply` under JAX's transformations, and what it does with state, names, loops and wrong uses."""

import functools
import math
import pickle
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import nuqjax
from nuqjax import InputGroups, Rule
from tests import draws
from tests.apply.test_apply import assert_near, assert_same, small

X = draws.normal(1, 3, 8)
CPARAMS = small({"w": draws.normal(2, 8, 8), "c": draws.normal(3, 3, 8, 8)}, scale=InputGroups(3))
USES = {
    "dot": lambda p, x: jnp.tanh(x @ p["w"]),
    "conv": lambda p, x: lax.conv_general_dilated(
        x[None], p["c"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0],
    "look-up": lambda p, x: x + jnp.take(p["w"], jnp.argmax(x, axis=-1), axis=0),
    "attend": lambda p, x: x @ p["w"].T,
}
TRANSFORMS = {
    "eager": (lambda f, p, x: f(p, x), lambda f, p, x: f(p, x)),
    "jit": (lambda f, p, x: jax.jit(f)(p, x), lambda f, p, x: jax.jit(lambda x: f(p, x))(x)),
    "grad": (
        lambda f, p, x: jax.jit(jax.grad(lambda x, p: jnp.sum(f(p, x) ** 2)))(x, p),
        lambda f, p, x: jax.grad(lambda x: jnp.sum(f(p, x) ** 2))(x),
    ),
    "vmap": (
        lambda f, p, x: jax.vmap(f, in_axes=(None, 0))(p, jnp.stack([x, -x])),
        lambda f, p, x: jax.vmap(lambda x: f(p, x))(jnp.stack([x, -x])),
    ),
    "scan": (
        lambda f, p, x: lax.scan(lambda c, _: ((c[0], f(*c)), None), (p, x), None, length=2)[0][1],
        lambda f, p, x: lax.scan(lambda c, _: (f(p, c), None), x, None, length=2)[0],
    ),
    "while_loop": (
        lambda f, p, x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1], f(*c[1:])), (0, p, x))[2],
        lambda f, p, x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, f(p, c[1])), (0, x))[1],
    ),
}


@pytest.mark.parametrize("closed", [False, True], ids=["argument", "closure"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transformation_of_every_use(name, closed):
    """As of the dense tree, whether the leaf holds JAX arrays or, as after `jax.device_get`, NumPy's."""
    transform = TRANSFORMS[name][closed]
    params = nuqjax.decompress(CPARAMS)
    for use in USES.values():
        expected = transform(use, params, X)
        for tree in (CPARAMS, jax.device_get(CPARAMS)):
            assert_near(transform(nuqjax.apply(use), tree, X), expected)


@pytest.mark.parametrize("closed", [False, True], ids=["argument", "closure"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_transformation_leaks_a_tracer(name, closed):
    transform = TRANSFORMS[name][closed]
    with jax.checking_leaks():
        for use in USES.values():
            jax.make_jaxpr(lambda tree, x, use=use: transform(nuqjax.apply(use), tree, x))(CPARAMS, X)


def test_compress_and_decompress_leak_no_tracer():
    with jax.checking_leaks():
        for method in ("knq", "enq", "uniform", "quantile"):
            jax.make_jaxpr(lambda p, m=method: nuqjax.decompress(nuqjax.compress(p, 3, m)))(
                {"w": draws.normal(0, 24, 16)}
            )


def test_the_arrays_of_a_leaf_are_of_jax():
    """Whoever made it: `compress` of NumPy arrays, or new levels that NumPy holds."""
    made = nuqjax.compress({"w": np.asarray(draws.normal(0, 32, 32))}, method="normal", scale="channel")
    trained = nuqjax.with_codebooks(made, jax.device_get(nuqjax.codebooks(made)))
    for tree in (made, trained):
        assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(tree))


def test_numpy_arrays_in_a_leaf_are_indexed_under_a_trace():
    stacked = small({"w": draws.normal(0, 4, 16, 16)}, rules=[Rule("w", stack_axes=1)])["w"]
    held = jax.device_get(stacked)
    got = jax.jit(lambda i: nuqjax.decompress(held[i]))(2)
    assert_same(got, nuqjax.decompress(stacked)[2])


MESH = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
PROGRAMS = USES | {
    "collective": lambda p, x: lax.psum(x @ p["w"], "m") + x,
    "scan": lambda p, x: lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=2)[0],
    "fori_loop": lambda p, x: lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c @ p["w"]), x),
    "checkpoint": lambda p, x: jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))(x),
}


class TestSharded:
    """On the one device that there is: the types are those of any mesh."""

    def mapped(self, fn):
        return jax.shard_map(fn, mesh=MESH, in_specs=(P(), P("m")), out_specs=P("m"))

    @pytest.mark.parametrize(
        ("name", "loop_bytes"), [*((name, 0) for name in PROGRAMS), ("scan", 2**20), ("fori_loop", 2**20)]
    )
    def test_inside_shard_map(self, name, loop_bytes):
        fn = PROGRAMS[name]
        expected = self.mapped(fn)(nuqjax.decompress(CPARAMS), X)
        assert_near(self.mapped(nuqjax.apply(fn))(nuqjax.decompress(CPARAMS), X), expected)
        assert_near(self.mapped(nuqjax.apply(fn, loop_bytes=loop_bytes))(CPARAMS, X), expected)

    @pytest.mark.parametrize("loop", [False, True])
    def test_a_leaf_that_varies(self, loop):
        stacked = small({"w": draws.normal(0, 1, 8, 8)}, rules=[Rule("w", stack_axes=1)])
        step = lambda p, x: jnp.tanh(x @ p["w"][0])  # noqa: E731
        fn = (lambda p, x: lax.fori_loop(0, 2, lambda _, c: step(p, c), x)) if loop else step
        got = jax.shard_map(nuqjax.apply(fn), mesh=MESH, in_specs=(P("m"), P("m")), out_specs=P("m"))(stacked, X)
        assert_near(got, fn(nuqjax.decompress(stacked), X))


class Stateful(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dropout(self.linear(x)))


def with_cache():
    attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((1, 3, 8))
    return attention


class TestState:
    """What a function changes in place in its arguments."""

    @pytest.mark.parametrize("jit", [False, True])
    @pytest.mark.parametrize("make", [lambda: Stateful(nnx.Rngs(0)), with_cache], ids=["statistics, masks", "cache"])
    def test_of_nnx_modules(self, make, jit):
        compressed = small(make(), rules=[Rule("kernel"), Rule(".", skip=True)])
        dense = nuqjax.decompress(compressed)
        call = lambda module, x: module(x)  # noqa: E731
        lifted = nnx.jit(nuqjax.apply(call)) if jit else nuqjax.apply(call)
        call = nnx.jit(call) if jit else call
        for row in X:
            assert_near(lifted(compressed, row[None, None]), call(dense, row[None, None]), terms=2**14)
        assert_near(jax.tree.leaves(nnx.state(nuqjax.decompress(compressed), nnx.Not(nnx.RngKey))),
                    jax.tree.leaves(nnx.state(dense, nnx.Not(nnx.RngKey))), terms=2**14)  # fmt: skip

    def test_of_dicts_and_lists(self):
        def step(p, x, *, count):
            p["seen"] = p["seen"] + x.sum()
            p["calls"] += 1
            count[0] = count[0] + 2
            return x @ p["w"]

        tree, count = CPARAMS | {"seen": jnp.zeros(()), "calls": 0}, [jnp.int32(1)]
        lifted = nuqjax.apply(step)
        for _ in range(2):
            assert_same(lifted(tree, X, count=count), X @ nuqjax.decompress(CPARAMS)["w"])
        assert (tree["calls"], int(count[0])) == (2, 5)
        assert_near(tree["seen"], 2 * X.sum())
        assert tree["w"] is CPARAMS["w"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: p.update(w=p["w"] * 2), "changes a compressed leaf in place, argument 0, w"),
            (lambda p: p.update(new=1), "adds argument 0, new"),
            (lambda p: p.pop("c"), "takes away argument 0, c"),
            (lambda p: p["net"].eval(), "changes a static field of its argument 0"),
        ],
    )
    def test_what_cannot_be_written_back_is_named(self, change, message):
        tree = CPARAMS | {"net": Stateful(nnx.Rngs(0))}
        with pytest.raises(ValueError, match=message):
            nuqjax.apply(lambda p: (change(p), None)[1])(tree)


LOOPS = {
    "scan": lambda p, x: lax.scan(lambda c, _: (jnp.tanh(c @ p["w"] @ p["w"].T), None), x, None, length=2)[0],
    "while": lambda p, x: lax.while_loop(lambda c: c.max() < 9, lambda c: c + jnp.abs(c @ p["w"] @ p["w"]) + 1, x),
    "nested": lambda p, x: lax.scan(
        lambda c, _: (lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c @ p["w"]), c), None), x, None, length=2
    )[0],
}


class TestLoops:
    def decoded(self, fn, *args):
        """How many look-ups of levels and products stand outside of loops, and how many inside."""
        counts = [0, 0]

        def visit(jaxpr, inside):
            for eqn in jaxpr.eqns:
                counts[inside] += eqn.primitive.name in ("gather", "codebook_product")
                for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        visit(inner, inside or eqn.primitive.name in ("scan", "while"))

        visit(jax.make_jaxpr(fn)(*args).jaxpr, False)
        return tuple(counts)

    @pytest.mark.parametrize("name", LOOPS)
    def test_what_a_loop_closes_over_is_decoded_once(self, name):
        fn, size = LOOPS[name], CPARAMS["w"].size * 4
        assert self.decoded(nuqjax.apply(fn), CPARAMS, X) == (1, 0)
        assert self.decoded(nuqjax.apply(fn, loop_bytes=size), CPARAMS, X) == (1, 0)
        outside, inside = self.decoded(nuqjax.apply(fn, loop_bytes=size - 1), CPARAMS, X)
        assert not outside
        assert inside
        expected = fn(nuqjax.decompress(CPARAMS), X)
        for loop_bytes in (0, size):
            assert_near(nuqjax.apply(fn, loop_bytes=loop_bytes)(CPARAMS, X), expected)

    def test_as_many_as_fit(self):
        tree = dict.fromkeys("abc", CPARAMS["w"])
        fn = lambda p, x: lax.fori_loop(0, 2, lambda _, c: c @ p["a"] @ p["b"] @ p["c"], x)  # noqa: E731
        assert self.decoded(nuqjax.apply(fn, loop_bytes=2 * 8 * 8 * 4), tree, X) == (2, 1)

    def test_look_ups_stay_look_ups(self):
        step = lambda p, c: c + jnp.take(p["w"], jnp.argmax(c, axis=-1), axis=0)  # noqa: E731
        fn = lambda p, x: lax.fori_loop(0, 2, lambda _, c: step(p, c), x)  # noqa: E731
        assert self.decoded(nuqjax.apply(fn), CPARAMS, X)[0] == 0
        assert_near(nuqjax.apply(fn)(CPARAMS, X), fn(nuqjax.decompress(CPARAMS), X))


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ["dot", "loop"])
def test_linear_transpose(name, outer):
    dot = lambda p, x: x @ p["w"]  # noqa: E731
    fn = dot if name == "dot" else lambda p, x: lax.scan(lambda c, _: (dot(p, c), None), x, None, length=2)[0]
    [got] = jax.linear_transpose(lambda x: outer(nuqjax.apply(fn, loop_bytes=0))(CPARAMS, x), X)(X)
    [expected] = jax.linear_transpose(lambda x: fn(nuqjax.decompress(CPARAMS), x), X)(X)
    assert_near(got, expected)


def test_outputs_are_arrays_of_the_types_that_jit_gives():
    fn = lambda p, x: (True, 1.5, 2, jnp.float32(3), np.arange(3), p["w"].shape[0], x, x > 0, jnp.bfloat16(1))  # noqa: E731
    got, expected = nuqjax.apply(fn)(CPARAMS, np.ones(2, np.float16)), jax.jit(fn)(CPARAMS, np.ones(2, np.float16))
    for a, b in zip(got, expected, strict=True):
        assert type(a) is type(b)
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        np.testing.assert_array_equal(a, b)


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Sequential([nn.Dense(8), jax.jit(nn.relu), nn.remat(nn.Dense)(8)])(x)
        return nn.RNN(nn.SimpleCell(8))(x[None])


def test_operations_keep_their_names():
    """As profilers show them: the name stacks of the dense model."""

    def names(fn, params):
        text = jax.jit(fn).lower(params, X).as_text(debug_info=True)
        return sorted(set(re.findall(r'"([^"]*Dense[^"]*/dot_general)[:"]', text)))

    model = Named()
    params = draws.variables(model.init, X)
    expected = names(model.apply, params)
    assert any("Sequential_0" in name for name in expected)
    assert set(expected) == set(names(nuqjax.apply(model.apply), small(params)))


def test_checkpoint_policies_survive():
    """What the policy saves is not computed again for the derivative; without it, it is."""

    def sines(policy):
        inside = jax.checkpoint(lambda p, x: jnp.sin(jnp.sin(x @ p["w"])).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(lambda x: nuqjax.apply(inside)(CPARAMS, x)))(X)).count(" sin ")

    everything, nothing = jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable
    assert sines(everything) < sines(nothing)


@nuqjax.apply
def decorated(p, x):
    return x @ p["w"]


def module_level(p, x):
    return x @ p["w"]


class TestTheLiftedFunction:
    @pytest.mark.parametrize(
        "lifted", [decorated, nuqjax.apply(module_level), nuqjax.apply(functools.partial(module_level, x=X))]
    )
    def test_pickles(self, lifted):
        again = pickle.loads(pickle.dumps(lifted))
        args = (CPARAMS,) if isinstance(lifted.__wrapped__, functools.partial) else (CPARAMS, X)
        assert_same(again(*args), lifted(*args))

    def test_pickles_with_its_choice(self):
        lifted = nuqjax.apply(math.hypot, loop_bytes=5)
        assert pickle.loads(pickle.dumps(lifted))._loop_bytes == 5

    def test_is_named_and_binds_as_a_function(self):
        class Model:
            def __init__(self):
                self.scale = 2

            @nuqjax.apply
            def run(self, p, x):
                """Doc."""
                return self.scale * (x @ p["w"])

        assert (Model.run.__name__, Model.run.__doc__) == ("run", "Doc.")
        assert_same(Model().run(CPARAMS, X), 2 * (X @ nuqjax.decompress(CPARAMS)["w"]))


class TestWrongUses:
    @pytest.mark.parametrize(
        ("call", "wanted"),
        [
            (lambda: nuqjax.apply(nn.Dense(3)), "nuqjax.apply(model.apply)(cparams, x)"),
            (lambda: nuqjax.apply(small(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))), "lambda model, x: model(x)"),
            (lambda: nuqjax.apply(nnx.Linear(8, 8, rngs=nnx.Rngs(0))), "lambda model, x: model(x)"),
            (lambda: nuqjax.apply(eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))), "lambda model, x: model(x)"),
            (lambda: nuqjax.apply(CPARAMS), "nuqjax.apply(fn)(cparams, x)"),
            (lambda: nuqjax.apply(functools.partial(module_level, CPARAMS)), "nuqjax.apply(fn)(cparams, x)"),
            (lambda: nuqjax.apply(module_level, CPARAMS), "nuqjax.apply(fn)(cparams, x)"),
            (lambda: nuqjax.apply(module_level, CPARAMS, X), "nuqjax.apply(fn)(cparams, x)"),
        ],
    )  # fmt: skip
    def test_of_apply(self, call, wanted):
        with pytest.raises(TypeError, match=re.escape(wanted)):
            call()

    def test_functions_that_are_trees_are_taken(self):
        partial = jax.tree_util.Partial(lambda b, p, x: x @ p["w"] + b, jnp.ones((1, 8)))
        assert_same(nuqjax.apply(partial)(CPARAMS, X), partial(nuqjax.decompress(CPARAMS), X))

    @pytest.mark.parametrize(
        "use",
        [
            lambda w: X @ w,
            lambda w: w @ X.T,
            lambda w: w + 1,
            lambda w: jnp.dot(X, w),
            lambda w: jnp.take(w, 0, axis=0),
            lambda w: w.T,
            lambda w: w[...],
            lambda w: w[0],
            lambda w: w.astype(jnp.bfloat16),
            lambda w: nnx.merge(*nnx.split(small(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))))(X),
            lambda w: small(eqx.nn.Linear(8, 8, key=jax.random.key(0)), axis=0)(X[0]),
            lambda w: small(eqx.nn.Embedding(8, 8, key=jax.random.key(0)))(0),
            lambda w: nuqjax.apply(lambda x: x @ w)(X),
        ],
    )
    def test_a_leaf_in_code_for_arrays_names_apply(self, use):
        with pytest.raises((TypeError, IndexError, AttributeError), match=r"nuqjax\.apply"):
            use(CPARAMS["w"])

    @pytest.mark.parametrize(
        "use",
        [
            lambda f, c: jax.vmap(f)(c),
            lambda f, c: lax.scan(lambda h, layer: (h, f(layer)), 0.0, c),
            lambda f, c: f(jax.tree.map(lambda a: a[0], c)),
        ],
        ids=["vmap", "scan", "tree.map"],
    )
    def test_slices_of_what_is_no_stack_name_the_leaf_and_the_rule(self, use):
        tree = {"w": small(draws.normal(0, 8, 8), granularity="channel", bits=1)}
        for fn in (nuqjax.apply(lambda p: p["w"].sum()), nuqjax.decompress):
            with pytest.raises(ValueError, match="stack_axes=1") as caught:
                use(fn, tree)
            assert fn is nuqjax.decompress or "argument 0, w" in str(caught.value)

    def test_trained_indices_name_codebooks(self):
        tree = jax.tree.map(lambda a: a.astype(jnp.float32), CPARAMS)
        with pytest.raises(ValueError, match=r"(?s)argument 0, c: .*float32.*nuqjax\.codebooks"):
            nuqjax.apply(module_level)(tree, X)
