"""What is measured of one cell of the study, image by image, and the intervals of what it says of all images.

Every cell sees the same images, so two cells are compared on pairs: only the images that one gets right and the other
wrong tell them apart, and the interval of their difference is much narrower than those of the two accuracies.
"""

import base64
import math
import zlib
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

from experiments.studies.accuracy import output_sqnr_db

CONFIDENCE = 0.95


class Outcomes(NamedTuple):
    """One network's choices on each image.

    Attributes:
      top1: `[N]` bool, whether the first choice is the label; None where outputs are features.
      top5: `[N]` bool, whether the label is among the first five; None likewise.
      agrees: `[N]` bool, whether the first choice is the float network's; of features, whether the image's nearest
        neighbour among the others (by cosine) is the one that the float network's features give it.
      kl: `[N]` float64, KL divergence of the float network's probabilities from these, in nats; None likewise.
      sqnr_db: power of the float network's outputs over that of the difference, dB; None where they are equal.
    """

    top1: np.ndarray | None
    top5: np.ndarray | None
    agrees: np.ndarray
    kl: np.ndarray | None
    sqnr_db: float | None


def outcomes(outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray | None) -> Outcomes:
    """Scores outputs against labels and the float network's outputs.

    Args:
      outputs: `[N, C]` logits or features.
      reference: `[N, C]` of the float network.
      labels: `[N]` true classes; None for features.

    Raises:
      ValueError: an output is NaN or infinite.
    """
    sqnr = output_sqnr_db(outputs, reference)
    outputs, reference = outputs.astype(np.float64), reference.astype(np.float64)
    if labels is None:
        return Outcomes(None, None, nearest(outputs) == nearest(reference), None, sqnr)
    ranked = np.argsort(-outputs, axis=1, kind="stable")[:, :5]
    hits = ranked == labels[:, None]
    log_p, log_q = special.log_softmax(reference, axis=1), special.log_softmax(outputs, axis=1)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    return Outcomes(hits[:, 0], hits.any(axis=1), ranked[:, 0] == reference.argmax(axis=1), kl, sqnr)


def nearest(features: np.ndarray) -> np.ndarray:
    """`[N]` the other row that makes the smallest angle with each row of `[N, C]`.

    >>> nearest(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])).tolist()
    [2, 2, 0]
    """
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(lengths > 0, lengths, 1)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return cosine.argmax(axis=1)


def share_interval(right: np.ndarray) -> list[float]:
    """Wilson's score interval of a share, from `[N]` bools.

    >>> [round(end, 3) for end in share_interval(np.arange(10) < 8)]
    [0.49, 0.943]
    """
    test = stats.binomtest(int(right.sum()), right.size)
    interval = test.proportion_ci(CONFIDENCE, method="wilson")
    return [float(interval.low), float(interval.high)]


def paired_interval(before: np.ndarray, after: np.ndarray) -> list[float]:
    """The interval of the share of images lost: mean of `before` less mean of `after`, on the same images.

    Bonett and Price, *Adjusted Wald confidence interval for a difference of binomial proportions based on paired data*
    (2012): one image is added to each kind of discordant pair, which keeps the interval honest when there are few.

    Args:
      before: `[N]` bools of the one network.
      after: `[N]` bools of the other.

    >>> right = np.arange(1000) < 800
    >>> [round(end, 4) for end in paired_interval(right, right)]
    [-0.0028, 0.0028]
    """
    total = before.size + 2
    lost = (np.count_nonzero(before & ~after) + 1) / total
    gained = (np.count_nonzero(~before & after) + 1) / total
    difference = lost - gained
    reach = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((lost + gained - difference**2) / total)
    return [max(-1.0, float(difference - reach)), min(1.0, float(difference + reach))]


def summary(measured: Outcomes, of_float: Outcomes) -> dict[str, Any]:
    """What a results file holds of one cell, the bools of every image included.

    Args:
      measured: of the cell.
      of_float: of the float network, on the same images.
    """
    found: dict[str, Any] = {
        "top1": None,
        "top5": None,
        "agreement": float(measured.agrees.mean()),
        "agreement_interval": share_interval(measured.agrees),
        "agrees": pack(measured.agrees),
        "output_sqnr_db": measured.sqnr_db,
    }
    if measured.top1 is None or measured.top5 is None or measured.kl is None or of_float.top1 is None:
        return found
    scored = of_bools(measured.top1, measured.agrees, of_float.top1)
    return found | scored | {"top5": float(measured.top5.mean()), "kl": float(measured.kl.mean())}


def of_bools(right: np.ndarray, agrees: np.ndarray, right_in_float: np.ndarray) -> dict[str, Any]:
    """What a results file holds of a cell whose choices alone are known: `[N]` bools of each image."""
    return {
        "top1": float(right.mean()),
        "top1_interval": share_interval(right),
        "loss": float(right_in_float.mean() - right.mean()),
        "loss_interval": paired_interval(right_in_float, right),
        "right": pack(right),
        "agreement": float(agrees.mean()),
        "agreement_interval": share_interval(agrees),
        "agrees": pack(agrees),
    }


def pack(bools: np.ndarray) -> str:
    """Bools as text for a results file: their number, then the packed bits, compressed, in base 64.

    >>> unpack(pack(np.array([True, False, True]))).tolist()
    [True, False, True]
    """
    packed = zlib.compress(np.packbits(bools).tobytes(), 9)
    return f"{bools.size}:{base64.b64encode(packed).decode()}"


def unpack(text: str) -> np.ndarray:
    """The bools that `pack` wrote."""
    size, _, packed = text.partition(":")
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)
    return np.unpackbits(bits, count=int(size)).astype(bool)
