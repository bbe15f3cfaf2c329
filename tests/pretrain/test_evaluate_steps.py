"""Scores of a run at its steps."""

import json
from pathlib import Path

import pytest

from pretrain.checkpoint_files import LAST, PART, put_in_place
from pretrain.cli import main
from pretrain.evaluate_steps import FOLDER, HELD, held
from tests.pretrain.conftest import pretrain
from tests.pretrain.test_checkpoint_files import read, write


def evaluate(run: Path, data: Path, *more: str) -> int:
    given = ["--train", str(data), "--test", str(data), "--probes", "knn", "--by-step", *more]
    try:
        return main(["evaluate", str(run), *given])
    except SystemExit as end:
        return int(end.code or 0)


def test_each_step_is_evaluated_once_and_keeps_its_scores(
    small: list[str], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    for steps in (3, 5):
        assert pretrain(*small, "--output", run, "--trainer.max_steps", steps, "--allow_changes",
                        "[trainer.max_steps]") == 0  # fmt: skip
        assert evaluate(run, drawn) == 0
        assert f"\nstep {steps}:\n" in capsys.readouterr().out
    found = [json.loads(path.read_text())["knn"] for path in sorted(run.glob(f"{FOLDER}/step_0000000?/results.json"))]
    assert len(found) == 2 and found[0]["protocol"]["checkpoint"] != found[1]["protocol"]["checkpoint"]
    assert not (run / FOLDER / HELD).exists() and not (run / "results.json").exists()
    place = run / FOLDER / "step_00000005/results.json"
    before = place.stat().st_mtime_ns
    assert evaluate(run, drawn) == 0
    assert f"step 5 was evaluated before: {place}" in capsys.readouterr().out and place.stat().st_mtime_ns == before
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 5) == 0, "it is a run as before"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_that_is_evaluated_stays_when_training_replaces_it(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    write(folder / LAST, 1, kind)
    with held(tmp_path) as copy:
        for step in (2, 3, 4):
            write(folder / PART, step, kind)
            put_in_place(folder / PART)
        assert read(copy) == 1 and read(folder / LAST) == 4
    assert not copy.exists()


def test_bad_input_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, tmp_path) == 2
    assert "--by-step needs a run's folder" in capsys.readouterr().err
    assert evaluate(tmp_path, tmp_path, "--output", "x") == 2
    assert "leave --output out" in capsys.readouterr().err
    (tmp_path / "config.yaml").touch()
    assert evaluate(tmp_path, tmp_path) == 2
    assert "no checkpoints/last.ckpt" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate(tmp_path, tmp_path) == 2
    assert "for one process" in capsys.readouterr().err
