"""Products that are rounded before they are added to anything.

XLA contracts a·b + c to one rounding in some programs and not in others, so bits would depend on what else is in the
program. Both functions keep it from that.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def rounded_first(product: Any) -> Any:
    """Returns a product behind a barrier, which ends the loop in which XLA computes it; NumPy's is rounded already."""
    return product if isinstance(product, np.ndarray) else lax.optimization_barrier(product)


def rounded_in_loop(product: Any) -> Any:
    """Returns a product, not above infinity, behind a choice, which stays in the loop in which XLA computes it."""
    return jnp.where(product < jnp.inf, product, jnp.inf)
