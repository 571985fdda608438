"""Names for types that many files use."""

from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

Array: TypeAlias = jax.Array | np.ndarray
"""An array of JAX, traced or not, or of NumPy."""
A = TypeVar("A", jax.Array, np.ndarray)
"""JAX's arrays or NumPy's: those that a function returns are of the kind that it is given."""
T = TypeVar("T")
PyTree: TypeAlias = Any
"""A tree that JAX can flatten, of the user's own types: a dict, an NNX state, a module, or an array alone."""
TreeDef: TypeAlias = Any
"""A `jax.tree_util.PyTreeDef`, which type checkers do not know."""
AnyMesh: TypeAlias = Mesh | AbstractMesh
"""A mesh of devices, or the shape of one in the type of a traced array."""
