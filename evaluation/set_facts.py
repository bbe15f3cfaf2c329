"""What takes reading a whole data set to know, kept in a cache: found once for each state of the set."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datamodules.sidecars import cache_home, write_aside


def remembered(
    question: str, fingerprints: Sequence[str], find: Callable[[], tuple[Any, bool]], cache_dir: Path | None = None
) -> Any:
    """The answer to a question about data sets, from the cache if it was asked before.

    Args:
        question: its name; another one when the answer is computed in another way.
        fingerprints: of the sets' manifests, on which alone the answer depends.
        find: the answer, as plain data for JSON, and whether it will hold: one that lacks what could not be read for a
            reason that may pass is given, but not kept.
        cache_dir: below which answers are kept; None: the user's cache ($TRIVIT_CACHE).
    """
    key = hashlib.sha256(json.dumps([question, *fingerprints]).encode()).hexdigest()[:32]
    place = (cache_dir or cache_home()) / "facts" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(place.read_text())
    answer, holds = find()
    with contextlib.suppress(OSError):  # without a place to keep it the question is asked again
        if holds:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_aside(place, json.dumps(answer).encode())
    return answer
