"""Boxes around objects from a table: file, x0, y0, x1, y1, in pixels of the image file, separated by tabs or commas.

Axes: a = boxes of one image.
"""

import csv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from evaluation.errors import EvaluationError

COLUMNS = ("file", "x0", "y0", "x1", "y1")
Doubles = NDArray[np.float64]


def read_boxes(path: str, keys: Iterable[str]) -> dict[str, Doubles]:
    """Boxes [a 4] (x0, y0, x1, y1) of those of the keys "SHARD/KEY" that the table names, by key.

    A row belongs to the key that ends in its file, without the extension; a file name alone will do where no two keys
    share it. Boxes without an area are passed over.

    Raises:
        EvaluationError: no such file, other columns, no number, or not one row that belongs to a key.
    """
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read the boxes {path}: {error}") from error
    rows = list(csv.DictReader(lines, delimiter="\t" if lines and "\t" in lines[0] else ","))
    if not rows or any(column not in rows[0] for column in COLUMNS):
        raise EvaluationError(f"{path} has no rows, or not the columns {', '.join(COLUMNS)} in its first line")
    of_name: dict[str, list[str]] = {}
    for key in keys:
        full = PurePosixPath(key.partition("/")[2])
        for name in {str(full), full.name}:
            of_name.setdefault(name, []).append(key)
    found: dict[str, list[list[float]]] = {}
    for number, row in enumerate(rows, start=2):
        file = PurePosixPath(row["file"] or "")
        named = of_name.get(str(file.with_suffix("")) if file.name else "") or of_name.get(file.stem, [])
        if len(named) != 1:
            continue
        try:
            box = [float(row[column]) for column in COLUMNS[1:]]
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"{path}, line {number}: a box is four numbers") from error
        if not (box[0] <= box[2] and box[1] <= box[3]):
            raise EvaluationError(f"{path}, line {number}: x0 must be below x1, y0 below y1")
        if box[0] == box[2] or box[1] == box[3]:
            continue
        found.setdefault(named[0], []).append(box)
    if not found:
        raise EvaluationError(f"no row of {path} names an image of the test data: `file` must be its file's name")
    return {key: np.array(boxes) for key, boxes in found.items()}
