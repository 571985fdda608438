"""What compression cost: sizes, distortion and certificates, per leaf and in all."""

import html
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nuqjax import packing
from nuqjax import rows as rows_
from nuqjax.codebook_array import CodebookArray, channel_block, check_layout, dense_on_host, is_codebook_array
from nuqjax.host import why_unfit
from nuqjax.paths import path_name, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHUNK = 1 << 20  # values compared at once in float64


@dataclass(frozen=True)
class LeafReport:
    """One leaf, before and after.

    Attributes:
      path: its keys, joined by "/".
      shape: its shape.
      dtype: name of its dtype.
      weights: number of values.
      nbytes_before: bytes of memory of the dense leaf.
      nbytes_after: bytes of memory of the result: packed indices, codebooks and scales, padding included.
      reason: why it stayed dense; None where it is compressed. The rest is None for a dense leaf.
      method: how its levels were fitted; None where that is not known.
      bits: index width.
      granularity: which values share a codebook.
      codebook_format: dtype or `QFormat` of the levels.
      levels_used: levels that at least one index names, over all codebooks.
      levels_available: levels stored, over all codebooks.
      payload_bits: bits of information, without padding.
      entropy: entropy of the indices, bits each (the leaf's indices pooled).
      signal: Σ x².
      noise: Σ (x − decoded x)².
      largest_error: max |x − decoded x|.
      certificate: the relative amount by which the squared error of the fit may exceed the optimum, as proven:
        (sse − lower_bound) / sse; None where nothing was proven.
      nbytes_packed: bytes of memory of the packed indices.
      nbytes_coded: bytes of the entropy-coded indices in a file, their model counted; None where none was asked.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    nbytes_before: int
    nbytes_after: int
    reason: str | None = None
    method: str | None = None
    bits: int | None = None
    granularity: str | None = None
    codebook_format: str | None = None
    levels_used: int | None = None
    levels_available: int | None = None
    payload_bits: int | None = None
    entropy: float | None = None
    signal: float | None = None
    noise: float | None = None
    largest_error: float | None = None
    certificate: float | None = None
    nbytes_packed: int | None = None
    nbytes_coded: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of memory for each value, codebooks, scales and padding included."""
        return 8 * self.nbytes_after / self.weights if self.weights else 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise ratio, dB; infinite where nothing was lost, None for a dense leaf."""
        return None if self.signal is None or self.noise is None else sqnr_db(self.signal, self.noise)

    def to_dict(self) -> dict[str, Any]:
        """The leaf as plain numbers and strings."""
        return vars(self) | {"bits_per_weight": self.bits_per_weight, "sqnr_db": self.sqnr_db}


def sqnr_db(signal: float, noise: float) -> float:
    """10·log10(signal / noise), dB; infinite without noise.

    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


