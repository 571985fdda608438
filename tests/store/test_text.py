"""The layout's text: small for many small leaves, both forms read, and neither larger than the file allows."""

import base64
import json
import tracemalloc
import zlib

import jax
import numpy as np
import pytest

import nuqjax
from nuqjax._src.store import layout, store
from nuqjax._src.store import text as store_text


def small_leaves(count):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype("f4")  # noqa: E731
    return {str(i): {"attention": {n: draw(24, 24) for n in "qkvo"}, "norm": draw(24)} for i in range(count)}


def header_size(path):
    return int.from_bytes(path.read_bytes()[:8], "little")


@pytest.fixture(scope="module")
def plain_and_deflated(tmp_path_factory):
    """A tree, its report, and a folder of its files in the first form and today's, with the report and without."""
    folder = tmp_path_factory.mktemp("forms")
    cparams, report = nuqjax.compress(small_leaves(16), method="normal", bits=3, return_report=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_text, "_most", lambda _: 0)
        patch.setattr(layout, "_SMALL", -1)
        nuqjax.save(folder / "plain", cparams, report=report)
        nuqjax.save(folder / "plain, bare", cparams)
    nuqjax.save(folder / "deflated", cparams, report=report)
    nuqjax.save(folder / "deflated, bare", cparams)
    assert b'"nuqjax":"{\\"version\\":1,' in (folder / "plain").read_bytes()
    return cparams, report, folder


@pytest.mark.parametrize("form", ["", ", bare"])
def test_the_header_of_many_small_leaves_is_a_quarter(plain_and_deflated, form):
    _, _, folder = plain_and_deflated
    assert header_size(folder / f"plain{form}") > 7 * header_size(folder / f"deflated{form}")


def test_both_forms_are_read(plain_and_deflated):
    cparams, report, folder = plain_and_deflated
    for path in (folder / "plain", folder / "deflated"):
        found = nuqjax.load(path)
        assert jax.tree.structure(found) == jax.tree.structure(cparams)
        assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(cparams)))
        assert nuqjax.inspect(path) == report
        assert len(nuqjax.open_checkpoint(path).leaves) == len(report.leaves)


