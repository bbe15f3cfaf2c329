"""results.json: what stays beside new scores, what goes, and what is said of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.results_file import merge


def score(checkpoint: str, test: str) -> dict[str, Any]:
    return {"top1": 1.0, "protocol": {"checkpoint": checkpoint, "test": {"hash": test}}}


def test_scores_on_other_images_and_of_other_checkpoints_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "results.json"
    merge(place, {"knn": score("a", "x"), "linear": score("a", "x")})
    merge(place, {"knn": score("a", "x")})
    assert capsys.readouterr().err == ""
    merge(place, {"knn": score("a", "y")})
    said = capsys.readouterr().err
    assert "replaced knn, scored on other test images; evaluate with --output" in said and "linear" not in said
    merge(place, {"attentive": score("b", "y")})
    assert "dropped knn, linear, of another checkpoint" in capsys.readouterr().err
    assert set(json.loads(place.read_text())) == {"attentive"}
