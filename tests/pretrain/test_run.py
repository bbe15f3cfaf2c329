"""A run: what it leaves behind, however long, started and configured."""

import csv
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from pretrain import pretrain as pretrain_from_python
from pretrain.config import parse
from pretrain.errors import RunError
from pretrain.run import train
from tests.pretrain.conftest import pretrain, written_losses


def test_a_run_leaves_what_the_contract_names(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run) == 0
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(i) for i in range(1, 9)]
    assert {
        "epoch",
        "seconds",
        "train/loss",
        "train/lr",
        "train/images_per_second",
        "train/grad_norm",
        "time/data",
        "train/peak_memory",
    } <= rows[0].keys()
    for row in rows:
        assert sum(float(value) for name, value in row.items() if name.startswith("time/")) == pytest.approx(1)
        assert float(row["time/backward"]) > 0 and float(row["time/data"]) > 0
    with_torch, here = 0.1, 64.0  # GiB
    peaks = [float(row["train/peak_memory"]) for row in rows]
    assert with_torch < peaks[0] and peaks == sorted(peaks) and peaks[-1] < here
    assert float(rows[0]["train/lr"]) == 0.0  # the first iteration of the original schedule
    assert float(rows[-1]["epoch"]) == pytest.approx(8 / 6)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 8 and config["model"]["init_args"]["encoder"]["image_size"] == 16
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 8 and state["trivit"]["objective"] == "mae"
    assert not list(run.rglob("*.part")) and not (run / ".lock").exists()

    assert pretrain(*small, "--output", run) == 0
    said = capsys.readouterr().out
    assert "is finished (8 steps)" in said
    assert f"next: trivit evaluate {run} --train DIR --test DIR (labelled images); without labels: " in said
    assert said.strip().endswith(f"trivit report {run}")
    assert len(written_losses(run)) == 8


def test_the_logged_loss_does_not_depend_on_accumulation(small: list[str], tmp_path: Path) -> None:
    for size in ("16", "4"):
        assert pretrain(*small, "--output", tmp_path / size, "--data.device_batch_size", size) == 0
    for (_, whole), (_, parts) in zip(written_losses(tmp_path / "16"), written_losses(tmp_path / "4"), strict=True):
        assert float(parts) == pytest.approx(float(whole), rel=1e-4)


def test_epochs_become_steps(small: list[str], tmp_path: Path) -> None:
    assert pretrain(*small, "--output", tmp_path / "run", "--trainer.max_steps", -1, "--epochs", 0.5) == 0
    assert len(written_losses(tmp_path / "run")) == 3


def test_half_precision_on_a_cpu_is_told_in_one_line(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(*small, "--output", tmp_path / "run", "--trainer.precision", "16-mixed") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "trainer.precision 16-mixed needs a GPU: on this CPU the run takes bf16-mixed"
    assert not any("AMP" in line or "accelerator_connector" in line for line in lines)


def test_a_callback_may_end_the_run(small: list[str], tmp_path: Path) -> None:
    class Enough(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            trainer.should_stop = True

    with pytest.raises(RunError, match="a callback ended the run at step 1 of 8"):
        train(*parse([*small, "--output", str(tmp_path / "run")]), [Enough()])


def test_handlers_are_given_back_and_threads_may_train(small: list[str], tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert pretrain(*small, "--output", tmp_path / "a", "--trainer.max_steps", 3) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(pretrain(*small, "--output", tmp_path / "b", "--trainer.max_steps", 3))
    )
    thread.start()
    thread.join()
    assert codes == [0]


def test_python_values_are_settings(small: list[str], drawn: Path, tmp_path: Path) -> None:
    names, values = small[2::2], small[3::2]
    settings: dict[str, Any] = {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}
    settings |= {"model.lr": None, "model.base_lr": 1e-3, "model.betas": (0.9, 0.99), "trainer.max_steps": 3}
    run = pretrain_from_python("mae_demo", tmp_path / "run", settings)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["betas"] == [0.9, 0.99]


@pytest.mark.slow
def test_two_ranks_are_one_run(small: list[str], tmp_path: Path) -> None:
    """torchrun with two processes: one folder, the losses of one process, resumed by one process."""
    run, alone = tmp_path / "two", tmp_path / "one"
    more = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--checkpoint_every", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "pretrain.cli", "pretrain", *small, *more, "--output", str(run)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks x 8 x 1 accumulated" in done.stderr
    assert pretrain(*small, "--output", alone) == 0
    assert len(written_losses(run)) == 8
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    shares = {name: float(value) for name, value in last.items() if name.startswith("time/")}
    assert sum(shares.values()) == pytest.approx(1) and 0 < shares["time/communication"] < 1
    assert "Computing takes" in done.stderr
    for (_, two), (_, one) in zip(written_losses(run), written_losses(alone), strict=True):
        assert float(two) == pytest.approx(float(one), rel=1e-3)
    done = subprocess.run([*command[: command.index("--trainer.devices")], "--output", str(tmp_path / "wrong")],
                          capture_output=True, text=True, timeout=240, env=environment)  # fmt: skip
    assert done.returncode != 0 and "2 processes were started" in done.stderr


def test_wandb_offline_is_one_flag(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = tmp_path / "run"
    more = ["--wandb", "offline", "--trainer.max_steps", 3, "--log_every", 10]
    assert pretrain(*small, "--output", run, *more) == 0
    assert list(run.glob("wandb/offline-run-*/*.wandb")) and len(written_losses(run)) == 1
    assert not [warning for warning in recwarn if "log_every_n_steps" in str(warning.message)]
