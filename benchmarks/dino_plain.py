"""DINO as its authors' loop does it, in plain PyTorch and our own words: what a user would write after the paper.

One pass of the encoder per resolution, explicit attention, every tensor of the loss stored, a loop over the parameters
for clipping and for the teacher, torch's default AdamW. Parameters have the names of our `Branch`.

Axes: b = images, t = tokens, d = width, k = prototypes.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from tasks.dino_schedules import cosine

EPS = 1e-6


class Attention(nn.Module):
    """Softmax of queries times keys, written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b t d] -> [b t d]."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, d))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm, attention and MLP, each of which may be dropped."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn, self.drop_path = Attention(width, heads), DropPath(drop_path)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """[b t d] -> [b t d]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """The class token of a Vision Transformer, for images of any size."""

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.patch_size, self.side = patch_size, image_size // patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.side**2 + 1, width))
        drops = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.Sequential(*(Block(width, heads, drop) for drop in drops))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        """[b 3 h h] -> [b d]."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._places(images.shape[-1])
        return self.norm(self.blocks(x))[:, 0]  # type: ignore[no-any-return]

    def _places(self, size: int) -> Tensor:
        new = size // self.patch_size
        if new == self.side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        factor = (new + 0.1) / self.side
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Head(nn.Module):
    """MLP, length 1, prototypes."""

    def __init__(self, width: int, prototypes: int, hidden: int, bottleneck: int, fixed_lengths: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        self.last_layer.weight_g.data.fill_(1)
        self.last_layer.weight_g.requires_grad = not fixed_lengths

    def forward(self, x: Tensor) -> Tensor:
        """[b d] -> [b k]."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))  # type: ignore[no-any-return]


class MultiCrop(nn.Module):
    """An encoder over views of several resolutions, one pass for each, and a head over all of them at once."""

    def __init__(self, vit: ViT, head: Head) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"trunk": vit})
        self.head = head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Views [b 3 h h], those of one size next to each other -> [v*b k]."""
        sizes = dict.fromkeys(view.shape[-1] for view in views)
        features = [
            self.encoder["trunk"](torch.cat([view for view in views if view.shape[-1] == size])) for size in sizes
        ]
        return self.head(torch.cat(features))  # type: ignore[no-any-return]


class PlainDINO:
    """The training loop's inside; a call is one step and gives its loss.

    Args:
        told: `init_args` of a DINO YAML of ours, complete.
        image_size: of global views, pixels.
        size: width, depth and heads.
        batch_size: images of a step, for the learning rate.
        next_views: gives the views of a batch, each [b 3 h h], the two global ones first.
    """

    def __init__(
        self, told: dict[str, Any], image_size: int, size: tuple[int, int, int], batch_size: int,
        next_views: Callable[[], Sequence[Tensor]],
    ) -> None:  # fmt: skip
        self.told, self.next_views, self.done = told, next_views, 0
        patch, drop = told["encoder"]["patch_size"], told["encoder"]["drop_path"]
        head = told["head"]

        def branch(drop_path: float, fixed_lengths: bool) -> MultiCrop:
            sizes = (size[0], head["prototypes"], head["hidden_width"], head["bottleneck_width"])
            return MultiCrop(ViT(image_size, patch, *size, drop_path), Head(*sizes, fixed_lengths))

        self.student, self.teacher = branch(drop, head["norm_last_layer"]), branch(0.0, True)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.center = torch.zeros(1, head["prototypes"])
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups)
        self.peak = told["lr"] if "lr" in told else told["base_lr"] * batch_size / 256

    def __call__(self) -> float:
        """One step; its loss."""
        told, step, total = self.told, self.done, 10_000
        warmup = told.get("warmup_steps") or 1000 * told["warmup_epochs"]
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(step, total, self.peak, told["min_lr"], warmup)
        self.optimizer.param_groups[0]["weight_decay"] = cosine(
            step, total, told["weight_decay"], told["weight_decay_end"]
        )
        views = self.next_views()
        taught = self.teacher(views[:2])
        loss = self._loss(self.student(views), taught, len(views))
        if not math.isfinite(loss.item()):
            raise RuntimeError("the loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        for name, parameter in self.student.named_parameters():
            if parameter.grad is None:
                continue
            factor = told["clip_grad"] / (parameter.grad.norm(2).item() + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)
            if "last_layer" in name:  # the first epoch
                parameter.grad = None
        self.optimizer.step()
        momentum = cosine(step, total, told["teacher_momentum"], 1.0)
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(momentum).add_((1 - momentum) * new)
        self.done += 1
        return loss.item()

    def _loss(self, student: Tensor, teacher: Tensor, count: int) -> Tensor:
        told = self.told
        students = (student / told["student_temp"]).chunk(count)
        teachers = F.softmax((teacher - self.center) / told["warmup_teacher_temp"], dim=-1).chunk(2)
        terms = [
            torch.sum(-target * F.log_softmax(guess, dim=-1), dim=-1).mean()
            for i, target in enumerate(teachers)
            for j, guess in enumerate(students)
            if i != j
        ]
        keep = told["center_momentum"]
        self.center = self.center * keep + teacher.mean(dim=0, keepdim=True) * (1 - keep)
        return torch.stack(terms).mean()
