"""CLIPs of open_clip load here, ours load there, and both say the same; what cannot be expressed is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import CLIP as OpenCLIP
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer

from tasks import load_encoder
from tasks.clip import CLIP
from tasks.clip_files import export_open_clip, load_clip
from tasks.clip_task import clip_groups
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.open_clip_names import our_names
from tasks.text_tower import TextConfig
from tasks.tokenizer import train_bpe
from tests.tasks.clip_runs import TEXT, TINY, fit, pairs, tiny_task

VISION = {"image_size": 16, "layers": 2, "width": 128, "patch_size": 4}
WORDS = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 2}


@register_model
def siglip_for_tests(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """SigLIP's image tower, small."""
    sizes = {"patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3, "class_token": False, "global_pool": "map"}
    return build_model_with_cfg(VisionTransformer, "vit_base_patch16_siglip_224", pretrained, **(sizes | options))


def disturbed(module: Any) -> Any:
    """Every parameter away from its beginning, so that a forgotten one shows up."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return module.eval()


def assert_same(clip: CLIP, theirs: Any, size: int = 16) -> None:
    images, ids, _ = pairs(3, size=size)
    with torch.no_grad():
        for ours, other in (
            (clip.encode_image(images), theirs.encode_image(images, normalize=True)),
            (clip.encode_text(ids), theirs.encode_text(ids, normalize=True)),
            (clip.logit_scale, theirs.logit_scale),
        ):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "more"),
    [
        (OpenCLIP, {}),
        (CustomTextCLIP, {"init_logit_bias": -10.0}),
        (OpenCLIP, {"quick_gelu": True}),
        (CustomTextCLIP, {"vision": {"ls_init_value": 0.1, "pool_type": "avg", "no_ln_pre": True}}),
        (OpenCLIP, {"vision": {"head_width": 32, "norm_kwargs": {"eps": 1e-6}, "mlp_ratio": 2.0}}),
        (CustomTextCLIP, {"text": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}}),
    ],
    ids=["CLIP", "SigLIP's loss", "QuickGELU", "layer scale, mean, no first norm", "narrow heads", "SigLIP's text"],
)
def test_native_models_load(build: Callable[..., Any], more: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision, text = VISION | more.pop("vision", {}), WORDS | more.pop("text", {})
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text, **more}
    theirs = disturbed(build(**config))
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    about = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    clip = load_clip(tmp_path)
    assert_same(clip, theirs)
    assert clip.encoder.config.mean == (0.5, 0.5, 0.5) and not clip.training
    assert (clip.logit_bias is None) == ("init_logit_bias" not in config)
    images, _, _ = pairs(2)
    assert torch.equal(load_encoder(tmp_path).features(images), clip.encoder.features(images))
    assert load_encoder(tmp_path, image_size=32).position_table(32, 32).shape[0] == 65  # type: ignore[union-attr]


def test_bare_state_dicts_and_training_checkpoints_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = disturbed(OpenCLIP(12, VISION, WORDS))
    torch.save(theirs.state_dict(), tmp_path / "bare.pt")
    state = {f"module.{name}": value for name, value in theirs.half().state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state}, tmp_path / "training.pt")
    assert_same(load_clip(tmp_path / "training.pt"), theirs.float())
    assert load_clip(tmp_path / "bare.pt").encoder.config.mean[0] == pytest.approx(0.48145466)
    encoder = load_encoder(tmp_path / "bare.pt")
    assert encoder.config.pool == "cls" and encoder.config.pre_norm


def test_files_of_openai_have_quick_gelu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = disturbed(OpenCLIP(12, VISION, WORDS, quick_gelu=True))
    numbers = {"input_resolution": 16, "context_length": 16, "vocab_size": 49408}
    told = {name: torch.tensor(value) for name, value in numbers.items()}
    torch.save({**theirs.state_dict(), **told}, tmp_path / "openai.pt")
    clip = load_clip(tmp_path / "openai.pt")
    assert_same(clip, theirs)
    assert clip.encoder.config.activation == clip.text.config.activation == "quick_gelu"
    assert clip.encoder.config.resize == clip.encoder.config.image_size, "open_clip resizes to the crop's size"


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    theirs = OpenCLIP(12, VISION, WORDS)
    state = theirs.state_dict()
    torch.save({k: v for k, v in state.items() if k != "visual.ln_post.weight"}, tmp_path / "lacks.pt")
    torch.save({k: v for k, v in state.items() if not k.startswith("visual.")}, tmp_path / "text.pt")
    torch.save({**{k: v for k, v in state.items() if "conv1" not in k}}, tmp_path / "resnet.pt")
    for name, message in (
        ("lacks.pt", r"missing: encoder\.trunk\.norm\.weight"), ("text.pt", "holds no CLIP"),
        ("resnet.pt", "no Vision Transformer of open_clip"), ("gone.pt", "no such checkpoint"),
    ):  # fmt: skip
        with pytest.raises(TaskError, match=message):
            load_clip(tmp_path / name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"text_cfg": WORDS | {"act_kwargs": {"approximate": "tanh"}}}, "text act_kwargs"),
        ({"text_cfg": WORDS | {"pool_type": "first"}}, "pool_type first"),
        ({"text_cfg": WORDS | {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"strip_sep_token": True}}}, "strip_sep"),
        ({"vision_cfg": VISION | {"final_ln_after_pool": True}}, "vision final_ln_after_pool"),
        ({"vision_cfg": {"timm_model_name": "resnet18", "timm_pool": "abs_attn"}}, "timm_pool abs_attn"),
    ],
)
def test_towers_that_are_not_built_here_are_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(OpenCLIP(12, VISION, WORDS).state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": WORDS, **more}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(TaskError, match=f"cannot build: .*{message}"):
        load_clip(tmp_path)


NATIVE = {
    "CLIP": (TINY, {}),
    "MAE's encoder": (replace(TINY, pre_norm=False, positions="sincos2d", pool="mean", norm_eps=1e-6), {}),
    "layer scale, no bias": (replace(TINY, layer_scale=0.1, qkv_bias=False), {}),
    "QuickGELU": (replace(TINY, activation="quick_gelu"), {"text": replace(TEXT, activation="quick_gelu")}),
    "sigmoid": (TINY, {"loss": "sigmoid", "text": replace(TEXT, causal=False, pool="last", projection_bias=True)}),
}
MAP = {"image_head": "map", "joint_width": 96, "loss": "sigmoid"}
TIMM = {
    "timm ViT": (EncoderConfig(arch="timm:test_vit", image_size=160, pool="cls"), {}),
    "ConvNeXt": (EncoderConfig(arch="timm:test_convnext", image_size=160), {}),
    "attention pooling": (EncoderConfig(arch="timm:siglip_for_tests", image_size=224), MAP),
}  # fmt: skip


@pytest.mark.parametrize("name", [*NATIVE, *TIMM])
def test_ours_export_to_open_clip(name: str, tmp_path: Path) -> None:
    encoder, changes = (NATIVE | TIMM)[name]
    clip = disturbed(tiny_task(encoder, **changes).model)
    export_open_clip(clip, tmp_path / "export")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").eval()
    assert_same(clip, theirs, encoder.image_size)
    visual = theirs.visual
    assert ("timm" in type(visual).__module__) == (name in TIMM)
    assert_same(load_clip(tmp_path / "export"), theirs, encoder.image_size)


def test_a_vocabulary_is_exported_and_comes_back(tmp_path: Path) -> None:
    train_bpe(["a red circle", "two blue squares"] * 9, tmp_path / "words.json", vocab_size=300)
    clip = tiny_task(text=replace(TEXT, tokenizer=str(tmp_path / "words.json"), vocab_size=None)).model.eval()
    export_open_clip(clip, tmp_path / "export")
    back = load_clip(tmp_path / "export")
    assert torch.equal(back.text.tokenizer(["a red circle"]), clip.text.tokenizer(["a red circle"]))


@pytest.mark.parametrize(
    ("encoder", "changes", "message"),
    [
        (replace(TINY, registers=2), {}, "cannot express registers"),
        (replace(TINY, positions="rope", pre_norm=False), {}, "rotary positions"),
        (replace(TINY, class_token=False, pool="mean"), {}, "no class token"),
        (replace(TINY, pool="cls+mean"), {}, r"pooling cls\+mean"),
        (replace(TINY, in_chans=1, mean=(0.5,), std=(0.5,)), {}, "1 channels"),
        (replace(TINY, activation="quick_gelu"), {}, "one activation for both towers"),
        (TINY, {"image_head": "map", "joint_width": 24}, "attention pooling"),
        # its pooling looks at a register, too
        (EncoderConfig(arch="timm:test_vit3", image_size=160), MAP, "open_clip computes something else"),
        # its own image size is 160, and open_clip has no way to tell a timm model another one
        (EncoderConfig(arch="timm:test_vit", image_size=32, pool="cls"), {}, "open_clip cannot hold this CLIP"),
    ],
)
def test_what_open_clip_has_no_place_for(
    encoder: EncoderConfig, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=message):
        export_open_clip(tiny_task(encoder, **changes).model, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_three_steps_are_those_of_open_clips_own_model_loss_and_groups(loss: Any, tmp_path: Path) -> None:
    task = tiny_task(replace(TINY, drop_path=0.0), loss=loss, lr=1e-2, weight_decay=0.2, warmup_steps=2)
    export_open_clip(task.model.eval(), tmp_path / "start")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'start'}").double().train()
    named = list(theirs.named_parameters())
    spared = {name for name, p in named if p.ndim < 2}
    groups = [
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
        {"params": [p for name, p in named if name not in spared], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    criterion = ClipLoss() if loss == "softmax" else SigLipLoss()
    for step, rate in enumerate((0.5e-2, 1e-2, 1e-2)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, ids, _ = pairs(8, step)
        found = criterion(*theirs(images.double(), ids))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    task.train().double()
    fit(task, 3, precision="64-true")
    export_open_clip(task.model.float().eval(), tmp_path / "end")
    ours = open_clip.create_model(f"local-dir:{tmp_path / 'end'}").state_dict()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], value.float(), rtol=0, atol=2e-6, msg=name)


def test_groups_are_of_parameters_with_two_axes() -> None:
    clip = CLIP(
        Encoder(replace(TINY, layer_scale=0.1, registers=1)), TextConfig(vocab_size=9, width=8, depth=1, heads=1)
    )
    plain, decayed = (group["params"] for group in clip_groups(list(clip.parameters()), 0.1))
    assert len(plain) + len(decayed) == len(list(clip.parameters()))
    assert {tuple(p.shape) for p in plain if p.ndim > 1} == {(1, 1, 24)}


def test_initial_weights_are_drawn_as_open_clip_draws_them() -> None:
    torch.manual_seed(0)
    theirs = our_names(CustomTextCLIP(64, VISION, WORDS, init_logit_bias=-10.0).state_dict())
    encoder = EncoderConfig(arch="vit_tiny", **described_size(VISION))
    text = TextConfig(vocab_size=50, context_length=8, width=64, depth=2, heads=1)
    ours = CLIP(Encoder(encoder), text, 64, loss="sigmoid").state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name != "logit_scale":  # open_clip leaves that to its configs
            spread, ours_spread = (x.double().square().mean().sqrt() for x in (value, ours[name]))
            assert ours_spread == pytest.approx(float(spread), rel=0.3 if value.numel() < 1000 else 0.05), name


def described_size(vision: dict[str, Any]) -> dict[str, Any]:
    return {
        "width": vision["width"], "depth": vision["layers"], "heads": vision["width"] // 64, "pre_norm": True,
        "patch_size": vision["patch_size"], "image_size": vision["image_size"], "positions": "learned", "pool": "cls",
        "norm_eps": 1e-5, "position_resize": "open_clip",
    }  # fmt: skip
