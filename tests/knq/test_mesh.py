"""Rows and leaves distributed over meshes (of devices forced on the host, so in a process of its own)."""

import os
import subprocess
import sys

import pytest

_BEGIN = """
import re

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from nuqjax._src.platform.host import x64
import nuqjax
from nuqjax._src.knq.run.mesh import MeshLayout, fit_at_once

assert jax.device_count() == 8
values = np.random.default_rng(0).standard_t(3, (2, 2**17)).astype(np.float32)


def mesh_of(shape, names):
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, names, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def gathered(compiled):  # bytes that any one operation brings together from all devices
    text = compiled.as_text()
    kinds = set(re.findall(r" (all-[a-z-]+|collective-[a-z]+)\\(", text))
    assert kinds <= {"all-reduce", "all-reduce-start", "all-reduce-done"}, kinds
    sizes = {"s32": 4, "u32": 4, "s64": 8, "f32": 4, "f64": 8}
    reduced = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\\(", line)]
    assert reduced
    shapes = [shape for line in reduced for shape in re.findall(r"(\\w+)\\[([\\d,]*)\\]", line.split(" all-reduce")[0])]
    return max(sizes[kind] * int(np.prod([int(n) for n in size.split(",") if n])) for kind, size in shapes)


def gap(fitted):  # that of the worst row
    sse, bound = (np.asarray(x, np.float64) for x in (fitted.sse, fitted.lower_bound))
    assert (bound <= sse).all()
    return ((sse - bound) / sse).max()


def same(rows, num_levels, mesh, spec, **options):  # proven to 1e-6, and to the same bits as on one device
    proven = options.get("tolerance", 1e-6) is not None
    one = nuqjax.fit(rows, num_levels, **options)
    many = nuqjax.fit(jax.device_put(rows, NamedSharding(mesh, spec)), num_levels, **options)
    np.testing.assert_array_equal(many.levels, one.levels)
    np.testing.assert_array_equal(many.scale, one.scale)
    assert not proven or max(gap(one), gap(many)) <= 1e-6 + 2.0**-22
    np.testing.assert_allclose(many.sse, one.sse, rtol=2.0**-22)
    np.testing.assert_allclose(many.lower_bound, one.lower_bound, rtol=2.0**-22)


rng = np.random.default_rng(1)
square = mesh_of((2, 4), ("rows", "values"))
both = P("rows", "values")
"""

_AT_ONCE = """
for dtype, num_levels, devices, spec in (
    (np.float32, 4, 8, P(None, "d")),
    (jnp.bfloat16, 16, 8, P(None, "d")),
):
    rows = jnp.asarray(values, dtype)
    one = nuqjax.fit(rows, num_levels, tolerance=None)
    placed = jax.device_put(rows, NamedSharding(mesh_of((devices,), ("d",)), spec))
    given = dict(num_levels=num_levels, layout=MeshLayout(placed.sharding, rows.shape, (0,)), keep_zero=False)
    run = fit_at_once.lower(placed, None, None, tolerance=None, **given).compile()
    fitted = run(placed, None, None)
    np.testing.assert_array_equal(fitted.levels, one.levels)
    np.testing.assert_array_equal(fitted.scale, one.scale)
    if dtype == jnp.bfloat16:  # a table of bit patterns
        assert gathered(run) <= 2 * 4 * 2**16
    elif devices == 8:  # counts and sums below some cuts
        assert gathered(run) < rows.nbytes / 10
print("the same bits")
"""

# Rows of 2¹³ values take the way of those longer than 2¹⁶, which is the same and costs more.
_LONG = """
from nuqjax._src.knq.run import host as fit_knq_host
from nuqjax._src.knq.run import levels as fit_knq_levels
from nuqjax._src.knq.run import mesh as fit_knq_mesh
from nuqjax._src.knq.search import search as fit_knq_search
from nuqjax._src.knq.run import traced as fit_knq_traced

for module in (fit_knq_host, fit_knq_levels, fit_knq_mesh, fit_knq_search, fit_knq_traced):
    assert module.LONG == 2**16
    module.LONG = 2**12
size = 2**13
"""

# With a proof: rows of which only counts and sums leave the devices, two by two. Gaps are narrowed of one row beside
# another that has none.
_HELD = (
    _LONG
    + """
rows = rng.standard_t(3, (4, size)).astype(np.float32)
rows[3, 5] = 1e9
for tolerance in (1e-6, None):
    same(rows, 4, square, both, tolerance=tolerance)
print("the same bits")
"""
)

