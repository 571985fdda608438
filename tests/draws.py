"""Arrays and variables of models for tests, drawn by NumPy: JAX's own draws compile a program for every shape."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal values; the same for the same seed and shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def filled(shapes: Any, seed: int = 0) -> Any:
    """The tree of arrays of these shapes: kernels that keep the variance, vectors between 0.5 and 1.5."""
    generator = np.random.default_rng(seed)

    def draw(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"a leaf of dtype {leaf.dtype}, which is not drawn")
        if len(leaf.shape) < 2:
            return jnp.asarray(generator.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(generator.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, shapes)


def variables(init: Callable, *inputs: Any, seed: int = 0) -> Any:
    """Variables of a flax module for these inputs: of the shapes that `init` gives, which is not run."""
    with jax.numpy_dtype_promotion("standard"):  # as models of one dtype on parameters of another need
        return filled(jax.eval_shape(init, jax.random.key(0), *inputs), seed)
