"""What `trivit doctor` has found, in lines that a person can read."""

from typing import Literal, NamedTuple

GIB = 2**30
Level = Literal["ok", "note", "wrong"]


class Finding(NamedTuple):
    """A line of the answer; what is wrong comes with its remedy."""

    level: Level
    text: str


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    for limit, unit, text in ((1.0, 1e-3, "ms"), (180.0, 1.0, "s"), (7200.0, 60.0, "min"), (172800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {text}"
    return f"{seconds / 86400:.3g} days"
