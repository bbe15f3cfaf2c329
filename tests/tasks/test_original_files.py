"""Files under the MAE and DINO authors' names: their recorded features come out, and faults are named."""

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tasks.encoder_config import SIZES, EncoderConfig
from tasks.encoder_files import load_encoder
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.mae import load_mae
from tasks.original_files import encoder_config


def mae_file(golden, path: Path, **extra) -> Path:
    """A file as the MAE authors' training writes it, their Namespace of arguments included."""
    state = {k.removeprefix("state."): v for k, v in golden.tensors.items() if k.startswith("state.")}
    torch.save(
        {"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-3), **extra}, path
    )
    return path


@pytest.mark.golden("mae_model")
def test_mae_file_gives_the_recorded_features(golden, tmp_path):
    c, given = golden.config, golden.group("in.")
    encoder = load_encoder(mae_file(golden, tmp_path / "mae.pth"), heads=c["num_heads"]).double()
    assert (encoder.config.positions, encoder.config.position_resize, encoder.config.pool) == (
        "sincos2d",
        "mae",
        "mean",
    )
    assert encoder.config.image_size == c["img_size"]
    latent = torch.cat(encoder(given["imgs"], golden.tensors["out.ids_keep"]), dim=1)
    assert (latent - golden.group("out.")["latent"]).abs().max() < 1e-9


@pytest.mark.golden("mae_model")
def test_mae_file_with_decoder_gives_the_recorded_predictions(golden, tmp_path):
    c, given = golden.config, golden.group("in.")
    path = mae_file(golden, tmp_path / "mae.pth")
    model = load_mae(path, heads=c["num_heads"], decoder_heads=c["decoder_num_heads"]).double()
    assert (model(given["imgs"], given["noise"]).pred - golden.group("out.")["pred"]).abs().max() < 1e-9
    state = {
        k: v for k, v in torch.load(path, weights_only=False)["model"].items() if not k.startswith(("decoder", "mask"))
    }
    torch.save({"model": state}, path)
    assert load_encoder(path, heads=c["num_heads"])
    with pytest.raises(TaskError, match="no decoder"):
        load_mae(path, heads=c["num_heads"])


def dino_outputs(golden_init, encoder: Encoder, head: dict) -> torch.Tensor:
    """Class tokens of the first step's crops through the recorded projection head."""
    crops = golden_init.group("crops.step0.")
    x = torch.cat([encoder.features(crops[str(j)]) for j in range(len(crops))])
    layers = sorted({int(name.split(".")[2]) for name in head if name.startswith("head.mlp.")})
    for layer in layers:
        x = F.linear(x, head[f"head.mlp.{layer}.weight"], head[f"head.mlp.{layer}.bias"])
        x = F.gelu(x) if layer != layers[-1] else x
    direction = F.normalize(head["head.last_layer.weight_v"], dim=1)
    return F.normalize(x, dim=1) @ (head["head.last_layer.weight_g"] * direction).t()


@pytest.mark.golden("dino_init")
@pytest.mark.parametrize("whole", [True, False])
def test_dino_file_gives_the_recorded_outputs_at_both_resolutions(golden, whole, tmp_path):
    state = {k.removeprefix("student."): v for k, v in golden.tensors.items() if k.startswith("student.")}
    path = tmp_path / "dino.pth"
    if whole:  # a training checkpoint: the teacher is what counts, the student here is rubbish
        rubbish = {f"module.{k}": torch.zeros_like(v) for k, v in state.items()}
        torch.save(
            {"student": rubbish, "teacher": state, "epoch": 1, "args": argparse.Namespace(arch="vit_small")}, path
        )
    else:
        torch.save({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}, path)
    encoder = load_encoder(path, heads=golden.config["vit"]["num_heads"]).double()
    assert (encoder.config.positions, encoder.config.position_resize, encoder.config.pool) == ("learned", "dino", "cls")
    steps = type(golden)(golden.path.with_name(golden.path.name.replace("dino_init", "dino_steps")))
    ours = dino_outputs(golden, encoder, golden.group("student."))
    assert (ours - steps.group("out.")["step0.student_output"]).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("arch", "patch", "image", "author"),
    [
        ("vit_small", 8, 224, "dino"),
        ("vit_small", 16, 224, "dino"),
        ("vit_base", 8, 224, "dino"),
        ("vit_base", 16, 224, "dino"),
        ("vit_base", 16, 224, "mae"),
        ("vit_large", 16, 224, "mae"),
        ("vit_huge", 14, 224, "mae"),
    ],
)
def test_published_files_are_recognised_by_their_shapes(arch, patch, image, author):
    with torch.device("meta"):
        trunk = Encoder(EncoderConfig(arch=arch, patch_size=patch, image_size=image)).trunk
    config = encoder_config(trunk.state_dict(), author, "file.pth", heads=None)
    assert (config.arch, config.patch_size, config.image_size, config.size) == (arch, patch, image, SIZES[arch])
    assert config.qkv_bias and config.mlp_ratio == 4
    assert config.resize == 256


@pytest.mark.golden("mae_model")
def test_image_size_is_changed_in_the_manner_of_the_authors(golden, tmp_path):
    c = golden.config
    path, larger = mae_file(golden, tmp_path / "mae.pth"), c["img_size"] + 2 * c["patch_size"]
    encoder = load_encoder(path, heads=c["num_heads"], image_size=larger)
    old, new = (size // c["patch_size"] for size in (c["img_size"], larger))
    table = golden.tensors["state.pos_embed"]
    image = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    want = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.trunk.pos_embed, torch.cat([table[:, :1], want], dim=1))
    assert encoder(torch.randn(1, 3, larger, larger)).patches.shape[1] == new * new


@pytest.mark.golden("mae_model")
def test_faults_are_named(golden, tmp_path):
    path, heads = mae_file(golden, tmp_path / "mae.pth"), golden.config["num_heads"]
    with pytest.raises(TaskError, match="no published size"):
        load_encoder(path)
    with pytest.raises(TaskError, match="heads do not divide"):
        load_encoder(path, heads=7)
    content = torch.load(path, weights_only=False)
    content["model"]["head.weight"] = torch.zeros(1)
    del content["model"]["blocks.1.norm1.bias"], content["model"]["norm.weight"]
    torch.save(content, path)
    with pytest.raises(TaskError, match=r"missing: blocks\.1\.norm1\.bias, norm\.weight; unexpected: head\.weight"):
        load_encoder(path, heads=heads)
    del content["model"]["pos_embed"]
    torch.save(content, path)
    with pytest.raises(TaskError, match="lacks pos_embed"):
        load_encoder(path, heads=heads)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"model": 3}, {}, {"teacher": {"head.x": 1}}])
def test_what_is_no_encoder_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(TaskError, match=r"x\.pth"):
        load_encoder(tmp_path / "x.pth")
