"""The command line: the public functions, applied to files.

Exit status: 0: done; 1: refused or failed, with one line that says why; 2: the command is not understood; 130:
interrupted.
"""

import argparse
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

import nuqjax
from nuqjax._src.leaf.paths import printable
from nuqjax._src.report.render import add_row, plain_console
from nuqjax._src.report.trees import difference, ratio_db, same_object, total

_GROUPS = {"channels": nuqjax.ChannelGroups, "inputs": nuqjax.InputGroups}
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


def granularity(text: str) -> Any:
    """Reads `tensor`, `channel`, `channels/N` or `inputs/N`.

    >>> granularity("channels/8")
    ChannelGroups(size=8)
    """
    if text in ("tensor", "channel"):
        return text
    kind, _, size = text.partition("/")
    if kind not in _GROUPS or not size.isdigit() or int(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, but tensor, channel, channels/N or inputs/N is wanted")
    return _GROUPS[kind](int(size))


def scale(text: str) -> Any:
    """Reads `none`, `channel` or `inputs/N`."""
    if text == "none":
        return None
    if text != "channel" and not text.startswith("inputs/"):
        raise argparse.ArgumentTypeError(f"{text!r}, but none, channel or inputs/N is wanted")
    return granularity(text)


def codebook_format(text: str) -> Any:
    """Reads a floating dtype's name, fixed point as `fixed/WORD` or `fixed/WORD/FRAC`, or `none` for the leaf's dtype.

    >>> codebook_format("fixed/8/6")
    QFormat(word=8, frac=6, signed=True)
    """
    if text == "none":
        return None
    kind, *numbers = text.split("/")
    try:
        if kind == "fixed" and len(numbers) in (1, 2):
            word, *frac = map(int, numbers)
            return nuqjax.QFormat(word, frac[0]) if frac else nuqjax.AutoQFormat(word)
        if not numbers and jnp.issubdtype(jnp.dtype(kind), jnp.floating):
            return jnp.dtype(kind)
    except (ValueError, TypeError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r}, but a floating dtype, fixed/WORD, fixed/WORD/FRAC or none is wanted")


def tolerance(text: str) -> float | None:
    """Reads a number or `none`."""
    try:
        return None if text == "none" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, but a number or none is wanted") from error


def function(text: str) -> Any:
    """Imports the function `MODULE:FUNCTION`; the current folder is searched for the module, too.

    >>> function("math:sqrt")(4.0)
    2.0
    """
    module, _, name = text.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}, but MODULE:FUNCTION is wanted: {error}") from error
    return found


def budget(text: str) -> int | str:
    """Reads a number of bytes; other text is left to `nuqjax.compress`.

    >>> budget("2000000"), budget("3bpw")
    (2000000, '3bpw')
    """
    return int(text) if text.isdecimal() else text


def axes(text: str) -> Any:
    """Reads an axis, or several separated by commas.

    >>> axes("-2,-1")
    (-2, -1)
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, but a whole number is wanted, or several with commas") from error
    return found[0] if len(found) == 1 else found


def truth(text: str) -> bool:
    """Reads `true` or `false`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, but true or false is wanted")
    return text.lower() == "true"


_RULE_OPTIONS: dict[str, tuple[str, Any]] = {
    "bits": ("bits", int), "method": ("method", str), "granularity": ("granularity", granularity),
    "output_axis": ("axis", axes), "scale": ("scale", scale), "codebook_format": ("codebook_format", codebook_format),
    "keep_zero": ("keep_zero", truth), "tolerance": ("tolerance", tolerance), "min_size": ("min_size", int),
    "skip": ("skip", truth), "stack_axes": ("stack_axes", int),
}  # fmt: skip


