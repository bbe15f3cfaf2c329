"""Runs beside each other: who is ahead by more than chance, and who cannot be compared."""

from pathlib import Path
from typing import Any

from evaluation.report_compare import run_comparisons
from evaluation.run_files import Run


def run(name: str, test: str = "t", **scores: float) -> Run:
    """A run with these top-1, each +-2."""
    results: dict[str, Any] = {
        probe: {
            "top1": top1, "interval": [top1 - 2, top1 + 2],
            "protocol": {"classes": 10, "train": {"hash": "n"}, "test": {"hash": test}},
        }
        for probe, top1 in scores.items()
    }  # fmt: skip
    return Run(Path(name), name, "", {}, {}, results, [])


def test_the_best_is_named_and_what_is_within_the_intervals() -> None:
    runs = [run("a", knn=20, linear=30), run("b", knn=21.5, linear=40), run("c", knn=12.25)]
    assert run_comparisons(runs) == [
        "kNN: b has the most, 21.5: about the same as a (1.5 points, within the intervals), 9.3 points more than c.",
        "Linear probe: b has the most, 40.0: 10.0 points more than a.",
    ]
    assert run_comparisons(runs[:1]) == run_comparisons([run("a", knn=3), run("b", linear=3)]) == []


def test_other_images_are_no_comparison() -> None:
    runs = [run("a", knn=20), run("b", test="others", knn=40), run("c", knn=30)]
    assert run_comparisons(runs) == [
        "kNN: c has the most, 30.0: 10.0 points more than a.",
        "kNN: not on the same images, so these are not to be compared: a and c; b.",
    ]
