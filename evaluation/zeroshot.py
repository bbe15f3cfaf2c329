"""Zero-shot classification: the class whose texts are nearest to an image (Radford et al. 2021, arXiv:2103.00020).

Axes: n = images, c = classes, e = joint width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.errors import EvaluationError
from evaluation.ranks import interval, rank_of_truth, top

_BLOCK = 8192
_MOST_CLASSES_FOR_A_MATRIX = 100
_CONFUSIONS = 20

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def zero_shot(images: Floats, label: Ints, weights: Floats, classes: Sequence[str]) -> dict[str, Any]:
    """Score images [n e] against classes [c e], both of length 1: a result for results.json, in percent.

    {"top1", "top5" (with more than five classes), "interval" (95%, of top-1), "per_class": name -> top-1, "confusions":
    the most frequent [true, predicted, images], "classes" and "confusion" (up to 100 classes): images by true and
    predicted class}.

    Raises EvaluationError when an image has no label.
    """
    if (label < 0).any():
        raise EvaluationError(f"{int((label < 0).sum()):,} of {len(label):,} test images have no label")
    ranks, predicted = np.empty(len(images), np.int64), np.empty(len(images), np.int64)
    for start in range(0, len(images), _BLOCK):
        some = slice(start, start + _BLOCK)
        logits = np.asarray(images[some]) @ weights.T
        ranks[some], predicted[some] = rank_of_truth(logits, label[some]), logits.argmax(1)
    count = len(classes)
    confusion = np.bincount(label * count + predicted, minlength=count * count).reshape(count, count)
    totals = confusion.sum(1)
    off = np.where(np.eye(count, dtype=bool), 0, confusion).ravel()
    worst = [int(cell) for cell in np.argsort(-off, kind="stable")[:_CONFUSIONS] if off[cell]]
    result: dict[str, Any] = {"top1": top(ranks)}
    if count > 5:
        result["top5"] = top(ranks, 5)
    result["interval"] = interval(ranks)
    result["per_class"] = {
        name: 100 * float(confusion[i, i]) / float(totals[i]) for i, name in enumerate(classes) if totals[i]
    }
    result["confusions"] = [[classes[cell // count], classes[cell % count], int(off[cell])] for cell in worst]
    if count <= _MOST_CLASSES_FOR_A_MATRIX:
        result |= {"classes": list(classes), "confusion": confusion.tolist()}
    return result
