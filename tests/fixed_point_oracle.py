"""Fixed-point networks in NumPy integers: what the emulation is compared with, word by word.

It is written from the definitions alone and imports nothing of the package. Formats are read from their JSON text;
weights are given as indices and levels. Integers are int64 where they fit 62 bits and Python's own where they do not,
so nothing here can overflow.

An `Oracle` computes an operation at a time. A value holds integers and a scale: value = raw · 2^−frac / divisor. An
operation's result is exact until `Oracle.site` rounds it, which it does where the formats give the site an output.
"""

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np


def integers(x: Any, bits: int = 0) -> np.ndarray:
    """Integers as int64 where they and `bits` more fit 62 bits, else as Python's."""
    x = np.asarray(x)
    if x.dtype != object:
        x = x.astype(np.int64)
    peak = max((abs(int(x.min())), abs(int(x.max())))) if x.size else 0
    return x.astype(np.int64 if peak.bit_length() + bits <= 62 else object)


def shifted(x: Any, up: int) -> np.ndarray:
    """Integers times 2^up, up ≥ 0."""
    return integers(x, up) * (1 << up)


def quotient(x: Any, divisor: Any, rounding: str) -> np.ndarray:
    """Integers over positive whole numbers, the ideal quotient rounded once."""
    divisor = integers(divisor)
    extra = int(divisor.max(initial=1)).bit_length() + 1 if divisor.size else 1
    x = integers(x, extra)
    divisor = divisor.astype(x.dtype)
    below = x // divisor
    rest = x - below * divisor  # 0 ≤ rest < divisor, as // goes down
    twice = 2 * rest
    up = {
        "floor": lambda: rest < 0,
        "toward_zero": lambda: (x < 0) & (rest > 0),
        "half_up": lambda: twice >= divisor,
        "half_down": lambda: twice > divisor,
        "half_away": lambda: (twice > divisor) | ((twice == divisor) & (x > 0)),
        "half_toward_zero": lambda: (twice > divisor) | ((twice == divisor) & (x < 0)),
        "half_even": lambda: (twice > divisor) | ((twice == divisor) & (below % 2 == 1)),
    }[rounding]()
    return below + up.astype(bool).astype(np.int64)


def dropped(x: Any, bits: int, rounding: str) -> np.ndarray:
    """Integers over 2^bits, rounded as a site does: by a mode, or twice as gemmlowp; exact where bits ≤ 0."""
    if bits <= 0:
        return shifted(x, -bits)
    if rounding == "gemmlowp":
        return quotient(quotient(x, 2, "half_up"), 1 << (bits - 1), "half_away")
    return quotient(x, 1 << bits, rounding)


@dataclass(frozen=True)
class Format:
    word: int
    frac: int
    signed: bool = True

    @property
    def least(self) -> int:
        return -(2 ** (self.word - 1)) if self.signed else 0

    @property
    def largest(self) -> int:
        return 2 ** (self.word - self.signed) - 1


def in_range(x: Any, fmt: Format, overflow: str) -> np.ndarray:
    """Integers brought into the format's range."""
    x = integers(x)
    if overflow == "wrap":
        return integers((x - fmt.least) % 2**fmt.word + fmt.least)
    if overflow == "saturate_zero":
        return integers(np.where((x < fmt.least) | (x > fmt.largest), 0, x))
    least = -fmt.largest if overflow == "saturate_symmetric" and fmt.signed else fmt.least
    return integers(np.minimum(np.maximum(x, least), fmt.largest))


def encoded(x: Any, fmt: Format, rounding: str = "half_even", overflow: str = "saturate") -> tuple[np.ndarray, int]:
    """Raw integers of real values, and how many were out of range."""
    scaled = np.ldexp(np.asarray(x, np.float64), fmt.frac)
    whole = np.floor(scaled)
    rest = scaled - whole
    # Quarters tell what rounding asks: on a word, below the middle, in it, above it.
    quarter = np.where(rest == 0, 0, np.where(rest < 0.5, 1, np.where(rest == 0.5, 2, 3)))
    big = np.abs(whole).max(initial=0) >= 2.0**58
    whole = np.vectorize(int, otypes=[object])(whole) if big else whole.astype(np.int64)
    words = quotient(4 * whole + quarter, 4, "half_away" if rounding == "gemmlowp" else rounding)
    outside = (words < fmt.least) | (words > fmt.largest)
    return in_range(words, fmt, overflow), int(outside.sum())


