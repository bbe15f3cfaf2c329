"""Progress of what takes long: a bar on a terminal, in a log a plain line every half minute, as pretraining has."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
FORM = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Lines:
    """What a bar says, as lines on stderr; nothing of what is done before the first one is due.

    Args:
        total: how many there are to do.
        unit: of what.
        what: is done, in a word or two.
    """

    def __init__(self, total: int, unit: str, what: str) -> None:
        self.total, self.unit, self.what = total, unit, what
        self.done, self.told = 0, ""
        self.began = self.last = time.monotonic()

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.last >= SECONDS:
            self.last = now
            self._say(now)

    def set_postfix(self, **told: str) -> None:
        """What stands at the end of the next line."""
        self.told = ", ".join(f"{name}={value}" for name, value in told.items())

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.last > self.began:
            self._say(time.monotonic())

    def _say(self, now: float) -> None:
        line = tqdm.format_meter(
            self.done, self.total, now - self.began, prefix=self.what, unit=self.unit, unit_scale=self.done >= 100_000,
            postfix=self.told, bar_format=FORM,
        )  # fmt: skip
        print(line, file=sys.stderr, flush=True)


def progress_bar(total: int, unit: str, what: str, show: bool = True) -> "tqdm[Any] | Lines":
    """For a `with`: `update(n)` when n more are done, `set_postfix(loss="0.123")`; it is gone when all is done.

    Args:
        total: how many there are to do.
        unit: of what: img, step, fit.
        what: is done, in a word or two.
        show: False: nothing at all.
    """
    if show and not sys.stderr.isatty():
        return Lines(total, unit, what)
    return tqdm(total=total, unit=unit, desc=what, leave=False, disable=not show)
