"""The Fisher diagonal, against gradients worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from tests import draws


def loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


@pytest.fixture(scope="module")
def problem():
    generator = np.random.default_rng(0)
    params = {"w": jnp.asarray(generator.standard_normal(5), jnp.float32), "b": jnp.float32(0.5), "steps": 3}
    batches = [
        (
            jnp.asarray(generator.standard_normal((4, 5)), jnp.float32),
            jnp.asarray(generator.standard_normal(4), jnp.float32),
        )
        for _ in range(3)
    ]
    return params, batches


@pytest.mark.parametrize("per_example", [False, True])
def test_mean_squared_gradient(problem, per_example):
    params, batches = problem
    got = nuqjax.fisher(loss, params, iter(batches), per_example=per_example)
    expected = []
    for x, y in batches:
        x, rest = np.asarray(x, np.float64), np.asarray(x @ params["w"] + params["b"] - y, np.float64)
        of_each = 2 * rest[:, None] * x
        expected.append((of_each**2).mean(0) if per_example else of_each.mean(0) ** 2)
    np.testing.assert_allclose(got["w"], np.mean(expected, axis=0), rtol=1e-5)
    assert got["steps"] is None
    assert got["w"].dtype == jnp.float32


def test_goes_into_compress():
    params = {"w": draws.normal(0, 16, 32)}
    x = draws.normal(1, 8, 16) * jnp.linspace(0.01, 3, 16)[None]
    sensitivity = nuqjax.fisher(lambda p, x: jnp.mean(jnp.tanh(x @ p["w"])), params, [x[None, i] for i in range(8)])
    weighted = nuqjax.compress(params, bits=2, sensitivity=sensitivity)
    plain = nuqjax.compress(params, bits=2)

    def error(tree):
        return float(jnp.sum(sensitivity["w"] * (nuqjax.decompress(tree)["w"] - params["w"]) ** 2))

    assert error(weighted) < error(plain)


def test_no_batches(problem):
    with pytest.raises(ValueError, match="no batches"):
        nuqjax.fisher(loss, problem[0], [])
