"""A run: what it leaves behind, how it goes on, and what it refuses."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from datamodules import bad_samples
from datamodules.manifest import load_manifest
from datamodules.shard_writer import ShardWriter
from datamodules.synth import synth
from datamodules.tar_index import read_index
from evaluation.report_tables import bad_counts
from evaluation.run_files import read_run
from pretrain import pretrain as pretrain_from_python
from pretrain.cli import main
from pretrain.config import parse
from pretrain.errors import NonFiniteError, RunError
from pretrain.run import train
from tasks import load_encoder
from tasks.errors import TaskError
from tests.pretrain.conftest import pretrain


def losses(run: Path) -> list[tuple[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file)]


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
    assert "is finished (8 steps)" in said and f"next: trivit evaluate {run} --train DIR --test DIR" in said
    assert len(losses(run)) == 8


def test_the_logged_loss_does_not_depend_on_accumulation(small: list[str], tmp_path: Path) -> None:
    for size in ("16", "4"):
        assert pretrain(*small, "--output", tmp_path / size, "--data.device_batch_size", size) == 0
    for (_, whole), (_, parts) in zip(losses(tmp_path / "16"), losses(tmp_path / "4"), strict=True):
        assert float(parts) == pytest.approx(float(whole), rel=1e-4)


@pytest.mark.parametrize("length", [["--trainer.max_steps", "8"], ["--trainer.max_steps", "-1", "--epochs", "0.5"]])
def test_a_resolved_config_is_a_config(length: list[str], small: list[str], tmp_path: Path) -> None:
    assert pretrain(*small, *length, "--output", tmp_path / "a") == 0
    assert pretrain("--config", tmp_path / "a/config.yaml", "--output", tmp_path / "b") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_epochs_become_steps(small: list[str], tmp_path: Path) -> None:
    assert pretrain(*small, "--output", tmp_path / "run", "--trainer.max_steps", -1, "--epochs", 0.5) == 0
    assert len(losses(tmp_path / "run")) == 3


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
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


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


@pytest.mark.parametrize("steps", [8, 12], ids=["finished", "unfinished"])
def test_other_data_is_refused_in_plain_words(
    steps: int, small: list[str], drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other, run = tmp_path / "data", tmp_path / "other", tmp_path / "run"
    shutil.copytree(drawn, data)
    synth(other, samples=40, size=32, seed=4)
    assert pretrain(*small, "--data.train", data, "--output", run) == 0
    more = ["--output", run, "--trainer.max_steps", steps, "--allow_changes", "[trainer.max_steps]"]
    capsys.readouterr()
    assert pretrain(*small, *more, "--data.train", other) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("trivit: ")]
    words = f"other data: this run was trained on {data} (96 images), now it is {other} (40 images)"
    assert len(lines) == 1 and words in lines[0] and "--allow_changes '[data.train]'" in lines[0]
    assert "finished" not in said.out
    another = [*more[:-1], "[trainer.max_steps,data.recipe.hflip]", "--data.recipe.hflip", "0"]
    assert pretrain(*small, *another, "--data.train", other) == 2  # a change of something else does not let it in
    assert words in capsys.readouterr().err

    shutil.rmtree(data)
    shutil.copytree(other, data)
    assert pretrain(*small, *more, "--data.train", data) == 2
    assert f"{data} has changed since this run was trained on it (96 images, now 40 images)" in capsys.readouterr().err
    assert pretrain(*small, *more, "--data.train", drawn) == 0  # moved, but the same
    assert len(losses(run)) == steps


def test_more_steps_when_the_user_says_so(small: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 4) == 0
    assert pretrain(*small, "--output", run) == 2
    assert pretrain(*small, "--output", run, "--allow_changes", "[trainer.max_steps]") == 0
    assert len(losses(run)) == 8


def test_nan_stops_the_run_and_names_step_and_samples(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--model.lr", "1e20", "--checkpoint_every", 1) == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: "))
    assert "NaN or infinite at step" in line and "last.ckpt is untouched" in line
    assert "--model.base_lr" not in line and "--model.lr 5e+19 --allow_changes '[model.lr]'" in line
    facts = json.loads((run / "checkpoints/non_finite_rank0.json").read_text())
    assert facts["step"] >= 2 and (facts["keys"] or facts["gradient_norm_bad"])
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert all(v.isfinite().all() for v in state["state_dict"].values() if v.is_floating_point())
    assert (run / "checkpoints/non_finite.ckpt").exists()
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    length = ["--trainer.max_steps", 8, "--allow_changes", "[model.lr]"]
    assert pretrain(*small, "--output", run, "--model.lr", 1e-6, *length) == 1  # these weights had left the earth
    assert f"at step {saved} of 8" in capsys.readouterr().out
    (run / "checkpoints/last.ckpt").unlink()
    with pytest.raises(TaskError, match="ended with NaN before its first checkpoint"):
        load_encoder(run)


def test_half_precision_on_a_cpu_is_told_in_one_line(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(*small, "--output", tmp_path / "run", "--trainer.precision", "16-mixed") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "trainer.precision 16-mixed needs a GPU: on this CPU the run takes bf16-mixed"
    assert not any("AMP" in line or "accelerator_connector" in line for line in lines)


def test_a_bad_gradient_never_reaches_the_weights_and_names_its_own_samples(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    class Poison(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            seen.append(batch["key"])

        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 3:
                next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(float("nan"))

    run = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="a gradient became NaN or infinite at step 4") as caught:
        train(*parse([*small, "--output", str(run)]), [Poison()])
    assert "last.ckpt" not in str(caught.value)  # there is none yet
    facts = json.loads((run / "checkpoints/non_finite_rank0.json").read_text())
    assert facts["step"] == 4 and facts["keys"] == seen[3]
    state = torch.load(run / "checkpoints/non_finite.ckpt", weights_only=True)["state_dict"]
    assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())


def test_too_many_bad_samples_keep_what_was_learned(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    with ShardWriter(data, samples_per_shard=100, classes=()) as writer:
        for i in range(96):
            buffer = io.BytesIO()
            Image.effect_noise((20, 20), 60).convert("RGB").save(buffer, "PNG")
            writer.write(f"{i:03d}", {"png": b"nothing" if i % 12 == 5 else buffer.getvalue()})
    run = tmp_path / "run"
    arguments = [*small, "--data.train", str(data), "--output", str(run), "--trainer.max_steps", "30"]
    assert pretrain(*arguments, "--data.bad_sample_budget", 0.05) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: "))
    assert "bad_sample_budget" in line and len((run / "bad_samples.jsonl").read_text().splitlines()) > 4
    reached = len(losses(run))
    if reached:
        assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == reached
    assert pretrain(*arguments, "--data.bad_sample_budget", 0.2) == 0
    assert len(losses(run)) == 30


def test_a_damaged_set_is_trained_on_and_every_loss_is_told(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad image, a shard that was cut, one that vanishes while running, and one that nobody had indexed, cut, too."""
    data, run = tmp_path / "data", tmp_path / "run"
    synth(data, samples=96, size=32, seed=3, samples_per_shard=24)
    foreign = (data / "synth-000000.tar").read_bytes()
    load_manifest(data)
    index = read_index(data / "synth-000001.tar")
    with (data / "synth-000001.tar").open("r+b") as file:
        file.truncate(index.members(20)["jpg"].offset)  # 4 samples lose their image
        file.seek(index.members(3)["jpg"].offset)
        file.write(b"no image")
    (data / "x.tar").write_bytes(foreign[: len(foreign) // 2])

    class Thief(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 2:
                (data / "synth-000002.tar").unlink()
                trainer.train_dataloader.stream.reader._open.clear()

    more = ["--data.train", str(data), "--output", str(run), "--trainer.max_steps", "30"]
    train(*parse([*small, *more, "--data.bad_sample_budget", "0.5"]), [Thief()])
    error = capsys.readouterr().err
    assert f"findings in the tars of {data}: trivit shards verify lists them" in error
    bad = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert f"{len(bad)} bad samples were replaced, {run / 'bad_samples.jsonl'} names them" in error
    assert len(bad) == len({(line["shard"], line["key"]) for line in bad})
    counted = Counter(line["shard"] for line in bad)
    assert counted["synth-000001.tar"] == 5 and counted["synth-000002.tar"] == 24 and counted.total() == 29
    assert all(line["reason"] for line in bad)

    capsys.readouterr()
    again = [*small, "--data.train", data, "--output", tmp_path / "again", "--data.workers", 2]
    assert pretrain(*again, "--trainer.max_steps", 30) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert len(lines) == 1 and "bad samples in" in lines[0] and "data.bad_sample_budget 0.01" in lines[0]


def test_a_full_disk_for_the_account_of_bad_samples_is_one_line(
    small: list[str], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    index = read_index(data / "synth-000000.tar")
    with (data / "synth-000000.tar").open("r+b") as file:
        file.seek(index.members(3)["jpg"].offset)
        file.write(b"no image")
    write = os.write
    monkeypatch.setattr(bad_samples.os, "write", lambda file, line: write(file, line[:10]))  # as far as there is space
    arguments = [*small, "--data.train", data, "--data.bad_sample_budget", 0.5, "--output", tmp_path / "run"]
    assert pretrain(*arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert len(lines) == 1 and "is full: free some space" in lines[0]
    monkeypatch.setattr(bad_samples.os, "write", write)
    assert pretrain(*arguments) == 0
    assert len(losses(tmp_path / "run")) == 8
    assert "1 bad samples were replaced" in capsys.readouterr().err


def test_a_callback_may_end_the_run(small: list[str], tmp_path: Path) -> None:
    class Enough(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            trainer.should_stop = True

    with pytest.raises(RunError, match="a callback ended the run at step 1 of 8"):
        train(*parse([*small, "--output", str(tmp_path / "run")]), [Enough()])


def test_a_damaged_config_is_named(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 2, "--model.warmup_steps", 1) == 0
    (run / "config.yaml").write_text("seed: [1\n")
    assert pretrain(*small, "--output", run) == 2
    assert "config.yaml is damaged" in capsys.readouterr().err


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
    assert len(losses(run)) == 8
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    shares = {name: float(value) for name, value in last.items() if name.startswith("time/")}
    assert sum(shares.values()) == pytest.approx(1) and 0 < shares["time/communication"] < 1
    assert "Computing takes" in done.stderr
    for (_, two), (_, one) in zip(losses(run), losses(alone), strict=True):
        assert float(two) == pytest.approx(float(one), rel=1e-3)
    done = subprocess.run([*command[: command.index("--trainer.devices")], "--output", str(tmp_path / "wrong")],
                          capture_output=True, text=True, timeout=240, env=environment)  # fmt: skip
    assert done.returncode != 0 and "2 processes were started" in done.stderr


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
    assert [step for step, _ in losses(run)] == [str(i) for i in range(1, 9)]


def test_a_damaged_checkpoint_is_named(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 4) == 0
    last = run / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    assert pretrain(*small, "--output", run, "--trainer.max_steps", 4) == 2
    assert "last.ckpt is damaged" in capsys.readouterr().err


def test_a_plain_folder_of_images_is_packed_once(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(40):
        Image.effect_noise((40 + i, 50), 60).convert("RGB").save(photos / f"IMG {i}.jpg")
    assert pretrain(*small, "--data.train", photos, "--output", tmp_path / "a", "--trainer.max_steps", 3) == 0
    said = capsys.readouterr().err
    assert said.count("packing 40 images") == 1 and str(tmp_path / "cache") in said
    assert "packed before" not in said  # it was opened once
    assert yaml.safe_load((tmp_path / "a/config.yaml").read_text())["data"]["train"] == str(photos)
    assert pretrain(*small, "--data.train", photos, "--output", tmp_path / "b", "--trainer.max_steps", 3) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_images_that_could_not_be_packed_are_told_at_every_start(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(30):
        Image.effect_noise((40, 50), 60).convert("RGB").save(photos / f"{i}.jpg")
    for i in range(30, 34):
        (photos / f"{i}.jpg").write_bytes(b"no image")
    (photos / "link.jpg").symlink_to(tmp_path / "nowhere")
    run, steps = tmp_path / "run", ["--trainer.max_steps", "3"]
    assert pretrain(*small, *steps, "--data.train", photos, "--output", run) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert len(lines) == 1 and "5 of 35 images" in lines[0] and "bad_sample_budget 0.01" in lines[0]
    assert not run.exists()

    steps += ["--data.bad_sample_budget", "0.2"]
    for length in ("3", "4"):
        more = ["--trainer.max_steps", length, "--allow_changes", "[trainer.max_steps]"]
        assert pretrain(*small, *steps, *more, "--data.train", photos, "--output", run) == 0
        error = capsys.readouterr().err
        assert f"5 of 35 images of {photos} could not be read and are not in it" in error and "skipped.tsv" in error
        assert f"{photos}: 30 images, packed before" in error
    shutil.rmtree(tmp_path / "cache")
    assert {entry["key"] for entry in read_run(run).bad} == {"30.jpg", "31.jpg", "32.jpg", "33.jpg", "link.jpg"}
    assert ("the link leads nowhere", 1) in bad_counts(read_run(run))


def test_wandb_offline_is_one_flag(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = tmp_path / "run"
    more = ["--wandb", "offline", "--trainer.max_steps", 3, "--log_every", 10]
    assert pretrain(*small, "--output", run, *more) == 0
    assert list(run.glob("wandb/offline-run-*/*.wandb")) and len(losses(run)) == 1
    assert not [warning for warning in recwarn if "log_every_n_steps" in str(warning.message)]


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_goes_on(small: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pretrain.cli", "pretrain", *small, "--output", str(run), "--trainer.max_steps",
               "4000", "--data.workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(losses(run) if (run / "metrics.csv").exists() else []) < 5:
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
    assert [int(s) for s, _ in losses(run)] == list(range(1, step + 3))
