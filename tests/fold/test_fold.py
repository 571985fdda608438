"""`fold_batch_norm`: the folded function and the folded parameters against the function as it was.

Tolerances: a sum of K products in float32, then n roundings, is off by at most (K + n)·u times the sum of the
magnitudes of everything added (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1); the magnitudes
come from the same function on absolute values.
"""

import functools

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from jax import lax
from jax.extend import core

import nuqjax
from nuqjax._src.fold.fold import fold_batch_norm
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.platform.host import x64

pytestmark = pytest.mark.promotes  # the models do, and folding runs them
ROUNDINGS = 16  # at most, beside those of the sum: of the chain, of the kernel's cast, of the offset


def unit(dtype):
    """The unit roundoff of a dtype."""
    return float(jnp.finfo(dtype).eps) / 2


def named(function, tree):
    """A tree with `function(name, leaf)` in place of its floating leaves."""

    def leaf(path, x):
        return function(path_name(path), x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree_util.tree_map_with_path(leaf, tree)


def drawn(tree, seed=0):
    """Normal draws in place of the floating leaves; variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(name, x):
        values = rng.normal(size=x.shape)
        return jnp.asarray(np.abs(values) + 0.1 if "var" in name else values, x.dtype)

    return named(draw, tree)


def magnitude(fn, params, x):
    """The sum of the magnitudes of all that is added up in an affine `fn` whose means alone are subtracted."""
    absolute = named(lambda name, p: -jnp.abs(p) if "mean" in name else jnp.abs(p), params)
    return np.asarray(fn(absolute, jnp.abs(x)), np.float64)


def primitives(jaxpr):
    """The names of all primitives of a jaxpr, inside calls, too, but of indices: by JAX 0.7 a stride is a gather."""
    names = []
    for eqn in jaxpr.eqns:
        if not all(jnp.issubdtype(var.aval.dtype, jnp.integer) for var in eqn.outvars):
            names.append(eqn.primitive.name)
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                names += primitives(getattr(inner, "jaxpr", inner))
    return names


def arithmetic(fn, *args):
    """The additions, products and roots of a function."""
    kinds = ("add", "sub", "mul", "div", "rsqrt", "sqrt", "neg")
    return [name for name in primitives(jax.make_jaxpr(fn)(*args).jaxpr) if name in kinds]


def assert_folded(fn, params, x, terms, also_unfolded=True):
    """Folds an affine function of sums of `terms` products, and checks all that holds for every one."""
    folded_fn, folded = fold_batch_norm(fn, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    for new, old in zip(jax.tree.leaves(folded), jax.tree.leaves(params), strict=True):
        assert (new.shape, new.dtype, type(new)) == (old.shape, old.dtype, type(old))
    expected = fn(params, x)
    arrays = (*jax.tree.leaves(params), x, expected)
    coarsest = max(unit(p.dtype) for p in arrays if jnp.issubdtype(p.dtype, jnp.floating))
    tolerance = 2 * (terms * unit(jnp.float32) + ROUNDINGS * coarsest) * magnitude(fn, params, x)
    variants = [folded_fn, jax.jit(folded_fn), *([fn] if also_unfolded else [])]
    for variant in variants:
        got = variant(folded, x)
        assert got.dtype == expected.dtype
        error = np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
        assert (error <= tolerance).all(), (error / tolerance).max()
    more = jax.ShapeDtypeStruct((len(x) + 1, *x.shape[1:]), x.dtype)  # another batch size
    assert jax.eval_shape(folded_fn, folded, more).shape == (len(x) + 1, *expected.shape[1:])
    return folded_fn, folded


class Layer(nn.Module):
    """A layer and its batch-norm."""

    layer: nn.Module
    norm: nn.Module

    def __call__(self, x):
        return self.norm(self.layer(x))


IMAGES = (2, 6, 5, 4)
VECTORS = (3, 8)
LINEN = {
    "conv": (nn.Conv(6, (3, 3), use_bias=False), IMAGES, 36),
    "conv with bias": (nn.Conv(6, (3, 3)), IMAGES, 37),
    "strided, dilated": (nn.Conv(6, (3, 3), strides=2, kernel_dilation=2, padding="VALID"), (2, 9, 8, 4), 37),
    "one channel": (nn.Conv(1, (3, 3)), IMAGES, 37),
    "one dimension": (nn.Conv(6, (3,)), (2, 7, 4), 13),
    "batch axes": (nn.Conv(6, (3,)), (2, 3, 7, 4), 13),
    "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False), IMAGES, 9),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), IMAGES, 19),
    "transposed": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), IMAGES, 37),
    "transposed kernel": (nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True), IMAGES, 37),
    "dense": (nn.Dense(6, use_bias=False), VECTORS, 8),
    "dense with bias": (nn.Dense(6), VECTORS, 9),
    "dense, two features": (nn.DenseGeneral((2, 6)), VECTORS, 9),
    "dense, two axes": (nn.DenseGeneral(6, axis=(-2, -1), use_bias=False), (3, 4, 2), 8),
    "bfloat16 parameters": (nn.Conv(6, (3, 3), param_dtype=jnp.bfloat16), IMAGES, 37),
    "bfloat16": (nn.Conv(6, (3, 3), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), IMAGES, 37),
}


@pytest.mark.parametrize("affine", ["scale bias", "scale", "bias", ""])
@pytest.mark.parametrize("case", LINEN)
def test_linen(case, affine):
    layer, shape, terms = LINEN[case]
    norm = nn.BatchNorm(
        use_running_average=True,
        use_scale="scale" in affine,
        use_bias="bias" in affine,
        epsilon=1e-3,
        param_dtype=layer.param_dtype,
        dtype=layer.dtype,
    )
    model = Layer(layer, norm)
    x = drawn(jnp.zeros(shape, layer.dtype or jnp.float32), seed=1)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    folded_fn, folded = assert_folded(model.apply, variables, x, terms)
    biased, slot = layer.use_bias, "bias"
    if not biased and "bias" not in affine:
        slot = "mean"
    assert arithmetic(folded_fn, folded, x) == ["sub" if slot == "mean" else "add"]
    if not biased:
        unchanged = folded["batch_stats" if slot == "mean" else "params"]["norm"][slot]
        assert np.any(np.asarray(unchanged) != 0)
    stats = folded["batch_stats"]["norm"]
    np.testing.assert_allclose(np.asarray(stats["var"], np.float64), 1 - 1e-3, rtol=0, atol=unit(stats["var"].dtype))
    if slot != "mean":
        np.testing.assert_array_equal(np.asarray(stats["mean"]), 0)
    if "scale" in affine:
        np.testing.assert_array_equal(np.asarray(folded["params"]["norm"]["scale"]), 1)
    if biased and "bias" in affine:
        np.testing.assert_array_equal(np.asarray(folded["params"]["norm"]["bias"]), 0)


class Net(nn.Module):
    """Two layers, a residual and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.relu(x + norm()(nn.Conv(8, (3, 3))(x)))
        with jax.named_scope("pooled"):
            x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(5)(x)


@pytest.fixture(scope="module")
def net():
    model, x = Net(), drawn(jnp.zeros((4, 8, 8, 3)), seed=2)
    return model, drawn(jax.eval_shape(model.init, jax.random.key(0), x)), x


def test_linen_network(net):
    """Rectifiers do not enlarge an error, so what holds for one layer holds along every path through them."""
    model, variables, x = net
    folded_fn, folded = fold_batch_norm(model.apply, variables, x)
    tolerance = 2 * (3 * ROUNDINGS + 28 + 73 + 65 + 9) * unit(jnp.float32) * magnitude(model.apply, variables, x)
    for got in (folded_fn(folded, x), model.apply(folded, x)):
        assert (np.abs(got - model.apply(variables, x)) <= tolerance).all()
    assert arithmetic(folded_fn, folded, x) == ["add", "add", "add", "div", "add"]


def test_scopes_and_derivatives_stay(net):
    model, variables, x = net
    folded_fn, folded = fold_batch_norm(model.apply, variables, x)
    eqns = jax.make_jaxpr(folded_fn)(folded, x).eqns
    scopes = {eqn.primitive.name: str(eqn.source_info.name_stack) for eqn in eqns}
    assert scopes["conv_general_dilated"] == "Net/Conv_1"
    assert scopes["dot_general"] == "Net/Dense_0"
    assert scopes["reduce_sum"].startswith("Net/pooled")
    assert next(str(e.source_info.name_stack) for e in eqns if e.primitive.name == "add") == "Net/BatchNorm_0"
    assert "custom_jvp_call" in scopes  # relu's derivative at 0 is its own
    zeros = jax.tree.map(jnp.zeros_like, folded)
    grads = jax.grad(lambda p: folded_fn(p, x).sum())(zeros)["params"]
    np.testing.assert_array_equal(grads["BatchNorm_0"]["bias"], 0)


def test_options(net):
    model, variables, x = net
    folded_fn, folded = fold_batch_norm(model.apply, variables, x, train=False)
    expected = folded_fn(folded, x)
    np.testing.assert_array_equal(folded_fn(folded, x, train=False), expected)
    with pytest.raises(ValueError, match="other batch-norms"):
        folded_fn(folded, x, train=True, mutable=["batch_stats"])


def test_compressed(net):
    model, variables, x = net
    folded_fn, folded = fold_batch_norm(model.apply, variables, x)
    cparams = nuqjax.compress(folded, bits=8, method="normal", min_size=0)
    decoded = folded_fn(nuqjax.decompress(cparams), x)
    np.testing.assert_array_equal(nuqjax.apply(folded_fn)(cparams, x), decoded)
    with pytest.raises(ValueError, match="fold first"):
        fold_batch_norm(model.apply, cparams, x)


def test_emulated(net):
    """No site of the integer path is a batch-norm's."""
    model, variables, x = net
    folded_fn, folded = fold_batch_norm(model.apply, variables, x)
    formats = nuqjax.calibrate(folded_fn, folded, x, word=16, weight_word=16)
    assert not [site for site in formats.rows if "BatchNorm" in site]
    got, expected = nuqjax.emulate(folded_fn, formats)(folded, x), folded_fn(folded, x)
    # Half a word of each of three layers' outputs, weights and inputs, each with a gain of at most the magnitude's.
    assert np.abs(got - expected).max() <= 16 * 2.0**-16 * magnitude(model.apply, variables, x).max()


@pytest.mark.parametrize("evaluation", ["eval", "use_running_average"])
def test_nnx(evaluation):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_running_average=evaluation != "eval", rngs=rngs)

        def __call__(self, x):
            return self.norm(self.conv(x))

    model = Model(nnx.Rngs(0))
    if evaluation == "eval":
        model.eval()
    graph, state = nnx.split(model)
    state, x = drawn(state), drawn(jnp.zeros(IMAGES), seed=1)
    folded_fn, folded = assert_folded(lambda state, x: nnx.merge(graph, state)(x), state, x, 37)
    assert arithmetic(folded_fn, folded, x) == ["add"]
    np.testing.assert_array_equal(folded["norm"]["mean"][...], 0)


