"""What features say of themselves: how many directions they use, how evenly they lie, whether neighbours are alike.

Axes: n = images, d = width, k = neighbours.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.bootstrap import percentile_interval, resampled_sums
from evaluation.errors import EvaluationError
from evaluation.knn import nearest, unit
from evaluation.rankme import rankme

_BLOCK = 2048

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LabelFree:
    """How many images and neighbours are looked at.

    Args:
        images: of train, spread evenly over it (RankMe's authors: 25,600).
        k: neighbours of each for the purity.
    """

    images: int = 25_600
    k: int = 10


def uniformity(x: Floats) -> float:
    """log of the mean over pairs of exp(-2 |x_i - x_j|^2), x [n d] at length 1 (Wang and Isola 2020, arXiv:2005.10242).

    0 where all features are the same, about -4 where they cover a sphere of many dimensions evenly.
    """
    points = unit(x)
    total, count = 0.0, len(points)
    for start in range(0, count, _BLOCK):
        similarity = points[start : start + _BLOCK] @ points.T  # |x - y|^2 = 2 - 2 x y
        total += float(np.exp(4 * similarity.astype(np.float64) - 4).sum())
    mean = (total - count) / (count * (count - 1))  # without the pairs of an image and itself
    return float(np.log(max(mean, np.finfo(np.float64).tiny)))


def label_free(x: Floats, label: Ints, config: LabelFree, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """{"rankme", "uniformity", "purity" in percent, "interval" of the purity, "images"} of features x [n d].

    The purity is the mean share of an image's k nearest others (cosine) that have its label [n]; labels are looked at
    for it alone. Its interval is a bootstrap over the images. Where no image has a label (-1) there is neither.

    Raises:
        EvaluationError: there are not more than k images, or features that are not finite.
    """
    if not 1 <= config.k < min(len(x), config.images):
        raise EvaluationError(
            f"label_free looks at {config.k} neighbours among {min(len(x), config.images)} images: "
            "lower it with --set label_free.k=1"
        )
    count = min(config.images, len(x))
    rows = np.arange(count) * len(x) // count
    some, own = np.asarray(x[rows]), label[rows]
    found = {"rankme": rankme(torch.from_numpy(some)), "uniformity": uniformity(some), "images": count}
    if (own < 0).all():
        return found
    _, index = nearest(some, some, config.k + 1, device)
    itself = index == np.arange(count)[:, None]
    itself[~itself.any(axis=1), -1] = True  # more than k images are exactly alike: any of them may go
    others = index[~itself].reshape(count, config.k)
    pure = (own[others] == own[:, None]).mean(axis=1)
    interval = percentile_interval(100 * resampled_sums(pure[:, None], seed)[:, 0] / count)
    return found | {"purity": 100 * float(pure.mean()), "interval": interval}
