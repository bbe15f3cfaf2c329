"""One interface over every image encoder: images in, prefix tokens and patch tokens out, or one vector per image.

Axes: b = images, c = channels, h w = pixels, p = prefix tokens (class token first, then registers),
n = patches in row-major order, k = visible patches, d = width, f = channels of a feature vector.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.drop_path import use_keyed_drop_path
from tasks.encoder_config import EncoderConfig, Pool
from tasks.errors import TaskError
from tasks.positions import Grid, resize_table, rope_table, sincos2d_table
from tasks.timm_models import (
    create_timm,
    freeze_unused,
    is_maskable,
    map_tokens,
    measured_config,
    norm_pooled,
    num_prefix_tokens,
    repeated_parts,
)
from tasks.vit import Rope, build_vit, init_vit, patch_rows


class Tokens(NamedTuple):
    """What an encoder says about images, after its final norm."""

    prefix: Tensor  # [b p d]
    patches: Tensor  # [b n d], or [b k d] where only k patches were shown


class Encoder(nn.Module):
    """An image encoder of any kind behind one interface.

    A plain Vision Transformer (ours, or timm's class of that name) is `maskable`: it can be shown some patches only, or
    have some replaced by a mask token. Any other timm model gives its last feature map as patches.
    `trunk` is the wrapped model; its parameters have timm's names, which are those of the MAE and DINO authors too.

    Args:
        config: which encoder; timm models come untrained (`load_encoder` fetches weights).

    Raises:
        TaskError: the config cannot be built.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        config.check()
        if config.timm_name is None:
            self.trunk: Any = build_vit(config)
            self.config = config
        else:
            options: dict[str, Any] = {"in_chans": config.in_chans}
            if config.drop_path:
                options["drop_path_rate"] = config.drop_path
            self.trunk = create_timm(config.timm_name, image_size=config.image_size, **options)
            self.config = measured_config(config, self.trunk)
        if self.config.pool != "mean" and not self.config.class_token:
            raise TaskError(f"{config.arch} has no class token: set encoder.pool: mean")
        use_keyed_drop_path(self.trunk, config.drop_path if config.drop_path_uniform else None)
        self.maskable = is_maskable(self.trunk)
        self.width: int = self.trunk.num_features
        self.num_prefix = num_prefix_tokens(self.trunk)
        self._ropes: dict[tuple[Grid, torch.device, torch.dtype], Rope] = {}
        if config.timm_name is None:
            if config.positions == "sincos2d":
                self.trunk.pos_embed.requires_grad_(False)
            self.init_weights()

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches of a training image."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """Patches of a training image."""
        return self.grid[0] * self.grid[1]

    @property
    def feature_width(self) -> int:
        """Channels of `features`."""
        return self.width * (2 if self.config.pool == "cls+mean" else 1)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts, in order: what to shard, compile or recompute one at a time."""
        return repeated_parts(self.trunk)

    def freeze_unused(self) -> None:
        """Before training: what no token depends on, which plain ViTs do not have, gets no gradient; DDP would wait."""
        if not self.maskable:
            freeze_unused(self.trunk, self.config.image_size, self.config.in_chans)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter anew (timm models in their own way); also after `to_empty` from the meta device."""
        trunk = self.trunk
        if self.config.timm_name is not None:
            trunk.init_weights()
            return
        init_vit(trunk)
        for token in (trunk.cls_token, trunk.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if self.config.positions == "learned":
            nn.init.trunc_normal_(trunk.pos_embed, std=0.02)
        elif self.config.positions == "sincos2d":
            trunk.pos_embed.copy_(sincos2d_table(self.width, self.grid, self._placed)[None])

    def forward(
        self, images: Tensor, keep: Tensor | None = None, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tokens:
        """Tokens of normalised images [b c h w] of any size, after the final norm.

        Args:
            images: pixels beyond the last whole patch are not seen, as by a strided convolution.
            keep: int64 [b k], the patches to show, in that order; None shows all. What is hidden costs nothing.
            mask: bool [b n], True = hidden: the patch becomes mask_token but keeps its place (iBOT, arXiv:2111.07832).
            mask_token: [d], needed with `mask`.

        Raises:
            TaskError: `keep` or `mask` with an encoder that is not maskable.
        """
        if not self.maskable:
            if keep is not None or mask is not None:
                raise TaskError(f"{self.config.arch} mixes patches early, so none can be hidden: take a plain ViT")
            return Tokens(*map_tokens(self.trunk.forward_features(images), self.trunk))
        x = self._embed(images, keep, mask, mask_token)
        rope = () if self.config.positions != "rope" else (self._rope(images, keep, x.dtype),)
        for block in self.trunk.blocks:
            x = block(x, *rope)
        x = self.trunk.norm(x)
        return Tokens(*torch.split(x, [self.num_prefix, x.shape[1] - self.num_prefix], dim=1))

    def pool(self, tokens: Tokens, how: Pool | None = None) -> Tensor:
        """One vector per image [b f]: the class token, the mean of the patch tokens, or both side by side.

        Args:
            tokens: what `forward` gave.
            how: None: as the config says.
        """
        how = how or self.config.pool
        if how != "mean" and not self.config.class_token:
            raise TaskError(f"{self.config.arch} has no class token to pool: use mean")
        parts = {"cls": tokens.prefix[:, :1], "mean": tokens.patches}
        pooled = [norm_pooled(self.trunk, parts[name].mean(dim=1)) for name in how.split("+")]
        return torch.cat(pooled, dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Feature vectors [b f] of images [b c h w], pooled as the config says."""
        return self.pool(self(images))

    @torch.no_grad()
    def cannot_see(self, side: int) -> str | None:
        """Why square images of `side` pixels cannot go through; None when they can. One black image tells."""
        placed = next(self.parameters())
        training = self.training
        try:
            self.eval()(torch.zeros(1, self.config.in_chans, side, side, dtype=placed.dtype, device=placed.device))
        except Exception as error:  # each family of timm fails in its own way
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        finally:
            self.train(training)
        return None

    def position_table(self, height: int, width: int) -> Tensor | None:
        """What is added to the tokens of an image of that many pixels, [n d] or [1+n d] with the class token's row.

        None where nothing is added (rotary positions).
        """
        table: Tensor | None = self.trunk.pos_embed
        side, patch_size = self.config.image_size, self.config.patch_size
        if table is None or (height, width) == (side, side):
            return None if table is None else table[0]
        new = (height // patch_size, width // patch_size)
        prefix, patches = torch.split(table[0], [self._placed, self.num_patches])
        patches = resize_table(patches, self.grid, new, self.config.position_resize, square=height == width)
        return torch.cat([prefix, patches])

    @property
    def _placed(self) -> int:
        """Prefix tokens that have a row in the position table."""
        return 0 if self.trunk.no_embed_class else self.num_prefix

    def _embed(self, images: Tensor, keep: Tensor | None, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
        trunk = self.trunk
        patches = patch_rows(images, self.config.patch_size, keep)  # a hidden patch is never even read
        if mask is not None and keep is not None:
            mask = mask.gather(1, keep)
        x = F.linear(patches, trunk.patch_embed.proj.weight.flatten(1), trunk.patch_embed.proj.bias)
        if mask is not None:
            if mask_token is None:
                raise TypeError("mask needs mask_token")
            x = torch.where(mask[:, :, None], mask_token.to(x.dtype), x)
        prefix = [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        table = self.position_table(*images.shape[-2:])
        if table is not None:
            of_prefix, of_patches = table[: self._placed], table[self._placed :]
            x = x + (of_patches if keep is None else F.embedding(keep, of_patches))
            if self._placed:
                prefix = [torch.cat(prefix, dim=1) + of_prefix]
        if prefix:
            # len(x) would fix the batch of an ONNX export
            x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        return trunk.norm_pre(x)  # type: ignore[no-any-return]

    def _rope(self, images: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Rope:
        height, width = (side // self.config.patch_size for side in images.shape[-2:])
        key = ((height, width), images.device, dtype)
        if key not in self._ropes:
            table = rope_table(self.width // self.config.size.heads, (height, width))
            self._ropes[key] = tuple(angle.to(images.device, dtype) for angle in table)  # type: ignore[assignment]
        sin, cos = self._ropes[key]
        if keep is not None:
            sin, cos = F.embedding(keep, sin)[:, None], F.embedding(keep, cos)[:, None]
        return sin, cos
