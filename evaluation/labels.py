"""Train and test label their classes independently; they are matched by name, never by number."""

import os
from collections import Counter
from collections.abc import Sequence

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
            "labels), or a .cls with the number of its class beside each image"
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
    known[np.unique(train_label)] = True  # the last entry stays False and stands for -1
    lost = sorted({test_names[i] for i in np.unique(test_label[~known[matched]])})
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise EvaluationError(
            f"test classes without any train image: {', '.join(lost[:5])}{more}{_other_case(lost, train_names)}"
        )
    return matched.astype(np.int64), tuple(train_names)


def _other_case(lost: Sequence[str], names: Sequence[str]) -> str:
    """A hint, where train has one of these names in other letters."""
    known = {name.casefold(): name for name in names}
    pairs = [(name, known[name.casefold()]) for name in lost if known.get(name.casefold(), name) != name]
    return f" (train has {pairs[0][1]!r}: upper and lower case make another class)" if pairs else ""
