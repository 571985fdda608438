"""The least memory within a budget: against a plain search, and where the answer is known."""

import csv
import itertools

import numpy as np
import pytest

from experiments.paper import answers as paper_answers
from experiments.paper.answers import answers
from experiments.paper.scores import outcomes, summary

COUNT = 400


def cell(method, size, wrong, reference, bits=4, word=None):
    """A cell whose first choice differs from the float network's on the first `wrong` images, which that gets right."""
    logits = reference.copy()
    logits[:wrong] = logits[:wrong, ::-1]
    of_float = outcomes(reference, reference, LABELS)
    fields = {"method": method, "bits": bits, "granularity": "tensor", "codebook_format": "float32", "word": word}
    return {
        "cell": fields,
        "stored_bytes": size,
        "bytes": 2 * size,
        "sqnr_db": 20.0,
        **summary(outcomes(logits, reference, LABELS), of_float),
    }


LABELS = np.zeros(COUNT, int)
REFERENCE = np.tile(np.array([[1.0, 0.0]]), (COUNT, 1))


def results(*cells):
    of_float = outcomes(REFERENCE, REFERENCE, LABELS)
    return {
        "title": "Network",
        "network": "network",
        "images": COUNT,
        "float": {"bytes": 4000, **summary(of_float, of_float)},
        "cells": [cell(*one, REFERENCE) if isinstance(one, tuple) else one for one in cells],
    }


def find(found, method, criterion, budget):
    [answer] = [a for a in found if (a.method, a.criterion, a.budget) == (method, criterion, budget)]
    return answer


def test_the_smallest_cell_within_each_budget():
    # 2 of 400 images are half a point.
    measured = results(
        ("knq", 100, 40), ("knq", 200, 2), ("knq", 300, 0), ("dfp", 250, 3), ("dfp", 400, 2), ("dfp", 800, 0)
    )
    found = answers(measured)
    sizes = {
        (a.method, a.budget): None if a.cell is None else a.cell["stored_bytes"] for a in found if a.criterion == "top1"
    }
    assert sizes == {
        ("knq", 0.0): 300, ("knq", 0.5): 200, ("knq", 1.0): 200,
        ("dfp", 0.0): 800, ("dfp", 0.5): 400, ("dfp", 1.0): 250,
    }  # fmt: skip
    assert find(found, "knq", "top1", 0.5).ratios == {"dfp": 0.5}
    assert find(found, "dfp", "top1", 0.5).ratios == {}  # it is the only baseline
    assert find(found, "knq", "agreement", 5.0).cell["stored_bytes"] == 200
    assert find(answers(measured, "bytes"), "knq", "top1", 1.0).cell["bytes"] == 400


def test_an_answer_is_sure_when_the_whole_interval_is_within():
    found = answers(results(("knq", 100, 3), ("knq", 200, 0), ("dfp", 300, 20)))
    answer = find(found, "knq", "top1", 1.0)
    assert answer.cell["stored_bytes"] == 100
    assert answer.sure["stored_bytes"] == 200  # 0 of 400 lost: at most 0.7 points; 3 lost: up to 1.9
    assert answer.sure["loss_interval"][1] < 0.01
    assert find(found, "knq", "top1", 0.0).sure is None
    assert find(found, "dfp", "top1", 1.0).cell is None
    assert find(found, "knq", "top1", 1.0).ratios == {"dfp": None}


def test_the_search_is_the_plain_one():
    random = np.random.default_rng(0)
    cells = [
        (method, int(random.integers(100, 999)), int(random.integers(0, 12)))
        for method in ("knq", "enq", "uniform", "dfp")
        for _ in range(6)
    ]
    found = answers(results(*cells))
    for method, budget in itertools.product(("knq", "enq", "uniform", "dfp"), (0.0, 0.5, 1.0)):
        within = [size for name, size, wrong in cells if name == method and 100 * wrong / COUNT <= budget]
        answer = find(found, method, "top1", budget)
        assert (answer.cell and answer.cell["stored_bytes"]) == (min(within) if within else None)


def test_a_ratio_that_every_draw_agrees_on_has_an_interval_without_width():
    found = answers(results(("knq", 100, 0), ("dfp", 200, 0)))
    assert find(found, "knq", "top1", 0.0).intervals == {"dfp": [0.5, 0.5]}


def test_a_ratio_near_the_edge_of_a_budget_has_a_wide_interval():
    # 4 of 400 images are exactly a point; drawn again, they are more in some draws, and the next larger cell serves.
    found = answers(results(("knq", 100, 4), ("knq", 150, 0), ("dfp", 200, 0)))
    answer = find(found, "knq", "top1", 1.0)
    assert answer.ratios == {"dfp": 0.5}
    assert answer.intervals == {"dfp": [0.5, 0.75]}


def test_where_a_method_often_has_no_cell_the_ratio_has_no_interval():
    found = answers(results(("knq", 100, 4), ("dfp", 200, 0)))
    answer = find(found, "knq", "top1", 1.0)
    assert answer.ratios == {"dfp": 0.5}
    assert answer.intervals == {"dfp": None}


def test_cells_on_activation_words_do_not_take_part():
    with_word = cell("knq", 10, 0, REFERENCE, word=8)
    assert find(answers(results(("knq", 100, 0), with_word)), "knq", "top1", 0.0).cell["stored_bytes"] == 100


def test_features_are_judged_by_agreement_alone():
    measured = results(("knq", 100, 0))
    measured["float"]["top1"] = None
    assert {answer.criterion for answer in answers(measured)} == {"agreement"}


def test_csv_holds_every_cell(tmp_path):
    measured = results(("knq", 100, 40), ("dfp", 250, 3))
    paper_answers.write_csv(measured, tmp_path / "a" / "cells.csv")
    with (tmp_path / "a" / "cells.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["method"] for row in read] == ["knq", "dfp"]
    assert float(read[0]["loss"]) == pytest.approx(0.1)
    assert [float(read[0][f"loss_{end}"]) for end in ("low", "high")] == measured["cells"][0]["loss_interval"]
    assert read[0]["kl"] != ""
    assert read[0]["word"] == ""
