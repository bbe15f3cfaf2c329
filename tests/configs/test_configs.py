"""Every shipped config builds (the large ones on the meta device); the small ones train, evaluate and load."""

from pathlib import Path

import pytest
import torch

from datamodules.synth import synth
from pretrain.checks import check, fill_in
from pretrain.config import SHIPPED, instantiate, parse
from tasks import load_encoder
from tests.pretrain.conftest import pretrain

CONFIGS = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
SMALL = [name for name in CONFIGS if name.endswith(("_demo", "_tin40"))]
# Parameters in millions, counted by the authors' code: MAE with its decoder, DINO's student encoder, CLIP's two towers.
MILLIONS = {
    "mae_vitb16_in1k": 112, "mae_vitl16_in1k": 330, "mae_vith14_in1k": 658,
    "dino_vits16_in1k": 21.7, "dino_vits8_in1k": 21.7, "dino_vitb16_in1k": 85.8, "dinov2_vitl16_in1k": 303.3,
    "clip_vitb32": 151.28, "clip_vitb16": 149.62, "clip_vitl14": 427.62, "siglip_vitb16": 203.16,
}  # fmt: skip


def test_there_are_configs() -> None:
    assert {*MILLIONS, "mae_tin40", "mae_demo", "dino_tin40", "clip_tin40"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_with_the_sizes_that_its_name_says(name: str) -> None:
    cli, config = parse(["--config", name, "--data.train", "unused", "--output", "unused"])
    check(config)
    fill_in(config)
    with torch.device("meta"):
        parts = instantiate(cli, config)
    encoder = parts.model.encoder_config
    assert encoder.image_size == config.data.recipe.init_args.crop_size
    assert encoder.patch_size == int(name.split("_")[1][4:]) if name in MILLIONS else True
    assert f"--config {name}" in (SHIPPED / f"{name}.yaml").read_text()  # its header says how to run it
    if name in MILLIONS:
        model = parts.model.model.student.encoder if name.startswith("dino") else parts.model.model
        parameters = sum(p.numel() for p in model.parameters())
        assert parameters / 1e6 == pytest.approx(MILLIONS[name], rel=1e-4 if "clip" in name else 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_config_trains(name: str, tmp_path: Path) -> None:
    synth(tmp_path / "data", samples=160, size=64, seed=0)
    arguments = ["--config", name, "--data.train", tmp_path / "data", "--output", tmp_path / "run", "--data.workers", 0]
    assert pretrain(*arguments, "--trainer.max_steps", 4, "--model.warmup_steps", 1, "--log_every", 1) == 0
    with (tmp_path / "run/metrics.csv").open() as file:
        assert len(file.readlines()) == 5
    assert load_encoder(tmp_path / "run").features(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_dinov2_is_as_it_was_published() -> None:
    """Where the authors' code does something else than the paper says, as their weights were trained."""
    cli, config = parse(["--config", "dinov2_vitl16_in1k", "--data.train", "unused", "--output", "unused"])
    fill_in(config)
    with torch.device("meta"):
        student = instantiate(cli, config).model.model.student
    shares = {path.drop_prob for block in student.encoder.blocks for path in (block.drop_path1, block.drop_path2)}
    assert shares == {0.3} and student.patch_head is None
    assert list(config.data.recipe.init_args.blur_probability) == [0.0, 0.9, 0.5]  # dinov2 pull request 411
