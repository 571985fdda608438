"""The benchmark fits what it says, judges levels rightly and reports every tool. What it times is not tested."""

import argparse
import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nuqjax
from experiments import networks
from experiments.speed import fit as benchmark_fit
from experiments.speed import fresh_process
from experiments.speed.draws import student_t
from experiments.speed.fit import Case, Options, Tool

ENTRY = {"tool", "status", "first_call", "runs", "seconds", "ratio", "weights_per_second", "sse", "excess", "over_best"}
SIZES = {"rows": 3000, "half": 3000, "channels": 2 * 4608, "groups": 100 * 64}


@pytest.fixture
def only_ours(monkeypatch):
    """The other tools count as not installed: their imports and warnings are their own affair."""
    monkeypatch.setattr(benchmark_fit.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("section", SIZES)
def test_a_section_measures_each_case_and_the_proof_holds(section, only_ours):
    options = Options(sizes=(SIZES[section],), levels=(4, 16), repeats=2)
    seen = []
    results = benchmark_fit.run([section], options, lambda so_far: seen.append(len(so_far["sections"][section])))
    results = json.loads(json.dumps(results, allow_nan=False))
    assert set(results) == {"repeats", "budget_seconds", "versions", "platform", "sections"}
    cells = results["sections"][section]
    assert seen == list(range(1, len(cells) + 1))
    assert len(cells) == {"rows": 2, "half": 4, "channels": 1, "groups": 1}[section]
    for cell in cells:
        assert cell["values"] == SIZES[section]
        assert cell["rows"] == {"channels": 2, "groups": 100}.get(section, 1)
        ours, proven, *others = cell["entries"]
        for entry in (ours, proven):
            assert set(entry) == ENTRY
            assert entry["status"] == "measured"
            assert len(entry["runs"]) == 2
            assert min(entry["runs"]) <= entry["seconds"] <= max(entry["runs"])
        assert ours["ratio"] == 1
        assert ours["excess"] >= -1e-9
        assert -1e-9 <= proven["excess"] <= 1e-6
        assert -1e-9 <= cell["gap"] <= 1e-6
        assert {entry["status"] for entry in others} == {"not installed"}


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6),
)
def test_the_squared_error_is_that_of_the_nearest_levels(values, levels):
    values = np.array(values, np.float32)
    every = (values.astype(np.float64)[:, None] - np.array(levels)) ** 2
    expected = every.min(axis=1).sum()
    assert benchmark_fit.squared_error(values, np.array(levels)) == pytest.approx(expected, rel=1e-12, abs=0)


def test_the_squared_error_is_summed_over_all_blocks(monkeypatch):
    values = student_t(3, (1000,))
    whole = benchmark_fit.squared_error(values, np.array([-1.0, 1.0]))
    monkeypatch.setattr(benchmark_fit, "_BLOCK", 64)
    assert benchmark_fit.squared_error(values, np.array([-1.0, 1.0])) == pytest.approx(whole, rel=1e-13)


