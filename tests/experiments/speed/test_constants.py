"""Tuned constants: those that are measured exist, have the values of the code again afterwards, and matter."""

import pytest

from experiments.speed import constants
from experiments.speed.constants import CONSTANTS, Constant


@pytest.mark.parametrize("constant", CONSTANTS, ids=lambda constant: f"{constant.module}.{constant.name}")
def test_constants_exist_and_are_tried_with_other_values(constant):
    value = getattr(constants.inner(constant.module), constant.name)
    assert set(constant.others) - {value}
    assert constant.tasks


def test_each_value_is_measured_and_the_one_in_the_code_comes_back():
    from nuqjax._src.calibration import stages

    own, seen = stages._NEIGHBOURS, []

    def make():
        return lambda: seen.append(stages._NEIGHBOURS) or float(stages._NEIGHBOURS)

    found = constants.measured(Constant("calibration.stages", "_NEIGHBOURS", (own, own + 4), {}), make, runs=2)
    assert found == {own: float(own), own + 4: float(own + 4)}
    assert sorted(seen) == [own] * 3 + [own + 4] * 3
    assert own == stages._NEIGHBOURS


def test_an_unknown_name_is_told():
    with pytest.raises(SystemExit, match="no such constant; there are"):
        constants.main(["--only", "_NOTHING"])
