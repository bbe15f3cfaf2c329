"""A run goes on from its last checkpoint: exactly, after Ctrl-C, a full disk, and not from a damaged one."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from pretrain.cli import main
from pretrain.config import parse
from pretrain.run import train
from tests.pretrain.conftest import pretrain, written_losses


@pytest.mark.parametrize(("stop_at", "log_every"), [(3, "1"), (6, "4"), (7, "1")])
def test_resume_is_exact(stop_at: int, log_every: str, small: list[str], tmp_path: Path) -> None:
    """Killed without warning after `stop_at` steps, with accumulation and drop path: bit for bit the same losses."""
    more = ["--data.device_batch_size", "8", "--model.encoder.drop_path", "0.2", "--checkpoint_every", "3"]
    more += ["--log_every", log_every]
    assert pretrain(*small, *more, "--output", tmp_path / "whole") == 0

    class Killed(Exception):
        pass

    class Killer(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == stop_at:
                raise Killed

    with pytest.raises(Killed):
        train(*parse([*small, *more, "--output", str(tmp_path / "killed")]), [Killer()])
    assert pretrain(*small, *more, "--output", tmp_path / "killed") == 0
    assert written_losses(tmp_path / "killed") == written_losses(tmp_path / "whole")


def test_a_full_disk_keeps_the_last_checkpoint(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    save = Trainer.save_checkpoint

    def full(self: Trainer, path: Path, *rest: object, **more: object) -> None:
        if self.global_step == 6:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, *rest, **more)

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    assert pretrain(*small, "--output", run, "--checkpoint_every", 3) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(run.rglob("*.part"))
    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    assert pretrain(*small, "--output", run, "--checkpoint_every", 3) == 0
    assert [step for step, _ in written_losses(run)] == [str(i) for i in range(1, 9)]


def test_a_damaged_checkpoint_is_named(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 4) == 0
    last = run / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 4) == 2
    assert "last.ckpt is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_goes_on(small: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pretrain.cli", "pretrain", *small, "--output", str(run), "--trainer.max_steps",
               "4000", "--data.workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(written_losses(run) if (run / "metrics.csv").exists() else []) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group, workers too
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    line = next(line for line in error.splitlines() if line.startswith("trivit: "))
    step = int(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"])
    assert f"at step {step} of 4000" in line and "same command" in line
    assert main(["pretrain", *small, "--output", str(run), "--trainer.max_steps", str(step + 2), "--allow_changes",
                 "[trainer.max_steps]"]) == 0  # fmt: skip
    assert [int(s) for s, _ in written_losses(run)] == list(range(1, step + 3))
