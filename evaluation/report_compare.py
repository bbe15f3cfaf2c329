"""How the scores of several runs stand to each other, in a sentence for each probe; other terms are no comparison."""

from collections.abc import Sequence

from evaluation.ranks import one_decimal
from evaluation.run_files import Run
from evaluation.scoring_terms import alike, other_terms, score_of
from evaluation.verdict import PROBE_NAMES, side_of


def run_comparisons(runs: Sequence[Run]) -> list[str]:
    """A sentence for each probe that two runs or more have: the best one, and how far the others are below it.

    "About the same" means what it means in `verdict.compare`. Runs are compared when they were scored alike, see
    `other_terms`; where they were not, a sentence says so and names the difference.
    """
    told = []
    for probe, name in PROBE_NAMES.items():
        groups = alike(runs, probe)
        told += [f"{name}: {_sentence(probe, group)}." for group in groups if len(group) > 1]
        if len(groups) > 1:
            sets = [" and ".join(run.name for run in group) for group in groups]
            sets[1:] = [
                f"{names} ({', '.join(other_terms(score_of(group[0], probe), score_of(groups[0][0], probe)))})"
                for names, group in zip(sets[1:], groups[1:], strict=True)
            ]
            told.append(f"{name}: not scored alike, so these are not to be compared: {'; '.join(sets)}.")
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
