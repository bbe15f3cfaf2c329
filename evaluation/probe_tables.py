"""Tables of a report for probes that found several numbers: `few_shot` for each number of labels, `label_free`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from evaluation.ranks import one_decimal

COLUMNS = {"untrained": "Untrained encoder", "raw_pixels": "Raw pixels"}
NONE = "–"


class ProbeTable(NamedTuple):
    """A probe, what its numbers are, the names of the columns and the rows; the first cell of a row names it."""

    probe: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def probe_tables(results: Mapping[str, Any]) -> list[ProbeTable]:
    """Of those probes that are in `results`, with a column for each of their floors."""
    return [make(results) for name, make in MAKERS.items() if name in results]


def _few_shot(results: Mapping[str, Any]) -> ProbeTable:
    columns = _columns(results, "few_shot")
    draws = results["few_shot"]["protocol"].get("draws")
    note = (
        "Logistic regression on few labelled train images: top-1 in percent with its 95% interval"
        + (f", mean of {draws} draws" if draws else "")
        + "."
    )
    rows = [
        (_labels(size), f"{found['images']:,}" if "images" in found else NONE,
         *(_percent(each.get("by_labels", {}).get(size), "top1") for _, each in columns))
        for size, found in results["few_shot"]["by_labels"].items()
    ]  # fmt: skip
    return ProbeTable("few_shot", note, ("Labels", "Train images", *(name for name, _ in columns)), rows)


def _label_free(results: Mapping[str, Any]) -> ProbeTable:
    columns = _columns(results, "label_free")
    rows = [
        ("RankMe (higher: more directions are used)", *(_number(each, "rankme", 1) for _, each in columns)),
        ("Uniformity (lower: features lie more evenly)", *(_number(each, "uniformity", 2) for _, each in columns)),
    ]
    if "purity" in results["label_free"]:
        k = results["label_free"]["protocol"].get("k")
        what = f"Neighbours of the same class, %{f' (of {k})' if k else ''}"
        rows.append((what, *(_percent(each, "purity") for _, each in columns)))
    note = "What the features say of themselves" + ("; with the 95% interval where there is one." if rows[2:] else ".")
    return ProbeTable("label_free", note, ("", *(name for name, _ in columns)), rows)


MAKERS = {"few_shot": _few_shot, "label_free": _label_free}


def _columns(results: Mapping[str, Any], probe: str) -> list[tuple[str, Mapping[str, Any]]]:
    floors = results.get("floors", {})
    under = [(name, floors[floor][probe]) for floor, name in COLUMNS.items() if probe in floors.get(floor, {})]
    return [("These features", results[probe]), *under]


def _labels(size: str) -> str:
    return f"{size} of train" if size.endswith("%") else f"{size} of each class"


def _percent(found: Mapping[str, Any] | None, key: str) -> str:
    if not found or key not in found:
        return NONE
    if "interval" not in found:
        return one_decimal(found[key])
    low, high = map(one_decimal, found["interval"])
    return f"{one_decimal(found[key])} ({low} to {high})"


def _number(found: Mapping[str, Any], key: str, digits: int) -> str:
    return f"{found[key]:.{digits}f}" if key in found else NONE
