"""The window programme of `search.search` in NumPy: first the gains of all intervals, then a subtraction per level."""

import numpy as np

_AT_ONCE = 2**16  # gains stored at once, which limits the rows handled at once
_EXACT = 2.0**52  # differences of integers below this are exact in float64


def windows_rows(count, total, above, end_count, end_total, end_above, reference, spacing) -> np.ndarray:
    """Returns the best combination of one place in each boundary's window, like `search.search._windows_rows`.

    Cuts ascend in each window. The result is `[R, K − 1]`.
    """
    number, boundaries, size = count.shape
    lanes = max(1, _AT_ONCE // (boundaries * size * size))
    middle = size // 2
    both = (reference[:, 1:] + reference[:, :-1])[:, :, None]
    moved = 2 * (total - total[:, :, middle : middle + 1]) - (count - count[:, :, middle : middle + 1]) * both
    shift = spacing[:, :, None] * moved.astype(np.float64)
    # The ends of a row are windows in which all places are the same cut.
    first, last = np.zeros((number, 1, size), count.dtype), np.repeat(end_count[:, None, None], size, axis=2)
    counts = np.concatenate([first, count, last], axis=1)
    first, last = np.zeros((number, 1, size), total.dtype), np.repeat(end_total[:, None, None], size, axis=2)
    totals = np.concatenate([first, total, last], axis=1)
    pins = None
    if above.any() or end_above.any():
        last = np.repeat(end_above[:, None, None], size, axis=2)
        pins = np.concatenate([np.zeros((number, 1, size), bool), above, last], axis=1)
    parts = []
    for start in range(0, number, lanes):
        here = slice(start, start + lanes)
        held = None if pins is None else pins[here]
        parts.append(_windows(counts[here], totals[here], held, reference[here], shift[here]))
    return np.concatenate(parts)


def _windows(count, total, above, reference, shift) -> np.ndarray:
    """Computes `windows_rows` with `count`, `total` and `above` `[R, K + 1, W]` that include windows for both ends."""
    number, windows, size = count.shape
    boundaries = windows - 2
    inner = _gains(count[:, 1:-1], total[:, 1:-1], None if above is None else above[:, 1:-1], reference[:, 1:-1])
    ends = []
    for left in (0, boundaries):
        some = slice(left, left + 2)
        ends.append(_gains(count[:, some], total[:, some], None if above is None else above[:, some],
                           reference[:, left : left + 1])[:, 0])  # fmt: skip
    bests = np.empty((boundaries, number, size))
    bests[0] = shift[:, 0] - ends[0][:, 0]
    for layer in range(1, boundaries):
        reached = bests[layer - 1][:, :, None] - inner[:, layer - 1]
        np.add(reached.min(axis=1), shift[:, layer], out=bests[layer])
    chosen = np.empty((number, boundaries), np.int64)
    chosen[:, -1] = np.argmin(bests[-1] - ends[1][:, :, 0], axis=1)
    every = np.arange(number)
    for layer in range(boundaries - 1, 0, -1):
        reached = bests[layer - 1] - inner[every, layer - 1, :, chosen[:, layer]]
        chosen[:, layer - 1] = np.argmin(reached, axis=1)
    return chosen


def _gains(count, total, above, reference) -> np.ndarray:
    """Returns `[R, L, W, W]` what intervals gain when their level moves to their mean.

    They run from each place of a window to each place of the next. One that ends before it begins gains −∞.
    """
    level = reference[:, :, None]
    n = count.astype(np.float64, copy=False)
    n = n[:, 1:, None, :] - n[:, :-1, :, None]
    if total.dtype == np.int64:  # exact in any order
        left, right = total[:, :-1] - count[:, :-1] * level, total[:, 1:] - count[:, 1:] * level
        if max(np.abs(left).max(initial=0), np.abs(right).max(initial=0)) < _EXACT:
            left, right = left.astype(np.float64), right.astype(np.float64)
        rest = (right[:, :, None, :] - left[:, :, :, None]).astype(np.float64, copy=False)
    else:
        rest = (total[:, 1:, None, :] - total[:, :-1, :, None]) - n * level[..., None]
    apart = bool((count[:, 1:, 0] > count[:, :-1, -1]).all())  # no interval is empty
    gain = np.multiply(rest, rest, out=None if above is not None else rest)
    backwards = None if apart else n < 0
    if not apart:
        n[n <= 0] = 1.0
    np.divide(gain, n, out=gain)
    if above is not None:
        held = ~above[:, :-1, :, None] & above[:, 1:, None, :]
        row, layer = np.nonzero(held.any(axis=(2, 3)))
        s = (total[:, 1:, None, :] - total[:, :-1, :, None])[row, layer]
        to_zero = level[row, layer][..., None].astype(np.float64) * (s + rest[row, layer].astype(s.dtype)).astype(
            np.float64
        )
        gain[row, layer] = np.where(held[row, layer], -to_zero, gain[row, layer])
    if backwards is not None:
        gain[backwards] = -np.inf
    return gain
