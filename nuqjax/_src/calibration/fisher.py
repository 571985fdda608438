"""Importance of each weight for a loss: the diagonal of the empirical Fisher information."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax


def fisher(
    loss_fn: Callable[[Any, Any], jax.Array], params: Any, batches: Iterable[Any], *, per_example: bool = False
) -> Any:
    """Computes the mean squared gradient of a loss for each parameter, for `compress(sensitivity=…)`.

    For the loss −log p(y|x) of single examples this is the diagonal of the empirical Fisher information: the factor of
    each weight's squared error in a second-order expansion of the loss (Kim et al., *SqueezeLLM*, section 4.1).
    Batches are streamed: memory is two copies of the parameters and one backward pass.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`.
      params: a pytree of arrays; arrays that are not floating are held fixed.
      batches: an iterable of pytrees of arrays with equal shapes; each is one argument of `loss_fn`.
      per_example: square the gradient of each example (a slice of length 1 along the first axis of each array of the
        batch) instead of that of the batch's mean loss. This is the usual definition; it needs one backward pass an
        example.

    Returns:
      A tree like `params` of float32 arrays with the parameters' shapes and shardings; None for leaves that are not
      floating.

    Raises:
      ValueError: there are no batches.

    >>> import jax.numpy as jnp
    >>> loss = lambda p, x: jnp.sum(p["w"] * x)
    >>> fisher(loss, {"w": jnp.ones(2)}, [jnp.array([1.0, 3.0]), jnp.array([2.0, 1.0])])["w"].tolist()
    [2.5, 5.0]
    """
    leaves, structure = jax.tree.flatten(params)
    moving = [n for n, x in enumerate(leaves) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(moved, batch) -> jax.Array:
        values = list(leaves)
        for n, x in zip(moving, moved, strict=True):
            values[n] = x
        return loss_fn(structure.unflatten(values), batch)

    def squares(moved, batch) -> list[jax.Array]:
        return [jnp.square(g.astype(jnp.float32)) for g in jax.grad(loss)(moved, batch)]

    def of_examples(moved, batch) -> list[Any]:
        def add(total, example) -> tuple[list[Any], None]:
            one = jax.tree.map(lambda x: x[None], example)
            return [t + s for t, s in zip(total, squares(moved, one), strict=True)], None

        zeros = [jnp.zeros(x.shape, jnp.float32) for x in moved]
        total, _ = lax.scan(add, zeros, batch)
        count = jax.tree.leaves(batch)[0].shape[0]
        return [t / count for t in total]

    weights = [leaves[n] for n in moving]
    placed = [x.sharding if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) else None for x in weights]

    def step(total, moved, batch) -> list[Any]:
        new = of_examples(moved, batch) if per_example else squares(moved, batch)
        return [t + s for t, s in zip(total, new, strict=True)]

    step = jax.jit(step, donate_argnums=0, out_shardings=placed)
    total = [jnp.zeros(x.shape, jnp.float32, device=s) for x, s in zip(weights, placed, strict=True)]
    number = 0
    for batch in batches:
        total = step(total, weights, batch)
        number += 1
    if not number:
        raise ValueError("fisher: there are no batches")
    result: list[Any] = [None] * len(leaves)
    for n, t in zip(moving, total, strict=True):
        result[n] = t / number
    return structure.unflatten(result)
