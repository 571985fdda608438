"""Folds batch-norms that run at inference into the convolutions and dense layers before them.

scale · (kernel ∗ x) + offset = (scale · kernel) ∗ x + offset: the scale goes into the kernel's output channels, and one
addition of the offset remains (Jacob et al., arXiv 1712.05877, section 3.2). Batch-norms are found in the jaxpr, so the
framework does not matter.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from nuqjax._src.fold.chains import Bias, Chain, find, passed, positions
from nuqjax._src.fold.program import SCALING, Flat, Values, bind_in, flat, flatten, inner_batch_norms, scoped, wide
from nuqjax._src.fold.solver import Solver
from nuqjax._src.leaf.codebook_array import is_codebook_array
from nuqjax._src.leaf.paths import path_name
from nuqjax._src.trace.operations import MOVING
from nuqjax._src.trace.traced import Traced, trace, write_changes


def fold_batch_norm(
    fn: Callable[..., Any], params: Any, *inputs: Any, skip: str | Sequence[str] = (), **options: Any
) -> tuple[Callable[..., Any], Any]:
    """Folds the batch-norms of `fn` into the kernels of the convolutions and dense layers that they follow.

    A batch-norm is any chain of additions, subtractions, multiplications and divisions by expressions of parameters.
    It follows a convolution or a dot whose kernel is a parameter, and varies along the output channels alone. One that
    takes its statistics from the batch is left alone. Scale and offset are composed in float64.

    Fold before `nuqjax.compress`. `folded_fn` traces `fn` again on each call: put it under `jax.jit`.

    Args:
      fn: a function that JAX can trace: `fn(params, *inputs)`.
      params: a tree of arrays.
      *inputs: example inputs, or `jax.ShapeDtypeStruct`s: only the shapes matter, and the batch size does not.
      skip: regular expressions. A batch-norm is left alone if one of them is found in the path of a leaf that it or
        its kernel uses, or in its scopes.
      **options: further arguments of `fn`; they are also defaults for the arguments of `folded_fn`.

    Returns:
      `folded_fn` and `folded_params`. `folded_fn(folded_params, *inputs)` equals `fn(params, *inputs)` up to rounding,
      with one addition in place of each batch-norm. `folded_params` has the structure, shapes and dtypes of `params`.
      The kernels are scaled. The offset is in the layer's own bias, else in the batch-norm's, else, negated, in its
      mean. The other leaves of the batch-norm become an identity (scale 1, mean 0, var 1 − epsilon), so that
      `fn(folded_params, *inputs)` is the same up to rounding, too; constants and leaves used elsewhere may prevent it.

    Raises:
      ValueError: a batch-norm (here: a product of activations by an expression with the square root of a parameter)
        cannot be folded (the message names its scope, its leaves and the reason); two batch-norms need different values
        in one leaf; an expression in `skip` is wrong or matches no batch-norm; a leaf is compressed or is not an array
        of numbers. `folded_fn` raises it for arguments with which `fn` has other batch-norms, and where it cannot write
        back what `fn` changes in place.

    >>> import jax, jax.numpy as jnp
    >>> def predict(params, x):
    ...     y = x @ params["kernel"] - params["mean"]
    ...     return y * (params["scale"] / jnp.sqrt(params["var"] + 1e-3)) + params["bias"]
    >>> params = {name: jnp.array([0.5, 2.0]) for name in ("mean", "scale", "var", "bias")}
    >>> params["kernel"] = jnp.eye(3, 2)
    >>> folded_predict, folded_params = fold_batch_norm(predict, params, jnp.ones((1, 3)))
    >>> bool(jnp.allclose(folded_predict(folded_params, jnp.ones((4, 3))), predict(params, jnp.ones((4, 3)))))
    True
    >>> [eqn.primitive.name for eqn in jax.make_jaxpr(folded_predict)(folded_params, jnp.ones((4, 3))).eqns]
    ['dot_general', 'broadcast_in_dim', 'add']
    """
    skipper = _Skip(skip)
    program = _read(fn, (params, *inputs), options)
    leaves = program.parameters()
    chains = _chains(program.flat, skipper, strict=True)
    skipper.check()
    folded = _fold(program.flat, chains, leaves)
    expected = _signature(program.flat, chains)

    def folded_fn(*args, **kwargs) -> Any:
        program = _read(fn, args, options | kwargs)
        chains = _chains(program.flat, skipper, strict=False)
        if _signature(program.flat, chains) != expected:
            raise ValueError("with these arguments the function has other batch-norms than the folded ones")
        results = _evaluate(program.flat, chains, [x for _, x in program.traced.arrays])
        count = program.traced.outputs.num_leaves
        write_changes(program.traced, args, options | kwargs, results[count:], _CALLER)
        return jax.tree.unflatten(program.traced.outputs, results[:count])

    update = {program.position[var]: array for var, array in folded.items()}
    values, structure = jax.tree.flatten(params)
    new = [_like(x, update[n]) if n in update else x for n, x in enumerate(values)]
    return functools.wraps(fn)(folded_fn), structure.unflatten(new)


def _like(leaf: Any, array: np.ndarray) -> Any:
    """Returns an array with the dtype and the placement of a leaf."""
    array = array.astype(leaf.dtype)
    return jax.device_put(array, leaf.sharding) if isinstance(leaf, jax.Array) else array


class _Skip:
    """Decides which batch-norms to leave alone."""

    def __init__(self, patterns: str | Sequence[str]) -> None:
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self.unused = set(self.patterns)
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"skip={pattern!r}: not a regular expression: {error}") from error

    def __call__(self, names: Sequence[str]) -> bool:
        found = {pattern for pattern in self.patterns if any(re.search(pattern, name) for name in names)}
        self.unused -= found
        return bool(found)

    def check(self) -> None:
        """Raises ValueError for a pattern that has matched nothing."""
        for pattern in self.patterns:
            if pattern in self.unused:
                raise ValueError(f"skip={pattern!r} matches no leaf and no scope of a batch-norm")


@dataclass(frozen=True)
class _Program:
    """A function read for folding.

    Attributes:
      flat: its equations.
      traced: the traced function that they come from.
      position: for each variable that is a leaf of the parameters, its number among all leaves.
    """

    flat: Flat
    traced: Traced
    position: dict[Any, int]

    def parameters(self) -> dict[Any, np.ndarray]:
        """Returns the leaves of the parameters by variable, floats as float64."""
        inputs = dict(zip(self.flat.jaxpr.jaxpr.invars, self.traced.arrays, strict=True))
        for var, name in self.flat.leaves.items():
            x = inputs[var][1]
            if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
                raise ValueError(f"leaf {name!r} is a {type(x).__name__}, but its values are needed: fold outside jit")
        return {var: wide(inputs[var][1]) for var in self.flat.leaves}


def _read(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Program:
    """Reads the equations of a function for arguments of these shapes."""
    for path, x in jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_codebook_array)[0]:
        if is_codebook_array(x):
            raise ValueError(
                f"leaf {path_name(path[2:])!r} is compressed: fold first; then wrap folded_fn in nuqjax.apply"
            )
    traced = trace(
        fn, args, kwargs, lambda x: isinstance(x, jax.ShapeDtypeStruct), lambda x: x.sharding, caller=_CALLER
    )
    is_leaf = [path[:2] == _FIRST and jnp.issubdtype(x.dtype, np.number) for path, x in traced.arrays]
    names = [path_name(path[2:]) or "params" for path, _ in traced.arrays]
    roles = ["parameter" if leaf else "activation" for leaf in is_leaf]
    program = flat(flatten(traced.jaxpr), roles, names)
    if any(program.eqns[number].primitive.name == "scan" for number, _ in inner_batch_norms(program)):
        program = flat(flatten(traced.jaxpr, unroll=True), roles, names)
    numbers = {path: n for n, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(args[0])[0])}
    inputs = zip(program.jaxpr.jaxpr.invars, traced.arrays, is_leaf, strict=True)
    position = {var: numbers[path[2:]] for var, (path, _), leaf in inputs if leaf}
    return _Program(program, traced, position)


_CALLER = "fold_batch_norm"
_FIRST = (jax.tree_util.SequenceKey(0), jax.tree_util.SequenceKey(0))


def _chains(program: Flat, skip: _Skip, strict: bool) -> list[Chain]:
    """Returns the chains to fold, which depend on shapes alone.

    Raises:
      ValueError: `strict` is true and a batch-norm cannot be folded.
    """
    shapes = {var: np.broadcast_to(np.float64(1), var.aval.shape) for var in program.leaves}
    chains, refused = find(program, Values(program, shapes), skip)
    if not strict:
        return chains
    lines = []
    for steps, reason in refused:
        normalising = [s for s in steps if s.op in SCALING and program.normalises(s.operand)]
        if normalising:
            leaves = sorted({program.leaves[v] for step in steps for v in program.leaves_of(step.operand)})
            where = program.scope(normalising[0].number) or "(top)"
            lines.append(f"{where} (leaves {', '.join(leaves)}): {reason}")
    for number, scope in inner_batch_norms(program):
        if not skip([scope, program.scope(number)]):
            name = program.eqns[number].primitive.name
            lines.append(f"{scope or program.scope(number) or '(top)'}: it is inside a {name}")
    if lines:
        raise ValueError(
            "cannot fold these batch-norms (skip= leaves them alone):\n" + "\n".join(f"  {line}" for line in lines)
        )
    return chains


def _signature(program: Flat, chains: Sequence[Chain]) -> list[Any]:
    """Returns what must be the same in two programs for the folded parameters to be valid in both."""
    return [
        (
            program.leaves[chain.leaf],
            [(step.op, sorted(program.leaves[v] for v in program.leaves_of(step.operand))) for step in chain.steps],
            chain.bias and (program.leaves[chain.bias.leaf], chain.bias.negative),
        )
        for chain in chains
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Parameters.


def _fold(program: Flat, chains: Sequence[Chain], leaves: Mapping[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """Returns the new values of the leaves that change.

    Raises:
      ValueError: an entry of a leaf would need two values.
    """
    values = Values(program, leaves)
    scales: dict[Any, np.ndarray] = {}
    offsets: dict[Any, np.ndarray] = {}
    for into, leaf, where, entries in _entries(program, chains, values, scales, offsets):
        into.setdefault(leaf, np.ones(leaf.aval.shape) if into is scales else leaves[leaf].copy())
        into[leaf].reshape(-1)[where] = entries
    for into, leaf, where, entries in _entries(program, chains, values, scales, offsets):
        if not np.array_equal(into[leaf].reshape(-1)[where], np.broadcast_to(entries, where.shape), equal_nan=True):
            raise ValueError(
                f"leaf {program.leaves[leaf]!r} is used more than once, and its batch-norms need different values for "
                "it (skip= leaves them alone)"
            )
    new = offsets | {leaf: leaves[leaf] * scale for leaf, scale in scales.items()}
    identity = _identity(program, chains, leaves, frozenset(new))
    return new | {leaf: np.full(leaf.aval.shape, value) for leaf, value in identity.items()}


def _entries(
    program: Flat, chains: Sequence[Chain], values: Values, scales: dict, offsets: dict
) -> Iterator[tuple[dict, Any, np.ndarray, np.ndarray]]:
    """Yields which entries of which leaf get which scale (into `scales`) or offset (into `offsets`)."""
    for chain in chains:
        scale, offset = chain.compose(values)
        where = np.broadcast_to(positions(program, chain.leaf, chain.path), chain.kernel.aval.shape)
        yield scales, chain.leaf, where, np.broadcast_to(scale, where.shape)
        if bias := chain.bias:
            where = chain.of(bias.number, positions(program, bias.leaf, bias.path))
            yield offsets, bias.leaf, where, np.broadcast_to(-offset if bias.negative else offset, where.shape)


def _identity(
    program: Flat, chains: Sequence[Chain], leaves: Mapping[Any, np.ndarray], taken: frozenset[Any]
) -> dict[Any, float]:
    """Returns values of the chains' other leaves with which `fn` multiplies by 1 and adds 0, where there are such."""
    skipped = passed(chains)
    live = program.live(skipped)
    fixed = {
        leaf
        for leaf in program.leaves
        if not jnp.issubdtype(leaf.aval.dtype, jnp.floating) or program.users(leaf, skipped, live)
    }
    solver = Solver(program, leaves, frozenset(fixed) - taken, taken, {})
    for chain in chains:
        trial = Solver(program, leaves, solver.fixed, taken, dict(solver.known))
        turned = any(step.op in ("neg", "from") for step in chain.steps)
        if not turned and all(trial.solve(atom, target) for atom, target in _targets(program, chain)):
            solver = trial
    return solver.known


