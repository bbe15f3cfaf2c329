"""Retrieval both ways: which text belongs to an image, and which image to a text.

Axes: n = images, m = texts, e = joint width.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.errors import EvaluationError

KS = (1, 5, 10)
_BLOCK = 1024

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def retrieval(images: Floats, texts: Floats, owner: Ints) -> dict[str, Any]:
    """Recall at 1, 5 and 10 in percent, as a result for results.json.

    An image is found by a text when its own score is among the k highest of all images; a text of an image is found
    when one of its texts is among the k highest of all. What scores the same counts against it, so that texts that say
    the same of different images are no luck.

    Args:
        images: of length 1, [n e].
        texts: of length 1, [m e]; several may belong to one image.
        owner: the image of each text, int64 [m], in rising order; every image has at least one.
    """
    if len(images) < 2 or not np.array_equal(np.unique(owner), np.arange(len(images))):
        raise EvaluationError("retrieval needs at least two images, each with a caption")
    to_text, to_image = text_ranks(images, texts, owner), image_ranks(images, texts, owner)
    return {
        "image_to_text": {f"recall@{k}": 100 * float(np.mean(to_text < k)) for k in KS},
        "text_to_image": {f"recall@{k}": 100 * float(np.mean(to_image < k)) for k in KS},
        "images": len(images),
        "texts": len(texts),
    }


def text_ranks(images: Floats, texts: Floats, owner: Ints) -> Ints:
    """How many texts of others an image's best own text has above or beside it, [n]."""
    starts = np.searchsorted(owner, np.arange(len(images) + 1))
    ranks = np.empty(len(images), np.int64)
    for first in range(0, len(images), _BLOCK):
        block = np.arange(first, min(first + _BLOCK, len(images)))
        score = np.asarray(images[block]) @ texts.T
        for row, i in enumerate(block):
            own = slice(starts[i], starts[i + 1])
            best = score[row, own].max()
            score[row, own] = -np.inf
            ranks[i] = np.count_nonzero(score[row] >= best)
    return ranks


def image_ranks(images: Floats, texts: Floats, owner: Ints) -> Ints:
    """How many other images a text has above or beside its own, [m]."""
    ranks = np.empty(len(texts), np.int64)
    for first in range(0, len(texts), _BLOCK):
        some = slice(first, first + _BLOCK)
        score = texts[some] @ np.asarray(images).T
        own = np.take_along_axis(score, owner[some, None], axis=1)
        ranks[some] = (score >= own).sum(1) - 1
    return ranks
