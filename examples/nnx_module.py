"""A Flax NNX module is a tree: it is compressed and run as it is. Run it: `python examples/nnx_module.py`."""

import jax
import jax.numpy as jnp
from flax import nnx

import nuqjax


class Model(nnx.Module):
    """An embedding and two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(1000, 64, rngs=rngs)
        self.inner = nnx.Linear(64, 256, rngs=rngs)
        self.outer = nnx.Linear(256, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.outer(jax.nn.gelu(self.inner(self.embed(tokens))))


model = Model(nnx.Rngs(0))
tokens = jnp.arange(32).reshape(2, 16)

# Tables of look-ups keep more bits than the layers that compute.
cmodel, report = nuqjax.compress(model, bits=4, rules=nuqjax.Rule("embed", bits=6), return_report=True)
print(report)
run = jax.jit(nuqjax.apply(lambda model, tokens: model(tokens)))
print(jnp.abs(run(cmodel, tokens) - model(tokens)).max())
