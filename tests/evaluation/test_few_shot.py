import numpy as np
import pytest

from evaluation.errors import EvaluationError
from evaluation.few_shot import FewShot, draw, few_shot


def clouds(each: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Four classes around points 3 apart in 8 dimensions."""
    label = np.repeat(np.arange(4), each)
    noise = np.random.default_rng(seed).normal(0, spread, (len(label), 8))
    return (3 * np.eye(8)[label] + noise).astype(np.float32), label


def test_draws_are_of_each_class_and_follow_the_seed() -> None:
    label = np.repeat([0, 1, 2], [50, 20, 3])
    assert np.bincount(label[draw(label, 5, 0)]).tolist() == [5, 5, 3]
    assert np.bincount(label[draw(label, 0.1, 0)]).tolist() == [5, 2, 1]
    assert np.array_equal(draw(label, 5, 1), draw(label, 5, 1))
    assert not np.array_equal(draw(label, 5, 1), draw(label, 5, 2))
    assert len(np.unique(draw(label, 5, 1))) == 13


def test_more_labels_know_more_and_the_numbers_repeat() -> None:
    (x, label), (test, truth) = clouds(100, 0), clouds(50, 1)
    config = FewShot(shots=(1, 10), shares=(0.5,), draws=4)
    found = few_shot(x, label, test, truth, classes=4, config=config, seed=0, progress=False)
    assert (found["1"]["images"], found["10"]["images"]) == (4, 40)
    assert found["50%"]["images"] == 200
    assert 30 < found["1"]["top1"] < found["10"]["top1"] - 3 < found["50%"]["top1"]
    for each in found.values():
        assert each["interval"][0] < each["top1"] < each["interval"][1]
        assert len(each["of_draws"]) == 4 and np.mean(each["of_draws"]) == pytest.approx(each["top1"])
    assert len(set(found["1"]["of_draws"])) > 1, "draws differ"
    again = few_shot(x, label, test, truth, classes=4, config=config, seed=0, progress=False)
    assert again == found


def test_one_draw_leaves_the_sampling_of_test_images() -> None:
    (x, label), (test, truth) = clouds(20, 0, 2), clouds(100, 1, 2)
    config = FewShot(shots=(5,), shares=(), draws=1)
    low, high = few_shot(x, label, test, truth, classes=4, config=config, seed=0, progress=False)["5"]["interval"]
    assert 4 < high - low < 14


def test_what_cannot_be_drawn_is_one_line() -> None:
    x, label = clouds(4, 0)
    with pytest.raises(EvaluationError, match=r"few_shot with 5 images of each class: no class .* more than 4"):
        few_shot(x, label, x, label, classes=4, config=FewShot(), seed=0)
    for wrong in (
        FewShot(draws=0),
        FewShot(shots=(0,)),
        FewShot(shares=(2.0,)),
        FewShot((), ()),
        FewShot(strength=0.0),
    ):
        with pytest.raises(EvaluationError, match="few_shot needs"):
            wrong.check()
