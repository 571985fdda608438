"""Batch-norms of trained networks folded into the layers before them."""

import jax
import numpy as np
import pytest

from experiments import networks
from nuqjax._src.fold.fold import fold_batch_norm
from nuqjax._src.platform.host import x64
from tests.fold.test_fold import primitives


@pytest.mark.parametrize(("name", "size"), [("resnet20", 32), ("tiny_darknet", 64), ("efficientnet_lite0", 64)])
def test_folding_leaves_what_the_network_computes(name, size, data):
    """Folding in float64 leaves float64's rounding; in float32 it costs no more than float32 itself does."""
    module, variables = networks.load(name, data)
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    folded_fn, folded = fold_batch_norm(module.apply, variables, x)
    unfolded = jax.jit(module.apply)
    float32 = [unfolded(variables, x), jax.jit(folded_fn)(folded, x), unfolded(folded, x)]
    names = primitives(jax.make_jaxpr(folded_fn)(folded, x).jaxpr)
    assert not {"sub", "rsqrt", "sqrt"} & set(names)
    assert names.count("mul") == (15 if name == "tiny_darknet" else 0)  # of leaky rectifiers

    with x64():
        wide = jax.tree.map(lambda p: np.asarray(p, np.float64), variables)
        wide_fn, wide_folded = fold_batch_norm(module.apply, wide, x.astype(np.float64))
        exact = jax.jit(module.apply)(wide, x.astype(np.float64))
        float64 = jax.jit(wide_fn)(wide_folded, x.astype(np.float64))
        exact, float64 = np.asarray(exact), np.asarray(float64)
    assert exact.dtype == np.float64
    rounding = np.abs(float32[0] - exact).max()
    assert rounding > 0
    for logits in float32[1:]:
        assert np.abs(logits - exact).max() <= 4 * rounding
    # Rounding errors are in proportion to the unit roundoff, 2⁻²⁹ of float32's; XLA sums in another order, for which
    # five bits are allowed.
    assert np.abs(float64 - exact).max() <= 2.0**-24 * rounding
