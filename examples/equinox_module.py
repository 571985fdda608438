"""An equinox module, whose kernels are `[out, in]`. Run it: `python examples/equinox_module.py`."""

import equinox as eqx
import jax

import nuqjax

model = eqx.nn.MLP(in_size=64, out_size=10, width_size=256, depth=2, key=jax.random.key(0))
inputs = jax.random.normal(jax.random.key(1), (8, 64))

# `axis=0`: the first axis of a kernel counts its outputs, and each output has a scale of its own.
cmodel = nuqjax.compress(model, bits=4, axis=0, scale="channel")
run = eqx.filter_jit(nuqjax.apply(lambda model, x: jax.vmap(model)(x)))
print(nuqjax.report(model, cmodel))
print(abs(run(cmodel, inputs) - jax.vmap(model)(inputs)).max())
