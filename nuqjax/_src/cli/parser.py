"""The commands and their options."""

import argparse
from typing import Any, NoReturn

import nuqjax
from nuqjax._src.cli.options import axes, budget, codebook_format, function, granularity, rule, scale, tolerance
from nuqjax._src.leaf.paths import printable

_COMPRESS = """\
examples:
  nuqjax compress weights.safetensors small.safetensors --bits 4 --granularity channel
  nuqjax compress pytorch.safetensors small.safetensors --output-axis 0 --rule 'embed|norm:skip=true'
  nuqjax compress checkpoint/ small.safetensors --rule 'kernel$:bits=8,method=enq' --entropy-coding --resume
  nuqjax compress weights.npz small.safetensors --bits 3 --fn my_model:apply --batches inputs.npz

The output axis is never guessed: -1 (the default) is that of Flax kernels; PyTorch's [out, in] and OIHW need 0.
Options of a rule: bits, method, granularity, output_axis, scale, codebook_format, keep_zero, min_size, skip,
stack_axes.
"""


class _Parser(argparse.ArgumentParser):
    """What it quotes of the arguments does nothing to a terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, 2000))


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the commands and their options."""
    top = _Parser(
        prog="nuqjax", description="Codebook quantization of checkpoints: small codebooks and bit-packed indices."
    )
    top.add_argument("--version", action="version", version=f"nuqjax {nuqjax.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str, **more: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", **more)

    formats = ["safetensors", "npz", "msgpack", "orbax"]
    sources = [*formats, "npy", "h5"]

    def skip(add: Any) -> None:
        add("--skip", metavar="PATTERN", help="leave out tensors whose path matches, such as those that are not read")

    add = command(
        "compress", "compress a checkpoint, tensor by tensor", epilog=_COMPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_argument  # fmt: skip
    add("source", metavar="IN",
        help="safetensors (or its .index.json), npz, npy, Flax msgpack, .h5, an orbax directory, or a folder: a "
        "Hugging Face model, or checkpoints by step, of which the newest is taken")  # fmt: skip
    add("target", metavar="OUT", help="the safetensors file to write")
    add("--bits", type=int, default=4, choices=range(1, 9), metavar="1…8", help="index width (default: 4)")
    add("--method", default="knq", help="knq, enq, uniform, uniform_pow2, dfp, normal, quantile, pow2 (default: knq)")
    add("--granularity", type=granularity, default="tensor", help="tensor, channel, channels/N, inputs/N")
    add("--output-axis", type=axes, default=-1, metavar="AXIS", help="output axis or axes of a tensor (default: -1)")
    add("--scale", type=scale, help="none, channel or inputs/N: values are divided by a common scale first")
    add("--codebook-format", type=codebook_format, metavar="FORMAT", help="a floating dtype, or fixed/WORD[/FRAC]")
    add("--keep-zero", action="store_true", help="one level is exactly 0")
    add("--tolerance", type=tolerance, default=1e-6,
        help="prove fits to within this share of the least error; none: no proof (default: 1e-6)")  # fmt: skip
    add("--min-size", type=int, default=256, metavar="N", help="tensors with fewer values stay dense (default: 256)")
    add("--rule", type=rule, action="append", default=[], dest="rules", metavar="PATTERN:OPTION=VALUE,…",
        help="options for tensors whose path matches; may be given several times, the first match wins")  # fmt: skip
    add("--entropy-coding", action="store_true", help="entropy-code the indices (needs the entropy extra)")
    add("--max-shard-size", metavar="SIZE", help="part the file beyond this size, such as 5GB")
    add("--format", choices=sources, help="of IN, where it is not seen by itself")
    skip(add)
    add("--separator", help='what parts a tensor\'s name into keys (default: "/" where names have it, else ".")')
    add("--resume", action="store_true", help="go on where an interrupted run ended, with the same options")
    add("--fn", type=function, metavar="MODULE:FUNCTION",
        help="with --batches: what is fn(params, *inputs); levels are fitted to what its layers multiply")  # fmt: skip
    add("--batches", metavar="FILE.npz", help="inputs for --fn, in the order of their names, with all examples each")
    add("--batch-size", type=int, metavar="N", help="examples that --fn takes at a time (default: 32)")
    add("--budget", type=budget, metavar="SIZE", help="with --fn, in place of --bits: 3bpw, bytes, or kl=0.05")
    add("--rate", metavar="SIZE", help="with --fn, of a file with --entropy-coding: 2.5bpw, header counted")
    add("--quiet", action="store_true", help="no progress and no report")

    add = command("decompress", "write a compressed file as a dense checkpoint").add_argument
    add("source", metavar="IN", help="a compressed file")
    add("target", metavar="OUT", help="what to write: .safetensors, .npz, .msgpack; another name is an orbax directory")
    add("--format", choices=formats, help="of OUT, where its name does not say it")
    add("--separator", help='what joins keys to a tensor\'s name (default: as in the source of IN, else ".")')
    skip(add)
    add("--max-shard-size", metavar="SIZE", help="part a safetensors file beyond this size, such as 5GB")

    add = command("inspect", "show what a compressed file holds").add_argument
    add("file", metavar="FILE")
    add("--json", action="store_true", help="as JSON")

    add = command("plot", "draw a report and the levels of every tensor (needs the plot extra)").add_argument
    add("file", metavar="FILE")
    add("folder", metavar="DIR", help="the folder for the pictures; it is made")
    add("--source", metavar="IN", help="the dense checkpoint, whose weights are then drawn, not the decoded ones")
    add("--leaves", metavar="PATTERN", default="", help="only tensors whose path matches")

    add = command("compare", "compare two checkpoints, compressed or not, tensor by tensor").add_argument
    add("first", metavar="A", help="the reference")
    add("second", metavar="B")
    add("--json", action="store_true", help="as JSON")
    add("--separator", help="what parts a tensor's name into keys")
    skip(add)

    command("demo", "compress a small made-up network, and say what happens")
    add = command(
        "completion", "print a script that completes this command in a shell (needs the cli extra)"
    ).add_argument
    add("shell", choices=["bash", "zsh", "tcsh"])
    return top
