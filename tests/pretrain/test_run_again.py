"""The folder of a run, started again: by other commands, with other files in it, with a damaged or resolved config."""

from pathlib import Path

import pytest

from tests.pretrain.conftest import pretrain, written_losses


def test_another_run_or_other_files_are_left_alone(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 4, "--checkpoint_every", 2) == 0
    before = (run / "metrics.csv").read_bytes()
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 4, "--model.mask_ratio", 0.5) == 2
    error = capsys.readouterr().err
    assert "model.mask_ratio: 0.75 -> 0.5" in error
    assert "--allow_changes '[model.mask_ratio]'" in error  # bare, zsh would take it for a pattern of files
    assert (run / "metrics.csv").read_bytes() == before
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("float32_matmul: high\n", ""))  # one of an earlier trivit
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 4) == 0
    assert "float32_matmul" in config and "is finished (4 steps)" in capsys.readouterr().out

    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"x")
    assert pretrain(*small, "--output", other) == 2
    assert "no trivit run" in capsys.readouterr().err and [p.name for p in other.iterdir()] == ["holiday.jpg"]

    (other / "config.yaml").write_text("theme: dark\n")  # somebody's, not ours
    assert pretrain(*small, "--output", other) == 2
    error = capsys.readouterr().err
    assert "no trivit run" in error and "allow_changes" not in error and len(list(other.iterdir())) == 2

    file = tmp_path / "file"
    file.write_text("x")
    assert pretrain(*small, "--output", file) == 2
    assert pretrain(*small, "--output", "/proc/foo") == 2
    assert "--output /proc/foo: this folder cannot be made" in capsys.readouterr().err


def test_more_steps_when_the_user_says_so(small: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 4) == 0
    assert pretrain(*small, "--output", run) == 2
    assert pretrain(*small, "--output", run, "--allow_changes", "[trainer.max_steps]") == 0
    assert len(written_losses(run)) == 8


def test_a_damaged_config_is_named(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 2, "--model.warmup_steps", 1) == 0
    (run / "config.yaml").write_text("seed: [1\n")
    assert pretrain(*small, "--output", run) == 2
    assert "config.yaml is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("length", [["--trainer.max_steps", "8"], ["--trainer.max_steps", "-1", "--epochs", "0.5"]])
def test_a_resolved_config_is_a_config(length: list[str], small: list[str], tmp_path: Path) -> None:
    assert pretrain(*small, *length, "--output", tmp_path / "a") == 0
    assert pretrain("--config", tmp_path / "a/config.yaml", "--output", tmp_path / "b") == 0
    assert written_losses(tmp_path / "a") == written_losses(tmp_path / "b")
