import numpy as np
import pytest

from evaluation.errors import EvaluationError
from evaluation.labels import check_labelled, match_labels


def test_classes_match_by_name_not_by_number() -> None:
    label, names = match_labels(("a", "b", "c"), np.array([0, 1, 2]), ("c", "a"), np.array([0, 0, 1]))
    assert label.tolist() == [2, 2, 0]
    assert names == ("a", "b", "c")


def test_numbers_are_names_where_there_are_no_others() -> None:
    label, names = match_labels((), np.array([0, 2]), (), np.array([2, 0]))
    assert label.tolist() == [2, 0]
    assert names == ("0", "1", "2")


def test_a_listed_class_without_images_does_no_harm() -> None:
    label, _ = match_labels(("a", "b"), np.array([0, 1]), ("a", "b", "unused"), np.array([1, 0]))
    assert label.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("train_names", "train_label", "test_names", "test_label", "message"),
    [
        (("a", "b"), [0, 1], ("a", "x", "y"), [0, 1, 2], "without any train image: x, y"),
        (("a", "b"), [0, 0], ("a", "b"), [0, 1], "without any train image: b"),
        ((), [0, 1], (), [5], "without any train image: 5"),
        (("a", "b"), [0, 1], (), [0, 1], "train names its classes and test only numbers"),
        ((), [0, 1], ("a", "b"), [0, 1], "test names its classes and train only numbers"),
        (("crane", "crane"), [0, 1], ("crane", "dog"), [0, 0], "'crane' stands for two classes"),
    ],
)
def test_what_cannot_be_matched_is_one_clear_line(
    train_names: tuple[str, ...],
    train_label: list[int],
    test_names: tuple[str, ...],
    test_label: list[int],
    message: str,
) -> None:
    with pytest.raises(EvaluationError, match=message):
        match_labels(train_names, np.array(train_label), test_names, np.array(test_label))


def test_the_same_list_may_hold_a_name_twice() -> None:
    assert match_labels(("crane", "crane"), np.array([0, 1]), ("crane", "crane"), np.array([1, 0]))[0].tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("label", "what", "message"),
    [
        ([-1, -1], "test", "no test image has a label"),
        ([0, -1, 1], "train", "only 2 of 3 train image has a label"),
        ([3, 3], "train", "one class"),
    ],
)
def test_images_that_cannot_be_scored(label: list[int], what: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        check_labelled(np.array(label), what)
