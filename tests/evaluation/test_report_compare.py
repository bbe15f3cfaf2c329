"""Runs beside each other: who is ahead by more than chance, and who cannot be compared."""

import json
import re
from pathlib import Path
from typing import Any

from evaluation.report import report
from evaluation.report_compare import run_comparisons
from evaluation.report_tables import score_table
from evaluation.run_files import Run


def run(name: str, test: str = "t", terms: dict[str, Any] | None = None, **scores: float) -> Run:
    """A run with these top-1, each +-2."""
    results: dict[str, Any] = {
        probe: {
            "top1": top1, "interval": [top1 - 2, top1 + 2],
            "protocol": {"classes": 10, "train": {"hash": "n"}, "test": {"hash": test}} | (terms or {}),
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
        "kNN: not scored alike, so these are not to be compared: a and c; b (other images).",
    ]


def test_other_terms_are_no_comparison_and_are_named_in_the_table() -> None:
    usual = {"k": 20, "crop": 64, "pool": "mean", "precision": "float32", "test": {"hash": "t", "images": 200}}
    runs = [run("far", terms=usual | {"k": 6, "crop": 96, "test": {"hash": "o", "images": 43}, "classes": 2}, knn=90)]
    runs += [
        run("half", terms=usual | {"precision": "bfloat16"}, knn=45),
        run("cls", terms=usual | {"pool": "cls"}, knn=44),
    ]
    runs += [run("a", terms=usual, knn=20), run("b", terms=usual, knn=30)]
    for each in runs:
        each.config["model"] = {"encoder": {"image_size": 64, "pool": "mean"}}
    small = run("small", terms=usual | {"crop": 48, "resize": 48, "pool": "cls"}, knn=10)
    small.config["model"] = {"encoder": {"image_size": 48, "pool": "cls"}}
    assert "20.0 points more than small" in run_comparisons([*runs, small])[0]  # each as it sees images by itself
    assert run_comparisons(runs) == [
        "kNN: b has the most, 30.0: 10.0 points more than a.",
        "kNN: not scored alike, so these are not to be compared: a and b; far (43 other images, 2 classes, k = 6, "
        "96 px); half (bfloat16); cls (pool cls).",
    ]
    table = score_table(runs)
    assert table is not None
    cells = {row["name"]: row["cells"][0] for row in table["rows"]}
    assert cells["far"]["terms"] == ["43 other images", "2 classes", "k = 6", "96 px"]
    assert [name for name, cell in cells.items() if cell["foreign"]] == ["far", "half", "cls"]
    assert (table["scale"], table["k"], table["images"], table["classes"]) == (30, 20, 200, 10)
    more = run("more", terms=usual | {"train": {"hash": "m", "images": 9}}, knn=50)
    assert "more (learnt from 9 other images)" in run_comparisons([*runs[3:], more])[1]


def test_what_is_not_as_the_run_does_it_unasked_is_said_beside_its_number() -> None:
    one = run("a", terms={"crop": 96, "precision": "float16"}, knn=20, linear=30)
    one.config["model"] = {"init_args": {"encoder": {"image_size": 48, "pool": "mean"}}}
    one.results["linear"]["protocol"] |= {"crop": 48, "precision": "float32", "pool": "mean"}
    table = score_table([one])
    assert table is not None
    first, second = table["rows"][0]["cells"]
    assert (first["terms"], first["foreign"], second["terms"]) == (["96 px", "float16"], False, [])


def test_floors_say_whose_they_are_where_more_than_one_run_is_shown() -> None:
    floors = {"untrained": {"knn": {"top1": 12.0}}, "chance": {"knn": {"top1": 10.0}}}
    a, b, c = run("a", knn=20), run("b", knn=30), run("c", knn=30)
    a.results["floors"], b.results["floors"] = floors, {**floors, "untrained": {"knn": {"top1": 13.0}}}
    c.results["floors"] = {"chance": floors["chance"]}

    def names(*runs: Run) -> list[str]:
        table = score_table(runs)
        assert table is not None
        return [row["name"] for row in table["rows"] if row["kind"] == "floor"]

    assert names(a) == ["Untrained encoder", "Chance"]
    assert names(a, c) == ["Untrained encoder (a)", "Chance"]
    assert names(a, b, c) == ["Untrained encoder (a)", "Chance", "Untrained encoder (b)"]


def test_the_page_draws_no_bar_for_other_terms_and_marks_them_in_further_probes(tmp_path: Path) -> None:
    few = {"by_labels": {"5": {"top1": 9.0}}}
    for name, crop in (("a", 48), ("b", 48), ("c", 96)):
        made = run(
            name, terms={"crop": crop, "test": {"hash": "t", "images": 50, "path": "gone"}}, knn=20 + crop, few_shot=9
        )
        made.results["few_shot"] |= few
        made.results["few_shot"]["protocol"]["draws"] = 3
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("model: {encoder: {image_size: 48}}")
        (tmp_path / name / "results.json").write_text(json.dumps(made.results))
    page = report([tmp_path / name for name in "abc"]).read_text()
    assert page.count('<span class="bar"') == 2
    (apart,) = re.findall(r'<td class="foreign">(.*?)</td>', page)
    assert '<small class="terms">96 px</small>' in apart
    assert page.count('<b>few_shot</b> <small class="unusual">(96 px)</small>:') == 1
