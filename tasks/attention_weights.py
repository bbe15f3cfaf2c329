"""Attention weights of a plain ViT, which its fused attention never forms: made again from each block's q and k.

Axes: b = images, c = channels of an image, h w = its pixels, t = tokens (prefix first), q = the first tokens, those
that are asked for, a = attention heads, e = channels of a head, l = blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.positions import rotate
from tasks.vit import Rope, ViTBlock

KINDS = ((ViTBlock, Attention), (Block, Attention), (EvaBlock, EvaAttention))
"""Blocks and attention between all tokens that can be made again here."""


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
        encoder: in evaluation mode; a Vision Transformer of plain blocks, ours or timm's (EVA and DINOv3 too), with a
            class token, registers, a distillation token or none of them.
        images: normalised, [b c h w].
        visit: what is done with the weights of each block, the first one first.
        queries: only for the first so many tokens, since all of them take t * t numbers a head; None: for all.

    Raises:
        TaskError: another kind of encoder, whose attention is not between all tokens, or is none.
    """
    blocks: list[Any] = encoder.blocks
    plain = isinstance(encoder.trunk, VisionTransformer | Eva)
    if not plain or any((type(block), type(block.attn)) not in KINDS for block in blocks):
        raise TaskError(f"{encoder.config.arch} is no plain Vision Transformer, whose tokens all attend to each other")
    hooks = [block.register_forward_pre_hook(partial(_show, visit, queries), with_kwargs=True) for block in blocks]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()


def block_attention(block: Any, x: Tensor, rope: Rope | Tensor | None = None, queries: int | None = None) -> Tensor:
    """Weights [b a q t] with which a block mixes its input tokens x [b t d], for the first `queries` of them."""
    attn = block.attn
    q, k = (_of_eva if type(attn) is EvaAttention else _of_vit)(attn, block.norm1(x), rope)
    return (q[:, :, :queries] @ k.transpose(-2, -1) * attn.scale).softmax(-1)  # type: ignore[no-any-return]


def _of_vit(attn: Any, x: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys [b a t e]; `rope`: sine and cosine, as our own blocks get them."""
    q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    return (q, k) if rope is None else (rotate(q, *rope), rotate(k, *rope))


def _of_eva(attn: Any, x: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
    """The same; `rope`: timm's table for the patches, one projection or three, and keys never have a bias."""
    if attn.qkv is not None:
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        q, k, _ = F.linear(x, attn.qkv.weight, bias).view(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    else:
        b, t, _ = x.shape
        q, k = (part(x).view(b, t, attn.num_heads, -1).transpose(1, 2) for part in (attn.q_proj, attn.k_proj))
    q, k = attn.q_norm(q), attn.k_norm(k)
    return (q, k) if rope is None else (_rotated(q, rope, attn), _rotated(k, rope, attn))


def _rotated(x: Tensor, rope: Tensor, attn: Any) -> Tensor:
    prefix, patches = x[:, :, : attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens :]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=2)


def _show(
    visit: Callable[[Tensor], object], queries: int | None, block: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> None:
    x, rope = (*inputs, named.get("rope"))[:2]
    visit(block_attention(block, x, rope, queries))
