import numpy as np
import pytest

from evaluation import retrieval as module
from evaluation.errors import EvaluationError
from evaluation.retrieval import image_ranks, retrieval, text_ranks


def unit(rng, n, e=8):
    x = rng.normal(size=(n, e)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    images = unit(rng, 30)
    owner = np.sort(np.concatenate([np.arange(30), rng.integers(0, 30, 40)]))
    texts = images[owner] + 0.4 * unit(rng, 70)
    return images, (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32), owner


def test_ranks_are_those_of_sorting(world, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    images, texts, owner = world
    score = images @ texts.T
    for i, row in enumerate(score):
        order = owner[np.argsort(-row)]
        assert text_ranks(*world)[i] == np.flatnonzero(order == i)[0]
    for j, column in enumerate(score.T):
        assert image_ranks(*world)[j] == np.flatnonzero(np.argsort(-column) == owner[j])[0]


def test_recalls(world):
    found = retrieval(*world)
    images, texts, owner = world
    score = images @ texts.T
    hit = np.mean([(np.isin(np.argsort(-row)[:5], np.flatnonzero(owner == i))).any() for i, row in enumerate(score)])
    assert found["image_to_text"]["recall@5"] == pytest.approx(100 * hit)
    first = np.mean(score.argmax(0) == owner)
    assert found["text_to_image"]["recall@1"] == pytest.approx(100 * first)
    assert (found["images"], found["texts"]) == (30, 70)


def test_equal_scores_are_no_luck():
    """Two images with the very same text: neither has found its own."""
    rng = np.random.default_rng(1)
    images = unit(rng, 3)
    texts = np.stack([images[0], images[0], images[2]])
    assert text_ranks(images, texts, np.arange(3))[0] == 1
    same = np.repeat(images[:1], 3, axis=0)
    assert image_ranks(same, images, np.arange(3)).tolist() == [2, 2, 2]


def test_an_image_without_a_text_is_refused():
    rng = np.random.default_rng(1)
    for owner in ([0, 0, 2], [0, 1, 1]):
        with pytest.raises(EvaluationError, match="each with a caption"):
            retrieval(unit(rng, 3), unit(rng, 3), np.array(owner))
