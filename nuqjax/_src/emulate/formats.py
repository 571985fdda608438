"""The formats of a fixed-point emulation: one row per site, printed as a table, stored as JSON, edited by `replace`."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from nuqjax._src.leaf.qformat import OVERFLOW, ROUNDING, QFormat
from nuqjax._src.report.render import render
from nuqjax._src.report.report import html_page

ACCUMULATOR_MODES = ("exact", "wrap", "saturate")
SITE_ROUNDING = (*ROUNDING, "gemmlowp")
_VERSION = 1


@dataclass(frozen=True)
class Accumulator:
    """The register in which a dot or a convolution sums.

    Attributes:
      word: its bits, sign included, 2 to 62; None for as many as are needed.
      mode: `"exact"`: no bit is lost, and formats that could lose one are refused; `"wrap"`: sums modulo 2^word;
        `"saturate"`: every addition saturates, in the order bias, then the kernel's rows, columns and input channels.
      frac: its fraction bits; None for those of the products.
      rounding: the mode that rounds each product where `frac` drops fraction bits.

    >>> Accumulator(24, mode="wrap")
    Accumulator(word=24, mode='wrap', frac=None, rounding='floor')
    """

    word: int | None = None
    mode: str = "exact"
    frac: int | None = None
    rounding: str = "floor"

    def __post_init__(self) -> None:
        if self.mode not in ACCUMULATOR_MODES:
            raise ValueError(f"unknown accumulator mode {self.mode!r}; known: {', '.join(ACCUMULATOR_MODES)}")
        if self.rounding not in ROUNDING:
            raise ValueError(f"unknown rounding {self.rounding!r}; known: {', '.join(ROUNDING)}")
        if self.word is None and self.mode != "exact":
            raise ValueError(f"an accumulator with mode={self.mode!r} needs a word length")
        if self.word is not None and not 2 <= self.word <= 62:
            raise ValueError(f"an accumulator of {self.word!r} bits, but 2 to 62 are wanted")


@dataclass(frozen=True)
class SiteFormat:
    """The formats of one site: an operation, or a chain of them that is rounded once.

    Attributes:
      site: its name: the path of the weights that it uses, or scope and primitive.
      operation: the primitive; "input"; or "float: …" where it runs in floating point.
      output: format of the words that leave it; None where they leave it unrounded.
      weight: format of the parameter or constant that it multiplies by.
      bias: format of the parameter or constant that it adds.
      accumulator: the accumulator of a dot or a convolution.
      rounding: the mode of its one rounding to `output`: one of `nuqjax.fixed_point`, or `"gemmlowp"` for its two.
      overflow: the overflow mode, applied after the rounding.
      reciprocal: fraction bits of the stored reciprocal by which a mean or a division multiplies; None divides exactly
        and rounds once.
      weight_sum: proven: the largest Σ|weight word| over the terms of one output; None: the most the format allows.
      bias_peak: proven: the largest |bias word|; None: the most the format allows.
      bound: proven: the largest magnitude that the exact result can have, as a raw integer before rounding.
      route: how the sums are computed: `float32`, `int8`, `limbs`, `float64`, `int64`, `int32` (sums of shifted
        products), or `scan`.

    >>> row = SiteFormat("dense/kernel", "dot_general", output=QFormat(8, 4), bound=1000)
    >>> row.needed_bits, row.overflow
    (11, 'saturate')
    """

    site: str
    operation: str
    output: QFormat | None = None
    weight: QFormat | None = None
    bias: QFormat | None = None
    accumulator: Accumulator | None = None
    rounding: str = "half_even"
    overflow: str = "saturate"
    reciprocal: int | None = None
    weight_sum: int | None = None
    bias_peak: int | None = None
    bound: int | None = None
    route: str | None = None

    def __post_init__(self) -> None:
        if self.rounding not in SITE_ROUNDING:
            raise ValueError(f"{self.site}: unknown rounding {self.rounding!r}; known: {', '.join(SITE_ROUNDING)}")
        if self.overflow not in OVERFLOW:
            raise ValueError(f"{self.site}: unknown overflow {self.overflow!r}; known: {', '.join(OVERFLOW)}")

    @property
    def needed_bits(self) -> int | None:
        """Bits of a two's-complement register that holds every exact result: ⌈log2(bound + 1)⌉ + 1."""
        return None if self.bound is None else self.bound.bit_length() + 1


_COLUMNS = ("site", "operation", "output", "weight", "bias", "accumulator", "rounding", "overflow", "needs", "route")
_PROVEN = ("weight_sum", "bias_peak", "bound", "route")


