from pathlib import Path
from typing import Any

import pytest

from evaluation.image_probes import IMAGE_PROBES
from evaluation.probes import ProbeSettings
from evaluation.score import evaluate
from evaluation.team import Team
from pretrain.cli import main


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_says_what_is_done_and_how_to_go_on(
    cache: Path, encoder_file: Path, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(IMAGE_PROBES, "linear_mae", lambda *_: {"top1": 1.0, "interval": [0, 2], "protocol": {}})
    monkeypatch.setitem(IMAGE_PROBES, "attentive", stop)
    command = ["evaluate", str(encoder_file), "--train", str(world / "train"), "--test", str(world / "test"),
               "--probes", "linear_mae,attentive,finetune,localisation", "--no-floors"]  # fmt: skip
    assert main([*command, "--output", str(tmp_path)]) == 130
    told = capsys.readouterr().err
    assert (
        f"interrupted in attentive, which cannot go on in the middle; what was scored before is in {tmp_path}" in told
    )
    assert "Go on with --probes attentive,finetune,localisation: features" in told and "note:" not in told
    assert '"linear_mae"' in (tmp_path / "results.json").read_text()
    assert main(command) == 130
    assert "nothing was kept, since there is no --output" in capsys.readouterr().err


def test_ctrl_c_in_a_floor_says_that_the_score_is_kept(
    cache: Path, encoder_file: Path, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(IMAGE_PROBES, "linear_mae", lambda *_: {"top1": 1.0, "interval": [0, 2], "protocol": {}})
    monkeypatch.setattr("evaluation.score_images.untrained_floor", stop)
    command = ["evaluate", str(encoder_file), "--train", str(world / "train"), "--test", str(world / "test")]
    for probes, rest in (
        ("linear_mae,finetune", "Go on with --probes finetune; the floor"),
        ("linear_mae", "The floor"),
    ):
        assert main([*command, "--output", str(tmp_path), "--probes", probes]) == 130
        told = capsys.readouterr().err
        assert f"interrupted in the floor of linear_mae: its score is in {tmp_path}" in told
        assert f"only the floor is missing. {rest} comes when linear_mae is scored again" in told
    assert '"linear_mae"' in (tmp_path / "results.json").read_text()


def test_several_processes_for_a_probe_of_one_are_told(
    cache: Path, encoder_file: Path, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("evaluation.score.open_shards", stop)
    for probes, says in (
        (
            ("knn", "finetune"),
            "note: finetune runs in the first of the 8 processes: the others help with features alone",
        ),
        (("attentive", "segmentation"), "note: attentive, segmentation run in the first of the 8 processes"),
        (("knn", "linear"), ""),
    ):
        with pytest.raises(KeyboardInterrupt):
            evaluate(
                encoder_file, train=world / "train", test=world / "test", probes=probes, team=Team(0, 8), device="cpu",
                settings=ProbeSettings(),
            )  # fmt: skip
        told = capsys.readouterr().err
        assert told.startswith(says) and bool(told) == bool(says)
