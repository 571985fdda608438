"""Fixed-point weights in words of more than 8 bits, which no codebook of `nuqjax` is for: the study's wide baselines.

The same three methods as in `nuqjax`, on words as long as wanted: `dfp` has the step that holds the largest magnitude
(halved for each bit beyond 8), `uniform_pow2` the power-of-two step of least squared error, `uniform` any step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nuqjax

METHODS = ("uniform", "uniform_pow2", "dfp")
MOST_BITS = 16
_MIN_SIZE = 256  # values; `nuqjax.compress` leaves smaller leaves dense by default, and so does this
_OCTAVES = 6  # of steps below the one that holds every value
_PER_OCTAVE = 32  # steps of `uniform` from which the search starts


class Quantized(NamedTuple):
    """A tree in words.

    Attributes:
      params: the tree with its kernels rounded to words.
      leaves: a dict for each leaf, with what `nuqjax.report(…).to_dict()["leaves"]` says of its size and its error.
    """

    params: Any
    leaves: list[dict[str, Any]]


def quantize(params: Any, method: str, bits: int, granularity: str) -> Quantized:
    """Rounds every kernel of a tree to words of `bits` bits.

    Args:
      params: a tree of float32 leaves; those with two axes or more are kernels, output channels last.
      method: one of `METHODS`.
      bits: length of a word, at most `MOST_BITS`.
      granularity: `"tensor"`, a step a kernel; or `"channel"`, a step an output channel.

    Raises:
      ValueError: another method, granularity or number of bits.
    """
    if method not in METHODS or granularity not in ("tensor", "channel") or not 1 < bits <= MOST_BITS:
        raise ValueError(
            f"words: {method!r} {granularity!r} of {bits} bits, but {', '.join(METHODS)} per tensor or channel of 2 to "
            f"{MOST_BITS} are wanted"
        )
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    results, leaves = [], []
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        entry = {"path": name, "weights": leaf.size, "nbytes_after": leaf.nbytes, "reason": "left dense"}
        if leaf.ndim < 2 or (granularity == "tensor" and leaf.size < _MIN_SIZE):
            results.append(leaf)
            leaves.append(entry)
            continue
        kernel = np.asarray(leaf)
        rows = kernel.reshape(1, -1) if granularity == "tensor" else kernel.reshape(-1, kernel.shape[-1]).T
        words = round_rows(rows, method, bits)
        signal, noise = np.sum(np.square(rows, dtype=np.float64)), np.sum((rows.astype(np.float64) - words) ** 2)
        back = words.reshape(kernel.shape) if granularity == "tensor" else words.T.reshape(kernel.shape)
        results.append(back.astype(np.float32))
        leaves.append(
            entry
            | {
                "reason": None,
                "nbytes_after": -(-leaf.size * bits // 8),
                "bits": bits,
                "levels_available": len(rows) << bits,
                "signal": float(signal),
                "noise": float(noise),
                "sqnr_db": float(10 * np.log10(signal / noise)) if noise else float("inf"),
            }
        )
    return Quantized(jax.tree.unflatten(structure, results), leaves)


def round_rows(rows: np.ndarray, method: str, bits: int) -> np.ndarray:
    """`[R, N]` float64: each row's nearest multiples of its own step, within words of `bits` bits.

    Args:
      rows: `[R, N]` float32.
      method, bits: as in `quantize`.
    """
    levels = np.asarray(nuqjax.fit(jnp.asarray(rows), 256, "dfp").levels, np.float64)
    holding = (levels[:, -1:] - levels[:, -2:-1]) * 2.0 ** (8 - bits)  # [R, 1], the steps of `dfp`
    values = rows.astype(np.float64)
    if method == "dfp":
        return _round(values, holding, bits)
    per_octave = 1 if method == "uniform_pow2" else _PER_OCTAVE
    best, least = values, np.full((len(rows), 1), np.inf)
    for i in range(-per_octave, _OCTAVES * per_octave + 1):
        words = _improved(values, holding * 2.0 ** (-i / per_octave), bits, improve=method == "uniform")
        error = np.sum((values - words) ** 2, axis=1, keepdims=True)
        best, least = np.where(error < least, words, best), np.minimum(error, least)
    return best


def _improved(values: np.ndarray, step: np.ndarray, bits: int, improve: bool) -> np.ndarray:
    """Words at a step; `improve`, at the step that is best for the multiples that the first one gives."""
    if improve:
        for _ in range(2):
            multiples = _round(values, step, bits) / step
            square = np.sum(multiples**2, axis=1, keepdims=True)
            moment = np.sum(values * multiples, axis=1, keepdims=True)
            step = np.where(moment > 0, moment / np.where(square > 0, square, 1), step)
    return _round(values, step, bits)


def _round(values: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    return np.clip(np.rint(values / step), -half, half - 1) * step


def sizes(leaves: Sequence[dict[str, Any]], stored_bytes: int) -> dict[str, Any]:
    """What `experiments.studies.accuracy.sizes` says of a compressed tree; its bytes in memory are those stored."""
    weights = sum(leaf["weights"] for leaf in leaves)
    in_words = [leaf for leaf in leaves if leaf["reason"] is None]
    count = sum(leaf["weights"] for leaf in in_words)
    noise = sum(leaf["noise"] for leaf in in_words)
    return {
        "bytes": stored_bytes,
        "ratio": 4 * weights / stored_bytes,
        "bits_per_weight": 8 * stored_bytes / weights,
        "compressed_bits_per_weight": 8 * sum(leaf["nbytes_after"] for leaf in in_words) / count if count else None,
        "compressed_fraction": count / weights,
        "sqnr_db": float(10 * np.log10(sum(leaf["signal"] for leaf in in_words) / noise)) if noise else None,
    }
