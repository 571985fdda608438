"""Refinement of levels by distillation: gradient descent on the divergence from the float outputs, indices frozen."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nuqjax._src.calibration.convolutions import convolved, with_fast_convolutions
from nuqjax._src.calibration.level_formats import rounded_levels
from nuqjax._src.calibration.measures import finite, measured
from nuqjax._src.calibration.programs import ARRAYS, Programs, checked_batches, fingerprint
from nuqjax._src.calibration.progress import bars
from nuqjax._src.leaf import fixed_point
from nuqjax._src.leaf.codebook_array import decode, is_codebook_array
from nuqjax._src.leaf.codebooks import decompress
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.leaf.qformat import QFormat
from nuqjax._src.platform.meshes import on_automatic

_EVERY = 10  # steps between two measurements on held-out batches
_PATIENCE = 3  # measurements in a row without a new best one after which refinement ends
_RATE = 1e-3  # of the default optimizer, in units of the levels' own size: of deep networks, 1e-2 leaves nothing


class Refined(NamedTuple):
    """A compressed tree with refined values, and what that brought; `str` says it in a line.

    Attributes:
      cparams: the tree; the very one that came in if no step made it better.
      before: the divergence of the held-out outputs from the float ones before the first step.
      after: the same for `cparams`; never more than `before`.
      steps: the number of steps after which the values were taken; 0 if no step made the tree better.
      history: pairs of a number of steps and the divergence of the held-out outputs after them.
    """

    cparams: Any
    before: float
    after: float
    steps: int
    history: tuple[tuple[int, float], ...]

    def __str__(self) -> str:
        if not self.steps:
            return f"not refined: on held-out batches no step is better than the loss of {self.before:.4g} before"
        return f"refined in {self.steps} steps: the loss on held-out batches is {self.before:.4g} → {self.after:.4g}"


def refine(
    fn: Callable[..., Any],
    params: Any,
    cparams: Any,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any],
    optimizer: Any = None,
    steps: int = 60,
    scales: bool = False,
    dense: str | None = None,
    output: Callable[[Any], Any] | None = None,
    progress: bool = False,
) -> Refined:
    """Refines the levels of a compressed tree, so that the outputs of the whole function come closer to the float ones.

    Each step goes down the gradient of KL(float ‖ compressed) of one batch with respect to all levels at once; no
    labels are needed. Indices, and with them the size, are unchanged. Levels stay on the values of their format, in
    their order, and a level of 0 stays 0. The divergence on held-out batches is measured before the first step and
    after every tenth. Where it is not the least so far, refinement goes back to the values of the least, and on with
    steps a quarter as large; three times in a row end it. The tree of the least divergence is returned, which is that
    of `cparams` itself where no step made it better.

    Args:
      fn: `fn(params, *inputs)`, any function that JAX can trace.
      params: the dense tree.
      cparams: the tree that was compressed from it, by any method. A tied leaf is refined once.
      batches: inputs to learn from, each an array or a tuple of arrays; one a step, again from the first after the
        last.
      held_out: other inputs, on which the divergence is measured.
      optimizer: an optax optimizer (or anything with its `init` and `update`); None for Adam with a learning rate that
        falls from 0.001 to 0, for which optax must be installed. It sees each value in units of its codebook's size
        (a scale in units of itself), so that a learning rate is relative.
      steps: the largest number of steps.
      scales: refine scales, too.
      dense: a regular expression; floating leaves that are not compressed are refined, too, if it matches anywhere in
        their path: `"bias$"`.
      output: as in `nuqjax.compress`.
      progress: show a progress bar.

    Returns:
      `Refined`: the tree, and the divergences before and after, in nats (for outputs with a single value along the
      last axis, the relative squared error).

    Raises:
      ValueError: the trees differ, or nothing in them can be refined; a held-out batch is also learned from; there are
        no batches, or an iterator of them; `fn` fails, or returns values that are not finite.
      ImportError: optax is needed and not installed.

    >>> import jax.numpy as jnp, nuqjax
    >>> fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    >>> params = {"w": jnp.sin(jnp.arange(512.0)).reshape(16, 32), "v": jnp.cos(jnp.arange(320.0)).reshape(32, 10)}
    >>> batches = [jnp.sin(jnp.arange(1024.0) * n).reshape(64, 16) for n in (1, 2, 3, 4)]
    >>> cparams = nuqjax.compress(params, bits=2)
    >>> refined = refine(fn, params, cparams, batches[:3], held_out=batches[3:])
    >>> refined.after < refined.before, refined.cparams["w"].packed is cparams["w"].packed
    (True, True)
    """
    if steps < 1:
        raise ValueError(f"refine: steps={steps}, but 1 or more are wanted")
    programs = Programs(fn, params, "refine", output)
    batches, held_out = checked_batches(batches, "refine"), checked_batches(held_out, "refine: held_out")
    learned = {fingerprint(batch) for batch in batches}
    for number, batch in enumerate(held_out):
        if fingerprint(batch) in learned:
            raise ValueError(
                f"refine: batch {number} of held_out is also learned from, and values seem better than they are there; "
                "give other batches"
            )
    flat, structure = _checked(params, cparams)
    parts = _parts(flat, scales, dense)
    optimizer = _adam(steps) if optimizer is None else optimizer
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            f"refine: optimizer is a {type(optimizer).__name__}, but one of optax is wanted: optimizer=optax.adam(1e-3)"
        )
    leaves = [leaf for _, leaf in flat]
    exact = [finite(programs.outputs(params, batch), "the float parameters", "refine") for batch in held_out]

    def loss_of(tree: Any) -> float:
        values = decompress(tree)
        outputs = [programs.outputs(values, batch) for batch in held_out]
        if not all(np.isfinite(np.asarray(x, np.float64)).all() for x in outputs):
            return math.nan
        return measured(zip(exact, outputs, strict=True)).loss

    before = loss_of(cparams)
    if not math.isfinite(before):
        raise ValueError("refine: with cparams, outputs of fn for held_out are NaN or infinite; compress params again")
    start = [part.start for part in parts]
    best = _Best(cparams, before, 0, start, optimizer.init(start))
    step, (values, state), size = _stepper(programs, leaves, parts, optimizer), best[3:], 1.0
    history, worse = [], 0
    endless = (batch for _ in itertools.repeat(None) for batch in batches)
    with bars(progress) as shown:
        for number, batch in enumerate(shown(itertools.islice(endless, steps), "refine", steps), start=1):
            values, state = step(batch, values, state, size)
            if number % _EVERY and number < steps:
                continue
            tree, loss = None, math.nan
            if all(np.isfinite(value).all() for value in values):
                tree = structure.unflatten(_stored(leaves, parts, values))
                loss = loss_of(tree)
            history.append((number, loss))
            if loss < best.loss:
                best, worse = _Best(tree, loss, number, values, state), 0
            elif (worse := worse + 1) < _PATIENCE:
                values, state, size = best.values, best.state, size / 4
            else:
                break
    return Refined(best.tree, before, best.loss, best.steps, tuple(history))


class _Best(NamedTuple):
    """The tree of least loss so far, after how many steps, and what to go on from: values and the optimizer's state."""

    tree: Any
    loss: float
    steps: int
    values: Any
    state: Any


