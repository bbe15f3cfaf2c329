"""CLIP (Radford et al. 2021, arXiv:2103.00020) and SigLIP (Zhai et al. 2023, arXiv:2303.15343) over any encoder.

Axes: b = pairs on this rank, c = channels, h w = pixels, t = ids of a text, k = visible patches, f = channels of a
feature vector, e = joint width.
"""

import math
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.class_token import answers_alone, class_token
from tasks.clip_loss import CLIPLoss
from tasks.drop_path import drop_path_keys
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.masks import random_noise, split_patches, visible_patches
from tasks.sharding import local
from tasks.siglip_loss import SigLIPLoss
from tasks.text_tower import TextConfig, TextTower

Loss = Literal["softmax", "sigmoid"]
Head = Literal["linear", "map"]
# Temperature and bias at the start: CLIP, section 2.5; SigLIP, section 3.2.
START: dict[Loss, tuple[float, float | None]] = {"softmax": (1 / 0.07, None), "sigmoid": (10.0, -10.0)}


class CLIP(nn.Module):
    """An image tower and a text tower that learn which image and which text belong together.

    `logit_scale` is the logarithm of the factor on the cosines, as in every published checkpoint.

    Args:
        encoder: any; what it pools (`EncoderConfig.pool`) is projected to the joint space.
        text: the text tower.
        joint_width: e.
        loss: `softmax` over the whole batch (CLIP), or `sigmoid` of every pair (SigLIP), which has a `logit_bias`, too.
        image_head: `linear`, without a bias, or `map`: attention pooling by a learned query and no projection (SigLIP);
            it needs a plain ViT that is e wide.
        patch_drop: share of an image's patches that are hidden in training (FLIP, arXiv:2212.00794).
        tokenizer_json: content of the tokenizer's file where it may be gone.

    Raises:
        TaskError: settings that cannot work.
    """

    def __init__(
        self,
        encoder: Encoder,
        text: TextConfig,
        joint_width: int = 512,
        loss: Loss = "softmax",
        image_head: Head = "linear",
        patch_drop: float = 0.0,
        tokenizer_json: str | None = None,
    ) -> None:
        super().__init__()
        arch = encoder.config.arch
        if joint_width < 1:
            raise TaskError(f"joint_width {joint_width} must be positive")
        if patch_drop and not encoder.maskable:
            raise TaskError(f"patch_drop hides patches, which {arch} cannot: take a plain ViT, or patch_drop: 0")
        if not (0 <= patch_drop < 1 and visible_patches(encoder.num_patches, patch_drop)):
            raise TaskError(f"patch_drop {patch_drop} must leave some of {encoder.num_patches} patches")
        if image_head == "map" and not (encoder.maskable and encoder.width == joint_width):
            raise TaskError(f"image_head: map needs a plain ViT that is joint_width {joint_width} wide, not {arch}")
        self.encoder, self.loss, self.patch_drop = encoder, loss, patch_drop
        self.image_head: nn.Module = (
            nn.Linear(encoder.feature_width, joint_width, bias=False) if image_head == "linear" else _map_head(encoder)
        )
        self.text = TextTower(text, joint_width, tokenizer_json)
        scale, bias = START[loss]
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.clip_loss, self.siglip_loss = CLIPLoss(), SigLIPLoss()
        self._alone = image_head == "linear" and encoder.config.pool == "cls" and answers_alone(encoder)
        self.init_weights()

    def settings(self) -> dict[str, Any]:
        """The arguments besides the encoder, as plain values; with them the tokenizer travels."""
        linear = isinstance(self.image_head, nn.Linear)
        return {
            "text": asdict(self.text.config),
            "joint_width": self.image_head.out_features if linear else self.encoder.width,
            "loss": self.loss,
            "image_head": "linear" if linear else "map",
            "patch_drop": self.patch_drop,
            "tokenizer_json": self.text.tokenizer.content(),
        }

    def init_weights(self) -> None:
        """Fills every parameter anew, as open_clip does; also after `to_empty` from the meta device."""
        init_encoder(self.encoder)
        self.text.init_weights()
        self._init_head()

    @torch.no_grad()
    def _init_head(self) -> None:
        scale, bias = START[self.loss]
        self.logit_scale.fill_(math.log(scale))
        if self.logit_bias is not None and bias is not None:
            self.logit_bias.fill_(bias)
        if isinstance(self.image_head, nn.Linear):
            nn.init.normal_(self.image_head.weight, std=self.image_head.in_features**-0.5)
            return
        for part in self.image_head.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()
        self.image_head.init_weights()  # type: ignore[operator]

    def encode_image(self, images: Tensor, keep: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """Normalised images [b c h w] -> vectors of length 1, [b e].

        Args:
            images: of the encoder's image size, or any that it can take.
            keep: int64 [b k], the patches to show; None shows all.
            keys: int64 [b], what drop path follows from; None: from torch's generator.
        """
        with drop_path_keys(self.encoder, keys):
            if self._alone:
                pooled = class_token(self.encoder, images, keep)
            else:
                tokens = self.encoder(images, keep)
                pooled = tokens.patches if self._attends else self.encoder.pool(tokens)
        return F.normalize(self.image_head(pooled), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids int64 [b t] -> vectors of length 1, [b e]."""
        return F.normalize(self.text(ids), dim=-1)

    def forward(
        self, images: Tensor, ids: Tensor, keys: Tensor, micro_batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Vectors of b pairs in training, two times [b e]: what `contrast` compares.

        With `micro_batch` the towers see so many pairs at a time and only the vectors are kept; the backward pass
        computes each micro-batch again, with the same draws, and goes through it (GradCache, arXiv:2101.06983). So the
        loss has every negative of the whole batch in the memory of a micro-batch.

        Args:
            images: normalised, [b c h w].
            ids: int64 [b t].
            keys: int64 [b]: patch dropping and drop path follow from them.
            micro_batch: pairs that fit on the device; None: all.
        """
        if micro_batch is None or micro_batch >= len(images):
            return self._encode(images, ids, keys)
        cuts = tuple(range(micro_batch, len(images), micro_batch))
        parts = zip(*(given.tensor_split(cuts) for given in (images, ids, keys)), strict=True)
        encoded = [checkpoint(self._encode, *part, use_reentrant=False) for part in parts]
        image, text = zip(*encoded, strict=True)
        return torch.cat(image), torch.cat(text)

    def contrast(self, image: Tensor, text: Tensor) -> Tensor:
        """Collective: this rank's share of the loss over all pairs of all ranks, from vectors of length 1 [b e]."""
        scale = local(self.logit_scale).exp()
        if self.logit_bias is None:
            return self.clip_loss(image, text, scale)  # type: ignore[no-any-return]
        return self.siglip_loss(image, text, scale, local(self.logit_bias))  # type: ignore[no-any-return]

    @torch.no_grad()
    def clamp(self, largest: float) -> None:
        """Keeps the factor on the cosines between 1 and `largest` (CLIP, section 2.5); not collective."""
        local(self.logit_scale).clamp_(0, math.log(largest))

    def _encode(self, images: Tensor, ids: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        keep = None
        if self.patch_drop:
            keep, _ = split_patches(random_noise(keys, self.encoder.num_patches, "clip patches"), self.patch_drop)
        return self.encode_image(images, keep, keys), self.encode_text(ids)

    @property
    def _attends(self) -> bool:
        return isinstance(self.image_head, AttentionPoolLatent)


def _map_head(encoder: Encoder) -> nn.Module:
    block: Any = encoder.blocks[0]
    return AttentionPoolLatent(  # type: ignore[no-any-return]
        encoder.width,
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / encoder.width,
        norm_layer=partial(nn.LayerNorm, eps=block.norm1.eps),
        act_layer=type(block.mlp.act),
    )


@torch.no_grad()
def init_encoder(encoder: Encoder) -> None:
    """Fills a ViT as open_clip does (torch's own ranges, tokens and positions of length 1); timm's stay as built."""
    if encoder.config.timm_name is not None:
        return
    encoder.init_weights()
    trunk, std = encoder.trunk, encoder.width**-0.5
    trunk.patch_embed.proj.reset_parameters()
    for block in trunk.blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.reset_parameters()
        nn.init.zeros_(block.attn.proj.bias)
    for token in (trunk.cls_token, trunk.reg_token):
        if token is not None:
            nn.init.normal_(token, std=std)
    if encoder.config.positions == "learned":
        nn.init.normal_(trunk.pos_embed, std=std)
