"""The survey of nasty rows: the search alone misses none of them, and the proof holds for all."""

import pytest

from experiments.studies.optimality import FAMILIES, survey


@pytest.mark.slow
@pytest.mark.versionless  # NumPy's arithmetic on many rows; `test_fit_laws` draws of the same
@pytest.mark.parametrize(("length", "rows", "weighted"), [(200, 16, False), (600, 9, True)])
def test_no_row_is_missed_or_unproven(length, rows, weighted):
    found = survey([4, 128], {length: rows}, seed=1, weighted=weighted)
    assert len(found) == 2 * len(FAMILIES)
    for cell in found:
        assert not cell["missed"], cell
        assert not cell["unproven"], cell
