"""Attention weights of a plain ViT, which its fused attention never forms: made again from each block's q and k.

Axes: b = images, c = channels of an image, h w = its pixels, t = tokens (prefix first), q = the first tokens, those
that are asked for, a = attention heads, e = channels of a head, l = blocks.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.positions import rotate
from tasks.vit import Rope, ViTBlock


@torch.no_grad()
def attention_weights(encoder: Encoder, images: Tensor, queries: int | None = None) -> list[Tensor]:
    """Softmax of q k / sqrt(e) in every block (Vaswani et al. 2017, arXiv:1706.03762, eq. 1): l times [b a q t].

    Args:
        encoder: in evaluation mode; a plain Vision Transformer, ours or timm's.
        images: normalised, [b c h w].
        queries: only for the first so many tokens, since all of them take t * t numbers a head; None: for all.

    Raises:
        TaskError: another kind of encoder, whose attention is not between all tokens, or is none.
    """
    blocks: list[Any] = encoder.blocks
    if not encoder.maskable or any(type(b) not in (ViTBlock, Block) or type(b.attn) is not Attention for b in blocks):
        raise TaskError(f"{encoder.config.arch} is no plain Vision Transformer, whose tokens all attend to each other")
    found: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(partial(_remember, found, queries)) for block in blocks]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def block_attention(block: Any, x: Tensor, rope: Rope | None = None, queries: int | None = None) -> Tensor:
    """Weights [b a q t] with which a block mixes its input tokens x [b t d], for the first `queries` of them."""
    attn, normed = block.attn, block.norm1(x)
    q, k, _ = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    return (q[:, :, :queries] @ k.transpose(-2, -1) * attn.scale).softmax(-1)  # type: ignore[no-any-return]


def _remember(found: list[Tensor], queries: int | None, block: Any, inputs: tuple[Any, ...]) -> None:
    x, rope = (*inputs, None)[:2]
    found.append(block_attention(block, x, rope, queries))