def test_small_tensors_share_one_for_each_dtype(tmp_path):
    """Of every dtype and shape, scalars and what is empty among them; large ones, and few, have one of their own."""
    dtypes = ("f4", "f2", "bfloat16", "i8", "bool", "int4", "c8", "float8_e4m3", "u4")
    shapes = ((), (0, 3), (3,), (2, 5))
    tree = {f"{d}.{n}": np.ones(shape, d) for d in dtypes for n, shape in enumerate(shapes)}
    tree |= {"large": np.arange(1025, dtype="f4"), "small": {"F32": np.ones(3, "f4")}, "small.F32": np.zeros(2, "f4")}
    path = tmp_path / "f"
    nuqjax.save(path, tree)
    tensors = store.open_bundle(path).files
    codes = {f"small.{code}" for code in ("F16", "BF16", "I64", "BOOL", "I8", "U8", "U32")}
    assert set(tensors) == {"large", "small.F32~", *codes}
    for found in (nuqjax.load(path, numpy=True), nuqjax.load(path)):
        flat, names = jax.tree.leaves(found), [str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for name, got, wanted in zip(names, flat, jax.tree.leaves(tree), strict=True):
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
            assert np.asarray(got).tobytes() == wanted.tobytes(), name
    assert nuqjax.load(path, leaves="^u4.2$", numpy=True)["u4.2"].tolist() == [1, 1, 1]
    nuqjax.save(path, tree, max_shard_size=2000)
    assert len(store.open_bundle(path).files) == len(tree)
    nuqjax.save(path, {f"{n}": np.ones(3, "f4") for n in range(7)})
    assert len(store.open_bundle(path).files) == 7
    nuqjax.save(path, {f"{n}": np.ones(3, "f4") for n in range(8)})
    assert set(store.open_bundle(path).files) == {"small.F32"}


@pytest.mark.parametrize("count", [0, 1, 1000, 100_000])
def test_a_text_is_never_longer_than_the_plain_one(count):
    layout = {"leaves": ["leaf"] * count}
    text = store_text.to_text(layout)
    assert store_text.from_text(text, "FILE") == {"version": 1, **layout}
    assert len(text) <= len(json.dumps({"version": 1, **layout}, separators=(",", ":")))
    assert json.loads(text)["version"] == {1000: 2}.get(count, 1)  # of 100,000 the plain is beyond the bound


def deflated(data):
    return json.dumps({"version": 2, "deflated": base64.b64encode(data).decode()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version":2}', "does not have just version and deflated"),
        ('{"version":2,"deflated":3}', "does not have just version and deflated"),
        ('{"version":2,"deflated":"","tree":[]}', "does not have just version and deflated"),
        ('{"version":2,"deflated":"é"}', "is not deflated as the format requires"),
        ('{"version":2,"deflated":"====","deflated":""}', "the key 'deflated' appears twice"),
        ('{"version":2,"deflated":"eJw"}', "is not deflated as the format requires"),
        (deflated(b""), "it ends too early or too late"),
        (deflated(b"text"), "is not deflated as the format requires"),
        (deflated(zlib.compress(b'{"version":1}')[:-2]), "it ends too early or too late"),
        (deflated(zlib.compress(b'{"version":1}') + b"more"), "it ends too early or too late"),
        (deflated(zlib.compress(b"\xff")), "not JSON that is allowed here"),
        (deflated(zlib.compress(b"[]")), "the layout has no version"),
        (deflated(zlib.compress(b'{"version":2,"deflated":""}')), "version 2"),
        (deflated(zlib.compress(b'{"version":5}')), "version 5"),
    ],
)
def test_a_text_that_lies(text, message):
    with pytest.raises(ValueError, match=f"^FILE.*{message}"):
        store_text.from_text(text, "FILE")


@pytest.mark.parametrize("size", [10**6, 10**7])
def test_a_small_text_does_not_stand_for_a_large_layout(size):
    text = deflated(zlib.compress(b'{"version":1,"leaves":"' + b"x" * size + b'"}', 9))
    tracemalloc.start()
    with pytest.raises(ValueError, match="that would expand more than 32-fold"):
        store_text.from_text(text, "FILE")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * len(text) + (1 << 18)


@pytest.mark.parametrize("limit", [None, 2000])
def test_the_report_of_a_file_has_its_bytes(tmp_path, limit):
    source, path = tmp_path / "source.npz", tmp_path / "out" / "x.safetensors"
    path.parent.mkdir()
    np.savez(source, w=np.linspace(-1, 1, 4096, dtype="f4").reshape(64, 64), b=np.ones(9, "f4"))
    report = nuqjax.compress_checkpoint(source, path, method="normal", max_shard_size=limit)
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    assert report.nbytes_file == report.total["nbytes_file"] == nuqjax.inspect(path).nbytes_file == size
    assert report.nbytes_source == source.stat().st_size
    assert str(report).endswith(f"; file {size:,} bytes")
    assert report.to_dict()["total"]["nbytes_file"] == size
    nuqjax.save(path, nuqjax.load(path))
    assert nuqjax.inspect(path).nbytes_file == path.stat().st_size  # without a stored report too


def test_a_file_that_grew_is_told(tmp_path):
    """Dense copies and a header take more than the source; nothing is said where they do not."""
    source, path = tmp_path / "source.npz", tmp_path / "x"
    np.savez_compressed(source, **{str(i): np.zeros((16, 16), "f4") for i in range(8)})
    with pytest.warns(UserWarning, match=r"the file takes [\d,]+ bytes, more than what it was made of \([\d,]+\)"):
        report = nuqjax.compress_checkpoint(source, path, method="normal")
    assert report.nbytes_file > report.nbytes_source
    assert str(report).splitlines()[-1] == f"warning: {report.growth}"
    nuqjax.save(path, {"b": np.ones(3, "f4")})
    assert "more than the dense leaves (12)" in str(nuqjax.inspect(path))