def _targets(program: Flat, chain: Chain) -> Iterator[tuple[Any, float]]:
    """Yields a chain's operands and the values that make it an identity except for its bias; factors first."""
    for step in chain.steps:
        if step.op in SCALING:
            yield step.operand, 1
    for step in chain.steps:
        if chain.bias and step.number == chain.bias.number:
            yield from ((atom, 0) for atom in _beside(program, chain.bias))
        elif step.op in ("add", "sub"):
            yield step.operand, 0


def _beside(program: Flat, bias: Bias) -> Iterator[Any]:
    """Yields the values that are added to a bias's leaf on the way to its operand."""
    var = bias.leaf
    for number in bias.path:
        eqn = program.eqns[number]
        yield from (v for v in eqn.invars if v is not var)
        [var] = eqn.outvars


# ---------------------------------------------------------------------------------------------------------------------
# The function.


def _evaluate(program: Flat, chains: Sequence[Chain], arrays: Sequence[Any]) -> list[Any]:
    """Computes the outputs, with one addition of the bias's leaf in place of each chain."""
    inner = program.jaxpr.jaxpr
    skipped, biases = passed(chains), {c.bias.number: c.bias for c in chains if c.bias}
    live = program.live(skipped)
    env: dict[Any, Any] = dict(zip(inner.constvars, program.jaxpr.consts, strict=True))
    env.update(zip(inner.invars, arrays, strict=True))
    for number, eqn in enumerate(inner.eqns):
        if number in biases:
            outputs = [_add(program, biases[number], env[skipped[number]], env[biases[number].leaf])]
        elif number in skipped:
            outputs = [env[skipped[number]]]
        elif number in live:
            operands = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
            outputs = bind_in(program.scope(number), eqn, operands)
        else:
            continue
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [v.val if isinstance(v, core.Literal) else env[v] for v in inner.outvars]


def _add(program: Flat, bias: Bias, value: Any, offset: Any) -> Any:
    """Returns the value plus (or minus) the offset that a bias's leaf holds."""
    for number in bias.path:
        eqn = program.eqns[number]
        if eqn.primitive.name in MOVING:
            [offset] = bind_in(program.scope(number), eqn, [offset])
    with scoped(program.scope(bias.number)):
        return (jnp.subtract if bias.negative else jnp.add)(value, offset)
