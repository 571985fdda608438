"""Bias correction: changes the offset after a layer to cancel the shift of the output's mean by compression."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nuqjax._src.calibration.programs import Programs, checked_batches
from nuqjax._src.calibration.second_moments import Moments, gather_moments
from nuqjax._src.calibration.uses import Bias
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import path_name


def correct_bias(fn: Callable[..., Any], params: Any, cparams: Any, batches: Iterable[Any]) -> Any:
    """Corrects the offsets of a compressed tree so that each layer's output keeps its mean.

    Replacing the weights W of a layer by Ŵ shifts the mean of its output by (Ŵ − W)·E[x], where x is what the weights
    multiply. One pass over some batches computes E[x]. The offset after the layer is then changed to cancel the shift:
    the layer's own bias, or the mean that a following batch-norm subtracts. This works for trees from any method.

    Args:
      fn: `fn(params, *inputs)`.
      params: the dense tree.
      cparams: the tree that was compressed from it.
      batches: inputs, each an array or a tuple of arrays; an iterable that can be iterated over more than once.

    Returns:
      The compressed tree with corrected offsets. A layer without an offset, or with a compressed one, is not changed.

    Raises:
      ValueError: the trees differ, there are no batches, or `fn` fails.

    >>> import jax.numpy as jnp, nuqjax
    >>> fn = lambda p, x: x @ p["w"] + p["b"]
    >>> params = {"w": jnp.linspace(0.1, 1, 512).reshape(16, 32) ** 2, "b": jnp.zeros(32)}
    >>> cparams, batch = nuqjax.compress(params, bits=1), jnp.ones((2, 16))
    >>> error = lambda cparams: float(jnp.abs(nuqjax.apply(fn)(cparams, batch) - fn(params, batch)).max())
    >>> error(cparams) > 0.1, error(correct_bias(fn, params, cparams, [batch])) < 1e-4
    (True, True)
    """
    batches = checked_batches(batches, "correct_bias")
    means = gather_moments(Programs(fn, params, "correct_bias"), batches, wanted=frozenset())
    return corrected(params, cparams, means)[0]


def corrected(params: Any, cparams: Any, means: Moments) -> tuple[Any, dict[str, str]]:
    """Returns the tree with corrected offsets, and by path why a compressed leaf has no correction."""
    return with_offsets(params, cparams, means, means)


def with_offsets(
    params: Any, cparams: Any, exact: Moments, seen: Moments, only: frozenset[str] | None = None
) -> tuple[Any, dict[str, str]]:
    """Returns the tree with offsets that take up W·E[f] − Ŵ·E[x], and by path why a compressed leaf has no correction.

    Args:
      params: the dense tree.
      cparams: the compressed one.
      exact: means of f, what leaves multiply in the float function.
      seen: means of x, what they multiply in the compressed one.
      only: the compressed leaves whose shifts are taken up; None for all of them.
    """
    dense, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_codebook_array)
    leaves, other = jax.tree.flatten(cparams, is_leaf=is_codebook_array)
    if structure != other:
        raise ValueError(f"correct_bias: the trees differ: {structure} and {other}")
    place = {path_name(path): n for n, (path, _) in enumerate(dense)}
    weights = {  # W and Ŵ of each compressed leaf
        path: (np.asarray(x, np.float64), np.asarray(leaves[place[path]], np.float64))
        for path, x in ((path_name(p), x) for p, x in dense)
        if is_codebook_array(leaves[place[path]]) and not is_codebook_array(x) and (only is None or path in only)
    }
    shifts: dict[str, list[np.ndarray]] = {}
    done: set[str] = set()
    means = {  # E[f] and E[x] of each use
        a.use: (a.mean, b.mean)
        for path, some in exact.records.items()
        for a, b in zip(some, seen.records[path], strict=True)
    }
    for bias in exact.biases:
        names = {use.name for use, _ in bias.uses} & weights.keys()
        leaf = leaves[place[bias.name]]
        if names and not is_codebook_array(leaf):
            shift = _shift(bias, weights, means, exact.shapes[bias.name])
            if shift is not None:
                shifts.setdefault(bias.name, []).append(shift)
                done |= names
    for path, found in shifts.items():
        leaf = leaves[place[path]]
        new = (np.asarray(leaf, np.float64) + np.mean(found, axis=0)).astype(leaf.dtype)
        leaves[place[path]] = jax.device_put(new, leaf.sharding) if isinstance(leaf, jax.Array) else new
    taken = {use.name for bias in exact.biases for use, _ in bias.uses}
    why = {
        path: "its offset is compressed, or varies in other ways" if path in taken else "nothing is added after it"
        for path in weights
        if path not in done and exact.records.get(path)
    }
    return structure.unflatten(leaves), why


def _shift(
    bias: Bias,
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]],
    means: Mapping[Any, tuple[np.ndarray, np.ndarray]],
    shape: Sequence[int],
) -> np.ndarray | None:
    """Returns the correction to add to the leaf of a bias, in its shape; None where the steps of loops do not match."""
    entries = bias.entries(shape)
    values: Any = 0.0
    for use, numbers in bias.uses:
        if use.name not in weights or use not in means:
            continue
        of_leaf = use.entries(weights[use.name][0].shape)
        steps = len(of_leaf)
        exact, seen = (mean.reshape(steps, use.sizes[0], use.sizes[2]) for mean in means[use])
        before, after = (array.reshape(-1)[of_leaf] for array in weights[use.name])
        moved = np.einsum("nboi,nbi->nbo", before, exact) - np.einsum("nboi,nbi->nbo", after, seen)
        moved = moved.reshape(steps, -1)
        if 1 not in (steps, len(entries)) and steps != len(entries):
            return None
        values = values + moved[:, numbers]
    values, where = np.broadcast_arrays(np.asarray(values), entries)
    size = int(np.prod(shape))
    count = np.bincount(where.reshape(-1), minlength=size)
    total = np.bincount(where.reshape(-1), weights=values.reshape(-1), minlength=size)
    mean = (total / np.maximum(count, 1)).reshape(shape)
    return -mean if bias.negative else mean
