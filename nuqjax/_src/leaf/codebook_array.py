"""`CodebookArray`: a dense array stored as codebooks and packed indices."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.core
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from nuqjax._src.leaf import fixed_point, packing
from nuqjax._src.leaf import rows as rows_
from nuqjax._src.leaf.matrix import Layout, decode_matrix, factors
from nuqjax._src.leaf.qformat import QFormat
from nuqjax._src.leaf.rows import ChannelGroups, Granularity, InputGroups
from nuqjax._src.platform.host import flushed, on_host, to_jax, to_numpy, working_dtype
from nuqjax._src.platform.meshes import as_automatic, explicit_sharding, shards, typed_spec

_HOW_TO_RUN = (
    "Run the model by nuqjax.apply: nuqjax.apply(model.apply)(cparams, x), or nuqjax.apply(lambda model, x: model(x))"
    "(cmodel, x), with the compressed tree as an argument; nuqjax.decompress gives the dense array"
)
_LAYOUT = ("slice_shape", "dtype", "bits", "granularity", "axes", "codebook_format", "scale_group")


@partial(jax.tree_util.register_dataclass, data_fields=("levels", "packed", "scale"), meta_fields=_LAYOUT)
@dataclass(frozen=True, eq=False, repr=False)
class CodebookArray:
    """A dense array `[*S, *slice_shape]` stored as sorted levels and indices of `bits` bits.

    `S` are leading stack axes (scanned layers, experts). Every slice has its own codebooks, so `lax.scan`, `vmap` and
    indexing along `S` slice a `CodebookArray` as they slice an array. With O output channels of I values, R codebooks
    of K = 2^bits levels and B = ⌈I·bits / 8⌉:

    Attributes:
      levels: `[*S, R, K]` ascending levels: floating, or raw integers of `codebook_format`.
      packed: `[*S, O, B]` uint8: a storage row for each output channel, holding its indices in the array's own order
        of the other axes (see `leaf.packing`).
      scale: `[*S, O, G]` factors that multiply the levels, one for each run of `scale_group` values of a channel; or
        None.
      slice_shape: shape of one slice. This field and all below are static.
      dtype: dtype of the dense array.
      bits: bits of an index, 1 to 8.
      granularity: which values share a codebook: `"tensor"` (R = 1), `"channel"` (R = O), `ChannelGroups(n)`
        (R = ⌈O/n⌉) or `InputGroups(n)` (R = O·⌈I/n⌉).
      axes: the output axes of a slice, ascending.
      codebook_format: the `QFormat` of integer levels; None where levels are floating.
      scale_group: number of values of a channel that share a scale; 0 without scales.

    Code written for arrays accepts it only through `nuqjax.apply`. An operator, a JAX function or an index beyond the
    stack axes raises an error that says so; `docs/messages.md` lists the errors that other libraries raise first. The
    trainable part is the levels: give `jax.grad` and optimizers `nuqjax.codebooks(cparams)`, never the tree. Given the
    tree, `jax.grad` raises an error that says "got uint8", and optimizers silently make moments of the indices.

    >>> import jax.numpy as jnp, nuqjax
    >>> leaf = nuqjax.compress({"w": jnp.linspace(-1, 1, 1024).reshape(32, 32)}, bits=2)["w"]
    >>> leaf.shape, leaf.levels.shape, leaf.packed.shape, leaf.nbytes
    ((32, 32), (1, 4), (32, 8), 272)
    """

    levels: jax.Array
    packed: jax.Array
    scale: jax.Array | None
    slice_shape: tuple[int, ...]
    dtype: np.dtype
    bits: int
    granularity: Granularity
    axes: tuple[int, ...]
    codebook_format: QFormat | None = None
    scale_group: int = 0

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The sizes of the stack axes, S."""
        return tuple(self.packed.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return self.stack_shape + self.slice_shape

    @property
    def ndim(self) -> int:
        """Number of axes of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values of the dense array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the levels, the packed indices and the scales, padding included."""
        arrays = [a for a in (self.levels, self.packed, self.scale) if a is not None]
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)

    @property
    def payload_bits(self) -> int:
        """Bits without padding: each index counts `bits`, each level and each scale its word length."""
        word = self.codebook_format.word if self.codebook_format else self.levels.dtype.itemsize * 8
        scales = 0 if self.scale is None else math.prod(self.scale.shape) * self.scale.dtype.itemsize * 8
        return self.size * self.bits + math.prod(self.levels.shape) * word + scales

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a CodebookArray without axes")
        return self.shape[0]

    def __iter__(self) -> Iterator["CodebookArray"]:
        """Iterates over the slices along the first stack axis."""
        if not self.stack_shape:
            raise TypeError("a CodebookArray is iterated over its stack axes, and this one has none")
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> "CodebookArray":
        """Slices along the stack axes, as for an array: the result has its own part of the codebooks."""
        index = index if isinstance(index, tuple) else (index,)
        stack = len(self.stack_shape)
        taken = sum(np.ndim(i) if _is_mask(i) else 1 for i in index if i is not None)
        if any(i is Ellipsis for i in index) or taken > stack:
            raise IndexError(
                f"a CodebookArray is indexed along its {stack} stack axes only (shape {self.shape}). {_HOW_TO_RUN}"
            )
        leaf = held_by_jax(self) if any(isinstance(i, jax.core.Tracer) for i in index) else self
        return jax.tree.map(lambda a: a[index], leaf)

    if not TYPE_CHECKING:  # what raises is hidden from type checkers, so that they report its use

        def __getattr__(self, name: str) -> NoReturn:
            hint = "" if name.startswith("_") or not hasattr(jax.Array, name) else f". {_HOW_TO_RUN}"
            raise AttributeError(f"'CodebookArray' object has no attribute {name!r}{hint}", name=name, obj=self)

        @property
        def __jax_array__(self) -> NoReturn:
            """Raises TypeError. Some JAX functions call this; others only test that it exists, and say less."""
            raise TypeError(f"a CodebookArray is not an operand of JAX's functions. {_HOW_TO_RUN}")

        def _no_operand(self, *_: object) -> NoReturn:
            return self.__jax_array__

        __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_operand
        __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _no_operand
        __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __pos__ = __abs__ = _no_operand

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a CodebookArray has no dense array to share: np.asarray decodes it into a new one")
        convert = np.array if copy else np.asarray
        return convert(dense_on_host(self) if is_on_host(self) else np.asarray(decode(self)), dtype)

    def __repr__(self) -> str:
        try:
            shape, size = list(self.shape), f", {self.nbytes} bytes"
        except (AttributeError, TypeError):  # JAX rebuilds nodes with placeholders instead of arrays
            shape, size = list(self.slice_shape), ""
        extra = f", {self.codebook_format}" if self.codebook_format else ""
        return (
            f"CodebookArray({np.dtype(self.dtype).name}{shape}, bits={self.bits}, "
            f"granularity={self.granularity!r}{extra}{size})"
        )


