"""Products with stored matrices: every implementation against decoding and a dot, which is their meaning."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import nuqjax
from nuqjax import ChannelGroups, CodebookArray, InputGroups
from nuqjax._src.kernels import products
from nuqjax._src.kernels.product import chosen, product
from nuqjax._src.kernels.products import IMPLEMENTATIONS, Over
from nuqjax._src.leaf import packing, rows
from nuqjax._src.leaf.matrix import Layout, decode_matrix
from tests import draws

EPS = 2.0**-24  # unit roundoff of float32
LAYOUTS = {
    "tensor": dict(),
    "channel": dict(granularity="channel"),
    "channel groups": dict(granularity=ChannelGroups(3)),
    "input groups": dict(granularity=InputGroups(8)),
    "ragged input groups": dict(granularity=InputGroups(5)),
    "one input group": dict(granularity=InputGroups(100)),
    "scale": dict(scale="channel"),
    "group scales": dict(scale=InputGroups(8), granularity="channel"),
    "ragged group scales": dict(scale=InputGroups(6)),
}
OVER: list[Over] = ["inputs", "outputs"]


def stored(shape, bits, dtype: Any = jnp.float32, granularity: Any = "tensor", scale: Any = None):
    """Arrays of a matrix `[O, I]`, as a leaf has them, and its layout."""
    outputs, inputs = shape
    generator = np.random.default_rng(bits)
    codebooks = rows.row_shape(outputs, inputs, granularity)[0]
    levels = np.sort(generator.normal(size=(codebooks, 2**bits)), axis=1)
    packed = packing.pack(jnp.asarray(generator.integers(0, 2**bits, shape), jnp.uint8), bits)
    group = 0 if scale is None else inputs if scale == "channel" else min(scale.size, inputs)
    factors = jnp.asarray(generator.uniform(0.5, 2, (outputs, -(-inputs // group))), dtype) if group else None
    levels = jnp.asarray(levels, jnp.float32 if scale else dtype)
    return (levels, packed, factors), Layout(bits, inputs, granularity, group, (np.dtype(dtype),))


def leaf_of(shape, axes, bits):
    """A compressed leaf of any shape, however small."""
    (levels, packed, _), layout = stored(rows.channel_shape(shape, axes), bits)
    return CodebookArray(levels, packed, None, tuple(shape), layout.dtype, bits, "tensor", tuple(axes))


@pytest.fixture(params=[8, 2**20], ids=["small blocks", "blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", request.param)
    jax.clear_caches()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_value_is_that_of_decoding(bits, layout):
    """A product with the identity shows them, exactly."""
    shape, dtype = ((7, 13), jnp.float32) if bits % 2 else ((12, 80), jnp.bfloat16)
    arrays, form = stored(shape, bits, dtype, **LAYOUTS[layout])
    sizes: dict[Over, int] = dict(zip(OVER, shape[::-1], strict=True))

    def run(levels, packed, scale):
        eyes: dict[Over, jax.Array] = {over: jnp.eye(size, dtype=dtype) for over, size in sizes.items()}
        made = {
            (over, name): product(eye, levels, packed, scale, layout=form, over=over, implementation=name)
            for over, eye in eyes.items()
            for name in IMPLEMENTATIONS
        }
        return made, decode_matrix(levels, packed, scale, form)

    found, matrix = jax.jit(run)(*arrays)
    for (over, name), got in found.items():
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, matrix.T if over == "inputs" else matrix, err_msg=f"{over} {name}")


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_level_that_no_value_has_is_in_no_result(bits, implementation):
    """Padding of rows to whole bytes has the index 0."""
    (levels, _, _), form = stored((7, 13), bits)
    packed = packing.pack(jnp.ones((7, 13), jnp.uint8), bits)
    levels = levels.at[:, 0].set(jnp.nan)
    for over, size in zip(OVER, (13, 7), strict=True):
        got = product(jnp.ones((1, size)), levels, packed, layout=form, over=over, implementation=implementation)
        np.testing.assert_allclose(got, jnp.full_like(got, size * levels[0, 1]), rtol=1e-6)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("bits", [1, 3, 4, 7])
def test_blocks_of_any_size(bits, over):
    """The last one may begin inside the one before it."""
    arrays, form = stored((37, 53), bits, granularity=InputGroups(9), scale=InputGroups(10))
    matrix = decode_matrix(*arrays, form)
    got = product(
        jnp.eye(53 if over == "inputs" else 37), *arrays, layout=form, over=over, implementation="blocks"
    )  # fmt: skip
    np.testing.assert_array_equal(got, matrix.T if over == "inputs" else matrix)


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    bits=st.integers(1, 8),
    layout=st.sampled_from(list(LAYOUTS)),
    over=st.sampled_from(OVER),
    lead=st.sampled_from([(), (1,), (3,), (2, 3)]),
    implementation=st.sampled_from(list(IMPLEMENTATIONS)),
    wanted=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_products_are_within_the_bound_of_a_dot(shape, bits, layout, over, lead, implementation, wanted):
    """γ_n Σ|x||w| for sums of n terms in any order, in float32, and one rounding of the result."""
    arrays, form = stored(shape, bits, **LAYOUTS[layout])
    matrix = np.asarray(decode_matrix(*arrays, form), np.float64)
    matrix = matrix.T if over == "inputs" else matrix
    x = draws.normal(1, *lead, matrix.shape[0])
    got = product(x, *arrays, layout=form, over=over, dtype=wanted, implementation=implementation)
    assert got.shape == (*lead, matrix.shape[1])
    assert got.dtype == wanted
    terms = matrix.shape[0] + 1
    bound = terms * EPS / (1 - terms * EPS) * (np.abs(np.float64(x)) @ np.abs(matrix))
    exact = np.float64(x) @ matrix
    rounding = float(jnp.finfo(wanted).eps) * (np.abs(exact) + bound)
    assert (np.abs(np.float64(got) - exact) <= bound + rounding).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("over", OVER)
def test_derivatives_are_those_of_decoding(over, implementation):
    (levels, packed, scale), form = stored((12, 20), 3, granularity="channel", scale=InputGroups(7))
    x = draws.normal(3, 2, 20 if over == "inputs" else 12)

    def loss(x, levels, scale, implementation):
        y = product(x, levels, packed, scale, layout=form, over=over, implementation=implementation)
        return (y * jnp.cos(y)).sum()

    transforms: list[Callable[..., Callable[..., Any]]] = [
        lambda f: jax.grad(f, argnums=(0, 1, 2)),
        lambda f: lambda *given: jax.jvp(f, given, given)[1],
    ]
    if implementation == "blocks":
        transforms.append(lambda f: jax.grad(lambda *given: (jax.grad(f)(*given) ** 2).sum(), argnums=(0, 1, 2)))
    for transform in transforms:
        got = transform(lambda x, levels, scale: loss(x, levels, scale, implementation))(x, levels, scale)
        expected = transform(lambda x, levels, scale: loss(x, levels, scale, "decode"))(x, levels, scale)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(jnp.abs(b).max()))


def test_a_product_is_linear_in_levels_too():
    (levels, packed, _), form = stored((12, 20), 3)
    x = draws.normal(3, 2, 20)
    for implementation in IMPLEMENTATIONS:
        linear = lambda w: product(x, w, packed, layout=form, implementation=implementation)  # noqa: B023, E731
        y = linear(levels)
        [got] = jax.linear_transpose(linear, levels)(y)
        np.testing.assert_allclose(jnp.vdot(got, levels), jnp.vdot(y, y), rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_inputs_matrices_and_both(implementation):
    (levels, packed, scale), form = stored((12, 20), 3, scale="channel")
    x = draws.normal(3, 5, 2, 20)
    many = lambda a: jnp.stack([a, a[::-1]])  # noqa: E731
    one = lambda *arrays: product(*arrays, layout=form, implementation=implementation)  # noqa: E731
    got = jax.vmap(lambda x: one(x, levels, packed, scale), in_axes=1, out_axes=1)(x)
    np.testing.assert_allclose(got, one(x, levels, packed, scale), rtol=1e-5, atol=1e-5)
    got = jax.vmap(one, in_axes=(None, None, 0, 0))(x, levels, many(packed), many(scale))
    expected = [one(x, levels, p, s) for p, s in zip(many(packed), many(scale), strict=True)]
    np.testing.assert_allclose(got, jnp.stack(expected), rtol=1e-5, atol=1e-5)


def test_gradients_of_inputs_keep_no_decoded_matrix():
    """What the backward pass keeps of the weights are their packed indices and levels."""
    size = 256
    cparams = nuqjax.compress({str(n): draws.normal(n, size, size) for n in range(4)}, bits=4, method="normal")
    model = lambda params, x: sum(jnp.tanh(x @ params[n]).sum() for n in sorted(params))  # noqa: E731
    kept = jax.eval_shape(lambda p, x: jax.vjp(lambda x: nuqjax.apply(model)(p, x), x)[1], cparams, jnp.ones((2, size)))
    nbytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept))
    assert nbytes < 4 * size**2  # that of one dense matrix


# ---------------------------------------------------------------------------------------------------------------------
# Which dots of an unchanged program are such products.


def primitives(fn, *args):
    """The names of the operations that look values up or multiply."""
    names = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            names.append(eqn.primitive.name)
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(fn)(*args).jaxpr)
    return [name for name in names if name in ("gather", "dot_general", "codebook_product")]


EINSUMS = {
    # equation of x and w, shape of w, its output axes
    "dense": ("bi,io->bo", (20, 24), -1),
    "dense, left": ("io,bi->ob", (20, 24), -1),
    "torch's order": ("bi,oi->bo", (24, 20), 0),
    "tied head": ("btd,vd->btv", (30, 16), -1),
    "tied head, rows": ("btd,vd->btv", (30, 16), 0),
    "several outputs": ("btd,dhk->bthk", (16, 3, 8), (-2, -1)),
    "several outputs, another order": ("btd,dhk->kbht", (16, 3, 8), (-2, -1)),
    "several inputs": ("bthk,hkd->btd", (3, 8, 16), -1),
    "several inputs, another order": ("btkh,hkd->dbt", (3, 8, 16), -1),
    "outputs in the middle": ("bhk,hok->bo", (3, 12, 8), 1),
}


@pytest.mark.parametrize("name", EINSUMS)
@pytest.mark.parametrize("bits", [3, 4])
def test_einsums_are_products(name, bits):
    equation, shape, axis = EINSUMS[name]
    left, right = equation.split("->")[0].split(",")
    of_x, of_w = (right, left) if "left" in name else (left, right)
    length = dict(zip(of_w, shape, strict=True)) | {"b": 2, "t": 5}
    x = draws.normal(1, *(length[c] for c in of_x))
    cparams = {"w": leaf_of(shape, rows.output_axes(axis, len(shape)), bits)}

    def model(params, x):
        operands = (x, params["w"]) if of_w == right else (params["w"], x)
        return jnp.einsum(equation, *operands)

    assert primitives(nuqjax.apply(model), cparams, x) == ["codebook_product"]
    got, expected = jax.jit(nuqjax.apply(model))(cparams, x), model(nuqjax.decompress(cparams), x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=20)
@given(data=st.data())
def test_any_dot_of_any_view_is_what_it_was(data):
    """Transposes and reshapes before a dot over some axes: a product where it can be one, and right in any case."""
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4))
    axis = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    moved = [shape[a] for a in order]
    cut = data.draw(st.integers(0, len(moved)))
    merged = [*moved[:cut], int(np.prod(moved[cut:]))]
    summed = data.draw(st.sets(st.integers(0, len(merged) - 1), max_size=len(merged)))
    others = data.draw(st.permutations(sorted(summed)))
    x = draws.normal(1, 2, *(merged[a] for a in others), 3)
    is_left = data.draw(st.booleans())
    cparams = {"w": leaf_of(shape, sorted(axis), 3)}

    def model(params, x):
        w = params["w"].transpose(order).reshape(merged)
        mine, its = list(others), list(range(1, 1 + len(others)))
        if is_left:
            return lax.dot_general(w, x, ((mine, its), ((), ())))
        return lax.dot_general(x, w, ((its, mine), ((), ())))

    got, expected = jax.jit(nuqjax.apply(model))(cparams, x), model(nuqjax.decompress(cparams), x)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_casts_before_a_product_round_in_turn():
    cparams = nuqjax.compress({"w": draws.normal(2, 40, 30)}, bits=4, method="normal")
    model = lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    assert primitives(nuqjax.apply(model), cparams, jnp.eye(40)) == ["codebook_product"]
    got = jax.jit(nuqjax.apply(model))(cparams, jnp.eye(40))
    np.testing.assert_array_equal(got, model(nuqjax.decompress(cparams), jnp.eye(40)))


EAGER, BOTH = "eagerly", "two leaves"
OTHERS = {
    EAGER: lambda p, x: x @ p["w"],
    BOTH: lambda p, x: p["w"] @ p["w"],
    "a batch, if only of one": lambda p, x: lax.dot_general(x[None], p["w"][None], (((2,), (1,)), ((0,), (0,)))),
    "an axis of both kinds": lambda p, x: x.reshape(1600) @ p["w"].reshape(1600, 1),
    "integers": lambda p, x: lax.dot_general(
        x.astype(jnp.int32), p["w"].astype(jnp.int32), (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    ),
    "integers times floats": lambda p, x: lax.dot_general(
        x.astype(jnp.int8), p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    ),
    "sums as an algorithm says": lambda p, x: jnp.dot(x, p["w"], precision=lax.DotAlgorithmPreset.F32_F32_F32),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_dots_decode_the_leaf_and_are_what_they_were(name):
    cparams, x = {"w": leaf_of((40, 40), (1,), 4)}, draws.normal(1, 40, 40)
    fn = OTHERS[name]
    run = fn if name == EAGER else jax.jit(fn)
    lifted = nuqjax.apply(fn) if name == EAGER else jax.jit(nuqjax.apply(fn))
    if name != EAGER:
        assert "codebook_product" not in primitives(nuqjax.apply(fn), cparams, x)
    got, expected = lifted(cparams, x), run(nuqjax.decompress(cparams), x)
    assert got.dtype == expected.dtype
    if name == EAGER:
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "channel", InputGroups(64)], ids=str)
def test_a_large_weight_is_never_dense_as_a_whole(granularity):
    """In products over inputs and over channels, as a tied head's is, and in gradients of what they multiply."""
    shape, bits = (2048, 4096), 4
    (levels, packed, _), layout = stored(shape, bits, granularity=granularity)
    w = CodebookArray(levels, packed, None, shape, layout.dtype, bits, granularity, (0,))
    dense = 4 * shape[0] * shape[1]
    for fn, size in (
        (lambda p, x: x @ p["w"].T, shape[1]),
        (lambda p, x: x @ p["w"], shape[0]),
        (jax.grad(lambda p, x: jnp.cos(x @ p["w"]).sum(), argnums=1), shape[0]),
    ):
        with jax.default_device(jax.devices("cpu")[0]):
            compiled = jax.jit(nuqjax.apply(fn)).lower({"w": w}, jnp.ones((1, size))).compile()
        memory: Any = compiled.memory_analysis()
        assert memory.temp_size_in_bytes <= dense / 8


def test_one_program_carries_every_platform():
    """`jax.export` for a CPU, a GPU and a TPU at once."""
    cparams = nuqjax.compress({"w": draws.normal(2, 300, 300)}, bits=4, method="normal")
    model = nuqjax.apply(lambda params, x: x @ params["w"])
    exported = jax.export.export(jax.jit(model), platforms=("cpu", "cuda", "tpu"))(cparams, jnp.ones((1, 300)))
    got = jax.export.deserialize(exported.serialize()).call(cparams, jnp.ones((1, 300)))
    np.testing.assert_allclose(got, jax.jit(model)(cparams, jnp.ones((1, 300))), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "rocm"])
def test_what_is_chosen_exists(platform):
    _, form = stored((12, 20), 4)
    for devices, batch, outputs in itertools.product((1, 8), (1, 16, 1024), (8, 4096)):
        assert chosen(platform, devices, form, outputs, batch) in IMPLEMENTATIONS


def test_an_unknown_implementation_is_refused():
    arrays, form = stored((12, 20), 4)
    with pytest.raises(ValueError, match=r"implementation 'fast', but .*'blocks'"):
        product(jnp.ones((1, 20)), *arrays, layout=form, implementation="fast")
