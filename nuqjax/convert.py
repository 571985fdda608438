"""A checkpoint on disk to a compressed file, leaf by leaf: memory for the largest leaf, and it can be resumed."""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import jax
import numpy as np

from nuqjax.checkpoint import Checkpoint, Leaf, open_checkpoint
from nuqjax.compress import compress_leaf
from nuqjax.plan import LeafPlan, plan_leaves
from nuqjax.report import LeafReport, Report, report_leaf
from nuqjax.rules import Options, Rule
from nuqjax.store import Layout, metadata, shard_size
from nuqjax.store_file import Stored, parse_json, to_json, write
from nuqjax.store_report import report_from_json, report_to_json, with_coded_sizes
from nuqjax.store_tree import tree_to_nodes

_CHUNK = 1 << 24


def compress_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int = 4,
    method: str = "knq",
    *,
    granularity="tensor",
    axis: int | Sequence[int] = -1,
    scale=None,
    codebook_format=None,
    keep_zero: bool = False,
    rules: Sequence[Rule] = (),
    tolerance: float | None = 1e-6,
    min_size: int = 256,
    entropy_coding: bool = False,
    max_shard_size: int | str | None = None,
    format: str | None = None,
    separator: str | None = None,
    skip: str | None = None,
    resume: bool = False,
    progress: Callable[[LeafPlan, int], None] | None = None,
) -> Report:
    """Compresses a checkpoint into a file that `load` reads, one leaf in memory at a time.

    What is done is kept in the folder `TARGET.partial` until all is: an interrupted run leaves that, and what was at
    the target, and with `resume` the next one goes on from there, to the same file byte for byte.

    Args:
      source: what `open_checkpoint` opens; its tensors' names, parted at `separator`, are the keys of nested dicts. A
        msgpack file is read whole.
      target: the file to write, as in `save`.
      bits: as in `compress`, like all that follow to `min_size`.
      method: how levels are fitted.
      granularity: which values share a codebook.
      axis: the output axis or axes: −1 for Flax kernels, 0 for PyTorch's `[out, in]` and OIHW. It is never guessed.
      scale: which values are divided by a common scale.
      codebook_format: how levels are stored.
      keep_zero: one level is exactly 0.
      rules: options by path.
      tolerance: how closely fits are proven; None for no proof.
      min_size: leaves with fewer values stay dense.
      entropy_coding: as in `save`.
      max_shard_size: as in `save`.
      format: of the source, as in `open_checkpoint`; None to see by what is there.
      separator: what parts the keys in a tensor's name, as in `open_checkpoint`. The file remembers it.
      skip: a regular expression: leaves that it is found in are left out, such as those of a dtype that is not read.
      resume: go on from `TARGET.partial`.
      progress: called with the plan of each leaf that is done, and the bytes that it had before.

    Returns:
      The `Report`, which is kept in the file too.

    Raises:
      ValueError: as in `compress`; the source is damaged; what is to be resumed is of another source or other options.
      OSError: a file cannot be read or written.

    >>> import jax.numpy as jnp, nuqjax, numpy, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     source, target = pathlib.Path(name) / "weights.npz", pathlib.Path(name) / "weights.safetensors"
    ...     numpy.savez(source, **{"conv.weight": numpy.arange(4096, dtype="float32").reshape(64, 64)})
    ...     report = compress_checkpoint(source, target, bits=4, axis=0)
    ...     nuqjax.load(target)
    {'conv': {'weight': CodebookArray(float32[64, 64], bits=4, granularity='tensor', 2112 bytes)}}
    """
    options = Options(
        bits=bits, method=method, granularity=granularity, axis=axis, scale=scale, codebook_format=codebook_format,
        keep_zero=keep_zero, tolerance=tolerance, min_size=min_size,
    )  # fmt: skip
    limit = shard_size(max_shard_size)
    target = os.path.realpath(os.fspath(target))
    if os.path.isdir(target):
        raise IsADirectoryError(f"{target} is a directory; a file is wanted")
    checkpoint = open_checkpoint(source, format, separator, skip)
    if checkpoint.format == "nuqjax":
        raise ValueError(f"{checkpoint.path} is compressed already")
    for leaf in checkpoint.leaves:
        if leaf.problem is not None:
            leaf.read()  # raises it, before any work
    specs = checkpoint.tree(leaf.spec for leaf in checkpoint.leaves)
    plans = plan_leaves(specs, options, rules)
    nodes, _ = tree_to_nodes(specs)
    mark = _fingerprint(checkpoint, plans, entropy_coding)
    folder = f"{target}.partial"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(FileExistsError):
        os.mkdir(folder)
    with _Journal(folder, mark, nodes) as journal:
        for number, (leaf, plan) in enumerate(zip(checkpoint.leaves, plans, strict=True)):
            if number >= len(journal.reports):
                try:
                    journal.add(*_compressed(leaf, plan), entropy_coding)
                except ValueError:  # so it would be the next time: there is nothing to resume
                    shutil.rmtree(folder)
                    raise
            if progress is not None:
                progress(plan, plan.nbytes_before)
        report = with_coded_sizes(Report(tuple(journal.reports)), journal.layout.coded)
        text = journal.layout.text(report)
        described, tag = metadata(text)
        write(target, journal.tensors, _of_source(checkpoint) | described, tag, limit, scratch=folder)
    shutil.rmtree(folder)
    return report


