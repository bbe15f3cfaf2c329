"""Checkpoints that a thread writes while training goes on; killed: test_resume.py, on ranks: test_ranks_fail.py."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from evaluation.run_files import read_metrics
from pretrain import checkpoint_files
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.config import parse
from pretrain.errors import Interrupted
from pretrain.run import train
from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import losses

ASYNC = ["--checkpoint_async", "true"]


def test_parts_are_done_in_order_and_none_behind_one_that_failed() -> None:
    writer, done, go_on = CheckpointWriter(background=True), [], threading.Event()

    def slow() -> None:
        go_on.wait(20)
        done.append(1)

    def bad() -> None:
        raise OSError(errno.ENOSPC, "full")

    for part in (slow, lambda: done.append(2), bad, lambda: done.append(3)):
        writer.do(part)
    assert done == [] and not writer.failed
    go_on.set()
    with pytest.raises(OSError, match="full"):
        writer.wait()
    assert done == [1, 2] and not writer.failed
    writer.do(lambda: done.append(4))
    writer.wait()
    assert done == [1, 2, 4]


def test_what_is_kept_does_not_change_with_the_weights() -> None:
    weights = torch.arange(4.0)
    state = {"state_dict": {"w": weights}, "steps": [1, {"rows": (weights[:2], "x")}]}
    now, later = CheckpointWriter().keep(state), CheckpointWriter(background=True).keep(state)
    weights += 1
    state["steps"][0] = 2  # type: ignore[index]
    assert now is state
    assert later["state_dict"]["w"].tolist() == [0, 1, 2, 3]
    assert later["steps"][0] == 1 and later["steps"][1]["rows"][0].tolist() == [0, 1]


class SlowDisk:
    """In place of `save_flushed`: takes its time, counts who writes at once, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> None:
        self.write, self.fails_at = checkpoint_files.save_flushed, fails_at
        self.writing, self.most, self.steps = 0, 0, list[int]()
        monkeypatch.setattr(checkpoint_files, "save_flushed", self)

    def __call__(self, content: dict[str, Any], path: Path) -> int:
        self.writing += 1
        self.most = max(self.most, self.writing)
        self.steps.append(int(content["global_step"]))
        time.sleep(0.3)
        if content["global_step"] == self.fails_at:
            path.write_bytes(b"half")
            self.writing -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        size = self.write(content, path)
        self.writing -= 1
        return size


def test_training_goes_on_meanwhile_and_the_end_waits(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, later = tmp_path / "now", tmp_path / "later"
    assert pretrain(*small, "--output", now, "--checkpoint_every", 3) == 0
    disk = SlowDisk(monkeypatch)
    on_the_way: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if disk.writing:
                on_the_way.append(trainer.global_step)

    train(*parse([*small, *ASYNC, "--output", str(later), "--checkpoint_every", "3"]), [Watch()])
    assert disk.steps == [3, 6, 8] and disk.most == 1 and disk.writing == 0
    assert {4, 5} <= set(on_the_way)
    assert max(read_metrics(later / "metrics.csv")["time/checkpoint"]) > 0.5, "waiting for a write counts as its time"
    for name in ("last.ckpt", "previous.ckpt"):
        want, found = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (now, later))
        assert found["global_step"] == want["global_step"] == (8 if name == "last.ckpt" else 6)
        assert found.keys() == want.keys()
        for part in (lambda state: state["state_dict"], lambda state: state["optimizer_states"][0]["state"][0]):
            assert all(torch.equal(value, part(found)[name]) for name, value in part(want).items())
    assert losses(later) == losses(now) and not list(later.rglob("*.part"))


def test_a_failure_in_the_background_is_told_and_the_checkpoint_before_stays(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = [*small, *ASYNC, "--output", run, "--checkpoint_every", 3, "--trainer.max_steps", 2000]
    with monkeypatch.context() as patch:
        SlowDisk(patch, fails_at=6)
        assert pretrain(*command) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert (
        "could not write a checkpoint" in line and "No space left" in line and "checkpoint of step 3 is whole" in line
    )
    assert not list(run.rglob("*.part"))
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert max(losses(run)) < 100, "it ends soon, not at the next checkpoint"
    assert pretrain(*command, "--trainer.max_steps", 8, "--allow_changes", "[trainer.max_steps]") == 0
    assert "at step 3 of 8" in capsys.readouterr().out and list(losses(run)) == list(range(1, 9))


@pytest.mark.parametrize("fails_at", [None, 8])
def test_the_last_write_is_waited_for_and_its_failure_is_told(
    fails_at: int | None, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlowDisk(monkeypatch, fails_at)
    assert pretrain(*small, *ASYNC, "--output", tmp_path / "run") == (0 if fails_at is None else 1)
    assert (tmp_path / "run/checkpoints/last.ckpt").exists() == (fails_at is None)


def test_a_signal_waits_for_the_write_that_is_under_way_and_for_its_own(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, disk = tmp_path / "run", SlowDisk(monkeypatch)

    class Signal(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 4:
                assert disk.writing
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="at step 5 of 8"):
        train(*parse([*small, *ASYNC, "--output", str(run), "--checkpoint_every", "3"]), [Signal()])
    assert disk.steps == [3, 5] and disk.most == 1
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    assert torch.load(run / "checkpoints/previous.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("options", [[], ASYNC])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("no memory")])
def test_the_state_before_a_nan_is_called_saved_only_when_it_is(
    options: list[str], error: Exception, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write = checkpoint_files.save_flushed

    def save(content: dict[str, Any], path: Path) -> int:
        if path.name != "last.ckpt.part":
            path.write_bytes(b"half")
            time.sleep(0.3)
            raise error
        path.with_name("non_finite.ckpt").write_bytes(b"of an earlier attempt")
        return write(content, path)

    monkeypatch.setattr(checkpoint_files, "save_flushed", save)
    more = ["--model.lr", "1e20", "--checkpoint_every", 1, "--output", tmp_path / "run"]
    assert pretrain(*small, *options, *more) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert "became NaN or infinite" in line and "was saved" not in line
    reason = "No space left on device" if isinstance(error, OSError) else "RuntimeError: no memory"
    assert f"could not be saved to {tmp_path}/run/checkpoints/non_finite.ckpt ({reason})" in line
    (left,) = (tmp_path / "run").rglob("non_finite.ckpt*")
    assert left.read_bytes() == b"of an earlier attempt"
