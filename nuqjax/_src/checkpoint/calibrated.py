"""Compresses a checkpoint with data: the whole tree is in memory, and a run that was stopped can be resumed."""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from nuqjax._src.calibration.door import compressed_with_data
from nuqjax._src.checkpoint.checkpoint import Checkpoint
from nuqjax._src.checkpoint.journal import resumable
from nuqjax._src.checkpoint.results import Results
from nuqjax._src.compress.rules import Options, Rule
from nuqjax._src.report.report import Report
from nuqjax._src.store import entropy as store_entropy
from nuqjax._src.store.file import shard_size
from nuqjax._src.store.store import save_at
from nuqjax._src.store.target import claim


def compress_with_data(
    checkpoint: Checkpoint,
    target: str | os.PathLike[str],
    options: Options,
    rules: Rule | Iterable[Rule],
    *,
    fn: Callable[..., Any],
    batches: Iterable[Any],
    budget: int | str | None = None,
    rate: str | None = None,
    entropy_coding: bool = False,
    max_shard_size: int | str | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Report:
    """Compresses a checkpoint into a file as `compress` with data does in memory.

    The folder `TARGET.partial` keeps the finished leaves, and what was measured to choose widths, until all is done. A
    resumed run gathers moments again and solves what is missing; the file is the same, byte for byte. Of a run with
    other weights, inputs, options or another function nothing is taken over.

    With a `rate` the file does not hold the report, which the rate does not count.

    Args:
      checkpoint: the open checkpoint.
      target: the file to write.
      options: the user's options.
      rules: the user's rules.
      fn: as in `compress`, like `batches`, `budget` and `rate`.
      batches: the inputs.
      budget: bits a weight, bytes, or a divergence.
      rate: bits a weight of the file.
      entropy_coding: as in `save`, like `max_shard_size`.
      max_shard_size: bytes of a shard.
      resume: continue from `TARGET.partial`.
      progress: show progress bars.

    Raises:
      ValueError: as in `compress`. A note on the error says where the finished parts are.
      OSError: as in `save`.
    """
    limit = shard_size(max_shard_size)
    if entropy_coding:
        store_entropy.constriction_library()  # raises before the work
    with claim(target, checkpoint.files, limit is not None) as place:
        results = Results(place, resume)
        with resumable(target, results):
            cparams, report, notes = compressed_with_data(
                checkpoint.read(), options, rules, fn=fn, batches=batches, budget=budget, rate=rate, progress=progress,
                once=results.once,
            )  # fmt: skip
            for note in notes:
                warnings.warn(f"compress: {note}", stacklevel=2)
            made = report()
            save_at(place, cparams, made if rate is None else None, entropy_coding, limit)
        results.remove()
    return replace(made, nbytes_file=os.path.getsize(place.path) if os.path.exists(place.path) else None)