def _checked(params: Any, cparams: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Returns paths and leaves of the compressed tree and its structure, checked to be that of the dense tree."""
    float_leaves, wanted = jax.tree_util.tree_flatten_with_path(params)
    flat, structure = jax.tree_util.tree_flatten_with_path(cparams, is_leaf=is_codebook_array)
    if structure != wanted:
        raise ValueError(f"refine: the trees differ: {wanted} and {structure}")
    for (path, exact), (_, leaf) in zip(float_leaves, flat, strict=True):
        if np.shape(exact) != (leaf.shape if is_codebook_array(leaf) else np.shape(leaf)):
            raise ValueError(
                f"refine: {path_name(path)} has the shape {np.shape(exact)} in params, and {leaf.shape} in cparams"
            )
    if not any(is_codebook_array(leaf) for _, leaf in flat):
        raise ValueError("refine: cparams has no compressed leaf; nuqjax.compress(params, …) makes it")
    return [(path_name(path), leaf) for path, leaf in flat], structure


def _adam(steps: int) -> Any:
    try:
        import optax
    except ImportError as error:
        raise ImportError("refine: the default optimizer needs optax: pip install 'nuqjax[optax]'") from error
    return optax.adam(optax.cosine_decay_schedule(_RATE, steps))


class _Part(NamedTuple):
    """Values that are refined together: the levels or the scales of a leaf, or a dense leaf.

    The optimizer sees them divided by `unit`, within `least` and `most`.

    Attributes:
      places: the numbers of the leaves that share them.
      field: the field of a compressed leaf; None for a dense leaf.
      stored_as: the `QFormat` or dtype that they are rounded to.
      unit: their size, as powers of two where rounding must not show.
      start: `values / unit`, float32.
      least: the lowest values that they may have.
      most: the highest ones.
      ascending: whether those along the last axis stay in ascending order.
    """

    places: tuple[int, ...]
    field: str | None
    stored_as: Any
    unit: np.ndarray
    start: np.ndarray
    least: np.ndarray
    most: np.ndarray
    ascending: np.ndarray


def _parts(flat: Sequence[tuple[str, Any]], scales: bool, dense: str | None) -> list[_Part]:
    """Returns what is refined of the leaves; those that share their arrays are one."""
    try:
        named = [dense is not None and re.search(dense, path) is not None for path, _ in flat]
    except re.error as error:
        raise ValueError(f"refine: dense={dense!r} is not a regular expression: {error}") from error
    shared: dict[Any, list[int]] = {}
    for number, (_, leaf) in enumerate(flat):
        shared.setdefault(tuple(map(id, jax.tree.leaves(leaf))), []).append(number)
    parts = []
    for places in map(tuple, shared.values()):
        leaf = flat[places[0]][1]
        if is_codebook_array(leaf):
            parts.append(_part_of_levels(places, leaf))
            if scales and leaf.scale is not None:
                unit = np.asarray(leaf.scale).astype(np.float32)
                one = np.ones_like(unit)
                parts.append(_Part(places, "scale", leaf.scale.dtype, unit, one, one / 4, one * 4, one < 0))
        elif named[places[0]] and _is_floating(leaf):
            values = np.asarray(leaf).astype(np.float32)
            unit = _power_of_two(np.sqrt(np.square(values, dtype=np.float64).mean(keepdims=True)))
            ends = np.full_like(values, np.inf)
            parts.append(_Part(places, None, leaf.dtype, unit, values / unit, -ends, ends, ends < 0))
    if dense is not None and all(part.field is not None for part in parts):
        raise ValueError(f"refine: dense={dense!r} is found in the path of no floating leaf that is not compressed")
    return parts


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, ARRAYS) and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _part_of_levels(places: tuple[int, ...], leaf: Any) -> _Part:
    levels = np.asarray(
        fixed_point.decode_on_host(np.asarray(leaf.levels), leaf.codebook_format)
        if leaf.codebook_format
        else leaf.levels
    ).astype(np.float32)
    has_zero = (levels == 0).any(axis=-1, keepdims=True)
    least = np.where(has_zero & (levels >= 0), 0, -np.inf).astype(np.float32)
    most = np.where(has_zero & (levels <= 0), 0, np.inf).astype(np.float32)
    ascending = np.all(np.diff(levels, axis=-1) >= 0, axis=-1, keepdims=True)

    unit = _power_of_two(np.sqrt(np.square(levels, dtype=np.float64).mean(axis=-1, keepdims=True)))
    stored_as = leaf.codebook_format or leaf.levels.dtype
    return _Part(places, "levels", stored_as, unit, levels / unit, least, most, np.asarray(ascending))


def _power_of_two(size: np.ndarray) -> np.ndarray:
    """Returns the powers of two near to some sizes, within normal float32 numbers, and 1 for 0."""
    return np.exp2(np.clip(np.round(np.log2(np.where(size > 0, size, 1))), -126, 127)).astype(np.float32)


def _stored(leaves: Sequence[Any], parts: Sequence[_Part], values: Sequence[Any]) -> list[Any]:
    """Returns the leaves with other values, rounded to their formats, where the old ones were."""
    made = list(leaves)
    for part, value in zip(parts, values, strict=True):
        leaf, exact = made[part.places[0]], np.asarray(value) * part.unit
        old = leaf if part.field is None else getattr(leaf, part.field)
        if isinstance(part.stored_as, QFormat):
            new = fixed_point.encode_on_host(exact, part.stored_as).astype(old.dtype)
        else:
            new = rounded_levels(exact, None, part.stored_as).astype(old.dtype)
        new = jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new
        new = new if part.field is None else replace(leaf, **{part.field: new})
        for place in part.places:
            made[place] = new
    return made


def _stepper(
    programs: Programs, leaves: Sequence[Any], parts: Sequence[_Part], optimizer: Any
) -> Callable[[Any, Any, Any, float], tuple[Any, Any]]:
    """Returns a function of a batch, values, a state and a step's size; it is compiled once for a shape."""
    held = [leaf for leaf in leaves if is_codebook_array(leaf) or isinstance(leaf, ARRAYS)]
    place = [[n for n, leaf in enumerate(held) if any(leaf is leaves[k] for k in part.places)] for part in parts]
    held = jax.tree.map(lambda x: on_automatic(jax.device_put(x)), held)
    compiled: dict[Any, Any] = {}

    def with_values(held: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Returns the dense arrays of the leaves with other values."""
        made = list(held)
        for part, places, value in zip(parts, place, values, strict=True):
            exact = value * part.unit
            rounded = exact + lax.stop_gradient(_rounded(exact, part.stored_as) - exact)  # gradients pass through
            for n in places:
                if part.field is None:
                    made[n] = rounded.astype(held[n].dtype)
                else:
                    made[n] = replace(made[n], **{part.field: rounded}, **_PLAIN if part.field == "levels" else {})
        return [decode(leaf) if is_codebook_array(leaf) else leaf for leaf in made]

    def program_of(batch: Any) -> Any:
        jaxpr = programs.traced(batch).jaxpr

        def outputs(arrays: Sequence[Any]) -> Any:
            return programs.chosen(batch, with_fast_convolutions(jaxpr, arrays, convolved))

        def loss(values: Sequence[Any], held: Sequence[Any], arrays: Sequence[Any]) -> Any:
            exact = outputs(arrays)
            return _divergence(exact, outputs([*with_values(held, values), *arrays[len(held) :]]))

        @jax.jit
        def step(values, state, size, held, arrays) -> tuple[Any, Any]:
            gradients = jax.grad(loss)(values, held, arrays)
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which optax counts on
                updates, state = optimizer.update(gradients, state, values)
            return [_kept(part, v + size * u) for part, v, u in zip(parts, values, updates, strict=True)], state

        return step

    def step(batch: Any, values: Any, state: Any, size: float) -> tuple[Any, Any]:
        key = programs.key(batch)
        if key not in compiled:
            compiled[key] = program_of(batch)
        return compiled[key](values, state, np.float32(size), held, programs.arrays(programs.params, batch))

    return step


_PLAIN = {"codebook_format": None}  # levels in float32 for the time


def _kept(part: _Part, values: Any) -> Any:
    """Returns values within their bounds and in their order."""
    values = jnp.clip(values, part.least, part.most)
    return (
        jnp.where(part.ascending, lax.cummax(values, axis=values.ndim - 1), values) if part.ascending.any() else values
    )


def _rounded(values: Any, stored_as: Any) -> Any:
    """Returns the nearest float32 values of a format."""
    if isinstance(stored_as, QFormat):
        return fixed_point.decode(fixed_point.encode(values, stored_as), stored_as)
    most = min(float(jnp.finfo(stored_as).max), float(jnp.finfo(jnp.float32).max))
    return jnp.clip(values, -most, most).astype(stored_as).astype(jnp.float32)


def _divergence(exact: Any, other: Any) -> Any:
    """Returns the loss of a batch's outputs as `measured` computes it, differentiable."""
    exact, other = exact.astype(jnp.float32), other.astype(jnp.float32)
    if exact.ndim == 0 or exact.shape[-1] == 1:
        return jnp.square(exact - other).sum() / jnp.maximum(jnp.square(exact).sum(), jnp.finfo(jnp.float32).tiny)
    are_shares = (exact >= 0).all() & (jnp.abs(exact.sum(axis=-1) - 1) < 1e-3).all()
    log_p, log_q = (
        jnp.where(are_shares, jnp.log(jnp.maximum(x, 1e-30)), jax.nn.log_softmax(x)) for x in (exact, other)
    )
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()
