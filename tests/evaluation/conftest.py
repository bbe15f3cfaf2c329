"""A small labelled world for the evaluators: images in shards, an encoder, and a run as `trivit pretrain` leaves it."""

import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from datamodules.shard_writer import ShardWriter
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import save_encoder
from tasks.encoders import Encoder
from tasks.mae import MAE

CLASSES = ("ant", "bee", "<cat>", "dog", "eel", "fox")
CONFIG = EncoderConfig(arch="vit_tiny", width=24, depth=1, heads=2, image_size=16, patch_size=4, eval_resize=16)


def write_images(
    folder: Path, count: int, *, classes: tuple[str, ...] = CLASSES, seed: int = 0, labelled: bool = True, bad: int = 0
) -> Path:
    """Noise around one colour per class name; `bad` of the files are no images."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=40, classes=classes if labelled else ()) as writer:
        for i in range(count):
            label = i % len(classes)
            colour = np.random.default_rng(abs(hash_of(classes[label]))).integers(0, 255, 3)
            pixels = np.clip(colour + rng.normal(0, 45, (16, 20, 3)), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            data = b"this is no image" if i < bad else file.getvalue()
            writer.write(f"{i:05d}", {"png": data, **({"cls": str(label).encode()} if labelled else {})})
    return folder


def hash_of(name: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(name))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ (240 images of six classes) and test/ (60), the classes in another order."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "train", 240)
    write_images(root / "test", 60, classes=CLASSES[::-1], seed=1)
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of its own."""
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(Encoder(CONFIG), path)
    return path


def make_run(folder: Path, *, train: Path, rows: int = 60, norm_pix_loss: bool = True, seed: int = 0) -> Path:
    """A finished MAE run: config.yaml, metrics.csv and a checkpoint (of an untrained model)."""
    torch.manual_seed(seed)
    mae = MAE(Encoder(CONFIG), decoder_width=16, decoder_depth=1, decoder_heads=2, norm_pix_loss=norm_pix_loss)
    (folder / "checkpoints").mkdir(parents=True)
    about = {"format": 1, "objective": "mae", "encoder": asdict(CONFIG), "encoder_prefix": "model.encoder."}
    state = {f"model.{name}": value for name, value in mae.state_dict().items()}
    torch.save(
        {"trivit": {**about, "model": mae.settings()}, "state_dict": state}, folder / "checkpoints" / "last.ckpt"
    )
    config = {
        "seed": seed, "output": str(folder), "trainer": {"max_steps": 10 * rows},
        "model": {"class_path": "tasks.mae_task.MAETask", "init_args": {"lr": 1e-3, "warmup_steps": 50}},
        "data": {"train": str(train), "global_batch_size": 8},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rng = np.random.default_rng(seed)
    lines = ["step,epoch,seconds,train/loss,train/lr,train/images_per_second,time/data,train/peak_memory,probe/extra"]
    for i in range(1, rows + 1):
        loss = 0.6 + 0.5 * np.exp(-i / (rows / 3)) + rng.normal(0, 0.005)
        lines.append(f"{10 * i},{i / 3},{2 * i},{loss},{1e-3 / i},{500 + rng.normal(0, 9)},0.02,{1 + i / 100},{i % 7}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder
