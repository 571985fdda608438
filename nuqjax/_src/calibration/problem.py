"""The layer-wise problem: weights, the second moments of what they multiply, and what solves it.

An output of a layer is a sum w·x over the inputs x of a row w. If its weights are replaced by ŵ, the mean squared
error of the output, its mean aside (which a bias takes up), is (w − ŵ) H (w − ŵ)ᵀ with H = E[(x − μ)(x − μ)ᵀ].
"""

from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """The weights of one leaf, and what they multiply.

    Attributes:
      weights: `[O, I]`: row o is what output o is made of, inputs in the leaf's own order of its other axes.
      hessian: `[G, I, I]` centred second moments of the inputs, as `shrunk` gives them; G divides O, and the rows
        g·O/G … (g + 1)·O/G share the g-th (dense layers: G = 1; depthwise ones: G = O). Or `[G, B, I/B, I/B]`: those
        within B stretches of inputs, one after another, what lies between stretches being unknown (wide layers).
    """

    weights: np.ndarray
    hessian: np.ndarray


class Solution(NamedTuple):
    """Codebooks, indices and scales of one leaf, laid out as `CodebookArray` has them.

    Attributes:
      levels: `[R, K]` float32 ascending values of the levels, which their format represents.
      indices: `[O, I]` uint8.
      scale: `[O, S]` in the dtype in which it is stored, or None.
      codebook_format: the format of the levels: as given, an `AutoQFormat` replaced by the `QFormat` chosen.
      errors: tr((W − Ŵ) H (W − Ŵ)ᵀ) after each stage that was of use, in their order; they never rise.
      bits_per_weight: the empirical entropy of the indices: what an entropy coder makes of them.
    """

    levels: np.ndarray
    indices: np.ndarray
    scale: np.ndarray | None
    codebook_format: Any
    errors: dict[str, float]
    bits_per_weight: float


def shrunk(second: np.ndarray, images: int, positions: int) -> np.ndarray:
    """Second moments of a sample, drawn towards their diagonal as far as the sample is small.

    Of few images the moments of many inputs tell more of those images than of others. Positions of one image resemble
    one another: more than 16 of them tell no more.

    Args:
      second: `[G, I, I]` centred second moments, E[(x − μ)(x − μ)ᵀ].
      images: how many images (or sequences) they are of.
      positions: at how many places of each.

    Returns:
      `[G, I, I]` float64, symmetric and positive definite: of inputs that never change too.

    Raises:
      ValueError: the moments are not `[G, I, I]` or not finite, or there are no images or positions.

    >>> import numpy as np
    >>> shrunk(np.array([[[1.0, 1.0], [1.0, 1.0]]]), images=2, positions=1)
    array([[[1.01, 0.5 ],
            [0.5 , 1.01]]])
    """
    second = np.asarray(second, np.float64)
    if second.ndim != 3 or second.shape[1] != second.shape[2]:
        raise ValueError(f"shrunk: second moments of shape {second.shape}, but [G, I, I] is wanted")
    if not np.isfinite(second).all():
        raise ValueError("shrunk: second moments that are NaN or infinite: the inputs of this layer are not finite")
    if images < 1 or positions < 1:
        raise ValueError(f"shrunk: {images} images at {positions} positions, but 1 or more of each are wanted")
    inputs = second.shape[1]
    share = inputs / (inputs + images * min(positions, 16))
    diagonal = np.maximum(np.einsum("gii->gi", second), 0)
    mean = diagonal.mean(axis=1, keepdims=True) if inputs else diagonal
    damping = np.where(mean > 0, 0.01 * mean, 1)
    result = (second + second.transpose(0, 2, 1)) * ((1 - share) / 2)
    np.einsum("gii->gi", result)[:] = diagonal + damping
    return result
