"""Runs that start from the weights of another: the same function afterwards, or one line that says what differs."""

import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import load_encoder
from tasks.clip import CLIP
from tasks.dino import IBOTConfig
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import save_encoder
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.starting_point import encoder_differences, take_clip, take_dino, take_encoder
from tasks.tokenizer import train_bpe
from tests.tasks import clip_runs, dino_runs

VIT = EncoderConfig(
    arch="vit_tiny", width=24, depth=2, heads=2, image_size=16, patch_size=4, positions="learned", pool="cls"
)
TIMM = EncoderConfig(arch="timm:test_vit", image_size=32, pool="mean")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[EncoderConfig], str]:
    def write(config: EncoderConfig) -> str:
        save_encoder(Encoder(config), tmp_path / "file.safetensors")
        return str(tmp_path / "file.safetensors")

    return write


def test_the_function_is_taken_over(file: Callable[[EncoderConfig], str]) -> None:
    """What may differ: pooling, drop path, how tables are stretched, a fixed table for a learned one, rounded means."""
    torch.manual_seed(0)
    start = replace(VIT, positions="sincos2d", position_resize="mae", pool="mean", mean=(0.4850001, 0.456, 0.406))
    source, own = file(start), Encoder(replace(VIT, position_resize="dino", drop_path=0.1)).eval()
    take_encoder(own, source)
    images = torch.randn(2, 3, 16, 16)
    for ours, theirs in zip(own(images), load_encoder(source)(images), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("field", "theirs", "told", "option"),
    [
        ("heads", 6, "heads is 6 there, 2 here", "--model.encoder.heads 6"),
        ("norm_eps", 1e-5, "norm_eps is 1e-05 there, 1e-06 here", "--model.encoder.norm_eps 1e-05"),
        ("activation", "quick_gelu", "activation is quick_gelu there, gelu", "--model.encoder.activation quick_gelu"),
        ("pre_norm", True, "pre_norm is true there, false here", "--model.encoder.pre_norm true"),
        ("mean", (0.5, 0.5, 0.5), 'mean is "[0.5, 0.5, 0.5]" there', '--data.mean "[0.5, 0.5, 0.5]"'),
        ("std", (0.5, 0.5, 0.5), 'std is "[0.5, 0.5, 0.5]" there', '--data.std "[0.5, 0.5, 0.5]"'),
        ("width", 32, "width is 32 there, 24 here", "--model.encoder.width 32"),
        ("depth", 3, "depth is 3 there, 2 here", "--model.encoder.depth 3"),
        ("mlp_ratio", 2.0, "mlp_ratio is 2 there, 4 here", "--model.encoder.mlp_ratio 2"),
        ("patch_size", 8, "patch_size is 8 there, 4 here", "--model.encoder.patch_size 8"),
        ("registers", 1, "registers is 1 there, 0 here", "--model.encoder.registers 1"),
        ("layer_scale", 0.1, "layer_scale is 0.1 there, null here", "--model.encoder.layer_scale 0.1"),
        ("qkv_bias", False, "qkv_bias is false there, true here", "--model.encoder.qkv_bias false"),
        ("positions", "sincos2d", "", ""),
    ],
)
def test_what_would_compute_something_else_is_refused(
    field: str, theirs: Any, told: str, option: str, file: Callable[[EncoderConfig], str]
) -> None:
    source, own = file(replace(VIT, **{field: theirs})), Encoder(VIT)
    if not told:
        take_encoder(own, source)
        return
    with pytest.raises(TaskError) as error:
        take_encoder(own, source)
    line = str(error.value)
    assert line.startswith(f"init_encoder {source} does not fit: ") and "\n" not in line
    assert told in line and line.endswith(f"To start from it set {option}")


