"""Texts that lie beside images: `cat/7.txt` and `cat/7.json` belong to `cat/7.jpg` and go into its sample."""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datamodules.sources import Image

TEXTS = ("txt", "json")
SKIPPED_TEXTS = "skipped_texts.tsv"
"""Of a packed set: texts that are not in it, and why; their images are."""


def find_texts(
    images: Sequence["Image"], files: Iterable["Image"]
) -> tuple[list[tuple["Image", ...]], list[tuple[str, str]]]:
    """The texts of each image, at most one of each kind, and name and reason of those that belong to none.

    Images that differ only in their suffix share a text. Hidden files (`._7.txt` of a Mac) are no texts.
    """
    by_stem: dict[str, dict[str, Image]] = {}
    unused: list[tuple[str, str]] = []
    for file in sorted(files, key=lambda file: file.name):
        stem, kind = _split(file.name)
        if kind not in TEXTS or stem.rpartition("/")[2].startswith("."):
            continue
        if (first := by_stem.setdefault(stem, {}).setdefault(kind, file)) is not file:
            unused.append((file.name, f"{first.name} is the .{kind} of its image"))
    found = [tuple(by_stem.get(_split(image.name)[0], {}).values()) for image in images]
    used = {text.name for texts in found for text in texts}
    alone = [file.name for kinds in by_stem.values() for file in kinds.values() if file.name not in used]
    return found, sorted([*unused, *((name, "no image of this name lies beside it") for name in alone)])


def checked_text(data: bytes, kind: str) -> bytes:
    """The bytes of a text for a sample, without a byte order mark; ValueError, one line, when they are none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise ValueError("empty")
    if kind == "json":
        try:
            is_record = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from error
        if not is_record:
            raise ValueError("not a JSON object")
    return text.encode()


def kind_of(text: "Image") -> str:
    """Which of TEXTS it is."""
    return _split(text.name)[1]


def _split(name: str) -> tuple[str, str]:
    """Name without its suffix, and the suffix in lower case."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, suffix.lower()) if dot and "/" not in suffix else (name, "")
