"""results.json: where it is, and how new scores come to stand beside those that are there."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from datamodules.sidecars import cannot_write, locked, write_aside
from evaluation.errors import EvaluationError


def results_file(source: str | os.PathLike[str], output: str | os.PathLike[str] | None) -> Path | None:
    """Where results.json goes: `output`, the run, or the run that a checkpoint lies in; None for another source."""
    if output is not None:
        if Path(output).is_file():
            raise EvaluationError(f"--output {output} is a file: name a folder")
        return Path(output) / "results.json"
    run = run_of(source)
    return None if run is None else run / "results.json"


def run_of(source: str | os.PathLike[str]) -> Path | None:
    """The folder of the run that a source is, or lies in as a checkpoint; None for another source."""
    path = Path(source)
    for run in (path, path.parent.parent):
        if not str(source).startswith("timm:") and (run / "config.yaml").is_file():
            return run
    return None


def merge(place: Path, results: dict[str, Any]) -> None:
    """Put the results into the file, beside those of other probes that are there already; written aside, renamed.

    Another evaluation that does so at the same time waits: what both have found is in the file in the end.

    Scores of another checkpoint are not kept beside the new ones, nor floors that were not made as their probe's score
    was (other train or test images, another crop, other settings): they would look comparable.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            # The lock of another user of the folder may not be opened, though results.json may be replaced: as where
            # a file system has no locks, two at once remain the user's business.
            with contextlib.suppress(PermissionError):
                held.enter_context(locked(place.with_name(".results.lock"), wait=True))
            new = _merged(place, results)
            write_aside(place, (json.dumps(new, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise EvaluationError(cannot_write(place, error)) from error


def _merged(place: Path, results: dict[str, Any]) -> dict[str, Any]:
    old: dict[str, Any] = {}
    if place.exists():
        try:
            old = json.loads(place.read_text())
            if not isinstance(old, dict):
                raise ValueError
        except ValueError as error:
            raise EvaluationError(f"{place} is not a JSON object: move it away and evaluate again") from error
    kept = old.pop("floors", None)
    kept = kept if isinstance(kept, dict) else {}
    checkpoints = {None, *(_about(result)[0] for name, result in results.items() if name != "floors")}
    other = {name for name, result in old.items() if _about(result)[0] not in checkpoints}
    if other:
        print(f"note: dropped {', '.join(sorted(other))}, of another checkpoint", file=sys.stderr)
        old = {name: result for name, result in old.items() if name not in other}
    scored = [name for name in results if name != "floors" and name in old]
    others = sorted(name for name in scored if _about(old[name])[1] != _about(results[name])[1])
    if others:
        told = f"note: replaced {', '.join(others)}, scored on other test images"
        print(f"{told}; evaluate with --output to keep both", file=sys.stderr)
    scores = old | results
    floors = results.get("floors", {})
    merged = {
        name: {p: r for p, r in kept.get(name, {}).items() if p in old and p not in results} | floors.get(name, {})
        for name in {**kept, **floors}
    }
    merged_floors = {name: floor for name, floor in merged.items() if floor}
    return scores | ({"floors": merged_floors} if merged_floors else {})


def _about(result: Any) -> tuple[Any, Any]:
    """Checkpoint and test images behind a score."""
    protocol = result.get("protocol", {}) if isinstance(result, dict) else {}
    test = protocol.get("test")
    return protocol.get("checkpoint"), test.get("hash") if isinstance(test, dict) else None
