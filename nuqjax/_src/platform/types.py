"""Names for types that many files use."""

from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
"""An array of JAX, traced or not, or of NumPy."""
PyTree: TypeAlias = Any
"""A tree that JAX can flatten, of the user's own types: a dict, an NNX state, a module, or an array alone."""
