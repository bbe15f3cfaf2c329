import numpy as np
import pytest

from evaluation import zeroshot as module
from evaluation.errors import EvaluationError
from evaluation.zeroshot import zero_shot

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")


def test_counts(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2)
    weights = np.eye(6, dtype=np.float32)
    images = weights[[0, 1, 1, 2, 5]]
    label = np.array([0, 1, 0, 2, 4])
    found = zero_shot(images, label, weights, CLASSES)
    assert found["top1"] == 60 and found["interval"][0] < 60 < found["interval"][1]
    assert found["per_class"] == {"ant": 50, "bee": 100, "cat": 100, "eel": 0}
    assert found["confusions"] == [["ant", "bee", 1], ["eel", "fox", 1]]
    assert np.array(found["confusion"])[4, 5] == 1 and np.sum(found["confusion"]) == 5
    assert 60 <= found["top5"] <= 100


def test_few_and_many_classes():
    two = zero_shot(np.eye(2, dtype=np.float32), np.array([0, 1]), np.eye(2, dtype=np.float32), CLASSES[:2])
    assert "top5" not in two and two["top1"] == 100 and two["confusions"] == []
    many = np.eye(101, dtype=np.float32)
    assert "confusion" not in zero_shot(many, np.arange(101), many, [str(i) for i in range(101)])


def test_images_without_labels():
    with pytest.raises(EvaluationError, match="1 of 2 test images have no label"):
        zero_shot(np.eye(2, dtype=np.float32), np.array([0, -1]), np.eye(2, dtype=np.float32), CLASSES[:2])
