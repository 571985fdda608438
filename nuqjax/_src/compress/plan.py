"""Plans what `compress` does with each leaf, and computes the sizes, from shapes alone."""

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from nuqjax._src.compress.rules import Options, Rule, resolve
from nuqjax._src.compress.stacks import Stack, likely_stacks, no_parameters, stack_of
from nuqjax._src.fit.methods import check_method
from nuqjax._src.leaf import packing, rows
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.leaf.qformat import AutoQFormat, CodebookFormat, QFormat
from nuqjax._src.leaf.rows import Granularity, InputGroups, Scale
from nuqjax._src.platform.host import native_dtype, why_unfit
from nuqjax._src.report.render import add_row, render
from nuqjax._src.report.report import html_page


@dataclass(frozen=True)
class LeafPlan:
    """What `compress` does with one leaf.

    Attributes:
      path: its keys, joined by "/".
      shape: its shape, stack axes included; () for what is not an array.
      dtype: name of its dtype, or of its Python type. Of a compressed leaf it is the dtype in JAX: float32 for NumPy's
        float64 without x64.
      options: the options that apply to it.
      reason: why it stays dense; None where it is compressed.
      nbytes_before: bytes of memory of the leaf as given.
      nbytes_after: bytes of memory of the result: packed indices, codebooks and scales, padding included.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    options: Options
    reason: str | None
    nbytes_before: int
    nbytes_after: int

    @property
    def is_floating(self) -> bool:
        """Whether its values are floating."""
        return self.dtype in jnp.__dict__ and jnp.issubdtype(self.dtype, jnp.floating)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """The shape without the stack axes."""
        return self.shape[self.options.stack_axes :]

    @property
    def axes(self) -> tuple[int, ...]:
        """The output axes of a slice."""
        return rows.output_axes(self.options.axis, len(self.slice_shape))


@dataclass(frozen=True)
class Plan:
    """The table of what `compress` would do: `str` prints it, `to_dict` gives its numbers.

    Attributes:
      leaves: a `LeafPlan` for each leaf, in the tree's order.

    >>> import jax.numpy as jnp, nuqjax
    >>> sizes = nuqjax.plan({"w": jnp.zeros((32, 32))}, bits=4)
    >>> sizes.nbytes_before, sizes.nbytes_after
    (4096, 576)
    """

    leaves: tuple[LeafPlan, ...]

    @property
    def nbytes_before(self) -> int:
        """Bytes of memory of the tree as given."""
        return sum(leaf.nbytes_before for leaf in self.leaves)

    @property
    def nbytes_after(self) -> int:
        """Bytes of memory of the compressed tree."""
        return sum(leaf.nbytes_after for leaf in self.leaves)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: the sub-trees that look like stacked layers and that no rule names."""
        return tuple(stack.note for stack in stacks_of(self.leaves))

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain numbers and strings."""
        names = ("path", "shape", "dtype", "reason", "nbytes_before", "nbytes_after")
        leaves = [
            {name: getattr(leaf, name) for name in names}
            | {name: _plain(value) for name, value in vars(leaf.options).items() if name not in ("skip", "min_size")}
            for leaf in self.leaves
        ]
        sizes = {"nbytes_before": self.nbytes_before, "nbytes_after": self.nbytes_after}
        return {"leaves": leaves, **sizes, "notes": list(self.notes)}

    def __str__(self) -> str:
        return "\n".join([render(self._table()), *self.notes])

    def _repr_html_(self) -> str:
        """Returns the same table and notes as HTML for a notebook."""
        return html_page([self._table()], self.notes)

    def _table(self) -> Table:
        table = Table(title="compression plan")
        for name in ("leaf", "shape", "dtype", "method", "bits", "granularity", "bytes before", "bytes after"):
            table.add_column(name, justify="left" if name in ("leaf", "method", "granularity") else "right")
        for leaf in self.leaves:
            o = leaf.options
            chosen = (o.method, str(o.bits), str(o.granularity)) if leaf.reason is None else ("dense", "", leaf.reason)
            sizes = f"{leaf.nbytes_before:,}", f"{leaf.nbytes_after:,}"
            add_row(table, leaf.path, "×".join(map(str, leaf.shape)), leaf.dtype, *chosen, *sizes)
        table.add_section()
        table.add_row("in all", "", "", "", "", "", f"{self.nbytes_before:,}", f"{self.nbytes_after:,}")
        return table


def _plain(value) -> str | int | float | None:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def plan(
    params: Any,
    bits: int = 4,
    method: str = "knq",
    *,
    granularity: Granularity = "tensor",
    axis: int | Sequence[int] = -1,
    scale: Scale = None,
    codebook_format: CodebookFormat = None,
    keep_zero: bool = False,
    rules: Rule | Sequence[Rule] = (),
    min_size: int = 256,
) -> Plan:
    """Returns a table of what `compress` would do with the same options, with sizes, from shapes alone.

    Args:
      params: the tree, or one of `jax.ShapeDtypeStruct` (as from `jax.eval_shape`).
      bits: as in `nuqjax.compress`, like all arguments below.
      method: how levels are fitted; here it is only checked and shown.
      granularity: which values share a codebook.
      axis: the output axis or axes.
      scale: which values are divided by a common scale.
      codebook_format: how levels are stored.
      keep_zero: one level is exactly 0.
      rules: options by path.
      min_size: leaves with fewer values stay dense.

    Returns:
      A `Plan`.

    Raises:
      ValueError: an option is out of range, or a rule matches nothing.

    >>> import jax, jax.numpy as jnp
    >>> tree = {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
    >>> p = plan(tree, bits=4)
    >>> p.nbytes_before, p.nbytes_after  # 2048 indices of 4 bits and 16 levels
    (8192, 1088)
    """
    options = Options(
        bits=bits, method=method, granularity=granularity, axis=axis, scale=scale, codebook_format=codebook_format,
        keep_zero=keep_zero, min_size=min_size,
    )  # fmt: skip
    return Plan(tuple(plan_leaves(params, options, rules)))


def plan_leaves(params: Any, options: Options, rules: Rule | Sequence[Rule]) -> list[LeafPlan]:
    """Returns a `LeafPlan` for each leaf of the tree; a `CodebookArray` is one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_codebook_array)
    paths = [path_name(path) for path, _ in flat]
    _check_tree(flat)
    _check_options(options, "compress")
    resolved = resolve(paths, options, rules)
    why_not = no_parameters(params)
    plans = [
        _plan_leaf(path, leaf, o, why_not.get(path)) for path, (_, leaf), o in zip(paths, flat, resolved, strict=True)
    ]
    stacks = stacks_of(plans)
    return [_unless_stacked(plan, stack_of(plan.path, stacks)) for plan in plans]


