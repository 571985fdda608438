"""The results of compression: sizes, distortion and certificates, per leaf and in total."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from nuqjax._src.leaf.codebook_array import CodebookArray, check_layout, is_codebook_array
from nuqjax._src.leaf.paths import printable
from nuqjax._src.platform.host import why_unfit
from nuqjax._src.report.comparison import compare_leaf
from nuqjax._src.report.leaf_report import LeafReport, summary
from nuqjax._src.report.render import add_row, render, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Report:
    """A compressed tree compared with the tree it came from: `str` gives a table, `to_dict` the numbers.

    Attributes:
      leaves: a `LeafReport` for each leaf, in the tree's order.
      notes: what a user should know about the tree.
      nbytes_file: bytes on disk of the file that the tree was written to, all parts and the header counted; None where
        it was not written to a file.
      nbytes_source: bytes on disk of the files that it came from; None where it did not come from files.
      calibration: results of calibration with data, and measurements on held-out data; None without data.
      nbytes_saved: bytes of the file that `save(path, cparams)` writes; None where no file holds the tree, and for
        reports that come with a file.
      nbytes_saved_coded: the same for `save(path, cparams, entropy_coding=True)`, to a few bytes for each leaf.

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
    nbytes_saved: int | None = field(default=None, compare=False)
    nbytes_saved_coded: int | None = field(default=None, compare=False)

    @property
    def growth(self) -> str | None:
        """A warning where the file is larger than its source, or than the dense leaves in memory; None otherwise."""
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
        """The leaves that stay dense, each with its reason."""
        return tuple(leaf for leaf in self.leaves if leaf.reason is not None)

    @property
    def total(self) -> dict[str, Any]:
        """The totals of the tree.

        Keys: `weights`, `compressed_weights`, `nbytes_before`, `nbytes_after`, `ratio` (before / after),
        `bits_per_weight` (all leaves), `compressed_bits_per_weight` (compressed leaves), `payload_bits` and `entropy`
        (mean bits per index) of compressed leaves, `sqnr_db` of the compressed leaves together, `largest_error`,
        `certificate` (the worst leaf's; None unless every compressed leaf has one), `nbytes_packed` of the indices in
        memory and `nbytes_coded` in a file (a leaf that coding does not make smaller counts as packed; None where no
        leaf is coded), `nbytes_file` of the file on disk, `nbytes_saved` and `nbytes_saved_coded` of files to come.
        """
        files = ("nbytes_file", "nbytes_saved", "nbytes_saved_coded")
        return summary(self.leaves) | {name: getattr(self, name) for name in files}

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"total": {…}, "leaves": [{…}, …]}` of plain values, and `"calibration"` if there is one."""
        learned = {} if self.calibration is None else {"calibration": dict(self.calibration)}
        return {"total": self.total, "leaves": [leaf.to_dict() for leaf in self.leaves], **learned}

    def plot(self) -> "Figure":
        """Draws the leaves: memory before and after, and SQNR. Needs matplotlib (the `plot` extra)."""
        from nuqjax._src.report.plot import plot_report

        return plot_report(self.leaves)

    def __str__(self) -> str:
        return "\n".join([*map(render, self._tables()), *self._lines()])

    def _repr_html_(self) -> str:
        """Returns the same tables and lines as HTML for a notebook."""
        return html_page(self._tables(), self._lines())

    def _tables(self) -> list[Table]:
        """Returns a table of the compressed leaves and one of the dense leaves, where there are any."""
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
                    f"{x.levels_used}/{x.levels_available}", f"{x.bits_per_weight:.3f}", shown(x.entropy, ".2f"),
                    shown(x.sqnr_db, ".2f"), shown(x.largest_error, ".2g"), shown(x.certificate, ".1e"),
                    *(shown(size, ",") for size in sizes),
                )  # fmt: skip
        if self.dense:
            tables.append(table := Table(title="dense leaves"))
            for name in ("leaf", "shape", "dtype", "bytes", "reason"):
                table.add_column(name, justify="left" if name in ("leaf", "reason") else "right")
            for x in self.dense:
                add_row(table, x.path, "×".join(map(str, x.shape)), x.dtype, f"{x.nbytes_after:,}", x.reason)
        return tables

    def _lines(self) -> list[str]:
        """Returns sizes in total and of files to come, the notes, and a warning where the file exceeds its source."""
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
        lines = [line]
        if self.nbytes_saved is not None and self.nbytes_file is None:
            lines.append(f"saved: {self.nbytes_saved:,} bytes, {self.nbytes_saved_coded:,} with entropy coding")
        return [*lines, *self.notes, *([f"warning: {self.growth}"] if self.growth else [])]


def html_page(tables: Sequence[Table], lines: Sequence[str] = ()) -> str:
    """Returns rich tables, with lines below them, as HTML for a notebook; all text in it is escaped.

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
    """Returns text as HTML that shows it: tags, quotes and control characters are escaped."""
    return html.escape(printable(text, longest=len(str(text))))


def report_leaf(
    path: str, dense: Any, leaf: Any, reason: str | None, method: str | None = None, certificate: float | None = None
) -> LeafReport:
    """Reports one leaf: `leaf` compared with the `dense` leaf that it came from, or the reason why it stays dense."""
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
    compared = compare_leaf(np.asarray(dense), leaf)
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
