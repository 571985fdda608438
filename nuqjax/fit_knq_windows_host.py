"""The window programme of `fit_knq_search` in NumPy: the costs of all intervals at once, then an addition a level."""

import numpy as np

_AT_ONCE = 2**15  # costs held at once, as many rows as that is
_EXACT = 2.0**52  # the differences of smaller whole numbers are exact in float64


def windows_rows(count, total, above, end_count, end_total, end_above, reference, spacing) -> np.ndarray:
    """The best combination of one place in each boundary's window, `[R, K − 1]`: as `fit_knq_search._windows_rows`."""
    number, boundaries, size = count.shape
    lanes = max(1, _AT_ONCE // (boundaries * size * size))
    pinned = above.any() or end_above.any()
    parts = []
    for start in range(0, number, lanes):
        here = slice(start, start + lanes)
        left_above, right_above = None, None
        if pinned:
            nothing = np.zeros((len(above[here]), 1, size), bool)
            left_above = np.concatenate([nothing, above[here]], axis=1)
            end = np.broadcast_to(end_above[here, None, None], nothing.shape)
            right_above = np.concatenate([above[here], end], axis=1)
        parts.append(
            _windows(
                count[here], total[here], left_above, right_above, end_count[here], end_total[here], reference[here],
                spacing[here],
            )
        )  # fmt: skip
    return np.concatenate(parts)


def _windows(count, total, left_above, right_above, end_count, end_total, reference, spacing):
    number, boundaries, size = count.shape
    middle = size // 2
    both = (reference[:, 1:] + reference[:, :-1])[:, :, None]
    moved = 2 * (total - total[:, :, middle : middle + 1]) - (count - count[:, :, middle : middle + 1]) * both
    shift = spacing[:, :, None] * moved.astype(np.float64)

    def costs(layers, left, right, left_pin, right_pin):
        """`[R, …, W or 1, W or 1]` of intervals from each place to each."""
        level = reference[:, layers]
        (n_left, s_left), (n_right, s_right) = left, right
        n = n_right[:, :, None, :] - n_left[:, :, :, None]
        if total.dtype == np.int64:  # exact in any order
            level = level[:, :, None]
            rest = _difference(s_left - n_left * level, s_right - n_right * level)
        else:
            rest = (s_right[:, :, None, :] - s_left[:, :, :, None]) - n * level[:, :, None, None]
        n = n.astype(np.float64, copy=False)
        empty = n <= 0
        wrong = n < 0 if empty.any() else None
        gain = rest * rest
        if wrong is not None:
            n[empty] = 1.0
        np.divide(gain, n, out=gain)
        if left_pin is not None:
            held = ~left_pin[:, :, :, None] & right_pin[:, :, None, :]
            if held.any():
                layer, row = np.nonzero(held.any(axis=(2, 3)).T)
                s = (s_right[:, :, None, :] - s_left[:, :, :, None])[row, layer]
                at = reference[:, layers][row, layer][:, None, None]
                to_zero = at.astype(np.float64) * (s + rest[row, layer].astype(s.dtype)).astype(np.float64)
                gain[row, layer] = np.where(held[row, layer], -to_zero, gain[row, layer])
        np.negative(gain, out=gain)
        if wrong is not None:
            gain[wrong] = np.inf
        return gain

    def at(array, start, stop):
        return array[:, start:stop]

    nothing = np.zeros((number, 1, 1), count.dtype), np.zeros((number, 1, 1), total.dtype)
    pins = (None, None)
    if left_above is not None:
        pins = left_above[:, :1, :1], right_above[:, :1]
    first = costs(slice(0, 1), nothing, (count[:, :1], total[:, :1]), *pins)[:, 0, 0] + shift[:, 0]
    inner = np.empty(0)
    if boundaries > 1:
        if left_above is not None:
            pins = left_above[:, 1:-1], right_above[:, 1:-1]
        lefts = at(count, 0, boundaries - 1), at(total, 0, boundaries - 1)
        rights = at(count, 1, boundaries), at(total, 1, boundaries)
        inner = costs(slice(1, boundaries), lefts, rights, *pins)
    bests = np.empty((boundaries, number, size))
    bests[0] = first
    for layer in range(1, boundaries):
        reached = bests[layer - 1][:, :, None] + inner[:, layer - 1]
        np.add(reached.min(axis=1), shift[:, layer], out=bests[layer])
    if left_above is not None:
        pins = left_above[:, -1:], right_above[:, -1:, :1]
    end = end_count[:, None, None], end_total[:, None, None]
    last = costs(slice(boundaries, boundaries + 1), (count[:, -1:], total[:, -1:]), end, *pins)[:, 0, :, 0]
    chosen = np.empty((number, boundaries), np.int64)
    chosen[:, -1] = np.argmin(bests[-1] + last, axis=1)
    every = np.arange(number)
    for layer in range(boundaries - 1, 0, -1):
        reached = bests[layer - 1] + inner[every, layer - 1, :, chosen[:, layer]]
        chosen[:, layer - 1] = np.argmin(reached, axis=1)
    return chosen


def _difference(left, right):
    """`[R, …, W, V]` float64 differences of whole numbers, made of floats where that is exact."""
    if left.dtype == np.int64 and max(np.abs(left).max(initial=0), np.abs(right).max(initial=0)) < _EXACT:
        left, right = left.astype(np.float64), right.astype(np.float64)
    return (right[:, :, None, :] - left[:, :, :, None]).astype(np.float64, copy=False)
