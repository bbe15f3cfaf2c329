"""Scores of a run at its steps."""

import contextlib
import errno
import json
import os
import platform
import signal
import time
from pathlib import Path

import pytest

from evaluation.errors import EvaluationError
from evaluation.probes import TEXT_PROBES
from evaluation.results_file import merge, run_of
from pretrain.checkpoint_files import LAST, PART, PREVIOUS, put_in_place, remove
from pretrain.cli import main
from pretrain.evaluate_steps import DAY, FOLDER, evaluate_step, held
from tasks.encoder_files import checkpoint_hash
from tasks.errors import TaskError
from tests.pretrain.conftest import pretrain
from tests.pretrain.test_checkpoint_files import KINDS, read, write


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
    assert [result["protocol"]["source"] for result in found] == [f"{run} at step {step}" for step in (3, 5)]
    assert [path.name for path in sorted((run / FOLDER).iterdir())] == ["step_00000003", "step_00000005"]
    assert not (run / "results.json").exists()
    place = run / FOLDER / "step_00000005/results.json"
    before = place.stat().st_mtime_ns
    assert evaluate(run, drawn) == 0
    assert f"step 5 was evaluated before: {place}" in capsys.readouterr().out and place.stat().st_mtime_ns == before
    assert evaluate(run, drawn, "--probes", "knn,label_free") == 0
    scores = json.loads(place.read_text())
    assert (
        scores["knn"] == found[1]
        and scores["label_free"]["protocol"]["checkpoint"] == found[1]["protocol"]["checkpoint"]
    )
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 5) == 0, "it is a run as before"


class Evaluated:
    """Stands for `evaluate`: what was asked of it; with `killed`, it is after the first score."""

    def __init__(self, run: Path) -> None:
        self.run, self.asked, self.killed = run, tuple[str, ...](), False

    def __call__(self, source: str, *, output: Path, called: str, probes: tuple[str, ...], floors: bool) -> None:
        self.asked = probes
        protocol = {"checkpoint": checkpoint_hash(source), "source": called}
        for name in probes:
            result = {"top1": 50.0, "protocol": protocol}
            merge(output / "results.json", {name: result})
            if self.killed:
                raise KeyboardInterrupt
            if floors and name not in TEXT_PROBES:
                merge(output / "results.json", {name: result, "floors": {"untrained": {name: result}}})

    def by(self, *probes: str, floors: bool = True) -> tuple[str, ...]:
        """What is asked of it when these probes are asked for."""
        self.asked = ()
        with contextlib.suppress(KeyboardInterrupt):
            evaluate_step(self.run, self, probes=probes, floors=floors)
        return self.asked


def test_a_step_is_done_when_all_probes_have_scores_and_floors(tmp_path: Path) -> None:
    begun(tmp_path, 1, "file")
    evaluated = Evaluated(tmp_path)
    assert evaluated.by("knn") == ("knn",) and not evaluated.by("knn")
    assert evaluated.by("linear", "knn", "zeroshot") == ("linear", "zeroshot")
    assert not evaluated.by("zeroshot", "knn", "linear")
    evaluated.killed = True
    assert evaluated.by("knn", "finetune", "attentive") == ("finetune", "attentive")
    evaluated.killed = False
    assert not evaluated.by("finetune", floors=False), "its floor alone was not reached"
    assert evaluated.by("knn", "finetune", "attentive") == ("finetune", "attentive")
    assert not evaluated.by("knn", "linear", "zeroshot", "finetune", "attentive")


def test_a_step_that_was_trained_again_is_evaluated_wholly_when_more_is_asked(tmp_path: Path) -> None:
    begun(tmp_path, 1, "file")
    evaluated = Evaluated(tmp_path)
    evaluated.by("knn")
    saved(tmp_path, 1, "folder")
    assert evaluated.by("knn", "linear") == ("knn", "linear") and not evaluated.by("knn", "linear")


@pytest.mark.parametrize("text", ["{", "[]", '{"knn": 3}'])
def test_results_that_are_none_are_told_before_anything_is_computed(text: str, tmp_path: Path) -> None:
    begun(tmp_path, 1, "file")
    evaluated = Evaluated(tmp_path)
    evaluated.by("knn")
    (place := tmp_path / FOLDER / "step_00000001/results.json").write_text(text)
    with pytest.raises(EvaluationError, match=f"^{place} does not hold scores by probe: "):
        evaluated.by("linear")
    assert not evaluated.asked


