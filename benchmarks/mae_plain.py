"""MAE as its authors' loop does it, in plain PyTorch and our own words: what a user would write after the paper.

Explicit attention, the decoder unshuffles and predicts every patch, visible ones too, and the loss is masked
afterwards; torch's default AdamW. Parameters have the names of our `MAE`.

Axes: b = images, n = patches, k = visible ones, t = tokens, d = width, e = decoder width, s = numbers of a patch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dino_plain import EPS, Block
from tasks.schedules import warmup_cosine

MASK_RATIO = 0.75


class Trunk(nn.Module):
    """A Vision Transformer over the patches that it is shown."""

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        count = (image_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, count + 1, width), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, heads, 0.0) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [b 3 h h], noise [b n] -> tokens [b 1+k d], mask [b n] (1 = hidden), places to restore [b n]."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        b, n, d = x.shape
        shuffled = noise.argsort(dim=1)
        restore = shuffled.argsort(dim=1)
        keep = shuffled[:, : int(n * (1 - MASK_RATIO))]
        x = x.gather(1, keep[:, :, None].expand(-1, -1, d))
        mask = torch.ones(b, n, device=x.device)
        mask[:, : keep.shape[1]] = 0
        first = (self.cls_token + self.pos_embed[:, :1]).expand(b, -1, -1)
        return self.norm(self.blocks(torch.cat([first, x], dim=1))), mask.gather(1, restore), restore


class PlainMAE(nn.Module):
    """Encoder, decoder and masked loss on normalised patches.

    Args:
        told: `init_args` of a MAE YAML of ours, complete.
        image_size: pixels.
        size: width, depth and heads of the encoder.
    """

    def __init__(self, told: dict[str, Any], image_size: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = told["encoder"]["patch_size"]
        trunk = Trunk(image_size, self.patch_size, *size)
        width, heads = told["decoder_width"], told["decoder_heads"]
        self.encoder = nn.ModuleDict({"trunk": trunk})
        self.decoder_embed = nn.Linear(size[0], width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, trunk.pos_embed.shape[1], width), requires_grad=False)
        self.decoder_blocks = nn.Sequential(*(Block(width, heads, 0.0) for _ in range(told["decoder_depth"])))
        self.decoder_norm = nn.LayerNorm(width, eps=EPS)
        self.decoder_pred = nn.Linear(width, self.patch_size**2 * 3)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images [b 3 h h], noise [b n] -> loss."""
        latent, mask, restore = self.encoder["trunk"](images, noise)
        x = self.decoder_embed(latent)
        hidden = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden.to(x.dtype)], dim=1)
        patches = patches.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        target = self.patchify(images)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()  # type: ignore[no-any-return]

    def patchify(self, images: Tensor) -> Tensor:
        """[b 3 h h] -> [b n s], each patch in (row, column, channel) order."""
        p, side = self.patch_size, images.shape[-1] // self.patch_size
        x = images.reshape(len(images), 3, side, p, side, p)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(len(images), side**2, p * p * 3)


class PlainMAEStep:
    """The training loop's inside; a call is one step and gives its loss.

    Args:
        told, image_size, size: of `PlainMAE`.
        batch_size: images of a step, for the learning rate.
        next_batch: gives images [b 3 h h] and noise [b n].
    """

    def __init__(
        self, told: dict[str, Any], image_size: int, size: tuple[int, int, int], batch_size: int,
        next_batch: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        self.told, self.next_batch, self.done = told, next_batch, 0
        self.model = PlainMAE(told, image_size, size).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": told["weight_decay"]},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=tuple(told["betas"]))
        self.peak = told["lr"] if "lr" in told else told["base_lr"] * batch_size / 256

    def __call__(self) -> float:
        """One step; its loss."""
        told = self.told
        warmup = told.get("warmup_steps") or 1000 * told["warmup_epochs"]
        for group in self.optimizer.param_groups:
            group["lr"] = warmup_cosine(self.done, max(10_000, 2 * warmup), warmup, self.peak, told.get("min_lr", 0.0))
        loss = self.model(*self.next_batch())
        if not math.isfinite(loss.item()):
            raise RuntimeError("the loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.done += 1
        return float(loss.item())
