"""Names and functions that differ between releases of JAX, from 0.7.2 on."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental

# jax 0.7 has it in `jax.experimental`.
enable_x64: Any = getattr(jax if hasattr(jax, "enable_x64") else jax.experimental, "enable_x64")  # noqa: B009


def bind_primitive(primitive: Any, operands: Sequence[Any], params: Any) -> Any:
    """Returns the results of a primitive for operands, with the parameters of an equation."""
    given = primitive.get_bind_params(params)
    if isinstance(given, tuple):  # jax 0.7
        functions, given = given
        return primitive.bind(*functions, *operands, **given)
    return primitive.bind(*operands, **given)


def as_varying(x: Any, axes: Sequence[Any]) -> Any:
    """Returns an array inside `jax.shard_map` with a type that varies over these axes, too."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, tuple(axes), to="varying")
    return getattr(jax.lax, "pvary")(x, tuple(axes))  # noqa: B009, before jax 0.9
