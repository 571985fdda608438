"""Products that are rounded before they are added to anything.

XLA contracts a·b + c to one rounding in some programs and not in others, so bits would depend on what else is in the
program. Both functions keep it from that.
"""

from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.platform.types import Array


@overload
def rounded_first(product: np.ndarray) -> np.ndarray: ...
@overload
def rounded_first(product: jax.Array) -> jax.Array: ...
def rounded_first(product: Array) -> Array:
    """Returns a product behind a barrier, which ends the loop in which XLA computes it; NumPy's is rounded already."""
    return product if isinstance(product, np.ndarray) else lax.optimization_barrier(product)


def rounded_in_loop(product: jax.Array) -> jax.Array:
    """Returns a product, not above infinity, behind a choice, which stays in the loop in which XLA computes it."""
    return jnp.where(product < jnp.inf, product, jnp.inf)
