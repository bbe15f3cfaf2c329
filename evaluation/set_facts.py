"""What takes reading a whole data set to know, kept in the user's cache: found once for each state of the set."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from datamodules.sidecars import cache_home, write_aside


def remembered(question: str, fingerprints: Sequence[str], find: Callable[[], Any]) -> Any:
    """The answer to a question about data sets, from the cache if it was asked before.

    Args:
        question: its name; another one when the answer is computed in another way.
        fingerprints: of the sets' manifests, on which alone the answer depends.
        find: the answer, as plain data for JSON.
    """
    key = hashlib.sha256(json.dumps([question, *fingerprints]).encode()).hexdigest()[:32]
    place = cache_home() / "facts" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(place.read_text())
    answer = find()
    with contextlib.suppress(OSError):  # without a place to keep it the question is asked again
        place.parent.mkdir(parents=True, exist_ok=True)
        write_aside(place, json.dumps(answer).encode())
    return answer
