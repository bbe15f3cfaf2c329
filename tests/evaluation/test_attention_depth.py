"""Attention over depth: heads that look at themselves, at a fixed distance or everywhere must be told apart."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evaluation.attention_depth import (
    attention_distance,
    attention_entropy,
    draw_attention_distance,
    draw_attention_entropy,
)
from evaluation.attention_rollout import attention_rollout, draw_rollout
from evaluation.errors import EvaluationError
from evaluation.pictures import picture
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError

CONFIG = EncoderConfig(
    arch="vit_tiny", width=16, depth=3, heads=2, image_size=16, patch_size=4, registers=2, positions="learned"
)
IMAGES = torch.zeros(2, 3, 16, 24, dtype=torch.uint8)  # 4 x 6 patches of 4 pixels


def told(monkeypatch: pytest.MonkeyPatch, layers: list[Tensor]) -> Encoder:
    """An encoder whose layers are said to attend so, [a t t] each."""
    for module in ("attention_depth", "attention_rollout"):
        monkeypatch.setattr(
            f"evaluation.{module}.visit_attention", lambda _, x, visit: [visit(each[None]) for each in layers]
        )
    return Encoder(replace(CONFIG, pool="mean"))


def own(tokens: int) -> Tensor:
    return torch.eye(tokens)


def even(tokens: int) -> Tensor:
    return torch.full((tokens, tokens), 1 / tokens)


def one_to_the_right() -> Tensor:
    """Of 3 prefix tokens and 4 x 6 patches: each patch looks at the next one of its row, the last at the one before."""
    weights = torch.zeros(27, 27)
    weights[:3, 0] = 1
    for patch in range(24):
        weights[3 + patch, 3 + (patch + 1 if patch % 6 < 5 else patch - 1)] = 0.5
        weights[3 + patch, 1] = 0.5  # a register takes the rest
    return weights


def test_distance_is_in_pixels_among_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [torch.stack([own(27), one_to_the_right()]), torch.stack([even(27), even(27)])]
    found = attention_distance(told(monkeypatch, layers), IMAGES)
    every = [math.hypot(4 * (i // 6 - j // 6), 4 * (i % 6 - j % 6)) for i in range(24) for j in range(24)]
    assert found.even == pytest.approx(sum(every) / 24**2)
    assert found.values.tolist() == [pytest.approx([0, 4]), pytest.approx([found.even] * 2)]


def test_entropy_is_in_nats_among_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [torch.stack([own(27), one_to_the_right()]), torch.stack([even(27), even(27)])]
    found = attention_entropy(told(monkeypatch, layers), IMAGES)
    assert found.even == pytest.approx(math.log(27))
    assert found.values.tolist() == [pytest.approx([0, 24 / 27 * math.log(2)]), pytest.approx([math.log(27)] * 2)]


def test_rollout_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers in which every patch looks at patch (1, 4): half of it stays, then half of the rest."""
    one = torch.zeros(27, 27)
    one[:, 3 + 6 + 4] = 1
    layers = [torch.stack([one, one]), torch.stack([one, one])]
    encoder = told(monkeypatch, layers)
    found = attention_rollout(encoder, IMAGES)
    assert found.weights.shape == (2, 4, 6) and found.source == "the mean of the patches"
    expected = torch.full((4, 6), 0.25 / 24)
    expected[1, 4] = 0.75 + 0.25 / 24
    torch.testing.assert_close(found.weights, expected.expand(2, 4, 6))
    # one head of two stays at home: a quarter of the stream moves in each layer
    found = attention_rollout(told(monkeypatch, [torch.stack([one, own(27)])]), IMAGES)
    assert float(found.weights[0, 1, 4]) == pytest.approx(0.25 + 0.75 / 24)
    encoder.config = replace(CONFIG, pool="cls")
    found = attention_rollout(told(monkeypatch, layers), IMAGES)
    of_class = attention_rollout(encoder, IMAGES)
    assert of_class.source == "the class token"
    assert float(of_class.weights[0, 1, 4]) == pytest.approx(0.75) and float(of_class.weights[0].sum()) < 0.76
    encoder.config = replace(CONFIG, pool="cls+mean")
    both = attention_rollout(encoder, IMAGES)
    torch.testing.assert_close(both.weights, (expected + of_class.weights) / 2)
    assert "half class token, half mean" in both.source
    drawn = draw_rollout(of_class)
    assert drawn[0].most == pytest.approx(24) and drawn[0].least == 0
    white_in_place = torch.zeros(1, 4, 6, dtype=torch.uint8)
    white_in_place[0, 1, 4] = 255
    assert drawn[1].map == picture(white_in_place)


