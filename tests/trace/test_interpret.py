"""The interpreter: what it evaluates is what JAX evaluates, and lifted values reach the rules."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nuqjax._src.trace.interpret import Interpreter, Site, bind


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Boxed:
    """A lifted value that holds its array."""

    array: jax.Array

    @property
    def stacked(self):
        return self.array.ndim > 0


class Recorder:
    """An interpreter over boxed values that notes where they were lowered and which rules were called."""

    def __init__(self, rules=()):
        self.lowered = 0
        self.sites: list[Site] = []

        def lower(value, others):
            self.lowered += 1
            return value.array

        def noted(interpreter, site, eqn, *operands):
            self.sites.append(site)
            return bind(eqn, interpreter.lower_all(operands))

        self.interpreter = Interpreter(lambda x: isinstance(x, Boxed), lower, dict.fromkeys(rules, noted))

    def run(self, fn, *args):
        """`fn(*args)` with the first argument boxed."""
        jaxpr = jax.make_jaxpr(fn)(*args)
        return self.interpreter.lower_all(self.interpreter.evaluate(jaxpr, [Boxed(args[0]), *args[1:]]))


@jax.custom_vjp
def _tripled(x):
    return x * 3


_tripled.defvjp(lambda x: (x * 3, None), lambda _, g: (g * 10,))


@jax.custom_jvp
def _doubled(x):
    return x * 2


_doubled.defjvp(lambda p, t: (_doubled(*p), t[0] * 7))

PROGRAMS = {
    "straight": lambda w, x: jnp.sin(w) @ x + w.sum(),
    "jit": lambda w, x: jax.jit(lambda a: a @ x)(w),
    "nested jit": lambda w, x: jax.jit(lambda a: jax.jit(jnp.tanh)(a) @ x)(w),
    "custom_vjp": lambda w, x: _tripled(w) @ x,
    "custom_jvp": lambda w, x: _doubled(w) @ x,
    "remat": lambda w, x: jax.checkpoint(lambda a: jnp.sin(a) @ x)(w),
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda: w @ x, lambda: x @ w),
    "cond on the value": lambda w, x: lax.cond(w.sum() > 0, lambda: w @ x, lambda: x @ w),
    "switch": lambda w, x: lax.switch(2, [lambda: x, lambda: w, lambda: w @ x]),
    "while": lambda w, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(w @ c[1])), (0, x))[1],
    "while, carried": lambda w, x: lax.while_loop(lambda c: c.max() < 9, lambda c: c * 2 + w, w) @ x,
    "scan, constant": lambda w, x: lax.scan(lambda c, _: (jnp.tanh(w @ c), c.sum()), x, None, length=3),
    "scan, scanned": lambda w, x: lax.scan(lambda c, row: (c + row, row.sum()), x[0], w),
    "scan, carried": lambda w, x: lax.scan(lambda c, row: (c @ row, None), w, x[None])[0],
    "scan, reversed": lambda w, x: lax.scan(lambda c, row: (jnp.tanh(c * row), c), x[0], w, reverse=True),
    "output as it came in": lambda w, x: (w, x),
    "constant inside": lambda w, x: w @ jnp.arange(16.0).reshape(4, 4),
}


@pytest.fixture(scope="module")
def operands():
    generator = np.random.default_rng(0)
    return tuple(jnp.asarray(generator.uniform(0.1, 1, (4, 4)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("name", PROGRAMS)
def test_evaluates_as_jax_does(name, operands):
    fn = PROGRAMS[name]
    recorder = Recorder()
    outputs = recorder.run(fn, *operands)
    for got, expected in zip(outputs, jax.tree.leaves(fn(*operands)), strict=True):
        # compiled loops may contract a·b + c otherwise: at most a few roundings of values of magnitude below 2⁶
        np.testing.assert_allclose(got, expected, rtol=0, atol=64 * 2.0**-23)
    assert recorder.lowered > 0


@pytest.mark.parametrize("name", ["jit", "custom_vjp", "custom_jvp", "remat", "cond", "while", "scan, constant"])
def test_goes_inside(name, operands):
    """The dot product inside each higher-order primitive still sees the lifted operand."""
    recorder = Recorder(rules=["dot_general", "mul", "sin", "tanh"])
    recorder.run(PROGRAMS[name], *operands)
    assert recorder.sites, "no rule was called"


def test_untouched_equations_are_bound_whole(operands):
    """Where no lifted value enters, an inner jit stays one equation and a custom derivative survives."""
    w, x = operands

    def fn(w, x):
        return w @ jax.jit(lambda a: jnp.sin(a) * 2)(_tripled(x))

    recorder = Recorder()
    jaxpr = jax.make_jaxpr(lambda w, x: recorder.run(fn, w, x))(w, x)
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert "sin" not in names
    assert names.count("custom_vjp_call") == 1
    gradient = jax.grad(lambda x: recorder.run(fn, w, x)[0].sum())(x)
    np.testing.assert_array_equal(gradient, jax.grad(lambda x: fn(w, x).sum())(x))


@pytest.mark.parametrize(("function", "factor"), [(_tripled, 10.0), (_doubled, 7.0)])
def test_custom_derivatives_survive_a_lifted_operand(function, factor, operands):
    w, _ = operands
    gradient = jax.grad(lambda w: Recorder().run(lambda w: function(w).sum(), w)[0])(w)
    np.testing.assert_array_equal(gradient, np.full_like(w, factor))


def test_custom_jvp_forward_mode(operands):
    w, _ = operands
    _, tangent = jax.jvp(lambda w: Recorder().run(lambda w: _doubled(w), w)[0], (w,), (jnp.ones_like(w),))
    np.testing.assert_array_equal(tangent, np.full_like(w, 7.0))


def test_sites_name_scope_primitive_and_ordinal(operands):
    def fn(w, x):
        with jax.named_scope("encoder"):
            x = w @ x
            x = w @ x
        return jax.jit(lambda a: a @ x)(w)

    recorder = Recorder(rules=["dot_general"])
    recorder.run(fn, *operands)
    assert [str(site) for site in recorder.sites[:2]] == ["encoder:dot_general#0", "encoder:dot_general#1"]
    assert recorder.sites[2].primitive == "dot_general"
    assert recorder.sites[2].scope != "encoder"


def test_frees_what_it_no_longer_needs():
    """Evaluating eagerly holds no more than the live arrays."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def noted(interpreter, site, eqn, x):
        nonlocal most
        [output] = bind(eqn, interpreter.lower_all((x,)))
        alive.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in alive))
        return [Boxed(output)]

    def fn(x):
        for _ in range(10):
            x = jnp.sin(x)
        return x

    jaxpr = jax.make_jaxpr(fn)(jnp.ones(3))
    Interpreter(lambda x: isinstance(x, Boxed), lambda v, _: v.array, {"sin": noted}).evaluate(
        jaxpr, [Boxed(jnp.ones(3))]
    )
    assert most <= 2
