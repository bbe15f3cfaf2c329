"""`trivit evaluate` takes an encoder and images in every form that its help names, and says the same about the same."""

import argparse
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIP as OpenCLIP

from datamodules.open_shards import open_shards
from datamodules.tar_index import read_index
from evaluation import evaluate
from pretrain.cli import main
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.export import export
from tasks.mae_task import MAETask
from tests.evaluation.conftest import clip_run
from tests.tasks.test_export import checkpoint

OURS = EncoderConfig(arch="vit_tiny", width=24, depth=1, heads=2, image_size=32, patch_size=8, eval_resize=32)
THEIRS = EncoderConfig(arch="vit_tiny", image_size=32, patch_size=16, positions="learned", pool="cls")


def knn(source: Path | str, data: Path, out: Path, *more: str) -> dict[str, Any]:
    command = ["evaluate", source, "--train", data, "--test", data, "--probes", "knn", "--output", out, *more]
    assert main(list(map(str, command))) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found["knn"]


def test_the_same_encoder_in_every_form_of_ours(colours: Path, cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    file = checkpoint(MAETask(OURS, 16, 1, 2, mask_ratio=0.6, lr=1e-3), run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text("model: {class_path: tasks.mae_task.MAETask}\n")
    export(run, tmp_path / "encoder.safetensors")
    export(run, tmp_path / "whole.safetensors", whole=True)
    export(run, tmp_path / "for_timm", "timm")
    sources = [run, file, tmp_path / "encoder.safetensors", tmp_path / "whole.safetensors", tmp_path / "for_timm",
               f"timm:local-dir:{tmp_path / 'for_timm'}"]  # fmt: skip
    found = [knn(source, colours, tmp_path / str(i)) for i, source in enumerate(sources)]
    assert all(each["by_k"] == found[0]["by_k"] and each["protocol"]["crop"] == 32 for each in found)
    assert len({each["protocol"]["source"] for each in found}) == len(sources)
    assert len(list((cache / "features").glob("*/about.json"))) == 1  # the same weights: extracted once for all


def mae_file(path: Path) -> None:
    state = Encoder(replace(THEIRS, positions="sincos2d")).trunk.state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}
    torch.save({"model": state | decoder, "args": argparse.Namespace(lr=1.0)}, path)


def dino_file(path: Path) -> None:
    state = {f"backbone.{name}": value for name, value in Encoder(THEIRS).trunk.state_dict().items()}
    torch.save({"teacher": state | {"head.last_layer.weight_g": torch.ones(2)}, "epoch": 3}, path)


def dinov2_file(path: Path) -> None:
    state = Encoder(replace(THEIRS, layer_scale=1e-5)).trunk.state_dict()
    torch.save(state | {"mask_token": torch.zeros(1, 192)}, path)


def open_clip_file(path: Path) -> None:
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
    torch.save(OpenCLIP(12, vision, {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1})
               .state_dict(), path)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "write", "pool"),
    [("mae.pth", mae_file, "mean"), ("dino.pth", dino_file, "cls"), ("dinov2.pth", dinov2_file, "cls"),
     ("open_clip.pt", open_clip_file, "cls")],
)  # fmt: skip
def test_files_of_the_authors(
    name: str, write: Callable[[Path], None], pool: str, colours: Path, cache: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    write(tmp_path / name)
    found = knn(tmp_path / name, colours, tmp_path)
    assert (found["protocol"]["pool"], found["protocol"]["crop"]) == (pool, 32) and found["top1"] > 40
    other = evaluate(tmp_path / name, test=colours, probes=("label_free",), image_size=48, floors=False, progress=False)
    assert other["label_free"]["protocol"]["crop"] == 48


def test_a_clip_in_the_form_of_open_clip(
    clip_checkpoint: Path, colours: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = clip_run(clip_checkpoint, tmp_path)
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "open_clip"]) == 0
    assert "reloaded: largest difference" in capsys.readouterr().out
    scores = []
    for source in (run, tmp_path / "out"):
        command = ["evaluate", source, "--test", colours, "--probes", "zeroshot", "--output", tmp_path / "scores"]
        assert main(list(map(str, command))) == 0
        scores.append(json.loads((tmp_path / "scores" / "results.json").read_text())["zeroshot"]["confusion"])
    assert scores[0] == scores[1]


def test_a_name_of_timm(
    colours: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are timm's to fetch; where they cannot be had, one line says so."""
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: real(name, **more))
    found = knn("timm:test_vit", colours, tmp_path, "--image-size", "32")
    assert found["protocol"]["encoder"].startswith("timm:test_vit") and found["protocol"]["crop"] == 32
    command = ["evaluate", "timm:no_such_vit", "--train", str(colours), "--test", str(colours)]
    assert main(command) == 2
    assert "timm has no model 'no_such_vit'" in capsys.readouterr().err


def test_the_same_images_in_every_form(colours: Path, cache: Path, encoder_file: Path, tmp_path: Path) -> None:
    """Shards, tars by name, class folders, a tar of class folders."""
    shards = open_shards(colours)
    folders = tmp_path / "folders"
    names = (shards / "classes.txt").read_text().splitlines() if (shards / "classes.txt").exists() else None
    names = names or json.loads((shards / "manifest.json").read_text())["classes"]
    for tar in sorted(shards.glob("*.tar")):
        with tarfile.open(tar) as file:
            for key in map(read_index(tar).key, range(len(read_index(tar)))):
                label = int(file.extractfile(f"{key}.cls").read())  # type: ignore[union-attr]
                (folders / names[label]).mkdir(parents=True, exist_ok=True)
                (folders / names[label] / f"{key}.png").write_bytes(file.extractfile(f"{key}.png").read())  # type: ignore[union-attr]
    with tarfile.open(tmp_path / "folders.tar", "w") as packed:
        packed.add(folders, arcname="folders")
    last = len(list(shards.glob("*.tar"))) - 1
    pattern = sorted(shards.glob("*.tar"))[0].name.replace("000000", f"{{000000..{last:06d}}}")
    scores = [
        knn(encoder_file, data, tmp_path / str(i))
        for i, data in enumerate((shards, shards / pattern, folders, tmp_path / "folders.tar"))
    ]
    assert all(each["top1"] == scores[0]["top1"] for each in scores)  # neighbours by another order: no ties here
    assert all(each["protocol"]["test"]["images"] == 80 for each in scores)


def test_an_export_that_only_others_read_is_one_line(
    colours: Path, encoder_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.onnx").write_bytes(b"\x08\x08")
    assert main(["evaluate", str(tmp_path / "out.onnx"), "--train", str(colours), "--test", str(colours)]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "out.onnx is for ONNX Runtime alone" in told
