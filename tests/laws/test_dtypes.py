"""Whatever holds its values, an array is taken for what it is: dtypes, byte orders and layouts in memory."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import nuqjax
from nuqjax import AutoQFormat, InputGroups, QFormat, Rule

FLOATS = [
    "float64", "float32", "float16", "bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn",
]  # fmt: skip
UNFIT = {
    "float6_e2m3fn": "XLA does not compute with dtype float6_e2m3fn",
    "float6_e3m2fn": "XLA does not compute with dtype float6_e3m2fn",
    "float8_e8m0fnu": "dtype float8_e8m0fnu has neither zero nor negative numbers",
    np.dtype(np.longdouble).name: f"JAX has no dtype {np.dtype(np.longdouble).name}",
}


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def values(name: str, shape=(40, 24)) -> np.ndarray:
    return np.clip(np.random.default_rng(0).standard_t(4, shape), -4, 4).astype(dtype_of(name))


def layouts(array: np.ndarray, folder) -> dict[str, np.ndarray]:
    """The array in every way that NumPy can hold it."""
    swapped = array.astype(array.dtype.newbyteorder("S")) if array.dtype.isbuiltin == 1 else array
    sparse = np.zeros([2 * n for n in array.shape], array.dtype)
    sparse[::2, ::2] = array
    fixed = array.copy()
    fixed.flags.writeable = False
    shifted = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    path = folder / array.dtype.name
    path.write_bytes(swapped.tobytes())
    return {
        "swapped bytes": swapped,
        "columns first": np.asfortranarray(array),
        "swapped, columns first": np.asfortranarray(swapped),
        "every other": sparse[::2, ::2],
        "backwards": np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
        "read-only": fixed,
        "unaligned": shifted,
        "a mapped file": np.memmap(path, swapped.dtype, "r", shape=array.shape),
    }


def bits(tree) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize(
    "options", [{}, {"granularity": "channel"}, {"scale": "channel", "method": "uniform"}, {"sensitivity": True}]
)
def test_every_layout_in_memory_gives_what_the_native_one_gives(name, options, tmp_path):
    native = values(name)
    weights = np.abs(values("float32")) if options.pop("sensitivity", False) else None

    def everything(array, weights):
        params = {"w": array, "b": array[0]}
        cparams, report = nuqjax.compress(
            params, 3, return_report=True, sensitivity=None if weights is None else {"w": weights}, **options
        )
        fitted = nuqjax.fit(array, 8, "enq")
        nuqjax.save(tmp_path / "saved.safetensors", cparams)
        told = [str(x) for x in (report, nuqjax.report(params, cparams), nuqjax.plan(params, 3, **options))]
        return (
            bits(cparams["w"]), bits(fitted), bits(nuqjax.assign(array, fitted.levels)), told,
            (tmp_path / "saved.safetensors").read_bytes(),
        )  # fmt: skip

    wanted = everything(native, weights)
    heavy = dict.fromkeys(layouts(native, tmp_path)) if weights is None else layouts(weights, tmp_path)
    for kind, array in layouts(native, tmp_path).items():
        assert everything(array, heavy[kind]) == wanted, kind


@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16"])
def test_broadcast_and_empty_arrays_are_as_their_copies(name):
    row = values(name, (300,))
    for array in (np.broadcast_to(row, (4, 300)), np.broadcast_to(row[:, None], (300, 4)), np.zeros((0, 3), row.dtype)):
        for made in (array, array.astype(array.dtype.newbyteorder("S")) if name != "bfloat16" else array):
            cparams, wanted = (nuqjax.compress({"w": x}, 2, rules=Rule("w", skip=False)) for x in (made, array.copy()))
            assert bits(cparams) == bits(wanted)


@functools.cache
def compressed(name: str, option: str):
    options = {
        "tensor": {},
        "scale": {"scale": "channel"},
        "scales, words": {"scale": InputGroups(7), "codebook_format": QFormat(4, 2)},
        "words": {"codebook_format": AutoQFormat(6)},
        "bfloat16": {"codebook_format": "bfloat16", "granularity": "channel"},
    }
    params = {"w": values(name)}
    return params, nuqjax.compress(params, 3, rules=Rule("w", skip=False), **options[option])


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("option", ["tensor", "scale", "scales, words", "words", "bfloat16"])
def test_every_floating_dtype_goes_all_the_way(name, option, tmp_path):
    params, cparams = compressed(name, option)
    dense = nuqjax.decompress(cparams)["w"]
    assert dense.dtype == (jnp.float32 if name == "float64" else dtype_of(name))
    as_floats = np.asarray(dense).astype(np.float64)
    assert np.isfinite(as_floats).all()
    signal = params["w"].astype(np.float64)
    assert np.sum((signal - as_floats) ** 2) < 0.2 * np.sum(signal**2)
    ran = nuqjax.apply(lambda p: jax.lax.convert_element_type(p["w"], jnp.float32))(cparams)
    np.testing.assert_array_equal(ran, np.asarray(dense).astype(np.float32))
    assert "w" in str(nuqjax.report(params, cparams))
    nuqjax.save(tmp_path / "f.safetensors", cparams)
    assert bits(nuqjax.load(tmp_path / "f.safetensors")) == bits(cparams)


@pytest.mark.parametrize("name", UNFIT)
def test_a_dtype_that_nothing_computes_with_is_left_dense_and_refused_by_name(name):
    params = {"w": np.ones((20, 20), dtype_of(name)), "v": values("float32")}
    cparams, report = nuqjax.compress(params, return_report=True)
    assert cparams["w"] is params["w"]
    assert [leaf.reason for leaf in report.dense] == [UNFIT[name]]
    assert [leaf.reason for leaf in nuqjax.plan(params).leaves] == [None, UNFIT[name]]
    for refused in (nuqjax.compress, nuqjax.plan):
        with pytest.raises(ValueError, match=f"w: rule 'w' has skip=False, but {UNFIT[name]}"):
            refused(params, rules=[Rule("w", skip=False)])
    with pytest.raises(ValueError, match=UNFIT[name]):
        nuqjax.fit(params["w"], 4)


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float6_e2m3fn"])
def test_a_dtype_that_nothing_computes_with_is_no_format_of_levels(name):
    with pytest.raises(ValueError, match=f"codebook_format={name}: {UNFIT[name]}"):
        nuqjax.compress({"w": values("float32")}, codebook_format=dtype_of(name))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("method", ["knq", "uniform", "dfp", "pow2"])
def test_what_is_finite_decodes_to_something_finite(name, method):
    largest = float(jnp.finfo(dtype_of(name)).max)
    unit = np.clip(values("float64", (16, 24)), -1, 1)
    for row in (unit, np.sign(unit), -np.abs(unit)):
        params = {"w": np.clip(row * largest, -largest, largest).astype(dtype_of(name))}
        for codebook_format in (None, "bfloat16", "float8_e4m3fn", QFormat(4, -1), QFormat(4, 3), AutoQFormat(4)):
            for options in ({}, {"scale": "channel"}, {"scale": InputGroups(5)}):
                cparams = nuqjax.compress(
                    params, 2, method, codebook_format=codebook_format, rules=Rule("w", skip=False), tolerance=None,
                    **options,
                )  # fmt: skip
                dense = np.asarray(nuqjax.decompress(cparams)["w"]).astype(np.float64)
                assert np.isfinite(dense).all(), (codebook_format, options)


def test_levels_rounded_under_a_trace_are_finite_too():
    params = {"w": jnp.full((4, 8), 65504, jnp.float16).at[0].set(-65504)}
    for options in ({"codebook_format": "bfloat16"}, {"scale": "channel", "codebook_format": QFormat(4, -1)}):
        given = functools.partial(nuqjax.compress, bits=1, method="uniform", rules=Rule("w", skip=False), **options)
        assert bits(jax.jit(given)(params)) == bits(given(params))
        assert np.isfinite(np.asarray(nuqjax.decompress(given(params))["w"], np.float64)).all()


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(
    "name", [*FLOATS, "float6_e2m3fn", "float6_e3m2fn", "float8_e8m0fnu", "int4", "uint2", "int64"]
)
def test_what_is_saved_can_be_loaded(name, placed, tmp_path):
    """Arrays of a dtype that JAX does not hold come back as NumPy's: float6 was saved, and ended in XLA's error."""
    array = np.ones((4, 3)).astype(dtype_of(name))
    nuqjax.save(tmp_path / "a", {"w": array})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if placed else None
    assert bits(nuqjax.load(tmp_path / "a", sharding=place)) == bits({"w": array})
