"""Damaged and hostile files: a ValueError that names the entry, or the tree; never anything else."""

import base64
import copy
import functools
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import zlib

import jax
import numpy as np
import pytest

import nuqjax
from nuqjax import ChannelGroups, InputGroups, QFormat, Rule
from nuqjax._src.leaf import packing
from nuqjax._src.leaf.check import check_structure
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.report.report import Report
from nuqjax._src.store import file as store_file
from nuqjax._src.store import layout as store_layout
from nuqjax._src.store import store

OLD = pathlib.Path(__file__).parents[1] / "laws" / "version3.safetensors"


def trees():
    """Small trees that use all that the format has."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    rules = [
        Rule("a", skip=False, granularity="channel", scale="channel", bits=3),
        Rule("b", skip=False, granularity=InputGroups(3), codebook_format=QFormat(5, 3), bits=2),
        Rule("c", skip=False, granularity=ChannelGroups(2), stack_axes=1, bits=1),
    ]
    small = {"a": draw(5, 3), "b": draw(7, 2), "c": draw(2, 3, 4)}
    coded = {"w": np.round(np.clip(draw(60, 20), -1, 1))}
    return {
        "codebooks": nuqjax.compress(small, method="normal", rules=rules),
        "coded": nuqjax.compress(coded, bits=2, method="uniform"),
        "others": {
            "x": [np.int32(3), np.arange(3, dtype=np.int8), None, (True, 2, 0.5, 1j, "text")],
            "y": {3: np.array([True, False]), 4: np.array([-8, 7]).astype("int4"), 5: np.zeros((0, 2))},
            "z": {("k", 1): np.array([1.5]).astype("bfloat16"), ("l", 0): np.ones(2, np.complex64)},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of each of `trees`."""
    folder = tmp_path_factory.mktemp("hostile")
    found = {}
    for name, tree in trees().items():
        nuqjax.save(folder / name, tree, entropy_coding=name == "coded")
        found[name] = (folder / name).read_bytes()
    assert b".coded" in found["coded"]
    params = {"w": np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8), "b": np.ones(2, np.float32)}
    cparams, report = nuqjax.compress(params, bits=1, method="uniform", min_size=0, return_report=True)
    nuqjax.save(folder / "reported", cparams, report=report)
    found["reported"] = (folder / "reported").read_bytes()
    params = {str(i): np.arange(3 + i, dtype=("f4", "i1")[i % 2]) for i in range(4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_layout, "_MANY", 1)
        nuqjax.save(folder / "pooled", params)
    found["pooled"] = (folder / "pooled").read_bytes()
    found["placed"] = as_version_3(found["pooled"])
    nuqjax.save(folder / "streams", {"v": trees()["coded"]["w"], "w": trees()["coded"]["w"]}, entropy_coding=True)
    found["streams"] = (folder / "streams").read_bytes()
    found["old"] = OLD.read_bytes()
    return found


def as_version_3(data):
    """A file whose small tensors are shared, as format version 3 had it: with the place of each, and its checksum."""
    header, layout, body = taken_apart(data)
    ends = {}
    for entry in layout["leaves"]:
        reference = entry["tensors"]["data"]
        name = {"float32": "small.F32", "int8": "small.I8"}[reference["dtype"]]
        begin, size = ends.get(name, 0), reference["shape"][0] * np.dtype(reference["dtype"]).itemsize
        ends[name] = begin + size
        start = header[name]["data_offsets"][0] + begin
        reference |= {"name": name, "at": begin, "crc32": zlib.crc32(body[start : start + size])}
    del layout["shared"]
    return put_together(header, layout | {"version": 3}, body)


def load(data, verify=True):
    """`nuqjax.load` of a file in memory."""
    bundle = store_file.bundle_file(store_file.parse(np.frombuffer(bytes(data), np.uint8), "FILE"))
    return store.from_bundle(bundle, numpy=True, verify=verify)


def taken_apart(data):
    """Header, layout and body of a file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    layout = json.loads(header["__metadata__"]["nuqjax"])
    if "deflated" in layout:
        layout = json.loads(zlib.decompress(base64.b64decode(layout["deflated"])))
    return header, layout, data[8 + length :]


def put_together(header, layout, body):
    """A file whose layout has its right checksum, whatever it says."""
    text = layout if isinstance(layout, str) else json.dumps(layout)
    header["__metadata__"] = {"nuqjax": text, "nuqjax.crc32": f"{zlib.crc32(text.encode()):08x}"}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def refused(data, message, verify=True):
    with pytest.raises(ValueError, match=message):
        load(data, verify)


# The container


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "FILE: 0 bytes, too few for a safetensors file"),
        (b"\x02\0\0\0\0\0\0", "FILE: 7 bytes, too few"),
        (b"\xff" * 8 + b"{}", "FILE: a header of 18446744073709551615 bytes, but 2 bytes follow"),
        (b"\x03\0\0\0\0\0\0\0{}", "FILE: a header of 3 bytes, but 2 bytes follow"),
        (b"\0" * 8, "FILE: the header is not JSON"),
        (b"\x02\0\0\0\0\0\0\0[]", "FILE: the header is not a JSON object"),
        (b"\x04\0\0\0\0\0\0\0\xff\xfe{}", "FILE: the header is not JSON that is allowed here"),
    ],
)
def test_no_safetensors_file(data, message):
    refused(data, message)


def container(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{}}', "the key 'a' appears twice"),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', "the key 'dtype' appears twice"),
        (b'{"a":' + b"[" * 100_000, "the header is (nested too deeply|not JSON)"),
        (b'{"a":NaN}', "the number NaN"),
        (b'{"a":' + b"9" * 10_000 + b"}", "not JSON that is allowed"),
        ({"a": 3}, "tensor 'a' does not have just dtype, shape and data_offsets"),
        ({"a": tensor() | {"more": 1}}, "tensor 'a' does not have just"),
        ({"a": tensor("U7")}, "the metadata has no 'nuqjax'"),  # others may have it
        ({"a": tensor("F4", (9,))}, r"tensor 'a': F4 of shape \[9\] takes 5 bytes, but its data_offsets hold 4"),
        ({"a": tensor(["U8"])}, "tensor 'a': unknown dtype"),
        ({"a": tensor("F32")}, r"tensor 'a': F32 of shape \[4\] takes 16 bytes, but its data_offsets hold 4"),
        ({"a": tensor(shape=(2**62, 4))}, "tensor 'a': a shape of more values than any memory holds"),
        ({"a": tensor(shape=(2**62, 2**62, 0), offsets=(0, 0))}, "a shape of more values than any memory"),
        ({"a": tensor(shape=(10**30,))}, "tensor 'a': a shape of more values"),
        ({"a": tensor(shape=(-1, -4))}, "tensor 'a': a shape that is not a list of whole numbers"),
        ({"a": tensor(shape=(4.0,))}, "tensor 'a': a shape that is not a list of whole numbers"),
        ({"a": tensor(shape=(True, 4))}, "tensor 'a': a shape that is not a list of whole numbers"),
        ({"a": tensor(shape=(1,) * 65 + (4,))}, "tensor 'a': a shape of 66 axes"),
        ({"a": tensor(offsets=(4, 0))}, "tensor 'a': data_offsets from 4 to 0"),
        ({"a": tensor(offsets=(-4, 0))}, "tensor 'a': data_offsets from -4 to 0"),
        ({"a": tensor(offsets=(0, 4.0))}, "tensor 'a': data_offsets are not two whole numbers"),
        ({"a": tensor(offsets=(0, 4, 4))}, "tensor 'a': data_offsets are not two whole numbers"),
        ({"a": tensor(), "b": tensor()}, "tensor 'b' begins at byte 0 and overlaps tensor 'a'"),
        ({"a": tensor(offsets=(2, 6))}, "tensor 'a' begins at byte 2 and leaves a hole after the header"),
        ({"a": tensor(shape=(8,), offsets=(0, 8))}, "the tensors take 8 bytes, but 4 follow the header"),
        ({}, "the tensors take 0 bytes, but 4 follow the header"),
        ({"__metadata__": []}, "__metadata__ is not an object of strings"),
        ({"__metadata__": {"nuqjax": 1}}, "__metadata__ is not an object of strings"),
        ({"a": tensor()}, "the metadata has no 'nuqjax': nuqjax.save did not write this file"),
    ],
)  # fmt: skip
def test_a_header_that_lies(header, message):
    refused(container(header, b"1234"), message)


# The layout


def set_at(*where):
    """A change of the layout: the value behind these keys."""
    *keys, last, value = where

    def change(layout):
        here = layout
        for key in keys:
            here = here[key]
        if value is KeyError:
            del here[last]
        else:
            here[last] = value

    return change


A, B = ("leaves", 0), ("leaves", 1)
LAST = ("leaves", 3, "tensors", "data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("version", 5), "version 5 of the format, but this nuqjax reads versions 1 to 4; a newer nuqjax reads"),
        (set_at("version", 4), "the layout does not have just version, tree, leaves, report and shared"),
        (set_at("version", 2), "FILE: the layout does not have just version and deflated"),
        (set_at("version", 0), "version 0 of the format"),
        (set_at("version", "1"), "the layout has no version"),
        (set_at("version", KeyError), "the layout has no version"),
        (set_at("more", 1), "the layout does not have just version, tree, leaves and report"),
        (set_at("leaves", {}), "the layout does not have just"),
        (set_at("tree", "leaf"), "the tree is of type str, not a list"),
        (set_at("tree", []), "the tree ends before"),
        (set_at("tree", ["leaf"]), "3 leaves, but the tree has 1"),
        (set_at("tree", [["list", 3], "leaf", "leaf"]), "node 0 of the tree has 3 children, but 2 nodes follow it"),
        (set_at("tree", [["list", 10**15], "leaf"]), "has 1000000000000000 children, but 1 nodes"),
        (set_at("tree", [["list", -1]]), "node 0 of the tree: 'list' with 1 fields is not a node"),
        (set_at("tree", ["leaf", "leaf"]), "the tree has nodes after its end, from node 1 on"),
        (set_at("tree", [["dict", ["b", "a"]], "leaf", "leaf"]), "node 0 of the tree: keys that are not in order"),
        (set_at("tree", [["dict", ["a", "a"]], "leaf", "leaf"]), "node 0 of the tree: keys that are not in order, or"),
        (set_at("tree", [["dict", ["a", 1]], "leaf", "leaf"]), "node 0 of the tree: keys of types that have no common"),
        (set_at("tree", [["dict", [None]], "leaf"]), "node 0 of the tree: a key that is null"),
        (set_at("tree", [["set", 1], "leaf"]), "node 0 of the tree: 'set' with 1 fields is not a node of the format"),
        (set_at("tree", [["node", "T", [1]], "leaf"]), "a child's name that is not a string"),
        (set_at("tree", [["list", 1]] * 300 + ["leaf"]), "node 256 of the tree is deeper than 256 levels"),
        (set_at("tree", 1, "c"), "node 1 of the tree is of type str"),
        (set_at(*A, []), "leaf 'a': the layout has no object for it"),
        (set_at(*A, "path", "b"), "leaf 'a': the layout has 'b' in its place"),
        (set_at(*A, "kind", "code"), "leaf 'a': unknown kind 'code'; known: codebook, array, key, python, absent"),
        (set_at(*A, "run", "os.system"), "leaf 'a': the layout has 'run', which this version does not know"),
        (set_at(*A, "bits", 9), "leaf 'a': bits=9, but a whole number from 1 to 8 is wanted"),
        (set_at(*A, "bits", True), "leaf 'a': 'bits' is 'True'"),
        (set_at(*A, "bits", 4), r"leaf 'a': packed of shape \[3, 2\], but the layout needs \[3, 3\]"),
        (set_at(*A, "shape", [6, 3]), r"leaf 'a': packed of shape \[3, 2\], but the layout needs \[3, 3\]"),
        (set_at(*A, "shape", [2**61, 3]), "leaf 'a': a shape of more values"),
        (set_at(*A, "stack_axes", 3), r"leaf 'a': stack_axes=3 of shape \[5, 3\]"),
        (set_at(*A, "dtype", "int32"), "leaf 'a': dtype 'int32' is not floating"),
        (set_at(*A, "dtype", "object"), "leaf 'a': dtype 'object' is not floating"),
        (set_at(*A, "output_axes", [2]), "leaf 'a': output axis 2 of a slice with 2 axes"),
        (set_at(*A, "output_axes", [1, 0]), "leaf 'a': output_axes"),
        (set_at(*A, "output_axes", [-1]), "leaf 'a': output_axes"),
        (set_at(*A, "granularity", "row"), "leaf 'a': unknown granularity row"),
        (set_at(*A, "granularity", {"channels": 0}), "leaf 'a': unknown granularity"),
        (set_at(*A, "granularity", {"channels": 10**40}), "leaf 'a': unknown granularity"),
        (set_at(*A, "scale_group", 10**40), "leaf 'a': scale_group=1000"),
        (set_at(*A, "granularity", "tensor"), r"leaf 'a': levels of shape \[3, 8\], but the layout needs \[1, 8\]"),
        (set_at(*A, "scale_group", 0), "leaf 'a': scale_group=0 with scales"),
        (set_at(*A, "fixed_point", {"word": 4, "frac": 0, "signed": True}), "leaf 'a': levels of dtype float32, but"),
        (set_at(*A, "fixed_point", {"word": 99, "frac": 0, "signed": True}), "leaf 'a': QFormat: a word of 99 bits"),
        (set_at(*A, "tensors", "packed", "name", "nothing"), "leaf 'a', packed: the tensor 'nothing' is not in"),
        (set_at(*A, "tensors", "packed", "name", "b.packed"), r"leaf 'a', packed: the layout wants U8 of shape \[3"),
        (set_at(*A, "tensors", "packed", "dtype", "int8"), "leaf 'a', packed: the layout wants I8"),
        (set_at(*A, "tensors", "packed", "dtype", "U8"), "leaf 'a', packed: unknown dtype 'U8'"),
        (set_at(*A, "tensors", "packed", "crc32", 1), "leaf 'a', packed: the bytes are not those that were saved"),
        (set_at(*A, "tensors", "packed", KeyError), "leaf 'a': the layout names no tensor 'packed'"),
        (set_at(*A, "tensors", "scale", KeyError), "leaf 'a': scale_group=5 without scales"),
        (set_at(*A, "tensors", "data", {}), "leaf 'a': unknown tensor 'data'"),
        (set_at(*B, "fixed_point", None), "leaf 'b': levels of dtype int8 are not floating"),
        (set_at(*B, "fixed_point", "word", 3), "leaf 'b': a level is outside the range of QFormat"),
    ],
)  # fmt: skip
def test_a_layout_that_lies(files, change, message):
    header, layout, body = taken_apart(files["codebooks"])
    change(layout)
    refused(put_together(header, layout, body), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("report", {}), "FILE: the report is not a list"),
        (set_at("report", [{}]), "FILE: leaf 0 of the report does not have the fields of one"),
        (set_at("report", 0, "path", KeyError), "leaf 0 of the report does not have the fields of one"),
        (set_at("report", 0, "run", "os.system"), "leaf 0 of the report does not have the fields of one"),
        (set_at("report", 1, "bits", "four"), "leaf 1 of the report: bits is 'four'"),
        (set_at("report", 1, "shape", [1.5]), "leaf 1 of the report: shape is"),
        (set_at("report", 1, "noise", True), "leaf 1 of the report: noise is 'True'"),
        (set_at("report", 1, "noise", -1.0), "leaf 1 of the report: noise is '-1.0'"),
        (set_at("report", 1, "nbytes_after", 10**400), "leaf 1 of the report: nbytes_after is '1000"),
        (set_at("report", 1, "weights", None), "leaf 1 of the report: weights is 'None'"),
    ],
)
def test_a_report_that_lies(files, change, message):
    header, layout, body = taken_apart(files["reported"])
    change(layout)
    file = store_file.parse(np.frombuffer(put_together(header, layout, body), np.uint8), "FILE")
    with pytest.raises(ValueError, match=message):
        store.inspect_bundle(store_file.bundle_file(file), verify=True)


def test_a_layout_that_is_no_json(files):
    header, _, body = taken_apart(files["codebooks"])
    for text, message in (
        ("", "FILE: the layout is not JSON"),
        ('{"version":1,"version":1}', "the key 'version' appears twice"),
        ('{"version":' + "[" * 100_000, "FILE: the layout is (nested too deeply|not JSON)"),
    ):
        refused(put_together(header, text, body), message)


def test_tensors_that_no_leaf_or_two_leaves_name(files):
    header, layout, body = taken_apart(files["codebooks"])
    header["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [len(body)] * 2}
    refused(put_together(header, layout, body), "the tensor 'more' is not named by just one leaf")
    header, layout, body = taken_apart(files["others"])
    entries = {entry["path"]: entry for entry in layout["leaves"]}
    entries["x/0"]["tensors"] = copy.deepcopy(entries["x/0"]["tensors"])
    header["x/0~"] = dict(header["x/0"])
    refused(put_together(header, layout, body), "begins at byte .* and overlaps tensor 'x/0'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("leaves", 1, "tensors", "data", "at", 1), "in tensor 'small.I8', the leaf at byte 1 leaves a hole"),
        (set_at(*LAST, "at", 2), "in tensor 'small.I8', the leaf at byte 2 overlaps the one before it"),
        (set_at(*LAST, "at", -1), "leaf '3', data: the layout wants 6 bytes of I8 at byte -1"),
        (set_at(*LAST, "at", 10**40), "leaf '3', data: the layout wants 6 bytes of I8 at byte 1000"),
        (set_at(*LAST, "at", 1.0), "leaf '3', data: 'at' is '1.0'"),
        (set_at(*LAST, "at", KeyError), r"leaf '3', data: the layout wants I8 of shape \[6\]"),
        (set_at(*LAST, "shape", [7]), "leaf '3', data: the layout wants 7 bytes of I8 at byte 4"),
        (set_at(*LAST, "shape", [5]), "the leaves in tensor 'small.I8' take 9 bytes, but it has 10"),
        (set_at(*LAST, "dtype", "uint8"), "leaf '3', data: the layout wants 6 bytes of U8 at byte 4"),
        (
            set_at(*LAST, "name", "small.F32"),
            "the layout wants 6 bytes of I8 at byte 4, but the tensor 'small.F32' is F32",
        ),
        (set_at(*LAST, "crc32", 1), "leaf '3', data: the bytes are not those that were saved"),
    ],
)
def test_a_place_in_a_shared_tensor_that_lies(files, change, message):
    header, layout, body = taken_apart(files["placed"])
    change(layout)
    refused(put_together(header, layout, body), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("shared", []), "the layout's shared tensors are not an object of checksums"),
        (set_at("shared", "small.I8", "1"), "the layout's shared tensors are not an object of checksums"),
        (set_at("shared", "small.I8", 1), "leaf '1', data: the bytes of tensor 'small.I8' are not those that were"),
        (set_at("shared", "small.I8", KeyError), "leaf '1', data: the layout has no 'crc32'"),
        (set_at("shared", "nothing", 1), "the layout's shared tensors: the tensor 'nothing' is not in the file"),
        (set_at("shared", KeyError), "the layout does not have just version, tree, leaves, report and shared"),
        (set_at(*LAST, "at", 4), "leaf '3', data: the layout has 'at', which this version does not know"),
        (set_at(*LAST, "crc32", 4), "leaf '3', data: the layout has 'crc32', which this version does not know"),
        (set_at(*LAST, "shape", [7]), "leaf '3', data: the layout wants 7 bytes of I8 at byte 4"),
        (set_at(*LAST, "shape", [2**40]), "leaf '3', data: the layout wants 1099511627776 bytes of I8"),
        (set_at(*LAST, "shape", [5]), "the leaves in tensor 'small.I8' take 9 bytes, but it has 10"),
        (set_at(*LAST, "dtype", "uint8"), "leaf '3', data: the layout wants 6 bytes of U8 at byte 4"),
        (set_at(*LAST, "dtype", "float32"), "leaf '3', data: the layout wants 24 bytes of F32"),
    ],
)
def test_a_shared_tensor_that_lies(files, change, message):
    header, layout, body = taken_apart(files["pooled"])
    change(layout)
    refused(put_together(header, layout, body), message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ([1, 2], "leaf 'w', coded: a model of 2 bytes"),
        ([2, 1, 9], "leaf 'w', coded: a model of 3 bytes for levels 2 to 1 of 4"),
        ([0, 4, 9], "leaf 'w', coded: a model of 3 bytes for levels 0 to 4 of 4"),
        ([1, 2, 9, 9, 9], "leaf 'w', coded: a model of 5 bytes for levels 1 to 2 of 4"),
        ([0, 3, 0, 0], "leaf 'w', coded: model weights of shape"),
        ([0, 3, 9, 200, 255], "leaf 'w', coded: "),  # another model: the stream ends elsewhere
    ],
)
def test_a_model_that_lies(files, model, message):
    header, layout, body = taken_apart(files["coded"])
    begin, end = header["w.model"]["data_offsets"]
    assert end == len(body)
    header["w.model"] = {"dtype": "U8", "shape": [len(model)], "data_offsets": [begin, begin + len(model)]}
    layout["leaves"][0]["tensors"]["model"]["shape"] = [len(model)]
    refused(put_together(header, layout, body[:begin] + bytes(model)), message, verify=False)


def test_a_model_of_another_form(files):
    header, layout, body = taken_apart(files["coded"])
    reference = layout["leaves"][0]["tensors"]["model"]
    for shape in ([1, *reference["shape"]], [*reference["shape"], 1]):
        header["w.model"]["shape"] = reference["shape"] = shape
        refused(put_together(header, layout, body), "leaf 'w': model of dtype uint8 and shape .*; uint8 along one axis")
    for kind, others in (("old", "model"), ("coded", "weights")):
        header, layout, body = taken_apart(files[kind])
        for entry in layout["leaves"]:
            if "coded" in entry.get("tensors", {}):
                entry["tensors"][others] = entry["tensors"].pop({"model": "weights", "weights": "model"}[others])
        refused(put_together(header, layout, body), "leaf '[vw]': the layout names no tensor")


def test_values_that_are_none_of_their_dtype(files):
    header, layout, body = taken_apart(files["others"])
    for path, byte, message in (
        ("y/3", 2, "a byte that is not a valid bool"),
        ("y/4", 8, "a value that is not a valid int4"),
    ):
        damaged = bytearray(body)
        damaged[header[path]["data_offsets"][0]] = byte
        refused(put_together(header, layout, bytes(damaged)), "bytes are not those that were saved")
        refused(put_together(header, layout, bytes(damaged)), f"leaf '{path}', data: {message}", verify=False)


def test_a_stream_that_claims_to_be_more_than_it_can(files):
    """The analogue of a zip bomb: 64 GiB of indices in some hundred bytes."""
    header, layout, body = taken_apart(files["coded"])
    entry = layout["leaves"][0]
    entry["shape"] = [1 << 33, 32]
    refused(put_together(header, layout, body), "leaf 'w', coded: a stream of [0-9]+ bytes that would expand to 68719")


@pytest.mark.parametrize("shape", [[0, 20], [60, 0], [0, 0]])
def test_a_stream_of_nothing(files, shape):
    header, layout, body = taken_apart(files["coded"])
    layout["leaves"][0]["shape"] = shape
    refused(put_together(header, layout, body), "leaf 'w', coded: a stream of no indices")


def test_a_stream_that_ends_elsewhere(files):
    header, layout, body = taken_apart(files["coded"])
    layout["leaves"][0]["shape"] = [50, 20]
    refused(put_together(header, layout, body), "leaf 'w', coded: a stream that does not end where the indices do")
    header, layout, body = taken_apart(files["coded"])
    _, end = header["w.coded"]["data_offsets"]
    body = body[: end - 4] + bytes(4) + body[end:]
    refused(put_together(header, layout, body), "leaf 'w', coded: ", verify=False)


def test_truncated_anywhere(files):
    for data in files.values():
        for length in range(len(data)):
            with pytest.raises(ValueError, match="FILE: "):
                load(data[:length])


# Shards


@pytest.fixture
def shards(tmp_path):
    nuqjax.save(tmp_path / "m.safetensors", trees()["codebooks"], max_shard_size=80)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    return tmp_path, index


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../m.safetensors", "which is not the plain name of a .safetensors file next to the index"),
        ("/etc/passwd", "not the plain name"),
        ("..\\m.safetensors", "not the plain name"),
        ("a\0.safetensors", "not the plain name"),
        (".safetensors", "not the plain name"),
        ("C:x.safetensors", "not the plain name"),
        ("", "not the plain name"),
        (["m"], "not the plain name"),
        ("missing.safetensors", "the shard missing.safetensors is missing"),
    ],
)
def test_an_index_whose_paths_escape_or_lead_nowhere(shards, shard, message):
    folder, index = shards
    index["weight_map"]["a.packed"] = shard
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        nuqjax.load(folder / "m.safetensors")


def test_an_index_that_disagrees_with_its_shards(shards):
    folder, index = shards
    text = folder / "m.safetensors.index.json"
    held = list(index["weight_map"].values())
    shared = next(name for name, shard in index["weight_map"].items() if held.count(shard) > 1)
    for change, message in (
        (lambda i: i["weight_map"].pop(shared), f"tensor '{shared}' of shard .* is in it, but not in the index"),
        (lambda i: i["weight_map"].update(x=i["weight_map"][shared]), "tensor 'x' of shard .* is not in it"),
        (lambda i: i.pop("weight_map"), "not an index with a weight_map"),
        (lambda i: i.update(metadata=3), "the metadata is not an object"),
        (lambda i: i["metadata"].pop("nuqjax"), "the metadata has no 'nuqjax'"),
    ):
        changed = copy.deepcopy(index)
        change(changed)
        text.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            nuqjax.load(text)


def test_an_index_that_is_damaged_is_told_or_harmless(shards, fuzz):
    folder, _ = shards
    data = (folder / "m.safetensors.index.json").read_bytes()
    opened = {path.name: store_file.open_mapped(str(path)) for path in folder.glob("*.safetensors")}

    def open_shard(name):
        if name not in opened:
            raise ValueError(f"FILE: the shard {name} is missing")
        return opened[name]

    def outcome(text):
        try:
            bundle = store_file.bundle_index(text, "FILE", open_shard)
            return flat(store.from_bundle(bundle, numpy=True)), None
        except ValueError as error:
            return None, str(error)

    wanted, _ = outcome(data)
    rng = np.random.default_rng(3)
    for _ in range(fuzz // 20):
        found, message = outcome(damage(b"\0" * 8 + data, rng)[8:])
        assert found == wanted if message is None else message.startswith("FILE")


def test_shards_of_two_saves_are_not_mixed(shards):
    folder, index = shards
    shard = folder / index["weight_map"]["a.packed"]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"leaf '.', .*: the bytes are not those that were saved"):
        nuqjax.load(folder / "m.safetensors")


def test_a_shard_that_is_a_pipe_does_not_hang(shards):
    folder, index = shards
    shard = folder / index["weight_map"]["a.packed"]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(OSError, match="not a regular file"):
        nuqjax.load(folder / "m.safetensors")


# Memory


_BOUNDED = """
import resource, sys
import nuqjax
paths = sys.argv[1:]
_, hard = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 27), hard))
for path in paths:
    try:
        nuqjax.load(path, numpy=True, verify=False)
    except ValueError as error:
        print("refused:", error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux how much memory a process has")
def test_a_small_file_cannot_ask_for_much_memory(files, tmp_path):
    """All of these under a limit of 128 MiB more than the process has before."""
    header, layout, body = taken_apart(files["coded"])
    bombs = []
    for shape in ([1 << 33, 32], [1 << 40, 1], [1, 1 << 40], [1 << 20, 1 << 20]):
        layout["leaves"][0]["shape"] = shape
        bombs.append(put_together(dict(header), layout, body))
    header, layout, body = taken_apart(files["codebooks"])
    for tree in ([["list", 1 << 40]], [["dict", [{"tuple": [["tuple"]] * 9}]]]):
        bombs.append(put_together(dict(header), layout | {"tree": tree}, body))
    header["a.packed"] |= {"shape": [1 << 40, 1 << 20, 0]}
    bombs.append(put_together(header, layout, body))
    bombs.append((1 << 62).to_bytes(8, "little") + b"{}")
    for number, bomb in enumerate(bombs):
        (tmp_path / str(number)).write_bytes(bomb)
    command = [sys.executable, "-c", _BOUNDED, *(str(tmp_path / str(number)) for number in range(len(bombs)))]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("refused:") == len(bombs), finished.stdout


_LINEAR = """
import resource, sys
import nuqjax
_, hard = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29), hard))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
done = [
    lambda path: (str(nuqjax.inspect(path)), nuqjax.load(path), nuqjax.load(path, numpy=True)),
    lambda path: nuqjax.open_checkpoint(path).read(),
]
for path in sys.argv[1:]:
    for act in done:
        try:
            act(path)
            print(path, "read")
        except ValueError as error:
            print(path, "refused:", str(error)[:200])
"""


def layout_file(tree, leaves, tensors=None):
    """A file of a layout of this tree and these leaves, whose tensors have no bytes."""
    header = {name: {"dtype": code, "shape": shape, "data_offsets": [0, 0]} for name, (code, shape) in tensors or ()}
    return put_together(header, {"version": 1, "tree": tree, "leaves": leaves, "report": None}, b"")


def nothing_of_many(shape, stack):
    """A compressed leaf of no values, some axes of which are very long."""
    header, layout, _ = taken_apart(saved({"w": np.zeros((2, 3, 4), np.float32)}, stack))
    (entry,) = layout["leaves"]
    entry |= {"shape": shape, "output_axes": [len(shape) - stack - 1]}
    outputs, lead = (shape[-1], shape[:stack])
    shapes = {"packed": [*lead, outputs, 0], "levels": [*lead, 0, 2]}
    assert entry["granularity"] == {"inputs": 1}
    for role, reference in entry["tensors"].items():
        reference |= {"shape": shapes[role], "crc32": 0}
        header[reference["name"]] |= {"shape": shapes[role], "data_offsets": [0, 0]}
    return put_together(header, layout, b"")


def saved(tree, stack):
    with tempfile.TemporaryDirectory() as folder:
        rule = Rule(".", skip=False, granularity=InputGroups(1), bits=1, stack_axes=stack, method="uniform")
        nuqjax.save(f"{folder}/a", nuqjax.compress(tree, rules=[rule]))
        return pathlib.Path(folder, "a").read_bytes()


def test_time_and_memory_are_linear_in_the_bytes(tmp_path):
    """Files that took the square of their bytes, or what no machine has, ten times as large as those that showed it."""
    python = {"kind": "python", "type": "int", "value": 1}
    equal = [n * (2**61 - 1) for n in range(600_000)]
    data = {"name": "t", "dtype": "int8", "shape": [0], "crc32": 0}
    twice = [{"path": str(n), "kind": "array", "tensors": {"data": data}} for n in range(40_000)]
    bombs = {
        "no values in very long rows": nothing_of_many([0, 2**50], 0),
        "no values in a very long stack": nothing_of_many([2**50, 0, 4], 1),
        "a long key of many leaves": layout_file(
            [["dict", ["k" * 1_000_000]], ["list", 30_000], *["leaf"] * 30_000], []
        ),
        "a long key of many lists": layout_file(
            [["dict", ["k" * 1_000_000]], *[["list", 1]] * 200, "leaf"], [python | {"path": ""}]
        ),
        "keys of equal hashes": layout_file([["dict", equal], *["leaf"] * len(equal)], []),
        "tuples of equal hashes": layout_file(
            [["OrderedDict", [{"tuple": [k]} for k in equal[:100_000]]], *["leaf"] * 100_000], []
        ),
        "one name of many leaves": layout_file(
            [["list", len(twice)], *["leaf"] * len(twice)], twice, [("t", ("I8", [0])), ("u", ("I8", [0]))]
        ),
        "a name of many keys": container({"." * 3_000_000: tensor(shape=(0,), offsets=(0, 0))}),
        "names below a long name": container(
            {f"{'k.' * 100}{n}": tensor(shape=(0,), offsets=(0, 0)) for n in range(3_000)}
        ),
    }  # fmt: skip
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", _LINEAR, *(str(tmp_path / name) for name in bombs)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    told = [line for line in finished.stdout.splitlines() if "refused:" in line]
    assert len(finished.stdout.splitlines()) == 2 * len(bombs)
    assert finished.stdout.count("very long") - sum("very long" in line for line in told) == 4
    for reason in (
        "the paths of the leaves are far longer than the",
        "keys have equal hashes",
        "the tensor 'u' is not named by just one leaf",
    ):
        assert any(reason in line for line in told), finished.stdout


# Fuzzing


def flat(tree):
    """What a tree is, to the bit, in a form that is quick to compare."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(a.dtype, a.shape, a.tobytes()) if isinstance(a, np.ndarray) else repr(a) for a in leaves]


NUMBERS = [0, 1, 2, 3, 7, 8, 9, 255, 256, 2**31, 2**32, 2**53, 2**63 - 1, 2**64, 10**40, -1, -(2**63), 0.5, 1e308]
VALUES = [
    *NUMBERS,
    None,
    True,
    False,
    "",
    "a",
    "leaf",
    "tensor",
    "float32",
    "U8",
    [],
    {},
    [[]],
    ["leaf"],
    {"tuple": []},
]
TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"null",
    b"true",
    b"NaN",
    b"1e999",
    b"\xff",
    b"\0",
    b"-",
    b"0",
]


def damage(data, rng):
    """Some bytes of a file changed, lost, added or moved."""
    data = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(1 + rng.integers(3)):
        place = int(rng.integers(8 if rng.random() < 0.05 else header if rng.random() < 0.7 else len(data)))
        place = min(place, len(data) - 1)
        kind = rng.integers(8)
        length = int(rng.integers(1, 9))
        if kind < 2:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[place] = int(rng.integers(256))
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            other = int(rng.integers(len(data)))
            data[place : place + length] = data[other : other + length]
        elif kind == 5:
            token = TOKENS[rng.integers(len(TOKENS))]
            data[place : place + len(token)] = token
        elif kind == 6:
            digit = next((i for i in range(place, min(place + 200, len(data))) if 48 <= data[i] <= 57), place)
            before = len(data)
            data[digit : digit + 1] = str(NUMBERS[rng.integers(len(NUMBERS))]).encode()
            if len(data) >= 8 and digit >= 8 and rng.random() < 0.9:  # the header's length is made right again
                header = max(8, header + len(data) - before)
                data[:8] = (header - 8).to_bytes(8, "little")
        elif rng.random() < 0.2:
            del data[place:]
        else:
            data[place:place] = bytes(length)
        if not data:
            break
    return bytes(data)


def forge(parts, rng):
    """A file, pickled in its parts, whose checksum of the layout is right, but not what the layout or header says."""
    header, layout, body = pickle.loads(parts)  # some times quicker than a deep copy
    for _ in range(1 + rng.integers(2)):
        here = layout if rng.random() < 0.8 else header
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                break
            key = keys[rng.integers(len(keys))]
            if isinstance(here[key], dict | list) and here[key] and rng.random() < 0.85:
                here = here[key]
                continue
            kind = rng.integers(6)
            if kind == 0:
                del here[key]
            elif kind == 1 and isinstance(here, list):
                here.append(copy.deepcopy(here[key]))
            elif kind == 2:
                other = keys[rng.integers(len(keys))]
                here[key], here[other] = here[other], here[key]
            elif kind == 3 and type(here[key]) is int:
                here[key] += int(rng.integers(-2, 3))
            else:
                here[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
            break
    return put_together(header, layout, body)


def well_formed(tree, size):
    """Every leaf fits its layout, and all of them together are no more than the file can stand for."""
    total = 0
    for leaf in jax.tree.leaves(tree, is_leaf=is_codebook_array):
        if is_codebook_array(leaf):
            check_structure(leaf)
            for place in np.ndindex(leaf.stack_shape):
                count = leaf.levels.shape[-1]
                part = leaf[place]
                inputs = 0 if 0 in part.packed.shape else part.packed.shape[1] * 8 // leaf.bits
                assert packing.unpack(part.packed, leaf.bits, inputs).max(initial=0) < count
            total += leaf.nbytes
        elif isinstance(leaf, np.ndarray):
            total += leaf.nbytes
    assert total <= 64 * size + 4 * (1 << 16)


@functools.cache
def is_printed(leaves):
    """Whether a report of these leaves, pickled, becomes text: one table of each kind is enough."""
    return bool(str(Report(pickle.loads(leaves))))


def outcome(data, verify):
    """The tree, or what is wrong with the file."""
    try:
        bundle = store_file.bundle_file(store_file.parse(np.frombuffer(data, np.uint8), "FILE"))
        tree = store.from_bundle(bundle, numpy=True, verify=verify)
        assert is_printed(pickle.dumps(store.inspect_bundle(bundle, verify).leaves))
        return tree, None
    except ValueError as error:
        return None, str(error)


def test_any_damage_is_told_or_harmless(files, fuzz):
    """With checksums compared: a ValueError, or the tree that was saved, to the bit."""
    wanted = {name: flat(load(data)) for name, data in files.items()}
    rng = np.random.default_rng(0)
    names, told = list(files), 0
    for number in range(fuzz):
        name = names[number % len(names)]
        found, message = outcome(damage(files[name], rng), verify=True)
        told += message is not None
        assert flat(found) == wanted[name] if message is None else message.startswith("FILE: ")
    assert told > 0.5 * fuzz


def test_a_forgery_is_told_or_well_formed(files, fuzz):
    """Without checksums, as if whoever changed the file had made them right: a ValueError, or a tree that is one."""
    rng = np.random.default_rng(1)
    parts = {name: pickle.dumps(taken_apart(data)) for name, data in files.items()}
    names, told = list(files), 0
    for number in range(fuzz // 2):
        name = names[number % len(names)]
        data = forge(parts[name], rng) if rng.random() < 0.6 else damage(files[name], rng)
        found, message = outcome(data, verify=False)
        told += message is not None
        if message is None:
            well_formed(found, len(data))
        else:
            assert message.startswith("FILE: ")
    assert told > 0.3 * (fuzz // 2)


def test_flips_in_tensors_alone_come_back_as_they_are(files, fuzz):
    """Without checksums every flipped bit of a packed index, level or scale is where it was flipped."""
    header, layout, body = taken_apart(files["codebooks"])
    rng = np.random.default_rng(2)
    for _ in range(fuzz // 50):
        flipped = bytearray(body)
        flipped[rng.integers(len(body))] ^= 1 << int(rng.integers(8))
        file = put_together(header, layout, bytes(flipped))
        tree, message = outcome(file, verify=False)
        if message is not None:
            assert "leaf 'b': a level is outside the range" in message
            continue
        for entry in layout["leaves"]:
            for role, reference in entry["tensors"].items():
                begin, end = header[reference["name"]]["data_offsets"]
                assert getattr(tree[entry["path"]], role).tobytes() == flipped[begin:end]


@pytest.mark.parametrize("to", [1, 2, -1, "0", True, None])
def test_a_leaf_tied_to_none_before_it(to, tmp_path):
    w = np.arange(6.0, dtype=np.float32)
    nuqjax.save(tmp_path / "f", {"a": w, "b": w, "c": 3})
    header, layout, body = taken_apart((tmp_path / "f").read_bytes())
    assert layout["leaves"][1] == {"path": "b", "kind": "tied", "to": 0}
    layout["leaves"][1]["to"] = to
    refused(put_together(header, layout, body), r"leaf 'b'.*('to' is|tied to leaf)")
