"""What the numbers of a run mean, in plain words: does it learn, and are the scores above their floors?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from evaluation.health import ROWS, State, by_medians, judge_health
from evaluation.overlap import no_verdict, overlap_note
from evaluation.probe_lines import FLOORS, probe_rows
from evaluation.ranks import one_decimal
from evaluation.run_files import Run

LARGEST = "always naming the largest class"
PROBE_NAMES = {"knn": "kNN", "linear": "Linear probe", "zeroshot": "Zero-shot"}
HEADLINES: dict[State, str] = {
    "early": "Too early to say anything.",
    "well": "No sign of illness.",
    "learning": "It learns.",
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
    """A probe against its floors: how it stands, a sentence of it, a few words of it, what it is not clearly above."""

    level: Literal["above", "near", "below", "unknown"]
    text: str
    short: str
    not_above: tuple[str, ...] = ()


def judge(run: Run) -> Verdict:
    """Progress, health and scores of a run in a headline and a few sentences; of scores without a run the last."""
    health = None if run.scores_only else judge_health(run)
    if health is None:
        details = [f"Scores of {run.source}: there is no run of it here, so nothing is said of its training."]
    else:
        details = [_progress(run), health.reason, *health.advice]
        if health.state != "early" and by_medians(run):
            details.insert(2, f"These are medians of the last {ROWS} rows of metrics.csv.")
    scored = [probe for probe in PROBE_NAMES if probe in run.results]
    above = [compare(run.results, probe) for probe in scored if not no_verdict(run.results[probe])]
    details += [*_shared(run.results), *(comparison.text for comparison in above)]
    levels = {comparison.level for comparison in above}
    good = health is not None and not health.ill and health.state != "early"
    learns = _so_far(run, HEADLINES[health.state]) if good and health is not None else ""
    others = [] if scored else _of_others(run.results)
    if health is not None and health.ill:
        return Verdict("bad", HEADLINES[health.state], (*details, *others))
    if not above:
        missing = "neither kNN nor a linear probe has been run" if others else "nothing has been scored yet"
        if scored:
            missing = "nothing can be said of the features, since test images are in train"
        if health is None:
            headline = f"{missing[0].upper()}{missing[1:]}."
        else:
            headline = f"{learns}; {missing}." if learns else HEADLINES[health.state]
        details += others or [
            "trivit evaluate with other test images tells what the features are worth."
            if scored
            else "trivit evaluate tells what the features are worth."
        ]
        return Verdict("fair", headline, tuple(details))
    if levels == {"above"}:
        floors = run.results["floors"]
        under = [label for floor, label in FLOORS.items() if not PROBE_NAMES.keys().isdisjoint(floors.get(floor, {}))]
        headline = f"the features are clearly better than {_listed(under, 'and')}."
        learns = _so_far(run, HEADLINES["learning"]) if learns else ""  # the scores say so, whatever the loss does
        return Verdict("good", f"{learns}: {headline}" if learns else headline.capitalize(), tuple(details))
    if "above" in levels or (len(levels) > 1 and "unknown" in levels):
        told = ", ".join(comparison.short for comparison in sorted(above, key=lambda c: c.level != "above"))
        return Verdict("fair", f"{f'{learns}; the' if learns else 'The'} probes disagree: {told}.", tuple(details))
    if levels == {"unknown"}:
        return Verdict("fair", "There are scores, but no floors to compare them with.", tuple(details))
    if health is not None and health.state == "early":  # no better is to be expected of them yet
        return Verdict("fair", HEADLINES["early"], tuple(details))
    unpassed = list(dict.fromkeys(label for comparison in above for label in comparison.not_above))
    return Verdict("bad", f"The features are not clearly better than {_listed(unpassed, 'or')}.", tuple(details))


def _shared(results: dict[str, Any]) -> list[str]:
    """That test images of probes are in train, a sentence for each such pair of sets."""
    probes, void = dict[str, list[str]](), set[str]()
    for name, result in results.items():
        if name != "floors" and isinstance(result, dict) and (note := overlap_note(result)):
            probes.setdefault(note, []).append(PROBE_NAMES.get(name, name))
            if no_verdict(result):
                void.add(note)
    end = "; no verdict rests on them"
    return [f"{_listed(names, 'and')}: {note}{end if note in void else ''}." for note, names in probes.items()]


def _of_others(results: dict[str, Any]) -> list[str]:
    """What those probes found on which the verdict does not rest, a sentence each, behind one that says so."""
    told = [f"{'; '.join((f'{row.name}: {row.found}', *row.floors))}." for row in probe_rows(results)]
    if "attributes" in results:
        told.append(f"attributes: {one_decimal(results['attributes']['top1'])}% on average, see the table below.")
    if "retrieval" in results:
        ways = {way: results["retrieval"][way]["recall@1"] for way in ("image_to_text", "text_to_image")}
        words = ", ".join(f"{way.replace('_', ' ')} {one_decimal(value)}%" for way, value in ways.items())
        told.append(f"retrieval: recall@1 {words}.")
    return ["A verdict on features rests on kNN, linear probe or zero-shot. Others found:", *told] if told else []


def compare(results: dict[str, Any], probe: str) -> Comparison:
    """Where a probe's top-1 lies against its floors.

    "above": clearly above every floor and what always naming the largest class of train gives, which needs no scoring;
    "below": clearly below one of them; "near": neither; "unknown": above the largest class, without floors. Clearly
    means that the 95% interval of the difference of the two proportions leaves out 0 (Newcombe 1998, method 10, made of
    the two scores' Wilson intervals). Both are taken on the same test images, which this does not use; the rule errs
    towards "near".
    """
    score, name = results[probe]["top1"], PROBE_NAMES[probe]
    of_floors = {label: results.get("floors", {}).get(floor, {}).get(probe) for floor, label in FLOORS.items()}
    known = {label: result for label, result in of_floors.items() if result is not None}
    compared = dict(known)
    if (majority := results[probe].get("protocol", {}).get("majority_class")) is not None:
        compared[LARGEST] = {"top1": majority}
    sides = {label: side_of(results[probe], floor) for label, floor in compared.items()}
    same = [f"{label} ({one_decimal(floor['top1'])})" for label, floor in compared.items() if not sides[label]]
    parts = [f"about the same as {_listed(same, 'and')}"] if same else []
    for label, floor in compared.items():
        if sides[label]:
            points = one_decimal(abs(score - floor["top1"]))
            which = "above" if sides[label] > 0 else "below"
            parts.append(f"{points} points {which} {label} ({one_decimal(floor['top1'])})")
    first = f"{name}: {one_decimal(score)}% of the test images get the right class"
    text = ", ".join([first, *([_listed(parts, "and")] if parts else [])]) + "."
    below = tuple(label for label, side in sides.items() if side < 0)
    near = tuple(label for label, side in sides.items() if side == 0)
    if below:
        return Comparison("below", text, f"{SHORT[probe]} below {' and '.join(below)}", (*below, *near))
    if near:
        return Comparison("near", text, f"{SHORT[probe]} not clearly above {' and '.join(near)}", near)
    if not known:
        return Comparison("unknown", text, f"{SHORT[probe]} without floors")
    return Comparison("above", text, f"{SHORT[probe]} above the floors")


def side_of(result: dict[str, Any], floor: dict[str, Any]) -> int:
    """1: clearly above the floor, -1: clearly below, 0: neither, see `compare`."""
    difference = result["top1"] - floor["top1"]
    low, high = result.get("interval", [result["top1"]] * 2)
    floor_low, floor_high = floor.get("interval", [floor["top1"]] * 2)
    if difference - np.hypot(result["top1"] - low, floor_high - floor["top1"]) > 0:
        return 1
    return -1 if difference + np.hypot(high - result["top1"], floor["top1"] - floor_low) < 0 else 0


def _listed(names: Sequence[str], word: str) -> str:
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _so_far(run: Run, headline: str) -> str:
    """The headline without its full stop, and since when, where that is less than one pass over the images."""
    epochs = run.metrics.get("epoch", np.array([1.0]))[-1]
    words = headline.rstrip(".")
    return words if not epochs < 1 else f"{words} so far (after {epochs:.2g} epochs)"


def _progress(run: Run) -> str:
    if run.max_steps is None or not run.step:
        return f"{run.step:,} steps so far."
    if run.step >= run.max_steps:
        return f"The run is finished: {run.step:,} steps."
    return f"The run has done {run.step:,} of {run.max_steps:,} steps ({100 * run.step // run.max_steps}%)."
