"""Names and functions that differ between releases of JAX, from 0.7.2 on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.experimental
from jax.extend import core
from jax.typing import ArrayLike

from nuqjax._src.platform.types import Array

# jax 0.7 has it in `jax.experimental`.
enable_x64: Callable[[bool], AbstractContextManager] = getattr(  # noqa: B009
    jax if hasattr(jax, "enable_x64") else jax.experimental, "enable_x64"
)


def bind_primitive(primitive: core.Primitive, operands: Sequence[ArrayLike], params: dict[str, Any]) -> list[jax.Array]:
    """Returns the results of a primitive for operands, with the parameters of an equation."""
    given = primitive.get_bind_params(params)
    if isinstance(given, tuple):  # jax 0.7
        functions, given = given
        operands = (*functions, *operands)
    results = primitive.bind(*operands, **given)
    return results if primitive.multiple_results else [results]


def as_varying(x: Array, axes: Sequence[str]) -> jax.Array:
    """Returns an array inside `jax.shard_map` with a type that varies over these axes, too."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, tuple(axes), to="varying")
    return getattr(jax.lax, "pvary")(x, tuple(axes))  # noqa: B009, before jax 0.9