_HELD_WITH_WEIGHTS = (
    _LONG
    + """
from nuqjax._src.knq.search import gaps as fit_knq_gaps
from nuqjax._src.knq.search.search import Partition


def by_rank(rows, num_levels, keep_zero, dense_cuts):  # a bad partition, which the proof improves
    xp = np if isinstance(rows.size, np.ndarray) else jnp
    return Partition(rows.before_ties(xp.arange(1, num_levels) * rows.size[:, None] // num_levels))


values = values[:1, :size]
heavy = dict(weights=rng.exponential(size=(1, size)) ** 3, mask=rng.random((1, size)) < 0.9)
heavy = {name: jnp.asarray(x, jnp.float32 if name == "weights" else bool) for name, x in heavy.items()}
found = fit_knq_gaps.partition
fit_knq_gaps.partition = fit_knq_mesh.partition = by_rank
same(values, 16, mesh_of((4,), ("d",)), P(None, "d"), keep_zero=True, **heavy)
fit_knq_gaps.partition = fit_knq_mesh.partition = found
# Two equal outliers weigh as much on a mesh as on one device. (At 16 levels the search above would be reused.)
tied = values.copy()
tied[0, [5, size - 9]] = 1e9
same(tied, 8, mesh_of((4,), ("d",)), P(None, "d"), keep_zero=True, **heavy)
# A level of values that weigh next to nothing is their mean there too.
far, weights = np.float64([1.7221562e9, 1.8e9]), np.float64([7e-13, 2e-13])
heavy = {name: np.array(x) for name, x in heavy.items()}
tied[0, [5, size - 9]], heavy["weights"][0, [5, size - 9]], heavy["mask"][0, [5, size - 9]] = far, weights, True
placed = jax.device_put(tied, NamedSharding(mesh_of((4,), ("d",)), P(None, "d")))
one, many = (nuqjax.fit(row, 8, keep_zero=True, **heavy) for row in (tied, placed))
np.testing.assert_array_equal(many.levels, one.levels)
np.testing.assert_allclose(many.levels[0, -1], (far * weights).sum() / weights.sum(), rtol=2.0**-22)
gap(many)
print("the same bits")
"""
)

_BROUGHT_OR_COUNTED = """
for spec in (both, P("rows")):
    same(jnp.asarray(values, jnp.bfloat16), 16, square, spec)
same(values, 16, square, P("rows"))
same(rng.standard_t(3, (10, 4000)).astype(np.float32), 16, square, both)
same(rng.pareto(0.5, (16, 64)).astype(np.float32), 4, square, P("rows"))  # one programme's bound does not do
same(rng.standard_t(3, (6, 600)).astype(np.float32), 4, square, P(), keep_zero=True)
print("the same bits")
"""

_COMPRESSED = """
params = {
    "a": jnp.asarray(rng.standard_t(3, (512, 64)), jnp.float32),
    "b": jnp.asarray(rng.standard_normal((4, 320, 8)), jnp.float32),
}
specs = {"a": P("rows", "values"), "b": P("values", None, "rows")}
placed = {name: jax.device_put(leaf, NamedSharding(square, specs[name])) for name, leaf in params.items()}
heavy = {name: jnp.asarray(rng.uniform(size=leaf.shape), jnp.float32) for name, leaf in params.items()}
for options in (
    {"granularity": "channel", "keep_zero": True, "tolerance": None},
    {"sensitivity": heavy, "tolerance": 1e-6},
    {"granularity": "channel", "keep_zero": True, "tolerance": 1e-6},
):
    options = {"rules": [nuqjax.Rule("b", stack_axes=1, skip=False)], "bits": 2, "return_report": True} | options
    (one, _), (many, told) = nuqjax.compress(params, **options), nuqjax.compress(placed, **options)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)
    if options["tolerance"] is not None:
        assert all(leaf.certificate <= 1e-6 + 2.0**-22 for leaf in told.leaves)
print("the same bits")
"""

