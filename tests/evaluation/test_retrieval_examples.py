"""Examples of retrieval: right by the words, sorted, and the place of what is not shown."""

import numpy as np
import torch

from evaluation.retrieval_examples import draw_retrieval, example_keys, retrieval_examples

WORDS = ["a cat", "tabby", "a dog", "hound", "a cow"]
PAIRS = np.array([[0, 0], [0, 1], [1, 2], [2, 0], [2, 3], [3, 4]])
KEYS = [f"s.tar/{i}" for i in range(4)]


def unit(rows: list[list[float]]) -> np.ndarray:
    x = np.array(rows, dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


IMAGES = unit([[1, 0, 0], [0, 1, 0], [0.9, 0.1, 0], [0, 0, 1]])
TEXTS = unit([[1, 0.1, 0], [0.5, 0.5, 0], [0, 1, 0.2], [0.2, 1, 0], [1, 1, -1]])


def test_a_text_of_several_images_is_right_for_each() -> None:
    found = retrieval_examples(IMAGES, TEXTS, PAIRS, KEYS, WORDS, count=9)
    assert [each["image"] for each in found["image_to_text"]] == KEYS
    cat, dog, both, cow = (each["texts"] for each in found["image_to_text"])
    assert [(t["text"], t["right"]) for t in cat] == [("a cat", True), ("tabby", True), ("a cow", False)]
    assert [(t["text"], t["right"]) for t in dog] == [("a dog", True), ("hound", False), ("tabby", False)]
    assert both[0] == {**cat[0], "similarity": both[0]["similarity"]}
    assert cat[0]["similarity"] == np.float32(TEXTS[0] @ IMAGES[0])
    assert [each["rank"] for each in found["image_to_text"]] == [1, 1, 1, 5]  # of five different texts
    assert not any(t["right"] for t in cow)
    by_text = {each["text"]: each for each in found["text_to_image"]}
    assert set(by_text) == set(WORDS)
    assert [(n["image"], n["right"]) for n in by_text["a cat"]["images"]] == [
        ("s.tar/2", True), ("s.tar/0", True), ("s.tar/1", False), ("s.tar/3", False)
    ]  # fmt: skip
    assert by_text["a cow"]["rank"] == 4 and by_text["hound"]["rank"] == 2


def test_the_same_examples_every_time_and_no_more_than_asked() -> None:
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(50, 8)).tolist())
    keys, words = [f"s.tar/{i}" for i in range(50)], [f"text {i}" for i in range(50)]
    pairs = np.stack([np.arange(50)] * 2, axis=1)
    first, again = (retrieval_examples(images, images, pairs, keys, words) for _ in range(2))
    assert first == again and len(first["image_to_text"]) == len(first["text_to_image"]) == 6
    assert all(each["rank"] == 1 and each["texts"][0]["right"] for each in first["image_to_text"])
    assert len({each["image"] for each in first["image_to_text"]}) == 6


def test_pictures() -> None:
    found = retrieval_examples(IMAGES, TEXTS, PAIRS, KEYS, [*WORDS[:4], "moo " * 200], count=4)
    keys = example_keys(found)
    assert sorted(keys) == KEYS
    images, texts = draw_retrieval(found, {key: torch.zeros(3, 8, 8, dtype=torch.uint8) for key in keys})
    assert len(images) == len(texts) == 4
    assert all(len(text) <= 160 for each in images for text, _, _ in each.texts)
    assert all(uri.startswith("data:image/png") for each in texts for uri, _, _ in each.images)
