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
        under = [
            f"{FLOORS[floor]} {told(each[name])}"
            for floor, each in floors.items()
            if name in each and each[name].keys() & {"top1", "rankme"}
        ]
        protocol = results[name]["protocol"]
        lines.append(f"{name}: {told(results[name])}{_details(results[name], protocol)}")
        lines += [f"  {'; '.join(under)}"] if under else []
    return lines


def _few_shot(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {one_decimal(each['top1'])}%" for name, each in found["by_labels"].items())


def _label_free(found: Mapping[str, Any]) -> str:
    return f"RankMe {found['rankme']:.1f}, uniformity {found['uniformity']:.2f}, purity {one_decimal(found['purity'])}%"


def _details(found: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    if "by_labels" in found:
        return f" ({protocol['draws']} draws of so many labels of each class, or share of train)"
    return ""


LINES = {"few_shot": _few_shot, "label_free": _label_free}
