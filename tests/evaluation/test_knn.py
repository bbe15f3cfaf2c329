import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from evaluation import knn
from evaluation.errors import EvaluationError
from evaluation.knn import knn_ranks, nearest
from evaluation.ranks import interval, one_decimal, top

GOLDEN = Path(os.environ.get("TRIVIT_GOLDEN", Path(__file__).parents[1] / "golden"))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("dino_knn_*.json")), ids=lambda p: p.stem)
def test_golden_dino_vote(path: Path) -> None:
    about = json.loads(path.read_text())
    tensors = load_file(path.with_name(about["file"]))
    config = about["config"]
    ranks = knn_ranks(
        tensors["in.train_features"], tensors["in.train_labels"],
        tensors["in.test_features"], tensors["in.test_labels"],
        classes=config["classes"], ks=config["ks"], temperature=config["T"],
    )  # fmt: skip
    for k in config["ks"]:
        expected = about["values"][str(k)]
        assert np.array_equal(ranks[k] == 0, tensors[f"out.correct_top1_k{k}"])
        assert top(ranks[k]) == pytest.approx(expected["top1"], abs=1e-9)
        assert top(ranks[k], 5) == pytest.approx(expected["top5_counting_only_classes_with_votes"], abs=1e-9)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("dino_knn_*.json")), ids=lambda p: p.stem)
def test_golden_vote_as_on_an_accelerator(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "search_faiss", partial(knn.search_torch, device="cpu"))
    monkeypatch.setattr(knn, "SIMILARITY_BYTES", 600 * 4 * 40)
    test_golden_dino_vote(path)


def features(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def test_blocks_do_not_change_what_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = features(300, 16, 0), features(70, 16, 1)
    train[150:] = train[:150]  # every row twice: ties must go to the lower index, across blocks too
    whole = nearest(train, test, 20)
    monkeypatch.setattr(knn, "TRAIN_BLOCK_BYTES", 7 * 16 * 4)
    monkeypatch.setattr(knn, "TEST_BLOCK", 11)
    parts = nearest(train, test, 20)
    assert np.array_equal(whole[1], parts[1])
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-6)
    a, b = torch.nn.functional.normalize(torch.from_numpy(train)), torch.nn.functional.normalize(torch.from_numpy(test))
    np.testing.assert_allclose(parts[0], (b @ a.T).topk(20).values.numpy(), atol=1e-5)


def test_lengths_of_features_do_not_matter() -> None:
    train, test = features(50, 8, 0), features(10, 8, 1)
    scaled = train * np.linspace(0.1, 90, 50, dtype=np.float32)[:, None]
    assert np.array_equal(nearest(train, test, 5)[1], nearest(scaled, 3 * test, 5)[1])


def test_near_neighbours_weigh_more_than_many() -> None:
    train = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    test = np.array([[1, 0.2]], dtype=np.float32)
    label, truth = np.array([1, 0, 0]), np.array([1])
    assert knn_ranks(train, label, test, truth, classes=2, ks=(3,))[3][0] == 0
    assert knn_ranks(train, label, test, truth, classes=2, ks=(3,), temperature=50.0)[3][0] == 1


def test_more_neighbours_than_train_images_is_one_clear_line() -> None:
    with pytest.raises(EvaluationError, match="k = 20 needs at least 20 train images, there are 19"):
        nearest(features(19, 4, 0), features(3, 4, 1), 20)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    bad = features(30, 4, 0)
    bad[7, 2] = value
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        nearest(bad, features(3, 4, 1), 2)
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        nearest(features(30, 4, 1), bad, 2)


def test_interval_holds_the_accuracy_and_narrows() -> None:
    few, many = np.array([0] * 30 + [1] * 70), np.array([0] * 3000 + [1] * 7000)
    assert interval(few)[0] < 30 < interval(few)[1]
    assert interval(few)[1] - interval(few)[0] > 5 * (interval(many)[1] - interval(many)[0])
    assert interval(np.zeros(10, dtype=np.int64))[1] == 100.0


def test_halves_go_up_for_people_and_files_keep_every_digit() -> None:
    shown = [one_decimal(value) for value in (10.25, 10.65, 10.35, np.float64(10.249999999999998), 0.04, 100.0)]
    assert shown == ["10.3", "10.7", "10.4", "10.3", "0.0", "100.0"]
    assert abs(top(np.array([0, 1, 1], dtype=np.int64)) - 100 / 3) < 1e-12
