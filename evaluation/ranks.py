"""From the rank of the true class to percentages with their uncertainty.

Axes: t = test samples, c = classes.
"""

from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
UNSEEN = -1
"""In place of the rank: the image could be read when features were made, and later could not. It counts nowhere."""


def rank_of_truth(score: NDArray[np.floating[Any]], truth: Ints) -> Ints:
    """Place of the true class in each row of scores [t c], 0 = on top; equal scores go by class number -> [t]."""
    own = np.take_along_axis(score, truth[:, None], axis=1)
    earlier = np.arange(score.shape[1]) < truth[:, None]
    return np.asarray(((score > own) | ((score == own) & earlier)).sum(axis=1), dtype=np.int64)


def top(rank: Ints, k: int = 1) -> float:
    """Percent of samples whose true class is among the first k."""
    return 100 * float(np.mean(rank < k))


def mean_per_class(rank: Ints, truth: Ints) -> float:
    """Top-1 in percent of each class, averaged over the classes that occur; rank and true class [t]."""
    total = np.bincount(truth)
    return 100 * float((np.bincount(truth, rank < 1)[total > 0] / total[total > 0]).mean())


def one_decimal(percent: float) -> str:
    """A number for people; halves go up, 10.25 to 10.3 and 10.65 to 10.7, whatever their binary fractions are."""
    return str(Decimal(repr(round(float(percent), 6))).quantize(Decimal("0.1"), ROUND_HALF_UP))


def interval(rank: Ints) -> list[float]:
    """95% confidence interval of top-1 in percent, for the sampling of test images (Wilson 1927, score interval)."""
    low, high = _wilson(np.array([(rank < 1).sum()]), np.array([len(rank)]))
    return [round(100 * float(low[0]), 6), round(100 * float(high[0]), 6)]


def mean_per_class_interval(rank: Ints, truth: Ints) -> list[float]:
    """95% confidence interval of `mean_per_class`, for the sampling of the test images of each class.

    Wilson's limits l, u of each class's share p make those of their mean: mean p - |p - l| / c and mean p + |u - p| /
    c, with Euclidean norms over the c classes (Zou, Huang and Zhang 2009, Computational Statistics & Data Analysis 53,
    p. 1080, of a linear function of binomial proportions). Unlike the sum of p (1 - p) / n it holds for classes with
    few images, all or none of them right. With one class it is `interval`.
    """
    total = np.bincount(truth)
    right, total = np.bincount(truth, rank < 1)[total > 0], total[total > 0]
    share = right / total
    low, high = _wilson(right, total)
    below, above = (float(np.linalg.norm(share - limit)) / len(share) for limit in (low, high))
    return [round(100 * (float(share.mean()) - below), 6), round(100 * (float(share.mean()) + above), 6)]


def _wilson(right: NDArray[Any], total: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Limits of the shares right / total [c]."""
    p, z = right / total, 1.959964
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * np.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return np.maximum(0.0, centre - half), np.minimum(1.0, centre + half)
