"""The layer-wise problem: weights and the second moments of what they multiply; and its solution.

An output of a layer is a sum w·x over the inputs x, where w is a row of weights. If ŵ replaces w, the mean squared
error of the output, without its mean (which a bias takes up), is (w − ŵ) H (w − ŵ)ᵀ with H = E[(x − μ)(x − μ)ᵀ].
"""

from typing import Any, NamedTuple

import numpy as np

# Of the mean of the diagonal: the one of 0.1, 0.3 and 1 with the least divergence for Tiny Darknet at 3 bits and 160
# images (`python -m experiments.studies.calibrated --network tiny_darknet --bits 3 --ways calibrated --learn 200`).
RIDGE = 0.3


class Problem(NamedTuple):
    """The weights of one leaf, and the moments of what they multiply.

    Attributes:
      weights: `[O, I]`: row o holds the weights of output o, with inputs in the leaf's own order of its other axes.
      hessian: `[G, I, I]` centred second moments of the inputs, as `shrunk` returns them. G divides O, and rows
        g·O/G … (g + 1)·O/G share matrix g (dense layers: G = 1; depthwise ones: G = O). For wide layers
        `[G, B, I/B, I/B]`: the moments within B consecutive stretches of inputs; those between stretches are unknown.
    """

    weights: np.ndarray
    hessian: np.ndarray


class Solution(NamedTuple):
    """Codebooks, indices and scales of one leaf, laid out as in `CodebookArray`.

    Attributes:
      levels: `[R, K]` float32 ascending values of the levels, exactly representable in their format.
      indices: `[O, I]` uint8.
      scale: `[O, S]` in its stored dtype, or None.
      codebook_format: the format of the levels as given; an `AutoQFormat` is replaced by the chosen `QFormat`.
      errors: tr((W − Ŵ) H (W − Ŵ)ᵀ) after each stage that lowered it, in order; they never rise.
      bits_per_weight: the empirical entropy of the indices, which an entropy coder approaches.
    """

    levels: np.ndarray
    indices: np.ndarray
    scale: np.ndarray | None
    codebook_format: Any
    errors: dict[str, float]
    bits_per_weight: float


def shrunk(second: np.ndarray, images: int, positions: int) -> np.ndarray:
    """Shrinks the second moments of a sample towards their diagonal, the more the smaller the sample is.

    Moments of many inputs from few images describe those images rather than images in general. Positions of one image
    resemble one another, so at most 16 of them are counted.

    Args:
      second: `[G, I, I]` centred second moments, E[(x − μ)(x − μ)ᵀ].
      images: the number of images (or sequences) in the sample.
      positions: the number of positions taken from each.

    Returns:
      `[G, I, I]` float64, symmetric and positive definite, even for inputs that never change.

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
    diagonal = np.maximum(np.einsum("gii->gi", second), 0)
    mean = diagonal.mean(axis=1, keepdims=True) if inputs else diagonal
    damping = np.where(mean > 0, 0.01 * mean, 1)
    result = _apart((second + second.transpose(0, 2, 1)) / 2, images, positions)
    np.einsum("gii->gi", result)[:] = diagonal + damping
    return result


def _apart(moments: np.ndarray, images: int, positions: int) -> np.ndarray:
    """Returns moments `[…, I, I]` with those between different inputs shrunk."""
    inputs = moments.shape[-1]
    seen = images * min(positions, 16)
    result = moments * (seen / (inputs + seen))
    np.einsum("...ii->...i", result)[:] = np.einsum("...ii->...i", moments)
    return result


def target(weights: np.ndarray, second: np.ndarray, cross: np.ndarray, hessian: np.ndarray | None = None) -> np.ndarray:
    """Returns the weights with which inputs x come closest to the outputs that `weights` have with inputs f.

    With second moments as they are, these are W* = W C H⁻¹, which minimise E ‖W f − W* x‖². The more `hessian` differs
    from the second moments, the closer W* stays to W: it is W (C + H' − H) H'⁻¹.

    Args:
      weights: `[O, I]`.
      second: `[G, I, I]` H = E[x xᵀ], or `[G, B, I/B, I/B]` within B stretches of inputs; G divides O.
      cross: C = E[f xᵀ], like `second`.
      hessian: H', positive definite, like `second`; None for H itself.

    Returns:
      `[O, I]` float64.

    >>> import numpy as np
    >>> second = np.array([[[2.0, 1.0], [1.0, 2.0]]])
    >>> target(np.array([[3.0, 4.0]]), second, second).round(9)  # the same inputs
    array([[3., 4.]])
    >>> target(np.array([[3.0, 4.0]]), second, 2 * second, hessian=second).round(9)  # x is half of f
    array([[6., 8.]])
    """
    size = second.shape[-1]
    hessian = second if hessian is None else hessian
    second, cross, hessian = (x.reshape(x.shape[0], -1, size, size) for x in (second, cross, hessian))
    groups, stretches = second.shape[:2]
    rows = np.asarray(weights, np.float64).reshape(groups, -1, stretches, size).transpose(0, 2, 1, 3)  # [G, B, o, i]
    made = np.linalg.solve(hessian.swapaxes(2, 3), (rows @ (cross + (hessian - second))).swapaxes(2, 3))
    return made.transpose(0, 3, 1, 2).reshape(weights.shape)


def ahead(
    weights: np.ndarray, second: np.ndarray, cross: np.ndarray, hessian: np.ndarray, images: int, positions: int
) -> np.ndarray:
    """Returns the `target` of moments from a sample, as far as it tells the inputs apart.

    Args:
      weights: `[O, I]`.
      second: E[x xᵀ], as in `target`.
      cross: E[f xᵀ].
      hessian: E[x xᵀ] as `shrunk` returns it.
      images: as in `shrunk`.
      positions: as in `shrunk`.
    """
    size = hessian.shape[-1]
    ridge = RIDGE * np.einsum("...ii->...", hessian)[..., None, None] / max(size, 1) * np.eye(size)
    return target(weights, second, second + _apart(cross - second, images, positions), hessian + ridge)
