"""Implementations of a product with a stored matrix; all have one signature and one meaning, that of `decoding`.

An implementation is `f(x, stored, layout, over, precision) -> y`, in the dtype in which sums are taken. With a matrix
W `[O, I]`, `over="inputs"` sums over inputs: x `[…, I]` gives x Wᵀ `[…, O]`. `over="outputs"` sums over channels:
x `[…, O]` gives x W `[…, I]`. Sums are taken in different orders; values of W are the same bits in each.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.kernels.after import after
from nuqjax._src.kernels.planes import Stored, decode_planes, planes_of
from nuqjax._src.leaf.matrix import Layout, decode_matrix

Over: TypeAlias = Literal["inputs", "outputs"]
Implementation: TypeAlias = Callable[[jax.Array, Stored, Layout, Over, Any], jax.Array]

# Values in a block, which then stay in a processor's cache; for many inputs twice as many (`speed.running`).
BLOCK = 2**19


def sums_in(*arrays: jax.Array) -> np.dtype:
    """Returns the dtype in which products of these arrays are summed."""
    return max((np.dtype(np.float32), *(a.dtype for a in arrays)), key=lambda dtype: dtype.itemsize)


def _dot(x: jax.Array, matrix: jax.Array, over: Over, precision: Any) -> jax.Array:
    axis = 1 if over == "inputs" else 0
    return lax.dot_general(
        x, matrix, (((x.ndim - 1,), (axis,)), ((), ())), precision=precision, preferred_element_type=sums_in(x, matrix)
    )


def _matrix(stored: Stored, layout: Layout, x: jax.Array) -> jax.Array:
    """Decodes the matrix, once x is there."""
    with jax.named_scope(stored.name):
        return decode_matrix(stored.levels, after(stored.packed, x), stored.scale, layout)


def decoding(x: jax.Array, stored: Stored, layout: Layout, over: Over, precision: Any) -> jax.Array:
    """Decodes the matrix in the order in which it is stored, and multiplies: the reference."""
    return _dot(x, _matrix(stored, layout, x), over, precision)


def _flat(implementation: Implementation) -> Implementation:
    """Returns the implementation for any leading axes of x, from one for a single axis."""

    def run(x: jax.Array, *given: Any) -> jax.Array:
        return implementation(x.reshape(-1, x.shape[-1]), *given).reshape(*x.shape[:-1], -1)

    return run


def reducing(x: jax.Array, stored: Stored, layout: Layout, over: Over, precision: Any) -> jax.Array:
    """Multiplies and sums without a dot, which GPUs compile to one kernel with the decoding; for one or few inputs."""
    matrix = _matrix(stored, layout, x)
    sums = sums_in(x, matrix)
    x = x.astype(sums)
    x = x[:, None, :] if over == "inputs" else x[:, :, None]
    return (x * matrix.astype(sums)[None]).sum(axis=2 if over == "inputs" else 1)


def in_planes(x: jax.Array, stored: Stored, layout: Layout, over: Over, precision: Any) -> jax.Array:
    """Sums the products with the matrix's planes, whose levels are chosen by comparisons where they are few."""
    planes = decode_planes(stored._replace(packed=after(stored.packed, x)), layout, select=True)
    if over == "inputs":
        return _sum_of_planes(_planes_of(x, layout), planes, precision)
    parts = jnp.stack([_dot(x, plane, over, precision) for plane in planes], axis=-1)
    return parts.reshape(x.shape[0], -1)[:, : layout.inputs]


def in_blocks(x: jax.Array, stored: Stored, layout: Layout, over: Over, precision: Any) -> jax.Array:
    """As `in_planes`, block by block: of channels, or of positions where sums are over channels."""
    outputs, values = stored.packed.shape[0], BLOCK if len(x) <= 8 else 2 * BLOCK
    if over == "inputs":
        taken = _planes_of(x, layout)
        size = min(outputs, max(8, values // layout.inputs))

        def block(start: jax.Array) -> jax.Array:
            packed, scale = jax.tree.map(
                lambda array: lax.dynamic_slice_in_dim(array, start, size), (stored.packed, stored.scale)
            )
            planes = decode_planes(stored._replace(packed=packed, scale=scale, output=start), layout)
            return _sum_of_planes(taken, planes, precision)

        return _over_blocks(block, outputs, size)
    count, width, positions = planes_of(layout)
    packed = jnp.pad(stored.packed, ((0, 0), (0, positions * width - stored.packed.shape[1])))
    size = min(positions, max(8, values // (outputs * count)))

    def block_of_positions(start: jax.Array) -> jax.Array:
        some = lax.dynamic_slice_in_dim(packed, start * width, size * width, axis=1)
        planes = decode_planes(stored._replace(packed=some, position=start), layout)
        parts = [_dot(x, plane, over, precision) for plane in planes]
        return jnp.concatenate(parts)  # [P·M, q]

    parts = _over_blocks(block_of_positions, positions, size).reshape(count, x.shape[0], positions)
    return jnp.moveaxis(parts, 0, -1).reshape(x.shape[0], -1)[:, : layout.inputs]


def _over_blocks(block: Callable[[jax.Array], jax.Array], count: int, size: int) -> jax.Array:
    """Returns `[m, count]`, computed in blocks `[m, size]` one after the other; the last may overlap the one before."""
    starts = jnp.asarray(np.minimum(np.arange(-(-count // size)) * size, count - size), jnp.int32)
    if len(starts) == 1:
        return block(starts[0])
    _, parts = lax.scan(lambda _, start: (None, block(start)), None, starts)
    again = len(starts) * size - count  # the last block repeats the end of the one before
    first = jnp.moveaxis(parts[:-1], 0, 1).reshape(parts.shape[1], -1)
    return jnp.concatenate([first, parts[-1][:, again:]], axis=1)


def _planes_of(x: jax.Array, layout: Layout) -> jax.Array:
    """Returns x `[M, I]` at the positions of each plane: `[P, M, Q]`, 0 where a plane is beyond the matrix."""
    count, _, positions = planes_of(layout)
    padded = jnp.pad(x, ((0, 0), (0, count * positions - x.shape[1])))
    return jnp.moveaxis(padded.reshape(x.shape[0], positions, count), 2, 0)


def _sum_of_planes(x: jax.Array, planes: list[jax.Array], precision: Any) -> jax.Array:
    total = _dot(x[0], planes[0], "inputs", precision)
    for part, plane in zip(x[1:], planes[1:], strict=True):
        total = total + _dot(part, plane, "inputs", precision)
    return total


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "decode": decoding,
    "planes": _flat(in_planes),
    "blocks": _flat(in_blocks),
    "reduce": _flat(reducing),
}
