"""Compresses a checkpoint on disk leaf by leaf: memory holds one leaf at a time, and a stopped run can be resumed."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from nuqjax._src.checkpoint.checkpoint import Checkpoint, Leaf, open_checkpoint
from nuqjax._src.checkpoint.journal import Journal, resumable
from nuqjax._src.compress.leaf import compress_leaf
from nuqjax._src.compress.plan import LeafPlan, Plan, plan_leaves
from nuqjax._src.compress.rules import Options, Rule
from nuqjax._src.leaf.qformat import CodebookFormat
from nuqjax._src.leaf.rows import Granularity, Scale
from nuqjax._src.report.leaf_report import LeafReport
from nuqjax._src.report.report import Report, report_leaf
from nuqjax._src.store import entropy as store_entropy
from nuqjax._src.store.dtypes import to_part
from nuqjax._src.store.file import shard_size
from nuqjax._src.store.layout import LayoutBuilder, described, metadata
from nuqjax._src.store.report import with_coded_sizes
from nuqjax._src.store.target import claim
from nuqjax._src.store.tree import tree_to_nodes
from nuqjax._src.store.write import to_json, write


def compress_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int = 4,
    method: str = "knq",
    *,
    granularity: Granularity = "tensor",
    axis: int | Sequence[int] = -1,
    scale: Scale = None,
    codebook_format: CodebookFormat = None,
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
    """Compresses a checkpoint into a file that `load` reads, with one leaf in memory at a time.

    Everything that headers show is checked before any work. The folder `TARGET.partial` holds the finished leaves until
    all are done. A run that is interrupted, is killed or fails leaves this folder, and the old file at the target. With
    `resume` the next run continues from it and writes the same file, byte for byte; it repeats a finished leaf only if
    the options of that leaf have changed.

    Args:
      source: anything that `open_checkpoint` opens. The tensors' names, split at `separator`, are the keys of nested
        dicts. A msgpack file is read as a whole.
      target: the file to write, as in `save`.
      bits: as in `compress`, like all arguments up to `min_size`.
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
      format: the format of the source, as in `open_checkpoint`; None to detect it.
      separator: the text between the keys in a tensor's name, as in `open_checkpoint`. The file stores it.
      skip: a regular expression; leaves with a match anywhere in their path are left out, such as leaves of a dtype
        that cannot be read.
      resume: continue from `TARGET.partial`.
      progress: called after each leaf with its plan and its size in bytes before compression.

    Returns:
      The `Report`, which the file also holds. A warning is given if the file is larger than the source.

    Raises:
      ValueError: as in `compress`; the source is damaged, changes during the run, or would be replaced; the run to
        resume is of another source. A note on the error says where the finished leaves are.
      OSError: a file cannot be read or written; another process is writing the target; a file at the target was not
        written by this library.

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
    checkpoint = open_checkpoint(source, format, separator, skip)
    if checkpoint.format == "nuqjax":
        raise ValueError(f"{checkpoint.path} is compressed already")
    for leaf in checkpoint.leaves:
        if leaf.problem is not None:
            leaf.read()  # raises the problem before any work
    specs = checkpoint.tree(leaf.spec for leaf in checkpoint.leaves)
    plans = plan_leaves(specs, options, rules)
    nodes, _ = tree_to_nodes(specs)
    _check_headers(plans, checkpoint.leaves, entropy_coding)
    source_is = _identity(checkpoint)
    mark = _mark(os.path.abspath(checkpoint.path), checkpoint.format, source_is, nodes)
    keys = [_mark(number, repr(plan), entropy_coding) for number, plan in enumerate(plans)]
    notes = Plan(tuple(plans)).notes
    for note in notes:
        warnings.warn(f"compress_checkpoint: {note}", stacklevel=2)
    code = store_entropy.encode if entropy_coding else None
    sharded = limit is not None and sum(plan.nbytes_after for plan in plans) > limit

    with claim(target, checkpoint.files, sharded) as place, Journal(place.folder, mark, resume) as journal:
        with resumable(target, journal):
            for leaf, plan, key in zip(checkpoint.leaves, plans, keys, strict=True):
                if key not in journal:
                    kept, leaf_report = _compressed(leaf, plan)
                    _check_source(checkpoint, source_is)  # before the leaf is recorded as one of this source
                    journal.add(key, *described(plan.path, kept, code), leaf_report)
                if progress is not None:
                    progress(plan, plan.nbytes_before)
            _check_source(checkpoint, source_is)
            layout, tensors, reports = LayoutBuilder(nodes), [], []
            for key in keys:
                *parts, leaf_report = journal.leaf(key)
                tensors += layout.place(*parts)
                reports.append(leaf_report)
            report = with_coded_sizes(Report(tuple(reports), notes), layout.coded)
            tensors = layout.pool(tensors, limit)
            about, tag = metadata(layout.text(report))
            files = write(place, tensors, _of_source(checkpoint) | about, tag, limit)
            written, read = sum(map(os.path.getsize, files)), sum(size for _, size, *_ in source_is)
            report = replace(report, nbytes_file=written, nbytes_source=read)
        journal.remove()
    if report.growth:
        warnings.warn(report.growth, stacklevel=2)
    return report


def _compressed(leaf: Leaf, plan: LeafPlan) -> tuple[Any, LeafReport]:
    """Returns a leaf as the file stores it, compressed or dense, and its report."""
    dense = leaf.read()
    if plan.reason is not None:
        return dense, report_leaf(plan.path, dense, dense, plan.reason)
    kept, certificate = compress_leaf(dense, None, plan)
    kept = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, kept)
    return kept, report_leaf(plan.path, dense, kept, None, plan.options.method, certificate)


def _of_source(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the metadata that the file takes from its source, including the separator of its names."""
    separator = {} if checkpoint.separator is None else {"nuqjax.separator": checkpoint.separator}
    return dict(checkpoint.metadata) | separator


def _check_headers(plans: Sequence[LeafPlan], leaves: Sequence[Leaf], entropy_coding: bool) -> None:
    """Raises before the work for errors that would come after hours of it: unknown dtypes, a missing library."""
    for leaf, plan in zip(leaves, plans, strict=True):
        if leaf.dtype is not None:
            to_part(np.empty(0, leaf.dtype), plan.path)
    if entropy_coding:
        store_entropy.constriction_library()


def _identity(checkpoint: Checkpoint) -> list[Any]:
    """Returns path, size, modification time and inode of each source file, to detect a changed or replaced one."""
    found = []
    for path in checkpoint.files:
        status = os.stat(path)
        found.append([os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ino])
    return found


def _check_source(checkpoint: Checkpoint, identity: list[Any]) -> None:
    try:
        same = _identity(checkpoint) == identity
    except OSError:
        same = False
    if not same:
        raise ValueError(f"{checkpoint.path} has changed or gone since it was opened: nothing is written")


def _mark(*parts: Any) -> str:
    return hashlib.sha256(to_json(parts).encode(errors="surrogatepass")).hexdigest()
