from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.run_files import Run, read_run
from evaluation.verdict import compare, judge
from tests.evaluation.conftest import make_run


def results(top1: float, raw: float, untrained: float) -> dict[str, Any]:
    return {
        "knn": {"top1": top1, "interval": [top1 - 1.5, top1 + 1.5]},
        "floors": {"raw_pixels": {"knn": {"top1": raw}}, "untrained": {"knn": {"top1": untrained}}},
    }


OTHERS: dict[str, Any] = {
    "finetune": {"top1": 47.9, "interval": [34.5, 61.7], "protocol": {}},
    "attributes": {"top1": 45.0, "of": {}},
    "retrieval": {"image_to_text": {"recall@1": 12.0}, "text_to_image": {"recall@1": 9.0}},
    "floors": {"untrained": {"finetune": {"top1": 20.0, "interval": [15.0, 25.0], "protocol": {}}}},
}


def test_what_other_probes_found_is_told_where_the_verdict_has_nothing_to_rest_on(run: Run) -> None:
    verdict = judge(replace(run, results=OTHERS))
    assert verdict.tone == "fair" and verdict.headline == "It learns; neither kNN nor a linear probe has been run."
    assert verdict.details[-4:] == (
        "A verdict on features rests on kNN, linear probe or zero-shot. Others found:",
        "finetune: top-1 47.9% (34.5 to 61.7); the untrained encoder top-1 20.0% (15.0 to 25.0).",
        "attributes: 45.0% on average, see the table below.",
        "retrieval: recall@1 image to text 12.0%, text to image 9.0%.",
    )
    assert not any("finetune" in detail for detail in judge(replace(run, results=OTHERS | results(30, 15, 12))).details)


def test_scores_without_a_run_are_judged_by_themselves(tmp_path: Path) -> None:
    found = results(30.0, 15.1, 12.2)
    found["knn"]["protocol"] = {"source": "timm:some_vit"}
    alone = Run(tmp_path, "out", "", {}, {}, found, [], scores_only=True)
    verdict = judge(alone)
    assert verdict.headline == "The features are clearly better than raw pixels and the untrained encoder."
    assert verdict.details[0].startswith("Scores of timm:some_vit: there is no run of it here")
    assert not any("step" in detail for detail in verdict.details)
    assert judge(replace(alone, results=OTHERS)).headline == "Neither kNN nor a linear probe has been run."


@pytest.mark.parametrize(
    ("top1", "level", "words"),
    [
        (21.6, "above", ("6.5 points above raw pixels (15.1)", "9.4 points above the untrained encoder (12.2)")),
        (16.0, "near", ("about the same as raw pixels (15.1)", "3.8 points above the untrained encoder (12.2)")),
        (9.0, "below", ("6.1 points below raw pixels (15.1)", "3.2 points below the untrained encoder (12.2)")),
    ],
)
def test_scores_against_their_floors(top1: float, level: str, words: tuple[str, ...]) -> None:
    found, text, *_ = compare(results(top1, 15.1, 12.2), "knn")
    assert found == level
    assert all(word in text for word in words)


@pytest.mark.parametrize(("percent", "tone"), [(2.0, "good"), (30.0, "fair")])
def test_a_verdict_rests_on_test_images_that_are_not_in_train(run: Run, percent: float, tone: str) -> None:
    found = results(70.6, 15.1, 12.2)
    found["knn"]["protocol"] = {"shared_images": {"images": 9, "percent": percent, "note": "9 are in train, too"}}
    verdict = judge(replace(run, results=found))
    assert verdict.tone == tone and any(told.startswith("kNN: 9 are in train, too") for told in verdict.details)
    assert ("better" in verdict.headline) == (tone == "good")


def test_scores_without_floors() -> None:
    found = compare({"knn": {"top1": 20.0}}, "knn")
    assert found[:2] == ("unknown", "kNN: 20.0% of the test images get the right class.")


def test_a_floor_is_uncertain_too() -> None:
    """A score whose interval leaves out the floor's value, but not by enough when both are estimates."""
    found = results(17.0, 15.1, 12.2)
    assert compare(found, "knn").level == "above"
    found["floors"]["raw_pixels"]["knn"]["interval"] = [13.6, 16.7]
    assert compare(found, "knn")[:3:2] == ("near", "kNN not clearly above raw pixels")
    low = {key: {**value} for key, value in found.items()}
    low["knn"] = {"top1": 13.0, "interval": [11.6, 14.5]}
    assert compare(low, "knn").level == "near"
    low["knn"] = {"top1": 12.5, "interval": [11.1, 14.0]}
    assert compare(low, "knn")[:3:2] == ("below", "kNN below raw pixels")


