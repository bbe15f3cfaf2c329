"""Examples of retrieval: some images with the texts they find, some texts with the images they find; and pictures.

Axes: n = images, m = different texts, p = pairs of an image and a text of its own, e = joint width.
"""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from evaluation.pictures import picture, spread
from evaluation.retrieval import Floats, Ints

EXAMPLES, TEXTS_SHOWN, IMAGES_SHOWN = 6, 3, 5
LONGEST = 160


class FoundTexts(NamedTuple):
    """An image as a data URI, its nearest texts (text, similarity, right), and the place of the first right one."""

    image: str
    texts: list[tuple[str, float, bool]]
    rank: int


class FoundImages(NamedTuple):
    """A text, its nearest images (data URI, similarity, right), and the place of the first right one."""

    text: str
    images: list[tuple[str, float, bool]]
    rank: int


def retrieval_examples(
    images: Floats, texts: Floats, pairs: Ints, keys: Sequence[str], words: Sequence[str], count: int = EXAMPLES
) -> dict[str, Any]:
    """Examples drawn at random, the same every time, as plain data for results.json.

    Args:
        images: of length 1, [n e].
        texts: of length 1, [m e].
        pairs: image and text of each pair, [p 2].
        keys: of the images.
        words: the texts, all different.
        count: examples each way.
    """
    to_text, to_image = [], []
    for row in spread(len(images), count):
        own = np.isin(np.arange(len(texts)), pairs[pairs[:, 0] == row, 1])
        order, similarity, rank = _sorted(texts @ np.asarray(images[row]), own)
        found = [
            {"text": words[i], "similarity": float(similarity[i]), "right": bool(own[i])} for i in order[:TEXTS_SHOWN]
        ]
        to_text.append({"image": keys[row], "texts": found, "rank": rank})
    for i in spread(len(texts), count, seed=1):
        own = np.isin(np.arange(len(images)), pairs[pairs[:, 1] == i, 0])
        order, similarity, rank = _sorted(np.asarray(images) @ texts[i], own)
        near = [
            {"image": keys[j], "similarity": float(similarity[j]), "right": bool(own[j])} for j in order[:IMAGES_SHOWN]
        ]
        to_image.append({"text": words[i], "images": near, "rank": rank})
    return {"image_to_text": to_text, "text_to_image": to_image}


def example_keys(examples: dict[str, Any]) -> list[str]:
    """Keys of all images that the examples show, each once."""
    shown = [found["image"] for found in examples["image_to_text"]]
    shown += [near["image"] for found in examples["text_to_image"] for near in found["images"]]
    return list(dict.fromkeys(shown))


def draw_retrieval(examples: dict[str, Any], images: dict[str, Tensor]) -> tuple[list[FoundTexts], list[FoundImages]]:
    """What `retrieval_examples` gave as pictures, from the images [c h w] by key."""
    uri = {key: picture(image) for key, image in images.items()}
    return (
        [
            FoundTexts(
                uri[each["image"]],
                [(_short(text["text"]), text["similarity"], text["right"]) for text in each["texts"]],
                each["rank"],
            )
            for each in examples["image_to_text"]
        ],
        [
            FoundImages(
                _short(each["text"]),
                [(uri[near["image"]], near["similarity"], near["right"]) for near in each["images"]],
                each["rank"],
            )
            for each in examples["text_to_image"]
        ],
    )


def _sorted(score: Floats, own: Any) -> tuple[Ints, Floats, int]:
    """Places by falling score, the scores, and which place, from 1, the first of the own has."""
    order = np.argsort(-score, kind="stable")
    return order, score, int(np.argmax(own[order])) + 1


def _short(text: str) -> str:
    return textwrap.shorten(text, LONGEST, placeholder=" …")
