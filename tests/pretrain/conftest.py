"""A small drawn data set, and a command line that trains on it in about a second."""

import csv
from pathlib import Path

import pytest

from datamodules.synth import synth
from pretrain.cli import main


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "train"
    synth(folder, samples=96, size=32, seed=3, samples_per_shard=40)
    return folder


SMALL = [
    "--config", "mae_demo", "--data.recipe.crop_size", "16", "--model.encoder.patch_size", "4",
    "--model.encoder.width", "24", "--model.encoder.depth", "2", "--model.encoder.heads", "2",
    "--model.decoder_width", "16", "--model.decoder_depth", "1", "--model.decoder_heads", "2",
    "--model.warmup_steps", "2", "--data.global_batch_size", "16", "--data.workers", "0",
    "--trainer.max_steps", "8", "--trainer.accelerator", "cpu", "--log_every", "1",
]  # fmt: skip


@pytest.fixture
def small(drawn: Path) -> list[str]:
    """Arguments of `trivit pretrain` for a tiny MAE on `drawn`; a test adds --output and what it changes."""
    return [*SMALL, "--data.train", str(drawn)]


def pretrain(*arguments: object) -> int:
    """`trivit pretrain ...` in this process; its exit code."""
    return main(["pretrain", *map(str, arguments)])


def written_losses(run: Path) -> list[tuple[str, str]]:
    """Step and loss of every row of metrics.csv, as they are written; a step that is there twice is found twice."""
    with (run / "metrics.csv").open() as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file)]
