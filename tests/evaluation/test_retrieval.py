import numpy as np
import pytest

from evaluation import retrieval as module
from evaluation.errors import EvaluationError
from evaluation.retrieval import chance, ranks, retrieval


def unit(rng, n, e=8):
    x = rng.normal(size=(n, e)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def world():
    """30 images, 70 texts, each of one image but the last ten, which belong to a second one as well."""
    rng = np.random.default_rng(0)
    images = unit(rng, 30)
    owner = np.sort(np.concatenate([np.arange(30), rng.integers(0, 30, 40)]))
    texts = images[owner] + 0.4 * unit(rng, 70)
    shared = [((owner[j] + 7) % 30, j) for j in range(60, 70)]
    pairs = np.array(sorted([*zip(owner, range(70), strict=True), *shared]))
    return images, (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32), pairs


def test_ranks_are_those_of_sorting(world, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    images, texts, pairs = world
    score = images @ texts.T
    for i, row in enumerate(score):
        right = np.isin(np.argsort(-row), pairs[pairs[:, 0] == i, 1])
        assert ranks(images, texts, pairs)[i] == np.flatnonzero(right)[0]
    for j, column in enumerate(score.T):
        right = np.isin(np.argsort(-column), pairs[pairs[:, 1] == j, 0])
        assert ranks(texts, images, pairs[:, ::-1])[j] == np.flatnonzero(right)[0]


def test_recalls(world):
    found = retrieval(*world)
    images, texts, pairs = world
    score, own = images @ texts.T, np.zeros((30, 70), bool)
    own[tuple(pairs.T)] = True
    hit = np.mean([own[i, np.argsort(-row)[:5]].any() for i, row in enumerate(score)])
    assert found["image_to_text"]["recall@5"] == pytest.approx(100 * hit)
    first = np.mean(own[score.argmax(0), np.arange(70)])
    assert found["text_to_image"]["recall@1"] == pytest.approx(100 * first)
    assert (found["images"], found["texts"], found["captions"]) == (30, 70, 80)


def test_chance_is_what_random_orders_give(world):
    pairs = world[2]
    rng = np.random.default_rng(3)
    runs = [retrieval(unit(rng, 30), unit(rng, 70), pairs) for _ in range(300)]
    for way in ("image_to_text", "text_to_image"):
        for k, expected in runs[0]["chance"][way].items():
            assert np.mean([run[way][k] for run in runs]) == pytest.approx(expected, abs=0.7)
    assert chance(np.array([1]), 30, 1) == pytest.approx(1 / 30) and chance(np.array([2]), 5, 10) == 1
    assert chance(np.array([10, 10]), 30, 3) == pytest.approx(1 - 20 * 19 * 18 / (30 * 29 * 28))


def test_words_of_a_class_can_be_found():
    """100 images of four classes with one text for each class: a model that knows the class is always right."""
    rng = np.random.default_rng(2)
    texts = unit(rng, 4)
    pairs = np.stack([np.arange(100), np.arange(100) % 4], axis=1)
    images = texts[pairs[:, 1]]
    assert retrieval(images + 0.01 * unit(rng, 100), texts, pairs)["text_to_image"]["recall@1"] == 100
    knows = retrieval(images, texts, pairs)
    assert knows["image_to_text"]["recall@1"] == knows["text_to_image"]["recall@1"] == 100
    assert knows["chance"]["image_to_text"] == {"recall@1": 25.0, "recall@5": 100.0, "recall@10": 100.0}
    blind = retrieval(images[:1].repeat(100, 0), texts, pairs)
    assert blind["text_to_image"]["recall@10"] == 0  # all alike is no luck
    assert blind["image_to_text"]["recall@1"] == 25


def test_equal_scores_are_no_luck():
    """Two images whose different texts have one vector: neither has found its own."""
    rng = np.random.default_rng(1)
    images, alone = unit(rng, 3), np.stack([np.arange(3)] * 2, axis=1)
    texts = np.stack([images[0], images[0], images[2]])
    assert ranks(images, texts, alone)[0] == 1
    same = np.repeat(images[:1], 3, axis=0)
    assert ranks(images, same, alone).tolist() == [2, 2, 2]


def test_an_image_without_a_text_is_refused():
    rng = np.random.default_rng(1)
    for pairs in ([[0, 0], [0, 1], [2, 2]], [[0, 0], [1, 1], [2, 1]]):
        with pytest.raises(EvaluationError, match="each with a caption"):
            retrieval(unit(rng, 3), unit(rng, 3), np.array(pairs))
