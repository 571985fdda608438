"""Shardings of the arrays of a compressed tree, derived from those of the dense parameters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from nuqjax._src.leaf import rows
from nuqjax._src.leaf.codebook_array import CodebookArray, is_codebook_array
from nuqjax._src.leaf.rows import Granularity
from nuqjax._src.platform.meshes import shards
from nuqjax._src.platform.types import PyTree


def shardings(cparams: PyTree, param_shardings: PyTree) -> PyTree:
    """Returns shardings for a compressed tree, leaf by leaf from those of the dense parameters.

    Stack axes keep their sharding. The storage rows of a leaf (one for each output channel) are sharded like its output
    axes. The bytes of a row are sharded like the first of its other axes, if every shard begins on a whole byte.
    Codebooks are sharded like the output axes where each channel has its own. Everything else is replicated.

    Args:
      cparams: a compressed tree of arrays, or of shapes from `jax.eval_shape`.
      param_shardings: a tree of `jax.sharding.NamedSharding` like the dense parameters, or one for all leaves.

    Returns:
      A tree like `cparams` with a sharding in place of every array, for `jax.device_put` or `jit(in_shardings=…)`.

    Raises:
      ValueError: the trees differ, or a compressed leaf's sharding is not a `NamedSharding`.

    >>> import jax, jax.numpy as jnp, nuqjax
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> params = {"w": jnp.arange(4096.0).reshape(64, 64)}
    >>> cparams = nuqjax.compress(params, bits=4, granularity="channel")
    >>> placed = shardings(cparams, {"w": NamedSharding(mesh, P(None, "model"))})
    >>> tuple(placed["w"].packed.spec), tuple(placed["w"].levels.spec)
    (('model', None), ('model', None))
    """
    leaves, structure = jax.tree.flatten(cparams, is_leaf=is_codebook_array)
    if isinstance(param_shardings, Sharding):
        given = [param_shardings] * len(leaves)
    else:
        given, other = jax.tree.flatten(param_shardings)
        if other != structure:
            raise ValueError(f"shardings: the trees differ: {structure} and {other}")
    placed = [_of_leaf(x, s) if is_codebook_array(x) else s for x, s in zip(leaves, given, strict=True)]
    return structure.unflatten(placed)


def _of_leaf(leaf: CodebookArray, sharding: Sharding) -> CodebookArray:
    """Returns the leaf with shardings in place of its arrays."""
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"shardings: a compressed leaf of shape {leaf.shape} has {sharding}, not a NamedSharding")
    specs = leaf_specs(sharding, leaf.shape, leaf.axes, leaf.bits, leaf.granularity, len(leaf.stack_shape))
    levels, packed, scale = (NamedSharding(sharding.mesh, spec) for spec in specs)
    return replace(leaf, levels=levels, packed=packed, scale=None if leaf.scale is None else scale)


def leaf_specs(
    sharding: NamedSharding, shape: Sequence[int], axes: Sequence[int], bits: int, granularity: Granularity, stack: int
) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Returns the specs of a leaf's levels, packed indices and scales, from the sharding of its dense array."""
    mesh, slice_shape = sharding.mesh, shape[stack:]
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    lead, inner = spec[:stack], spec[stack:]
    others = [a for a in range(len(slice_shape)) if a not in axes]
    output = _leading(inner, axes)
    position = _leading(inner, others)
    outputs, inputs = rows.channel_shape(slice_shape, axes)
    if outputs % shards(mesh, output):
        output = None
    parts = shards(mesh, position)
    if parts > 1 and (inputs % parts or inputs // parts * bits % 8):
        position = None
    own = output if granularity == "channel" else None
    return PartitionSpec(*lead, own, None), PartitionSpec(*lead, output, position), PartitionSpec(*lead, output, None)


def _leading(spec: Sequence[Any], axes: Sequence[int]) -> Any:
    """Returns the mesh axes that shard the first of `axes`, if the others are not sharded; else None.

    Only then are the shards of the flattened axes contiguous runs.
    """
    if not axes or any(spec[a] is not None for a in axes[1:]):
        return None
    return spec[axes[0]]
