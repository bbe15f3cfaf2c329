"""Test images of classes that no train image has: refused by default, left out on demand and counted."""

import hashlib
import json
from dataclasses import replace

import numpy as np

from evaluation.errors import EvaluationError
from evaluation.features import Features
from evaluation.labels import unknown_rows


def without_unknown(trained: Features, tested: Features) -> tuple[Features, dict[str, int]]:
    """`tested` without the images of classes that train lacks, and how many of each of these there were.

    What is left has hashes of its own: its scores are not to be compared with those of the whole set.

    Raises:
        EvaluationError: nothing is left, or the classes cannot be matched, see `match_labels`.
    """
    unknown = unknown_rows(trained.classes, trained.label, tested.classes, tested.label)
    if not unknown.any():
        return tested, {}
    if unknown.all():
        raise EvaluationError("no test image has a class of train: nothing is left without the unknown ones")
    numbers, counts = np.unique(tested.label[unknown], return_counts=True)
    names = [tested.classes[i] if tested.classes else str(i) for i in numbers]
    left_out = {name: int(count) for name, count in sorted(zip(names, counts, strict=True))}
    kept = np.flatnonzero(~unknown)
    data_hash, fingerprint = (
        hashlib.sha256(json.dumps([old, *left_out]).encode()).hexdigest()[: len(old)]
        for old in (tested.data_hash, tested.fingerprint)
    )
    return replace(
        tested, x=tested.x[kept], label=tested.label[kept], key=[tested.key[int(i)] for i in kept], data_hash=data_hash,
        fingerprint=fingerprint,
    ), left_out  # fmt: skip


def left_out_words(left_out: dict[str, int]) -> str:
    """One line of it."""
    named = [f"{name} ({count:,})" for name, count in left_out.items()]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    classes = f"{len(left_out):,} classes" if len(left_out) > 1 else "a class"
    return (
        f"{sum(left_out.values()):,} test images of {classes} that train lacks are left out: "
        f"{', '.join(named[:5])}{more}"
    )
