"""What is on the host is computed by NumPy: nothing is compiled, whatever the method and the options.

The sizes are such that no other test has them: what compiled for these would not be found ready.
"""

import itertools
import shlex
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import nuqjax
from nuqjax import AutoQFormat, ChannelGroups, InputGroups, QFormat, Rule, calibration, cli
from nuqjax._src.fit.methods import METHODS
from nuqjax._src.platform.compat import enable_x64

_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: _compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)

DTYPES = [np.float32, jnp.bfloat16, np.float16, np.float64]
FORMATS = [None, jnp.bfloat16, "float16", "float8_e4m3fn", QFormat(6, 4), AutoQFormat(5)]
GRANULARITIES = ["tensor", "channel", ChannelGroups(3), InputGroups(7)]


@contextmanager
def nothing_compiles():
    before = len(_compiled)
    yield
    assert len(_compiled) == before


def test_a_compilation_is_counted():
    with pytest.raises(AssertionError), nothing_compiles():
        jnp.zeros((3, 1, 61)) + 1


def drawn(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_t(3, shape).astype(dtype)


def held_by(array):
    """The array by NumPy and by JAX, which it may be asked of either."""
    return array, jax.device_put(array)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("method", METHODS)
def test_fit_and_assign(method, dtype):
    shape = (3, 59)
    rng = np.random.default_rng(1)
    weights, mask = rng.choice(np.float32([0, 1, 2.5]), shape), rng.random(shape) < 0.8
    with enable_x64(np.dtype(dtype) == np.float64):
        for rows in held_by(drawn(shape, dtype)):
            for weighted, masked, keep_zero in itertools.product((False, True), repeat=3):
                given = {"weights": weights if weighted else None, "mask": mask if masked else None}
                with nothing_compiles():
                    fitted = nuqjax.fit(rows, 4, method, keep_zero=keep_zero, **given)
                    indices = nuqjax.assign(rows, fitted.levels)
                assert all(isinstance(array, jax.Array) for array in (*fitted, indices))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "knq"])
@pytest.mark.parametrize("shape", [(2, 5003), (71, 3), (1, 70001)])
def test_long_rows_and_short_ones(method, shape):
    rows = drawn(shape, np.float32)
    with nothing_compiles():
        nuqjax.assign(rows, nuqjax.fit(rows, 32, method).levels)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_compress_decompress_and_report(method, granularity):
    shape = (2, 5, 11, 13)  # a stack of two slices
    importance = np.abs(drawn(shape, np.float32, 1))
    rules = [Rule("w", skip=False, stack_axes=1)]
    for number, (scale, codebook_format) in enumerate(itertools.product((None, "channel", InputGroups(9)), FORMATS)):
        dtype = DTYPES[number % 4]
        with enable_x64(np.dtype(dtype) == np.float64):
            params = {"w": held_by(drawn(shape, dtype))[number % 2], "empty": np.zeros((0, 67), dtype), "b": 1.0}
            with nothing_compiles():
                cparams, _ = nuqjax.compress(
                    params, 3, method, granularity=granularity, scale=scale, codebook_format=codebook_format,
                    keep_zero=number % 3 == 0, sensitivity={"w": importance} if number % 5 == 0 else None,
                    rules=rules, return_report=True,
                )  # fmt: skip
                dense = nuqjax.decompress(cparams)
                nuqjax.report(params, cparams)
                nuqjax.plan(params, 3, method, granularity=granularity)
            assert all(isinstance(array, jax.Array) for array in jax.tree.leaves((cparams["w"], dense["w"])))


@pytest.mark.parametrize("codebook_format", [None, "float16", AutoQFormat(5)], ids=str)
def test_calibration(codebook_format):
    weights, inputs = drawn((9, 43), np.float32), drawn((60, 43), np.float64)
    with nothing_compiles():
        hessian = calibration.shrunk((inputs.T @ inputs)[None] / 60, images=60, positions=1)
        weights = calibration.target(weights, hessian, hessian).astype(np.float32)
        calibration.quantize(calibration.Problem(weights, hessian), bits=3, codebook_format=codebook_format)


@pytest.mark.parametrize("method", ["enq", "knq"])
def test_files(method, tmp_path):
    params = {"w": held_by(drawn((29, 37), np.float32))[1], "h": drawn((29, 37), jnp.bfloat16)}
    file, target = tmp_path / "saved.safetensors", tmp_path / "target.safetensors"
    safetensors.numpy.save_file({"w": drawn((29, 37), np.float32)}, tmp_path / "dense.safetensors")
    with nothing_compiles():
        nuqjax.save(file, nuqjax.compress(params, 3, method, granularity="channel"))
        nuqjax.load(file)
        nuqjax.inspect(file)
        nuqjax.compress_checkpoint(tmp_path / "dense.safetensors", target, 3, method, codebook_format=AutoQFormat(8))


@pytest.mark.parametrize("method", ["uniform", "knq"])
def test_the_command_line(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    safetensors.numpy.save_file({"w": drawn((31, 41), np.float32), "h": drawn((41, 31), np.float16)}, "in.safetensors")
    for command in (
        f"compress in.safetensors out.safetensors --bits 3 --output-axis 0 --method {method} --scale channel",
        "inspect out.safetensors", "decompress out.safetensors back.npz", "compare in.safetensors out.safetensors",
        "plot out.safetensors pictures --source in.safetensors",
    ):  # fmt: skip
        with nothing_compiles():
            assert cli.main(shlex.split(command)) == 0, capsys.readouterr().err
