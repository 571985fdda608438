"""What several commands show: JSON, and the tensors that are left out."""

import json
import math
import sys
from typing import Any

from nuqjax._src.checkpoint.tree import Checkpoint
from nuqjax._src.leaf.paths import printable


def say_skipped(checkpoint: Checkpoint) -> None:
    """Says which tensors `skip` leaves out, if any."""
    if checkpoint.skipped:
        names = ", ".join(printable(path) for path in checkpoint.skipped[:10])
        more = f" and {len(checkpoint.skipped) - 10} more" if len(checkpoint.skipped) > 10 else ""
        print(f"nuqjax: left out of {checkpoint.path}: {names}{more}", file=sys.stderr)


def as_json(value: Any) -> str:
    """Returns a value as JSON, with null for NaN and infinity."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(x) for key, x in item.items()}
        if isinstance(item, list | tuple):
            return [plain(x) for x in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=1, allow_nan=False)
