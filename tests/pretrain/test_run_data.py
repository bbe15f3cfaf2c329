"""A run and its data: other data, bad samples, damaged sets, and folders of images that it packs itself."""

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from PIL import Image

from datamodules import bad_samples
from datamodules.manifest import load_manifest
from datamodules.shard_writer import ShardWriter
from datamodules.synth import synth
from datamodules.tar_index import read_index
from evaluation.report_tables import bad_counts
from evaluation.run_files import read_run
from pretrain.config import parse
from pretrain.run import train
from tests.pretrain.conftest import pretrain, written_losses


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
    assert len(written_losses(run)) == steps


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
    reached = len(written_losses(run))
    if reached:
        assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == reached
    assert pretrain(*arguments, "--data.bad_sample_budget", 0.2) == 0
    assert len(written_losses(run)) == 30


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
    assert len(written_losses(tmp_path / "run")) == 8
    assert "1 bad samples were replaced" in capsys.readouterr().err


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
    assert written_losses(tmp_path / "a") == written_losses(tmp_path / "b")


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
