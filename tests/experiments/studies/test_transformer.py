"""The transformers: trained once, each kernel mapped to what it multiplies, and better with data than without."""

import jax
import numpy as np
import pytest

import nuqjax
from experiments.data.images import LabelledImages
from experiments.networks.transformer import CharacterModel, VisionTransformer
from experiments.studies import transformer
from experiments.studies.calibrated import Cell, table
from experiments.studies.transformer import Recipe, Subject, sequences, stack, text, trained


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """A small language model, trained for a few steps."""
    words = text()

    def batch(number):
        found = sequences(words.shown, 8, number)[:, :33]
        return found[:, :-1], found[:, 1:]

    module = CharacterModel(words.alphabet, width=32, layers=1, heads=2, longest=32)
    losses = []
    path = tmp_path_factory.mktemp("weights") / "small.npz"
    variables = trained(Recipe(module, batch, 60, 1e-2), path, lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.5
    assert trained(Recipe(module, batch, 0, 1e-2), path).keys() == variables.keys()  # from the file
    held_out = sequences(words.held_out, 24, 0)[:, :33]
    return Subject(
        "small", "Small", module, variables, sequences(words.shown, 16, 99)[:, :32], held_out[:, :-1], held_out[:, 1:]
    )


def test_data_win_on_a_language_model(characters):
    results = transformer.run(characters, [Cell("plain", "3"), Cell("calibrated", "3")])
    plain, learned = results["cells"]
    assert learned["kl"] < 0.8 * plain["kl"]
    assert learned["bytes"] <= plain["bytes"]
    assert learned["nats"] != plain["nats"] != results["float"]["nats"]
    assert table(results).row_count == 3


def test_every_kernel_of_a_transformer_is_mapped(characters):
    found = nuqjax.calibration.moments(characters.module.apply, characters.variables, [characters.learned[:8]])
    mapped = {path for path, one in found.items() if not isinstance(one, str)}
    kernels = {path for path in found if path.endswith(("kernel", "embedding"))}
    assert len(kernels) == 7  # four of attention, two dense ones, and the table that is also the head
    assert kernels <= mapped


def test_images_are_scored_by_their_labels():
    rng = np.random.default_rng(0)
    images = LabelledImages(rng.integers(0, 255, (40, 28, 28, 1)).astype(np.uint8), np.arange(40) % 10)
    recipe = transformer.of_images(images)._replace(module=VisionTransformer(patch=14, width=16, layers=1, heads=2))
    x, y = recipe.batch(0)
    assert (x.shape, y.shape) == ((128, 28, 28, 1), (128,))
    shapes = jax.eval_shape(recipe.module.init, jax.random.key(0), x[:1])
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 4, shapes)
    inputs = transformer.as_inputs(images.pixels)
    assert (inputs.min(), inputs.max()) == (-0.5, pytest.approx(0.5, abs=0.01))
    subject = Subject("vit", "ViT", recipe.module, variables, inputs, inputs, images.labels)
    results = transformer.run(subject, [Cell("plain", "4")])
    assert 0 <= results["float"]["top1"] <= 1
    assert results["cells"][0]["kl"] > results["float"]["kl"] == 0


def test_digits_that_evaluate_are_not_among_those_of_training():
    shown, held_out = transformer.digits()
    assert (shown.pixels.shape, held_out.pixels.shape) == ((1297, 8, 8, 1), (500, 8, 8, 1))
    assert (shown.pixels.dtype, int(shown.pixels.max())) == (np.uint8, 255)
    assert not {x.tobytes() for x in shown.pixels} & {x.tobytes() for x in held_out.pixels}
    assert set(held_out.labels.tolist()) == set(range(10))
    assert transformer.of_images(shown).module.patch == 2


def test_the_time_of_a_stack_is_told_by_proportion(monkeypatch):
    given = []
    monkeypatch.setattr(nuqjax, "compress", lambda params, batches, **_: given.append((params, batches)))
    told = stack(2, 6, width=64, count=8)
    assert told["weights"] == 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    assert [len(batches) for _, batches in given] == [1, 2]
    assert {"seconds", "cpu_seconds", "whole"} == told["both ways"].keys()


def test_mistakes_end_with_their_reason(capsys, tmp_path):
    with pytest.raises(SystemExit):
        transformer.main(["--model", "vit", "--source", f"idx:{tmp_path}/missing"])
    assert "missing" in capsys.readouterr().err
