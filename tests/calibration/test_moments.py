"""The moments of what each leaf multiplies, beside a direct computation in NumPy for every kind of use."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from nuqjax._src.calibration.layers import solved
from nuqjax._src.calibration.layouts import as_used
from nuqjax._src.calibration.uses import Recorder, run
from nuqjax._src.compress.plan import plan_leaves
from nuqjax._src.compress.rules import Options
from nuqjax.calibration import LeafMoments, moments

ALL = 10**6  # positions: every one


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected(rows):
    """E[x xᵀ] of rows `[…, I]`, in float64."""
    rows = np.asarray(rows, np.float64).reshape(-1, np.shape(rows)[-1])
    return rows.T @ rows / len(rows)


def im2col(x, kernel, strides, padding, lhs_dilation, rhs_dilation):
    """`[N·places, C, *kernel]` the patches of `[N, C, *spatial]` images, by loops."""
    images, channels, *spatial = x.shape
    wide = np.zeros((images, channels, *((n - 1) * d + 1 for n, d in zip(spatial, lhs_dilation, strict=True))))
    wide[(..., *(slice(None, None, d) for d in lhs_dilation))] = x
    wide = np.pad(wide, [(0, 0), (0, 0), *((max(lo, 0), max(hi, 0)) for lo, hi in padding)])
    wide = wide[
        (..., *(slice(max(-lo, 0), n - max(-hi, 0)) for (lo, hi), n in zip(padding, wide.shape[2:], strict=True)))
    ]
    places = [
        range(0, n - (k - 1) * d, s) for n, k, d, s in zip(wide.shape[2:], kernel, rhs_dilation, strides, strict=True)
    ]
    patches = []
    for image, *at in itertools.product(range(images), *places):
        window = (slice(p, p + (k - 1) * d + 1, d) for p, k, d in zip(at, kernel, rhs_dilation, strict=True))
        patches.append(wide[(image, slice(None), *window)])
    return np.stack(patches)


CONVOLUTIONS = {  # spatial sizes, kernel, input channels, outputs, groups, strides, padding, dilations of both
    "dense": ((6, 5), (3, 2), 3, 4, 1, (1, 1), ((1, 1), (0, 1)), (1, 1), (1, 1)),
    "strided": ((7, 6), (3, 3), 2, 4, 1, (2, 3), ((1, 0), (1, 1)), (1, 1), (1, 1)),
    "dilated": ((8, 8), (3, 2), 2, 3, 1, (1, 1), ((2, 2), (1, 0)), (1, 1), (2, 3)),
    "grouped": ((4, 4), (2, 2), 4, 6, 2, (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
    "depthwise": ((5, 5), (3, 3), 4, 4, 4, (2, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
    "depthwise, multiplied": ((5, 4), (2, 2), 3, 6, 3, (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
    "transposed": ((4, 3), (3, 3), 2, 3, 1, (1, 1), ((1, 1), (2, 2)), (2, 3), (1, 1)),
    "one axis": ((9,), (4,), 3, 5, 1, (2,), ((1, 2),), (1,), (2,)),
    "three axes": ((3, 4, 3), (2, 2, 2), 2, 3, 1, (1, 2, 1), ((1, 0), (0, 0), (0, 1)), (1, 1, 1), (1, 1, 1)),
    "cropped": ((6,), (2,), 2, 2, 1, (1,), ((-1, -2),), (1,), (1,)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_has_the_moments_of_its_patches(kind):
    spatial, kernel, channels, outputs, groups, strides, padding, lhs_dilation, rhs_dilation = CONVOLUTIONS[kind]
    letters = "DHW"[-len(spatial) :]
    params = {"kernel": normal(0, *kernel, channels // groups, outputs)}
    images = normal(1, 2, *spatial, channels) + 0.5

    def fn(params, x):
        return lax.conv_general_dilated(
            x, params["kernel"], strides, padding, lhs_dilation, rhs_dilation,
            (f"N{letters}C", f"{letters}IO", f"N{letters}C"), feature_group_count=groups,
        )  # fmt: skip

    patches = im2col(np.moveaxis(images, -1, 1), kernel, strides, padding, lhs_dilation, rhs_dilation)
    parts = np.split(patches, groups, axis=1)  # the leaf's own order of a group's inputs is [*kernel, channel]
    wanted = np.stack([expected(np.moveaxis(part, 1, -1).reshape(len(part), -1)) for part in parts])
    found = moments(fn, params, [images[:1], images[1:]], positions=ALL)["kernel"]
    assert isinstance(found, LeafMoments)
    assert found.axes == (len(spatial) + 1,)
    np.testing.assert_allclose(found.second, wanted, rtol=1e-5, atol=1e-5)
    means = np.stack([np.moveaxis(part, 1, -1).reshape(len(part), -1).mean(axis=0) for part in parts])
    np.testing.assert_allclose(found.mean, means, rtol=1e-5, atol=1e-5)


DOTS = {  # equation, shapes of the input and the kernel, its output axes; the input's axes as rows of inputs
    "dense": ("nti,io->nto", (2, 3, 4), (4, 5), (1,)),
    "kernel first": ("oi,ni->on", (3, 4), (5, 4), (0,)),
    "several outputs": ("nti,ihk->nthk", (2, 3, 4), (4, 2, 3), (1, 2)),
    "several inputs": ("nthk,hko->nto", (2, 3, 2, 4), (2, 4, 5), (2,)),
    "inputs in another order": ("nthk,kho->nto", (2, 3, 2, 4), (4, 2, 5), (2,)),
    "inputs apart": ("nhk,hok->no", (3, 2, 4), (2, 5, 4), (1,)),
}


@pytest.mark.parametrize("kind", DOTS)
def test_a_dot_has_the_moments_of_its_rows(kind):
    equation, of_input, of_kernel, axes = DOTS[kind]
    x, params = normal(0, *of_input) + 0.3, {"w": normal(1, *of_kernel)}

    def fn(params, x):
        first, second = (params["w"], x) if kind == "kernel first" else (x, params["w"])
        return jnp.einsum(equation, first, second)

    letters = equation.split("->")[0].split(",")
    kernel, data = letters if kind == "kernel first" else letters[::-1]
    inputs = "".join(a for n, a in enumerate(kernel) if n not in axes)
    rows = "".join(a for a in data if a not in inputs)
    wanted = expected(
        np.einsum(f"{data}->{rows}{inputs}", x).reshape(-1, np.prod([of_kernel[kernel.index(a)] for a in inputs]))
    )
    found = moments(fn, params, [x], positions=ALL)["w"]
    assert isinstance(found, LeafMoments)
    assert found.axes == axes
    np.testing.assert_allclose(found.second[0], wanted, rtol=1e-5, atol=1e-5)


def test_experts_have_moments_of_their_own():
    x, params = normal(0, 6, 3, 4), {"w": normal(1, 3, 4, 5)}
    found = moments(lambda p, x: jnp.einsum("nei,eio->neo", x, p["w"]), params, [x], positions=ALL)
    wanted = np.stack([expected(x[:, e]) for e in range(3)])
    np.testing.assert_allclose(found["w"].second, wanted, rtol=1e-5, atol=1e-6)
    stacked = found.of("w", axes=(1,), stack_axes=1)
    np.testing.assert_allclose(stacked.second[:, 0], wanted, rtol=1e-5, atol=1e-6)


def layers(wrap):
    """Two dense layers `[L, 4, 4]`, run by a loop whose body is wrapped."""

    def fn(params, x):
        def step(x, w):
            return jnp.tanh(wrap(lambda x, w: x @ w)(x, w)), None

        return lax.scan(step, x, params["w"])[0]

    return fn


@jax.custom_jvp
def squared(x):
    return x * x


WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda f: jax.vmap(f, in_axes=(0, None)),
    "cast": lambda f: lambda x, w: f(x, w.astype(jnp.float32).T.T),
    "custom_vjp": lambda f: _with_own_derivative(f),
}


def _with_own_derivative(f):
    called = jax.custom_vjp(f)
    called.defvjp(lambda x, w: (f(x, w), (x, w)), lambda kept, g: kept)
    return called


@pytest.mark.parametrize("kind", WRAPS)
def test_stacked_layers_have_moments_a_layer_whatever_is_around_them(kind):
    x, params = normal(0, 5, 4), {"w": normal(1, 2, 4, 4)}
    found = moments(layers(WRAPS[kind]), params, [x], positions=ALL)["w"]
    assert isinstance(found, LeafMoments)
    assert (found.stack_axes, found.axes) == (1, (1,))
    wanted = [expected(x), expected(np.tanh(x @ params["w"][0]))]
    np.testing.assert_allclose(found.second[:, 0], wanted, rtol=1e-4, atol=1e-5)


def test_a_leaf_that_every_step_of_a_loop_uses_has_the_moments_of_all_steps():
    x, params = normal(0, 5, 4), {"w": normal(1, 4, 4)}
    fn = lambda p, x: lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, length=3)[0]  # noqa: E731
    states = [x]
    for _ in range(2):
        states.append(np.tanh(states[-1] @ params["w"]))
    found = moments(fn, params, [x[:2], x[2:]], positions=ALL)["w"]
    np.testing.assert_allclose(found.second[0], expected(np.stack(states)), rtol=1e-4, atol=1e-5)


def test_parts_of_a_fused_kernel_have_the_moments_of_their_own_inputs():
    x, y, params = normal(0, 5, 4), normal(1, 5, 4), {"w": normal(2, 4, 6)}

    def fn(params, x, y):
        first, second = jnp.split(params["w"], 2, axis=1)
        return x @ first + y @ second

    found = moments(fn, params, [(x, y)], positions=ALL)["w"]
    np.testing.assert_allclose(found.second, [expected(x) / 2, expected(y) / 2], rtol=1e-4, atol=1e-5)


def test_a_table_has_the_counts_of_its_look_ups_and_a_tied_head_the_moments_of_both():
    params, index = {"table": normal(0, 7, 4)}, np.array([[1, 1, 3], [3, 1, 6]], np.int32)
    found = moments(lambda p, i: jnp.take(p["table"], i, axis=0), params, [index])["table"]
    assert isinstance(found, LeafMoments)
    assert found.look_up
    assert (found.second * 6).tolist() == [[0, 3, 0, 2, 0, 0, 1]]
    tied = moments(lambda p, i: p["table"][i] @ p["table"].T, params, [index], positions=ALL)["table"]
    assert isinstance(tied, LeafMoments)
    assert tied.axes == (0,)
    head = expected(params["table"][index])
    np.testing.assert_allclose(tied.second[0], head / 2 + np.eye(4) / 7 / 2, rtol=1e-4, atol=1e-5)


UNKNOWN = {
    "normed": (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])), "mul at|div|integer_pow|square"),
    "added": (lambda p, x: x @ x.T @ (x + p["w"][:1]), "add"),
    "in a while loop": (lambda p, x: lax.while_loop(lambda s: s[0, 0] < 0, lambda s: s @ p["w"], x * x), "while"),
    "not at all": (lambda p, x: x * 2, "fn"),
}


@pytest.mark.promotes
@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_leaf_of_unknown_use_has_a_reason(kind):
    fn, wanted = UNKNOWN[kind]
    found = moments(fn, {"w": normal(0, 4, 4)}, [normal(1, 5, 4)])["w"]
    assert isinstance(found, str)
    assert any(word in found for word in wanted.split("|")), found


def test_what_no_offset_follows_keeps_its_mean_and_what_one_follows_does_not():
    x = normal(0, 50, 3) + 2
    params = {name: normal(n, 3, 3) for n, name in enumerate("abc")} | {"bias": normal(4, 3), "mean": normal(5, 3)}
    fn = lambda p, x: (x @ p["a"] + p["bias"][None], x @ p["b"], x @ p["c"] - p["mean"][None])  # noqa: E731
    found = moments(fn, params, [x])
    np.testing.assert_allclose(found["b"].second[0], expected(x), rtol=1e-4)
    for name in "ac":
        np.testing.assert_allclose(found[name].second[0], np.cov(x.T, bias=True), rtol=1e-3, atol=1e-4)


def test_the_split_into_batches_changes_nothing_but_roundings():
    x, params = normal(0, 12, 5, 5, 3), {"w": normal(1, 3, 3, 3, 4)}
    fn = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    whole = moments(fn, params, [x], positions=4)["w"]
    parts = moments(fn, params, [x[:3], x[3:5], x[5:]], positions=4)["w"]
    assert whole.images == parts.images == 12
    np.testing.assert_allclose(whole.second, parts.second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 30])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_positions_are_a_lattice_of_no_more_than_asked_for(length, dilation):
    x, w = jnp.ones((3, length, 1)), jnp.ones((1, 1, 2))
    numbers = ("NHC", "HIO", "NHC")
    jaxpr = jax.make_jaxpr(
        lambda x, w: lax.conv_general_dilated(x, w, (1,), ((0, 0),), (dilation,), dimension_numbers=numbers)
    )(x, w)
    recorder = Recorder(lambda name: True, 3, 6, 100)
    run(jaxpr, [x, w], [None, "w"], recorder)
    [(_, count, sums)] = recorder.records
    places = (length - 1) * dilation + 1
    assert 3 <= count <= 3 * min(places, 6)
    share = float(sums.first[0, 0]) / count  # of what is no zero between dilated inputs
    assert share == pytest.approx(length / places, abs=0.35)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(2, name="dense")(x.mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv, self.dense = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.relu(self.conv(x)).mean((1, 2)))


def plain(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    x = jax.nn.relu(x + params["conv"]["bias"][None, None, None]).mean((1, 2))
    return x @ params["dense"]["kernel"] + params["dense"]["bias"][None]


@pytest.mark.promotes
def test_linen_nnx_and_plain_functions_have_the_same_moments():
    x, model, module = normal(0, 3, 6, 6, 3), Linen(), Nnx()
    variables = model.init(jax.random.key(0), x)
    for layer in ("conv", "dense"):
        for name in ("kernel", "bias"):
            setattr(getattr(module, layer), name, nnx.Param(variables["params"][layer][name]))
    of_linen = moments(model.apply, variables, [x])
    of_plain = moments(plain, variables["params"], [x])
    of_nnx = moments(lambda m, x: m(x), module, [x])
    for layer in ("conv", "dense"):
        path = f"{layer}/kernel"
        assert isinstance(of_plain[path], LeafMoments)
        [in_nnx] = [name for name in of_nnx if name.startswith(path)]
        for other in (of_linen[f"params/{path}"], of_nnx[in_nnx]):
            np.testing.assert_allclose(other.second, of_plain[path].second, rtol=1e-5, atol=1e-6)


_ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np, nuqjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

assert jax.device_count() == 2
rng = np.random.default_rng(0)
params = {"w": rng.normal(size=(16, 32)).astype(np.float32), "b": np.zeros(32, np.float32)}
fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
x = rng.normal(size=(8, 5, 16)).astype(np.float32)
single = nuqjax.calibration.moments(fn, params, [x])["w"].second
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    placed = {"w": NamedSharding(mesh, P(None, "data")), "b": NamedSharding(mesh, P())}
    on_mesh = jax.device_put(params, placed)
    batches = [jax.device_put(x, NamedSharding(mesh, P("data")))]
    found = nuqjax.calibration.moments(fn, on_mesh, batches)["w"].second
    np.testing.assert_allclose(found, single, rtol=1e-5, atol=1e-6)
    cparams = nuqjax.compress(on_mesh, bits=3, fn=fn, batches=batches)
    assert cparams["w"].packed.sharding.spec == nuqjax.shardings(cparams, placed)["w"].packed.spec
print("done")
"""


