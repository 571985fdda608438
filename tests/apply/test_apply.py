"""`apply`: the unchanged model on compressed leaves, against the model on the decompressed tree."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.extend import core

import nuqjax
from nuqjax import ChannelGroups, CodebookArray, InputGroups, Rule
from nuqjax._src.platform.host import x64
from tests import draws

EPS = 2.0**-24  # unit roundoff of float32


def is_leaf(x):
    return isinstance(x, CodebookArray)


def small(params, **options):
    """A cheap compression of every leaf with two axes or more."""
    return nuqjax.compress(params, **{"bits": 4, "method": "normal", "min_size": 0} | options)


# Before, more of jax.numpy was compiled by itself, where XLA multiplies and adds in one step. What is lifted does not.
LESS_INSIDE = jax.__version_info__ >= (0, 9)


def assert_same(got, expected):
    """Equal trees, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if LESS_INSIDE or not jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=1e-3, atol=1e-5)


def assert_near(got, expected, terms=64):
    """Equal but for the order of sums of at most `terms` terms: γ of the largest magnitude, or two ulp of bfloat16."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        eps = float(jnp.finfo(b.dtype).eps) if jnp.issubdtype(b.dtype, jnp.floating) else 0
        largest = float(jnp.max(jnp.abs(b.astype(jnp.float32)), initial=0))
        difference = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)), initial=0))
        assert difference <= max(4 * terms * EPS, 2 * eps) * largest


IMAGE = draws.normal(1, 2, 8, 8, 6)
SEQUENCE = draws.normal(2, 2, 10, 12)

LINEAR = {
    "Conv": (nn.Conv(12, (3, 3)), IMAGE),
    "Conv, strided": (nn.Conv(12, (3, 3), strides=2), IMAGE),
    "Conv, dilated": (nn.Conv(12, (3, 3), kernel_dilation=2), IMAGE),
    "Conv, grouped": (nn.Conv(12, (3, 3), feature_group_count=3), IMAGE),
    "Conv, depthwise": (nn.Conv(6, (3, 3), feature_group_count=6), IMAGE),
    "ConvTranspose": (nn.ConvTranspose(12, (3, 3), strides=(2, 2)), IMAGE),
    "Dense": (nn.Dense(40), IMAGE),
    "DenseGeneral, several outputs": (nn.DenseGeneral((4, 10)), IMAGE),
    "DenseGeneral, several inputs": (nn.DenseGeneral(32, axis=(-2, -1)), IMAGE),
    "Einsum": (nn.Einsum((6, 40), "...d,dh->...h"), IMAGE),
    "ConvLocal": (nn.ConvLocal(8, (3, 3)), IMAGE),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(name):
    """Bit for bit eagerly; under jit within twice the bound of a dot product, γ_K Σ|x||w|."""
    model, x = LINEAR[name]
    cparams = small(draws.variables(model.init, x))
    assert any(map(is_leaf, jax.tree.leaves(cparams, is_leaf=is_leaf)))
    params = nuqjax.decompress(cparams)
    expected = model.apply(params, x)
    assert_same(nuqjax.apply(model.apply)(cparams, x), expected)
    jitted = jax.jit(nuqjax.apply(model.apply))(cparams, x)
    magnitude = model.apply(jax.tree.map(jnp.abs, params), jnp.abs(x))
    terms = 2 + max(np.prod(leaf.shape[:-1]) for leaf in jax.tree.leaves(params))
    gamma = terms * EPS / (1 - terms * EPS)
    assert (jnp.abs(jitted - expected) <= 2 * gamma * magnitude).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(granularity="channel"),
        dict(granularity=ChannelGroups(5)),
        dict(granularity=InputGroups(7)),
        dict(scale="channel"),
        dict(scale=InputGroups(5), granularity="channel"),
        dict(codebook_format=nuqjax.QFormat(8, 6)),
        dict(codebook_format="float8_e4m3fn", scale="channel"),
        dict(bits=3),
        dict(axis=(-2, -1)),
    ],
    ids=str,
)
def test_every_layout(options):
    model = nn.Conv(12, (3, 3))
    cparams = small(draws.variables(model.init, IMAGE), **options)
    expected = model.apply(nuqjax.decompress(cparams), IMAGE)
    assert_same(nuqjax.apply(model.apply)(cparams, IMAGE), expected)
    assert_near(jax.jit(nuqjax.apply(model.apply))(cparams, IMAGE), expected)


class Classifier(nn.Module):
    """Convolutions, batch-norm, dropout, a dense head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.max_pool(x, (2, 2), (2, 2)))
        return nn.Dense(10)(nn.LayerNorm()(x.reshape(x.shape[0], -1)))


