"""Few labels: logistic regression on a handful of train images of each class, for several draws of them.

The strength of the penalty cannot be chosen, since every labelled image is needed, so it is fixed.

Axes: n = train samples, t = test samples, d = width, c = classes, s = draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.bootstrap import percentile_interval, resampled_sums
from evaluation.errors import EvaluationError
from evaluation.linear import SEARCH_TOLERANCE, LogisticRegression, Scaler, Table, scores
from evaluation.progress import progress_bar
from evaluation.ranks import rank_of_truth

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_BLOCK = 16384


@dataclass(frozen=True)
class FewShot:
    """How many labels, and how often they are drawn.

    Args:
        shots: images of each class.
        shares: of train, class by class, one image of each at least.
        draws: of the images, with seeds seed, seed + 1, ...
        strength: of the penalty in the objective of `linear`.
    """

    shots: Sequence[int] = (1, 5, 10)
    shares: Sequence[float] = (0.01, 0.1)
    draws: int = 5
    strength: float = 0.1

    def check(self) -> None:
        """EvaluationError for what cannot be drawn."""
        if self.draws < 1 or any(k < 1 for k in self.shots) or any(not 0 < share <= 1 for share in self.shares):
            raise EvaluationError("few_shot needs draws >= 1, shots >= 1, and shares in (0, 1]")
        if not (self.shots or self.shares) or not 0 < self.strength < math.inf:
            raise EvaluationError("few_shot needs shots or shares, and a strength above 0")


def draw(label: Ints, shots: int | float, seed: int) -> Ints:
    """Rows of `shots` images of each class (an int), or of a share of each class, at least one; [n] -> sorted rows.

    A class with fewer images gives all that it has.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for value in np.unique(label):
        of_class = rng.permutation(np.flatnonzero(label == value))
        count = shots if isinstance(shots, int) else max(1, round(shots * len(of_class)))
        rows.append(of_class[:count])
    return np.sort(np.concatenate(rows))


def few_shot(
    train: Floats, train_label: Ints, test: Floats, test_label: Ints, *, classes: int, config: FewShot, seed: int,
    device: str = "cpu", progress: bool = True,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Top-1 in percent for each number of labels: {"5": {"top1", "interval", "of_draws", "images"}, ..., "1%": ...}.

    The interval is a bootstrap over test images and draws together.

    Raises:
        EvaluationError: no class at all has so many images, or features that are not finite.
    """
    config.check()
    most = int(np.bincount(train_label).max())
    if too_many := [k for k in config.shots if k > most]:
        raise EvaluationError(
            f"few_shot with {too_many[0]} images of each class: no class of train has more than {most}; "
            "lower it with --set few_shot.shots=1"
        )
    sizes: list[int | float] = [*config.shots, *config.shares]
    found: dict[str, dict[str, Any]] = {}
    with progress_bar(len(sizes) * config.draws, "fit", "few_shot", progress) as bar:
        for size in sizes:
            right, images = np.empty((len(test), config.draws), dtype=bool), []
            for i in range(config.draws):
                rows = draw(train_label, size, seed + i)
                images.append(len(rows))
                right[:, i] = _fit(train[rows], train_label[rows], test, test_label, classes, config.strength, device)
                bar.update()
            name = str(size) if isinstance(size, int) else f"{100 * size:g}%"
            found[name] = _result(right, seed) | {"images": int(np.mean(images))}
    return found


def _fit(
    x: Floats, label: Ints, test: Floats, test_label: Ints, classes: int, strength: float, device: str
) -> NDArray[np.bool_]:
    scaler = Scaler.of(x)
    table = Table(x, label, scaler, np.arange(len(label)), device)
    weight = LogisticRegression(table, classes).fit(strength, tolerance=SEARCH_TOLERANCE).point
    right = np.empty(len(test), dtype=bool)
    for start in range(0, len(test), _BLOCK):
        some = slice(start, start + _BLOCK)
        logits = scores(scaler(test[some]).to(device), weight).cpu().numpy()
        right[some] = rank_of_truth(logits, test_label[some]) < 1
    return right


def _result(right: NDArray[np.bool_], seed: int) -> dict[str, Any]:
    """Of which draws [t s] got which test images right."""
    of_draws = [100 * float(share) for share in right.mean(axis=0)]
    sums = 100 * resampled_sums(right, seed) / len(right)  # [r s]
    picks = np.random.default_rng(seed + 1).integers(0, right.shape[1], size=sums.shape)
    samples = np.take_along_axis(sums, picks, axis=1).mean(axis=1)
    return {"top1": float(np.mean(of_draws)), "interval": percentile_interval(samples), "of_draws": of_draws}