@dataclass(frozen=True)
class Value:
    raw: np.ndarray
    frac: int
    divisor: Any = 1

    def shaped(self, raw: np.ndarray) -> "Value":
        """Other integers of the same scale."""
        return Value(raw, self.frac, self.divisor)

    def at(self, frac: int) -> np.ndarray:
        """The integers at `frac` fraction bits, no fewer than now."""
        assert np.all(np.asarray(self.divisor) == 1)
        return shifted(self.raw, frac - self.frac)

    @property
    def real(self) -> np.ndarray:
        """The values, float64."""
        return np.asarray(self.raw, np.float64) * 2.0**-self.frac / np.asarray(self.divisor, np.float64)


class Oracle:
    """Runs operations on integers by the formats of a JSON text.

    Attributes:
      rows: by site, what the JSON says.
      words: by site, the words that left it.
      accumulator_overflows: by site, the additions that saturated, or the sums that wrapped.
      output_overflows: by site, the words out of range (where unsigned words rectify, those above it).
      exact_peaks: by site, the largest magnitude of the exact integers before rounding to the output.
      accumulator_peaks: by site, the largest magnitude of the sums before any wrap (after it, where they saturate).
    """

    def __init__(self, text: str):
        self.rows: dict[str, dict[str, Any]] = {row["site"]: row for row in json.loads(text)["rows"]}
        self.words: dict[str, np.ndarray] = {}
        self.accumulator_overflows: dict[str, int] = {}
        self.output_overflows: dict[str, int] = {}
        self.exact_peaks: dict[str, int] = {}
        self.accumulator_peaks: dict[str, int] = {}

    # -- formats ------------------------------------------------------------------------------------------------------

    def format(self, site: str, name: str) -> Format:
        return Format(**self.rows[site][name])

    def input(self, x: np.ndarray, site: str = "input") -> Value:
        """The words of real values."""
        row, fmt = self.rows[site], self.format(site, "output")
        words, over = encoded(x, fmt, row["rounding"], row["overflow"])
        self.words[site], self.output_overflows[site] = words, over
        return Value(words, fmt.frac)

    def constant(self, site: str, name: str, x: Any) -> Value:
        """Real values, such as levels or a slope, at the format of a site's `weight` or `bias`."""
        fmt = self.format(site, name)
        return Value(encoded(x, fmt)[0], fmt.frac)

    def weights(self, site: str, indices: np.ndarray, levels: np.ndarray) -> Value:
        """A codebook's levels, rounded once, looked up."""
        words = self.constant(site, "weight", levels)
        return words.shaped(words.raw[indices])

    def site(self, site: str, exact: Value) -> Value:
        """The exact value rounded to the site's output; as it is where the site has none."""
        self.exact_peaks[site] = int(abs(exact.raw).max(initial=0))
        row = self.rows.get(site, {})
        if "output" not in row:
            return exact
        fmt, rounding = self.format(site, "output"), row["rounding"]
        drop = exact.frac - fmt.frac
        if np.all(np.asarray(exact.divisor) == 1):
            whole = dropped(exact.raw, drop, rounding)
        else:
            mode = "half_away" if rounding == "gemmlowp" else rounding
            divisor = shifted(exact.divisor, max(drop, 0))
            whole = quotient(shifted(exact.raw, max(-drop, 0)), divisor, mode)
        rectifies = not fmt.signed and row["overflow"] != "wrap"  # what is below zero then is meant to go
        below = (whole < fmt.least) & (not rectifies)
        self.output_overflows[site] = int((below | (whole > fmt.largest)).sum())
        self.words[site] = in_range(whole, fmt, row["overflow"])
        return Value(self.words[site], fmt.frac)

    # -- sums of products ---------------------------------------------------------------------------------------------

    def accumulated(self, site: str, taps: Any, frac: int, shape: tuple[int, ...], bias: Value | None) -> Value:
        """Sums of products in the site's accumulator, from its bias.

        Args:
          site: whose accumulator.
          taps: yields pairs `[*S, G, C]` and `[G, C, O]`, whose products over C are summed, in this order.
          frac: fraction bits of the products.
          shape: of the result; it has as many values as `[*S, G, O]`.
          bias: broadcast to `shape`; None for none.
        """
        register = self.rows[site]["accumulator"]
        mode, word = register["mode"], register["word"]
        kept = frac if register["frac"] is None else register["frac"]
        total = integers(np.zeros(shape, np.int64))
        if bias is not None:
            total = np.broadcast_to(dropped(bias.raw, bias.frac - kept, "half_even"), shape)
        fmt = Format(word or 64, kept)
        count = 0
        if mode == "saturate":
            count = int(((total < fmt.least) | (total > fmt.largest)).sum())
            total = in_range(total, fmt, mode)
        for x, w in taps:
            bits = (x.shape[-1] * int(abs(w).max(initial=1))).bit_length()
            x, w = integers(x, bits), integers(w)
            if mode != "saturate" and kept == frac:  # in any order, and so in NumPy's
                terms = [np.einsum("...gc,gco->...go", x, w, optimize=False)]
            else:
                terms = (
                    dropped(x[..., c, None] * w[:, c], frac - kept, register["rounding"]) for c in range(x.shape[-1])
                )
            for term in terms:
                total = integers(total, 1) + integers(term, 1).reshape(shape)
                if mode == "saturate":
                    count += int(((total < fmt.least) | (total > fmt.largest)).sum())
                    total = in_range(total, fmt, mode)
        total = integers(total)
        self.accumulator_peaks[site] = int(abs(total).max(initial=0))
        if mode == "wrap":
            count = int(((total < fmt.least) | (total > fmt.largest)).sum())
            total = in_range(total, fmt, mode)
        if mode == "exact":
            assert word is None or ((total >= fmt.least) & (total <= fmt.largest)).all(), f"{site}: sums do not fit"
        else:
            self.accumulator_overflows[site] = count
        return Value(total, kept)

    def dot(self, site: str, x: Value, y: Value, bias: Value | None = None) -> Value:
        """`[…, I]` by `[I, O]` in the order of I."""
        shape = (*x.raw.shape[:-1], y.raw.shape[-1])
        taps = [(x.raw[..., None, :], y.raw[None])]
        return self.site(site, self.accumulated(site, taps, x.frac + y.frac, shape, bias))

    def batched_dot(self, site: str, x: Value, y: Value) -> Value:
        """`[B, N, I]` by `[B, M, I]` to `[B, N, M]`, in the order of I."""
        shape = (x.raw.shape[1], x.raw.shape[0], y.raw.shape[1])
        taps = [(x.raw.swapaxes(0, 1), y.raw.swapaxes(1, 2))]
        sums = self.accumulated(site, taps, x.frac + y.frac, shape, None)
        return self.site(site, sums.shaped(sums.raw.swapaxes(0, 1)))

    def conv(
        self,
        site: str,
        x: Value,
        kernel: Value,
        bias: Value | None = None,
        strides: tuple[int, int] = (1, 1),
        padding: Any = ((0, 0), (0, 0)),
        lhs_dilation: tuple[int, int] = (1, 1),
        rhs_dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> Value:
        """NHWC images by an HWIO kernel, in the order rows, columns, input channels; padding in pixels."""
        w = kernel.raw
        image = padded(spread(x.raw, lhs_dilation), padding, 0)
        sizes = [(image.shape[1 + d] - (w.shape[d] - 1) * rhs_dilation[d] - 1) // strides[d] + 1 for d in (0, 1)]
        channels, outputs = w.shape[2:]

        def taps():
            for r, c in itertools.product(range(w.shape[0]), range(w.shape[1])):
                patch = window_at(image, (r * rhs_dilation[0], c * rhs_dilation[1]), strides, sizes)
                yield (
                    patch.reshape(*patch.shape[:3], groups, channels),
                    w[r, c].reshape(channels, groups, outputs // groups).swapaxes(0, 1),
                )

        shape = (image.shape[0], *sizes, outputs)
        return self.site(site, self.accumulated(site, taps(), x.frac + kernel.frac, shape, bias))

    # -- the rest -----------------------------------------------------------------------------------------------------

    def add(self, site: str, *parts: Value) -> Value:
        frac = max(part.frac for part in parts)
        return self.site(site, Value(integers(sum(integers(p.at(frac), 3) for p in parts)), frac))

    def joined(self, site: str, parts: list[Value], combine: Any) -> Value:
        """What is combined of parts at their finest scale: concatenation, selection, maximum."""
        frac = max(part.frac for part in parts)
        return self.site(site, Value(integers(combine(*(p.at(frac) for p in parts))), frac))

    def times(self, site: str, x: Value, factor: Value) -> Value:
        bits = int(abs(factor.raw).max(initial=1)).bit_length()
        return self.site(site, Value(integers(integers(x.raw, bits) * factor.raw), x.frac + factor.frac))

    def divided(self, site: str, x: Value, divisor: Any) -> Value:
        """By whole numbers: ideally, or by the site's reciprocal."""
        bits = self.rows.get(site, {}).get("reciprocal")
        if bits is None:
            return self.site(site, Value(x.raw, x.frac, np.asarray(divisor, np.int64)))
        recip = quotient(np.asarray(1 << bits), divisor, "half_up")
        return self.site(site, Value(integers(x.raw, bits + 1) * recip, x.frac + bits))

    def bounded(self, x: Value, low: float = -math.inf, high: float = math.inf) -> Value:
        """Between real bounds, which are rounded to the words' scale."""
        raw = x.raw
        if low > -math.inf:
            raw = np.maximum(raw, int(np.rint(np.ldexp(np.float64(np.float32(low)), x.frac))))
        if high < math.inf:
            raw = np.minimum(raw, int(np.rint(np.ldexp(np.float64(np.float32(high)), x.frac))))
        return x.shaped(raw)

    def pooled(self, x: Value, window: tuple[int, int], strides: tuple[int, int], padding: Any, reduce: str) -> Value:
        """Windows of NHWC images: "max" ("min"), whose padding never wins, or "sum", whose padding is zero."""
        fill = {"sum": 0, "max": x.raw.min(initial=0), "min": x.raw.max(initial=0)}[reduce]
        image = padded(x.raw, padding, fill)
        sizes = [(image.shape[1 + d] - window[d]) // strides[d] + 1 for d in (0, 1)]
        parts = [window_at(image, at, strides, sizes) for at in itertools.product(range(window[0]), range(window[1]))]
        return x.shaped(integers(getattr(np.stack([integers(p, 8) for p in parts]), reduce)(axis=0)))

    def summed(self, x: Value, axes: tuple[int, ...]) -> Value:
        return x.shaped(integers(integers(x.raw, 20).sum(axis=axes)))


def window_at(image: np.ndarray, at: tuple[int, int], strides: tuple[int, int], sizes: Any) -> np.ndarray:
    """The pixels that a window's position `at` meets, `[N, *sizes, C]`."""
    rows, columns = (slice(at[d], at[d] + (sizes[d] - 1) * strides[d] + 1, strides[d]) for d in (0, 1))
    return image[:, rows, columns]


def spread(x: np.ndarray, dilation: tuple[int, int]) -> np.ndarray:
    """NHWC images with dilation − 1 zeros between pixels."""
    rows, columns = ((n - 1) * d + 1 for n, d in zip(x.shape[1:3], dilation, strict=True))
    wide = np.zeros((x.shape[0], rows, columns, x.shape[3]), x.dtype)
    wide[:, :: dilation[0], :: dilation[1]] = x
    return wide


def padded(x: np.ndarray, padding: Any, fill: Any) -> np.ndarray:
    """NHWC images with rows and columns added, or cut where negative."""
    (top, bottom), (left, right) = padding
    x = x[:, max(-top, 0) : x.shape[1] - max(-bottom, 0), max(-left, 0) : x.shape[2] - max(-right, 0)]
    pads = [(0, 0), (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0)), (0, 0)]
    return np.pad(x, pads, constant_values=fill)


def same_padding(sizes: tuple[int, ...], window: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """TensorFlow's "SAME": ⌈size / stride⌉ outputs, the odd pixel at the end."""
    totals = [max((-(-n // s) - 1) * s + w - n, 0) for n, w, s in zip(sizes, window, strides, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]
