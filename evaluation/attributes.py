"""Which attributes of images the features know: a linear probe for every one that the samples' `.json` names.

An attribute is a field of the `.json` that holds one text, or true or false, in every image of train and test, with
some different values, all of which train has: shape, colour, background of drawn images (`trivit shards synth`).

Axes: n = train images, t = test images.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.manifest import load_manifest
from datamodules.shard_reader import BadSampleError, ShardReader
from evaluation.errors import EvaluationError
from evaluation.features import Features

MOST_VALUES = 100
"""A field with more different values is a caption, a name or a number of the image, not a kind of it."""

MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Attribute:
    """Numbers of the values in train [n] and test [t], and what the values are."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    values: tuple[str, ...]


def read_attributes(train: Path, trained: Features, test: Path, tested: Features) -> dict[str, Attribute]:
    """Name -> attribute, in the order of the first image's `.json`, for the images that have features.

    Args:
        train, test: folders of shards.
        trained, tested: their features; only the keys are used.

    Raises:
        EvaluationError: there is no attribute at all.
    """
    rows = [_fields(root, features) for root, features in ((train, trained), (test, tested))]
    found: dict[str, Attribute] = {}
    for name in rows[0][0] if all(rows) else ():
        columns = [[row.get(name) for row in each] for each in rows]
        if not all(isinstance(value, str | bool) for column in columns for value in column):
            continue
        values = tuple(sorted({str(value) for value in columns[0]}))
        if 1 < len(values) <= MOST_VALUES and {str(value) for value in columns[1]} <= set(values):
            place = {value: number for number, value in enumerate(values)}
            numbers = [np.array([place[str(value)] for value in column], np.int64) for column in columns]
            found[name] = Attribute(numbers[0], numbers[1], values)
    if not found:
        raise EvaluationError(
            f"the probe attributes found none: it needs fields with 2 to {MOST_VALUES} different texts in the .json of "
            "every train and test image, as `trivit shards synth` writes them"
        )
    return found


def classed_by(features: Features, root: Path, fields: Sequence[str]) -> Features:
    """The same features, with all combinations of the values of some `.json` fields as classes ("red circle").

    Args:
        features: of images in `root`, a folder of shards.
        fields: names, in the order in which a class says their values.

    Raises:
        EvaluationError: an image does not have one of them as a text, or there are too many different values.
    """
    columns: list[list[str]] = []
    rows = _fields(root, features)
    for name in fields:
        column = [value for row in rows if isinstance(value := row.get(name), str)]
        if len(column) < len(rows):
            raise EvaluationError(f"--class-fields {name}: not every test image has that as a text in its .json")
        columns.append(column)
    values = [sorted(set(column)) for column in columns]
    classes = tuple(" ".join(each) for each in product(*values))
    if not fields or not 1 < len(classes) <= MOST_CLASSES:
        raise EvaluationError(f"--class-fields make {len(classes):,} classes: there must be 2 to {MOST_CLASSES:,}")
    place = {name: number for number, name in enumerate(classes)}
    label = np.array([place[" ".join(each)] for each in zip(*columns, strict=True)], np.int64)
    return replace(features, label=label, classes=classes)


def _fields(root: Path, features: Features) -> list[dict[str, Any]]:
    """The `.json` of every image that has features, in their order; empty where an image has none."""
    manifest = load_manifest(root)
    reader = ShardReader(manifest)
    wanted = {key: row for row, key in enumerate(features.key)}
    rows: list[dict[str, Any]] = [{}] * len(wanted)
    for shard, described in enumerate(manifest.shards):
        for sample in range(described.samples):
            try:
                row = wanted.get(f"{reader.name(shard)}/{reader.key(shard, sample)}")
                record = json.loads(reader.member(shard, sample, "json") or "{}") if row is not None else None
            except (BadSampleError, ValueError, RecursionError):
                continue
            if row is not None and isinstance(record, dict):
                rows[row] = record
    return rows