def test_the_largest_class_is_a_floor_that_every_score_has(run: Run) -> None:
    alone: dict[str, Any] = {"knn": {"top1": 12.5, "interval": [9, 18], "protocol": {"majority_class": 11.0}}}
    found = compare(alone, "knn")
    assert found.level == "near" and "about the same as always naming the largest class (11.0)." in found.text
    verdict = judge(replace(run, results=alone))
    assert verdict.tone == "bad"
    assert verdict.headline == "The features are not clearly better than always naming the largest class."
    alone["knn"]["protocol"]["majority_class"] = 5.0
    assert compare(alone, "knn").level == "unknown"
    assert "right class, 7.5 points above always naming the largest class (5.0)." in compare(alone, "knn").text
    assert judge(replace(run, results=alone)).headline == "There are scores, but no floors to compare them with."
    skewed = results(85.0, 70.0, 71.0)
    skewed["knn"]["protocol"] = {"majority_class": 90.0}
    found = compare({**skewed, "floors": results(0, 85.0, 85.0)["floors"]}, "knn")
    assert "class, about the same as raw pixels (85.0) and the untrained encoder (85.0) and 5.0 points" in found.text
    found = compare(skewed, "knn")
    assert found.level == "below" and "(70.0), 14.0 points above the untrained encoder (71.0) and 5.0 points below" in (
        found.text
    )
    both = {**alone, "linear": {"top1": 5.5, "interval": [3, 9], "protocol": {"majority_class": 5.0}}}
    assert judge(replace(run, results=both)).headline.endswith(
        "probes disagree: kNN without floors, linear not clearly above always naming the largest class."
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(make_run(tmp_path / "run", train=tmp_path / "data"))


def test_verdict_of_a_run(run: Run) -> None:
    assert judge(run).tone == "fair"
    assert "nothing has been scored yet" in judge(run).headline
    good = judge(replace(run, results=results(30.0, 15.1, 12.2)))
    assert (good.tone, good.headline) == (
        "good", "It learns: the features are clearly better than raw pixels and the untrained encoder.",
    )  # fmt: skip
    assert any("finished: 600 steps" in detail for detail in good.details)
    assert judge(replace(run, results=results(15.0, 15.1, 12.2))).tone == "bad"
    asked = {"zeroshot": {"top1": 30.0}, "floors": {"chance": {"zeroshot": {"top1": 10.0}}}}
    assert judge(replace(run, results=asked)).headline == "It learns: the features are clearly better than chance."
    assert judge(replace(run, results={"knn": {"top1": 20.0}})).tone == "fair"
    young = {name: values[:1] for name, values in run.metrics.items()}
    assert judge(replace(run, metrics=young, results=results(30.0, 15.1, 12.2))).headline.startswith("The features")


def test_a_diverged_run_is_bad_whatever_its_scores(run: Run) -> None:
    loss = run.metrics["train/loss"].copy()
    loss[-3:] = np.nan
    ill = replace(run, metrics={**run.metrics, "train/loss": loss}, results=results(30.0, 15.1, 12.2))
    assert judge(ill).tone == "bad"
    assert "diverged" in judge(ill).headline


def test_one_probe_above_is_fair(run: Run) -> None:
    mixed = results(30.0, 15.1, 12.2)
    mixed["linear"] = {"top1": 20.0, "interval": [18.0, 22.0]}
    mixed["floors"]["raw_pixels"]["linear"] = {"top1": 19.5}
    assert judge(replace(run, results=mixed)).tone == "fair"
    below = results(9.0, 15.1, 8.8)
    below["linear"] = {"top1": 30.0, "interval": [28.0, 32.0]}
    below["floors"]["raw_pixels"]["linear"] = {"top1": 19.5}
    verdict = judge(replace(run, results=below))
    assert (verdict.tone, verdict.headline) == (
        "fair", "It learns; the probes disagree: linear above the floors, kNN below raw pixels.",
    )  # fmt: skip


def test_a_run_of_less_than_one_epoch_is_told_to_learn_so_far(run: Run) -> None:
    begun = replace(run, metrics={**run.metrics, "epoch": run.metrics["epoch"] / 41})
    assert judge(begun).headline == "It learns so far (after 0.49 epochs); nothing has been scored yet."
    good = judge(replace(begun, results=results(30.0, 15.1, 12.2)))
    assert good.headline.startswith("It learns so far (after 0.49 epochs): the features are clearly")
    assert judge(run).headline == "It learns; nothing has been scored yet."