def test_the_data_are_the_same_at_every_call_and_heavy_tailed():
    first, second = (student_t(3, (2, 50_000)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    # |t3| exceeds 5.841 with probability 0.01 (any table): five standard deviations of 100,000 draws are 0.0016.
    assert np.mean(np.abs(first) > 5.841) == pytest.approx(0.01, abs=0.0016)


@pytest.mark.parametrize("package", ["kmeans1d", "sklearn"])
def test_the_other_tools_levels_are_of_the_row(package):
    """Of well separated clusters every tool finds the means; float16 rows come as distinct values with counts."""
    row = np.array([[1, 1.5, 1, 100, 101, -50, -50, -50.5]], np.float16)
    expected = np.sort(nuqjax.fit(jnp.asarray(row), 3).levels[0])
    tools = [t for t in (*benchmark_fit.ROW_TOOLS, *benchmark_fit.HALF_TOOLS) if t.package == package]
    assert tools
    for tool in tools:
        values = row if tool in benchmark_fit.HALF_TOOLS else row.astype(np.float32)
        np.testing.assert_allclose(np.sort(tool.fit(values, 3)[0]), expected, rtol=1e-6, err_msg=tool.name)


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("package", ["coremltools", "coreai_opt"])
def test_the_palettizers_of_torch_models_give_the_levels_of_each_row(package):
    pytest.importorskip("torch", reason="PyTorch comes with the group `benchmark`, not with `test`")
    pytest.importorskip(package, reason="comes with the group `benchmark`, not with `test`")
    tool = next(t for t in benchmark_fit.CHANNEL_TOOLS if t.package == package and t.needs == ("torch",))
    rows = np.float32([[1, 1.25, 1, 3, 3.25, -5, -5, -9] * 4, [7, 8, 9, 10, 7, 8, 9, 10] * 4])
    for chosen in (rows, rows[:1]):
        levels = np.sort(tool.fit(chosen, 4), axis=1)
        expected = nuqjax.fit(jnp.asarray(chosen), 4).levels
        np.testing.assert_allclose(levels, expected, atol=2.0**-10 * 16)  # they round to float16
    seen = tool.fit(np.asarray(rows[:1], ml_dtypes.bfloat16), 4)
    assert np.shape(seen) == (1, 4)


def _quantiles(rows, num_levels):
    return [np.quantile(row, (np.arange(num_levels) + 0.5) / num_levels) for row in rows]


@pytest.mark.parametrize(
    ("tool", "status"),
    [
        (Tool("quantiles", "numpy", _quantiles), "measured"),
        (Tool("absent", "no_such_package", _quantiles), "not installed"),
        (Tool("half there", "numpy", _quantiles, needs=("no_such_package",)), "not installed"),
        (Tool("few levels", "numpy", _quantiles, most_levels=7), "takes at most 7 levels"),
        (Tool("short rows", "numpy", _quantiles, longest=1000), "skipped: more than 1,000 values"),
        (Tool("slow", "numpy", _quantiles), "skipped: predicted"),
    ],
)
def test_a_tool_is_measured_or_said_why_not(tool, status, monkeypatch):
    if tool.name == "slow":
        clock = itertools.count()
        monkeypatch.setattr(benchmark_fit.time, "perf_counter", lambda: float(next(clock)))
        monkeypatch.setattr(benchmark_fit, "_UNPREDICTED", 100)
    case = Case("t3", [student_t(3, (1, 2000))], 8, [tool])
    cell = benchmark_fit.run_case(case, Options(repeats=1, budget=10))
    ours, _, entry = cell["entries"]
    assert entry["status"].startswith(status)
    if status == "measured":
        assert set(entry) == ENTRY
        assert entry["excess"] > 0.01  # quantiles are far from the best levels of a heavy tail
        assert entry["over_best"] == pytest.approx(entry["sse"] / ours["sse"] - 1, abs=1e-6)
        assert entry["ratio"] == entry["seconds"] / ours["seconds"]
    else:
        assert set(entry) == {"tool", "status"}


def test_the_predicted_time_is_in_proportion_to_the_data(monkeypatch):
    """A clock that advances with the values seen: a second for a thousand."""
    seen = [0]

    def fit(rows, num_levels):
        seen[0] += rows.size
        return [row[:num_levels] for row in rows]

    monkeypatch.setattr(benchmark_fit.time, "perf_counter", lambda: seen[0] / 1000)
    tool = Tool("counts", "numpy", fit)
    for shapes in ([(1, 40_000)], [(400, 100)], [(30, 500), (50, 500)]):
        case = Case("zeros", [np.zeros(shape, np.float32) for shape in shapes], 4, [tool])
        assert benchmark_fit.predicted_seconds(tool, case) == pytest.approx(40)


def test_calls_stop_when_the_budget_is_spent(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(benchmark_fit.time, "perf_counter", lambda: float(next(clock)))
    calls = []
    times, result = benchmark_fit.measure(lambda: calls.append(0) or len(calls), repeats=5, budget=3)
    assert (times, result, len(calls)) == ({"first_call": 1.0, "runs": [1.0, 1.0], "seconds": 1.0}, 1, 3)


def test_kernels_become_a_row_for_each_output_channel():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)
    (rows,) = benchmark_fit.kernel_rows({"conv": {"kernel": kernel, "bias": np.zeros(5, np.float32)}})
    assert rows.shape == (5, 36)
    np.testing.assert_array_equal(rows[2], kernel[..., 2].ravel())


def test_vgg16_has_4224_channels(data):
    *_, case = benchmark_fit.channel_cases(Options(sizes=(4608,), data=data))
    assert len(case.matrices) == 13
    assert sum(len(rows) for rows in case.matrices) == 4224
    assert sum(rows.size for rows in case.matrices) == 14_710_464


def test_the_command_line_writes_json_and_prints_every_tool(only_ours, tmp_path, capsys):
    file = tmp_path / "results.json"
    assert benchmark_fit.main(["rows", "--sizes", "2e3", "--levels", "4", "--repeats", "1", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert results["commands"] == ["python -m experiments.speed.fit rows --sizes 2000 --levels 4 --repeats 1"]
    assert list(results["sections"]) == ["rows"]
    printed = capsys.readouterr().out
    for entry in results["sections"]["rows"][0]["entries"]:
        assert entry["tool"] in printed
    assert "not installed" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["columns"], "unknown section columns"),
        (["rows", "--sizes", "1.5"], "whole positive numbers"),
        (["rows", "--levels", "512"], "2 to 256"),
        (["rows", "--repeats", "0"], "at least 1"),
        (["channels", "--data", "no/such/folder"], "is missing"),
    ],
)
def test_wrong_arguments_are_said(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark_fit.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_numbers_want_to_be_whole():
    with pytest.raises(argparse.ArgumentTypeError):
        benchmark_fit._numbers("")


def test_a_narrow_tree_is_compressed_in_a_new_process():
    results = benchmark_fit.run(["tree"], Options(sizes=(200_000,), repeats=1))
    cell = json.loads(json.dumps(results, allow_nan=False))["sections"]["tree"][0]
    assert cell["data"] == "VGG-16, narrowed, no trained layers"
    assert 100_000 < cell["values"] < 400_000
    assert cell["bytes"] == 4 * cell["values"]
    assert cell["bytes"] / 8 < cell["compressed_bytes"] < cell["bytes"] / 4
    assert 0 < cell["imported"] < cell["loaded"] < cell["cold"]
    assert cell["peak_bytes"] >= cell["peak_before_bytes"] > cell["bytes"]
    assert len(cell["runs"]) == 1


def test_a_row_is_fitted_in_a_new_process():
    results = benchmark_fit.run(["curve"], Options(sizes=(3000,), repeats=2))
    cells = json.loads(json.dumps(results, allow_nan=False))["sections"]["curve"]
    assert [(cell["data"], cell["bytes"]) for cell in cells] == [("t3 float32", 12_000), ("t3 bfloat16", 6_000)]
    for cell in cells:
        assert len(cell["runs"]) == len(cell["proven_runs"]) == 2
        assert cell["proven_peak_bytes"] >= cell["peak_bytes"] >= cell["peak_before_bytes"] > cell["bytes"]


def test_peak_memory_does_not_begin_at_that_of_the_process_that_started_it():
    before = fresh_process.peak_bytes()
    held = np.ones(2**27, np.uint8)  # 128 MiB
    assert fresh_process.peak_bytes() >= before
    size = fresh_process.measure("row", size=100, dtype="float32", num_levels=2, repeats=1)["peak_before_bytes"]
    more = np.ones(2**28, np.uint8)
    again = fresh_process.measure("row", size=100, dtype="float32", num_levels=2, repeats=1)["peak_before_bytes"]
    assert abs(again - size) < 2**26 < held.size < more.size


def test_the_tree_is_that_of_vgg16():
    network = networks.get("vgg16")
    inputs = np.zeros((1, network.size, network.size, 3), np.float32)
    shapes = jax.eval_shape(network.module.init, jax.random.key(0), inputs)["params"]
    narrow = dict(benchmark_fit.vgg16_tree(None, 100_000))
    assert len(narrow) == len(jax.tree.leaves(shapes)) == 32
    kernel = narrow["features.Conv_12.kernel"]
    assert kernel.shape[:2] == (3, 3)
    assert kernel.shape[2] == kernel.shape[3] == round(512 * (100_000 / 138_357_544) ** 0.5)
    values = np.concatenate([leaf.ravel() for leaf in narrow.values()])
    assert len(np.unique(values)) > 0.99 * values.size  # every layer has values of its own
