"""Attention weights of a plain ViT, which its fused attention never forms: made again from each block's q and k.

Axes: b = images, c = channels of an image, h w = its pixels, t = tokens (prefix first), q = the first tokens, those
that are asked for, a = attention heads, e = channels of a head, l = blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.positions import rotate
from tasks.vit import Rope, ViTBlock


def attention_weights(encoder: Encoder, images: Tensor, queries: int | None = None) -> list[Tensor]:
    """Softmax of q k / sqrt(e) in every block (Vaswani et al. 2017, arXiv:1706.03762, eq. 1): l times [b a q t].

    Arguments and errors are those of `visit_attention`.
    """
    found: list[Tensor] = []
    visit_attention(encoder, images, found.append, queries)
    return found


@torch.no_grad()
def visit_attention(
    encoder: Encoder, images: Tensor, visit: Callable[[Tensor], object], queries: int | None = None
) -> None:
    """The same weights [b a q t], handed to `visit` block after block, so that only one block's are in memory.

    Args:
        encoder: in evaluation mode; a Vision Transformer of plain blocks, ours or timm's (with a class token,
            registers, a distillation token or none of them).
        images: normalised, [b c h w].
        visit: what is done with the weights of each block, the first one first.
        queries: only for the first so many tokens, since all of them take t * t numbers a head; None: for all.

    Raises:
        TaskError: another kind of encoder, whose attention is not between all tokens, or is none.
    """
    blocks: list[Any] = encoder.blocks
    plain = isinstance(encoder.trunk, VisionTransformer)
    if not plain or any(type(b) not in (ViTBlock, Block) or type(b.attn) is not Attention for b in blocks):
        raise TaskError(f"{encoder.config.arch} is no plain Vision Transformer, whose tokens all attend to each other")
    hooks = [block.register_forward_pre_hook(partial(_show, visit, queries)) for block in blocks]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()


def block_attention(block: Any, x: Tensor, rope: Rope | None = None, queries: int | None = None) -> Tensor:
    """Weights [b a q t] with which a block mixes its input tokens x [b t d], for the first `queries` of them."""
    attn, normed = block.attn, block.norm1(x)
    q, k, _ = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    return (q[:, :, :queries] @ k.transpose(-2, -1) * attn.scale).softmax(-1)  # type: ignore[no-any-return]


def _show(visit: Callable[[Tensor], object], queries: int | None, block: Any, inputs: tuple[Any, ...]) -> None:
    x, rope = (*inputs, None)[:2]
    visit(block_attention(block, x, rope, queries))
