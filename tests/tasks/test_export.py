"""Exports as their readers read them: timm, ONNX Runtime, open_clip, and trivit itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms import CenterCrop, Resize

from tasks import export as room
from tasks import load_encoder
from tasks.clip_files import load_clip
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import save_encoder
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.export import export
from tasks.mae import load_mae
from tasks.mae_task import MAETask
from tasks.starting_point import take_dino
from tasks.task import PretrainTask
from tasks.timm_files import crop_share
from tests.tasks import clip_runs, dino_runs

SMALL = EncoderConfig(
    arch="vit_tiny", width=32, depth=2, heads=2, image_size=32, patch_size=8, eval_resize=36, mean=(0.1, 0.2, 0.3)
)
OURS = {
    "MAE's": SMALL,
    "DINOv2's": replace(SMALL, positions="learned", registers=2, layer_scale=0.1, pool="cls"),
    "CLIP's": replace(
        SMALL, positions="learned", pre_norm=True, norm_eps=1e-5, activation="quick_gelu", pool="cls", drop_path=0.1
    ),
    "no class token": replace(SMALL, class_token=False, registers=1),
    "two channels": replace(SMALL, in_chans=2, mean=(0.1, 0.2), std=(0.5, 0.6), qkv_bias=False, mlp_ratio=2.0),
}
TIMM = {
    "ViT of another size": EncoderConfig(arch="timm:test_vit", image_size=96, pool="mean"),
    "pooled with attention by timm": EncoderConfig(arch="timm:test_vit3", image_size=160),
    "ConvNeXt of one channel": EncoderConfig(
        arch="timm:test_convnext", image_size=64, in_chans=1, mean=(0.5,), std=(0.5,)
    ),
}


def trained(config: EncoderConfig) -> Encoder:
    """Every parameter away from its beginning, so that a forgotten one shows up."""
    torch.manual_seed(0)
    encoder = Encoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return encoder


def saved(config: EncoderConfig, folder: Path) -> Path:
    save_encoder(trained(config), folder / "source.safetensors")
    return folder / "source.safetensors"


def umasked(folder: Path) -> int:
    """The mode of a file that anybody writes."""
    (folder / "any").touch()
    return (folder / "any").stat().st_mode & 0o777


def checkpoint(task: PretrainTask, path: Path) -> Path:
    content: dict[str, Any] = {"state_dict": task.state_dict(), "global_step": 7}
    task.on_save_checkpoint(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", [*OURS, *TIMM])
def test_timm_reads_a_folder(name: str, tmp_path: Path) -> None:
    config = (OURS | TIMM)[name]
    encoder = load_encoder(saved(config, tmp_path))
    done = export(tmp_path / "source.safetensors", tmp_path / "out", "timm")
    assert done.path == tmp_path / "out" and done.difference < 1e-5
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(3, config.in_chans, config.image_size, config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), encoder.features(images), rtol=1e-4, atol=1e-5)
    cfg = model.pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (config.mean, config.std)
    assert tuple(cfg["input_size"]) == tuple(images.shape[1:]) and cfg["interpolation"] == "bicubic"
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {umasked(tmp_path)}
    for source in (tmp_path / "out", f"timm:local-dir:{tmp_path / 'out'}"):
        again = load_encoder(source)
        assert again.config == encoder.config and torch.equal(again.features(images), encoder.features(images))


def test_timm_goes_on_from_it_with_classes_and_at_another_size(tmp_path: Path) -> None:
    export(saved(SMALL, tmp_path), tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7, img_size=48)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 7)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, trained(SMALL).trunk.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (64, 73), (32, 36), (64, 64), (96, 110), (518, 592)])
def test_timm_resizes_and_crops_as_evaluation_does(size: int, resize: int) -> None:
    config = replace(SMALL, image_size=size, eval_resize=resize)
    cfg = {"input_size": (3, size, size), "crop_pct": crop_share(config), "crop_mode": "center"}
    model = timm.create_model("test_vit", pretrained_cfg_overlay=cfg, img_size=size)
    steps = create_transform(**resolve_model_data_config(model)).transforms
    (resized,) = [step.size for step in steps if isinstance(step, Resize)]
    (cropped,) = [step.size for step in steps if isinstance(step, CenterCrop)]
    assert resized in (resize, (resize, resize)) and tuple(cropped) == (size, size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"positions": "rope"}, "cannot express rotary positions"), ({"norm_eps": 1e-3}, "cannot express norm_eps 0.001"),
     ({"pool": "cls+mean"}, r"cannot pool cls\+mean")],
)  # fmt: skip
def test_what_timm_cannot_express_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message):
        export(saved(replace(SMALL, **changes), tmp_path), tmp_path / "out", "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


@pytest.mark.parametrize(
    "config",
    [replace(SMALL, depth=1, positions="rope", pool="cls+mean", registers=1), TIMM["ConvNeXt of one channel"]],
    ids=["rotary ViT", "ConvNeXt"],
)
def test_onnx_runtime_reads_any_batch(config: EncoderConfig, tmp_path: Path) -> None:
    encoder = load_encoder(saved(config, tmp_path))
    assert export(tmp_path / "source.safetensors", tmp_path / "out.onnx", "onnx").difference < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_outputs()] == ["features", "patches"]
    for batch in (1, 3):
        images = torch.randn(batch, config.in_chans, config.image_size, config.image_size)
        features, patches = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(features), encoder.features(images), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.from_numpy(patches), encoder(images).patches, rtol=1e-4, atol=1e-4)
    told = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert json.loads(told["images"]) == {
        "mean": list(config.mean), "std": list(config.std), "resize": config.resize, "crop": config.image_size,
    }  # fmt: skip
    export(tmp_path / "source.safetensors", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "out.safetensors", "source.safetensors"]


def test_weights_beyond_2_gib_go_beside_the_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.onnx_files.ONE_FILE", 1000)
    source = saved(replace(SMALL, depth=1), tmp_path)
    for _ in range(2):  # the second one replaces both files of the first
        assert export(source, tmp_path / "out.onnx", "onnx").difference < 1e-5
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.onnx", "out.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert session.run(["features"], {"images": torch.zeros(1, 3, 32, 32).numpy()})[0].shape == (1, 32)


def test_onnx_without_its_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.onnx_files.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(TaskError, match=r'needs onnxscript: pip install "trivit\[onnx\]"'):
        export(saved(SMALL, tmp_path), tmp_path / "out.onnx", "onnx")


def test_a_whole_mae_comes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = MAETask(SMALL, 16, 1, 2, mask_ratio=0.6, lr=1e-3).eval()
    source = checkpoint(task, tmp_path / "last.ckpt")
    export(source, tmp_path / "whole.safetensors", whole=True)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    mae = load_mae(tmp_path / "whole.safetensors")
    assert torch.equal(mae(images, noise).pred, task.model(images, noise).pred)  # type: ignore[arg-type]
    assert torch.equal(load_encoder(tmp_path / "whole.safetensors").features(images), mae.encoder.features(images))


def test_a_whole_dino_comes_along_and_its_encoder_is_the_teachers(tmp_path: Path) -> None:
    task = dino_runs.tiny_task().eval()
    with torch.no_grad():
        task.model.student.encoder.trunk.norm.bias += 1
    source = checkpoint(task, tmp_path / "last.ckpt")
    export(source, tmp_path / "whole.safetensors", whole=True)
    other = dino_runs.tiny_task().model
    take_dino(other, task.model_settings(), str(tmp_path / "whole.safetensors"))
    assert dino_runs.same(dino_runs.state(other), dino_runs.state(task.model))
    export(source, tmp_path / "encoder.safetensors")
    images, teacher = torch.randn(2, 3, 16, 16), task.model.teacher.encoder
    for name in ("whole", "encoder"):
        assert torch.equal(load_encoder(tmp_path / f"{name}.safetensors").features(images), teacher.features(images))


def test_a_whole_clip_comes_along(tmp_path: Path) -> None:
    task = clip_runs.tiny_task().eval()
    source = checkpoint(task, tmp_path / "last.ckpt")
    export(source, tmp_path / "whole.safetensors", whole=True)
    images, ids, _ = clip_runs.pairs(2)
    clip = load_clip(tmp_path / "whole.safetensors")
    assert torch.equal(clip.encode_image(images), task.model.encode_image(images))
    assert torch.equal(clip.encode_text(ids), task.model.encode_text(ids))
    done = export(tmp_path / "whole.safetensors", tmp_path / "open_clip", "open_clip")
    assert done.what == "vectors of 4 random images and texts" and done.difference < 1e-5
    export(source, tmp_path / "open_clip", "open_clip")  # an earlier one is replaced
    assert torch.allclose(load_clip(tmp_path / "open_clip").encode_text(ids), clip.encode_text(ids), atol=1e-5)


def test_what_computes_something_else_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(SMALL, tmp_path)
    export(source, tmp_path / "earlier", "timm")
    before = {path.name: path.read_bytes() for path in (tmp_path / "earlier").iterdir()}
    right = room.run_timm
    for wrong, message in (
        (lambda *given: [x + 1e-2 for x in right(*given)], "computes something else"),
        (lambda *given: [x * torch.nan for x in right(*given)], "computes something else"),
        (lambda *given: [x[:, :5] for x in right(*given)], r"gives \(4, 5\) where trivit gives \(4, 32\)"),
        (lambda *_: 1 / 0, "cannot be read back"),
    ):
        monkeypatch.setattr(room, "run_timm", wrong)
        for name in ("out", "earlier"):
            with pytest.raises(TaskError, match=message):
                export(source, tmp_path / name, "timm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "source.safetensors"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "earlier").iterdir()}


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    source = saved(SMALL, tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign.safetensors").write_text("mine")
    (tmp_path / "foreign.onnx").write_text("mine")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "d.safetensors").mkdir()
    for name, format, message in (
        ("folder", "timm", "exists and is no export"), ("file", "timm", "exists and is no export"),
        ("model", "timm", "exists and is no export"), ("foreign.safetensors", "safetensors", "exists and is no export"),
        ("foreign.onnx", "onnx", "exists and is no export"), ("d.safetensors", "safetensors", "is no export"),
        ("out", "onnx", r"ends in \.onnx"), ("out", "safetensors", r"ends in \.safetensors"),
        ("out.onnx", "timm", "makes a folder"),
    ):  # fmt: skip
        with pytest.raises(TaskError, match=message):
            export(source, tmp_path / name, format)  # type: ignore[arg-type]
    for format, name in (("timm", "again"), ("safetensors", "again.safetensors")):
        export(source, tmp_path / name, format)  # type: ignore[arg-type]
        export(source, tmp_path / name, format)  # type: ignore[arg-type]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_has_no_more_than_an_encoder_has_nothing_to_bring_along(tmp_path: Path) -> None:
    source = saved(SMALL, tmp_path)
    with pytest.raises(TaskError, match="no more than an encoder"):
        export(source, tmp_path / "whole.safetensors", whole=True)
    with pytest.raises(TaskError, match="--whole is for --format safetensors"):
        export(source, tmp_path / "out", "timm", whole=True)