@dataclass(frozen=True, repr=False)
class Formats:
    """All formats of an emulation: one row for each site, in the order of the program.

    Attributes:
      rows: the rows by site name.
      fallback: `"float"` where operations without an exact rule run in floating point; None where they are errors.

    >>> words = {"output": QFormat(8, 4), "weight": QFormat(8, 7), "accumulator": Accumulator(24)}
    >>> row = SiteFormat("dense/kernel", "dot_general", **words)
    >>> formats = Formats({row.site: row})
    >>> Formats.from_json(formats.to_json()) == formats
    True
    >>> formats.replace("dense", output=QFormat(16, 10))["dense/kernel"].output
    QFormat(word=16, frac=10, signed=True)
    """

    rows: Mapping[str, SiteFormat]
    fallback: str | None = None

    def __getitem__(self, site: str) -> SiteFormat:
        try:
            return self.rows[site]
        except KeyError:
            raise ValueError(
                f"the formats have no row for {site!r}; they were made for another function or tree, whose sites are "
                f"{', '.join(self.rows) or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[SiteFormat]:
        return iter(self.rows.values())

    def __len__(self) -> int:
        return len(self.rows)

    def replace(self, site: str, **changes: Any) -> "Formats":
        """Returns formats with changes at the sites whose name contains `site`, and without the proven bounds.

        Without a proof, bounds are the largest that the formats allow; `calibrate(…, formats=…)` proves them again.

        Raises:
          ValueError: no site's name contains `site`.
          TypeError: a field is unknown.
        """
        known = {f.name for f in fields(SiteFormat)} - {"site", "operation", *_PROVEN}
        if unknown := sorted(changes.keys() - known):
            raise TypeError(f"unknown fields {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        chosen = [name for name in self.rows if site in name]
        if not chosen:
            raise ValueError(f"no site's name contains {site!r}; the sites are {', '.join(self.rows)}")
        return self._each(lambda row: replace(row, **changes) if row.site in chosen else row)

    def _each(self, change: Callable[[SiteFormat], SiteFormat]) -> "Formats":
        forgotten = dict.fromkeys(_PROVEN)
        return replace(self, rows={name: replace(change(row), **forgotten) for name, row in self.rows.items()})

    def to_json(self) -> str:
        """Returns the rows as JSON text, without the fields that are None."""
        rows = [{k: v for k, v in asdict(row).items() if v is not None} for row in self]
        return json.dumps({"version": _VERSION, "fallback": self.fallback, "rows": rows}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Formats":
        """Returns the formats that `to_json` wrote.

        Raises:
          ValueError: the text is not such JSON, or is from a newer version; a wrong row is named by its site.
        """
        try:
            data = json.loads(text)
            version = data["version"]
            rows = [_row(entry) for entry in data["rows"]] if version == _VERSION else []
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not the JSON of formats: {error!r}") from error
        if version != _VERSION:
            raise ValueError(f"formats of version {version!r}, but this nuqjax reads version {_VERSION}")
        return Formats({row.site: row for row in rows}, data.get("fallback"))

    def save(self, path: str | Path) -> None:
        """Writes `to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "Formats":
        """Reads what `save` wrote."""
        return Formats.from_json(Path(path).read_text(encoding="utf-8"))

    def table(self) -> Table:
        """Returns a table of one row per site: formats, modes, the bits that its exact result needs, and its route."""
        table = Table(*_COLUMNS, title=f"{len(self)} sites" + (", floats allowed" if self.fallback else ""))
        for row in self:
            needs = "" if row.bound is None else f"{row.needed_bits} bits"
            cells = [row.site, row.operation, *map(_short, (row.output, row.weight, row.bias)), _register(row)]
            rounds = (row.rounding, row.overflow) if row.output else ("", "")
            table.add_row(*cells, *rounds, needs, row.route or "")
        return table

    def __str__(self) -> str:
        return render(self.table())

    def _repr_html_(self) -> str:
        """Returns the same table as HTML for a notebook."""
        return html_page([self.table()])

    def __repr__(self) -> str:
        return f"Formats({len(self)} sites)"


def _row(entry: Mapping[str, Any]) -> SiteFormat:
    values = dict(entry)
    for name in ("output", "weight", "bias"):
        if name in values:
            values[name] = QFormat(**values[name])
    if "accumulator" in values:
        values["accumulator"] = Accumulator(**values["accumulator"])
    return SiteFormat(**values)


def _short(fmt: QFormat | None) -> str:
    return "" if fmt is None else f"{'s' if fmt.signed else 'u'}{fmt.word}.{fmt.frac}"


def _register(row: SiteFormat) -> str:
    if row.accumulator is None:
        return ""
    frac = "" if row.accumulator.frac is None else f".{row.accumulator.frac}"
    return f"{row.accumulator.word or 'any'}{frac} {row.accumulator.mode}"
