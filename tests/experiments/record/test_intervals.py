"""Paired intervals: near their closed forms, and of nothing but what differs."""

import numpy as np
import pytest

from experiments.record.intervals import paired


def test_of_numbers_the_interval_is_near_the_normal_one():
    rng = np.random.default_rng(1)
    other = rng.exponential(size=400)
    one = other + rng.normal(0.1, 0.5, size=400)
    half = 1.96 * (one - other).std() / 20
    found = paired(one, other)
    assert found.difference == pytest.approx((one - other).mean())
    assert found.low == pytest.approx(found.difference - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.difference + half, abs=0.1 * half)


def test_of_hits_the_interval_is_near_mcnemars():
    only_one, only_other, both, count = 30, 12, 300, 500
    one = np.arange(count) < only_one + both
    other = (np.arange(count) >= only_one) & (np.arange(count) < only_one + both + only_other)
    difference = (only_one - only_other) / count
    half = 1.96 * np.sqrt(only_one + only_other - (only_one - only_other) ** 2 / count) / count
    found = paired(one, other)
    assert found.difference == pytest.approx(difference)
    assert (found.low, found.high) == pytest.approx((difference - half, difference + half), abs=0.1 * half)


def test_equal_forms_have_no_interval_and_a_narrower_share_is_a_narrower_interval():
    hits = np.arange(50) % 3 == 0
    assert paired(hits, hits) == (0, 0, 0)
    wide, narrow = (paired(hits, ~hits, share=share) for share in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.difference < narrow.high < wide.high
    assert paired(hits, ~hits) == wide
