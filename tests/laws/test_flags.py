"""The library under JAX's strictest flags: it promotes nothing that a user must allow.

Programs are traced, not compiled: it is tracing that heeds the flags.
"""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, InputGroups, QFormat, Rule
from tests import draws

OF_THE_SUITE = jax.config.jax_numpy_dtype_promotion  # pyright: ignore[reportAttributeAccessIssue]
METHODS = ["knq", "enq", "uniform", "uniform_pow2", "dfp", "normal", "quantile", "pow2"]
PARAMS = {"w": draws.normal(0, 24, 16), "b": draws.normal(1, 3, 16, 8)}
OPTIONS = [
    {},
    {"granularity": "channel", "codebook_format": QFormat(8, 5)},
    {"granularity": ChannelGroups(3), "keep_zero": True},
    {"granularity": InputGroups(5), "codebook_format": "bfloat16"},
    {"scale": "channel", "codebook_format": "float8_e4m3fn"},
    {"scale": InputGroups(5), "rules": [Rule("b", stack_axes=1)]},
    {"sensitivity": jax.tree.map(jnp.abs, PARAMS)},
]


@pytest.fixture(autouse=True)
def strict():
    """Also where the suite runs without them."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def test_the_flags_are_set():
    assert os.environ["JAX_NUMPY_DTYPE_PROMOTION"] == OF_THE_SUITE
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.add(jnp.ones(3), jnp.ones(3, jnp.bfloat16))


CASES = [(method, options, "float32") for method in METHODS for options in OPTIONS]
CASES += [(method, OPTIONS[0], dtype) for method in METHODS for dtype in ("bfloat16", "float8_e5m2")]


@pytest.mark.parametrize(("method", "options", "dtype"), CASES, ids=str)
def test_compress_and_what_takes_its_trees_promote_nothing(method, options, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)

    def run(params, x, i):
        cparams = nuqjax.compress(params, 3, method, **options)
        dense = nuqjax.decompress(nuqjax.with_codebooks(cparams, nuqjax.codebooks(cparams)))

        def model(p, x, i):
            return jnp.dot(x, p["w"]), jnp.take(p["w"], i, axis=0), jax.lax.scan(lambda c, w: (c, w[0]), i, p["b"])

        return dense, nuqjax.apply(model)(cparams, x, i), cparams

    jax.eval_shape(run, params, jnp.ones((5, 24), dtype), jnp.arange(2))


def test_formats_promote_nothing_on_the_host():
    for options in (*OPTIONS, {"codebook_format": AutoQFormat(6)}):
        cparams, report = nuqjax.compress(PARAMS, 3, return_report=True, **options)
        assert str(report)
        assert str(nuqjax.report(PARAMS, cparams))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_calibrate_and_emulate_promote_nothing():
    model, x = Network(), draws.normal(2, 4, 12, 12, 3)
    cparams = nuqjax.compress(draws.variables(model.init, x), 4, codebook_format=AutoQFormat(8), min_size=0)
    formats = nuqjax.calibrate(model.apply, cparams, x)
    words = jax.eval_shape(nuqjax.emulate(model.apply, formats), cparams, x)
    assert words.shape == (4, 10)


def test_fisher_and_export_promote_nothing():
    model, x = Network(), draws.normal(2, 4, 12, 12, 3)
    variables = draws.variables(model.init, x)
    loss = lambda params, x: jnp.mean(jnp.square(model.apply(params, x)))  # noqa: E731
    jax.eval_shape(functools.partial(nuqjax.fisher, loss), variables, [x])
    cparams = nuqjax.compress(variables, 4, min_size=0)
    assert nuqjax.export(model.apply, cparams, x, platforms=["cpu"]).program.out_avals[0].shape == (4, 10)