def test_what_shapes_tell_is_not_told_by_shapes(file: Callable[[EncoderConfig], str]) -> None:
    """Other patches do not divide these images; several differences come in one line, with all that is to be set."""
    source = file(replace(VIT, image_size=24, patch_size=6, heads=3, positions="rope", class_token=False, pool="mean"))
    with pytest.raises(TaskError) as error:
        take_encoder(Encoder(VIT), source)
    line = str(error.value)
    assert "patch_size is 6 there, 4 here; heads is 3 there, 2 here; positions is rope there, learned here" in line
    assert "--model.encoder.class_token false" in line and "divide" not in line and "blocks" not in line


def test_between_timm_and_our_own(file: Callable[[EncoderConfig], str]) -> None:
    """A timm ViT is described by what it is, other timm models by their names."""
    torch.manual_seed(0)
    timm = Encoder(TIMM).eval()
    block = timm.trunk.blocks[0]
    like = replace(
        VIT, width=timm.width, depth=len(timm.blocks), heads=block.attn.num_heads, image_size=32, patch_size=16,
        mlp_ratio=block.mlp.fc1.out_features / timm.width, pool="mean",
    )  # fmt: skip
    source, own = file(TIMM), Encoder(like).eval()
    take_encoder(own, source)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(own(images).patches, load_encoder(source)(images).patches)
    with pytest.raises(TaskError, match=rf"heads is {block.attn.num_heads} there, 1 here"):
        take_encoder(Encoder(replace(like, heads=1)), source)
    convnext = EncoderConfig(arch="timm:test_convnext", image_size=32)
    for other in (TIMM, VIT, replace(convnext, arch="timm:test_resnet")):
        with pytest.raises(TaskError, match=f"arch is {other.arch} there, timm:test_convnext here"):
            take_encoder(Encoder(convnext), file(other))
    take_encoder(Encoder(convnext), file(convnext))
    with pytest.raises(TaskError, match=r"convnext --model\.encoder\.width null .*depth null .*heads null$"):
        take_encoder(Encoder(VIT), file(convnext))


def test_files_of_the_authors_have_the_heads_of_the_run(tmp_path: Path) -> None:
    """Where the size is no published one; images of another size stretch the table, patches must be the same."""
    torch.manual_seed(0)
    given = Encoder(replace(VIT, position_resize="dino")).eval()
    state = {f"backbone.{name}": value for name, value in given.trunk.state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "dino.pth")
    own = Encoder(VIT).eval()
    take_encoder(own, str(tmp_path / "dino.pth"))
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(own(images).patches, given(images).patches)
    with pytest.raises(TaskError, match=r"patch_size is 4 there, 8 here\. To start from it set"):
        take_encoder(Encoder(replace(VIT, image_size=24, patch_size=8)), str(tmp_path / "dino.pth"))


@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "vit_giant_patch14_dinov2", "test_vit4"])
def test_unusual_vits_are_like_themselves_and_unlike_ours(name: str) -> None:
    with torch.device("meta"):
        given = Encoder(EncoderConfig(arch=f"timm:{name}", image_size=112, pool="mean"))
    assert encoder_differences(given, given) == []
    assert encoder_differences(given, Encoder(VIT)) and encoder_differences(Encoder(VIT), given)


def saved(task: Any, path: Path, runs: Any) -> str:
    runs.fit(task, 2, callbacks=[dino_runs.Stop(1, path)])
    return str(path)


