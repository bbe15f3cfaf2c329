"""timm's families as encoders; nothing is downloaded."""

import json
import socket
import time

import pytest
import timm
import torch
from huggingface_hub import constants

from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import load_encoder, save_encoder
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tests.tasks.clip_runs import tiny_task as clip_task
from tests.tasks.dino_runs import tiny_task as dino_task

FAMILIES = {
    "swin_tiny_patch4_window7_224": (32, 0),
    "convnext_atto": (32, 0),
    "xcit_nano_12_p16_224": (16, 1),
    "pvt_v2_b0": (32, 0),
    "mobilevit_xxs": (32, 0),
    "vit_tiny_r_s16_p8_224": (32, 1),
    "vit_tiny_patch16_224": (16, 1),
}


REST_OF_A_CLASSIFIER = ["inception_next_atto", "lcnet_050", "efficientvit_b0", "test_mambaout"]


@pytest.mark.parametrize("name", [*FAMILIES, *REST_OF_A_CLASSIFIER])
def test_every_family_gives_tokens_at_several_sizes_and_learns(name):
    encoder = Encoder(EncoderConfig(arch=f"timm:{name}", image_size=96))
    encoder.freeze_unused()
    stride, prefix = FAMILIES.get(name, (32, 0))
    assert encoder.config.patch_size == stride
    assert encoder.config.class_token == bool(prefix)
    assert len(encoder.blocks) > 3
    for size in (96, 64):
        tokens = encoder(torch.randn(2, 3, size, size))
        assert tokens.prefix.shape == (2, prefix, encoder.width)
        assert tokens.patches.shape == (2, (size // stride) ** 2, encoder.width)
    features = encoder.features(torch.randn(2, 3, 96, 96))
    assert features.shape == (2, encoder.feature_width)
    features.square().mean().backward()
    blind = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not blind, "parameters without a gradient would stop DDP"
    frozen = [n for n, p in encoder.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (name in REST_OF_A_CLASSIFIER[1:])


UNUSED = EncoderConfig(arch="timm:lcnet_050", image_size=32)


def test_only_training_looks_for_what_gets_no_gradient(tmp_path):
    """An encoder that is built, saved or loaded sends nothing through itself."""
    encoder = Encoder(UNUSED)
    seen: list[torch.nn.Module] = []
    watching = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.append(module))
    try:
        save_encoder(Encoder(UNUSED), tmp_path / "encoder.safetensors")
        loaded = load_encoder(tmp_path / "encoder.safetensors")
        assert not seen and all(parameter.requires_grad for parameter in loaded.parameters())
        encoder.freeze_unused()
        assert seen  # this is how such a pass would have been seen
    finally:
        watching.remove()


@pytest.mark.parametrize("build", [dino_task, clip_task])
def test_tasks_freeze_it_when_training_is_set_up(build):
    task = build(UNUSED)
    unused = "trunk.conv_head"
    before = {n for n, p in task.named_parameters() if not p.requires_grad}
    assert not any(f"student.encoder.{unused}" in n or f"model.encoder.{unused}" in n for n in before)
    task.setup("fit")
    frozen = {n for n, p in task.named_parameters() if not p.requires_grad} - before
    assert frozen and all(unused in n for n in frozen)
    trained = {id(p) for group in task.configure_optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for p in task.parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "prefix", "patches"), [("volo_d1_224", 1, 196), ("pit_ti_224", 0, 1)])
def test_class_tokens_that_timm_does_not_count(name, prefix, patches):
    """VOLO puts one before the patches, PiT gives nothing but its own."""
    encoder = Encoder(EncoderConfig(arch=f"timm:{name}")).eval()
    with torch.no_grad():
        tokens = encoder(torch.randn(1, 3, 224, 224))
        assert encoder.config.class_token == bool(prefix) and encoder.num_prefix == prefix
        assert tokens.prefix.shape[1] == prefix and tokens.patches.shape[1] == patches
        assert all(encoder.pool(tokens, how).isfinite().all() for how in (("cls", "mean") if prefix else ("mean",)))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_models_own(name):
    pool = "cls" if FAMILIES[name][1] else "mean"
    encoder = Encoder(EncoderConfig(arch=f"timm:{name}", image_size=64, pool=pool)).eval()
    images = torch.randn(2, 3, 64, 64)
    want = encoder.trunk.forward_head(encoder.trunk.forward_features(images), pre_logits=True)
    torch.testing.assert_close(encoder.features(images), want)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch32_clip_224", "vit_small_patch14_reg4_dinov2"])
def test_a_plain_vit_of_timm_can_hide_patches(name):
    encoder = Encoder(EncoderConfig(arch=f"timm:{name}", image_size=112 if "14" in name else 96)).eval()
    size = encoder.config.image_size
    images = torch.randn(1, 3, size, size)
    want = encoder.trunk.forward_features(images)
    torch.testing.assert_close(torch.cat(encoder(images), dim=1), want)
    everything = torch.arange(encoder.num_patches)[None]
    torch.testing.assert_close(torch.cat(encoder(images, everything), dim=1), want)
    assert encoder(images, everything[:, :3]).patches.shape[1] == 3


@pytest.mark.parametrize("given", ["keep", "mask"])
def test_others_refuse_to_hide_patches(given):
    encoder = Encoder(EncoderConfig(arch="timm:convnext_atto", image_size=64))
    with pytest.raises(TaskError, match="plain ViT"):
        encoder(torch.randn(1, 3, 64, 64), **{given: torch.zeros(1, 1, dtype=torch.long)})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"arch": "timm:convnext_attoo"}, "did you mean convnext_atto"),
        ({"arch": "timm:convnext_atto", "pool": "cls"}, "no class token"),
        ({"arch": "timm:vit_tiny_patch16_224", "image_size": 100}, "do not divide"),
        ({"arch": "timm:mixer_b16_224", "image_size": 224, "drop_path": 2.0}, "drop_path"),
    ],
)
def test_what_timm_cannot_do_is_one_clear_line(fields, says):
    with pytest.raises(TaskError, match=says):
        Encoder(EncoderConfig(**fields))


