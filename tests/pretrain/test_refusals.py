"""What is wrong whatever the data are: told at once and together, before a folder of images is packed."""

from pathlib import Path

import pytest
from jsonargparse import Namespace
from PIL import Image

from pretrain.refusals import expected_ranks
from tests.pretrain.conftest import pretrain


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plain images, not packed yet."""
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for i in range(16):
        Image.effect_noise((40, 40), 30 + i).convert("RGB").save(tmp_path / "photos" / f"{i}.jpg")
    return tmp_path / "photos"


def test_all_that_is_wrong_is_told_before_the_folder_is_packed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", "dino_demo", "--data.train", photos, "--output", tmp_path / "run", "--trainer.max_steps", 20]
    command += ["--trainer.accelerator", "cpu", "--data.global_batch_size", 16, "--data.device_batch_size", 8]
    assert pretrain(*command, "--trainer.gradient_clip_val", 1, "--model.init_encoder", tmp_path / "nowhere") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    for words in (
        "warmup_steps 30: a warm-up of 30 steps is not shorter than the run of 20",
        "Sinkhorn-Knopp cannot see across 2 accumulated micro-batches: raise data.device_batch_size to 16, use 2 "
        "devices instead of 1, or go without",
        "DINO has clip_grad", "no such checkpoint: ",
    ):  # fmt: skip
        assert words in said[0]
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_a_teacher_without_sharpening_is_noted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", "dino_demo", "--data.train", photos, "--output", tmp_path / "run", "--trainer.max_steps", 20]
    command += ["--data.global_batch_size", 32, "--trainer.accelerator", "cpu"]  # more than there are
    for temp, noted in ((0.2, True), (0.09, False)):
        assert pretrain(*command, "--model.warmup_steps", 2, "--model.teacher_temp", temp) == 2
        said = capsys.readouterr().err
        assert ("note: model.teacher_temp 0.2 is not below student_temp 0.1: " in said) is noted, said


def test_how_many_ranks_there_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def ranks(devices: object, nodes: int = 1, accelerator: str = "cpu") -> int | None:
        return expected_ranks(Namespace(devices=devices, num_nodes=nodes, accelerator=accelerator))

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert (ranks("auto"), ranks(4, 2), ranks(-1), ranks("auto", accelerator="gpu")) == (1, 8, None, None)
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert ranks("auto") == 6
