import pytest

from evaluation.errors import EvaluationError
from evaluation.probe_options import setting_names, with_options
from evaluation.probes import ProbeSettings


def test_settings_as_users_write_them() -> None:
    pairs = [
        "ks=5,10",
        "few_shot.draws=3",
        "few_shot.shares=0.5",
        "temperature=1",
        "strengths=1,1e-2",
        "few_shot.strength=1e-3",
    ]
    settings = with_options(ProbeSettings(), pairs)
    assert settings.ks == (5, 10) and settings.temperature == 1.0 and settings.strengths == (1.0, 0.01)
    assert settings.few_shot.draws == 3 and settings.few_shot.shares == (0.5,) and settings.few_shot.strength == 1e-3
    assert settings.few_shot.shots == (1, 5, 10), "what is not named stays"
    assert "few_shot.draws" in setting_names(settings) and "device" not in setting_names(settings)


def test_texts_are_taken_as_they_are() -> None:
    settings = with_options(ProbeSettings(), ["finetune.randaugment=", "localisation.boxes=2024-01-01"])
    assert settings.finetune.randaugment == "" and settings.localisation.boxes == "2024-01-01"


@pytest.mark.parametrize(
    "pair", ["ks=-5,20", "ks=0", "ks=", "temperature=0", "temperature=.nan", "strengths=", "strengths=.nan,1",
             "strengths=-1", "few_shot.strength=.nan", "linear_mae.batch_size=1"],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_begins(pair: str) -> None:
    settings = with_options(ProbeSettings(), [pair])
    with pytest.raises(EvaluationError):
        settings.check(["knn", "linear", "few_shot", "linear_mae"], channels=3)


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("ks", "give NAME=VALUE"),
        ("kz=5", "there is no kz, but ks"),
        ("few_shot=5", "say which of few_shot.shots"),
        ("few_shot.draw=5", "there is no draw, but shots"),
        ("few_shot.draws=many", "it takes int"),
        ("few_shot.draws=1.5", "it takes int"),
        ("ks=5,x", "it takes several of int"),
        ("seed.x=5", "seed has no x"),
        ("device=cuda", "there is no device"),
        ("seed=[", "cannot be read"),
    ],
)
def test_mistakes_are_one_line(pair: str, told: str) -> None:
    with pytest.raises(EvaluationError, match=f"--set .*{told}"):
        with_options(ProbeSettings(), [pair])