@dataclass(frozen=True)
class Report:
    """A compressed tree beside the tree it came from: `str` prints the table, `to_dict` gives its numbers.

    Attributes:
      leaves: a `LeafReport` for each leaf, in the tree's order.
      notes: what a user should know of the tree.
      nbytes_file: bytes on disk of the file that the tree was written to, all parts and the header counted; None where
        it was written to none.
      nbytes_source: bytes on disk of the files that it came from; None where it came from none.
      calibration: what was learned from data, and measured on such as were held out; None where there were none.

    >>> import jax.numpy as jnp, nuqjax
    >>> params = {"w": jnp.arange(1024.0).reshape(32, 32), "b": jnp.zeros(32)}
    >>> _, made = nuqjax.compress(params, bits=4, return_report=True)
    >>> [leaf.path for leaf in made.compressed], [(leaf.path, leaf.reason) for leaf in made.dense]
    (['w'], [('b', 'one axis')])
    """

    leaves: tuple[LeafReport, ...]
    notes: tuple[str, ...] = ()
    nbytes_file: int | None = field(default=None, compare=False)
    nbytes_source: int | None = field(default=None, compare=False)
    calibration: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def growth(self) -> str | None:
        """What to say where the file takes more than its source, or than the dense leaves in memory; None otherwise."""
        before, what = self.nbytes_source, "what it was made of"
        if before is None:
            before, what = sum(leaf.nbytes_before for leaf in self.leaves), "the dense leaves"
        if self.nbytes_file is None or self.nbytes_file <= before:
            return None
        return (
            f"the file takes {self.nbytes_file:,} bytes, more than {what} ({before:,}): fewer codebooks (a coarser "
            "granularity) or a higher min_size may make it smaller"
        )

    @property
    def compressed(self) -> tuple[LeafReport, ...]:
        """The leaves that are compressed."""
        return tuple(leaf for leaf in self.leaves if leaf.reason is None)

    @property
    def dense(self) -> tuple[LeafReport, ...]:
        """The leaves that stayed dense, each with its reason."""
        return tuple(leaf for leaf in self.leaves if leaf.reason is not None)

    @property
    def total(self) -> dict[str, Any]:
        """The tree in all.

        Keys: `weights`, `compressed_weights`, `nbytes_before`, `nbytes_after`, `ratio` (before / after),
        `bits_per_weight` (all leaves), `compressed_bits_per_weight` (compressed leaves), `payload_bits` and `entropy`
        (mean bits an index) of compressed leaves, `sqnr_db` of the compressed leaves together, `largest_error`,
        `certificate` (the worst leaf's; None unless every compressed leaf has one), `nbytes_packed` of the indices in
        memory and `nbytes_coded` in a file (leaves that coding makes no smaller as they are packed; None where no leaf
        is coded), `nbytes_file` of the file on disk.
        """
        compressed = self.compressed
        before, after = sum(x.nbytes_before for x in self.leaves), sum(x.nbytes_after for x in self.leaves)
        weights, count = sum(x.weights for x in self.leaves), sum(x.weights for x in compressed)
        proven = [x.certificate for x in compressed if x.certificate is not None]
        packed = sum(x.nbytes_packed or 0 for x in compressed)
        coded = sum((x.nbytes_packed or 0) if x.nbytes_coded is None else x.nbytes_coded for x in compressed)
        return {
            "weights": weights,
            "compressed_weights": count,
            "nbytes_before": before,
            "nbytes_after": after,
            "ratio": before / after if after else 1.0,
            "bits_per_weight": 8 * after / weights if weights else 0.0,
            "compressed_bits_per_weight": 8 * sum(x.nbytes_after for x in compressed) / count if count else None,
            "payload_bits": sum(x.payload_bits or 0 for x in compressed),
            "entropy": sum((x.entropy or 0.0) * x.weights for x in compressed) / count if count else None,
            "sqnr_db": sqnr_db(sum(x.signal or 0.0 for x in compressed), sum(x.noise or 0.0 for x in compressed))
            if compressed and all(x.noise is not None for x in compressed)
            else None,
            "largest_error": max((x.largest_error for x in compressed if x.largest_error is not None), default=None),
            "certificate": max(proven) if compressed and len(proven) == len(compressed) else None,
            "nbytes_packed": packed,
            "nbytes_coded": coded if any(x.nbytes_coded is not None for x in compressed) else None,
            "nbytes_file": self.nbytes_file,
        }

    def to_dict(self) -> dict[str, Any]:
        """`{"total": {…}, "leaves": [{…}, …]}` of plain numbers and strings, and `"calibration"` if there was."""
        learned = {} if self.calibration is None else {"calibration": dict(self.calibration)}
        return {"total": self.total, "leaves": [leaf.to_dict() for leaf in self.leaves], **learned}

    def plot(self) -> "Figure":
        """A figure of the leaves: memory before and after, and SQNR. Needs matplotlib (the `plot` extra)."""
        from nuqjax.plot import plot_report

        return plot_report(self)

    def __str__(self) -> str:
        return "\n".join([*map(render, self._tables()), *self._lines()])

    def _repr_html_(self) -> str:
        """What a notebook shows: the same tables and lines."""
        return html_page(self._tables(), self._lines())

    def _tables(self) -> list[Table]:
        """The compressed leaves and the dense ones, where there are any."""
        tables = []
        if self.compressed:
            tables.append(table := Table(title="compressed leaves"))
            coded = any(x.nbytes_coded is not None for x in self.compressed)
            names = ["leaf", "shape", "method", "bits", "granularity", "levels used", "bits/weight", "entropy",
                     "SQNR dB", "largest error", "certificate", "bytes"]  # fmt: skip
            names += ["packed", "coded"] if coded else []
            for name in names:
                table.add_column(name, justify="left" if name in ("leaf", "method", "granularity") else "right")
            for x in self.compressed:
                sizes = (x.nbytes_after, x.nbytes_packed, x.nbytes_coded) if coded else (x.nbytes_after,)
                add_row(
                    table, x.path, "×".join(map(str, x.shape)), x.method or "", str(x.bits), x.granularity,
                    f"{x.levels_used}/{x.levels_available}", f"{x.bits_per_weight:.3f}", _shown(x.entropy, ".2f"),
                    _shown(x.sqnr_db, ".2f"), _shown(x.largest_error, ".2g"), _shown(x.certificate, ".1e"),
                    *(_shown(size, ",") for size in sizes),
                )  # fmt: skip
        if self.dense:
            tables.append(table := Table(title="dense leaves"))
            for name in ("leaf", "shape", "dtype", "bytes", "reason"):
                table.add_column(name, justify="left" if name in ("leaf", "reason") else "right")
            for x in self.dense:
                add_row(table, x.path, "×".join(map(str, x.shape)), x.dtype, f"{x.nbytes_after:,}", x.reason)
        return tables

    def _lines(self) -> list[str]:
        """The sizes in all, the notes, and a warning where the file is larger than its source."""
        t = self.total
        line = (
            f"{t['weights']:,} weights: {t['nbytes_before']:,} bytes before, {t['nbytes_after']:,} after "
            f"({t['ratio']:.2f}× smaller, {t['bits_per_weight']:.3f} bits a weight all counted)"
        )
        if t["sqnr_db"] is not None:
            line += f"; SQNR {t['sqnr_db']:.2f} dB"
        if t["nbytes_coded"] is not None:
            line += f"; indices {t['nbytes_packed']:,} bytes packed, {t['nbytes_coded']:,} coded"
        if self.nbytes_file is not None:
            line += f"; file {self.nbytes_file:,} bytes"
        return [line, *self.notes, *([f"warning: {self.growth}"] if self.growth else [])]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def add_row(table: Table, *cells: Any) -> None:
    """A row of plain text: nothing in it is markup, or moves a terminal's cursor."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def plain_console(**options: Any) -> Console:
    """A console to which text is text."""
    return Console(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)


def render(table: Table) -> str:
    """A rich table as text, as wide as it needs to be."""
    console = plain_console(file=io.StringIO(), width=200, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def html_page(tables: Sequence[Table], lines: Sequence[str] = ()) -> str:
    """Rich tables, and lines below them, as HTML for a notebook: every text in it is escaped, however it was made.

    >>> table = Table("leaf", title="leaves")
    >>> add_row(table, "<b>")
    >>> html_page([table], ["1 < 2"]).split("<tbody>")[1]
    '<tr><td style="text-align:left">&lt;b&gt;</td></tr></tbody></table><p>1 &lt; 2</p>'
    """
    return "".join([*map(_html_table, tables), *(f"<p>{_html(line)}</p>" for line in lines)])


def _html_table(table: Table) -> str:
    def row(tag: str, cells: Iterable[Any]) -> str:
        sides = (column.justify for column in table.columns)
        cells = (f'<{tag} style="text-align:{side}">{_html(x)}</{tag}>' for side, x in zip(sides, cells, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    head = row("th", (column.header for column in table.columns))
    body = "".join(row("td", cells) for cells in zip(*(column.cells for column in table.columns), strict=True))
    caption = f"<caption>{_html(table.title)}</caption>" if table.title else ""
    return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"


def _html(text: Any) -> str:
    """Text as HTML that shows it: nothing in it is a tag, a quote or a control character."""
    return html.escape(printable(text, longest=len(str(text))))


def report(params: Any, cparams: Any) -> Report:
    """Compares a compressed tree with the tree it came from.

    Methods and certificates are not stored in a compressed tree: `compress(…, return_report=True)` has them.

    Args:
      params: the dense tree.
      cparams: the tree that `compress` made of it.

    Returns:
      A `Report`. Sizes are those of the arrays in memory; SQNR and errors are computed in float64 on the host.

    Raises:
      ValueError: the trees differ in structure, or a leaf in shape.

    >>> import jax.numpy as jnp, nuqjax
    >>> params = {"kernel": jnp.arange(1024.0).reshape(32, 32)}
    >>> r = report(params, nuqjax.compress(params, bits=4))
    >>> r.total["nbytes_before"], r.total["nbytes_after"]
    (4096, 576)
    """
    return build_report(params, cparams, {}, {})


def build_report(
    params: Any,
    cparams: Any,
    reasons: Mapping[str, str],
    fits: Mapping[str, tuple[str, float | None]],
    notes: tuple[str, ...] = (),
) -> Report:
    """`report`, with what only `compress` knows: by path, why a leaf is dense, and its method and certificate."""
    before, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_codebook_array)
    after, compressed_structure = jax.tree_util.tree_flatten_with_path(cparams, is_leaf=is_codebook_array)
    if structure != compressed_structure:
        raise ValueError(f"report: the trees differ: {structure} and {compressed_structure}")
    leaves = []
    for (path, dense), (_, leaf) in zip(before, after, strict=True):
        name = path_name(path)
        leaves.append(report_leaf(name, dense, leaf, reasons.get(name), *fits.get(name, (None, None))))
    return Report(tuple(leaves), notes)


def report_leaf(
    path: str, dense: Any, leaf: Any, reason: str | None, method: str | None = None, certificate: float | None = None
) -> LeafReport:
    """One leaf of a report: `leaf` beside the `dense` one that it came from, or why it stayed dense."""
    if is_codebook_array(leaf):
        check_layout(leaf, path or "the compressed leaf")
    if is_codebook_array(leaf) and not is_codebook_array(dense):
        return _report_compressed(path, dense, leaf, method, certificate)
    return _report_dense(path, leaf, reason)


def _report_dense(path: str, leaf: Any, reason: str | None) -> LeafReport:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return LeafReport(path, (), type(leaf).__name__, 0, 0, 0, reason or "not an array")
    if reason is None:
        reason = "already compressed" if is_codebook_array(leaf) else "left dense"
        reason = reason if is_codebook_array(leaf) else why_unfit(leaf.dtype) or reason
    return LeafReport(
        path, tuple(leaf.shape), leaf.dtype.name, math.prod(leaf.shape), int(leaf.nbytes), int(leaf.nbytes), reason
    )


def _report_compressed(
    path: str, dense: Any, leaf: CodebookArray, method: str | None, certificate: float | None
) -> LeafReport:
    if tuple(dense.shape) != leaf.shape:
        raise ValueError(f"report: {path} has shape {tuple(dense.shape)} in one tree and {leaf.shape} in the other")
    compared = _compare(np.asarray(dense), leaf)
    return LeafReport(
        path=path,
        shape=leaf.shape,
        dtype=np.dtype(leaf.dtype).name,
        weights=leaf.size,
        nbytes_before=leaf.size * dense.dtype.itemsize,
        nbytes_after=leaf.nbytes,
        method=method,
        bits=leaf.bits,
        granularity=str(leaf.granularity),
        codebook_format=str(leaf.codebook_format or leaf.levels.dtype),
        levels_available=math.prod(leaf.levels.shape),
        payload_bits=leaf.payload_bits,
        certificate=certificate,
        nbytes_packed=int(leaf.packed.nbytes),
        **compared._asdict(),
    )


class _Comparison(NamedTuple):
    """A leaf against its dense array, as `LeafReport` names it."""

    signal: float
    noise: float
    largest_error: float
    levels_used: int
    entropy: float


def _compare(dense: np.ndarray, leaf: CodebookArray) -> _Comparison:
    """Compares a few output channels at a time, by NumPy in float64."""
    leaf = jax.tree.map(np.asarray, leaf)
    levels = 1 << leaf.bits
    signal = noise = largest = 0.0
    used, counts = 0, np.zeros(levels, np.int64)
    for place in np.ndindex(leaf.stack_shape if leaf.size else (0,)):
        shared = np.zeros(levels, np.int64)  # by the only codebook, of "tensor" granularity
        for original, block in _blocks(dense[place], leaf[place]):
            x = original.astype(np.float64)
            error = x - dense_on_host(block).astype(np.float64)
            signal += float(np.vdot(x, x))
            noise += float(np.vdot(error, error))
            largest = max(largest, float(np.max(np.abs(error), initial=0)))
            table = _count_indices(block)
            counts += table.sum(axis=0)
            if leaf.granularity == "tensor":
                shared += table[0]
            else:
                used += int(np.count_nonzero(table))
        used += int(np.count_nonzero(shared))
    share = counts[counts > 0] / max(counts.sum(), 1)
    return _Comparison(signal, noise, largest, used, float(-(share * np.log2(share)).sum()) + 0.0)


def _blocks(dense: np.ndarray, leaf: CodebookArray) -> Iterator[tuple[np.ndarray, CodebookArray]]:
    """A slice's output channels, `_CHUNK` values or so at a time: of the dense array `[o, I]`, and of the leaf."""
    outputs, inputs = rows_.channel_shape(leaf.slice_shape, leaf.axes)
    if not outputs:
        return
    order = (*leaf.axes, *(a for a in range(dense.ndim) if a not in leaf.axes))
    dense = dense.transpose(order) if leaf.axes else dense[None]  # a view: only blocks are copied
    count, _ = rows_.row_shape(outputs, inputs, leaf.granularity)
    table = count * (1 << leaf.bits) // outputs
    width = outputs // dense.shape[0]  # channels for each index of the first output axis
    group = leaf.granularity.size if isinstance(leaf.granularity, rows_.ChannelGroups) else 1
    aligned = group // math.gcd(group, width)  # blocks begin where a group does
    step = max(_CHUNK // max(inputs * width, table * width, 1) // aligned, 1) * aligned
    for start in range(0, dense.shape[0], step):
        part = dense[start : start + step]
        channels = part.shape[0] * width
        yield part.reshape(channels, inputs), channel_block(leaf, start * width, start * width + channels)


def _count_indices(block: CodebookArray) -> np.ndarray:
    """`[R, K]` how often each level of each codebook is named."""
    outputs, inputs = block.slice_shape
    indices = rows_.to_rows(packing.unpack(block.packed, block.bits, inputs), block.granularity)
    number = np.arange(indices.shape[0])[:, None] * (1 << block.bits) + indices
    mask = rows_.row_mask(outputs, inputs, block.granularity)
    number = number.reshape(-1) if mask is None else number[mask]
    return np.bincount(number, minlength=indices.shape[0] << block.bits).reshape(-1, 1 << block.bits)
