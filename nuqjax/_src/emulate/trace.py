"""What an emulation computed, site by site."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nuqjax._src.emulate.formats import SiteFormat
from nuqjax._src.emulate.program import Node
from nuqjax._src.leaf.qformat import QFormat


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("words", "accumulator_overflows", "output_overflows"),
    meta_fields=("formats",),
)
@dataclass(frozen=True)
class Trace:
    """What an emulation computed, site by site.

    Attributes:
      words: the raw int32 words that leave each traced site.
      accumulator_overflows: how many additions of each dot or convolution saturated, or how many of its sums wrapped.
      output_overflows: how many words of each site were outside the range of its output format. Unsigned words that
        saturate at zero act as a rectifier, so values below zero are not counted.
      formats: the format of each site's words.

    >>> import jax.numpy as jnp, nuqjax
    >>> predict = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.linspace(-1, 1, 32).reshape(16, 2)}, jnp.ones((1, 16))
    >>> formats = nuqjax.calibrate(predict, params, x)
    >>> _, trace = nuqjax.emulate(predict, formats, trace=["w"])(params, x)
    >>> list(trace.words), dict(trace.formats)["w"].word
    (['w'], 8)
    """

    words: Mapping[str, jax.Array]
    accumulator_overflows: Mapping[str, jax.Array]
    output_overflows: Mapping[str, jax.Array]
    formats: tuple[tuple[str, QFormat], ...]

    def save(self, path: str | Path) -> None:
        """Writes the words: one array per site to an `.npz` file; else hexadecimal text files to a folder of that name.

        A text file begins with a comment that gives the site, its format and its shape. Each further line is one word,
        in row-major order, in two's complement with as many digits as the format needs, as Verilog's `$readmemh` reads.
        """
        path = Path(path)
        if path.suffix == ".npz":
            with path.open("wb") as file:
                arrays: dict[str, Any] = {k: np.asarray(words) for k, words in self.words.items()}
                np.savez_compressed(file, **arrays)
            return
        path.mkdir(parents=True, exist_ok=True)
        formats = dict(self.formats)
        for number, (site, words) in enumerate(self.words.items()):
            fmt, array = formats[site], np.asarray(words)
            kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in site)
            lines = [f"// {site}, word={fmt.word} frac={fmt.frac} signed={fmt.signed}, shape {list(array.shape)}"]
            digits, mask = -(-fmt.word // 4), (1 << fmt.word) - 1
            lines += [f"{int(word) & mask:0{digits}x}" for word in array.reshape(-1)]
            (path / f"{number:03d}_{kept}.hex").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Recorder:
    """Collects the words of the requested sites, and every site's overflows."""

    def __init__(self, wanted: Sequence[str] | None) -> None:
        self.wanted = wanted
        self.words: dict[str, jax.Array] = {}
        self.formats: list[tuple[str, QFormat]] = []
        self.accumulators: dict[str, jax.Array] = {}
        self.outputs: dict[str, jax.Array] = {}

    def words_of(self, node: Node, row: SiteFormat, words: jax.Array) -> None:
        if self.wanted is not None and any(part in node.name for part in self.wanted):
            self.words[node.name] = words.astype(jnp.int32)
            self.formats.append((node.name, row.output))  # pyright: ignore[reportArgumentType]

    def count(self, counts: dict[str, jax.Array], node: Node, over: Callable[[], jax.Array]) -> None:
        if self.wanted is not None:
            counts[node.name] = over()

    def trace(self) -> Trace:
        return Trace(self.words, self.accumulators, self.outputs, tuple(self.formats))