CodebookArray.__module__ = "nuqjax"  # the public path, which messages and pickles name


def _layout_to_bytes(layout: Sequence[Any]) -> bytes:
    """Returns the static fields, in the order of `_LAYOUT`, as JSON, so that `jax.export` can serialize functions."""
    fields = dict(zip(_LAYOUT, layout, strict=True))
    granularity, codebook_format = fields["granularity"], fields["codebook_format"]
    fields["dtype"] = np.dtype(fields["dtype"]).name
    if not isinstance(granularity, str):
        fields["granularity"] = [type(granularity).__name__, granularity.size]
    fields["codebook_format"] = codebook_format and [codebook_format.word, codebook_format.frac, codebook_format.signed]
    return json.dumps(fields).encode()


def _layout_from_bytes(data: bytes) -> tuple[Any, ...]:
    """Returns the static fields, in the order of `_LAYOUT`, from JSON: the inverse of `_layout_to_bytes`."""
    fields = json.loads(data)
    granularity, codebook_format = fields["granularity"], fields["codebook_format"]
    fields |= {name: tuple(fields[name]) for name in ("slice_shape", "axes")}
    fields["dtype"] = jnp.dtype(fields["dtype"])
    if not isinstance(granularity, str):
        kind, size = granularity
        fields["granularity"] = {"ChannelGroups": ChannelGroups, "InputGroups": InputGroups}[kind](size)
    fields["codebook_format"] = codebook_format and QFormat(*codebook_format)
    return tuple(fields[name] for name in _LAYOUT)


