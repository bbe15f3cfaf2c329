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
"""What is longer is no name of a class."""
_NUMBER = re.compile(r"[-+.\d]*")
log = logging.getLogger("trivit")


def label_name(content: bytes) -> str | None:
    """The name that a `.cls` holds; None for a number, and for what is no line of text."""
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return None
    fine = len(content) <= MOST_BYTES and text.isprintable() and not _NUMBER.fullmatch(text)
    return text if fine else None


def class_number(content: bytes, names: Mapping[str, int]) -> int | None:
    """The class that a `.cls` means; None for one that is neither a number from 0 on nor a name.

    Args:
        content: a number, or one of the names.
        names: number of each class that has a name; empty where classes only have numbers.
    """
    try:
        number = int(content)
    except ValueError:
        name = label_name(content)
        return None if name is None else names.get(name)
    return number if number >= 0 and (not names or number < len(names)) else None


class LabelKinds(NamedTuple):
    """What labels there are: some number, if there is any, and all names."""

    number: str
    names: frozenset[str]


def labels_of(index: ShardIndex) -> LabelKinds:
    """The labels of a shard; only the first one is looked at where that is a number. OSError if it cannot be read."""
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
                continue
            number = number or content.decode(errors="replace").strip()
            if number and not names:
                break
    finally:
        os.close(fd)
    return LabelKinds(number, frozenset(names))


def named_by_labels(root: Path, shards: Iterable[LabelKinds], former: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of a set in alphabetical order where labels are names; `former` where they are numbers."""
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
