"""Retrieval both ways: which text belongs to an image, and which image to a text.

Axes: n = images, m = different texts, p = pairs of an image and a text that it has, e = joint width, q, c = those that
ask and those that are found, k = places looked at.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.errors import EvaluationError

KS = (1, 5, 10)
_BLOCK = 1024

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def retrieval(images: Floats, texts: Floats, pairs: Ints) -> dict[str, Any]:
    """Recall at 1, 5 and 10 in percent, and what chance would give, as a result for results.json.

    An image has found a text when one of its own is among the k nearest of all texts; a text has found an image when
    one that has it is among the k nearest of all images. Words that several images share are one text, and right for
    each of them: where no words are shared, this is the usual recall (Faghri et al. 2018, arXiv:1707.05612). What
    scores the same counts against it, so that a model that says the same about everything is not lucky.

    Args:
        images: of length 1, [n e].
        texts: of length 1, all different words, [m e].
        pairs: image and text of each pair, [p 2]; every image and every text is in one.
    """
    counts = [len(np.unique(pairs[:, side])) for side in (0, 1)]
    if len(images) < 2 or counts != [len(images), len(texts)]:
        raise EvaluationError("retrieval needs at least two images, each with a caption")
    ways = {
        "image_to_text": (images, texts, pairs),
        "text_to_image": (texts, images, pairs[:, ::-1]),
    }
    found: dict[str, Any] = {}
    by_chance: dict[str, Any] = {}
    for name, (asking, given, own) in ways.items():
        rank, right = ranks(asking, given, own), np.bincount(own[:, 0], minlength=len(asking))
        found[name] = {f"recall@{k}": 100 * float(np.mean(rank < k)) for k in KS}
        by_chance[name] = {f"recall@{k}": 100 * chance(right, len(given), k) for k in KS}
    return {**found, "chance": by_chance, "images": len(images), "texts": len(texts), "captions": len(pairs)}


def ranks(asking: Floats, given: Floats, own: Ints) -> Ints:
    """How many wrong ones each that asks has above or beside its best right one, [q].

    Args:
        asking: of length 1, [q e].
        given: those to be found, of length 1, [c e].
        own: which ask for which, [p 2], each pair once.
    """
    own = own[np.argsort(own[:, 0], kind="stable")]
    starts = np.searchsorted(own[:, 0], np.arange(len(asking) + 1))
    found = np.empty(len(asking), np.int64)
    for first in range(0, len(asking), _BLOCK):
        block = np.arange(first, min(first + _BLOCK, len(asking)))
        score = np.asarray(asking[block]) @ np.asarray(given).T
        for row, i in enumerate(block):
            right = own[starts[i] : starts[i + 1], 1]
            best = score[row, right].max()
            score[row, right] = -np.inf
            found[i] = np.count_nonzero(score[row] >= best)
    return found


def chance(right: Ints, count: int, k: int) -> float:
    """The recall at k of a random order: how often one of `right` [q] among `count` is in the first k, mean over q."""
    missed = np.ones(len(right))
    for place in range(min(k, count)):
        missed *= np.clip((count - right - place) / (count - place), 0, 1)
    return float(np.mean(1 - missed))
