"""The measurement of running: what it runs is what it says. Times are not tested."""

import jax.numpy as jnp
import numpy as np

from experiments.speed import running


def test_programs_give_what_their_functions_give_and_each_is_timed():
    x = jnp.arange(6.0)
    found = running.program(lambda x: x * 2, x)
    np.testing.assert_array_equal(found.call(), 2 * np.arange(6.0))
    assert found.temporaries >= 0
    taken = running.seconds({"one": found, "other": found}, runs=2)
    assert set(taken) == {"one", "other"}
    assert all(0 < each < 60 for each in taken.values())


def test_the_tables_have_a_row_for_each_case(capsys):
    running.main(["--bits", "3,4", "--batch", "1,2", "--size", "64", "--width", "32", "--blocks", "1"])
    printed = capsys.readouterr().out
    for name in running.LAYOUTS:
        assert name.split()[0] in printed
    assert "M = 2" in printed
    assert running.decoding(64, [1, 5]).row_count == 2