@pytest.mark.slow
def test_batches_and_parameters_on_a_mesh_have_the_moments_of_one_device():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}
    run = subprocess.run([sys.executable, "-c", _ON_A_MESH], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["done"], run.stderr


def test_second_moments_of_a_wide_layer_are_taken_within_stretches_of_its_inputs():
    x, params = normal(0, 30, 12), {"w": normal(1, 12, 5), "b": normal(2, 5), "k": normal(3, 2, 6, 4)}

    def fn(params, x):
        y = x @ params["w"] + params["b"][None]
        return y, lax.conv_general_dilated(
            x.reshape(30, 2, 6), params["k"], (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")
        )

    found = moments(fn, params, [x], positions=ALL, widest=5)
    wanted = np.cov(x.T, bias=True).reshape(3, 4, 3, 4)[np.arange(3), :, np.arange(3)]
    np.testing.assert_allclose(found["w"].second[0], wanted, rtol=1e-4, atol=1e-5)
    assert found["k"].is_diagonal  # its operand's inputs are in another order than the leaf's
    np.testing.assert_allclose(found["k"].second[0], (x**2).mean(axis=0), rtol=1e-4)
    plan = as_used(plan_leaves({"w": params["w"]}, Options(bits=2, min_size=1, scale="channel"), ())[0], found)
    done = solved(params["w"], plan, found["w"])
    assert done.leaf.shape == (12, 5)
    assert list(done.errors.values()) == sorted(done.errors.values(), reverse=True)
