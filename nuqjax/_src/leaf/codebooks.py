"""Decodes a compressed tree to dense arrays, and takes its levels out and puts them back."""

import jax
from jax.tree_util import KeyPath

from nuqjax._src.leaf.codebook_array import (
    CodebookArray,
    check_layout,
    decode,
    dense_on_host,
    dense_sharding,
    is_codebook_array,
    is_on_host,
    level_values,
    with_levels,
)
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.platform.types import PyTree


def decompress(tree: PyTree) -> PyTree:
    """Returns the tree with every `CodebookArray` decoded to its dense array, of the same shape and dtype.

    Raises:
      ValueError: JAX sliced the arrays of a leaf, or an optimizer trained its indices. The message names the leaf.

    >>> import jax.numpy as jnp, nuqjax
    >>> params = {"kernel": jnp.arange(512.0).reshape(16, 32) % 8}
    >>> dense = nuqjax.decompress(nuqjax.compress(params, bits=3))  # eight distinct values: nothing is lost
    >>> bool((dense["kernel"] == params["kernel"]).all())
    True
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _dense(path, x) if is_codebook_array(x) else x, tree, is_leaf=is_codebook_array
    )


def _dense(path: KeyPath, leaf: CodebookArray) -> jax.Array:
    check_layout(leaf, path_name(path) or "the compressed leaf")
    return jax.device_put(dense_on_host(leaf), dense_sharding(leaf)) if is_on_host(leaf) else decode(leaf)


def codebooks(tree: PyTree) -> PyTree:
    """Returns the floating levels `[*S, R, K]` of every `CodebookArray`, in the same tree; None for other leaves.

    Give this tree to `jax.grad` and optax: the gradient of a level is the sum over the weights that share it.

    >>> import jax.numpy as jnp, nuqjax
    >>> cparams = nuqjax.compress({"w": jnp.ones((16, 32)), "b": jnp.zeros(32)}, bits=1)
    >>> codebooks(cparams)
    {'b': None, 'w': Array([[1., 1.]], dtype=float32)}
    """
    return jax.tree.map(lambda x: level_values(x) if is_codebook_array(x) else None, tree, is_leaf=is_codebook_array)


def with_codebooks(tree: PyTree, levels: PyTree) -> PyTree:
    """Returns the tree with other levels: `with_codebooks(tree, codebooks(tree))` decodes to the same values.

    Levels are used as given: floating, in their own dtype, not rounded to a codebook format.

    Args:
      tree: a compressed tree.
      levels: a tree like that of `codebooks(tree)`, with other values.

    Raises:
      ValueError: levels are missing for a leaf, have another shape, or are given for a leaf that is not compressed.

    >>> import jax, jax.numpy as jnp, nuqjax
    >>> cparams = nuqjax.compress({"w": jnp.eye(16)}, bits=1, min_size=0)
    >>> loss = lambda levels: nuqjax.decompress(with_codebooks(cparams, levels))["w"].sum()
    >>> jax.grad(loss)(codebooks(cparams))["w"].tolist()  # 240 zeros and 16 ones
    [[240.0, 16.0]]
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_codebook_array)
    given = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(levels)[0]}
    result = []
    for path, leaf in flat:
        if is_codebook_array(leaf):
            name = path_name(path)
            if name not in given:
                raise ValueError(f"with_codebooks: no levels for {name}")
            try:
                leaf = with_levels(leaf, given.pop(name))
            except ValueError as error:
                raise ValueError(f"with_codebooks: {name}: {error}") from error
        result.append(leaf)
    if given:
        raise ValueError(f"with_codebooks: levels for {next(iter(given))!r}, which is not a compressed leaf")
    return structure.unflatten(result)