def test_nnx_statistics_that_are_constants():
    """What is no parameter is folded, too, but cannot become an identity."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    params, rest, x = drawn(params), drawn(rest, seed=3), drawn(jnp.zeros(VECTORS), seed=1)
    rest = named(lambda name, p: jnp.abs(p) + 0.5 if "var" in name else -jnp.abs(p), rest)  # as `magnitude` wants them

    def fn(params, x):
        return nnx.merge(graph, params, rest)(x)

    folded_fn, folded = assert_folded(fn, params, x, 9, also_unfolded=False)
    assert arithmetic(folded_fn, folded, x) == ["add"]


def test_equinox():
    """A model of single examples under `vmap`, channels first, its statistics biased by a counter."""

    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(4, 6, 3, key=key)
            self.norm = eqx.nn.BatchNorm(6, "batch", mode="batch")

        def __call__(self, x, state):
            return self.norm(self.conv(x), state, inference=True)[0]

    arrays, static = eqx.partition(eqx.nn.make_with_state(Model)(jax.random.key(0, impl="rbg")), eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    rng = np.random.default_rng(0)
    leaves = [x + 5 if x.dtype == jnp.int32 else jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
    mean, var = (len(leaves) - 2, len(leaves) - 1)
    leaves[mean], leaves[var] = -jnp.abs(leaves[mean]), jnp.abs(leaves[var]) + 0.1
    arrays = structure.unflatten(leaves)

    def fn(arrays, x):
        model, state = eqx.combine(arrays, static)
        return jax.vmap(lambda x: model(x, state), axis_name="batch")(x)

    x = drawn(jnp.zeros((2, 4, 6, 5)), seed=1)
    absolute = structure.unflatten([p if n == mean else jnp.abs(p) for n, p in enumerate(leaves)])
    tolerance = 2 * (37 + ROUNDINGS) * unit(jnp.float32) * fn(absolute, jnp.abs(x))
    folded_fn, folded = fold_batch_norm(fn, arrays, x)
    for got in (folded_fn(folded, x), fn(folded, x)):
        assert (jnp.abs(got - fn(arrays, x)) <= tolerance).all()
    assert arithmetic(folded_fn, folded, x) == ["add"]


# ---------------------------------------------------------------------------------------------------------------------
# Plain functions. Every leaf is a vector by channel but the kernel.


def vectors(names, channels=6, seed=0, **others):
    shapes = dict.fromkeys(names.split(), channels) | others
    return drawn({name: jnp.zeros(shape) for name, shape in shapes.items()}, seed)


def placed(x):
    return lax.with_sharding_constraint(x, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


EPS = 1e-3
FORMS = {
    "reference": (lambda y, p: (y - p["mean"]) * (p["g"] / jnp.sqrt(p["var"] + EPS)) + p["b"], ["add"]),
    "by a quotient": (lambda y, p: (y - p["mean"]) / jnp.sqrt(p["var"] + EPS) * p["g"] + p["b"], ["add"]),
    "by a power": (lambda y, p: (y - p["mean"]) * (p["var"] + EPS) ** -0.5 * p["g"] + p["b"], ["add"]),
    "precomputed": (lambda y, p: y * p["g"] + p["b"], ["add"]),
    "no offset": (lambda y, p: y * (p["g"] * lax.rsqrt(p["var"])), []),
    "parameters first": (lambda y, p: p["b"] + (p["g"] * lax.rsqrt(p["var"] + EPS)) * (-p["mean"] + y), ["add"]),
    "a jitted function": (jax.jit(lambda y, p: (y - p["mean"]) / jnp.sqrt(p["var"] + EPS) + p["b"]), ["add"]),
    "twice": (lambda y, p: ((y - p["mean"]) * p["g"] + p["b"]) / jnp.sqrt(p["var"]), ["add"]),
    "softplus": (lambda y, p: (y - p["mean"]) * jax.nn.softplus(p["g"]) + p["b"], ["add"]),
    "explicitly broadcast": (
        lambda y, p: (y - jnp.broadcast_to(p["mean"], y.shape)) * jnp.broadcast_to(p["g"], y.shape) + p["b"],
        ["add"],
    ),
    "behind a placement": (lambda y, p: (placed(y) - p["mean"]) * placed(p["g"]) + p["b"], ["add"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_plain_forms(form):
    norm, left = FORMS[form]
    params, x = vectors("mean var g b", kernel=(8, 6)), drawn(jnp.zeros(VECTORS), seed=1)
    fn = lambda p, x: norm(x @ p["kernel"], p)  # noqa: E731
    for layer in (fn, jax.checkpoint(fn)):
        folded_fn, folded = assert_folded(layer, params, x, 8, also_unfolded=form != "softplus")
        assert arithmetic(folded_fn, folded, x) == left


@pytest.mark.parametrize("sign", [1, -1])
def test_offset_in_a_sum_of_parameters(sign):
    """x·s + (b − m·s) has no leaf that is added alone; nor has x·s − (m·s − b)."""

    def fn(p, x):
        scale = p["g"] * lax.rsqrt(p["var"] + EPS)
        shift = p["b"] - p["mean"] * scale if sign == 1 else p["mean"] * scale - p["b"]
        return x @ p["kernel"] * scale + shift if sign == 1 else x @ p["kernel"] * scale - shift

    params, x = vectors("mean var g b", kernel=(8, 6)), drawn(jnp.zeros(VECTORS), seed=1)
    folded_fn, folded = assert_folded(fn, params, x, 8)
    assert arithmetic(folded_fn, folded, x) == ["add"]
    np.testing.assert_array_equal(folded["mean"], 0)


STEPS = {
    "add": lambda y, p: y + p,
    "sub": lambda y, p: y - p,
    "from": lambda y, p: p - y,
    "mul": lambda y, p: y * p,
    "div": lambda y, p: y / p,
    "neg": lambda y, p: -y,
    "twice": lambda y, p: y * 2,
}


@settings(max_examples=40)
@given(
    ops=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=7),
    by_channel=st.lists(st.booleans(), min_size=7, max_size=7),
    seed=st.integers(0, 2**16),
)
def test_any_affine_chain(ops, by_channel, seed):
    """Any order and number of steps, by vectors or scalars, against float64; the magnitudes are kept beside."""
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(4, 3)).astype(np.float32)}
    for n in range(len(ops)):
        value = rng.uniform(0.5, 2, size=3 if by_channel[n] else ()) * rng.choice([-1, 1])
        params[f"p{n}"] = np.asarray(value, np.float32)

    def fn(p, x):
        y = x @ p["kernel"]
        for n, op in enumerate(ops):
            y = STEPS[op](y, p[f"p{n}"])
        return y

    x = rng.normal(size=(2, 4)).astype(np.float32)
    exact, size = x.astype(np.float64) @ params["kernel"], np.abs(x).astype(np.float64) @ np.abs(params["kernel"])
    for n, op in enumerate(ops):
        p = params[f"p{n}"].astype(np.float64)
        exact = STEPS[op](exact, p)
        size = STEPS[{"sub": "add", "from": "add", "neg": "add"}.get(op, op)](size, np.abs(p) * (op != "neg"))
    folded_fn, folded = fold_batch_norm(fn, params, x)
    tolerance = 2 * (4 + ROUNDINGS) * unit(np.float32) * size
    assert (np.abs(folded_fn(folded, x) - exact) <= tolerance).all()

    fixed = [n for n, op in enumerate(ops) if op not in ("neg", "twice")]
    sums = [n for n in fixed if ops[n] in ("add", "sub", "from")]
    varies = any(by_channel[n] for n in fixed if sums and n >= sums[0])  # the offset, by channel
    has_place = not varies or any(by_channel[n] for n in sums)
    left = [{"from": "sub", "twice": "mul"}.get(op, op) for op in ops]
    if len(fixed) > len(sums) and has_place:
        left = left[fixed[-1] + 1 :]
        assert arithmetic(folded_fn, folded, x) in ([["add", *left], ["sub", *left]] if sums else [left])
    else:
        assert arithmetic(folded_fn, folded, x) == left


# ---------------------------------------------------------------------------------------------------------------------
# From the kernel back to its leaf.


def conv(x, kernel, layout="HWIO"):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", layout, "NHWC"))


def norm(y, p):
    return (y - p["mean"]) * (p["g"] / jnp.sqrt(p["var"] + EPS)) + p["b"]


KERNELS = {
    "another layout": (lambda p, x: conv(x, p["kernel"], "OIHW"), (6, 4, 3, 3), IMAGES, 36),
    "transposed": (lambda p, x: conv(x, p["kernel"].transpose(2, 3, 1, 0)), (6, 4, 3, 3), IMAGES, 36),
    "reshaped": (lambda p, x: conv(x, p["kernel"].reshape(3, 3, 4, 6)), (9, 24), IMAGES, 36),
    "flipped": (lambda p, x: conv(x, p["kernel"][::-1, ::-1]), (3, 3, 4, 6), IMAGES, 36),
    "a slice": (lambda p, x: conv(x, p["kernel"][1]), (3, 3, 3, 4, 6), IMAGES, 36),
    "cast": (lambda p, x: conv(x, p["kernel"].astype(jnp.bfloat16).astype(x.dtype)), (3, 3, 4, 6), IMAGES, 36),
    "on the left": (lambda p, x: jnp.einsum("oi,bi->ob", p["kernel"], x).T, (6, 8), VECTORS, 8),
    "transposed dot": (lambda p, x: x @ p["kernel"].T, (6, 8), VECTORS, 8),
    "einsum": (lambda p, x: jnp.einsum("bij,ijo->bo", x, p["kernel"]), (2, 4, 6), (3, 2, 4), 8),
}


@pytest.mark.parametrize("case", KERNELS)
def test_kernel_leaf(case):
    layer, kernel, shape, terms = KERNELS[case]
    params, x = vectors("mean var g b", kernel=kernel), drawn(jnp.zeros(shape), seed=1)
    if case == "cast":  # so that the cast of the scaled kernel is as exact as the scale allows
        params["kernel"] = params["kernel"].astype(jnp.bfloat16)
    folded_fn, folded = assert_folded(lambda p, x: norm(layer(p, x), p), params, x, terms)
    assert arithmetic(folded_fn, folded, x) == ["add"]
    if case == "a slice":  # the others are as they were
        np.testing.assert_array_equal(folded["kernel"][0], params["kernel"][0])
        np.testing.assert_array_equal(folded["kernel"][2], params["kernel"][2])


def test_experts():
    """A batched dot whose batch axis is the kernel's, too: a scale for each expert and channel."""
    params = drawn({"kernel": jnp.zeros((3, 4, 6)), **{n: jnp.zeros((3, 1, 6)) for n in ("mean", "var", "g", "b")}})
    x = drawn(jnp.zeros((3, 5, 4)), seed=1)
    fn = lambda p, x: norm(jnp.einsum("ebi,eio->ebo", x, p["kernel"]), p)  # noqa: E731
    folded_fn, folded = fold_batch_norm(fn, params, x)
    tolerance = 2 * (4 + ROUNDINGS) * unit(jnp.float32) * magnitude(fn, params, x)
    for got in (folded_fn(folded, x), fn(folded, x)):
        assert (np.abs(got - fn(params, x)) <= tolerance).all()
    assert arithmetic(folded_fn, folded, x) == ["add"]


