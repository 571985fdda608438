"""The documents' tables are made of the results, and a document that differs is found out."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from experiments.documents import guide_pictures, headlines, pareto, tables
from experiments.paper import study
from experiments.paper import tables as paper_tables
from experiments.record.settings import Setting, product
from tests.experiments import small_study

ACCURACY = ["--blocks", "accuracy"]
ROOT = Path(__file__).resolve().parents[3]


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
        "commands": ["python -m experiments.studies.accuracy --network network"],
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
python -m experiments.studies.accuracy --network network
```
"""


def test_the_tables_hold_every_cell(folder, capsys):
    assert tables.main([*ACCURACY, "--results", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == EXPECTED.strip()


def test_writing_then_checking_agrees_and_an_edit_is_found(folder, capsys):
    readme = folder / "README.md"
    readme.write_text("# Title\n<!-- accuracy tables: begin -->\nold\n<!-- accuracy tables: end -->\nend\n")
    arguments = [*ACCURACY, "--results", str(folder)]
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
        tables.main([*ACCURACY, "--results", str(folder), "--check", str(folder / "README.md")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_no_results_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables.main([*ACCURACY, "--results", str(tmp_path)])
    assert "no accuracy_*.json" in capsys.readouterr().err


def _weighting(weighting, bits, top1):
    return {"bits": bits, "granularity": "channel", "weighting": weighting, "top1": top1, "agreement": 0.5}


def _fitted(tool, seconds, excess):
    return {
        "tool": tool, "status": "measured", "seconds": seconds, "excess": excess, "weights_per_second": 4e6 / seconds,
    }  # fmt: skip


@pytest.fixture
def other_results(folder):
    """Results of the other experiments, beside those of the accuracy."""
    sensitivity = {
        "title": "Network",
        "images": 500,
        "calibration_images": 250,
        "commands": ["python -m experiments.studies.sensitivity --network network"],
        "float": {"top1": 0.9},
        "cells": [_weighting("none", 3, 0.25), _weighting("fisher", 3, 0.5), _weighting("fisher", 4, 0.75)],
    }
    (folder / "sensitivity_network.json").write_text(json.dumps(sensitivity))
    data = {
        "title": "Network",
        "images": 500,
        "learned": 100,
        "commands": ["python -m experiments.studies.calibrated --network network"],
        "float": {"bytes": 8000, "top1": 0.9},
        "cells": [
            {**cell, "size": "3", "bits_per_weight": 3.125, "top1": 0.5, "agreement": 0.75, "predicted_kl": None}
            for cell in (
                {"method": "plain", "levels": "uniform", "kl": 0.5},
                {"method": "calibrated", "levels": "knq", "kl": 0.25},
            )
        ],
        "pairs": [{"size": "3", "one": "calibrated knq", "other": "plain uniform", "kl": [-0.25, -0.5, -0.125]}],
    }
    (folder / "calibrated_network.json").write_text(json.dumps(data))
    cell = {"bits": 4, "power": 2.0, "sqnr_db": 20.5, "kl": 0.25, "agreement": 0.5, "top1": 0.75}
    scales = {"title": "Network", "cells": [cell | {"kl_less_largest": [0.125, 0.0, 0.25]}]}
    (folder / "scales.json").write_text(json.dumps({"commands": ["python -m scales"], "networks": [scales]}))
    (folder / "peers_with_data_network.json").write_text(json.dumps({**data, "missing": []}))
    emulation = {
        "network": "network",
        "title": "Network",
        "images": 2000,
        "commands": ["python -m experiments.studies.emulation --network network"],
        "float": {"top1": 0.805},
        "cells": [
            {
                "setting": {"bits": 4, "weight_word": 8, "word": 16},
                "decoded": {"top1": 0.75},
                "emulated": {"top1": 0.5, "output_sqnr_db": 11.04},
                "accumulator_bits": 24,
            }
        ],
    }
    (folder / "emulation_network.json").write_text(json.dumps(emulation))
    times = {"float_seconds": 0.039, "emulated_seconds": 0.051, "ratio": 1.3911, "compile_seconds": 2.44}
    timed = {
        "commands": ["python -m experiments.speed.emulation"],
        "cells": [{"title": "Network", "batch": 32, "word": 8, **times}],
    }
    (folder / "benchmark_emulation.json").write_text(json.dumps(timed))
    shape = {"data": "t3 float32", "values": 4_000_000, "rows": 1, "num_levels": 16}
    coremltools = "coremltools PostTrainingPalettizer"
    row = [_fitted("nuqjax", 0.5, 1e-9), _fitted("b", 12.34, 0.02), {"tool": "c", "status": "skipped: predicted 9 s"}]
    channels = [_fitted("nuqjax", 0.5, 1e-9), _fitted(coremltools, 10.0, None)]
    benchmark = {
        "commands": ["python -m experiments.speed.fit"],
        "platform": {"cores": 2, "machine": "x", "backend": "cpu"},
        "versions": {"jax": "1.0", "absent": None},
        "sections": {
            "rows": [{**shape, "entries": row}, {**shape, "num_levels": 4, "entries": [_fitted("c", 1.0, None)]}],
            "channels": [{**shape, "rows": 10, "entries": channels}],
            "tree": [
                {
                    "data": "VGG-16", "values": 100, "bits": 4, "bytes": 4e6, "peak_bytes": 1e7, "imported": 1.0,
                    "cold": 12.0, "seconds": 3.456,
                }
            ],
            "curve": [
                {**shape, "bytes": 16e6, "peak_bytes": 64e6, "seconds": 0.04, "proven_seconds": 0.08},
            ],
        },
    }  # fmt: skip
    (folder / "benchmark_fit.json").write_text(json.dumps(benchmark))
    calls = {"cases": {"small": {"this version": {"4 bits": [0.5, 0.4, 0]}}}, "commands": ["python"]}
    (folder / "first_call.json").write_text(json.dumps(calls))
    (folder / "paper").mkdir()
    (folder / "paper" / "network.json").write_text(json.dumps(small_study.results()))
    (folder / "paper_with_data").mkdir()
    (folder / "paper_with_data" / "network.json").write_text(json.dumps(small_study.results_with_data()))
    (folder / "paper" / "features.json").write_text(json.dumps(small_study.results(top1=False) | {"title": "Features"}))
    return folder


INTEGERS = """
| network | images | float | index bits | words | codebooks in float | on integers | out | widest sum |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| Network | 2,000 | 80.5 % | 4 | 8 × 16 bits | 75.0 % | 50.0 % | 11.0 dB | 24 bits |

| network | batch | words | float, ms | emulated, ms | ratio | compilation, s |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| Network | 32 | 8 × 8 bits | 39 | 51 | 1.39 | 2.4 |

```sh
python -m experiments.speed.emulation
python -m experiments.studies.emulation --network network
```
"""

OTHERS = """
**Network**, 500 images (float32: top-1 90.0 %), Fisher diagonal of 250 others: top-1 (same first choice as float32).

| weights | channel, 3 bits | channel, 4 bits |
| --- | ---: | ---: |
| none | 25.0 % (50.0 %) |  |
| fisher | 50.0 % (50.0 %) | 75.0 % (50.0 %) |

```sh
python -m experiments.studies.sensitivity --network network
```

One row, seconds:

| data | values | levels | nuqjax | b | c |
| --- | ---: | ---: | ---: | ---: | ---: |
| t3 float32 | 4,000,000 | 16 | 0.500 | 12.3 (2e-02) | predicted 9 s |
| t3 float32 | 4,000,000 | 4 |  |  | 1.00 |

A codebook for each output channel, millions of weights a second:

| data | values | levels | nuqjax | coremltools PostTrainingPalettizer |
| --- | ---: | ---: | ---: | ---: |
| t3 float32 | 4,000,000 in 10 rows | 16 | 8.00 | 0.400 |

t3 float32: 8.00 M weights/s, 20.0 times coremltools PostTrainingPalettizer's 0.400.

A whole tree, in a new process; seconds from its start, imports, loading and compilation included:

| tree | weights | bits | imports, s | result, s | again, s | peak memory, MB | of the tree's bytes |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| VGG-16 | 100 | 4 | 1.00 | 12.0 | 3.46 | 10 | 2.50× |

One row of growing length, 16 levels, each in a new process:

| data | values | s | ns a value | proven, s | ns a value | peak memory, MB | of the row's bytes |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| t3 float32 | 4,000,000 | 0.0400 | 10.0 | 0.0800 | 20.0 | 64 | 4.0× |

Measured on 2 cores (x, cpu): jax 1.0.

```sh
python -m experiments.speed.fit
```
"""


def test_the_other_tables_hold_every_cell(other_results, capsys):
    assert tables.main(["--results", str(other_results), "--blocks", "sensitivity,benchmark"]) == 0
    assert capsys.readouterr().out.strip() == OTHERS.strip()


def test_the_tables_of_integers_hold_every_cell(other_results, capsys):
    assert tables.main(["--results", str(other_results), "--blocks", "emulation"]) == 0
    assert capsys.readouterr().out.strip() == INTEGERS.strip()


SUMMARY = """
Within 1 point of top-1, `knq` takes 0.50 to 0.50 times (median 0.50) what `uniform` takes; half the memory holds \
on 1 of 1 networks against `uniform`. It needs less memory than `enq` on Network. Neither saves as much as 2 % of the \
best fixed point on none of the networks.

Least kilobytes of parameters, tables included, within 1 point of the float network's top-1 (index bits), and their \
ratio with its 95 % interval over the images drawn again.

| network | images | float top-1 | knq | enq | uniform | dfp | knq / uniform | knq / dfp |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| Network | 100 | 80.0 % | 1 (4) | 1 (5) | 2 (5) | none | 0.50 | – |
"""


def test_the_studys_summary_counts_what_its_table_holds(other_results, capsys):
    assert tables.main(["--results", str(other_results), "--blocks", "paper"]) == 0
    assert capsys.readouterr().out.strip() == SUMMARY.strip()


def test_the_studys_tables_hold_every_answer(other_results, capsys):
    assert tables.main(["--results", str(other_results), "--blocks", "study"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "100 images, float32 8,000 bytes, top-1 80.0 % (95 %: 70.0 to 90.0), top-5 100.0 %; 8 cells, jax 1.0 on 2 "
        "cores (x).",
        "| least bytes within points of top-1 | 1 |",
        "| knq | 1,100: 4 bits, tensor; 0.50 of uniform |",
        "| dfp | none |",
        "| least bytes within points of agreement with float | 1 | 2 | 5 | 10 |",
        "| knq | 4 bits, tensor | 8 bits | 79.0 % | 78.0 % | 2.00 [0.00, 2.00] | 98.0 % |",
        "| uniform | tensor | 3 | – | – | – | – |",  # not measured, of 3, 4 and 5 bits
        "| knq | 20.0 / 20.0 dB, 96.0 % | 20.0 / 20.0 dB, 99.0 % |  | 20.0 / 20.0 dB, 100.0 % |",
        "| knq | 4 | 4 | 20.0 | 22.0 | 24.0 | 20.2 | 18.1 |",
        "python -m experiments.paper.study --network network",
    ):
        assert line in printed.splitlines(), line


WITH_DATA = """
Within 0 points of top-1: `knq, data` takes 0.55 times what fixed point takes: half or less on none of the \
networks; beside fixed point, data nothing can be compared.

Within 0.5 points of top-1: `knq, data` takes 0.55 times what fixed point takes: half or less on none of the \
networks; beside fixed point, data nothing can be compared.

Within 1 point of top-1: `knq, data` takes 0.50 times what fixed point takes: half or less on Network (surely \
so on none of the networks); `knq, data` takes 0.90 times what fixed point, data takes: half or less on none \
of the networks.
"""


def test_the_study_with_data_says_where_it_is_a_half(other_results, capsys):
    assert tables.main(["--results", str(other_results), "--blocks", "with_data"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(WITH_DATA[1:])
    for row in (
        "| Network | 0 | 1 (4.5bpw) | none | none | 2 (dfp, 6, per channel) | 0.55 [0.50, 0.55] | – |",
        "| Network | 1 | 1 (3.5bpw) | 1 (4bpw) | 1 (4) | 2 (dfp, 5, per channel) | 0.50 [0.50, 0.55] | 0.90 |",
        "| Network | 100 | 50 | 80.0 % | 8,000 |",
        "python -m experiments.paper.calibrated --network network",
    ):
        assert row in printed.splitlines(), printed


def test_what_was_measured_whole_lacks_nothing():
    whole = small_study.results()
    cells = study.grid(study.METHODS, [4], ["float", "16", "12", "8", "6"], ["tensor", "channel"])
    whole["cells"] = [{"cell": cell.to_dict()} for cell in cells]
    assert paper_tables._missing(whole) == ""
    whole["cells"] = [cell for cell in whole["cells"] if cell["cell"]["codebook_format"] != "fixed:12"]
    assert paper_tables._missing(whole).splitlines()[2:] == [
        "| knq, enq | tensor | – | – | 4 | – | – |",
        "| knq, enq | channel | – | – | 4 | – | – |",
    ]


DATA = """
**Network**: 500 inputs evaluate, 100 others without labels are learned from; float32: 8,000 bytes, top-1 90.0 %.

| levels | how | bits a weight | top-1 | as float | KL | predicted | `knq` with data less this |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
| uniform | by the weights alone | 3.12 | 50.0 % | 75.0 % | 0.5000 |  | -0.2500 [-0.5000, -0.1250] |
| knq | with data, one width | 3.12 | 50.0 % | 75.0 % | 0.2500 |  |  |

```sh
python -m experiments.studies.calibrated --network network
```
"""


def test_forms_with_data_stand_beside_those_without(other_results, capsys):
    assert tables.main(["--results", str(other_results), "--blocks", "data"]) == 0
    assert capsys.readouterr().out.strip() == DATA.strip()


def test_each_network_with_data_has_a_picture(other_results, tmp_path, monkeypatch):
    monkeypatch.setattr(pareto, "RESULTS", other_results)
    pareto.main(tmp_path)
    assert np.ptp(matplotlib.image.imread(tmp_path / "data_network.png")) > 0


STUDY = ("paper", "with_data", "study")


def test_each_document_has_its_own_blocks(other_results, capsys):
    document = other_results / "docs" / "results" / "study.md"
    document.parent.mkdir(parents=True)
    document.write_text("".join(f"<!-- {n} tables: begin -->\n<!-- {n} tables: end -->\n" for n in STUDY))
    assert tables.main(["--results", str(other_results), "--write", str(document)]) == 0
    assert tables.main(["--results", str(other_results), "--check", str(document)]) == 0
    document.write_text(document.read_text().replace("1,100", "1,101", 1))
    assert tables.main(["--results", str(other_results), "--check", str(document)]) == 1
    assert "the study tables differ" in capsys.readouterr().err


def test_a_document_without_tables_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables.main(["--check", str(tmp_path / "other.md")])
    assert "other.md holds no tables; README.md, docs/results/accuracy.md" in capsys.readouterr().err


def test_several_blocks_are_written_and_checked_together(other_results, capsys):
    document = other_results / "all.md"
    names = [name for name in tables.BLOCKS if name not in ("headlines", "study")]
    document.write_text("".join(f"<!-- {name} tables: begin -->\n<!-- {name} tables: end -->\n" for name in names))
    arguments = ["--results", str(other_results), "--blocks", ",".join(names)]
    assert tables.main([*arguments, "--check", str(document)]) == 1
    assert f"the {' and '.join(names)} tables differ" in capsys.readouterr().err
    assert tables.main([*arguments, "--write", str(document)]) == 0
    assert tables.main([*arguments, "--check", str(document)]) == 0
    document.write_text(document.read_text().replace("20.0 times", "21.0 times"))
    assert tables.main([*arguments, "--check", str(document)]) == 1
    assert "the benchmark tables differ" in capsys.readouterr().err


def test_a_cell_measured_twice_is_an_error(other_results, capsys):
    (other_results / "benchmark_fit_again.json").write_text((other_results / "benchmark_fit.json").read_text())
    with pytest.raises(SystemExit):
        tables.main(["--results", str(other_results), "--blocks", "benchmark"])
    assert "section rows of the benchmark has two results for ('t3 float32', 4000000, " in capsys.readouterr().err


def test_unknown_tables_are_an_error(capsys):
    with pytest.raises(SystemExit):
        tables.main(["--blocks", "speed"])
    known = "headlines, accuracy, sensitivity, data, scales, peers, emulation, first_call, benchmark"
    assert f"unknown tables speed: the known are {known}" in capsys.readouterr().err


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_the_documents_hold_what_was_measured(document):
    assert tables.main(["--check", str(ROOT / document)]) == 0


def test_a_headline_that_was_not_measured_is_an_error(other_results, capsys):
    with pytest.raises(SystemExit):
        tables.main(["--results", str(other_results), "--blocks", "headlines"])
    assert "no results of python -m experiments.studies.accuracy for EfficientNet-Lite0" in capsys.readouterr().err


@pytest.mark.versionless  # of Matplotlib, what other pictures use too
def test_the_documents_pictures_are_drawn_of_the_results(tmp_path):
    headlines.draw(tmp_path / "accuracy.png")
    guide_pictures.main(tmp_path)
    for name in ("accuracy", "granularity", "level_formats"):
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert picture.shape == matplotlib.image.imread(ROOT / "docs" / f"{name}.png").shape
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50