def local_model(path, name: str, **model_args) -> torch.nn.Module:
    """A directory as timm's hub code writes and reads it, with random weights."""
    from safetensors.torch import save_file

    model = timm.create_model(name, num_classes=10, **model_args)
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    cfg = {
        k: v for k, v in model.pretrained_cfg.items() if k in ("input_size", "mean", "std", "crop_pct", "first_conv")
    }
    cfg |= {"num_classes": 10, "classifier": "head", "mean": [0.1, 0.2, 0.3]}
    (path / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 10, "pretrained_cfg": cfg}))
    return model.eval()


def test_pretrained_weights_come_through_timms_own_hub_code_and_can_be_saved(tmp_path):
    model = local_model(tmp_path / "model", "vit_tiny_patch16_224")
    encoder = load_encoder(f"timm:local-dir:{tmp_path / 'model'}")
    assert encoder.config.mean == (0.1, 0.2, 0.3)
    assert (encoder.config.image_size, encoder.config.pool) == (224, "cls")
    images = torch.randn(1, 3, 224, 224)
    want = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(encoder.features(images), want)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    again = load_encoder(tmp_path / "encoder.safetensors")
    assert again.config == encoder.config
    torch.testing.assert_close(again.features(images), want)
    smaller = load_encoder(f"timm:local-dir:{tmp_path / 'model'}", image_size=96)
    assert smaller.trunk.pos_embed.shape[1] == 1 + 36
    assert smaller.features(torch.randn(1, 3, 96, 96)).shape == (1, 192)


def test_weights_that_cannot_be_fetched_are_one_clear_line(tmp_path):
    with pytest.raises(TaskError, match="timm cannot build") as caught:
        load_encoder(f"timm:local-dir:{tmp_path / 'nothing'}")
    assert "\n" not in str(caught.value)
    with pytest.raises(TaskError, match="no model"):
        load_encoder("timm:there_is_no_such_model")


def test_without_a_network_the_weights_are_missed_at_once_in_one_line(tmp_path, monkeypatch, capfd):
    """A hub that nobody answers for: one line soon, not minutes of retries; what is in its cache is still found."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(TaskError, match="weights are not on this machine, and the hub they come from cannot be"):
        load_encoder("timm:vit_tiny_patch16_224")
    assert time.monotonic() - began < 20
    assert "Retry" not in capfd.readouterr().err
    assert constants.HF_HUB_OFFLINE is False
