"""Named sets of modes of a fixed-point emulation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nuqjax._src.emulate.formats import Accumulator

CHOICES = ("range", "error", "ristretto")


@dataclass(frozen=True)
class Preset:
    """A named set of modes.

    Attributes:
      choose: how fraction bits are chosen: `"range"`, `"error"` or `"ristretto"`.
      rounding: the rounding mode at each site.
      overflow: the overflow mode at each site.
      accumulator: the accumulator of each dot and convolution.
      reciprocal: fraction bits of the reciprocals that replace divisions; None divides exactly and rounds once.
      shared_bias: whether a bias has as many integer bits as the words of its weights.
    """

    choose: str = "range"
    rounding: str = "half_even"
    overflow: str = "saturate"
    accumulator: Accumulator = field(default_factory=Accumulator)
    reciprocal: int | None = None
    shared_bias: bool = False


PRESETS: Mapping[str, Preset] = {
    "nuqjax": Preset(),
    "ap_fixed": Preset(rounding="floor", overflow="wrap", accumulator=Accumulator(32, "wrap")),
    "ristretto": Preset(choose="ristretto", rounding="half_away", shared_bias=True),
    "gemmlowp": Preset(rounding="gemmlowp", accumulator=Accumulator(32)),
}