class Embedder(nn.Module):
    """An embedding with its table tied to the output layer."""

    dtype: object = None

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(64, 16, dtype=self.dtype)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(embed(ids)))


IDS = jnp.array([[1, 2, 63], [0, 3, 7]])
MODELS = {
    "Classifier": (Classifier(), IMAGE),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16), SEQUENCE),
    "Embed and attend": (Embedder(), IDS),
    "Embed and attend, bfloat16": (Embedder(dtype=jnp.bfloat16), IDS),
    "Dense, bfloat16": (nn.Dense(40, dtype=jnp.bfloat16), IMAGE),
    "Conv, bfloat16": (nn.Conv(12, (3, 3), dtype=jnp.bfloat16), IMAGE),
    "Dense, bfloat16 parameters": (nn.Dense(40, param_dtype=jnp.bfloat16), IMAGE),
    "WeightNorm": (nn.WeightNorm(nn.Dense(40)), IMAGE),
    "LSTM": (nn.RNN(nn.LSTMCell(16)), SEQUENCE),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model, x = MODELS[name]

    def run(*arguments):
        with jax.numpy_dtype_promotion("standard"):  # as models of one dtype on parameters of another need
            return model.apply(*arguments)

    cparams = small(draws.variables(model.init, x))
    expected = run(nuqjax.decompress(cparams), x)
    same = assert_near if name == "LSTM" else assert_same  # a loop is compiled, also when it is run eagerly
    same(nuqjax.apply(run)(cparams, x), expected)
    assert_near(jax.jit(nuqjax.apply(run))(cparams, x), expected, terms=256)


def test_static_arguments_and_mutable_collections():
    model = Classifier()
    variables = draws.variables(model.init, IMAGE)
    cvariables = small(variables)
    options = dict(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3, impl="rbg")})
    got = nuqjax.apply(model.apply)(cvariables, IMAGE, **options)
    assert_same(got, model.apply(nuqjax.decompress(cvariables), IMAGE, **options))
    assert set(got[1]) == {"batch_stats"}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(32)(x)), None


