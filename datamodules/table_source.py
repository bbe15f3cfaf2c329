"""A table as a source of images to be packed: a column of paths, and columns of captions and labels."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from datamodules.console import one_line
from datamodules.errors import DataError
from datamodules.sources import Image, Source, kind_of_file, shared_prefix
from datamodules.tables import (
    CAPTION_COLUMNS,
    FEWER_CELLS,
    FILE_COLUMNS,
    LABEL_COLUMNS,
    MORE_CELLS,
    captions_in,
    column_names,
    find_column,
    is_missing,
    keep_together,
    records,
)
from datamodules.tar_samples import ARRAY, PLAIN_IMAGES

# A `name` or `key` may stand for an image that is at hand already, but is no path.
_USUAL = {
    "image": tuple(name for name in FILE_COLUMNS if name not in ("name", "key")),
    "caption": CAPTION_COLUMNS,
    "label": LABEL_COLUMNS,
}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def list_table(path: Path, columns: Mapping[str, str | None]) -> Source:
    """The images that a table names, by paths relative to its folder, with their captions and labels.

    Rows that name the same file are one image with several captions. Labels that are whole numbers stay so; any others
    are names, numbered in alphabetical order. Images without a label have none. Files that do not exist or are no files
    (FIFOs, say) are skipped and named, and so are rows that cannot be used: no path, a URL, a label unlike that of an
    earlier row, more or fewer cells than the header, no JSON.

    Args:
        path: of the table, see `tables`.
        columns: "image", "caption", "label" -> name of the column; None looks for a usual name, and notes which.

    Raises:
        DataError: when the table cannot be read, has no such column, or names no file that exists.
    """
    chosen, notes = _choose(path, columns)
    rows = _Rows(path)
    for place, record in records(path, list(chosen.values())):
        if isinstance(record, str):
            rows.skipped.append((place, record))
        else:
            rows.add(place, *(record.get(chosen.get(kind, "")) for kind in ("image", "caption", "label")))
    images, skipped = _look(path.parent, list(rows.captions))
    if not images and not skipped and not rows.skipped:
        raise DataError(f"{path} holds no rows")
    if not rows.captions:
        raise DataError(
            f"{path}: none of its {len(rows.skipped)} rows can be used (first: {': '.join(rows.skipped[0])})"
            + "".join(f"; {hint}" for hint in rows.hints())
        )
    if not images:
        raise DataError(
            f"{path}: none of its {len(rows.skipped) + len(skipped)} rows names an image file that is there (first: "
            f"{': '.join(skipped[0])}); paths are relative to {path.parent.resolve()}"
        )
    notes += rows.hints()
    classes, numbers = _number([rows.labels.get(image.name) for image in images])
    return Source(
        path, path.parent, tuple(images), classes, shared_prefix([image.name for image in images]), notes=tuple(notes),
        numbers=tuple(numbers), captions=tuple(tuple(dict.fromkeys(rows.captions[image.name])) for image in images),
        skipped=(*rows.skipped, *skipped),
    )  # fmt: skip


class _Rows:
    """The rows of a table, put together by file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.captions: dict[str, list[str]] = {}
        self.labels: dict[str, int | str] = {}
        self.skipped: list[tuple[str, str]] = []

    def add(self, place: str, image: object, caption: object, label: object) -> None:
        """Take up a row, or note why not."""
        if (reason := self._take(image, caption, label)) is not None:
            self.skipped.append((place, reason))

    def _take(self, image: object, caption: object, label: object) -> str | None:
        if is_missing(image):
            return "no path"
        if not isinstance(image, str):
            return f"the image is no path but of the type {type(image).__name__}"
        if _URL.match(image):
            return (
                f"{one_line(image)[:80]} is a URL, and only files can be packed: download them first (img2dataset does "
                "that)"
            )
        name = os.path.normpath(image.strip().replace("\\", "/"))
        texts, found = captions_in(caption), None if is_missing(label) else _label(label)
        if texts is None:
            return "the caption is neither a text nor a list of texts"
        if found is None and not is_missing(label):
            return "the label is neither a name nor a whole number"
        try:
            "".join([name, *texts, f"{found}"]).encode()
        except UnicodeEncodeError:  # JSON may escape one half of a character
            return "its text holds half a character (a lone surrogate)"
        if found is not None and self.labels.setdefault(name, found) != found:
            return f"{name} has two labels, {self.labels[name]} and {found}: the first one is kept"
        self.captions.setdefault(name, []).extend(texts)
        return None

    def hints(self) -> list[str]:
        """What to do about rows that were cut at the wrong places."""
        cut = [place for place, reason in self.skipped if reason in (MORE_CELLS, FEWER_CELLS)]
        if not cut:
            return []
        count = f"{len(cut)} rows have more or fewer cells than the header"
        return [f"{self.path.name}: {count} (first: {cut[0]}): {keep_together(self.path)}"]


