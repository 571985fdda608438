"""The README's tables are made of the results, and a README that differs is found out."""

import json

import pytest

from experiments import tables
from experiments.settings import Setting, product


def _cell(setting: Setting, **numbers):
    fields = {"bytes": 2000, "ratio": 4.0, "bits_per_weight": 8.0, "top1": 0.5, "top5": 0.75, "agreement": 0.9}
    rules = [list(words) for words in setting.rules]
    return {"setting": {**vars(setting), "rules": rules}, **fields, **numbers}


@pytest.fixture
def folder(tmp_path):
    cells = [
        _cell(setting, bits_per_weight=setting.bits + 0.25, top1=setting.bits / 10)
        for setting in product(["knq", "enq"], [4, 3], ["tensor"])
    ]
    cells.append(_cell(Setting("knq", 4, "channel_groups:8", "channel", "bfloat16"), top1=None))
    cells.append(_cell(Setting(bits=3, scale="channel", rules=(("stem", "bits=8"), ("head", "skip=true"))), bytes=1500))
    result = {
        "title": "Network",
        "images": 1000,
        "commands": ["python -m experiments.accuracy --network network"],
        "float": {"bytes": 8000, "top1": 0.625, "top5": 1.0},
        "cells": cells,
    }
    (tmp_path / "accuracy_network.json").write_text(json.dumps(result))
    return tmp_path


EXPECTED = """
**Network**, 1,000 images; float32: 8,000 bytes, top-1 62.5 %, top-5 100.0 %.

| method | codebooks | 3 bits | 4 bits |
| --- | --- | ---: | ---: |
| knq | tensor | 30.0 % (3.25) | 40.0 % (4.25) |
| enq | tensor | 30.0 % (3.25) | 40.0 % (4.25) |
| knq | channel groups of 8, scale per channel, bfloat16 levels |  | – (8.00) |

| method | codebooks | bits | bits a weight | bytes | ratio | top-1 | top-5 | as float |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
| knq | tensor, scale per channel | 3, 8 | 8.00 | 1,500 | 4.00× | 50.0 % | 75.0 % | 90.0 % |

```sh
python -m experiments.accuracy --network network
```
"""


def test_the_tables_hold_every_cell(folder, capsys):
    assert tables.main(["--results", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == EXPECTED.strip()


def test_writing_then_checking_agrees_and_an_edit_is_found(folder, capsys):
    readme = folder / "README.md"
    readme.write_text("# Title\n<!-- accuracy tables: begin -->\nold\n<!-- accuracy tables: end -->\nend\n")
    arguments = ["--results", str(folder)]
    assert tables.main([*arguments, "--check", str(readme)]) == 1
    assert "differ" in capsys.readouterr().err
    assert tables.main([*arguments, "--write", str(readme)]) == 0
    assert tables.main([*arguments, "--check", str(readme)]) == 0
    text = readme.read_text()
    assert text == f"# Title\n<!-- accuracy tables: begin -->\n{EXPECTED[1:]}<!-- accuracy tables: end -->\nend\n"
    readme.write_text(text.replace("40.0 %", "41.0 %", 1))
    assert tables.main([*arguments, "--check", str(readme)]) == 1


@pytest.mark.parametrize(
    ("text", "message"), [("no marks", "are wanted"), ("<!-- accuracy tables: end -->" * 2, "are wanted")]
)
def test_a_readme_without_its_marks_is_an_error(text, message, folder, capsys):
    (folder / "README.md").write_text(text)
    with pytest.raises(SystemExit) as error:
        tables.main(["--results", str(folder), "--check", str(folder / "README.md")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_no_results_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables.main(["--results", str(tmp_path)])
    assert "no accuracy_*.json" in capsys.readouterr().err