def rule(text: str) -> nuqjax.Rule:
    """Reads `PATTERN:option=value,…`; the pattern may contain colons.

    >>> rule("(?:conv|dense)/kernel:bits=8,granularity=channels/4")
    Rule('(?:conv|dense)/kernel', bits=8, granularity=ChannelGroups(size=4))
    """
    pattern, colon, assignments = text.rpartition(":")
    options: dict[str, Any] = {}
    # An axis may be a list with commas, so a part without "=" belongs to the option before it.
    for part in re.split(r",(?=[a-z_]+=)", assignments) if colon else [text]:
        name, equals, value = part.partition("=")
        if not colon or not equals or name not in _RULE_OPTIONS:
            raise argparse.ArgumentTypeError(
                f"{text!r}: {part!r}, but PATTERN:option=value,… is wanted; options: {', '.join(_RULE_OPTIONS)}"
            )
        key, read = _RULE_OPTIONS[name]
        try:
            options[key] = read(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {name}={value!r}: {error}") from error
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {name}: {error}") from error
    try:
        return nuqjax.Rule(pattern, **options)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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
    add("--resume", action="store_true", help="go on where an interrupted run ended")
    add("--fn", type=function, metavar="MODULE:FUNCTION",
        help="with --batches: what is fn(params, *inputs); levels are fitted to what its layers multiply")  # fmt: skip
    add("--batches", metavar="FILE.npz", help="inputs for --fn, in the order of their names, with all examples each")
    add("--batch-size", type=int, metavar="N", help="examples that --fn takes at a time (default: 32)")
    add("--budget", type=budget, metavar="SIZE", help="with --fn, in place of --bits: 3bpw, bytes, or kl=0.05")
    add("--rate", metavar="SIZE", help="with --fn, of a file with --entropy-coding: 2.5bpw")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    closed = _open_streams()
    args = vars(parser().parse_args(argv))
    command = _COMMANDS[args.pop("command")]
    try:
        with _stoppable(), _plain_warnings():
            command(**args)
        sys.stdout.flush()
        if closed is not None and closed.getvalue():
            raise OSError("standard output is closed: nothing can be shown")
    except KeyboardInterrupt as interrupt:
        print("; ".join(["nuqjax: interrupted", *_notes(interrupt)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # as when it is piped into `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print("; ".join([f"nuqjax: error: {printable(_one_line(error), 4000)}", *_notes(error)]), file=sys.stderr)
        return 1
    return 0


def _open_streams() -> io.StringIO | None:
    """Replaces standard streams that are closed (`>&-`), so that no file is opened under their numbers.

    Returns a buffer that collects what a closed standard output would show; None if it is open.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    closed = io.StringIO() if sys.stdout is None else None
    sys.stdout, sys.stderr = sys.stdout or closed, sys.stderr or io.StringIO()
    return closed


@contextmanager
def _stoppable() -> Iterator[None]:
    """Makes SIGTERM end a command as Ctrl-C does, and makes sure that neither is lost.

    Python drops an exception that a signal handler raises inside a callback of the garbage collector, and JAX has such
    a callback. A timer then sends a signal again, a moment later.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def again(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            hook(dropped)

    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGALRM] if hasattr(signal, "setitimer") else [])]
    before, hook = {number: signal.signal(number, stop) for number in numbers}, sys.unraisablehook
    if hasattr(signal, "setitimer"):  # not on Windows
        sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints each warning of the library as one line, without the place in the code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="nuqjax")
        warnings.showwarning = lambda message, *_: print(f"nuqjax: warning: {message}", file=sys.stderr)
        yield


def _notes(error: BaseException) -> list[str]:
    """Returns the notes of an error, which say what the user can do about it."""
    return getattr(error, "__notes__", [])


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _say_skipped(checkpoint: Any) -> None:
    if checkpoint.skipped:
        names = ", ".join(printable(path) for path in checkpoint.skipped[:10])
        more = f" and {len(checkpoint.skipped) - 10} more" if len(checkpoint.skipped) > 10 else ""
        print(f"nuqjax: left out of {checkpoint.path}: {names}{more}", file=sys.stderr)


_DATA = ("fn", "batches", "batch_size", "budget", "rate")


def _compress(source: str, target: str, quiet: bool, output_axis: Any, **options: Any) -> None:
    data = {name: options.pop(name) for name in _DATA}
    if any(value is not None for value in data.values()):
        return _compress_with_data(source, target, quiet, options | {"axis": output_axis}, data)
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(),
        TransferSpeedColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=plain_console(stderr=True), disable=quiet,
    )  # fmt: skip
    checkpoint = nuqjax.open_checkpoint(source, options["format"], options["separator"], options["skip"])
    _say_skipped(checkpoint)
    total = sum(leaf.nbytes for leaf in checkpoint.leaves)
    with bar:
        task = bar.add_task("compress", total=total)
        done = 0

        def progress(plan: Any, nbytes: int) -> None:
            nonlocal done
            done += 1
            text = f"{done}/{len(checkpoint.leaves)} {printable(plan.path[-40:])}"
            bar.update(task, advance=nbytes, description=text)

        report = nuqjax.compress_checkpoint(source, target, axis=output_axis, progress=progress, **options)
    if not quiet:
        print(report)