def _choose(path: Path, columns: Mapping[str, str | None]) -> tuple[dict[str, str], list[str]]:
    """The column of images, and those of captions and labels if there are any; notes say what was guessed."""
    present = column_names(path)
    if not present:
        raise DataError(f"{path} holds no rows")
    chosen: dict[str, str] = {}
    guessed = []
    for kind, usual in _USUAL.items():
        if (given := columns.get(kind)) is not None:
            if given not in present:
                raise DataError(f"{path} has no column {given!r} (--{kind}-column), only {', '.join(present)}")
            chosen[kind] = given
        elif (found := find_column(present, usual)) is not None:
            chosen[kind] = found
            guessed.append(kind)
    if "image" not in chosen:
        urls = [column for column in present if "url" in column.lower()]
        hint = f"; {urls[0]} looks like URLs: download them first (img2dataset does that)" if urls else ""
        raise DataError(
            f"{path} has the columns {', '.join(present)}: none is called {', '.join(FILE_COLUMNS[:6])} or the like, "
            f"--image-column NAME says which one holds paths{hint}"
        )
    if twice := [name for name in chosen.values() if present.count(name) > 1]:
        raise DataError(f"{path} has several columns called {twice[0]!r}: rename all but the one to be used")
    what = ", ".join(f"{kind}s from {name!r}" for kind, name in chosen.items())
    flags = ", ".join(f"--{kind}-column" for kind in guessed)
    return chosen, [f"{path.name}: {what}" + (f" (guessed; {flags} choose others)" if guessed else "")]


def _label(value: object) -> int | str | None:
    """A cell as a number or a name; None when it is neither."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        text = " ".join(value.split())
        return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
    return int(value) if isinstance(value, int) else None  # true and false are 1 and 0


def _number(labels: list[int | str | None]) -> tuple[tuple[str, ...], list[int]]:
    """Names of the classes (none when the labels are numbers), and the number of each label; -1 for none."""
    if all(label is None or isinstance(label, int) for label in labels):
        return (), [label if isinstance(label, int) and label >= 0 else -1 for label in labels]
    classes = sorted({str(label) for label in labels if label is not None})
    numbers = {name: number for number, name in enumerate(classes)}
    return tuple(classes), [-1 if label is None else numbers[str(label)] for label in labels]


def _look(root: Path, names: list[str]) -> tuple[list[Image], list[tuple[str, str]]]:
    """The files that are there, sorted by name, and why others are not taken."""
    images, skipped = [], []
    for name in tqdm(sorted(names), desc="looking for files", unit="file", disable=None, leave=False):
        extension = name.rpartition("/")[2].rpartition(".")[2].lower()
        try:
            about = (root / name).stat()
        except (OSError, ValueError) as error:
            skipped.append((name, getattr(error, "strerror", None) or f"{error}"))
            continue
        if extension not in PLAIN_IMAGES and extension != ARRAY:
            skipped.append((name, "its suffix is none of an image"))
        elif (kind := kind_of_file(about.st_mode)) is not None:
            skipped.append((name, f"{kind}, not a file"))  # to open a FIFO is to wait for its writer
        else:
            images.append(Image(name, about.st_size))
    return images, skipped