@pytest.mark.parametrize("reverse", [False, True])
def test_scanned_layers(reverse):
    """Layers stacked for a `scan`, each with its own batch-norm, are folded each into its slice."""
    params = drawn({"kernel": jnp.zeros((3, 6, 6)), **{n: jnp.zeros((3, 6)) for n in ("mean", "var", "g", "b")}})
    x = drawn(jnp.zeros((2, 6)), seed=1)

    def fn(params, x):
        def layer(x, p):
            y = norm(x @ p["kernel"], p)
            return y, y.sum()

        y, sums = lax.scan(layer, x, params, reverse=reverse)
        return y + 0 * sums[0]

    folded_fn, folded = fold_batch_norm(fn, params, x)
    tolerance = 2 * 3 * (6 + ROUNDINGS) * unit(jnp.float32) * magnitude(fn, params, x)
    for got in (folded_fn(folded, x), fn(folded, x)):
        assert (np.abs(got - fn(params, x)) <= tolerance).all()
    assert arithmetic(folded_fn, folded, x)[:3] == ["add"] * 3


def test_shared_module():
    """A layer with its batch-norm that runs twice is folded once; the second run sees the same kernel."""
    params, x = vectors("mean var g b", kernel=(6, 6)), drawn(jnp.zeros((2, 6)), seed=1)

    def fn(p, x):
        return norm(norm(x @ p["kernel"], p) @ p["kernel"], p)

    folded_fn, folded = fold_batch_norm(fn, params, x)
    tolerance = 2 * 2 * (6 + ROUNDINGS) * unit(jnp.float32) * magnitude(fn, params, x)
    for got in (folded_fn(folded, x), fn(folded, x)):
        assert (np.abs(got - fn(params, x)) <= tolerance).all()
    assert arithmetic(folded_fn, folded, x) == ["add", "add"]


