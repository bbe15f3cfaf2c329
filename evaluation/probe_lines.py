"""What the probes beside kNN and linear found, for the terminal: a line each, beside their floors."""

from collections.abc import Mapping
from typing import Any

from evaluation.ranks import one_decimal
from evaluation.verdict import FLOORS


def probe_lines(results: Mapping[str, Any]) -> list[str]:
    """Lines for those of the probes that are in `results`."""
    floors = results.get("floors", {})
    lines = []
    for name, told in LINES.items():
        if name not in results:
            continue
        under = [f"{FLOORS[floor]} {told(each[name])}" for floor, each in floors.items() if name in each]
        protocol = results[name]["protocol"]
        lines.append(f"{name}: {told(results[name])}{_details(results[name], protocol)}")
        lines += [f"  {'; '.join(under)}"] if under else []
    return lines


def _few_shot(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {one_decimal(each['top1'])}%" for name, each in found["by_labels"].items())


def _label_free(found: Mapping[str, Any]) -> str:
    return f"RankMe {found['rankme']:.1f}, uniformity {found['uniformity']:.2f}, purity {one_decimal(found['purity'])}%"


def _top1(found: Mapping[str, Any]) -> str:
    return f"top-1 {_with_interval(found, 'top1')}"


def _corruptions(found: Mapping[str, Any]) -> str:
    worst = min(found["by_kind"], key=lambda kind: sum(found["by_kind"][kind]))
    return f"top-1 {_with_interval(found, 'top1')} of spoiled images, {one_decimal(found['clean'])}% of clean ones" + (
        f"; worst: {worst.replace('_', ' ')}"
    )


def _segmentation(found: Mapping[str, Any]) -> str:
    return f"mean IoU {_with_interval(found, 'miou')} (the most frequent class: {one_decimal(found['majority_miou'])}%)"


def _localisation(found: Mapping[str, Any]) -> str:
    return f"CorLoc {_with_interval(found, 'corloc')} (whole image: {one_decimal(found['whole_image'])}%)"


def _with_interval(found: Mapping[str, Any], key: str) -> str:
    low, high = found["interval"]
    return f"{one_decimal(found[key])}% ({one_decimal(low)} to {one_decimal(high)})"


def _details(found: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    if "by_labels" in found:
        return f" ({protocol['draws']} draws of so many labels of each class, or share of train)"
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
