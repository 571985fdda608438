"""Scores by hand, intervals by exact enumeration."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.paper import scores
from experiments.paper.scores import outcomes, pack, paired_interval, share_interval, unpack


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_packed_bools_come_back(bools):
    np.testing.assert_array_equal(unpack(pack(np.array(bools))), bools)


def test_outcomes_of_two_images_by_hand():
    reference = np.log(
        np.array([[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125], [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]])
    )
    outputs = reference[:, [1, 0, 2, 3, 4, 5]] + np.array([[3.0], [0.0]])  # a constant does not change probabilities
    found = outcomes(outputs, reference, np.array([1, 5]))
    assert found.top1 is not None
    assert found.top5 is not None
    assert found.kl is not None
    assert found.top1.tolist() == [True, False]
    assert found.top5.tolist() == [True, False]
    assert found.agrees.tolist() == [False, False]
    np.testing.assert_allclose(found.kl, (0.5 - 0.25) * math.log(2), rtol=1e-12)
    same = outcomes(reference, reference, np.array([0, 0]))
    assert same.kl is not None
    assert same.kl.tolist() == [0, 0]
    assert same.agrees.all()
    assert same.sqnr_db is None


def test_sqnr_is_the_ratio_of_powers():
    reference = np.array([[3.0, 4.0]])
    assert outcomes(reference + np.array([[0.0, 0.5]]), reference, None).sqnr_db == pytest.approx(20.0)


def test_features_agree_where_the_nearest_other_image_is_the_same():
    random = np.random.default_rng(0)
    centres = random.normal(size=(4, 8))
    reference = np.repeat(centres, 2, axis=0) + 0.01 * random.normal(size=(8, 8))  # pairs
    assert outcomes(reference * np.arange(1, 9)[:, None], reference, None).agrees.all()  # lengths do not matter
    moved = reference.copy()
    moved[0] = reference[2]
    found = outcomes(moved, reference, None)
    assert not found.agrees[:2].any()  # the first has left, the second has lost its neighbour
    assert found.agrees[4:].all()
    assert found.top1 is None


@pytest.mark.parametrize("count", [20, 40])
@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.02), (0.1, 0.02), (0.3, 0.1), (0.0, 0.0), (0.5, 0.4)])
def test_the_paired_interval_covers_the_truth(lost, gained, count):
    """Every number of images lost and gained, with its probability: coverage is computed, not sampled."""
    covered = 0.0
    for a in range(count + 1):
        for b in range(count + 1 - a):
            before = np.arange(count) < a
            after = (np.arange(count) >= a) & (np.arange(count) < a + b)
            low, high = paired_interval(before, after)
            if low <= lost - gained <= high:
                covered += stats.multinomial.pmf([a, b, count - a - b], count, [lost, gained, 1 - lost - gained])
    # Approximate intervals may miss their level a little at so few images (Bonett and Price report 0.93 and more).
    assert covered >= 0.93


def test_the_paired_interval_knows_the_sign_and_narrows_with_the_discordant_pairs():
    right = np.arange(1000) < 800
    worse = np.arange(1000) < 780
    low, high = paired_interval(right, worse)
    assert 0 < low < 0.02 < high
    assert paired_interval(worse, right) == pytest.approx([-high, -low])
    unpaired = share_interval(right)[1] - share_interval(right)[0]
    assert high - low < unpaired / 2


def test_wilson_s_interval_as_it_is_published():
    """Newcombe (1998), table I: 81 of 263, and 15 of 148."""
    for right, total, expected in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605))):
        assert share_interval(np.arange(total) < right) == pytest.approx(expected, abs=5e-5)


def test_a_summary_holds_what_its_bits_say():
    random = np.random.default_rng(0)
    reference, labels = random.normal(size=(50, 6)), random.integers(0, 6, 50)
    outputs = reference + 0.7 * random.normal(size=(50, 6))
    of_float, measured = (outcomes(x, reference, labels) for x in (reference, outputs))
    found = scores.summary(measured, of_float)
    right, right_before = unpack(found["right"]), unpack(scores.summary(of_float, of_float)["right"])
    assert found["top1"] == right.mean()
    assert found["loss"] == pytest.approx(right_before.mean() - right.mean())
    assert found["loss_interval"] == paired_interval(right_before, right)
    assert found["agreement"] == unpack(found["agrees"]).mean()


def test_outputs_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="1 of 2 outputs are not finite"):
        outcomes(np.array([[0.0, np.nan]]), np.zeros((1, 2)), None)