def test_order_of_the_layers_is_that_of_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class token's share is what the last layer takes from it, and it had its own from the first patch."""
    to_class, to_patch = torch.zeros(27, 27), torch.zeros(27, 27)
    to_class[:, 0], to_patch[:, 3] = 1, 1
    first = attention_rollout(told(monkeypatch, [to_patch[None], to_class[None]]), IMAGES).weights
    assert float(first[0, 0, 0]) == pytest.approx(0.5 + 0.25 / 24)
    second = attention_rollout(told(monkeypatch, [to_class[None], to_patch[None]]), IMAGES).weights
    assert float(second[0, 0, 0]) == pytest.approx(0.25 + 0.25 / 24)


ENCODERS = {
    "ours": CONFIG,
    "no class token": replace(CONFIG, class_token=False, registers=0, pool="mean"),
    "rotary": replace(CONFIG, positions="rope", registers=0),
    "timm": EncoderConfig(arch="timm:test_vit", image_size=64),
    "registers": EncoderConfig(arch="timm:vit_small_patch14_reg4_dinov2", image_size=56),
    "DINOv3": EncoderConfig(arch="timm:vit_tiny_patch16_dinov3_qkvb", image_size=64),
    "distillation token": EncoderConfig(arch="timm:deit_tiny_distilled_patch16_224", image_size=64),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_any_vision_transformer_and_the_same_again(name: str) -> None:
    torch.manual_seed(0)
    config = ENCODERS[name]
    encoder = Encoder(config).train()
    images = torch.randint(0, 256, (3, 3, config.image_size, config.image_size), dtype=torch.uint8)
    layers, heads = len(encoder.blocks), encoder.blocks[0].attn.num_heads
    distance, entropy = attention_distance(encoder, images), attention_entropy(encoder, images)
    rollout = attention_rollout(encoder, images)
    tokens = encoder.num_prefix + encoder.num_patches
    assert encoder.num_prefix == {
        "no class token": 0,
        "ours": 3,
        "distillation token": 2,
        "registers": 5,
        "DINOv3": 5,
    }.get(name, 1)
    assert distance.values.shape == entropy.values.shape == (layers, heads)
    assert entropy.even == pytest.approx(math.log(tokens))
    assert (entropy.values <= entropy.even + 1e-6).all() and (entropy.values > 0).all()
    assert ((distance.values > 0) & (distance.values < math.hypot(config.image_size, config.image_size))).all()
    assert rollout.weights.shape == (3, *encoder.grid) and not rollout.weights.requires_grad
    assert ((rollout.weights.sum((1, 2)) > 0) & (rollout.weights.sum((1, 2)) <= 1 + 1e-6)).all()
    again = attention_distance(encoder, images)
    assert torch.equal(again.values, distance.values) and again.even == distance.even
    for svg in (draw_attention_distance(distance), draw_attention_entropy(entropy)):
        assert svg.startswith("<svg viewBox") and svg.count("<use ") >= layers * heads
        assert "layer by layer" in svg and len(svg) < 100_000
    assert all(each.least <= 1 <= each.most for each in draw_rollout(rollout))


def test_one_line_where_there_is_nothing_to_measure() -> None:
    ill = Encoder(CONFIG)
    with torch.no_grad():
        ill.blocks[0].attn.proj.bias[0] = float("nan")
    other = Encoder(EncoderConfig(arch="timm:test_convnext", image_size=64))
    for measure in (attention_distance, attention_entropy, attention_rollout):
        with pytest.raises(EvaluationError, match="not finite, the encoder has diverged"):
            measure(ill, IMAGES)
        with pytest.raises(TaskError, match="no plain Vision Transformer"):
            measure(other, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