jax.export.register_pytree_node_serialization(
    CodebookArray,
    serialized_name="nuqjax.CodebookArray",
    serialize_auxdata=_layout_to_bytes,
    deserialize_auxdata=_layout_from_bytes,
)


def _is_mask(index: object) -> bool:
    return isinstance(index, np.ndarray | jax.Array) and index.dtype == bool


def is_codebook_array(x: object) -> bool:
    """Returns whether `x` is a `CodebookArray`; use it as `is_leaf` of tree functions."""
    return isinstance(x, CodebookArray)


def level_values(leaf: CodebookArray) -> jax.Array:
    """Returns the floating levels `[*S, R, K]`: fixed-point words are decoded to float32, others returned as stored."""
    return fixed_point.decode(leaf.levels, leaf.codebook_format) if leaf.codebook_format else leaf.levels


def decode(leaf: CodebookArray) -> jax.Array:
    """Returns the dense array that a `CodebookArray` represents: `[*S, *slice_shape]` of its dtype."""
    check_layout(leaf)
    leaf = held_by_jax(leaf)
    traced = any(isinstance(x, jax.core.Tracer) for x in (leaf.levels, leaf.packed, leaf.scale))
    return _decode(leaf) if traced else _jit_decode(leaf)


def _decode(leaf: CodebookArray) -> jax.Array:
    if leaf.size == 0:
        return jnp.zeros(leaf.shape, leaf.dtype)
    decoded = _over_stack(_decode_slice, leaf)
    sharding = dense_sharding(leaf)
    return decoded(leaf) if sharding is None else as_automatic(decoded, sharding.mesh, sharding.spec)(leaf)


_jit_decode = jax.jit(_decode)  # one compiled program instead of dozens


def dense_sharding(leaf: CodebookArray) -> NamedSharding | None:
    """Returns the sharding of the dense array of a leaf on a mesh with explicit axes; None for other leaves.

    It follows the packed indices: the first output axis is distributed like the storage rows, the first of the other
    axes like their bytes.
    """
    given = explicit_sharding(leaf.packed, leaf.levels, leaf.scale)
    if given is None:
        return None
    *lead, output, position = typed_spec(leaf.packed)
    spec: list[Any] = [*lead, *[None] * len(leaf.slice_shape)]
    others = [a for a in range(len(leaf.slice_shape)) if a not in leaf.axes]
    for axes, names in ((leaf.axes, output), (others, position)):
        if axes and names is not None and leaf.slice_shape[axes[0]] % shards(given.mesh, names) == 0:
            spec[len(lead) + axes[0]] = names
    return NamedSharding(given.mesh, PartitionSpec(*spec))


def held_by_jax(leaf: CodebookArray) -> CodebookArray:
    """Returns the leaf with JAX arrays in place of NumPy's (as after `jax.device_get`), which tracers cannot index."""
    return jax.tree.map(jnp.asarray, leaf)


def is_on_host(leaf: CodebookArray) -> bool:
    """Returns whether all arrays of a leaf are concrete and on the host."""
    return on_host(leaf.levels, leaf.packed, leaf.scale)


def dense_on_host(leaf: CodebookArray) -> np.ndarray:
    """Computes `decode` in NumPy for a leaf on the host: the result has the same bits, and nothing is compiled."""
    check_layout(leaf)
    arrays = {name: to_numpy(getattr(leaf, name)) for name in ("levels", "packed", "scale")}
    leaf = replace(leaf, **arrays)
    dense = np.zeros(leaf.shape, leaf.dtype)
    for place in np.ndindex(leaf.stack_shape if leaf.size else (0,)):
        dense[place] = _decode_slice_on_host(leaf[place])
    return dense


def _over_stack(
    function: Callable[[CodebookArray], jax.Array], leaf: CodebookArray
) -> Callable[[CodebookArray], jax.Array]:
    for _ in leaf.stack_shape:
        function = jax.vmap(function)
    return function