_PROOFS = """
import kmeans1d

from nuqjax._src.knq.rows.long import sort_long_rows
from nuqjax._src.knq.proof.proof import prove
from nuqjax._src.knq.proof.mesh_row import _ASKED, MeshRow, Place, _cuts, _sums, _values, hold
from nuqjax._src.knq.proof.rows import HostRow

size = 12000
by_values = P(None, "d")
half = size // 2
families = {
    "t3": rng.standard_t(3, size),
    "lattice": np.round(300 * rng.standard_normal(size)),
    "outlier": np.append(rng.standard_normal(size - 1) + 20 * (np.arange(size - 1) % 2), 1e6),
    "far apart": np.append(rng.standard_normal(half), 1e4 + rng.standard_normal(half)),
    "tiny": 1e-30 * rng.laplace(size=size),
}


def on_devices(mesh, values, weight, unit, held_zero):  # what they hold, and the row as the proof sees it
    place = Place(mesh, (), ("d",), size)

    def part(x, w):
        rows = sort_long_rows(x, jnp.full(1, unit), w, None, held_zero, ("d",))
        return hold(rows), rows.zero

    run = jax.jit(place.run(part, (by_values, None if weight is None else by_values), (place.of_devices, P())))
    own = NamedSharding(mesh, by_values)
    state, zero = run(*(None if x is None else jax.device_put(x[None], own) for x in (values, weight)))
    zero = int(zero[0]) if held_zero else None
    return state, place, MeshRow(state, place, 0, size + held_zero, unit, zero, moved=False)


def on_the_host(values, weight, unit, held_zero):
    order = np.argsort(values, kind="stable")
    values, weight = values[order], np.ones(size) if weight is None else weight[order]
    zero = int(np.searchsorted(values, 0.0)) if held_zero else None
    if held_zero:
        values, weight = np.insert(values, zero, 0.0), np.insert(weight, zero, 0.0)
    return HostRow(values, unit, weight, zero)


def error(row, cuts):  # of a partition
    whole = np.unique([0, *cuts, row.size])
    weight, mean, square = row.measure(whole[:-1], whole[1:])
    if row.zero is not None:
        about_zero = np.searchsorted(whole, row.zero, side="right") - 1
        square[about_zero] += weight[about_zero] * mean[about_zero] ** 2
    return square.sum()


with x64():
    for devices, family, dtype, weighted, held_zero in (
        (2, "t3", np.float32, False, False),
        (4, "t3", np.float32, False, False),
        (8, "t3", np.float32, False, False),
        (8, "outlier", np.float32, False, False),
        (8, "lattice", np.float32, False, False),
        (8, "far apart", np.float32, False, False),
        (8, "tiny", np.float32, False, False),
        (4, "t3", np.float32, True, True),
        (4, "lattice", np.float32, True, True),
        (4, "tiny", np.float64, False, True),
    ):
        values, weight = families[family].astype(dtype), None
        if weighted:
            weight = rng.exponential(size=size) ** 4
            weight /= weight.max()
        unit = float(2.0 ** np.floor(np.log2(np.abs(values).max())))
        state, place, mesh_row = on_devices(mesh_of((devices,), ("d",)), values, weight, unit, held_zero)
        host_row = on_the_host(values, weight, unit, held_zero)

        places = np.unique(rng.integers(0, mesh_row.size, 300))
        np.testing.assert_array_equal(mesh_row.values_at(places), host_row.values_at(places))
        wanted = np.append(values[:300].astype(np.float64), [-1e9, 0.0, 1e9])
        for asked in ("cuts_below", "cuts_above"):
            np.testing.assert_array_equal(getattr(mesh_row, asked)(wanted), getattr(host_row, asked)(wanted))
        cuts = np.unique(mesh_row.settled(np.append(places, mesh_row.size)))
        cuts = np.unique(np.append(cuts, mesh_row.held_zero or 0))
        low, high = cuts[:-1][::2], cuts[1:][::2]
        for a, b in zip(mesh_row.measure(low, high), host_row.measure(low, high), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14 * np.abs(b).max())

        for num_levels in (4, 16, 64):
            bad = np.arange(1, num_levels)[None]
            (many,), (bound,) = prove([mesh_row], bad, num_levels, 1e-6)
            (one,), (other,) = prove([host_row], bad, num_levels, 1e-6)
            np.testing.assert_allclose(error(host_row, many), error(host_row, one), rtol=1e-6)
            np.testing.assert_allclose(bound, other, rtol=1e-6)  # one may go a round further
            if not weighted and not held_zero:
                row = host_row.values / unit
                levels = np.sort(kmeans1d.cluster(row, num_levels).centroids)
                nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, row)]
                best = ((row - nearest) ** 2).sum()
                assert best * (1 - 2e-6) <= bound <= best * (1 + 1e-11)

    floats, number = np.zeros(_ASKED), np.int32(0)  # of the last, float64 and with a pin
    for lowered in (
        _values.lower(state, number, floats.astype(np.int64), place=place),
        _cuts.lower(state, number, floats, place=place),
        _sums.lower(state, number, *[floats] * 4, place=place, squares=False),
        _sums.lower(state, number, *[floats] * 4, place=place, squares=True),
    ):
        assert gathered(lowered.compile()) <= 2 * 2 * 8 * _ASKED  # of two sums, two integers each
print("proven")
"""


def _run(program: str) -> str:
    flags = "--xla_force_host_platform_device_count=8"
    if program in (_HELD, _HELD_WITH_WEIGHTS, _PROOFS):  # large programs that run shortly
        flags += " --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", _BEGIN + program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(_HELD, id="held"),
        # On the other versions the rows held without weights are enough.
        pytest.param(_HELD_WITH_WEIGHTS, id="held, weights", marks=pytest.mark.versionless),
        pytest.param(_AT_ONCE, id="at once"),
        pytest.param(_COMPRESSED, id="compress"),
        pytest.param(_BROUGHT_OR_COUNTED, id="brought or counted"),
    ],
)
def test_levels_and_indices_are_the_same_bits_on_any_mesh_and_no_array_is_gathered(program):
    assert _run(program) == "the same bits"


@pytest.mark.slow
@pytest.mark.versionless  # the proof is NumPy's, and what it asks the devices for are sums
def test_rows_on_a_mesh_are_proven_as_on_one_device_and_no_array_is_gathered():
    assert _run(_PROOFS) == "proven"