def _compress_with_data(source: str, target: str, quiet: bool, options: dict[str, Any], data: dict[str, Any]) -> None:
    """Compresses the whole tree at once, since only the whole function shows how its leaves are used."""
    if data["fn"] is None or data["batches"] is None:
        raise ValueError("--fn and --batches are given together: --fn module:function --batches inputs.npz")
    if options.pop("resume"):
        raise ValueError("--resume is for compression tensor by tensor, without --fn")
    size = data["batch_size"] or 32
    with np.load(data["batches"], allow_pickle=False) as file:
        arrays = [file[name] for name in file.files] if hasattr(file, "files") else []
    if not arrays or len({len(x) if x.ndim else 0 for x in arrays}) != 1:
        raise ValueError(
            f"{data['batches']}: arrays with the same number of examples are wanted, got {[x.shape for x in arrays]}"
        )
    if size < 1:
        raise ValueError(f"--batch-size {size}, but 1 or more is wanted")
    batches = [tuple(x[n : n + size] for x in arrays) for n in range(0, len(arrays[0]), size)]
    checkpoint = nuqjax.open_checkpoint(source, *(options.pop(name) for name in ("format", "separator", "skip")))
    _say_skipped(checkpoint)
    saving = {name: options.pop(name) for name in ("entropy_coding", "max_shard_size")}
    given = {name: data[name] for name in ("fn", "budget", "rate")} | {"batches": batches, "progress": not quiet}
    cparams, report = nuqjax.compress(checkpoint.read(), return_report=True, **given, **options)
    nuqjax.save(target, cparams, report=report, **saving)
    if not quiet:
        print(report)


def _decompress(
    source: str, target: str, format: str | None, separator: str | None, max_shard_size: str | None, skip: str | None
) -> None:
    suffixes = {".safetensors": "safetensors", ".npz": "npz", ".msgpack": "msgpack"}
    format = format or suffixes.get(os.path.splitext(target)[1], "orbax")
    checkpoint = nuqjax.open_checkpoint(source, skip=skip)
    _say_skipped(checkpoint)
    if checkpoint.format != "nuqjax":
        raise ValueError(f"{source}: not a compressed file")
    nuqjax.write_checkpoint(target, checkpoint, format, separator=separator, max_shard_size=max_shard_size)


def _inspect(file: str, json: bool) -> None:
    report = nuqjax.inspect(file)
    if json:
        print(_json(report.to_dict()))
    else:
        print(report)


