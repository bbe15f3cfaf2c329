"""What the probe `attributes` found, for people: which attributes of the images the features know, and which not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from datamodules.console import table
from evaluation.overlap import no_verdict
from evaluation.probe_lines import FLOORS
from evaluation.ranks import one_decimal
from evaluation.verdict import side_of

COLUMNS = ("untrained", "raw_pixels")


class Row(NamedTuple):
    """One attribute: results of the features and of the floors (None: not scored), and the floors they do not pass."""

    name: str
    features: dict[str, Any]
    floors: tuple[dict[str, Any] | None, ...]
    not_above: tuple[str, ...]


def attribute_rows(results: Mapping[str, Any]) -> list[Row]:
    """The attributes in a results.json, best known first (points above the highest of floors and chance)."""
    rows = []
    floors = [results.get("floors", {}).get(floor, {}).get("attributes", {}).get("of", {}) for floor in COLUMNS]
    for name, found in results.get("attributes", {}).get("of", {}).items():
        under = tuple(each.get(name) for each in floors)
        not_above = tuple(
            FLOORS[floor] for floor, result in zip(COLUMNS, under, strict=True) if result and side_of(found, result) < 1
        )
        if not not_above and found["interval"][0] <= found["chance"]:
            not_above = ("chance",)
        rows.append(Row(name, found, under, not_above))
    return sorted(rows, key=lambda row: -_ahead(row))


def _ahead(row: Row) -> float:
    return float(row.features["top1"] - max(row.features["chance"], *(f["top1"] for f in row.floors if f), 0.0))


def attribute_sentences(rows: list[Row], note: str = "") -> list[str]:
    """What the features know and what not, and what training has lost, a sentence each; nothing twice.

    `note`: why nothing can be said (see `no_verdict`), which is then all.
    """
    if note:
        return [f"{note[0].upper()}{note[1:]}."]
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(row.not_above, []).append(row.name)
    known = groups.pop((), [])
    scored = [FLOORS[floor] for floor, result in zip(COLUMNS, rows[0].floors, strict=True) if result] or ["chance"]
    told = [f"The features know {_listed(known)}: clearly better than {' and '.join(scored)}."] if known else [
        f"The features know no attribute clearly better than {' and '.join(scored)}."
    ]  # fmt: skip
    if len(groups.get(tuple(scored), [])) < len(rows):  # else the first sentence has said it
        told += [f"Not better than {' and '.join(floors)}: {_listed(names)}." for floors, names in groups.items()]
    worse = [row.name for row in rows if row.floors[0] and side_of(row.features, row.floors[0]) < 0]
    if worse:
        told.append(f"Clearly worse than {FLOORS[COLUMNS[0]]}: {_listed(worse)}.")
    return told


def attribute_summary(results: Mapping[str, Any]) -> str:
    """The same as a table for the terminal, and the sentences below it."""
    rows = attribute_rows(results)
    cells = [
        [row.name, *(one_decimal(r["top1"]) if r else "-" for r in (row.features, *row.floors)),
         one_decimal(row.features["chance"])]
        for row in rows
    ]  # fmt: skip
    header = ["attribute, top-1 %", "this encoder", "untrained", "raw pixels", "most frequent"]
    return "\n".join(["", table(header, cells), "", *attribute_sentences(rows, no_verdict(results["attributes"]))])


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
