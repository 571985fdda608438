"""`docs/messages.md`: what others say of a compressed leaf that they take apart is said as it is written there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import nuqjax

pytestmark = pytest.mark.promotes
PAGE = (Path(__file__).parents[2] / "docs" / "messages.md").read_text(encoding="utf-8")
W = np.linspace(-1, 1, 512, dtype=np.float32).reshape(16, 32)
X = np.ones((2, 16), np.float32)
HOW = "nuqjax.apply(model.apply)(cparams, x)"


def compressed(tree):
    return nuqjax.compress(tree, method="uniform")


def tree():
    return compressed({"w": W, "b": np.zeros(32, np.float32)})


def loss(cparams):
    return nuqjax.apply(lambda p, x: (x @ p["w"] + p["b"]).sum())(cparams, X)


def linen_without_apply():
    cparams = compressed({"params": {"kernel": W, "bias": np.zeros(32, np.float32)}})
    linen.Dense(32).apply(cparams, X)


class Module:
    """What equinox's modules are: a pytree that is called."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return self.weight @ x


def adam_of_the_tree():
    cparams, optimizer = tree(), optax.adam(1e-3)
    optimizer.update(jax.grad(loss, allow_int=True)(cparams), optimizer.init(cparams), cparams)


CASES = {
    "the given initializer is expected to generate shape": linen_without_apply,
    "a CodebookArray is not an operand of JAX's functions": lambda: Module(tree()["w"])(jnp.ones(32)),
    "problematic value is of type <class 'nuqjax.CodebookArray'>": lambda: jax.lax.dot(X, tree()["w"]),
    "a CodebookArray is indexed along its 0 stack axes only": lambda: nnx_module()(X),
    "inputs (input dtype that is a sub-dtype of np.inexact), but got uint8": lambda: jax.grad(loss)(tree()),
    "ufunc 'power' not supported for the input types": adam_of_the_tree,
    "scan got values with different leading axis sizes": lambda: jax.lax.scan(lambda s, p: (s, p), 0, tree()),
    "vmap got inconsistent sizes for array axes to be mapped": lambda: jax.vmap(loss)(tree()),
    "vmap, scan or tree.map took an axis of its arrays that is not a stack axis": lambda: loss(
        jax.tree.map(lambda a: a[:1], tree())
    ),
}


def nnx_module():
    return compressed(nnx.Linear(16, 32, rngs=nnx.Rngs(0)))


def test_every_message_of_the_page_has_its_case():
    assert re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE) == list(CASES)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # XLA's asking for __jax_array__, 3.13
@pytest.mark.parametrize("message", CASES)
def test_what_is_said_is_what_the_page_says(message):
    with pytest.raises(Exception) as caught:  # noqa: PT011 (Flax has its own)
        CASES[message]()
    assert message in str(caught.value)
    if message.startswith("a CodebookArray"):  # asked itself, the leaf says what to do
        assert HOW in str(caught.value)


def test_optimizers_say_nothing():
    """As the page says; should they begin to, it is to be mended."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(optax.adam(1e-3).init(tree()))}
    assert jnp.dtype("uint8") in dtypes
    nnx.Optimizer(nnx_module(), optax.adam(1e-3), wrt=nnx.Param)


def test_levels_are_trained_as_the_page_does():
    found = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], found)
    before, after = found["loss"](nuqjax.codebooks(found["cparams"])), found["loss"](found["levels"])
    assert after < before
    assert (found["trained"]["w"].packed == found["cparams"]["w"].packed).all()


OPERATORS = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b,
    "//": lambda a, b: a // b, "%": lambda a, b: a % b, "**": lambda a, b: a**b, "@": lambda a, b: a @ b,
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
    "neg": lambda a, _: -a, "pos": lambda a, _: +a, "abs": lambda a, _: abs(a),
    "dot": jnp.dot, "where": lambda a, b: jnp.where(True, a, b), "stack": lambda a, b: jnp.stack([a, b]),
    "T": lambda a, _: a.T, "astype": lambda a, _: a.astype("f2"), "sum": lambda a, _: jnp.sum(a),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_no_operation_takes_a_compressed_leaf_without_a_word(name):
    leaf, other = tree()["w"], jnp.ones((16, 32))
    with pytest.raises((TypeError, AttributeError)) as caught:
        OPERATORS[name](leaf, other)
    assert HOW in str(caught.value)


@pytest.mark.parametrize("changed", [lambda a: a[:1], lambda a: a.astype("f4")], ids=["sliced", "trained"])
def test_a_leaf_whose_arrays_were_changed_is_named_by_all_that_decode_it(changed, tmp_path):
    whole = {"a": tree()}
    spoilt = jax.tree.map(changed, whole)
    for call in (
        nuqjax.decompress,
        nuqjax.apply(lambda p: p["a"]["w"] * 2),
        lambda p: nuqjax.calibrate(lambda p, x: x @ p["a"]["w"], p, X),
        lambda p: nuqjax.report(nuqjax.decompress(whole), p),
        lambda p: nuqjax.save(tmp_path / "f", p),
    ):
        with pytest.raises(ValueError, match=r"^(argument 0, )?a/w: "):
            call(spoilt)
