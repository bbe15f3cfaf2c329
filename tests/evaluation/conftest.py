"""A small labelled world for the evaluators: images in shards, an encoder, runs as `trivit pretrain` leaves them."""

import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from datamodules.shard_writer import ShardWriter
from evaluation import evaluate
from evaluation.probes import ProbeSettings
from tasks.clip import CLIP
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import save_encoder
from tasks.encoders import Encoder
from tasks.mae import MAE
from tasks.text_tower import TextConfig

CLASSES = ("ant", "bee", "<cat>", "dog", "eel", "fox")
CONFIG = EncoderConfig(arch="vit_tiny", width=24, depth=1, heads=2, image_size=16, patch_size=4, eval_resize=16)
CLIP_CONFIG = EncoderConfig(arch="vit_tiny", width=32, depth=1, heads=2, image_size=16, patch_size=8, eval_resize=16)
TEXT_CONFIG = TextConfig(width=32, depth=1, heads=2, context_length=12)
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (235, 235, 235)}


def write_images(
    folder: Path,
    count: int,
    *,
    classes: tuple[str, ...] = CLASSES,
    seed: int = 0,
    labelled: bool = True,
    bad: int = 0,
    leave_out: str = "",
) -> Path:
    """Noise around one colour per class name, not of `leave_out`; `bad` of the files are no images."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=40, classes=classes if labelled else ()) as writer:
        for i in range(count):
            label = i % len(classes)
            colour = np.random.default_rng(abs(hash_of(classes[label]))).integers(0, 255, 3)
            pixels = np.clip(colour + rng.normal(0, 45, (16, 20, 3)), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            data = b"this is no image" if i < bad else file.getvalue()
            if classes[label] == leave_out:
                continue
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


@pytest.fixture(scope="session")
def scored_once(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/mae, evaluated, and the cache that this left."""
    root = tmp_path_factory.mktemp("scored")
    run = make_run(root / "runs" / "mae", train=world / "train")
    evaluate(
        run, train=world / "train", test=world / "test", device="cpu", workers=0, progress=False,
        settings=ProbeSettings(strengths=(1.0,)), cache_dir=root / "cache",
    )  # fmt: skip
    return root


@pytest.fixture
def scored_run(scored_once: Path, cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(scored_once / "cache", cache)
    run = Path(shutil.copytree(scored_once / "runs", tmp_path / "runs")) / "mae"
    results = run / "results.json"
    results.write_text(results.read_text().replace(str(scored_once / "runs" / "mae"), str(run)))
    return run


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images of four colours, their captions (but for a fifth), and two fields."""
    folder = tmp_path_factory.mktemp("colors") / "test"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=30, classes=list(COLORS)) as writer:
        for i in range(80):
            name = list(COLORS)[i % 4]
            pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            caption = {"txt": f"a {name} square, number {i}".encode()} if i % 5 else {}
            kind = json.dumps({"colour": name, "edge": "soft" if i < 40 else "hard"}).encode()
            writer.write(f"{i:04d}", {"png": file.getvalue(), "cls": str(i % 4).encode(), "json": kind, **caption})
    return folder


@pytest.fixture(scope="session")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a moment on colours and their names."""
    torch.manual_seed(0)
    clip = CLIP(Encoder(CLIP_CONFIG), TEXT_CONFIG, joint_width=16)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3)
    colors = torch.tensor(list(COLORS.values())).float() / 255
    ids = clip.text.tokenizer([f"a photo of a {name}." for name in COLORS])
    for _ in range(40):
        images = (colors[:, :, None, None] + 0.1 * torch.randn(4, 3, 16, 16) - 0.45) / 0.226
        loss = clip.contrast(clip.encode_image(images), clip.encode_text(ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    about = {
        "format": 1, "objective": "clip", "encoder": asdict(CLIP_CONFIG), "encoder_prefix": "model.encoder.",
        "model": clip.settings(),
    }  # fmt: skip
    path = tmp_path_factory.mktemp("clip") / "clip.ckpt"
    torch.save({"trivit": about, "state_dict": {f"model.{k}": v for k, v in clip.state_dict().items()}}, path)
    return path


def clip_run(checkpoint: Path, tmp_path: Path) -> Path:
    """A folder as a run of 40 steps leaves it, with that checkpoint."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").write_bytes(checkpoint.read_bytes())
    (run / "config.yaml").write_text("model: {class_path: tasks.clip_task.CLIPTask}\ntrainer: {max_steps: 40}\n")
    return run
