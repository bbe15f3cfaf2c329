"""What the probes beside kNN and linear found, for the terminal: a line each, beside their floors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from evaluation.ranks import one_decimal

FLOORS = {"raw_pixels": "raw pixels", "untrained": "the untrained encoder", "chance": "chance"}


class ProbeRow(NamedTuple):
    """A probe, what it found in words, and the same of each floor."""

    name: str
    found: str
    floors: tuple[str, ...]


def probe_rows(results: Mapping[str, Any]) -> list[ProbeRow]:
    """What those of the probes found that are in `results`, and of each suite its mean."""
    floors = results.get("floors", {})
    rows = []
    for name, told in LINES.items():
        if name in results:
            under = tuple(f"{FLOORS[floor]} {told(each[name])}" for floor, each in floors.items() if name in each)
            rows.append(ProbeRow(name, f"{told(results[name])}{_details(results[name])}", under))
    for name, found in results.items():
        if name.startswith("suite:"):
            rows.append(ProbeRow(name.replace(":", " "), _suite(found), ()))
    return rows


def probe_lines(results: Mapping[str, Any]) -> list[str]:
    """The same as lines."""
    lines = []
    for row in probe_rows(results):
        lines.append(f"{row.name}: {row.found}")
        lines += [f"  {'; '.join(row.floors)}"] if row.floors else []
    return lines


def _few_shot(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {one_decimal(each['top1'])}%" for name, each in found["by_labels"].items())


def _label_free(found: Mapping[str, Any]) -> str:
    purity = f"purity {one_decimal(found['purity'])}%" if "purity" in found else "no purity, which needs labels"
    return f"RankMe {found['rankme']:.1f}, uniformity {found['uniformity']:.2f}, {purity}"


def class_mean_words(found: Mapping[str, Any]) -> str:
    """The mean over classes with its interval; "" where it is top-1, since all classes have as many images."""
    mean = found.get("mean_per_class")
    if mean is None or one_decimal(mean) == one_decimal(found["top1"]):
        return ""
    return f"mean over classes {_with_interval(found, 'mean_per_class', 'mean_per_class_interval')}"


def _top1(found: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (f"top-1 {_with_interval(found, 'top1')}", class_mean_words(found))))


def _corruptions(found: Mapping[str, Any]) -> str:
    worst = min(found["by_kind"], key=lambda kind: sum(found["by_kind"][kind]))
    return f"top-1 {_with_interval(found, 'top1')} of spoiled images, {one_decimal(found['clean'])}% of clean ones" + (
        f"; worst: {worst.replace('_', ' ')}"
    )


def _segmentation(found: Mapping[str, Any]) -> str:
    return f"mean IoU {_with_interval(found, 'miou')} (the most frequent class: {one_decimal(found['majority_miou'])}%)"


def _localisation(found: Mapping[str, Any]) -> str:
    blind = f"whole image: {one_decimal(found['whole_image'])}%"
    if "centre_box" in found:  # results of earlier versions have none
        blind += f", box in the centre: {one_decimal(found['centre_box'])}%"
    return f"CorLoc {_with_interval(found, 'corloc')} ({blind})"


def _with_interval(found: Mapping[str, Any], key: str, interval: str = "interval") -> str:
    if interval not in found:  # results of earlier versions
        return f"{one_decimal(found[key])}%"
    low, high = found[interval]
    return f"{one_decimal(found[key])}% ({one_decimal(low)} to {one_decimal(high)})"


def _suite(found: Mapping[str, Any]) -> str:
    left_out = f"; not scored: {', '.join(found['failed'])}" if found["failed"] else ""
    if not found["of"]:
        return f"no task was scored{left_out}"
    means = found.get("means") or {"": found["mean"]}  # results of earlier versions have one only
    told = ", ".join(f"{f'{kind} ' if len(means) > 1 else ''}{one_decimal(mean)}%" for kind, mean in means.items())
    tasks = ", ".join(
        " ".join(filter(None, (task, each.get("metric"), f"{one_decimal(each['value'])}%")))
        for task, each in found["of"].items()
    )
    return f"mean {told} ({tasks}){left_out}"


def _details(found: Mapping[str, Any]) -> str:
    if "by_labels" in found:
        return f" ({found['protocol']['draws']} draws of so many labels of each class, or share of train)"
    if "majority_class" in found["protocol"] and ("mean_per_class" in found or "by_kind" in found):
        return f"; always the largest class: {one_decimal(found['protocol']['majority_class'])}%"
    return ""


LINES = {
    "few_shot": _few_shot,
    "label_free": _label_free,
    "linear_paper": _top1,
    "linear_mae": _top1,
    "attentive": _top1,
    "finetune": _top1,
    "corruptions": _corruptions,
    "segmentation": _segmentation,
    "localisation": _localisation,
}
