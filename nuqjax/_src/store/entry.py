"""Turns an entry of the layout back into a leaf.

`docs/format.md` describes the entries. Everything it promises is checked here before it is used, because the file may
come from anyone.
"""

import copy
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.leaf import packing
from nuqjax._src.leaf import rows as rows_
from nuqjax._src.leaf.check import check_structure
from nuqjax._src.leaf.codebook_array import CodebookArray
from nuqjax._src.leaf.qformat import QFormat
from nuqjax._src.leaf.rows import ChannelGroups, InputGroups
from nuqjax._src.platform.host import to_jax
from nuqjax._src.store import entropy as store_entropy
from nuqjax._src.store.describe import KEYS, MAX_GROUP, PYTHON
from nuqjax._src.store.dtypes import (
    AS_BYTES,
    AS_INTEGERS,
    CODES,
    is_floating,
    storage_dtype,
    stored_bytes,
    stored_form,
    viewed,
)
from nuqjax._src.store.file import Bundle, check_shape


def _field(entry: Mapping[str, Any], name: str, kinds: Any, where: str) -> Any:
    if name not in entry:
        raise ValueError(f"{where}: the layout has no {name!r}")
    value = entry[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise ValueError(f"{where}: {name!r} is {str(value)[:80]!r}")
    return value


def _only(entry: Mapping[str, Any], names: set[str], where: str) -> None:
    unknown = set(entry) - names
    if unknown:
        raise ValueError(f"{where}: the layout has {sorted(unknown)[0][:80]!r}, which this version does not know")


class Shared:
    """The shared tensors whose parts a layout gives in order: a part begins where the one before it ends."""

    def __init__(self, given: Any, bundle: Bundle) -> None:
        """Takes the checksums of the shared tensors by name, from a layout.

        Raises:
          ValueError: they are not checksums by name, or there is no such tensor; the message says how.
        """
        where = f"{bundle.name}: the layout's shared tensors"
        if not isinstance(given, dict) or not all(type(crc32) is int for crc32 in given.values()):
            raise ValueError(f"{where} are not an object of checksums")
        self._checksums, self._bundle, self._whole = given, bundle, set()
        self._ends = dict.fromkeys(given, 0)
        for name in given:
            if name not in bundle.files:
                raise ValueError(f"{where}: the tensor {name[:200]!r} is not in the file")

    def __contains__(self, name: str) -> bool:
        return name in self._ends

    def place(self, reference: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the reference to the next part of a shared tensor with the byte at which it begins."""
        begin = self._ends[reference["name"]]
        self._ends[reference["name"]] += stored_bytes(reference)
        return {**reference, "at": begin}

    def verify(self, name: str, where: str) -> None:
        """Compares the checksum of a shared tensor, once.

        Raises:
          ValueError: it differs.
        """
        if name not in self._whole and zlib.crc32(self._bundle.array(name).data) != self._checksums[name]:
            raise ValueError(
                f"{where}: the bytes of tensor {name[:200]!r} are not those that were saved (their CRC-32 differs)"
            )
        self._whole.add(name)


class Entry:
    """A leaf's entry, checked in itself and against the headers of its tensors; `read` returns the leaf.

    Attributes:
      path: the leaf's path.
      where: the file and path as messages name them.
      layout: the entry itself, as JSON.
      tensors: by role, the reference to each of its tensors: name, dtype, shape and checksum.
      same_as: the number of the earlier leaf whose arrays it shares, or None.
    """

    same_as: int | None = None

    _ROLES = {  # noqa: RUF012
        "codebook": {"packed", "levels", "scale", "coded", "model", "weights"},
        "array": {"data"},
        "key": {"data"},
    }
    _FIELDS = {  # noqa: RUF012
        "codebook": {
            "shape", "stack_axes", "dtype", "bits", "granularity", "output_axes", "fixed_point", "scale_group",
        },
        "array": set(), "key": {"impl"}, "python": {"type", "value"}, "absent": {"type"},
    }  # fmt: skip

    def __init__(self, entry: Any, path: str, bundle: Bundle, shared: Shared | None) -> None:
        """Checks everything except the bytes of the tensors.

        Args:
          entry: the entry, as JSON.
          path: the leaf's path in the tree.
          bundle: the open files.
          shared: what the entries before this one left of the shared tensors; None before version 4 of the format.

        Raises:
          ValueError: the entry is wrong; the message says how.
        """
        self.path, self._bundle, self._shared = path, bundle, shared
        self.where = f"{bundle.name}: leaf {path[:200]!r}"
        if not isinstance(entry, dict):
            raise ValueError(f"{self.where}: the layout has no object for it")
        if entry.get("path") != path:
            raise ValueError(f"{self.where}: the layout has {str(entry.get('path'))[:200]!r} in its place")
        self.kind = _field(entry, "kind", str, self.where)
        if self.kind not in self._FIELDS:
            raise ValueError(f"{self.where}: unknown kind {self.kind[:40]!r}; known: {', '.join(self._FIELDS)}")
        _only(entry, {"path", "kind", "tensors", *self._FIELDS[self.kind]}, self.where)
        self.tensors: dict[str, dict[str, Any]] = {}
        roles = self._ROLES.get(self.kind, set())
        if roles:
            for role, reference in sorted(_field(entry, "tensors", dict, self.where).items(), key=lambda item: item[0]):
                if role not in roles:
                    raise ValueError(f"{self.where}: unknown tensor {role[:40]!r}; known: {', '.join(sorted(roles))}")
                self.tensors[role] = self._check_reference(reference, role)
        self.layout = entry
        if self.kind == "codebook":
            self._check_codebook()
        elif self.kind in ("array", "key"):
            self._need("data")
        if self.kind == "key":
            impl = _field(entry, "impl", str, self.where)
            data = self.tensors["data"]
            if impl not in KEYS or data["dtype"] != "uint32" or data["shape"][-1:] != [KEYS[impl]]:
                raise ValueError(
                    f"{self.where}: {impl[:40]!r} and {data['shape']} {data['dtype']} do not make a random key"
                )
        elif self.kind in ("python", "absent"):
            _field(entry, "type", str, self.where)
            self._check_python()

    def _need(self, *roles: str) -> None:
        for role in roles:
            if role not in self.tensors:
                raise ValueError(f"{self.where}: the layout names no tensor {role!r}")

    def _check_reference(self, reference: Any, role: str) -> dict[str, Any]:
        where = f"{self.where}, {role}"
        if not isinstance(reference, dict):
            raise ValueError(f"{where}: not a reference to a tensor")
        _only(reference, {"name", "at", "dtype", "shape", "crc32"}, where)
        name, dtype = _field(reference, "name", str, where), _field(reference, "dtype", str, where)
        shape = _field(reference, "shape", list, where)
        check_shape(shape, where)
        if name not in self._bundle.files:
            raise ValueError(f"{where}: the tensor {name[:200]!r} is not in the file")
        stored = storage_dtype(dtype)
        if stored not in CODES:
            raise ValueError(f"{where}: unknown dtype {dtype[:40]!r}")
        try:
            np.dtype(dtype)
        except TypeError as error:
            raise ValueError(f"{where}: dtype {dtype!r}, which this NumPy does not have") from error
        wanted = stored_form(dtype, shape)
        header = self._bundle.entry(name)
        if self._shared is not None and name in self._shared:
            _only(reference, {"name", "dtype", "shape"}, where)
            reference = self._shared.place(reference)
        else:
            _field(reference, "crc32", int, where)
        if "at" in reference:  # part of a tensor that joins several small ones
            begin, size = _field(reference, "at", int, where), stored_bytes(reference)
            if header.code != wanted[0] or not 0 <= begin <= begin + size <= header.end - header.begin:
                raise ValueError(
                    f"{where}: the layout wants {size} bytes of {wanted[0]} at byte {begin}, but the tensor "
                    f"{name[:200]!r} is {header.code} of {header.end - header.begin} bytes"
                )
        elif header[:2] != wanted:
            raise ValueError(
                f"{where}: the layout wants {wanted[0]} of shape {list(wanted[1])}, but the tensor {name[:200]!r} is "
                f"{header.code} of shape {list(header.shape)}"
            )
        return reference

    def _check_codebook(self) -> None:
        entry, where = self.layout, self.where
        model = "weights" if self._shared is None else "model"
        self._need("levels", *([model] if "coded" in self.tensors else ["packed"]))
        if len({"coded", "packed"} & set(self.tensors)) != 1 or len({"model", "weights"} & set(self.tensors)) != (
            "coded" in self.tensors
        ):
            raise ValueError(
                f"{where}: both packed and coded indices, or {model} without a coded stream, or two models"
            )
        shape = _field(entry, "shape", list, where)
        check_shape(shape, where)
        stack = _field(entry, "stack_axes", int, where)
        bits = _field(entry, "bits", int, where)
        if not 1 <= bits <= 8:
            raise ValueError(f"{where}: bits={bits}, but a whole number from 1 to 8 is wanted")
        if not 0 <= stack <= len(shape):
            raise ValueError(f"{where}: stack_axes={stack} of shape {shape}")
        axes = _field(entry, "output_axes", list, where)
        if not all(type(a) is int for a in axes) or axes != sorted(set(axes)) or (axes and axes[0] < 0):
            raise ValueError(f"{where}: output_axes {str(axes)[:80]}, but ascending whole numbers are wanted")
        if axes and axes[-1] >= len(shape) - stack:
            raise ValueError(f"{where}: output axis {axes[-1]} of a slice with {len(shape) - stack} axes")
        levels, scale = self.tensors["levels"], self.tensors.get("scale")
        fixed = entry.get("fixed_point")
        self._fixed = None if fixed is None else self._qformat(fixed)
        self._granularity = self._read_granularity(entry.get("granularity"))
        group = _field(entry, "scale_group", int, where)
        if group < (scale is not None) or (scale is None and group) or group > MAX_GROUP:
            raise ValueError(f"{where}: scale_group={group} {'without' if scale is None else 'with'} scales")
        if not is_floating(_field(entry, "dtype", str, where)):
            raise ValueError(f"{where}: dtype {entry['dtype'][:40]!r} is not floating")
        for name, reference in (("levels", None if self._fixed else levels), ("scale", scale)):
            if reference is not None and not is_floating(reference["dtype"]):
                raise ValueError(f"{where}: {name} of dtype {reference['dtype']} are not floating")
        slice_shape = tuple(shape[stack:])
        outputs, inputs = rows_.channel_shape(slice_shape, axes)
        count, _ = rows_.row_shape(outputs, inputs, self._granularity)
        self._slice_shape, self._axes, self._inputs = slice_shape, tuple(axes), inputs
        packed = [*shape[:stack], outputs, packing.packed_size(inputs, bits)]
        wanted = {"packed": packed, "levels": [*shape[:stack], count, 1 << bits]}
        if scale is not None:
            wanted["scale"] = [*shape[:stack], outputs, -(-inputs // group)]
        if "coded" in self.tensors:
            if len(self.tensors["coded"]["shape"]) != 1 or self.tensors["coded"]["dtype"] != "uint32":
                raise ValueError(f"{where}: a coded stream is uint32 along one axis")
            here, dtypes = self.tensors[model], ("uint8",) if model == "model" else ("uint8", "uint16")
            if here["dtype"] not in dtypes or len(here["shape"]) != 1:
                raise ValueError(
                    f"{where}: {model} of dtype {here['dtype']} and shape {here['shape']}; {' or '.join(dtypes)} along "
                    "one axis is wanted"
                )
            if model == "weights":
                wanted["weights"] = [1 << bits]
        elif self.tensors["packed"]["dtype"] != "uint8":
            raise ValueError(f"{where}: packed indices of dtype {self.tensors['packed']['dtype']}; uint8 is wanted")
        for role in [role for role in wanted if role in self.tensors]:
            found = self.tensors[role]["shape"]
            if found != wanted[role]:
                raise ValueError(f"{where}: {role} of shape {found}, but the layout needs {wanted[role]}")
        self._packed_shape = packed

    def _qformat(self, fixed: Any) -> QFormat:
        if not isinstance(fixed, dict) or set(fixed) != {"word", "frac", "signed"} or type(fixed["signed"]) is not bool:
            raise ValueError(f"{self.where}: fixed_point is not an object of word, frac and signed")
        try:
            found = QFormat(**fixed)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error
        if np.dtype(found.storage_dtype).name != self.tensors["levels"]["dtype"]:
            raise ValueError(f"{self.where}: levels of dtype {self.tensors['levels']['dtype']}, but {found} has others")
        return found

    def _read_granularity(self, value: Any) -> Any:
        if value in ("tensor", "channel"):
            return value
        if isinstance(value, dict) and len(value) == 1:
            (kind, size), *_ = value.items()
            if kind in ("channels", "inputs") and type(size) is int and 1 <= size <= MAX_GROUP:
                return ChannelGroups(size) if kind == "channels" else InputGroups(size)
        raise ValueError(f"{self.where}: unknown granularity {str(value)[:80]}")

    def _check_python(self) -> None:
        if self.kind == "absent":
            return
        kind, value = self.layout["type"], self.layout.get("value")
        try:
            if kind == "float" and isinstance(value, str):
                self._value: Any = float.fromhex(value)
                return
            if kind == "complex" and isinstance(value, list) and len(value) == 2:
                self._value = complex(*(float.fromhex(x) for x in value))
                return
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{self.where}: {str(value)[:80]!r} is not a valid {kind}") from error
        if kind not in ("bool", "int", "str") or type(value) is not PYTHON[kind]:
            raise ValueError(f"{self.where}: {str(value)[:80]!r} is not a valid {kind[:40]}")
        self._value = value

    def is_absent(self) -> str | None:
        """Returns the type name of a leaf that the file could not hold; None for any other leaf."""
        return self.layout["type"] if self.kind == "absent" else None

    def shape_and_dtype(self) -> tuple[tuple[int, ...], str] | None:
        """Returns shape and dtype of the dense array that the leaf represents; None if it is not an array."""
        if self.kind == "codebook":
            return tuple(self.layout["shape"]), self.layout["dtype"]
        if self.kind == "array":
            return tuple(self.tensors["data"]["shape"]), self.tensors["data"]["dtype"]
        return None

    def read(self, verify: bool) -> Any:
        """Returns the leaf; its arrays are views of the file where possible.

        Args:
          verify: compare checksums, which reads every byte.

        Raises:
          ValueError: the bytes are not those that were saved, or are not valid values, or the file holds no such leaf.
        """
        if self.kind == "python":
            return self._value
        if self.kind == "absent":
            raise ValueError(
                f"{self.where} was of type {self.is_absent()}, which no file can hold: give it with like=…"
            )
        arrays: dict[str, Any] = {role: self._array(role, verify) for role in self.tensors}
        if self.kind == "array":
            return arrays["data"]
        if self.kind == "key":
            return jax.random.wrap_key_data(to_jax(np.array(arrays["data"])), impl=self.layout["impl"])
        if "coded" in arrays:
            rows = math.prod(self._packed_shape[:-1])
            bits = self.layout["bits"]
            try:
                weights = arrays["weights"] if "weights" in arrays else store_entropy.weights_of(arrays["model"], bits)
                packed: Any = store_entropy.decode(arrays["coded"], weights, bits, rows, self._inputs)
                packed = packed.reshape(self._packed_shape)
            except ValueError as error:
                raise ValueError(f"{self.where}, coded: {error}") from error
        else:
            packed = arrays["packed"]
        leaf = CodebookArray(
            levels=arrays["levels"],
            packed=packed,
            scale=arrays.get("scale"),
            slice_shape=self._slice_shape,
            dtype=jnp.dtype(self.layout["dtype"]),
            bits=self.layout["bits"],
            granularity=self._granularity,
            axes=self._axes,
            codebook_format=self._fixed,
            scale_group=self.layout["scale_group"],
        )
        check_structure(leaf, self.where)
        return leaf

    def _array(self, role: str, verify: bool) -> np.ndarray:
        reference, raw = self.tensors[role], self._raw(role)
        where = f"{self.where}, {role}"
        if verify and "crc32" not in reference:
            assert self._shared is not None
            self._shared.verify(reference["name"], where)
        elif verify and zlib.crc32(raw.data) != reference["crc32"]:
            raise ValueError(f"{where}: the bytes are not those that were saved (their CRC-32 differs)")
        dtype, shape = reference["dtype"], tuple(reference["shape"])
        if dtype == "bool" or dtype in AS_BYTES:
            bits = 1 if dtype == "bool" else AS_BYTES[dtype]
            if bits < 8 and (raw >> bits).any():
                raise ValueError(f"{where}: a byte that is not a valid {dtype}")
            return raw.view(dtype).reshape(shape)
        if dtype in AS_INTEGERS:
            stored, least, most = AS_INTEGERS[dtype]
            values = raw.view(stored)
            if ((values < least) | (values > most)).any():
                raise ValueError(f"{where}: a value that is not a valid {dtype}")
            return values.astype(dtype).reshape(shape)
        return viewed(raw, dtype).reshape(shape)

    def nbytes(self, *roles: str) -> int:
        """Returns the bytes that the tensors with these roles take in the file."""
        return sum(self._raw(role).size for role in roles if role in self.tensors)

    def _raw(self, role: str) -> np.ndarray:
        """Returns a tensor's bytes as a view of the file, `[n]` uint8."""
        reference = self.tensors[role]
        raw = self._bundle.array(reference["name"])
        return raw[reference["at"] :][: stored_bytes(reference)] if "at" in reference else raw


def tied(entry: Mapping[str, Any], path: str, earlier: Sequence[Entry], name: str) -> Entry:
    """Returns the entry of a leaf that shares the arrays of an earlier one.

    Raises:
      ValueError: the entry is wrong; the message says how.
    """
    where = f"{name}: leaf {path[:200]!r}"
    _only(entry, {"path", "kind", "to"}, where)
    if entry.get("path") != path:
        raise ValueError(f"{where}: the layout has {str(entry.get('path'))[:200]!r} in its place")
    number = _field(entry, "to", int, where)
    if not 0 <= number < len(earlier) or not earlier[number].tensors or earlier[number].same_as is not None:
        raise ValueError(f"{where}: tied to leaf {number}, which is not an earlier leaf with tensors of its own")
    same = copy.copy(earlier[number])
    same.path, same.where, same.same_as = path, where, number
    return same
