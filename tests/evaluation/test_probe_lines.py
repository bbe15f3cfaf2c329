import json
from pathlib import Path

import pytest

from evaluation.probe_lines import probe_lines
from evaluation.probe_tables import probe_tables
from evaluation.report import report
from tests.evaluation.conftest import make_run

RESULTS = {
    "few_shot": {
        "top1": 12.0, "interval": [10, 14], "protocol": {"draws": 5},
        "by_labels": {"1": {"top1": 4.04}, "10%": {"top1": 12.0}},
    },
    "label_free": {"rankme": 25.04, "uniformity": -2.244, "purity": 6.0, "interval": [5, 7], "protocol": {}},
    "corruptions": {
        "top1": 9.1, "interval": [8, 10], "clean": 11.8, "protocol": {},
        "by_kind": {"fog": [1, 2], "motion_blur": [1, 0]},
    },
    "segmentation": {"miou": 50.0, "interval": [49, 51], "majority_miou": 40.0, "protocol": {}},
    "localisation": {"corloc": 30.0, "interval": [28, 32], "whole_image": 20.0, "protocol": {}},
    "suite:mine": {"mean": 40.0, "of": {"a": {"value": 40.0}}, "failed": {"b": "no such data"}, "protocol": {}},
    "floors": {
        "untrained": {"segmentation": {"miou": 41.0, "interval": [40, 42], "majority_miou": 40.0, "protocol": {}}}
    },
}  # fmt: skip


def test_a_line_for_each_probe_and_its_floors() -> None:
    assert probe_lines(RESULTS) == [
        "few_shot: 1: 4.0%, 10%: 12.0% (5 draws of so many labels of each class, or share of train)",
        "label_free: RankMe 25.0, uniformity -2.24, purity 6.0%",
        "corruptions: top-1 9.1% (8.0 to 10.0) of spoiled images, 11.8% of clean ones; worst: motion blur",
        "segmentation: mean IoU 50.0% (49.0 to 51.0) (the most frequent class: 40.0%)",
        "  the untrained encoder mean IoU 41.0% (40.0 to 42.0) (the most frequent class: 40.0%)",
        "localisation: CorLoc 30.0% (28.0 to 32.0) (whole image: 20.0%)",
        "suite mine: mean 40.0% (a 40.0%); not scored: b",
    ]
    assert probe_lines({"knn": {"top1": 1.0}}) == []


def test_the_report_has_them(world: Path, tmp_path: Path, cache: Path) -> None:
    run = make_run(tmp_path / "run", train=world / "train")
    assert "Further probes" not in report([run]).read_text()
    (run / "results.json").write_text(json.dumps(RESULTS))
    page = report([run]).read_text()
    assert "Further probes" in page and "CorLoc 30.0% (28.0 to 32.0)" in page
    assert "<small>the untrained encoder mean IoU 41.0%" in page
    assert "<b>few_shot</b>: Logistic regression" in page and "few_shot</b>: 1: 4.0%" not in page
    assert '<tr><th scope="row">10% of train</th><td>–</td><td>12.0</td></tr>' in page


def test_several_numbers_are_a_table_with_intervals_beside_the_floors() -> None:
    def found(top1: float) -> dict[str, object]:
        by = {
            "1": {"top1": top1, "interval": [top1 - 1, top1 + 1.04], "images": 6},
            "10%": {"top1": 50.0, "images": 1024},
        }
        return {"by_labels": by, "protocol": {"draws": 5}}

    free = {"rankme": 25.04, "uniformity": -2.244, "protocol": {"k": 10}}
    purity = {"purity": 6.0, "interval": [5, 7.25]}
    floors = {"raw_pixels": {"few_shot": found(3.0)}, "untrained": {"few_shot": found(5.0), "label_free": free}}
    few, free_table = probe_tables({"few_shot": found(12.0), "label_free": free | purity, "floors": floors})
    assert "mean of 5 draws" in few.note
    assert few.header == ("Labels", "Train images", "These features", "Untrained encoder", "Raw pixels")
    assert few.rows == [
        ("1 of each class", "6", "12.0 (11.0 to 13.0)", "5.0 (4.0 to 6.0)", "3.0 (2.0 to 4.0)"),
        ("10% of train", "1,024", "50.0", "50.0", "50.0"),
    ]
    assert free_table.header == ("", "These features", "Untrained encoder")
    assert [row[1:] for row in free_table.rows] == [("25.0", "25.0"), ("-2.24", "-2.24"), ("6.0 (5.0 to 7.3)", "–")]
    assert free_table.rows[2][0] == "Neighbours of the same class, % (of 10)"
    (without,) = probe_tables({"label_free": free})
    assert len(without.rows) == 2 and "interval" not in without.note


@pytest.mark.parametrize("failed", [{}, {"b": "gone"}])
def test_a_suite_without_scores(failed: dict[str, str]) -> None:
    (line,) = probe_lines({"suite:x": {"mean": None, "of": {}, "failed": failed}})
    assert line.startswith("suite x: no task was scored")


def test_a_suite_of_two_kinds_has_two_means() -> None:
    of = {"a": {"metric": "knn.top1", "value": 40.0}, "b": {"metric": "segmentation.miou", "value": 10.0}}
    found = {"mean": None, "means": {"accuracy": 40.0, "miou": 10.0}, "of": of, "failed": {}}
    (line,) = probe_lines({"suite:x": found})
    assert line == "suite x: mean accuracy 40.0%, miou 10.0% (a knn.top1 40.0%, b segmentation.miou 10.0%)"
