"""Progress bars in a notebook, whose kernel is stood in for: every step is drawn, in one output, without ipywidgets."""

import builtins
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import nuqjax


class ZMQInteractiveShell:
    """A notebook's shell, by its name."""


@pytest.fixture
def cell(monkeypatch):
    """What a cell shows, one list of drawings for each of its outputs."""
    outputs = []

    def display(drawn, raw, display_id):
        assert raw
        assert display_id
        outputs.append([drawn])
        return SimpleNamespace(update=lambda again, raw: outputs[-1].append(again))

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # as where it is not installed
    return outputs


PARAMS = {f"layer[/{i}]": np.random.default_rng(i).normal(size=(32, 32)).astype(np.float32) for i in range(3)}


def test_a_bar_goes_to_its_end_in_one_output(cell, capsys):
    nuqjax.compress(PARAMS, bits=2, progress=True)
    (drawings,) = cell
    texts = [drawn["text/plain"] for drawn in drawings]
    assert any("1,024 of 3,072 weights" in text for text in texts)
    assert "3,072 of 3,072 weights" in texts[-1]
    assert all(drawn["text/html"].startswith("<pre") for drawn in drawings)
    assert capsys.readouterr() == ("", "")


def test_a_name_is_plain_text_in_a_bar(cell):
    """Neither rich's markup nor what moves a terminal's cursor."""
    nuqjax.compress({"[/red]\x1b[2J": PARAMS["layer[/0]"]}, bits=2, progress=True)
    assert "[/red]\\x1b[2J " in cell[-1][-1]["text/plain"]


def test_a_bar_on_a_stream_names_its_last_step(capsys):
    nuqjax.compress(PARAMS, bits=2, progress=True)
    assert "layer[/2]" in capsys.readouterr().out


def test_bars_of_a_compression_with_data_go_to_their_ends(cell, capsys):
    def model(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return x

    batches = [np.random.default_rng(9 + i).normal(size=(8, 32)).astype(np.float32) for i in range(3)]
    nuqjax.compress(PARAMS, bits=2, fn=model, batches=batches, progress=True)
    (drawings,) = cell
    steps = [word.split("/") for word in drawings[-1]["text/plain"].split() if word.count("/") == 1]
    assert steps
    assert all(done == total for done, total in steps)
    assert capsys.readouterr() == ("", "")
