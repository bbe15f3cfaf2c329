"""`make bench-check`: which ratios fell by more than their noise since the last run that was committed.

Run: python -m benchmarks.check benchmarks/latest.json benchmarks/committed.json        (after make bench)
"""

import json
import sys
from pathlib import Path
from typing import Any

LEAST = 0.05
"""A ratio may fall by that much, whatever its noise: medians of few turns move."""
TIMES = 3
"""How many times the noise of both runs is more than noise."""
UNKNOWN = 0.05
"""Noise of what was measured once."""


def fallen(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """A sentence for each row of both runs whose ratio fell, and for each that is missing now."""
    told = []
    found = {_key(row): row for row in now["rows"]}
    for old in before["rows"]:
        new = found.get(_key(old))
        name = f"{old['name']}, {old['setting']}, {old['unit']}"
        if new is None:
            told.append(f"{name}: not measured now")
            continue
        allowed = max(LEAST, TIMES * sum(UNKNOWN if row.get("noise") is None else row["noise"] for row in (old, new)))
        if new["ratio"] < old["ratio"] * (1 - allowed):
            told.append(f"{name}: {new['ratio']:.2f}, was {old['ratio']:.2f} (at most {allowed:.0%} less is noise)")
    return told


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("name", "setting", "unit", "against"))


def main(arguments: list[str]) -> int:
    """Exit code 1 if something fell, 2 if there is nothing to compare."""
    if len(arguments) != 2 or not all(Path(path).is_file() for path in arguments):
        print("benchmarks.check: give two files, make bench writes benchmarks/latest.json", file=sys.stderr)
        return 2
    now, before = (json.loads(Path(path).read_text()) for path in arguments)
    if now["machine"] != before["machine"]:
        print(
            f"another machine ({now['machine']}, was {before['machine']}): ratios may differ for that", file=sys.stderr
        )
    told = fallen(now, before)
    print("\n".join(told) if told else f"no ratio fell, of {len(before['rows'])}")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
