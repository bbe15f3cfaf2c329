"""CLIP's text tower: open_clip's TextTransformer, asked only for what the loss looks at.

Axes: b = texts, t = ids of a text, up to the context length, d = width, e = joint width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tasks.errors import TaskError
from tasks.tokenizer import Clean, Tokenizer, spare_content


@dataclass(frozen=True)
class TextConfig:
    """A text tower and its tokenizer.

    Args:
        tokenizer: `clip` (CLIP's vocabulary of 49,408), a tokenizer.json, or `hf-hub:USER/NAME`.
        context_length: ids of a text, with those that begin and end it.
        clean: how texts are cleaned (see `Tokenizer`).
        pad_id: fills up short texts.
        vocab_size: rows of the embedding; None: as many ids as the tokenizer has.
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden width of a block's MLP over `width`.
        causal: a token sees only what is before it (CLIP), or all (SigLIP).
        pool: the token that speaks for the text: its `end`, the first place of the largest id (CLIP), or the `last`
            place, padding or not (SigLIP).
        projection_bias: whether the projection to the joint width has a bias.
        norm_eps: epsilon of every LayerNorm.
        activation: of the MLPs; `quick_gelu` as in OpenAI's weights.
    """

    tokenizer: str = "clip"
    context_length: int = 77
    clean: Clean = "lower"
    pad_id: int = 0
    vocab_size: int | None = None
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    causal: bool = True
    pool: Literal["end", "last"] = "end"
    projection_bias: bool = False
    norm_eps: float = 1e-5
    activation: Literal["gelu", "quick_gelu"] = "gelu"

    def check(self) -> None:
        """Raises TaskError, one line, for what cannot be built."""
        if min(self.width, self.depth, self.heads, self.vocab_size or 1) < 1:
            raise TaskError("text sizes (width, depth, heads, vocab_size) must be positive")
        if self.context_length < 3:
            raise TaskError(f"text.context_length {self.context_length} leaves no room between start and end of a text")
        if self.width % self.heads:
            raise TaskError(f"{self.heads} heads do not divide text width {self.width}")


class TextTower(nn.Module):
    """Texts as vectors in the joint space. `trunk` has open_clip's parameter names.

    Args:
        config: which tower.
        joint_width: e.
        tokenizer_json: content of the tokenizer's file where it may be gone.

    Raises:
        TaskError: the config cannot be built, or a vocabulary is needed and cannot be read.
    """

    def __init__(self, config: TextConfig, joint_width: int, tokenizer_json: str | None = None) -> None:
        super().__init__()
        config.check()
        try:
            from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer
        except ImportError as error:
            raise TaskError("CLIP's text tower needs open_clip: pip install open_clip_torch") from error
        self.config = config
        content = tokenizer_json or spare_content(config.tokenizer)
        self.tokenizer = Tokenizer(config.tokenizer, config.context_length, config.clean, config.pad_id, content)
        self.trunk: Any = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size or self.tokenizer.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.depth,
            mlp_ratio=config.mlp_ratio,
            output_dim=joint_width,
            no_causal_mask=not config.causal,
            pad_id=config.pad_id,
            pool_type="argmax" if config.pool == "end" else "last",
            proj_bias=config.projection_bias,
            act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
            norm_layer=partial(LayerNorm, eps=config.norm_eps),
        )

    @property
    def trimmable(self) -> bool:
        """Whether what follows the end of a text cannot change what the tower says about it."""
        return self.config.causal and self.config.pool == "end"

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts, in order: what to shard, compile or recompute one at a time."""
        return list(self.trunk.transformer.resblocks)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter anew, as open_clip does; also after `to_empty` from the meta device."""
        for part in reversed(list(self.trunk.modules())):  # an attention sets the bias of its projection to zero
            if isinstance(part, nn.MultiheadAttention):
                part._reset_parameters()
            elif isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()
        self.trunk.init_parameters()
        if self.trunk.attn_mask is not None:
            self.trunk.attn_mask.copy_(self.trunk.build_causal_mask())

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [b t] -> [b e], not normalised; a trimmable tower takes any t, others the context length."""
        trunk, t = self.trunk, ids.shape[1]
        x = trunk.token_embedding(ids) + trunk.positional_embedding[:t]
        mask = trunk.attn_mask
        x = trunk.transformer(x, attn_mask=None if mask is None else mask[:t, :t])
        place = ids.argmax(dim=1) if self.config.pool == "end" else ids.new_full((len(ids),), t - 1)
        pooled = trunk.ln_final(x[torch.arange(len(ids), device=ids.device), place])
        projection = trunk.text_projection
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection  # type: ignore[no-any-return]


def trim(ids: Tensor) -> Tensor:
    """Ids [b t] cut behind the last end of a text, to a multiple of 8 where there is room: kernels like it."""
    longest = int(ids.argmax(dim=1).max()) + 1
    return ids[:, : -(-longest // 8) * 8]
