"""Files that grow by a line every few steps, cut back to the step that a run goes on from."""

import mmap
import re
from pathlib import Path

_STEP = re.compile(rb'(?:\{"step": )?(\d+),')


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a half-written last one; a header stays.

    A line begins with its step, as CSV or as JSON {"step": ...}, and steps ascend. Reads from the end, only as far as
    that goes: the file of a long run is large.
    """
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            end = text.rfind(b"\n") + 1
            while end:
                begin = text.rfind(b"\n", 0, end - 1) + 1
                found = _STEP.match(text[begin:end])
                if int(found[1]) <= step if found else begin == 0:
                    break
                end = begin
        file.truncate(end)