def _compressed(leaf: Leaf, plan: LeafPlan) -> tuple[Any, LeafReport]:
    """A leaf as it is kept, and its report."""
    dense = leaf.read()
    if plan.reason is not None:
        return dense, report_leaf(plan.path, dense, dense, plan.reason)
    kept, certificate = compress_leaf(dense, None, plan)
    return kept, report_leaf(plan.path, dense, kept, None, plan.options.method, certificate)


def _of_source(checkpoint: Checkpoint) -> dict[str, str]:
    """What the file keeps of its source: its metadata, and what parted the names of its tensors."""
    separator = {} if checkpoint.separator is None else {"nuqjax.separator": checkpoint.separator}
    return dict(checkpoint.metadata) | separator


def _fingerprint(checkpoint: Checkpoint, plans: Sequence[LeafPlan], entropy_coding: bool) -> str:
    """What a partial result depends on: the source's files, as they are named, sized and dated, and every plan."""
    found = [os.path.abspath(checkpoint.path), checkpoint.format, str(entropy_coding), *map(repr, plans)]
    for path in checkpoint.files:
        status = os.stat(path)
        found += [path, str(status.st_size), str(status.st_mtime_ns)]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


class _Journal:
    """The leaves that are done: their tensors in one file, and a line of JSON for each in another."""

    def __init__(self, folder: str, mark: str, nodes: list[Any]):
        """Opens the folder, and takes over what is whole in it.

        Raises:
          ValueError: it belongs to another source or other options.
        """
        self.layout = Layout(nodes)
        self.reports: list[LeafReport] = []
        self.tensors: list[Stored] = []
        self._data = os.path.join(folder, "tensors")
        self._lines = os.path.join(folder, "journal")
        self._end = 0
        length = 0
        if os.path.exists(self._lines):
            with open(self._lines, "rb") as lines:
                length = self._take_over(lines, mark, folder)
        self._journal: BinaryIO = open(self._lines, "r+b" if length else "wb")  # noqa: SIM115
        self._file: BinaryIO = open(self._data, "r+b" if length else "wb")  # noqa: SIM115
        if length:
            self._journal.truncate(length)
            self._journal.seek(length)
            self._file.truncate(self._end)
            self._file.seek(self._end)
        else:
            self._write_line({"mark": mark})

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._journal.close()

    def _take_over(self, lines: BinaryIO, mark: str, folder: str) -> int:
        """The length of the journal that is whole: its last line may be cut, or ahead of the tensors."""
        length = 0
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break
            try:
                record = parse_json(line, self._lines)
            except ValueError:  # not all of it reached the disk
                record = None
            if number == 0:
                if record != {"mark": mark}:
                    raise ValueError(f"{folder} is of another source or other options; without resume it is begun anew")
            elif record is None or not self._is_whole(record):
                break
            else:
                entry = record["entry"]
                self.layout.take_over(entry, record["coded"])
                self._hold(record["tensors"])
                self.reports += report_from_json([record["report"]], self._lines).leaves
            length += len(line)
        return length

    def _is_whole(self, record: dict[str, Any]) -> bool:
        """Whether the tensors of a line are on disk as they were written."""
        end = self._end
        for (_, _, _, nbytes), reference in zip(
            record["tensors"], record["entry"].get("tensors", {}).values(), strict=True
        ):
            check = 0
            for chunk in self._chunks(end, nbytes):
                check = zlib.crc32(chunk, check)
            if check != reference["crc32"]:
                return False
            end += nbytes
        return os.path.getsize(self._data) >= end

    def _hold(self, tensors: list[Any]) -> None:
        for name, code, shape, nbytes in tensors:
            begin = self._end
            self.tensors.append(Stored(name, code, tuple(shape), lambda b=begin, n=nbytes: self._chunks(b, n)))
            self._end += nbytes

    def _chunks(self, begin: int, nbytes: int) -> Iterator[bytes]:
        with open(self._data, "rb") as file:
            file.seek(begin)
            while nbytes:
                chunk = file.read(min(nbytes, _CHUNK))
                if not chunk:
                    return
                nbytes -= len(chunk)
                yield chunk

    def add(self, leaf: Any, report: LeafReport, entropy_coding: bool) -> None:
        """The next leaf: its tensors first, then the line that says that they are there."""
        path = report.path
        leaf = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, leaf)
        stored = self.layout.add(path, leaf, entropy_coding)
        for tensor in stored:
            for chunk in tensor.chunks():
                self._file.write(chunk)
        self._file.flush()
        held = [[tensor.name, tensor.code, list(tensor.shape), tensor.nbytes] for tensor in stored]
        record = {
            "entry": self.layout.entries[-1],
            "coded": self.layout.coded.get(path),
            "tensors": held,
            "report": report_to_json(Report((report,)))[0],
        }
        self._write_line(record)
        self.reports.append(report)
        self._hold(held)

    def _write_line(self, record: dict[str, Any]) -> None:
        self._journal.write(to_json(record).encode() + b"\n")
        self._journal.flush()
