"""How the scores of several runs stand to each other, in a sentence for each probe; other images are no comparison."""

from collections.abc import Sequence
from typing import Any

from evaluation.ranks import one_decimal
from evaluation.run_files import Run
from evaluation.verdict import PROBE_NAMES, side_of


def run_comparisons(runs: Sequence[Run]) -> list[str]:
    """A sentence for each probe that two runs or more have: the best one, and how far the others are below it.

    "About the same" means what it means in `verdict.compare`. Runs are compared when they were scored on the same test
    images, after learning from the same train images; where they were not, a sentence says so.
    """
    told = []
    for probe, name in PROBE_NAMES.items():
        groups: dict[Any, list[Run]] = {}
        for run in runs:
            if probe in run.results:
                groups.setdefault(_images(run.results[probe]), []).append(run)
        told += [f"{name}: {_sentence(probe, group)}." for group in groups.values() if len(group) > 1]
        if len(groups) > 1:
            sets = "; ".join(_listed([run.name for run in group]) for group in groups.values())
            told.append(f"{name}: not on the same images, so these are not to be compared: {sets}.")
    return told


def _sentence(probe: str, runs: Sequence[Run]) -> str:
    best, *others = sorted(runs, key=lambda run: -run.results[probe]["top1"])
    score = best.results[probe]["top1"]
    parts = []
    for run in others:
        points = one_decimal(score - run.results[probe]["top1"])
        if side_of(best.results[probe], run.results[probe]) > 0:
            parts.append(f"{points} points more than {run.name}")
        else:
            parts.append(f"about the same as {run.name} ({points} points, within the intervals)")
    return f"{best.name} has the most, {one_decimal(score)}: {', '.join(parts)}"


def _images(result: dict[str, Any]) -> tuple[Any, ...]:
    protocol = result.get("protocol", {})
    return (*(protocol.get(which, {}).get("hash") for which in ("train", "test")), protocol.get("classes"))


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
