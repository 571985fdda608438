"""A Flax linen model, unchanged, on a compressed tree of its variables. Run it: `python examples/linen.py`."""

import jax
import numpy as np
from flax import linen as nn

import nuqjax


class Model(nn.Module):
    """A small convolutional network."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x)).mean(axis=(1, 2))
        return nn.Dense(10)(x)


model = Model()
images = np.random.default_rng(0).normal(size=(64, 16, 16, 3)).astype(np.float32)
variables = model.init(jax.random.key(0), images)

# By the weights alone, and by what the layers multiply: the same bytes.
alone = nuqjax.compress(variables, bits=2, scale="channel")
learned, report = nuqjax.compress(
    variables, bits=2, fn=model.apply, batches=[images[:16], images[16:32], images[32:48]], return_report=True
)
print(report)

run = jax.jit(nuqjax.apply(model.apply))
wanted = model.apply(variables, images[48:])
for name, tree in {"by the weights alone": alone, "with 48 images": learned}.items():
    error = np.linalg.norm(run(tree, images[48:]) - wanted) / np.linalg.norm(wanted)
    print(f"2 bits, {name}: the outputs are {100 * error:.1f} % off")
