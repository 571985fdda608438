"""The result of compression for one leaf: sizes, distortion and certificate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LeafReport:
    """One leaf before and after compression.

    Attributes:
      path: its keys, joined by "/".
      shape: its shape.
      dtype: name of its dtype.
      weights: number of values.
      nbytes_before: bytes of memory of the dense leaf.
      nbytes_after: bytes of memory of the result: packed indices, codebooks and scales, padding included.
      reason: why it stays dense; None where it is compressed. All that follow are None for a dense leaf.
      method: how its levels were fitted; None where that is not known.
      bits: index width.
      granularity: which values share a codebook.
      codebook_format: dtype or `QFormat` of the levels.
      levels_used: levels that at least one index names, over all codebooks.
      levels_available: levels stored, over all codebooks.
      payload_bits: bits of information, without padding.
      entropy: entropy of all the leaf's indices together, in bits per index.
      signal: Σ x².
      noise: Σ (x − decoded x)².
      largest_error: max |x − decoded x|.
      certificate: proven bound of how much the fit's squared error exceeds the optimum, relative to that error:
        (sse − lower_bound) / sse; None where nothing is proven.
      nbytes_packed: bytes of memory of the packed indices.
      nbytes_coded: bytes of the entropy-coded indices in a file, their model counted; None without entropy coding.
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
        """Signal to quantization noise ratio in dB; infinite where nothing is lost, None for a dense leaf."""
        return None if self.signal is None or self.noise is None else sqnr_db(self.signal, self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Returns the leaf as plain numbers and strings."""
        return vars(self) | {"bits_per_weight": self.bits_per_weight, "sqnr_db": self.sqnr_db}


def sqnr_db(signal: float, noise: float) -> float:
    """Returns 10·log10(signal / noise) in dB; infinite where there is no noise.

    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def summary(leaves: Sequence[LeafReport]) -> dict[str, Any]:
    """Returns the totals of a tree that `Report.total` describes, without the size of its file."""
    compressed = [leaf for leaf in leaves if leaf.reason is None]
    before, after = sum(x.nbytes_before for x in leaves), sum(x.nbytes_after for x in leaves)
    weights, count = sum(x.weights for x in leaves), sum(x.weights for x in compressed)
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
    }