def test_a_whole_clip_is_the_same_function_or_refused(tmp_path: Path) -> None:
    old = clip_runs.tiny_task()
    source = saved(old, tmp_path / "old.ckpt", clip_runs)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"encoder": replace(clip_runs.TINY, heads=3)}, "--model.encoder.heads 2"),
        ({"encoder": replace(clip_runs.TINY, pool="mean")}, "--model.encoder.pool cls"),
        ({"encoder": replace(clip_runs.TINY, image_size=18, patch_size=6)}, "--model.encoder.patch_size 4"),
        ({"text": replace(clip_runs.TEXT, heads=4)}, "--model.text.heads 2"),
        ({"text": replace(clip_runs.TEXT, activation="quick_gelu")}, "--model.text.activation gelu"),
        ({"text": replace(clip_runs.TEXT, causal=False)}, "--model.text.causal true"),
        ({"text": replace(clip_runs.TEXT, clean="whitespace")}, "--model.text.clean lower"),
        ({"text": replace(clip_runs.TEXT, vocab_size=60)}, "--model.text.vocab_size 50"),
        ({"loss": "sigmoid"}, "--model.loss softmax"),
        ({"joint_width": 24, "image_head": "map"}, "--model.joint_width 12 --model.image_head linear"),
    ]
    for change, options in changes:
        own = clip_runs.tiny_task(**change).model
        with pytest.raises(TaskError, match="does not fit: ") as error:
            take_clip(own, source)
        assert str(error.value).endswith(f"To start from it set {options}"), change
    train_bpe(["other words"], tmp_path / "words.json", vocab_size=280)
    own = clip_runs.tiny_task(text=replace(clip_runs.TEXT, tokenizer=str(tmp_path / "words.json"), vocab_size=50)).model
    with pytest.raises(TaskError, match=r"text\.tokenizer is clip there, .*words\.json here.*--model\.text\.tokenizer"):
        take_clip(own, source)
    larger: CLIP = clip_runs.tiny_task(replace(clip_runs.TINY, image_size=32, drop_path=0.0)).model
    take_clip(larger, source)
    ids = clip_runs.pairs(2)[1]
    assert torch.equal(larger.eval().encode_text(ids), old.model.eval().encode_text(ids))


def test_a_whole_dino_is_the_same_or_refused(tmp_path: Path) -> None:
    source = saved(dino_runs.tiny_task(), tmp_path / "old.ckpt", dino_runs)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"encoder": replace(dino_runs.TINY, heads=3)}, "--model.encoder.heads 2"),
        ({"encoder": replace(dino_runs.TINY, image_size=32)}, "--data.recipe.crop_size 16"),
        ({"head": replace(dino_runs.HEAD, prototypes=8)}, "--model.head.prototypes 16"),
        ({"head": replace(dino_runs.HEAD, norm_last_layer=False)}, "--model.head.norm_last_layer true"),
    ]
    for change, options in changes:
        task = dino_runs.tiny_task(**change)
        with pytest.raises(TaskError, match="does not fit: ") as error:
            take_dino(task.model, task.model_settings(), source)
        assert str(error.value).endswith(f"To start from it set {options}"), change
    task = dino_runs.tiny_task(TIMM)
    about = {"objective": "dino", "encoder": asdict(TIMM), "model": task.model_settings()}
    state = {f"model.{name}": value for name, value in task.model.state_dict().items()}
    torch.save({"trivit": about, "state_dict": state}, tmp_path / "timm.ckpt")
    take_dino(task.model, task.model_settings(), str(tmp_path / "timm.ckpt"))
    ibot = dino_runs.tiny_task(ibot=IBOTConfig(head=dino_runs.HEAD))
    with pytest.raises(TaskError, match=r"ibot is off there, on, with a head .* here.*set --model\.ibot null$"):
        take_dino(ibot.model, ibot.model_settings(), source)
    centreless = dino_runs.tiny_task(targets="sinkhorn")
    take_dino(centreless.model, centreless.model_settings(), source)
    source = saved(centreless, tmp_path / "centreless.ckpt", dino_runs)
    task = dino_runs.tiny_task()
    with pytest.raises(TaskError, match=r"targets is sinkhorn there, centering here.*--model\.targets sinkhorn"):
        take_dino(task.model, task.model_settings(), source)


def test_options_can_be_typed_as_they_are_told(file: Callable[[EncoderConfig], str]) -> None:
    with pytest.raises(TaskError) as error:
        take_encoder(Encoder(VIT), file(replace(VIT, heads=3, mean=(0.5, 0.4, 0.3), norm_eps=1e-5)))
    words = shlex.split(str(error.value).partition("set ")[2])
    assert words == [
        "--model.encoder.heads", "3", "--model.encoder.norm_eps", "1e-05", "--data.mean", "[0.5, 0.4, 0.3]",
    ]  # fmt: skip
