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
# Parameters of encoder and decoder together, in millions (the sizes of arXiv:2111.06377, counted by the authors' code).
MILLIONS = {"mae_vitb16": 112, "mae_vitl16": 330, "mae_vith14": 658}


def test_there_are_configs() -> None:
    assert {"mae_vitb16_in1k", "mae_vitl16_in1k", "mae_vith14_in1k", "mae_tin40", "mae_demo"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_with_the_sizes_that_its_name_says(name: str) -> None:
    cli, config = parse(["--config", name, "--data.train", "unused", "--output", "unused"])
    check(config)
    fill_in(config)
    with torch.device("meta"):
        parts = instantiate(cli, config)
    encoder = parts.model.encoder_config
    assert encoder.image_size == config.data.recipe.init_args.crop_size
    assert encoder.patch_size == int(name.split("_")[1][4:]) if "_in1k" in name else True
    assert f"--config {name}" in (SHIPPED / f"{name}.yaml").read_text()  # its header says how to run it
    if name.endswith("_in1k"):
        parameters = sum(p.numel() for p in parts.model.parameters())
        assert parameters / 1e6 == pytest.approx(MILLIONS[name.removesuffix("_in1k")], abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_config_trains(name: str, tmp_path: Path) -> None:
    synth(tmp_path / "data", samples=160, size=64, seed=0)
    arguments = ["--config", name, "--data.train", tmp_path / "data", "--output", tmp_path / "run", "--data.workers", 0]
    assert pretrain(*arguments, "--trainer.max_steps", 2, "--model.warmup_steps", 1, "--log_every", 1) == 0
    with (tmp_path / "run/metrics.csv").open() as file:
        assert len(file.readlines()) == 3
    assert load_encoder(tmp_path / "run").features(torch.zeros(1, 3, 64, 64)).isfinite().all()
