"""Labels as they lie in `.cls` members: the number of a class, or its name.

WebDataset's writer puts down what it is given, and both are in use. Names are collected when a set is indexed, so that
from then on a label is a number, as everywhere else.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from datamodules.tar_index import ShardIndex, open_tar

CLASSES = "classes.txt"
LABEL = "cls"
MOST_BYTES = 200
"""What is longer is neither a number nor a name of a class."""
_NO_NAME = re.compile(r"[-+.\d]*")
_NUMBER = re.compile(rb"\s*\+?\d+\s*")
log = logging.getLogger("trivit")


def label_name(content: bytes) -> str | None:
    """The name that a `.cls` holds; None for a number, and for what is no line of text."""
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return None
    fine = len(content) <= MOST_BYTES and text.isprintable() and not _NO_NAME.fullmatch(text)
    return text if fine else None


def _number(content: bytes) -> int | None:
    """The number from 0 on that a `.cls` holds. Digits only: `int` also takes 1_0, which is a name."""
    return int(content) if len(content) <= MOST_BYTES and _NUMBER.fullmatch(content) else None


def class_number(content: bytes, names: Mapping[str, int]) -> int | None:
    """The class that a `.cls` means; None for one that is neither a number from 0 on nor a name.

    Args:
        content: a number, or one of the names.
        names: number of each class that has a name; empty where classes only have numbers.
    """
    name = label_name(content)
    number = _number(content) if name is None else names.get(name)
    return number if number is not None and (not names or number < len(names)) else None


class LabelKinds(NamedTuple):
    """What labels there are: some number, if there is any, and all names."""

    number: str
    names: frozenset[str]


def labels_of(index: ShardIndex) -> LabelKinds:
    """The labels of a shard; only the first one is looked at where that is a number. OSError if it cannot be read.

    What is neither a number nor a name is a bad sample, and says nothing about the others.
    """
    if LABEL not in index.extensions:
        return LabelKinds("", frozenset())
    fd = open_tar(index.path)
    number, names = "", set[str]()
    try:
        for i in range(len(index)):
            member = index.members(i).get(LABEL)
            if member is None or member.size > MOST_BYTES:
                continue
            content = os.pread(fd, member.size, member.offset)
            if (name := label_name(content)) is not None:
                names.add(name)
            elif not number and _number(content) is not None:
                number = content.decode().strip()
            if number and not names:
                break
    finally:
        os.close(fd)
    return LabelKinds(number, frozenset(names))


def named_by_labels(root: Path | str, shards: Iterable[LabelKinds], former: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of a set in alphabetical order where labels are names; `former` where they are numbers.

    `root`: folder or URL of the set, for the warning where both are in use.
    """
    each = list(shards)
    number = next((kinds.number for kinds in each if kinds.number), "")
    names = frozenset[str]().union(*(kinds.names for kinds in each))
    if names and number and not former:
        log.warning(
            "%s: some .cls hold numbers (%s), others names (%s): the names mean nothing until all are of one kind, or "
            "a %s lists them, one on each line in the order of the numbers",
            root, number, min(names), CLASSES,
        )  # fmt: skip
    return former if number or not names else tuple(sorted(names.union(former)))
