import numpy as np
import pytest

from evaluation.errors import EvaluationError
from evaluation.label_free import LabelFree, label_free, uniformity


def test_uniformity_by_hand_and_at_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.label_free._BLOCK", 7)
    x = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    points = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    squares = np.square(points[:, None] - points[None]).sum(-1)[np.triu_indices(30, 1)]
    assert uniformity(x) == pytest.approx(np.log(np.exp(-2 * squares).mean()), abs=1e-6)
    assert uniformity(np.ones((10, 4), np.float32)) == pytest.approx(0, abs=1e-6)
    sphere = np.random.default_rng(0).normal(size=(500, 400)).astype(np.float32)
    assert uniformity(sphere) == pytest.approx(-4, abs=0.1)


def test_purity_counts_others_of_the_same_label() -> None:
    x = np.array([[1, 0], [1, 0.01], [1, 0.02], [0, 1], [0.01, 1], [0.02, 1]], np.float32)
    pure = label_free(x, np.array([0, 0, 0, 1, 1, 1]), LabelFree(k=2))
    assert pure["purity"] == 100 and pure["interval"] == [100, 100]
    mixed = label_free(x, np.array([0, 0, 1, 1, 1, 0]), LabelFree(k=2))
    assert mixed["purity"] == pytest.approx(100 / 3)
    assert 1 < pure["rankme"] < 2.1


def test_exactly_alike_images_are_not_their_own_neighbours() -> None:
    x, label = np.ones((8, 3), np.float32), np.array([0, 1] * 4)
    found = label_free(x, label, LabelFree(k=2))
    assert found["rankme"] == pytest.approx(1, abs=1e-3)
    assert 0 <= found["purity"] <= 100


def test_a_part_of_the_images_and_too_few() -> None:
    x = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    assert label_free(x, np.zeros(50, np.int64), LabelFree(images=20, k=3))["images"] == 20
    with pytest.raises(EvaluationError, match="10 neighbours among 9 images"):
        label_free(x[:9], np.zeros(9, np.int64), LabelFree())