def _check_tree(flat: Sequence[tuple[Any, Any]]) -> None:
    """Raises ValueError for anything but a tree of arrays: a function, a module, a list of numbers, foreign tensors."""
    wanted = "a tree of arrays is wanted, such as compress(variables['params'])"
    for path, leaf in flat:
        _check_kind(path_name(path), leaf)
    if any(is_array(leaf) for _, leaf in flat):
        return
    for path, leaf in flat:
        if not path:
            raise ValueError(f"compress: params is {_kind(leaf)}, but {wanted}")
        if isinstance(path[-1], jax.tree_util.SequenceKey) and isinstance(leaf, int | float):
            raise ValueError(
                f"{path_name(path)}: a Python {type(leaf).__name__} in a list, which would be a leaf of its own, but "
                f"{wanted}; jnp.asarray makes a list of numbers an array"
            )


def _check_kind(path: str, leaf: Any) -> None:
    """Raises ValueError for an array that would be misread: one with masked values, or another library's tensor."""
    if isinstance(leaf, np.ma.MaskedArray):
        masked = np.count_nonzero(np.ma.getmaskarray(leaf))
        if masked:
            raise ValueError(
                f"{path}: an array with {masked} masked values; a plain array is wanted: its filled(0), or its data"
            )
    if is_array(leaf) and not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not is_codebook_array(leaf):
        try:
            np.dtype(leaf.dtype)
        except TypeError as error:
            kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
            raise ValueError(
                f"{path}: a {kind} of dtype {leaf.dtype}, but an array of NumPy or JAX is wanted: np.asarray(leaf)"
            ) from error