def decoding_levels(leaf: CodebookArray) -> jax.Array:
    """Returns the levels in the dtype for the look-up: the leaf's own without scales, else its working dtype."""
    if leaf.codebook_format and isinstance(leaf.levels, np.ndarray):
        levels: Any = fixed_point.decode_on_host(leaf.levels, leaf.codebook_format)
    else:
        levels = level_values(leaf)
    if leaf.scale is None:
        return levels.astype(leaf.dtype)
    return levels.astype(working_dtype(leaf.dtype))


def _decode_slice(leaf: CodebookArray) -> jax.Array:
    matrix = decode_matrix(decoding_levels(leaf), leaf.packed, leaf.scale, matrix_layout(leaf))
    return rows_.from_channels(matrix, leaf.slice_shape, leaf.axes)


def matrix_layout(leaf: CodebookArray) -> Layout:
    """Returns how the arrays of a slice stand for its channels `[O, I]`."""
    inputs = rows_.channel_shape(leaf.slice_shape, leaf.axes)[1]
    return Layout(leaf.bits, inputs, leaf.granularity, leaf.scale_group, (np.dtype(leaf.dtype),))


def _decode_slice_on_host(leaf: CodebookArray) -> np.ndarray:
    """Computes `_decode_slice` for NumPy arrays, row by row."""
    outputs, inputs = rows_.channel_shape(leaf.slice_shape, leaf.axes)
    indices = packing.unpack(np.asarray(leaf.packed), leaf.bits, inputs)
    values = rows_.look_up(np.asarray(decoding_levels(leaf)), rows_.to_rows(indices, leaf.granularity))
    values = rows_.from_rows(values, outputs, inputs, leaf.granularity)
    if leaf.scale is not None:
        values = flushed(
            flushed(values) * flushed(factors(np.asarray(leaf.scale), leaf.scale_group, inputs).astype(values.dtype))
        )
    return rows_.from_channels(values.astype(leaf.dtype), leaf.slice_shape, leaf.axes)


def with_levels(leaf: CodebookArray, levels: jax.Array) -> CodebookArray:
    """Returns the leaf with floating levels `[*S, R, K]` in place of its own."""
    if jnp.shape(levels) != leaf.levels.shape:
        raise ValueError(f"levels of shape {jnp.shape(levels)}, but the leaf has {leaf.levels.shape}")
    return replace(leaf, levels=to_jax(levels) if isinstance(levels, np.ndarray) else levels, codebook_format=None)


def check_layout(leaf: CodebookArray, path: str = "a compressed leaf") -> None:
    """Raises ValueError, naming `path`, if JAX sliced the leaf's arrays or an optimizer trained its indices."""
    outputs, inputs = rows_.channel_shape(leaf.slice_shape, leaf.axes)
    ends = {
        "levels": (rows_.row_shape(outputs, inputs, leaf.granularity)[0], 1 << leaf.bits),
        "packed": (outputs, packing.packed_size(inputs, leaf.bits)),
    }
    if leaf.scale is not None:
        ends["scale"] = (outputs, -(-inputs // leaf.scale_group))
    shapes = {name: tuple(getattr(leaf, name).shape) for name in ends}
    stacks = {shapes[name][: max(0, len(shapes[name]) - 2)] for name in ends}
    if len(stacks) > 1 or any(shapes[name][-2:] != ends[name] for name in ends):
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        wanted = ", ".join(f"{name} [*S, {', '.join(map(str, end))}]" for name, end in ends.items())
        raise ValueError(
            f"{path}: {got}, but {wanted} are wanted: vmap, scan or tree.map took an axis of its arrays that is not "
            "a stack axis S. nuqjax.Rule(pattern, stack_axes=1) compresses each slice of a leading axis by itself"
        )
    if leaf.packed.dtype != jnp.uint8:
        raise ValueError(
            f"{path}: packed has dtype {leaf.packed.dtype}, but uint8 indices are wanted: only levels are trained. "
            "Give grad and optimizers nuqjax.codebooks(cparams), and put the levels back by nuqjax.with_codebooks"
        )
