"""The measurement of the first call: what it calls, what it counts, and the table of it."""

import jax
import jax.numpy as jnp

from experiments.documents import tables
from experiments.speed import first_call


def test_the_small_network_has_as_many_weights_as_it_says():
    assert sum(kernel.size for kernel in first_call.small_network().values()) == 142_000


def test_compilations_are_counted_and_calls_on_the_host_have_none():
    first_call.listen()
    assert first_call.measured(lambda: jax.jit(lambda x: x * 3.25)(jnp.ones(7)))[2] >= 1
    for granularity in ("tensor", "channel"):
        found = first_call.TASKS["small"](granularity)
        assert [compilations for _, _, compilations in found.values()] == [0] * len(found)
        assert all(cpu > 0 for cpu, _, _ in found.values())


def test_the_table_has_a_row_for_each_call_and_a_column_for_each_version():
    cases = {
        "small": {"this version": {"4 bits": [0.5, 0.4, 0]}, "the other": {"4 bits": [20.0, 10.0, 51]}},
        "large": {"this version": {"first": [2.0, 1.5, 0]}, "the other": {}},
    }
    made = tables.first_call([{"cases": cases, "commands": ["python -m experiments.speed.first_call"]}])
    assert "| call | this version | the other |" in made
    assert "| small: 4 bits | 0.500 s, 0 | 20.000 s, 51 |" in made
    assert "| large: first | 2.000 s, 0 | – |" in made
