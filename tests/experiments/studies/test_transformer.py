"""The transformers: trained once, each kernel mapped to what it multiplies, and better with data than without."""

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
    return Subject("small", "Small", module, variables, batch(99)[0].repeat(6, 0), held_out[:, :-1], held_out[:, 1:])


def test_data_win_on_a_language_model_and_perplexity_is_told(characters):
    results = transformer.run(
        characters, [Cell("plain", "3"), Cell("calibrated", "3"), Cell("calibrated", "3", "uniform")]
    )
    plain, learned, grid = results["cells"]
    assert learned["kl"] < grid["kl"] < plain["kl"]
    assert learned["bytes"] <= plain["bytes"]
    assert abs(learned["nats"] - results["float"]["nats"]) < abs(plain["nats"] - results["float"]["nats"])
    assert table(results).row_count == 4


def test_every_kernel_of_a_transformer_is_mapped(characters):
    batches = [characters.learned[:8], characters.learned[8:16]]
    _, report = nuqjax.compress(
        characters.variables, fn=characters.module.apply, batches=batches, return_report=True, tolerance=None
    )
    assert set(report.calibration["by_weights_alone"]) == {"params/places"}


def test_images_are_scored_by_their_labels(tmp_path):
    rng = np.random.default_rng(0)
    images = LabelledImages(rng.integers(0, 255, (40, 28, 28, 1)).astype(np.uint8), np.arange(40) % 10)
    recipe = transformer.of_images(images)._replace(
        module=VisionTransformer(patch=14, width=32, layers=1, heads=2), steps=2
    )
    variables = trained(recipe, tmp_path / "vit.npz")
    inputs = transformer.as_inputs(images.pixels)
    assert (inputs.min(), inputs.max()) == (-0.5, pytest.approx(0.5, abs=0.01))
    subject = Subject("vit", "ViT", recipe.module, variables, inputs, inputs, images.labels)
    results = transformer.run(subject, [Cell("plain", "4")])
    assert 0 <= results["float"]["top1"] <= 1
    assert results["cells"][0]["kl"] > results["float"]["kl"] == 0


def test_a_stack_of_random_weights_is_timed_and_told_by_proportion():
    told = stack(1, 3, width=64, count=8)
    assert told["weights"] == 12 * 64**2 + 13 * 64 + 2 * 64
    for way in ("by float inputs", "both ways"):
        assert told[way]["whole"] == pytest.approx(3 * told[way]["seconds"], abs=1)


def test_mistakes_end_with_their_reason(capsys, tmp_path):
    with pytest.raises(SystemExit):
        transformer.main(["--model", "vit", "--source", f"idx:{tmp_path}/missing"])
    assert "missing" in capsys.readouterr().err
