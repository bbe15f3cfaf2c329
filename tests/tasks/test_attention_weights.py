"""Attention weights made again from q and k: they must rebuild what the block itself computes."""

from dataclasses import replace

import pytest
import torch

from tasks.attention_weights import attention_weights, block_attention
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError

SMALL = EncoderConfig(arch="vit_tiny", width=32, depth=2, heads=4, image_size=32, patch_size=8)
ENCODERS = {
    "plain": SMALL,
    "registers, LayerScale, no bias": replace(SMALL, registers=3, layer_scale=0.5, qkv_bias=False, positions="learned"),
    "rotary": replace(SMALL, positions="rope", registers=1),
    "no class token": replace(SMALL, class_token=False, pool="mean"),
    "timm": EncoderConfig(arch="timm:test_vit", image_size=64),
    "timm, q and k with norms": EncoderConfig(arch="timm:test_vit", image_size=64, pool="cls"),
}


def built(config: EncoderConfig) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config)
    if config == ENCODERS["timm, q and k with norms"]:  # local models may; none of timm's own with these blocks does
        for block in encoder.blocks:
            block.attn.q_norm, block.attn.k_norm = (torch.nn.LayerNorm(block.attn.head_dim) for _ in "qk")
    encoder.eval().double()
    for name, value in encoder.named_parameters():
        if "qkv" in name or "q_norm" in name or "k_norm" in name:  # as initialised, attention is nearly even
            torch.nn.init.normal_(value, std=2 if "norm" in name else 0.5)
    return encoder


@pytest.mark.parametrize("config", ENCODERS.values(), ids=ENCODERS.keys())
def test_the_weights_rebuild_each_blocks_output(config: EncoderConfig) -> None:
    encoder = built(config)
    seen: list[tuple[torch.nn.Module, tuple, torch.Tensor]] = []
    hooks = [b.register_forward_hook(lambda block, args, out: seen.append((block, args, out))) for b in encoder.blocks]
    size = config.image_size
    weights = attention_weights(encoder, torch.randn(2, 3, size, size, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    assert len(weights) == len(encoder.blocks) == len(seen)
    for each, (block, (x, *rope), out) in zip(weights, seen, strict=True):
        assert each.shape == (2, block.attn.num_heads, x.shape[1], x.shape[1])
        assert each.max() > 5 / x.shape[1]  # far from even, or the test could not fail
        v = block.attn.qkv(block.norm1(x))[..., -x.shape[2] :].unflatten(2, (block.attn.num_heads, -1))
        mixed = torch.einsum("baqt,btae->bqae", each, v).flatten(2)
        y = x + block.ls1(block.attn.proj(block.attn.norm(mixed)))
        torch.testing.assert_close(y + block.ls2(block.mlp(block.norm2(y))), out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(block_attention(block, x, *rope, queries=1), each[:, :, :1])


OTHERS = {
    "EVA-02: three projections, rotary": ("eva02_tiny_patch14_224", 56, 1),
    "DINOv3: registers, rotary": ("vit_small_patch16_dinov3", 64, 5),
    "DINOv3 with biases": ("vit_tiny_patch16_dinov3_qkvb", 64, 5),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", 64, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_weights_are_those_that_timm_forms_without_its_fused_attention(name: str) -> None:
    arch, size, prefix = OTHERS[name]
    encoder = Encoder(EncoderConfig(arch=f"timm:{arch}", image_size=size)).eval().double()
    draw = torch.Generator().manual_seed(0)
    for key, value in encoder.named_parameters():
        if any(part in key for part in ("qkv", "q_proj", "k_proj", "q_bias", "q_norm", "k_norm")):
            torch.nn.init.normal_(value, std=0.3, generator=draw)
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=draw)
    weights, seen = attention_weights(encoder, images), []
    hooks = []
    for block in encoder.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda _, inputs, out: seen.append(out)))
    encoder(images)
    assert encoder.num_prefix == prefix and len(weights) == len(encoder.blocks) == len(seen)
    for ours, theirs in zip(weights, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
        assert ours.max() > 3 / ours.shape[-1]  # far from even, or the test could not fail


def test_a_few_queries_are_the_first_rows() -> None:
    encoder, images = built(SMALL), torch.randn(3, 3, 40, 48, dtype=torch.float64)
    whole, one = attention_weights(encoder, images), attention_weights(encoder, images, queries=1)
    assert whole[0].shape == (3, 4, 31, 31)
    for a, b in zip(whole, one, strict=True):
        torch.testing.assert_close(a[:, :, :1], b)
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]))


@pytest.mark.parametrize(
    "name",
    [
        "test_convnext",
        "test_vit_relpos",
        "xcit_nano_12_p16_224",
        "swin_tiny_patch4_window7_224",
        "vit_small_patch16_rope_mixed_224",
    ],
)
def test_other_families_are_refused(name: str) -> None:
    size = 224 if "224" in name else 64
    with pytest.raises(TaskError, match=f"timm:{name} is no plain Vision Transformer"):
        attention_weights(
            Encoder(EncoderConfig(arch=f"timm:{name}", image_size=size)).eval(), torch.zeros(1, 3, size, size)
        )


def test_nothing_stays_behind_after_a_failure() -> None:
    encoder = built(SMALL)
    with pytest.raises(RuntimeError):
        attention_weights(encoder, torch.zeros(1, 4, 32, 32, dtype=torch.float64))
    assert not any(block._forward_pre_hooks for block in encoder.blocks)