def is_array(leaf: Any) -> bool:
    """Returns whether a leaf is an array, or the shape and dtype of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _kind(leaf: Any) -> str:
    return f"{leaf.__name__!r}, a function" if inspect.isroutine(leaf) else f"a {type(leaf).__name__}"


def stacks_of(plans: Sequence[LeafPlan]) -> list[Stack]:
    """Returns the sub-trees that look like stacked layers and about which no rule decides."""
    floating = {plan.path: plan.shape for plan in plans if plan.is_floating}
    told = {plan.path for plan in plans if plan.options.stack_axes or plan.options.skip is not None}
    return [stack for stack in likely_stacks(floating) if not any(stack_of(path, [stack]) for path in told)]


def _unless_stacked(plan: LeafPlan, stack: Stack | None) -> LeafPlan:
    """Returns the plan, changed to leave the leaf dense if it has only one axis besides that of the stack."""
    if stack is None or plan.reason is not None or len(plan.shape) > 2:
        return plan
    return replace(plan, reason=f"one axis in each of {stack.length} stacked layers", nbytes_after=plan.nbytes_before)


def _plan_leaf(path: str, leaf: Any, options: Options, why_not: str | None) -> LeafPlan:
    if not isinstance(options.axis, int):
        axis: Any = options.axis
        options = replace(options, axis=tuple(axis) if isinstance(axis, Iterable) else (axis,))
    if options.rule is not None:
        _check_options(options, path)
    if is_codebook_array(leaf):
        if options.skip is False:
            raise ValueError(f"{path}: rule {options.rule!r} has skip=False, but it is already a CodebookArray")
        return LeafPlan(path, leaf.shape, str(leaf.dtype), options, "already compressed", leaf.nbytes, leaf.nbytes)
    if not is_array(leaf):
        if options.skip is False:
            kind = f"a {type(leaf).__name__}, not an array"
            raise ValueError(f"{path}: rule {options.rule!r} has skip=False, but it is {kind}")
        return LeafPlan(path, (), type(leaf).__name__, options, "not an array", 0, 0)
    shape = tuple(leaf.shape)
    size, before = math.prod(shape), math.prod(shape) * leaf.dtype.itemsize

    def dense(reason: str) -> LeafPlan:
        return LeafPlan(path, shape, leaf.dtype.name, options, reason, before, before)

    if options.skip:
        return dense(f"rule {options.rule!r}")
    insists = options.skip is False
    unfit = why_unfit(leaf.dtype)
    if unfit is not None and insists:
        raise ValueError(f"{path}: rule {options.rule!r} has skip=False, but {unfit}")
    if unfit is not None or (why_not is not None and not insists):
        return dense(unfit or why_not or "")
    dtype = native_dtype(leaf.dtype)
    if options.stack_axes > len(shape):
        raise ValueError(f"{path}: stack_axes={options.stack_axes}, but the leaf has shape {shape}")
    ndim = len(shape) - options.stack_axes
    if not insists and ndim < 2:
        return dense("one axis" if ndim == 1 else "no axes")
    if not insists and size < options.min_size:
        return dense(f"{size} values, min_size is {options.min_size}")
    if ndim == 0:
        options = replace(options, axis=())  # a scalar has no axis to choose
    try:
        rows.output_axes(options.axis, ndim)
    except ValueError as error:
        raise ValueError(f"{path} (shape {shape}): {error}") from error
    compressed = LeafPlan(path, shape, dtype.name, options, None, before, _nbytes_after(shape, dtype, options))
    if not insists and compressed.nbytes_after >= before:
        return dense(f"would take {compressed.nbytes_after:,} bytes, not fewer")
    return compressed


def replanned(plan: LeafPlan, options: Options) -> LeafPlan:
    """Returns the plan of a compressed leaf with other options."""
    dtype = jnp.dtype(plan.dtype)
    changed = replace(plan, options=options, nbytes_after=_nbytes_after(plan.shape, dtype, options))
    if options.skip is not False and changed.nbytes_after >= plan.nbytes_before:
        return replace(
            plan, reason=f"would take {changed.nbytes_after:,} bytes, not fewer", nbytes_after=plan.nbytes_before
        )
    return changed


def _nbytes_after(shape: tuple[int, ...], dtype: np.dtype, options: Options) -> int:
    stack, slice_shape = math.prod(shape[: options.stack_axes]), shape[options.stack_axes :]
    outputs, inputs = rows.channel_shape(slice_shape, rows.output_axes(options.axis, len(slice_shape)))
    count, _ = rows.row_shape(outputs, inputs, options.granularity)
    levels = count * 2**options.bits * _level_itemsize(options.codebook_format, dtype)
    packed = outputs * packing.packed_size(inputs, options.bits)
    scales = outputs * scale_groups(inputs, options.scale)[0] * dtype.itemsize
    return stack * (levels + packed + scales)


def scale_groups(inputs: int, scale) -> tuple[int, int]:
    """Returns `(G, n)`: a channel of `inputs` values has G scales, and n values share one; (0, 0) without scales."""
    if scale is None:
        return 0, 0
    size = max(inputs, 1) if scale == "channel" else scale.size
    return -(-inputs // size), size


def _level_itemsize(codebook_format, dtype: np.dtype) -> int:
    if codebook_format is None:
        return dtype.itemsize
    if isinstance(codebook_format, AutoQFormat):
        codebook_format = QFormat(codebook_format.word, 0, codebook_format.signed)
    if isinstance(codebook_format, QFormat):
        return codebook_format.storage_dtype.itemsize
    return jnp.dtype(codebook_format).itemsize


def _check_options(options: Options, path: str) -> None:
    """Raises ValueError, naming `path`, for an option out of range."""
    o = options
    if isinstance(o.bits, bool) or not isinstance(o.bits, int) or not 1 <= o.bits <= 8:
        raise ValueError(f"{path}: bits={o.bits!r}, but a whole number from 1 to 8 is wanted")
    if isinstance(o.min_size, bool) or not isinstance(o.min_size, int) or o.min_size < 0:
        raise ValueError(f"{path}: min_size={o.min_size!r}, but a whole number, 0 or more, is wanted")
    if o.tolerance is not None and not o.tolerance >= 0:
        raise ValueError(f"{path}: tolerance={o.tolerance!r}, but a number, 0 or more, or None is wanted")
    if not (o.scale is None or isinstance(o.scale, InputGroups) or (isinstance(o.scale, str) and o.scale == "channel")):
        raise ValueError(f'{path}: scale={o.scale!r}, but None, "channel" or InputGroups(n) is wanted')
    try:
        check_method(o.method)
        rows.check_granularity(o.granularity)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check_codebook_format(o.codebook_format, path)


def _check_codebook_format(codebook_format, path: str) -> None:
    wanted = "None, a floating dtype, a QFormat or an AutoQFormat is wanted"
    if codebook_format is None:
        return
    if isinstance(codebook_format, QFormat | AutoQFormat):
        if codebook_format.word > 24:
            raise ValueError(f"{path}: codebook_format={codebook_format}, but levels decode exactly up to 24 bits only")
        return
    try:
        dtype = jnp.dtype(codebook_format)
    except TypeError as error:
        raise ValueError(f"{path}: codebook_format={codebook_format!r}, but {wanted}") from error
    if reason := why_unfit(dtype):
        raise ValueError(f"{path}: codebook_format={dtype.name}: {reason}, but {wanted} (integer words: QFormat)")
