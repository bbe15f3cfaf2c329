"""What the numbers of a run mean, in plain words: does it learn, and are the scores above their floors?"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from evaluation.health import State, judge_health
from evaluation.ranks import one_decimal
from evaluation.run_files import Run

FLOORS = {"raw_pixels": "raw pixels", "untrained": "the untrained encoder", "chance": "chance"}
PROBE_NAMES = {"knn": "kNN", "linear": "Linear probe", "zeroshot": "Zero-shot"}
HEADLINES: dict[State, str] = {
    "early": "Too early to say anything.",
    "learning": "It learns; nothing has been scored yet.",
    "plateau": "Plateau: the loss stays at ln(K), nothing is being learnt.",
    "one point": "Collapsed to one point: the same is said about every image.",
    "uniform": "Collapsed to uniform: nothing is said about any image.",
    "diverging": "The loss has diverged.",
    "not learning": "Nothing is being learnt.",
    "collapsed": "Collapsed: all images have nearly the same vector.",
}
SHORT = {"knn": "kNN", "linear": "linear", "zeroshot": "zero-shot"}


@dataclass(frozen=True)
class Verdict:
    """`tone` is good, fair or bad; `headline` one short sentence; `details` the reasons, a sentence each."""

    tone: Literal["good", "fair", "bad"]
    headline: str
    details: tuple[str, ...]


class Comparison(NamedTuple):
    """A probe against its floors: how it stands, the sentence that says so, and the same in a few words."""

    level: Literal["above", "near", "below", "unknown"]
    text: str
    short: str


def judge(run: Run) -> Verdict:
    """Progress, health and scores of a run in a headline and a few sentences."""
    health = judge_health(run)
    details = [_progress(run), health.reason, *([f"Usual remedy: {health.remedy}."] if health.remedy else [])]
    above = [compare(run.results, probe) for probe in PROBE_NAMES if probe in run.results]
    details += [comparison.text for comparison in above]
    levels, learns = {comparison.level for comparison in above}, health.state == "learning"
    if health.ill:
        return Verdict("bad", HEADLINES[health.state], tuple(details))
    if not above:
        headline = HEADLINES[health.state]
        return Verdict("fair", headline, (*details, "trivit evaluate tells what the features are worth."))
    if levels == {"above"}:
        headline = "the features are clearly better than raw pixels and than an untrained encoder."
        return Verdict("good", f"It learns: {headline}" if learns else headline.capitalize(), tuple(details))
    if "above" in levels:
        told = ", ".join(comparison.short for comparison in sorted(above, key=lambda c: c.level != "above"))
        return Verdict("fair", f"{'It learns; the' if learns else 'The'} probes disagree: {told}.", tuple(details))
    if levels == {"unknown"}:
        return Verdict("fair", "There are scores, but no floors to compare them with.", tuple(details))
    if health.state == "early":  # no better is to be expected of them yet
        return Verdict("fair", HEADLINES["early"], tuple(details))
    return Verdict(
        "bad", "The features are not clearly better than raw pixels or an untrained encoder.", tuple(details)
    )


def compare(results: dict[str, Any], probe: str) -> Comparison:
    """Where a probe's top-1 lies against its floors.

    "above": clearly above every floor, "below": clearly below one, "near": neither. Clearly means that the 95% interval
    of the difference of the two proportions leaves out 0 (Newcombe 1998, method 10, made of the two scores' Wilson
    intervals). Both are taken on the same test images, which this does not use; the rule errs towards "near".
    """
    score, name = results[probe]["top1"], PROBE_NAMES[probe]
    of_floors = {label: results.get("floors", {}).get(floor, {}).get(probe) for floor, label in FLOORS.items()}
    known = {label: result for label, result in of_floors.items() if result is not None}
    if not known:
        text = f"{name}: {one_decimal(score)}% of the test images get the right class."
        return Comparison("unknown", text, f"{SHORT[probe]} without floors")
    sides = {label: side_of(results[probe], floor) for label, floor in known.items()}
    parts = []
    for label, floor in known.items():
        value = one_decimal(floor["top1"])
        if not sides[label]:
            parts.append(f"about the same as {label} ({value})")
        else:
            points = one_decimal(abs(score - floor["top1"]))
            parts.append(f"{points} points {'above' if sides[label] > 0 else 'below'} {label} ({value})")
    text = f"{name}: {one_decimal(score)}% of the test images get the right class, {' and '.join(parts)}."
    below = [label for label, side in sides.items() if side < 0]
    near = [label for label, side in sides.items() if side == 0]
    if below:
        return Comparison("below", text, f"{SHORT[probe]} below {' and '.join(below)}")
    if near:
        return Comparison("near", text, f"{SHORT[probe]} not clearly above {' and '.join(near)}")
    return Comparison("above", text, f"{SHORT[probe]} above the floors")


def side_of(result: dict[str, Any], floor: dict[str, Any]) -> int:
    """1: clearly above the floor, -1: clearly below, 0: neither, see `compare`."""
    difference = result["top1"] - floor["top1"]
    low, high = result.get("interval", [result["top1"]] * 2)
    floor_low, floor_high = floor.get("interval", [floor["top1"]] * 2)
    if difference - np.hypot(result["top1"] - low, floor_high - floor["top1"]) > 0:
        return 1
    return -1 if difference + np.hypot(high - result["top1"], floor["top1"] - floor_low) < 0 else 0


def _progress(run: Run) -> str:
    if run.max_steps is None or not run.step:
        return f"{run.step:,} steps so far."
    if run.step >= run.max_steps:
        return f"The run is finished: {run.step:,} steps."
    return f"The run has done {run.step:,} of {run.max_steps:,} steps ({100 * run.step // run.max_steps}%)."