def begun(run: Path, step: int, kind: str) -> None:
    """A run with a checkpoint."""
    (run / "checkpoints").mkdir()
    (run / "config.yaml").write_text("seed_everything: 0\n")
    write(run / "checkpoints" / LAST, step, kind)


def saved(run: Path, step: int, kind: str) -> None:
    """Training goes on and replaces the checkpoint."""
    write(run / "checkpoints" / PART, step, kind)
    put_in_place(run / "checkpoints" / PART)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_evaluated_stays_when_training_replaces_it(kind: str, tmp_path: Path) -> None:
    begun(tmp_path, 1, kind)
    with held(tmp_path) as (copy, at):
        for step in (2, 3, 4):
            saved(tmp_path, step, kind)
        assert read(copy) == at == 1 and read(tmp_path / "checkpoints" / LAST) == 4
        run = run_of(copy)
        assert run is not None and (run / "config.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    assert not any((tmp_path / FOLDER).iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_at_once_leave_each_other_alone(kind: str, tmp_path: Path) -> None:
    begun(tmp_path, 1, kind)
    with held(tmp_path) as (first, _):
        saved(tmp_path, 2, kind)
        with held(tmp_path) as (second, _):
            assert (read(first), read(second)) == (1, 2)
        assert read(first) == 1
    assert not any((tmp_path / FOLDER).iterdir())


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
@pytest.mark.parametrize("saves", [1, 2], ids=["moved", "removed"])
def test_a_folder_that_is_replaced_between_two_of_its_files_is_not_mixed(
    saves: int, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path, 1, "folder")
    link, linked = os.link, 0

    def meanwhile(source: str, target: Path, **where: int) -> None:
        nonlocal linked
        linked += str(source).endswith(".pt")
        if linked == 2:
            for step in range(2, 2 + saves):
                saved(tmp_path, step, "folder")
        if not links:
            raise OSError(errno.EPERM, "no links here")
        link(source, target, **where)

    monkeypatch.setattr(os, "link", meanwhile)
    with held(tmp_path) as (copy, step):
        assert read(copy) == step == (1 if saves == 1 else 3)


def test_what_is_there_in_part_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, 1, "folder")
    last = tmp_path / "checkpoints" / LAST
    pauses: list[float] = []

    def replaced(pause: float) -> None:
        pauses.append(pause)
        remove(last)
        write(last, 1 + len(pauses), "folder")

    monkeypatch.setattr(time, "sleep", replaced)
    (last / "shard_00000.pt").unlink()  # it is being removed
    with held(tmp_path) as (copy, step):
        assert read(copy) == step == 2
    last.rename(last.with_name(PREVIOUS))  # the next one has not its name yet
    with held(tmp_path) as (copy, step):
        assert read(copy) == step == 3 and len(pauses) == 2
    monkeypatch.setattr(time, "sleep", lambda _: None)
    (last / "shard_00000.pt").unlink()
    with pytest.raises(EvaluationError, match=f"^{last} is damaged: "), held(tmp_path):
        pass
    remove(last)
    with pytest.raises(TaskError, match=r"no checkpoints/last.ckpt"), held(tmp_path):
        pass
    assert not any((tmp_path / FOLDER).iterdir())


def killed(run: Path) -> Path:
    """What an evaluation leaves that is killed in its midst."""
    child = os.fork()
    if child == 0:
        with held(run):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = (run / FOLDER).iterdir()
    return left


def test_what_a_killed_evaluation_held_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, 1, "file")
    left = killed(tmp_path)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "node", lambda: "another-machine")  # where nothing is known of the process
        with held(tmp_path):
            assert left.exists()
        os.utime(left, (0, time.time() - 1.01 * DAY))
        with held(tmp_path):
            assert not left.exists()
    left.mkdir()  # by an evaluation that has just begun
    with held(tmp_path):
        assert left.exists()
    left.rmdir()
    left = killed(tmp_path)
    with held(tmp_path):
        assert not left.exists()


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
