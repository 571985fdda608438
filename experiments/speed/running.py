"""What running compressed weights costs beside dense ones: decoding, products with few or many inputs, transformers.

    python -m experiments.speed.running
    python -m experiments.speed.running --bits 3,4 --batch 1 --size 2048

All times are the least of several calls, in turns with what they are compared with, in one process. Decoding is told in
nanoseconds a weight beside doubling as many numbers; a product of x `[M, N]` with weights `[N, N]`, and transformers of
six blocks with a tied head, as ratios to the dense ones. Temporaries are those that XLA states.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import nuqjax
from experiments.record.settings import listed

_RUNS = 15
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "input groups of 64": {"granularity": nuqjax.InputGroups(64)},
    "scale a channel": {"scale": "channel"},
}


class Program(NamedTuple):
    """A compiled program and what it takes.

    Attributes:
      call: runs it.
      compile_seconds: CPU time of tracing and compiling.
      temporaries: bytes.
    """

    call: Callable[[], Any]
    compile_seconds: float
    temporaries: int


def program(fn: Callable[..., Any], *arrays: Any) -> Program:
    """Compiles a function of arrays."""
    start = time.process_time()
    compiled = jax.jit(fn).lower(*arrays).compile()
    seconds = time.process_time() - start
    memory: Any = compiled.memory_analysis()
    return Program(lambda: jax.block_until_ready(compiled(*arrays)), seconds, memory.temp_size_in_bytes)


def seconds(programs: Mapping[str, Program], runs: int = _RUNS) -> dict[str, float]:
    """The least time of each program, all in turns."""
    least = dict.fromkeys(programs, float("inf"))
    for _ in range(runs):
        for name, one in programs.items():
            start = time.perf_counter()
            one.call()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def leaf(size: int, bits: int, options: Mapping[str, Any]) -> Any:
    """A compressed `[size, size]` weight of a grid of levels, which is quick to fit; its last axis is its outputs."""
    weights = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    return nuqjax.compress({"w": weights}, bits=bits, method="uniform", min_size=0, **options)["w"]


def decoding(size: int, widths: Sequence[int]) -> Table:
    """Decoding in the order in which indices are stored, `[O, I]`, with one codebook."""
    table = Table("bits", "ns a weight", "over doubling", "compile, CPU s", "temporaries, MiB")
    values = jnp.zeros((size, size), jnp.float32)
    for bits in widths:
        weights = {"w": leaf(size, bits, {"axis": 0})}
        programs = {"decode": program(nuqjax.decompress, weights), "double": program(lambda x: x * 2, values)}
        found = seconds(programs)
        decode = programs["decode"]
        table.add_row(
            str(bits),
            f"{1e9 * found['decode'] / size**2:.2f}",
            f"{found['decode'] / found['double']:.2f}",
            f"{decode.compile_seconds:.2f}",
            f"{decode.temporaries / 2**20:.2f}",
        )
    return table


def products(size: int, widths: Sequence[int], batches: Sequence[int]) -> Table:
    """x @ w through `nuqjax.apply`, with each layout, as a ratio to the dense product."""
    table = Table("layout", "bits", *(f"M = {batch}" for batch in batches), "temporaries, MiB")
    dense = np.random.default_rng(1).standard_normal((size, size)).astype(np.float32)

    def model(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"]

    for name, options in LAYOUTS.items():
        for bits in widths:
            weights = {"w": leaf(size, bits, options)}
            ratios, most = [], 0
            for batch in batches:
                x = jnp.ones((batch, size), jnp.float32)
                programs = {
                    "compressed": program(nuqjax.apply(model), weights, x),
                    "dense": program(model, {"w": jnp.asarray(dense)}, x),
                }
                found = seconds(programs, 5)
                ratios.append(f"{found['compressed'] / found['dense']:.2f}")
                most = max(most, programs["compressed"].temporaries)
            table.add_row(name, str(bits), *ratios, f"{most / 2**20:.1f}")
    return table


class Transformer(nn.Module):
    """Blocks of attention and a gated product over one token, and a head tied to the embedding."""

    width: int = 512
    blocks: int = 6
    tokens: int = 32_768

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(self.tokens, self.width)
        x = embed(ids)
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(num_heads=8)(nn.LayerNorm()(x))
            wide = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(wide))
        return embed.attend(nn.LayerNorm()(x))


def transformers(model: Transformer, widths: Sequence[int], batches: Sequence[int]) -> Table:
    """One token of each of `batches` sequences: times, and CPU time of tracing and compiling, over the dense ones."""
    table = Table("layout", "bits", "batch", "time", "trace + compile", "temporaries, MiB", "dense, MiB")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda a: generator.normal(0, 0.02, a.shape).astype(np.float32), shapes)
    on_device = jax.tree.map(jnp.asarray, params)
    for name in ("tensor", "channel"):
        for bits in widths:
            small = nuqjax.compress(params, bits=bits, method="uniform", **LAYOUTS[name])
            for batch in batches:
                ids = jnp.zeros((batch, 1), jnp.int32)
                programs = {
                    "compressed": program(nuqjax.apply(model.apply), small, ids),
                    "dense": program(model.apply, on_device, ids),
                }
                found = seconds(programs, 5)
                compressed, dense = programs["compressed"], programs["dense"]
                table.add_row(
                    name, str(bits), str(batch), f"{found['compressed'] / found['dense']:.2f}",
                    f"{compressed.compile_seconds / dense.compile_seconds:.2f}",
                    f"{compressed.temporaries / 2**20:.1f}", f"{dense.temporaries / 2**20:.1f}",
                )  # fmt: skip
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=listed, default=list("12345678"), help="index widths (default: all)")
    parser.add_argument(
        "--batch", type=listed, default=["1", "16", "256"], help="numbers of inputs (default: 1,16,256)"
    )
    parser.add_argument("--size", type=int, default=4096, help="N of the weights [N, N] (default: 4096)")
    parser.add_argument("--width", type=int, default=512, help="width of the transformer (default: 512)")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of the transformer (default: 6)")
    options = parser.parse_args(arguments)
    widths = [int(width) for width in options.bits]
    console = Console(width=120)
    console.print(f"jax {jax.__version__} on {jax.default_backend()}, weights [{options.size}, {options.size}]")
    console.print(decoding(options.size, widths))
    console.print(products(options.size, widths, [int(batch) for batch in options.batch]))
    console.print(transformers(Transformer(options.width, options.blocks), widths, [1, 32]))


if __name__ == "__main__":
    main()
