from experiments.speed.profile_fit import profile


def test_a_fit_takes_as_long_as_all_that_it_calls():
    found = profile(1500, 4, None)
    assert next(name for name, *_ in found) == "_src.fit.methods.fit"
    assert "_src.knq.search.search.partition" in {name for name, *_ in found}
    assert all(calls >= 1 and 0 <= milliseconds <= found[0][2] for _, calls, milliseconds in found)
