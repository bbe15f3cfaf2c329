"""Percentages and their uncertainty."""

import numpy as np
import pytest

from evaluation.probe_lines import class_mean_words
from evaluation.ranks import interval, mean_per_class, mean_per_class_interval


def test_one_class_has_the_interval_of_top1() -> None:
    rank = np.array([0, 0, 3, 1, 0, 0, 0])
    assert mean_per_class_interval(rank, np.full(7, 4)) == interval(rank)


def test_many_images_give_the_textbooks_interval() -> None:
    """Of independent binomials: 1.96 sqrt(sum p (1 - p) / n) / c."""
    counts, shares = np.array([4000, 9000, 20000]), np.array([0.2, 0.5, 0.9])
    truth = np.repeat([0, 2, 3], counts)
    right = np.concatenate([np.arange(n) < p * n for n, p in zip(counts, shares, strict=True)])
    low, high = mean_per_class_interval(np.where(right, 0, 1), truth)
    half = 196 * np.sqrt((shares * (1 - shares) / counts).sum()) / 3
    mean = mean_per_class(np.where(right, 0, 1), truth)
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.02)


def test_it_holds_the_truth_as_often_as_it_says_also_in_small_classes_at_the_edge() -> None:
    draw = np.random.default_rng(0)
    counts, shares = draw.integers(4, 40, 30), draw.beta(2, 0.4, 30)  # most near 1
    truth, held = np.repeat(np.arange(30), counts), 0
    for _ in range(400):
        rank = np.where(draw.random(len(truth)) < shares[truth], 0, 1)
        low, high = mean_per_class_interval(rank, truth)
        held += low <= 100 * shares.mean() <= high
    assert 0.92 <= held / 400 <= 0.99
    low, high = mean_per_class_interval(np.zeros(8, np.int64), np.repeat([0, 1], 4))  # all right tells little
    assert low < 70 and high == 100


def test_the_mean_over_classes_is_told_where_it_is_another_number() -> None:
    found = {"top1": 70.0, "mean_per_class": 60.0, "mean_per_class_interval": [58.02, 61.96]}
    assert class_mean_words(found) == "mean over classes 60.0% (58.0 to 62.0)"
    assert class_mean_words({"top1": 70.0, "mean_per_class": 60.0}) == "mean over classes 60.0%"  # of earlier versions
    assert class_mean_words(found | {"mean_per_class": 70.01}) == class_mean_words({"top1": 70.0}) == ""
