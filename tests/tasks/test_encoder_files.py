"""Encoders to files and back, and files that must not be trusted."""

import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tasks
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import checkpoint_hash, load_encoder, save_encoder, weights_hash
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.mae import load_mae
from tasks.mae_task import MAETask

SMALL = EncoderConfig(
    arch="vit_tiny", width=32, depth=2, heads=2, image_size=32, patch_size=8, layer_scale=0.1, registers=2,
    drop_path=0.1, pool="cls+mean", eval_resize=36, mean=(0.1, 0.2, 0.3),
)  # fmt: skip


def lightning_file(path: Path, config: EncoderConfig = SMALL) -> MAETask:
    """A checkpoint as Lightning writes it: weights, the task's own words, and plain bookkeeping."""
    torch.manual_seed(1)
    task = MAETask(config, 16, 1, 2, mask_ratio=0.6, norm_pix_loss=False, lr=1e-3)
    checkpoint = {"state_dict": task.state_dict(), "epoch": 0, "global_step": 7, "loops": {"fit_loop": {}}}
    task.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return task


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "rope"])
def test_safetensors_there_and_back(positions, tmp_path):
    encoder = Encoder(replace(SMALL, positions=positions)).eval()
    save_encoder(encoder, tmp_path / "e.safetensors")
    again = tasks.load_encoder(tmp_path / "e.safetensors")
    assert again.config == encoder.config
    assert not again.training
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.features(images), encoder.features(images))
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


def test_run_directory_and_checkpoint_describe_themselves(tmp_path):
    task = lightning_file(tmp_path / "run" / "checkpoints" / "last.ckpt")
    want = task.model.encoder.eval()
    images = torch.randn(2, 3, 32, 32)
    for source in (tmp_path / "run", str(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "last.ckpt"):
        encoder = load_encoder(source)
        assert encoder.config == SMALL
        assert torch.equal(encoder.features(images), want.features(images))
        mae = load_mae(source)
        assert (mae.mask_ratio, mae.norm_pix_loss, len(mae.decoder_blocks), mae.decoder_heads) == (0.6, False, 1, 2)
        noise = torch.rand(2, 16)
        assert torch.equal(mae(images, noise).pred, task.model.eval()(images, noise).pred)


def test_image_size_resizes_the_table(tmp_path):
    for manner in ("mae", "dino", "open_clip"):
        config = replace(SMALL, positions="learned", position_resize=manner, registers=0)
        encoder = Encoder(config).eval()
        save_encoder(encoder, tmp_path / "e.safetensors")
        larger = load_encoder(tmp_path / "e.safetensors", image_size=48)
        assert larger.config == config.at(48)
        images = torch.randn(1, 3, 48, 48)
        torch.testing.assert_close(larger.features(images), encoder.features(images))
    with pytest.raises(TaskError, match="does not divide"):
        load_encoder(tmp_path / "e.safetensors", image_size=50)


def test_hashes_know_weights_and_config(tmp_path):
    encoder = Encoder(SMALL)
    before = weights_hash(encoder)
    assert before == weights_hash(encoder)
    save_encoder(encoder, tmp_path / "e.safetensors")
    assert weights_hash(load_encoder(tmp_path / "e.safetensors")) == before
    first = checkpoint_hash(tmp_path / "e.safetensors")
    with torch.no_grad():
        encoder.trunk.norm.bias[0] += 1e-6
    assert weights_hash(encoder) != before
    save_encoder(encoder, tmp_path / "e.safetensors")
    assert checkpoint_hash(tmp_path / "e.safetensors") != first


def test_missing_unexpected_and_misshapen_keys_are_listed(tmp_path):
    path = tmp_path / "last.ckpt"
    lightning_file(path)
    content = torch.load(path, weights_only=False)
    state = content["state_dict"]
    state["model.encoder.trunk.extra"] = state.pop("model.encoder.trunk.norm.bias")
    state["model.encoder.trunk.cls_token"] = torch.zeros(1, 1, 3)
    torch.save(content, path)
    with pytest.raises(TaskError) as caught:
        load_encoder(path)
    says = str(caught.value)
    assert "missing: norm.bias" in says and "unexpected: extra" in says and "cls_token (1, 1, 3) for (1, 1, 32)" in says
    assert "\n" not in says


class Evil:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"model": Evil(tmp_path / "owned")}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    for name in ("x.pth", "y.pth"):
        with pytest.raises(TaskError, match="cannot read"):
            load_encoder(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "x.pth"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04broken zip"])
def test_damaged_files_are_one_clear_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match="cannot read") as caught:
        load_encoder(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name != "x.safetensors" or "no safetensors file; export or download it anew" in str(caught.value)


def test_truncated_checkpoint_is_one_clear_line(tmp_path):
    path = tmp_path / "last.ckpt"
    lightning_file(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(TaskError, match="cannot read"):
        load_encoder(path)


def test_what_is_not_there_or_not_ours(tmp_path):
    with pytest.raises(TaskError, match="no such checkpoint"):
        load_encoder(tmp_path / "nothing.ckpt")
    with pytest.raises(TaskError, match=r"last\.ckpt"):
        load_encoder(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TaskError, match="not written by trivit"):
        load_encoder(tmp_path / "other.safetensors")
    lightning_file(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=False)
    content["trivit"]["encoder"] = {**asdict(SMALL), "from_the_future": 1}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(TaskError, match="from_the_future"):
        load_encoder(tmp_path / "last.ckpt")
    with pytest.raises(TaskError, match="cannot write"):
        save_encoder(Encoder(SMALL), tmp_path / "no" / "such" / "place.safetensors")


def test_the_room_is_light_to_enter():
    import subprocess
    import sys

    code = "import sys, tasks, tasks.errors; assert not {'torch', 'timm', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