def test_leaves_used_elsewhere_stay():
    """A batch-norm's leaf that has another use keeps its value; the offset goes where it may."""
    params, x = vectors("mean var g b", kernel=(8, 6)), drawn(jnp.zeros(VECTORS), seed=1)
    fn = lambda p, x: (norm(x @ p["kernel"], p), p["b"] * p["g"])  # noqa: E731
    folded_fn, folded = fold_batch_norm(fn, params, x)
    np.testing.assert_array_equal(folded["b"], params["b"])
    np.testing.assert_array_equal(folded["g"], params["g"])
    [expected, other], [got, same] = fn(params, x), folded_fn(folded, x)
    np.testing.assert_array_equal(same, other)
    tolerance = 2 * (8 + ROUNDINGS) * unit(jnp.float32) * magnitude(lambda p, x: fn(p, x)[0], params, x)
    assert (np.abs(got - expected) <= tolerance).all()


def test_x64():
    """With x64 on, float64 stays float64: the difference falls with its unit roundoff."""
    with x64():
        params = jax.tree.map(lambda p: p.astype(jnp.float64), vectors("mean var g b", kernel=(8, 6)))
        x = drawn(jnp.zeros(VECTORS, jnp.float64), seed=1)
        fn = lambda p, x: norm(x @ p["kernel"], p)  # noqa: E731
        folded_fn, folded = fold_batch_norm(fn, params, x)
        tolerance = 2 * (8 + ROUNDINGS) * unit(jnp.float64) * magnitude(fn, params, x)
        for got in (folded_fn(folded, x), fn(folded, x)):
            assert got.dtype == jnp.float64
            assert (np.abs(got - fn(params, x)) <= tolerance).all()


