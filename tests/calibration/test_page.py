"""`docs/calibration.md`: its programs run, and give what it says."""

import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.promotes, pytest.mark.slow]  # a user's own function

PAGE = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")


def test_the_programs_of_the_page_run(capsys):
    _, example, budget, refinement = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(example, names)
    (_, alone), (_, learned), (_, one_alone), (_, one_learned) = (
        (int(bits), float(share)) for bits, share in re.findall(r"(\d) ([\d.]+) %", capsys.readouterr().out)
    )
    assert learned > alone + 3
    assert one_learned > one_alone + 10
    exec(budget, names)
    report = names["report"]
    assert report.total["bits_per_weight"] <= 3
    assert report.calibration["measured"]["kl"] < 0.2
    exec(refinement, names)
    after = [float(share) for share in re.findall(r"([\d.]+) %", capsys.readouterr().out)]
    assert after[0] > one_alone + 5
    assert after[1] > one_learned - 1
