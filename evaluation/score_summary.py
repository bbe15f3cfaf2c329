"""What `trivit evaluate` prints of kNN and linear probe: a table of the scores and the floors below them."""

from typing import Any

from datamodules.console import table
from evaluation.probe_lines import class_mean_words
from evaluation.probes import Result
from evaluation.ranks import one_decimal

NAMES = {"knn": "kNN", "linear": "linear"}
FLOOR_NAMES = {"untrained": "untrained encoder", "raw_pixels": "raw pixels"}


def summary(results: dict[str, Result], shared: dict[str, Any]) -> str:
    """A few lines for the terminal: the scores, and the floors below them."""
    probes = [name for name in NAMES if name in results]

    def cell(result: Result) -> str:
        return one_decimal(result["top1"])

    header = [
        "top-1, %",
        *(NAMES[name] + (f" (k={results[name]['protocol']['k']})" if name == "knn" else "") for name in probes),
    ]
    rows = [["this encoder", *(f"{cell(results[p])}" for p in probes)]]
    rows += [
        [name, *(cell(results["floors"][floor][p]) for p in probes)]
        for floor, name in FLOOR_NAMES.items()
        if floor in results.get("floors", {})
    ]
    rows.append(["always the largest class", *(one_decimal(shared["majority_class"]) for _ in probes)])
    half = max((r["interval"][1] - r["interval"][0]) / 2 for r in (results[p] for p in probes))
    counts = f"{shared['train']['images']:,} train and {shared['test']['images']:,} test images"
    bad = shared["train"]["bad"] + shared["test"]["bad"]
    means = [f"{NAMES[name]}: {words}" for name in probes if (words := class_mean_words(results[name]))]
    return "\n".join(
        [
            "",
            table(header, rows),
            "",
            f"{counts}, {shared['classes']} classes; 95% interval about +-{one_decimal(half)}"
            + (f"; {bad} unreadable images left out" if bad else ""),
            *means,
        ]
    )
