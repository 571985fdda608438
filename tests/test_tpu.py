"""The lifted function and a fit compile ahead of time for a TPU v5e, where libtpu is installed. No TPU is needed."""

import importlib.util
import os
import subprocess
import sys

import pytest

_PROGRAM = """
import jax, jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
import nuqjax

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, ids):
        x = nn.relu(nn.Conv(64, (3, 3))(x)).mean((1, 2))
        return nn.Dense(128)(x) + nn.Embed(512, 128)(ids)

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
sharding = SingleDeviceSharding(device)
model, x, ids = Net(), jnp.ones((4, 16, 16, 16)), jnp.zeros(4, jnp.int32)
cparams = nuqjax.compress(model.init(jax.random.key(0), x, ids), bits=4, method="normal", granularity="channel")
shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (cparams, x, ids))
lifted = jax.jit(nuqjax.apply(model.apply), in_shardings=sharding, out_shardings=sharding)
compiled = lifted.lower(*shapes).compile()
rows = jax.ShapeDtypeStruct((8, 300), jnp.float32)
fit = jax.jit(lambda rows: nuqjax.fit(rows, 16, tolerance=None), in_shardings=sharding, out_shardings=sharding)
fit.lower(rows).compile()
print("compiled", compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiles_for_a_tpu_v5e():
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    command = [sys.executable, "-c", _PROGRAM]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "compiled" in finished.stdout