# ---------------------------------------------------------------------------------------------------------------------
# What is not folded.


def pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def weight_standardised(p):
    return p["kernel"] - p["kernel"].mean((0, 1, 2))


REFUSED = {
    "a pool": (lambda p, x: norm(pool(conv(x, p["kernel"])), p), "follows reduce_window_max"),
    "a rectifier": (lambda p, x: norm(jax.nn.relu(conv(x, p["kernel"])), p), "follows custom_jvp_call"),
    "the input": (lambda p, x: norm(x, {n: p[n][:4] for n in ("mean", "var", "g", "b")}), "the function's input"),
    "a residual": (lambda p, x: norm(conv(x, p["kernel"]) + x[..., :1], p), "follows add"),
    "an accumulator with another use": (
        lambda p, x: (lambda y: norm(y, p) + y)(conv(x, p["kernel"])),
        "'kernel' is used elsewhere",
    ),
    "a sum of the accumulator with another use": (
        lambda p, x: (lambda y: norm(y, p) + y)(conv(x, p["kernel"]) + p["b"]),
        "what add at 'here' gives is used elsewhere",
    ),
    "a computed kernel": (lambda p, x: norm(conv(x, weight_standardised(p)), p), "computed from 'kernel'"),
    "a constant kernel": (lambda p, x: norm(conv(x, jnp.ones((3, 3, 4, 6))), p), "whose kernel is not a parameter"),
    "a kernel used elsewhere": (
        lambda p, x: (norm(conv(x, p["kernel"]), p), jnp.abs(p["kernel"]).max()),
        "its kernel 'kernel' is used elsewhere",
    ),
    "a kernel that is an output": (
        lambda p, x: (norm(conv(x, p["kernel"]), p), p["kernel"]),
        "its kernel 'kernel' is used elsewhere",
    ),
    "more than channels": (
        lambda p, x: norm(conv(x, p["kernel"]), {n: v.reshape(6, 1) if v.ndim == 1 else v for n, v in p.items()}),
        "more than the channels",
    ),
    "a branch": (
        lambda p, x: lax.cond(x.sum() > 0, lambda x: norm(conv(x, p["kernel"]), p), lambda x: conv(x, p["kernel"]), x),
        "inside a cond",
    ),
    "an offset of more entries than its leaf": (
        lambda p, x: (conv(x, p["kernel"]) - p["scalar"]) * lax.rsqrt(p["var"] + EPS),
        "take its offset",
    ),
    "an offset that is a product": (
        lambda p, x: conv(x, p["kernel"]) * lax.rsqrt(p["var"] + EPS) + p["mean"] * p["g"],
        "take its offset",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """The error names the scope, the leaves and the reason; `skip` leaves it alone."""
    inner, reason = REFUSED[case]

    def fn(p, x):
        with jax.named_scope("here"):
            return inner(p, x)

    params = vectors("mean var g b", kernel=(3, 3, 4, 6), scalar=())
    x = drawn(jnp.zeros((2, 6, 6, 4)), seed=1)
    with pytest.raises(ValueError, match="cannot fold") as error:
        fold_batch_norm(fn, params, x)
    assert reason in str(error.value)
    assert "here" in str(error.value)
    if case != "a branch":
        assert "var" in str(error.value)
    for skip in ("here", ["nothing|here"], *([] if case == "a branch" else ["^var$"])):
        folded_fn, folded = fold_batch_norm(fn, params, x, skip=skip)
        for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, b)
        for got, expected in zip(jax.tree.leaves(folded_fn(folded, x)), jax.tree.leaves(fn(params, x)), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_refused_flat_features():
    """A batch-norm over all features of a flattened convolution has a scale for each position."""
    params = drawn({"kernel": jnp.zeros((3, 3, 4, 6)), **{n: jnp.zeros(180) for n in ("mean", "var", "g", "b")}})
    x = jnp.zeros(IMAGES)
    with pytest.raises(ValueError, match="channels of the kernel 'kernel' are reshaped"):
        fold_batch_norm(lambda p, x: norm(conv(x, p["kernel"]).reshape(len(x), -1), p), params, x)


def test_shared_kernel_with_different_scales():
    params = vectors("mean var g b mean2 var2 g2 b2", kernel=(8, 6))
    second = {"mean": "mean2", "var": "var2", "g": "g2", "b": "b2"}

    def fn(p, x):
        return norm(x @ p["kernel"], p) + norm(2 * x @ p["kernel"], {n: p[second[n]] for n in second})

    x = jnp.zeros(VECTORS)
    with pytest.raises(ValueError, match="leaf 'kernel' is used more than once"):
        fold_batch_norm(fn, params, x)
    with pytest.raises(ValueError, match="its kernel 'kernel' is used elsewhere"):
        fold_batch_norm(fn, params, x, skip="2$")  # the other would change its kernel
    _, folded = fold_batch_norm(fn, params, x, skip=["2$", "g$"])
    np.testing.assert_array_equal(folded["kernel"], params["kernel"])


def test_skip_one(net):
    model, variables, x = net
    folded_fn, folded = fold_batch_norm(model.apply, variables, x, skip="BatchNorm_1")
    np.testing.assert_array_equal(folded["params"]["Conv_1"]["kernel"], variables["params"]["Conv_1"]["kernel"])
    assert arithmetic(folded_fn, folded, x).count("rsqrt") == 1


@pytest.mark.parametrize(("skip", "message"), [("BatchNorm_7", "matches no leaf"), ("(", "not a regular expression")])
def test_wrong_skip(net, skip, message):
    model, variables, x = net
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(model.apply, variables, x, skip=skip)


def test_needs_values(net):
    model, variables, x = net
    shapes = jax.eval_shape(lambda v: v, variables)
    with pytest.raises(ValueError, match="is a ShapeDtypeStruct"):
        fold_batch_norm(model.apply, shapes, x)
    with pytest.raises(ValueError, match="fold outside jit"):
        jax.jit(lambda v: fold_batch_norm(model.apply, v, x)[1])(variables)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (nn.Dense(6), {}),
        (nn.Sequential([nn.Dense(6), nn.LayerNorm()]), {}),
        (nn.Sequential([nn.Dense(6), nn.RMSNorm()]), {}),
        (nn.Sequential([nn.Dense(6), nn.BatchNorm(use_running_average=False)]), {"mutable": ["batch_stats"]}),
        (nn.MultiHeadDotProductAttention(2), {}),
        (nn.LSTMCell(4), {"cell": True}),
    ],
    ids=["dense", "layer norm", "rms norm", "training", "attention", "cell"],
)
def test_nothing_to_fold(module, options):
    """Statistics of the batch or the example are no parameters: all is as it was, bit for bit."""
    x = drawn(jnp.zeros((3, 8)), seed=1)
    options = dict(options)
    args = (module.initialize_carry(jax.random.key(0), x.shape), x) if options.pop("cell", False) else (x,)
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), *args))
    folded_fn, folded = fold_batch_norm(module.apply, variables, *args, **options)
    expected = module.apply(variables, *args, **options)
    for got, wanted in ((folded, variables), (folded_fn(folded, *args), expected)):
        assert jax.tree.structure(got) == jax.tree.structure(wanted)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            if jax.__version_info__ >= (0, 9):
                np.testing.assert_array_equal(a, b)
            else:  # more of jax.numpy was compiled by itself
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_what_the_function_changes_in_place_is_written_back():
    def predict(params, x, seen, *, count):
        seen["sum"] = seen["sum"] + x.sum()
        count[0] += 1
        y = x @ params["kernel"]
        return y * (params["scale"] / jnp.sqrt(params["var"] + 1e-3))

    params = {"kernel": np.eye(4, 3, dtype="f4"), "scale": np.ones(3, "f4"), "var": np.ones(3, "f4")}
    x, seen, count = np.ones((1, 4), "f4"), {"sum": jnp.float32(0)}, [0]
    folded, new = fold_batch_norm(predict, params, x, seen, count=count)
    assert (float(seen["sum"]), count) == (0, [0])  # of an example nothing is kept
    for _ in range(2):
        folded(new, x, seen, count=count)
    assert (float(seen["sum"]), count) == (8, [2])
    with pytest.raises(ValueError, match=r"fold_batch_norm: the function adds argument 0, new"):
        fold_batch_norm(lambda p, x: (p.update(new=1), x @ p["kernel"])[1], dict(params), x)
