"""Train and test label their classes independently; they are matched by name, never by number."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.errors import EvaluationError
from evaluation.one_folder import only_folder

Ints = NDArray[np.int64]


def check_labelled(label: Ints, what: str, given: str | os.PathLike[str] = "") -> None:
    """EvaluationError when a sample has no label (-1), or all of train have the same one; `given`: where they lie."""
    missing = int((label < 0).sum())
    if missing == len(label) and given and (folder := only_folder(given)):
        raise EvaluationError(
            f"all {what} images lie in one folder, {folder!r}: that is one class at most, and "
            + ("probes need at least two class folders" if what == "train" else "train has no class of that name")
        )
    if missing:
        count = "no" if missing == len(label) else f"only {len(label) - missing:,} of {len(label):,}"
        raise EvaluationError(
            f"{count} {what} image has a label: probes need at least two class folders (one alone is packed without "
            "labels), or a .cls with the number or the name of its class beside each image"
        )
    if what == "train" and len(np.unique(label)) < 2:
        raise EvaluationError("all train images are of one class: probes need at least two classes")


def match_labels(
    train_names: Sequence[str], train_label: Ints, test_names: Sequence[str], test_label: Ints
) -> tuple[Ints, tuple[str, ...]]:
    """Test labels in the numbering of train, and the class names; empty names mean that numbers are the names.

    Raises:
        EvaluationError: a test class has no train image, only one side has names, or a name stands for two classes.
    """
    found = _match(train_names, train_label, test_names, test_label)
    lost = sorted({found.test_names[i] for i in np.unique(test_label[~found.known])})
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        hint = _other_case(lost, found.train_names) or "; --drop-unknown-classes leaves their images out"
        raise EvaluationError(f"test classes without any train image: {', '.join(lost[:5])}{more}{hint}")
    return found.label.astype(np.int64), found.train_names


def unknown_rows(
    train_names: Sequence[str], train_label: Ints, test_names: Sequence[str], test_label: Ints
) -> NDArray[np.bool_]:
    """Which test images [t] have a class that no train image has; those without a label (-1) do not count.

    Raises:
        EvaluationError: as `match_labels`, but for such classes.
    """
    labelled = test_label >= 0
    if not labelled.any():
        return np.zeros(len(test_label), dtype=bool)
    found = _match(train_names, train_label, test_names, np.where(labelled, test_label, test_label.max()))
    return labelled & ~found.known


class _Matched(NamedTuple):
    """Test labels in the numbering of train [t], whether train has an image of each [t], and the names of both."""

    label: Ints
    known: NDArray[np.bool_]
    train_names: tuple[str, ...]
    test_names: tuple[str, ...]


def _match(train_names: Sequence[str], train_label: Ints, test_names: Sequence[str], test_label: Ints) -> _Matched:
    if bool(train_names) != bool(test_names):
        named, bare = ("train", "test") if train_names else ("test", "train")
        raise EvaluationError(
            f"{named} names its classes and {bare} only numbers them, so they cannot be matched: put a classes.txt "
            f"with the names beside the tars of {bare}, one a line in the order of the numbers, or pack {bare} from "
            "class folders"
        )
    if not train_names:
        count = int(max(train_label.max(), test_label.max())) + 1
        train_names = test_names = tuple(str(i) for i in range(count))
    if tuple(train_names) == tuple(test_names):
        number = np.arange(len(train_names))
    else:
        twice = [name for names in (train_names, test_names) for name, n in Counter(names).items() if n > 1]
        if twice:
            raise EvaluationError(
                f"class name {twice[0]!r} stands for two classes, so train and test cannot be matched"
            )
        place = {name: i for i, name in enumerate(train_names)}
        number = np.array([place.get(name, -1) for name in test_names])
    matched = number[test_label]
    known = np.zeros(len(train_names) + 1, dtype=bool)
    known[np.unique(train_label[train_label >= 0])] = True  # the last entry stays False and stands for -1
    return _Matched(matched, known[matched], tuple(train_names), tuple(test_names))


def _other_case(lost: Sequence[str], names: Sequence[str]) -> str:
    """A hint, where train has one of these names in other letters."""
    known = {name.casefold(): name for name in names}
    pairs = [(name, known[name.casefold()]) for name in lost if known.get(name.casefold(), name) != name]
    return f" (train has {pairs[0][1]!r}: upper and lower case make another class)" if pairs else ""
