"""Bits for each leaf: sensitivities are of other inputs than the moments, and allocations are the best there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax
from nuqjax._src.calibration.widths import WIDTHS
from nuqjax.calibration import allocate, moments, sensitivity


def network(params, x):
    return jnp.tanh(x @ params["a"] + params["bias"][None]) @ params["b"]


def example():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(12, 40)), "b": rng.normal(size=(40, 6)), "bias": rng.normal(size=40)}
    batches = [rng.normal(size=(50, 12)).astype(np.float32) for _ in range(3)]
    return jax.tree.map(lambda x: x.astype(np.float32), params), batches


def test_a_sensitivity_is_the_divergence_of_one_leaf_alone():
    params, batches = example()
    known = moments(network, params, batches[:2])
    found = sensitivity(network, params, batches[2:], known, bits=(3,), min_size=16)
    assert set(found) == {"a", "b"}
    assert set(found["a"]) == set(WIDTHS)
    assert list(found["a"].values()) == sorted(found["a"].values(), reverse=True)
    exact = jax.nn.log_softmax(network(params, batches[2]))
    skipped = nuqjax.compress(
        params, 3, fn=network, batches=batches[:2], rules=[nuqjax.Rule("^b$", skip=True)], min_size=16
    )
    other = jax.nn.log_softmax(network(nuqjax.decompress(skipped), batches[2]))
    alone = float((np.exp(exact) * (exact - other)).sum(-1).mean())
    assert found["a"][3] == pytest.approx(alone, rel=1)  # by fewer batches, and without the refit


def test_batches_of_the_moments_are_refused():
    params, batches = example()
    known = moments(network, params, batches[:2])
    with pytest.raises(ValueError, match="batch 1 was also used for the moments"):
        sensitivity(network, params, [batches[2], batches[0].copy()], known)


def costs(rng, names):
    return {
        name: dict(zip(WIDTHS, np.cumsum(rng.exponential(size=7))[::-1] * rng.exponential(), strict=True))
        for name in names
    }


@pytest.mark.parametrize("seed", range(5))
def test_an_allocation_is_near_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    params = {name: np.zeros((int(rng.integers(30, 90)), 16), np.float32) for name in "abc"}
    table, given = costs(rng, params), {"min_size": 16, "codebook_format": jnp.float16}
    weights = sum(x.size for x in params.values())
    everything = []
    for widths in itertools.product(WIDTHS, repeat=3):
        bits = dict(zip(params, widths, strict=True))
        rules = [nuqjax.Rule(f"^{path}$", bits=b, skip=False) for path, b in bits.items()]
        sizes = nuqjax.plan(params, scale="channel", rules=rules, codebook_format=jnp.float16).nbytes_after
        sizes -= 3 * 16 * 2  # scales are of 16 bits where levels are
        everything.append((sum(table[p][b] for p, b in bits.items()), sizes))
    for bpw in (4.0, 5.5):
        made = allocate(params, table, f"{bpw}bpw", **given)
        assert made.bits_per_weight <= bpw
        assert (made.predicted, made.nbytes) in [(pytest.approx(c), s) for c, s in everything]
        best = min(c for c, s in everything if 8 * s <= bpw * weights)
        assert made.predicted <= 1.5 * best
        smallest = min(s for c, s in everything if c <= made.predicted * (1 + 1e-9))
        again = allocate(params, table, f"kl={made.predicted * (1 + 1e-9)}", **given)
        assert again.nbytes <= 1.1 * smallest
    assert "bits a weight all counted" in str(made)


def test_rules_of_an_allocation_keep_what_the_users_rules_say():
    params = {name: np.ones((64, 32), np.float32) for name in "abc"}
    rules = [nuqjax.Rule("a", scale=None), nuqjax.Rule("c", skip=True)]
    made = allocate(params, costs(np.random.default_rng(0), "ab"), "20bpw", rules=rules)
    assert [rule.pattern for rule in made.rules] == ["^a$", "^b$", "^c$"]
    assert "scale=None" in repr(made.rules[0])
    assert made.rules[2].skip
    nuqjax.plan(params, rules=made.rules)


LAYOUTS = {
    "fp16": {"codebook_format": jnp.float16},
    "codebooks of channels": {"granularity": "channel", "codebook_format": "float8_e4m3fn"},
    "scales of groups": {"scale": nuqjax.InputGroups(5)},
    "words": {"codebook_format": nuqjax.AutoQFormat(8), "granularity": nuqjax.ChannelGroups(8)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_allocation_counts_all_bytes_of_the_tree(layout):
    params, batches = example()
    given = {"min_size": 16, "rules": nuqjax.Rule("b$", bits=3, skip=False)} | LAYOUTS[layout]
    known = moments(network, params, batches[:1])
    made = allocate(params, costs(np.random.default_rng(1), "ab"), "16bpw", moments=known, **given)
    given |= {"rules": made.rules, "return_report": True}
    _, report = nuqjax.compress(params, fn=network, batches=batches[:1], **given)
    assert report.total["nbytes_after"] == made.nbytes
    assert report.total["bits_per_weight"] == pytest.approx(made.bits_per_weight)
