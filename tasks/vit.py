"""Vision Transformer parts over timm: the block every objective uses, patches as rows, initialisation.

Axes: b = images, t = tokens, q = the last tokens that are asked for, n = patches, d = width, h = heads, c = d / h.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.encoder_config import EncoderConfig
from tasks.positions import rotate

Rope = tuple[Tensor, Tensor]


class ViTBlock(Block):  # type: ignore[misc]
    """timm's pre-norm block, with its parameters, that can also rotate, or answer for the last tokens only."""

    def forward(self, x: Tensor, rope: Rope | None = None, queries: int | None = None) -> Tensor:
        """[b t d] -> [b t d], or [b q d] for the last `queries` tokens, which still attend to all t."""
        normed = self.norm1(x)
        if queries is not None:
            x = last(x, queries)
        x = x + self.drop_path1(self.ls1(self._attend(normed, rope, queries)))
        return x + self.drop_path2(self.ls2(self._mlp(self.norm2(x))))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor, rope: Rope | None, queries: int | None) -> Tensor:
        attn, (b, t, d) = self.attn, x.shape
        heads = (attn.num_heads, d // attn.num_heads)
        if queries is None or queries == t:
            q, k, v = attn.qkv(x).view(b, t, 3, *heads).unbind(2)
        else:
            q_weight, kv_weight = attn.qkv.weight.split([d, 2 * d])
            q_bias, kv_bias = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split([d, 2 * d])
            q = F.linear(last(x, queries), q_weight, q_bias).view(b, queries, *heads)
            k, v = F.linear(x, kv_weight, kv_bias).view(b, t, 2, *heads).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = attend(q, k, v)
        return attn.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _mlp(self, x: Tensor) -> Tensor:
        """A quarter of what a block would keep for the way back is what the activation gave: it is made again there."""
        hidden = self.mlp.fc1(x)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiled block does so by itself
            return self._answer(hidden)
        return checkpoint(self._answer, hidden, use_reentrant=False, preserve_rng_state=False)

    def _answer(self, hidden: Tensor) -> Tensor:
        return self.mlp.fc2(self.mlp.act(hidden))  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(c)) v: [b h q c], [b h t c], [b h t c] -> [b h q c] (arXiv:1706.03762, Eq. 1)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and type(q) is Tensor:
        # The backward pass of torch's fused kernel is four to six times slower here than these two products.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights: Tensor = scores.float().softmax(-1).to(v.dtype)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)


def last(x: Tensor, count: int) -> Tensor:
    """The last `count` tokens of x [b t d]."""
    return x[:, x.shape[1] - count :]


def build_vit(config: EncoderConfig) -> Any:
    """timm's VisionTransformer of a checked config, with our block and no head, its parameters not yet filled."""
    width, depth, heads = config.size
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        num_classes=0,
        global_pool="token" if config.class_token else "",
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        init_values=config.layer_scale,
        class_token=config.class_token,
        pos_embed="none" if config.positions == "rope" else "learn",
        # registers have no place, and then timm's layout gives the class token none either (it can learn its own)
        no_embed_class=config.registers > 0,
        reg_tokens=config.registers,
        pre_norm=config.pre_norm,
        drop_path_rate=config.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        act_layer=config.activation,
        block_fn=ViTBlock,
        weight_init="skip",
    )


@torch.no_grad()
def init_vit(module: nn.Module) -> None:
    """Xavier-uniform linear layers and patch embedding with zero biases, unit norms (MAE, arXiv:2111.06377, A.1).

    Tokens and tables are their owner's to fill. LayerScale takes its initial value.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1) if isinstance(part, nn.Conv2d) else part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm | LayerScale):
            part.reset_parameters()


def patch_rows(images: Tensor, patch_size: int, index: Tensor | None = None) -> Tensor:
    """Images [b c h w] -> patches [b n c*p*p], row-major, each in (channel, row, column) order.

    What is left over at the right and bottom edge is not covered, as by a strided convolution.

    Args:
        images: of any size.
        patch_size: p, in pixels.
        index: int64 [b k], take these patches only -> [b k c*p*p].
    """
    b, c, height, width = images.shape
    p, rows, columns = patch_size, height // patch_size, width // patch_size
    images = images[:, :, : rows * p, : columns * p]
    if index is None:
        patches = images.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(b, rows * columns, c * p * p)
    # A patch is c * p runs of p pixels; copying runs reads each wanted pixel once and the others never.
    plane = rows * p * columns
    first = index // columns * (p * columns) + index % columns
    first = first + torch.arange(b, device=index.device)[:, None] * (c * plane)
    runs = torch.arange(c, device=index.device)[:, None] * plane + torch.arange(p, device=index.device) * columns
    return F.embedding(first[:, :, None] + runs.flatten(), images.reshape(-1, p)).flatten(2)
