"""Measures the distance of outputs from those of the float network."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class Measured(NamedTuple):
    """Distances of outputs from those of the float network, over all examples.

    Attributes:
      kl: mean KL divergence of the softmax over the last axis, nats; None if that axis has a single value.
      agreement: share of rows in which both networks have the same largest output; None if `kl` is None.
      relative_error: Σ ‖Δ‖² / Σ ‖output‖².
      rows: number of distributions compared (for a classifier, of examples).
    """

    kl: float | None
    agreement: float | None
    relative_error: float
    rows: int

    @property
    def loss(self) -> float:
        """The quantity to minimise: the divergence, or the relative error if there is none."""
        return self.relative_error if self.kl is None else self.kl

    def __str__(self) -> str:
        if self.kl is None or self.agreement is None:
            return f"relative error {self.relative_error:.3g}"
        return f"KL {self.kl:.4g} nats, agreement {100 * self.agreement:.1f} %"


def measured(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Measured:
    """Measures pairs `(float outputs, outputs)` of equal shapes, batch by batch.

    Outputs that are already probabilities (non-negative, sum 1 along the last axis) are used as such.

    >>> measured([(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]]))]).kl
    0.0
    """
    divergence = noise = signal = 0.0
    rows = same = 0
    classes = True
    for exact, other in pairs:
        exact, other = np.asarray(exact, np.float64), np.asarray(other, np.float64)
        noise += float(((exact - other) ** 2).sum())
        signal += float((exact**2).sum())
        classes = classes and exact.ndim > 0 and exact.shape[-1] > 1
        if classes:
            p, q = (x.reshape(-1, x.shape[-1]) for x in (exact, other))
            log_p, log_q = _log_probabilities(p, q)
            divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
            same += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
            rows += len(p)
    error = noise / signal if signal else (np.inf if noise else 0.0)
    if not classes or not rows:
        return Measured(None, None, error, rows)
    return Measured(max(divergence / rows, 0.0), same / rows, error, rows)


def _log_probabilities(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if (p >= 0).all() and np.allclose(p.sum(axis=-1), 1, atol=1e-3):
        tiny = 1e-30
        return np.log(np.maximum(p, tiny)), np.log(np.maximum(q, tiny))
    return _log_softmax(p), _log_softmax(q)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def finite(outputs: np.ndarray, what: str, caller: str) -> np.ndarray:
    """Returns the outputs unchanged.

    Raises:
      ValueError: some of them are not finite.
    """
    bad = ~np.isfinite(np.asarray(outputs, np.float64))
    if bad.any():
        raise ValueError(f"{caller}: {int(bad.sum())} of {bad.size} outputs of fn are NaN or infinite with {what}")
    return outputs


def as_numbers(measured: Measured) -> dict[str, Any]:
    """Returns the measures that are not None as plain numbers, by name."""
    return {name: value for name, value in measured._asdict().items() if value is not None}
