"""Images of 1 to N channels and of 8 or 16 bits through the real commands, from packing to the report."""

import csv
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.loader import iterate
from datamodules.recipes import MAERecipe
from datamodules.shard_datamodule import ShardDataModule
from datamodules.shard_writer import ShardWriter
from pretrain.cli import main
from tasks.encoder_files import load_encoder
from tests.datamodules.deep_images import npy, png, tiff, values, write_deep
from tests.pretrain.conftest import SMALL, pretrain

DINO = [
    "--config", "dino_tin40", "--data.recipe.crop_size", "16", "--data.recipe.local_size", "8",
    "--data.recipe.local_views", "2", "--model.encoder.patch_size", "4", "--model.encoder.width", "24",
    "--model.encoder.depth", "2", "--model.encoder.heads", "2", "--model.encoder.eval_resize", "16",
    "--model.head.prototypes", "32", "--model.head.hidden_width", "32", "--model.head.bottleneck_width", "16",
    "--model.warmup_steps", "1", "--data.global_batch_size", "16", "--data.workers", "0",
    "--trainer.max_steps", "4", "--trainer.accelerator", "cpu", "--log_every", "1", "--data.recipe.color_on", "device",
    "--model.freeze_last_layer_epochs", "0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file)]


def folders(root: Path, c: int, bits: int, kind: str) -> Path:
    """Class folders of deep images."""
    for i in range(64):
        path = root / ("even" if i % 2 == 0 else "odd") / f"{i}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes({"npy": npy, "tif": tiff, "png": png}[kind](values(c, bits, (24, 28), i)))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("c", "bits", "kind"), [(1, 8, "npy"), (2, 8, "tif"), (4, 16, "tif"), (3, 16, "png"), (1, 16, "png")]
)
def test_from_a_folder_to_a_report(
    c: int, bits: int, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data, run = folders(tmp_path / "images", c, bits, kind), tmp_path / "set", tmp_path / "run"
    assert main(["shards", "pack", str(source), str(data), "--resize", "20"]) == 0
    capsys.readouterr()
    assert main(["shards", "stats", str(data), "--channels", str(c), "--bits", str(bits)]) == 0
    found = shlex.split(capsys.readouterr().out.splitlines()[-1])
    small = [*SMALL, "--model.encoder.eval_resize", "16", "--data.workers", "1", "--data.train", data]
    assert pretrain(*small, "--output", run, *found) == 0
    assert len(losses(run)) == 8 and np.isfinite(losses(run)).all()
    config = load_encoder(run).config
    assert (config.in_chans, config.bits, len(config.mean)) == (c, bits, c)
    assert main(["evaluate", str(run), "--train", str(data), "--test", str(data)]) == 0
    assert "raw pixels" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "No reconstructions" not in page and "No neighbours" not in page and page.count("data:image/png") > 20
    assert main(["shards", "inspect", str(data)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("c", "bits"), [(1, 8), (4, 16)])
def test_dino_sees_them_too(c: int, bits: int, tmp_path: Path) -> None:
    write_deep(tmp_path / "set", c, bits)
    options = ["--data.channels", c, "--data.bits", bits, "--data.mean", [0.5] * c, "--data.std", [0.2] * c]
    assert pretrain(*DINO, "--data.train", tmp_path / "set", "--output", tmp_path / "run", *options) == 0
    assert len(losses(tmp_path / "run")) == 4 and np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_sixteen_bits_are_more_than_eight(tmp_path: Path, workers: int) -> None:
    """A set whose high bytes are all the same: 8 bits see nothing in it, 16 bits see everything."""
    with ShardWriter(tmp_path / "set") as writer:
        for i in range(16):
            writer.write(f"{i:02d}", {"npy": npy((values(1, 16, (20, 20), i) >> 8) + np.uint16(0x4200))})
    spread = {}
    for bits in (8, 16):
        data = ShardDataModule(
            str(tmp_path / "set"), MAERecipe(16), 16, mean=(0.2588,), std=(0.002,), channels=1, bits=bits
        )
        batch = next(iterate(data.stream(), [0], workers=workers))
        batch = data.on_after_batch_transfer(batch, 0)
        assert batch["image"].dtype == torch.float32 and batch["image"].shape == (16, 1, 16, 16)
        spread[bits] = float(batch["image"].std())
    assert spread[8] < 1e-6 and 0.2 < spread[16] < 2


def test_a_grey_set_of_jpegs_becomes_one_channel(drawn: Path, small: list[str], tmp_path: Path) -> None:
    options = ["--data.channels", 1, "--data.mean", [0.5], "--data.std", [0.25], "--trainer.max_steps", 3]
    assert pretrain(*small, *options, "--output", tmp_path / "run") == 0
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["trivit"]["encoder"]["in_chans"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.channels", 4], ["data.channels 4", "`trivit shards stats", "--channels 4` finds them"]),
        (["--data.channels", 1, "--data.mean", [0.5]], ["for each of 1 channels", "stats"]),
        (["--data.channels", 0], ["data.channels 0"]),
        (["--data.bits", 12], ["data.bits", "12"]),
        (["--data.bits", 16, "--trainer.precision", "bf16-true"], ["rounds 16-bit images", "use bf16-mixed"]),
        (["--model.encoder.in_chans", 1], ["model.encoder.in_chans follows data.channels"]),
        (["--model.encoder.bits", 16], ["model.encoder.bits follows data.bits"]),
        (["--data.channels", 5, "--data.mean", [0.5] * 5, "--data.std", [0.2] * 5], ["5 were asked"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    options: list[object], words: list[str], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(*small, "--output", tmp_path / "run", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
