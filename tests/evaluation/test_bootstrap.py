import numpy as np
import pytest

from evaluation.bootstrap import percentile_interval, resampled_sums
from evaluation.ranks import interval


def test_a_share_gets_about_the_interval_that_a_formula_gives() -> None:
    right = (np.arange(400) < 100)[:, None]
    low, high = percentile_interval(100 * resampled_sums(right)[:, 0] / 400)
    assert [low, high] == pytest.approx(interval(np.where(right[:, 0], 0, 1)), abs=0.8)


def test_resamples_are_of_the_same_size_and_repeat() -> None:
    ones = np.ones((37, 2))
    assert (resampled_sums(ones) == 37).all()
    values = np.random.default_rng(0).normal(size=(50, 3))
    assert np.array_equal(resampled_sums(values, seed=4), resampled_sums(values, seed=4))
    assert not np.array_equal(resampled_sums(values, seed=4), resampled_sums(values, seed=5))
    assert resampled_sums(values, resamples=1234).shape == (1234, 3)