class Stack(nn.Module):
    """Five layers with stacked parameters."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_stacked_layers(remat):
    model, x = Stack(remat), SEQUENCE[0, :2].repeat(4, axis=-1)[:, :32]
    cparams = small(draws.variables(model.init, x), rules=[Rule("kernel", stack_axes=1)])
    lifted = nuqjax.apply(model.apply)
    assert_near(lifted(cparams, x), model.apply(nuqjax.decompress(cparams), x))

    def loss(levels):
        return jnp.sum(lifted(nuqjax.with_codebooks(cparams, levels), x) ** 2)

    def dense_loss(levels):
        return jnp.sum(model.apply(nuqjax.decompress(nuqjax.with_codebooks(cparams, levels)), x) ** 2)

    levels = nuqjax.codebooks(cparams)
    assert_near(jax.jit(jax.grad(loss))(levels), jax.grad(dense_loss)(levels), terms=1024)


def largest_intermediate(fn, *args) -> int:
    """The most values that any equation of the traced function gives, nested ones included."""

    def of(jaxpr) -> int:
        sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
        inner = [of(getattr(p, "jaxpr", p)) for eqn in jaxpr.eqns for p in subjaxprs(eqn)]
        return max([0, *sizes, *inner])

    return of(jax.make_jaxpr(fn)(*args).jaxpr)


def subjaxprs(eqn):
    for parameter in eqn.params.values():
        for candidate in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(candidate, core.ClosedJaxpr | core.Jaxpr):
                yield candidate


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("granularity", ["tensor", "channel", InputGroups(32)])
@pytest.mark.parametrize("scale", [None, InputGroups(8)])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_look_up_decodes_only_its_rows(axis, granularity, scale, bits):
    vocabulary, features = 512, 64
    table = {"embedding": draws.normal(0, vocabulary, features)}
    ctable = small(table, axis=axis, granularity=granularity, scale=scale, bits=bits)
    ids = jnp.array([[3, 511, 0], [7, 7, 100]])

    def look_up(params, ids):
        return jnp.take(params["embedding"], ids, axis=0)

    lifted = nuqjax.apply(look_up)
    assert_same(lifted(ctable, ids), look_up(nuqjax.decompress(ctable), ids))
    # the stored arrays themselves are sliced; nothing of the table's size is made
    stored = max(leaf.size for leaf in jax.tree.leaves(ctable))
    assert largest_intermediate(lifted, ctable, ids) <= max(ids.size * features, stored)
    assert stored < vocabulary * features


@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_look_ups_out_of_bounds(mode):
    table = small({"w": draws.normal(0, 20, 16)})
    ids = jnp.array([0, 15] if mode == "promise_in_bounds" else [-1, -21, 0, 19, 20, 99])
    for look_up in (lambda w: w.at[ids].get(mode=mode), lambda w: w.at[:, ids].get(mode=mode)):
        fn = lambda p: look_up(p["w"])  # noqa: E731, B023
        assert_same(nuqjax.apply(fn)(table), fn(nuqjax.decompress(table)))


SLICES = {
    "rows": lambda w, i: w[3:7],
    "columns": lambda w, i: w[:, 2:9:3],
    "both": lambda w, i: w[3:7, 2:9],
    "dynamic row": lambda w, i: lax.dynamic_slice_in_dim(w, i, 4, 0),
    "dynamic column": lambda w, i: lax.dynamic_slice_in_dim(w, i, 4, 1),
    "dynamic, moved inside": lambda w, i: lax.dynamic_slice_in_dim(w, i + 1000, 4, 0),
    "dynamic both": lambda w, i: lax.dynamic_slice(w, (i, i), (3, 4)),
    "one row": lambda w, i: w[i],
    "one value": lambda w, i: w[i, 3],
    "many values": lambda w, i: w[jnp.array([1, 2]), jnp.array([3, 4])],
    "mask": lambda w, i: jnp.where(w > 0, w, 0),
    "transpose, slice": lambda w, i: w.T[2:5],
    "cast, slice": lambda w, i: w.astype(jnp.bfloat16)[2:5],
    "reshape": lambda w, i: w.reshape(-1, 8) @ jnp.ones(8),
    "flip": lambda w, i: w[::-1],
    "concatenate": lambda w, i: jnp.concatenate([w, w]),
    "broadcast": lambda w, i: w[None] * jnp.ones((2, 1, 1)),
    "expand, squeeze": lambda w, i: jnp.squeeze(w[None], 0) + 1,
    "write": lambda w, i: w.at[i].set(0.0),
    "sort": lambda w, i: jnp.sort(w, axis=0),
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_and_shapes(name):
    fn = lambda p, i: SLICES[name](p["w"], i)  # noqa: E731
    cparams = small({"w": draws.normal(0, 24, 16)})
    assert_same(nuqjax.apply(fn)(cparams, 5), fn(nuqjax.decompress(cparams), 5))
    got = jax.jit(nuqjax.apply(fn))(cparams, jnp.int32(5))
    assert_near(got, fn(nuqjax.decompress(cparams), jnp.int32(5)))


STACK_SLICES = {
    "static index": lambda w, i: w[1],
    "static slice": lambda w, i: w[1:3] * 2,
    "computed index": lambda w, i: w[i],
    "computed slice": lambda w, i: lax.dynamic_slice_in_dim(w, i, 2, 0),
    "experts": lambda w, i: w[jnp.array([3, 0, 3])],
    "experts, computed": lambda w, i: jnp.take(w, jnp.array([0, 1]) + i, axis=0),
    "row of all": lambda w, i: w[:, 2],
    "row, look-up": lambda w, i: jnp.take(w, jnp.array([2, 5]), axis=1),
    "cast, index": lambda w, i: w.astype(jnp.bfloat16)[i],
    "scan": lambda w, i: lax.scan(lambda c, layer: (jnp.tanh(c @ layer), None), jnp.ones((2, 16)), w)[0],
    "vmap": lambda w, i: jax.vmap(lambda layer: layer @ jnp.ones(16))(w),
    "transposed scan": lambda w, i: lax.scan(lambda c, m: (c + m.sum(), None), 0.0, w.swapaxes(0, 1))[0],
}


@pytest.mark.parametrize("name", STACK_SLICES)
def test_stack_axes(name):
    fn = lambda p, i: STACK_SLICES[name](p["w"], i)  # noqa: E731
    cparams = small({"w": draws.normal(0, 4, 16, 16)}, rules=[Rule("w", stack_axes=1)])
    expected = fn(nuqjax.decompress(cparams), 2)
    same = assert_near if "scan" in name else assert_same
    same(nuqjax.apply(fn)(cparams, 2), expected)
    assert_near(jax.jit(nuqjax.apply(fn))(cparams, jnp.int32(2)), expected)


@pytest.mark.parametrize("name", ["static index", "computed index", "scan"])
def test_a_slice_of_the_stack_is_decoded_alone(name):
    fn = lambda p, i: STACK_SLICES[name](p["w"], i)  # noqa: E731
    cparams = small({"w": draws.normal(0, 4, 16, 16)}, rules=[Rule("w", stack_axes=1)])
    stored = max(leaf.size for leaf in jax.tree.leaves(cparams))
    assert largest_intermediate(nuqjax.apply(fn), cparams, jnp.int32(2)) <= max(16 * 16, stored)
    assert stored < 4 * 16 * 16


def test_tied_weights():
    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    cparams, x = small({"w": draws.normal(0, 12, 40)}), SEQUENCE
    assert_same(nuqjax.apply(fn)(cparams, x), fn(nuqjax.decompress(cparams), x))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(6, 12, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.head = nnx.Linear(12, 10, rngs=rngs)
        self.embed = nnx.Embed(32, 10, rngs=rngs)

    def __call__(self, x, ids):
        x = nnx.relu(self.norm(self.conv(x), use_running_average=True)).mean((1, 2))
        return self.embed.attend(self.head(x)) + self.embed(ids).sum()


def test_nnx_module_and_state():
    graph, state = nnx.split(nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0))))
    state, ids = draws.filled(state), jnp.array([3, 31])
    model = nnx.merge(graph, state)
    of_state = lambda state, x, ids: nnx.merge(graph, state)(x, ids)  # noqa: E731
    of_module = lambda module, x, ids: module(x, ids)  # noqa: E731
    for fn, params in ((of_state, state), (of_module, model)):
        cparams = small(params)
        expected = fn(nuqjax.decompress(cparams), IMAGE, ids)
        assert_same(nuqjax.apply(fn)(cparams, IMAGE, ids), expected)
        assert_near(jax.jit(nuqjax.apply(fn))(cparams, IMAGE, ids), expected, terms=256)


def test_equinox_module():
    model = eqx.nn.MLP(12, 10, 32, 2, key=jax.random.key(0, impl="rbg"))
    cmodel = small(model, axis=0)  # [out, in]
    fn = lambda model, x: jax.vmap(jax.vmap(model))(x)  # noqa: E731
    assert_same(nuqjax.apply(fn)(cmodel, SEQUENCE), fn(nuqjax.decompress(cmodel), SEQUENCE))


def test_numbers_and_functions_are_static():
    params = {"w": draws.normal(0, 12, 40), "power": 2, "act": jnp.tanh, "none": None}

    def fn(p, x, *, double):
        assert isinstance(p["power"], int)
        assert isinstance(double, bool)
        return p["act"](x @ p["w"]) ** p["power"] * (2 if double else 1)

    cparams = small(params)
    got = nuqjax.apply(fn)(cparams, SEQUENCE, double=True)
    assert_same(got, fn(nuqjax.decompress(cparams), SEQUENCE, double=True))


def test_without_compressed_leaves_and_with_dense_outputs():
    params = {"w": draws.normal(0, 12, 40)}
    assert_same(nuqjax.apply(lambda p, x: x @ p["w"])(params, SEQUENCE), SEQUENCE @ params["w"])
    cparams = small(params)
    assert_same(nuqjax.apply(lambda p: p)(cparams), nuqjax.decompress(cparams))


def test_custom_vjp_keeps_its_rule():
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, g: (3 * res[1].T @ g, g @ res[0].T))
    cparams, x = small({"w": draws.normal(0, 12, 40)}), SEQUENCE[0]
    lifted = nuqjax.apply(lambda p, x: product(p["w"], x))
    assert_same(lifted(cparams, x), product(nuqjax.decompress(cparams)["w"], x))
    by_level = jax.grad(lambda levels: lifted(nuqjax.with_codebooks(cparams, levels), x).sum())(
        nuqjax.codebooks(cparams)
    )
    by_weight = jax.grad(lambda p: product(p["w"], x).sum())(nuqjax.decompress(cparams))
    np.testing.assert_allclose(by_level["w"].sum(), by_weight["w"].sum(), rtol=480 * EPS)  # 480 weights, 16 levels


def test_vmap_over_examples_decodes_once():
    cparams = small({"w": draws.normal(0, 12, 40)})
    fn = jax.vmap(nuqjax.apply(lambda p, x: jnp.tanh(x @ p["w"])), in_axes=(None, 0))
    x = draws.normal(1, 16, 12)
    assert_near(fn(cparams, x), jnp.tanh(x @ nuqjax.decompress(cparams)["w"]))
    jitted = jax.jit(fn)
    assert largest_intermediate(jitted, cparams, x) <= max(12 * 40, 16 * 40)
    assert_near(jitted(cparams, x), fn(cparams, x))


def test_vmap_over_stacked_trees():
    trees = [small({"w": draws.normal(k, 12, 40)}) for k in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *trees)
    lifted = nuqjax.apply(lambda p, x: x @ p["w"])
    got = jax.vmap(lifted, in_axes=(0, None))(stacked, SEQUENCE)
    assert_near(got, jnp.stack([lifted(tree, SEQUENCE) for tree in trees]))


@pytest.mark.parametrize("axis", [-1, 0])
def test_exports_for_every_platform(axis):
    model = Embedder()
    cparams = small(draws.variables(model.init, IDS), axis=axis)
    lifted = jax.jit(nuqjax.apply(model.apply))
    exported = jax.export.export(lifted, platforms=["cpu", "cuda", "tpu"])(cparams, IDS)
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    assert_near(exported.call(cparams, IDS), lifted(cparams, IDS))


def test_convolutions_export():
    model = Classifier()
    variables = small(draws.variables(model.init, IMAGE), granularity="channel", bits=5)
    exported = jax.export.export(jax.jit(nuqjax.apply(model.apply)), platforms=["cpu", "cuda", "tpu"])(variables, IMAGE)
    assert_near(exported.call(variables, IMAGE), nuqjax.apply(model.apply)(variables, IMAGE), terms=256)


def test_the_tree_is_an_argument_of_the_program():
    """Nothing is baked in: the program takes the packed bytes, and other trees of the layout share one trace."""
    traces = 0

    def fn(p, x):
        nonlocal traces
        traces += 1
        return x @ p["w"]

    jitted = jax.jit(nuqjax.apply(fn))
    trees = [small({"w": draws.normal(k, 12, 40)}, method=method) for k, method in enumerate(("normal", "enq"))]
    for tree in trees:
        assert_near(jitted(tree, SEQUENCE), SEQUENCE @ nuqjax.decompress(tree)["w"])
    assert traces == 1


def test_x64():
    with x64():
        params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((12, 40)))}
        cparams = small(params)
        assert cparams["w"].dtype == jnp.float64
        x = SEQUENCE.astype(jnp.float64)
        fn = lambda p, x: x @ p["w"]  # noqa: E731
        assert_same(nuqjax.apply(fn)(cparams, x), fn(nuqjax.decompress(cparams), x))
        got = jax.jit(nuqjax.apply(fn))(cparams, x)
        assert got.dtype == jnp.float64


def test_vgg16_temporaries_are_near_its_largest_layer():
    """All decoded weights together are 528 MiB; compiled, at most one layer is dense at a time."""
    shapes, inputs = {}, 3
    for number, outputs in enumerate([64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]):
        shapes[f"conv{number}"] = jax.ShapeDtypeStruct((3, 3, inputs, outputs), jnp.float32)
        inputs = outputs
    for number, (rows, columns) in enumerate([(25088, 4096), (4096, 4096), (4096, 1000)]):
        shapes[f"dense{number}"] = jax.ShapeDtypeStruct((rows, columns), jnp.float32)

    def vgg16(p, x):
        for number in range(13):
            x = lax.conv_general_dilated(
                x, p[f"conv{number}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = nn.relu(x)
            if number in (1, 3, 6, 9, 12):
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for number in range(3):
            x = x @ p[f"dense{number}"]
        return x

    cshapes = jax.eval_shape(functools.partial(nuqjax.compress, bits=4, method="normal"), shapes)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    memory = jax.jit(nuqjax.apply(vgg16)).lower(cshapes, x).compile().memory_analysis()
    assert memory is not None
    largest = 25088 * 4096 * 4
    activations = 2 * 224 * 224 * 64 * 4
    assert memory.temp_size_in_bytes <= largest + 2 * activations
