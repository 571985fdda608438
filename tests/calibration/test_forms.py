"""Methods with data: levels of any method take part, and those of a grid stay one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from nuqjax import ChannelGroups, InputGroups
from nuqjax._src.fit.methods import METHODS
from nuqjax.calibration import Problem, quantize, shrunk
from tests.calibration.test_solver import drawn, is_falling, leaf_of, output_error

GRANULARITIES = ["tensor", "channel", ChannelGroups(4), InputGroups(5)]
OTHERS = sorted(set(METHODS) - {"knq", "enq", "uniform"})


def is_a_grid(levels, relative=1e-5):
    steps = np.diff(levels.astype(np.float64), axis=1)
    return bool((np.abs(steps - steps.mean(axis=1, keepdims=True)) <= relative * np.abs(levels).max()).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("granularity", "scale"), [("tensor", "channel"), ("channel", None), (InputGroups(5), "channel")]
)
def test_the_error_of_every_method_is_the_one_told_and_never_rises(method, granularity, scale):
    problem = drawn(9, 18, 3)
    solution = quantize(problem, bits=3, method=method, granularity=granularity, scale=scale)
    assert is_falling(solution.errors)
    error = output_error(problem, np.asarray(nuqjax.decompress(leaf_of(problem, solution, 3, granularity, scale))))
    assert error == pytest.approx(list(solution.errors.values())[-1], rel=1e-3)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("scale", [None, "channel"])
@pytest.mark.parametrize(("keep_zero", "rate"), [(False, None), (True, None), (False, 1e-4)])
def test_a_grid_stays_one_and_its_refit_pays(granularity, scale, keep_zero, rate):
    problem = drawn(9, 18, 3)
    given = dict(bits=3, method="uniform", granularity=granularity, scale=scale, keep_zero=keep_zero, rate=rate)
    solution = quantize(problem, **given)
    assert is_a_grid(solution.levels)
    assert not keep_zero or (solution.levels == 0).any(axis=1).all()
    assert list(solution.errors.values())[-1] < list(quantize(problem, **given, refit=0).errors.values())[-1]


@pytest.mark.parametrize("keep_zero", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_grid_is_better_for_the_indices(seed, keep_zero):
    problem = drawn(6, 30, seed=seed)
    given = dict(bits=2, method="uniform", scale=None, refit=40, keep_zero=keep_zero)
    solution = quantize(problem, **given)
    root = np.linalg.cholesky(problem.hessian[0])
    numbers = solution.indices.astype(np.float64) - (2 if keep_zero else 0)
    columns = [numbers] if keep_zero else [numbers, np.ones_like(numbers)]
    design = np.stack([(column @ root).reshape(-1) for column in columns], axis=1)
    best = np.linalg.lstsq(design, (problem.weights @ root).reshape(-1))[0]
    exact = sum(x * column for x, column in zip(best, columns, strict=True))
    assert list(solution.errors.values())[-1] <= output_error(problem, exact) * (1 + 2e-3)


@pytest.mark.parametrize("method", OTHERS)
def test_levels_of_other_methods_stay_as_fitted(method):
    problem = drawn(9, 18)
    given = dict(bits=3, method=method, granularity="channel")
    refitted, fitted = quantize(problem, **given), quantize(problem, **given, refit=0)
    assert np.array_equal(refitted.levels, fitted.levels)
    assert "refit" in refitted.errors


def test_levels_that_are_free_are_better_than_a_grid_and_a_grid_with_data_than_one_without():
    rng = np.random.default_rng(0)
    weights = rng.standard_t(4, size=(48, 24)).astype(np.float32)
    batches = [(rng.normal(size=(64, 6)) @ rng.normal(size=(6, 48)) + 1).astype(np.float32) for _ in range(3)]
    given = dict(bits=3, codebook_format=jnp.float16, return_report=True)
    params = {"w": weights}
    fn = lambda params, x: jax.nn.relu(x @ params["w"])  # noqa: E731
    errors = {}
    for method in ("knq", "enq", "uniform", "normal"):
        made, report = nuqjax.compress(params, method=method, fn=fn, batches=batches, **given)
        assert report.leaves[0].method == f"{method}+feedback+refit"
        errors[method] = list(report.calibration["layer_errors"]["w"].values())
        assert method != "uniform" or is_a_grid(np.asarray(made["w"].levels), 1e-3)
    assert errors["knq"][-1] < errors["uniform"][-1] < errors["uniform"][0]
    assert errors["enq"][-1] < errors["uniform"][-1]


def test_a_rules_method_is_that_of_its_leaf_and_a_rate_refuses_levels_that_it_cannot_place():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(32, 32)).astype(np.float32) for name in ("a", "b")}
    batches = [rng.normal(size=(32, 32)).astype(np.float32) for _ in range(3)]
    fn = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]  # noqa: E731
    rules = nuqjax.Rule("b", method="quantile")
    _, report = nuqjax.compress(params, fn=fn, batches=batches, rules=rules, return_report=True)
    assert [leaf.method.split("+")[0] for leaf in report.leaves] == ["knq", "quantile"]
    with pytest.raises(ValueError, match=r"b: method='quantile' with rate=.*\"uniform\" goes with it"):
        nuqjax.compress(params, fn=fn, batches=batches, rules=rules, rate="3bpw")
    with pytest.raises(ValueError, match="unknown method 'other'"):
        quantize(Problem(params["a"], shrunk(np.eye(32)[None], 10, 1)), bits=3, method="other")
