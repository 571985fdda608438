"""Decoding happens layer by layer: peak resident memory, measured in fresh processes."""

import pytest

_PROGRAM = '''
import sys
import jax, jax.numpy as jnp, numpy as np
from jax import lax
import nuqjax
from tests.peak import peak_bytes
from nuqjax._src.leaf import packing
from nuqjax._src.leaf import rows

kind, shape = sys.argv[1], tuple(map(int, sys.argv[2].split(",")))
axes = (len(shape) - 1,)
random = np.random.default_rng(0)

def layer(shape):
    """Random levels and packed bytes: the dense array is never made."""
    outputs, inputs = rows.channel_shape(shape, axes)
    packed = random.integers(0, 256, (outputs, packing.packed_size(inputs, 4)), dtype=np.uint8)
    levels = np.sort(random.standard_normal((1, 16)).astype(np.float32)) * 0.01
    return nuqjax.CodebookArray(
        jnp.asarray(levels), jnp.asarray(packed), None, shape, np.dtype("float32"), 4, "tensor", axes)

def model(params, x):
    for w in params:
        if kind == "dense":
            x = jnp.tanh(x @ w)
        else:
            x = jnp.tanh(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return x

def run(shape, layers):
    params = [layer(shape) for _ in range(layers)]
    x = jnp.ones((16, shape[0]) if kind == "dense" else (1, 8, 8, shape[2]))
    jax.block_until_ready(jax.jit(nuqjax.apply(model))(params, x))
    return sum(leaf.nbytes for leaf in params)

run(tuple(min(n, 8) for n in shape), 24)  # what importing, compiling and starting the threads takes
before = peak_bytes()
packed = run(shape, 24)
print(peak_bytes() - before, packed, int(np.prod(shape)) * 4)
'''


@pytest.mark.parametrize(("kind", "shape"), [("dense", "4096,4096"), ("convolution", "3,3,1024,1024")])
def test_a_deep_network_holds_about_two_dense_layers(kind, shape, numbers_printed):
    """24 equal layers over the import baseline: the packed bytes, two dense layers and a little.

    A convolution on a CPU rearranges its kernel, so it holds one copy more while it runs.
    """
    peak, packed, dense = numbers_printed(_PROGRAM, kind, shape)
    layers = 2 if kind == "dense" else 3
    slack = 8 * 2**20  # activations, the allocator's granularity
    assert peak <= packed + layers * dense + slack, f"{(peak - packed) / dense:.2f} dense layers over the packed bytes"