def _json(value: Any) -> str:
    """Returns a value as JSON, with null for NaN and infinity."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(x) for key, x in item.items()}
        if isinstance(item, list | tuple):
            return [plain(x) for x in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=1, allow_nan=False)


def _plot(file: str, folder: str, source: str | None, leaves: str) -> None:
    try:
        from nuqjax._src.report.plot import plot_levels
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'nuqjax[plot]'") from error
    report = nuqjax.inspect(file)
    dense = {leaf.path: leaf for leaf in nuqjax.open_checkpoint(source or file).leaves}
    wanted = [leaf.path for leaf in report.compressed if re.search(leaves, leaf.path)]
    missing = [path for path in wanted if path not in dense]
    if missing:
        raise ValueError(f"{source}: no tensor {missing[0]!r}, which {file} has")
    os.makedirs(folder, exist_ok=True)
    report.plot().savefig(os.path.join(folder, "report.png"))
    for path in wanted:
        tree = nuqjax.load(file, leaves=lambda name, path=path: name == path, numpy=True)
        leaf = next(iter(_leaves(tree)))
        weights = np.asarray(dense[path].read())
        if weights.size:
            figure = plot_levels(weights, leaf, title=f"{printable(path)}: {leaf.bits} bits, {leaf.granularity}")
            figure.savefig(os.path.join(folder, f"levels-{re.sub(r'[^A-Za-z0-9_.-]+', '-', path)}.png"))
    print(f"{1 + len(wanted)} pictures in {folder}")


def _leaves(tree: Any) -> list[nuqjax.CodebookArray]:
    import jax

    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nuqjax.CodebookArray))


def _compare(first: str, second: str, json: bool, separator: str | None, skip: str | None) -> None:
    a, b = (nuqjax.open_checkpoint(path, separator=separator, skip=skip) for path in (first, second))
    for checkpoint in (a, b):
        _say_skipped(checkpoint)
    others = {leaf.path: leaf for leaf in b.leaves}
    unmatched = sorted({leaf.path for leaf in a.leaves} ^ set(others))
    if unmatched:
        raise ValueError(f"{unmatched[0]!r} is in only one of {first} and {second}")
    rows, sums = [], []
    for leaf in a.leaves:
        other = others[leaf.path]
        row: dict[str, Any] = {"path": leaf.path}
        rows.append(row)
        problem = leaf.problem or other.problem
        if problem is not None:
            row |= {"equal": None, "equal_values": None, "not_read": problem}
            continue
        if leaf.shape != other.shape:
            raise ValueError(f"{leaf.path}: shape {leaf.shape} in {first}, but {other.shape} in {second}")
        if leaf.shape is None:
            row["equal"], row["equal_values"] = same_object(leaf.read(), other.read())
            continue
        found = difference(leaf.read(), other.read())
        if found.signal is not None and found.noise is not None:
            sums.append((found.signal, found.noise))
        row |= {
            "shape": list(leaf.shape), "dtypes": [str(leaf.dtype), str(other.dtype)], "equal": found.equal,
            "equal_values": found.equal_values, "nan": list(found.nan), "sqnr_db": found.sqnr_db,
            "largest_error": found.largest_error,
        }  # fmt: skip
    whole = {
        "sqnr_db": ratio_db(*(total(part) for part in zip(*sums, strict=True)))
        if sums
        else None,  # of floating tensors
        "equal": all(row["equal"] is not False for row in rows),
        "equal_values": all(row["equal_values"] is not False for row in rows),
        "not_read": sum("not_read" in row for row in rows),
        "nan": [sum(row["nan"][side] for row in rows if "nan" in row) for side in (0, 1)],
    }
    if json:
        print(_json({"leaves": rows, "total": whole}))
        return
    table = Table("tensor", "shape", title=f"{printable(first)} and {printable(second)}")
    nan = any(whole["nan"])
    for name in ("SQNR dB", "largest error", *(["NaN"] if nan else [])):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row["path"], "×".join(map(str, row.get("shape", []))), *_told(row)]
        add_row(table, *cells, *(["/".join(map(str, row.get("nan", [])))] if nan else []))
    plain_console(width=None if sys.stdout.isatty() else 160).print(table)
    print(_summary(whole))


def _told(row: dict[str, Any]) -> tuple[str, str]:
    """Returns what the table shows of a tensor: how alike the two are, and the largest error."""
    if "not_read" in row:
        return "not read", row["not_read"]
    if row["equal"]:
        return "equal", ""
    if row["equal_values"]:
        return "equal values", ""
    number = row.get("sqnr_db")
    error = row.get("largest_error")
    shown = "" if error is None else str(error) if isinstance(error, int) else f"{error:.3g}"
    return "differs" if number is None else f"{number:.2f}", shown


def _summary(whole: dict[str, Any]) -> str:
    if whole["equal"]:
        text = "no bit differs"
    elif whole["equal_values"]:
        text = "no value differs, but dtypes or bits do"
    elif whole["sqnr_db"] is None or whole["sqnr_db"] == math.inf:
        text = "no floating value differs, but others do"
    else:
        text = f"SQNR of all floating tensors {whole['sqnr_db']:.2f} dB"
    if whole["nan"][0] or whole["nan"][1]:
        text += f"; {whole['nan'][0]} and {whole['nan'][1]} NaN"
    return text + (f"; {whole['not_read']} tensors are not read" if whole["not_read"] else "")


def _demo() -> None:
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": rng.laplace(0, 0.05, (3, 3, 32, 64)).astype(np.float32), "bias": np.zeros(64, np.float32)},
        "dense": {"kernel": rng.normal(0, 0.03, (576, 128)).astype(np.float32), "bias": np.zeros(128, np.float32)},
    }
    print("A made-up network of two layers, compressed to 4 bits a weight and codebooks per output channel:\n")
    cparams, report = nuqjax.compress(params, bits=4, granularity="channel", scale=None, return_report=True)
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "demo.safetensors")
        nuqjax.save(path, cparams, report=report)
        same = nuqjax.load(path)
        print(f"\nSaved, loaded again: {os.path.getsize(path):,} bytes on disk, header and report counted.")
    x = jnp.asarray(rng.normal(size=(8, 576)), jnp.float32)
    exact = x @ params["dense"]["kernel"]
    small = nuqjax.apply(lambda p, x: x @ p["dense"]["kernel"])(same, x)
    error = float(jnp.linalg.norm(small - exact) / jnp.linalg.norm(exact))
    print(f"The dense layer on what was loaded, decoding inside XLA: {100 * error:.1f} % off the exact output.")


def _completion(shell: str) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ImportError("shell completion needs shtab: pip install 'nuqjax[cli]'") from error
    print(shtab.complete(parser(), shell))


_COMMANDS = {
    "compress": _compress, "decompress": _decompress, "inspect": _inspect, "plot": _plot, "compare": _compare,
    "demo": _demo, "completion": _completion,
}  # fmt: skip
