"""From one run to the next through the command: MAE and DINO runs as a start for DINO and CLIP."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from evaluation.report_tables import facts
from evaluation.run_files import read_run
from tasks import load_encoder
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tests.pretrain.conftest import SMALL as MAE
from tests.pretrain.conftest import pretrain
from tests.pretrain.test_clip_run import SMALL as CLIP

SIZES = ["--model.encoder.width", "24", "--model.encoder.depth", "2"]
DINO = [
    "--config", "dino_tin40", "--data.recipe.crop_size", "16", "--data.recipe.local_size", "8",
    "--model.encoder.patch_size", "4", *SIZES, "--model.encoder.heads", "2", "--model.head.prototypes", "16",
    "--model.head.hidden_width", "16", "--model.head.bottleneck_width", "8", "--model.warmup_steps", "1",
    "--model.freeze_last_layer_epochs", "0", "--data.global_batch_size", "16", "--data.workers", "0",
    "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--log_every", "1",
]  # fmt: skip


@pytest.mark.parametrize("teacher", [MAE, DINO], ids=["MAE", "DINO"])
def test_an_image_tower_from_a_run(
    teacher: list[str], drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """clip_tin40 says in one line what is to be set to start from that run; with just that it does, exactly."""
    first = tmp_path / "first"
    assert pretrain(*teacher, "--data.train", drawn, "--output", first, "--trainer.max_steps", 3) == 0
    given = load_encoder(first)
    command = [*CLIP, "--data.train", drawn, "--model.init_encoder", first, "--model.lock_image", "true"]
    command += ["--output", tmp_path / "clip"]
    assert pretrain(*command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"init_encoder {first} does not fit: " in said and "pre_norm is false there, true here" in said
    options = shlex.split(re.split("To start from it set ", said)[1])
    assert options[:2] == ["--model.encoder.norm_eps", "1e-06"] and "--model.encoder.pre_norm" in options
    assert pretrain(*command, *options) == 0  # where the refused command had begun
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_encoder(tmp_path / "clip")(images).patches, given(images).patches)


def test_dino_from_a_mae_run(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(*MAE, "--data.train", drawn, "--output", tmp_path / "mae", "--trainer.max_steps", 3) == 0
    command = [*DINO, "--data.train", drawn, "--output", tmp_path / "dino", "--model.init_encoder", tmp_path / "mae"]
    assert pretrain(*command, "--model.head_warmup_epochs", "0.3", "--trainer.max_steps", 3) == 0
    said, mae = capsys.readouterr().err, f"{tmp_path / 'mae'} (step 3)"
    assert f"starting from the encoder of {mae}, everything else new; for 2 steps only the heads learn\n" in said
    assert "step 2: the head warm-up is over" in said and said.count("the head warm-up") == 1
    assert ("encoder from", str(tmp_path / "mae")) in facts(read_run(tmp_path / "dino"))
    start, end = load_encoder(tmp_path / "mae").trunk, load_encoder(tmp_path / "dino").trunk
    moved = [(start.state_dict()[name] - value).abs().max() for name, value in end.state_dict().items()]
    assert 0 < max(moved) < 0.05  # the teacher has followed a student that began there


def test_a_timm_model_of_one_image_size(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before a step is taken; what is named as the remedy is none of it."""
    command = [
        "--config", "dino_demo", "--model.encoder.arch", "timm:efficientformerv2_s0", "--data.train", drawn,
        "--data.recipe.crop_size", 64, "--data.recipe.local_size", 32, "--data.global_batch_size", 8,
        "--data.workers", 0, "--model.warmup_steps", 0, "--model.freeze_last_layer_epochs", 0,
        "--model.head.hidden_width", 16, "--trainer.max_steps", 1, "--output", tmp_path / "run",
    ]  # fmt: skip
    assert pretrain(*command, "--data.recipe.local_views", 1) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "local views of 32" in said and "--data.recipe.local_views 0 or --data.recipe.local_size 64" in said
    encoder = Encoder(EncoderConfig("timm:efficientformerv2_s0", image_size=64, pool="mean"))
    assert encoder.cannot_see(32) and encoder.cannot_see(64) is None and encoder.training


def test_what_the_trainer_may_not_do_is_told_before_all_else(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*DINO, "--data.train", drawn, "--output", tmp_path / "run"]
    assert pretrain(*command, "--model.targets", "sinkhorn", "--data.device_batch_size", 8) == 2
    assert pretrain(*command, "--trainer.gradient_clip_val", 1) == 2
    said = capsys.readouterr().err
    assert "cannot see across 2 accumulated" in said and "set that" in said and "steps an epoch" not in said
