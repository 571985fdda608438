"""Results files say what made them."""

import json

from experiments.record.results import keeper


def test_what_is_kept_names_every_command_once_and_the_latest_results(tmp_path):
    keep = keeper(tmp_path / "new" / "r.json", ["first", "second", "first"])
    for cells in ([1], [1, 2]):
        keep({"cells": cells})
        assert json.loads((tmp_path / "new" / "r.json").read_text()) == {
            "commands": ["first", "second"],
            "cells": cells,
        }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


def test_without_a_file_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keeper(None, ["first"])({"cells": []})
    assert not list(tmp_path.iterdir())
