"""DINO (Caron et al. 2021, arXiv:2104.14294) with the terms of DINOv2 (Oquab et al. 2023, arXiv:2304.07193) as options.

Axes: g = global views (the teacher sees these), l = local views, s = g + l, b = images on this rank, c = channels,
h w = pixels, n = patches of a global view, m = hidden patches of all global views, d = width, k = prototypes.

A forward pass changes nothing. After the optimiser's step, `update_teacher` moves the teacher and `update_centers` the
centres, from what `observe` collected of every micro-batch since the last time.
"""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tasks.block_masks import Hidden
from tasks.centering import Centering
from tasks.class_token import answers_alone, class_token
from tasks.dino_head import DINOHead, HeadConfig
from tasks.dino_health import dino_health, ibot_health
from tasks.dino_loss import DINOLoss
from tasks.drop_path import drop_path_keys
from tasks.ema import update_ema
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.ibot_loss import IBOTLoss
from tasks.koleo_loss import KoLeoLoss
from tasks.masks import view_keys
from tasks.sinkhorn import SinkhornKnopp

Targets = Literal["centering", "sinkhorn"]


@dataclass(frozen=True)
class IBOTConfig:
    """The loss on hidden patches (iBOT, arXiv:2111.07832).

    Args:
        weight: of this loss; DINO's is 1.
        mask_ratio: smallest and largest share of a view's patches that is hidden.
        mask_probability: that a view has hidden patches at all.
        head: a head for patches alone; None: the one for class tokens.
    """

    weight: float = 1.0
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_probability: float = 0.5
    head: HeadConfig | None = None

    def check(self) -> None:
        """TaskError, one line, for what cannot work."""
        low, high = self.mask_ratio
        if not (0 <= low <= high < 1 and high > 0):
            raise TaskError(f"ibot.mask_ratio {list(self.mask_ratio)} must be two shares with 0 <= first <= second < 1")
        if not 0 < self.mask_probability <= 1:
            raise TaskError(f"ibot.mask_probability {self.mask_probability} must be above 0 and at most 1")
        if self.weight <= 0:
            raise TaskError(f"ibot.weight {self.weight} must be positive; leave `ibot` out to train without it")


class DINOOutput(NamedTuple):
    """What one pass of DINO gives."""

    loss: Tensor  # scalar, float32 or better
    parts: dict[str, Tensor]  # detached scalars: `dino`, and `ibot` and `koleo` where they are on, before their weights
    health: dict[str, Tensor]  # detached scalars, see `dino_health` and `ibot_health`
    statistics: dict[str, Tensor]  # what the centres' update needs of this micro-batch


class Branch(nn.Module):
    """An encoder and its heads: what student and teacher have alike.

    Args:
        encoder: any encoder; iBOT needs a maskable one.
        head: of class tokens.
        ibot: None: no patch is ever hidden.
    """

    def __init__(self, encoder: Encoder, head: HeadConfig, ibot: IBOTConfig | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = DINOHead(encoder.width, head)
        self.patch_head = DINOHead(encoder.width, ibot.head) if ibot and ibot.head else None
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.width)) if ibot else None
        self._alone = answers_alone(encoder)
        self._pool: Literal["cls", "mean"] = "cls" if encoder.config.class_token else "mean"

    def forward(
        self, images: Tensor, hidden: Hidden | None = None, *, mask: bool = False, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Class tokens [b d] of images [b c h w] (without one, means over patches), and the patches to guess [m d].

        Args:
            images: of one size.
            hidden: which patches to give; None: none.
            mask: do not show them.
            keys: int64 [b], what drop path follows from; None: from torch's generator.
        """
        with drop_path_keys(self.encoder, keys):
            if hidden is None and self._alone:
                return class_token(self.encoder, images), None
            shown = {"mask": hidden.mask, "mask_token": self.mask_token} if hidden and mask else {}
            tokens = self.encoder(images, **shown)
        patches = tokens.patches.flatten(0, 1)[hidden.places] if hidden else None
        return self.encoder.pool(tokens, self._pool), patches

    def patch_logits(self, patches: Tensor) -> Tensor:
        """Patches [m d] -> logits [m k]."""
        return (self.patch_head or self.head)(patches)  # type: ignore[no-any-return]


class DINO(nn.Module):
    """A student that learns from a slowly moving teacher, both with the same encoder and heads.

    Args:
        encoder: the student's; the teacher is a copy without drop path.
        head: projection head of class tokens.
        ibot: loss on hidden patches; None: none.
        koleo_weight: of KoLeo on the student's class tokens, for each global view; 0: none.
        targets: how the teacher's logits become targets.
        student_temp: temperature of the student.
        center_momentum: share of the old centre that an update keeps.

    Raises:
        TaskError: settings that cannot work, or iBOT with an encoder that cannot hide patches.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: HeadConfig,
        ibot: IBOTConfig | None = None,
        koleo_weight: float = 0.0,
        targets: Targets = "centering",
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0 <= center_momentum < 1:  # at 1 the centre would never move
            raise TaskError(f"center_momentum must be at least 0 and below 1, not {center_momentum:g}")
        if student_temp <= 0:
            raise TaskError(f"student_temp must be above 0, not {student_temp:g}")
        if koleo_weight < 0:
            raise TaskError(f"koleo_weight cannot be negative, but is {koleo_weight:g}")
        if ibot is not None:
            ibot.check()
            if not encoder.maskable:
                raise TaskError(
                    f"iBOT hides patches, which {encoder.config.arch} cannot: take a plain ViT (vit_small, "
                    "timm:vit_...), or leave `ibot` out"
                )
        self.ibot, self.koleo_weight = ibot, koleo_weight
        self.student = Branch(encoder, head, ibot)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for part in self.teacher.modules():
            if isinstance(part, DINOHead):
                part.exact_logits = True
        self.dino_loss, self.ibot_loss, self.koleo_loss = DINOLoss(student_temp), IBOTLoss(student_temp), KoLeoLoss()
        patch_prototypes = (ibot.head or head).prototypes if ibot else 0
        self.dino_targets = _targets(targets, head.prototypes, center_momentum)
        self.ibot_targets = _targets(targets, patch_prototypes, center_momentum) if ibot else None
        self._observed: dict[str, Tensor] = {}
        self.init_weights()
        self.train()

    def init_weights(self) -> None:
        """Fills every parameter anew as the authors do, also after `to_empty`; timm's encoders stay as built."""
        init_encoder(self.student.encoder)
        for head in (self.student.head, self.student.patch_head):
            if head is not None:
                head.init_weights()
        if self.student.mask_token is not None:
            nn.init.zeros_(self.student.mask_token)
        for targets in (self.dino_targets, self.ibot_targets):
            if isinstance(targets, Centering):
                targets.center.zero_()
        self.copy_student()

    def copy_student(self) -> None:
        """Makes the teacher an exact copy of the student, buffers too."""
        self.teacher.load_state_dict(self.student.state_dict())

    def train(self, mode: bool = True) -> Self:
        """The teacher never drops anything, but its BatchNorm goes by the batch, as the authors' does."""
        super().train(mode)
        for part in self.teacher.modules():
            part.training = mode and isinstance(part, _BatchNorm)
        return self

    def forward(
        self, global_views: Tensor, local_views: Tensor | None, teacher_temp: float, hidden: Hidden | None = None,
        keys: Tensor | None = None,
    ) -> DINOOutput:  # fmt: skip
        """Loss of one micro-batch. Collective with Sinkhorn-Knopp targets, which all ranks normalise together.

        Args:
            global_views: normalised, [g b c h w], at least two.
            local_views: normalised, [l b c h' w'], or None.
            teacher_temp: temperature of the teacher.
            hidden: the patches of the global views to hide, needed with iBOT.
            keys: int64 [b], what the student's drop path follows from; None: from torch's generator.
        """
        if (hidden is None) != (self.ibot is None):
            raise TypeError("hidden patches are given exactly when ibot is on")
        g, b = global_views.shape[:2]
        of_global = of_local = None
        if keys is not None:
            drawn = view_keys(keys, g + (0 if local_views is None else len(local_views)))
            of_global, of_local = drawn[:g].flatten(), drawn[g:].flatten()
        images = global_views.flatten(0, 1)
        with torch.no_grad():
            features, seen = self.teacher(images, hidden)
            logits = self.teacher.head(features)
            statistics = self._statistics("dino", self.dino_targets, logits)
            targets = self.dino_targets(logits, teacher_temp).view(g, b, -1)  # in the logits' place
            of_patches = None
            if self.ibot_targets is not None:  # now, while the student keeps nothing yet
                logits = self.teacher.patch_logits(seen)
                statistics |= self._statistics("ibot", self.ibot_targets, logits)
                of_patches = self.ibot_targets(logits, teacher_temp)
            del logits
        tokens, guessed = self.student(images, hidden, mask=True, keys=of_global)
        rows = [tokens]
        if local_views is not None:
            rows.append(self.student(local_views.flatten(0, 1), keys=of_local)[0])
        loss = self.dino_loss(self.student.head(torch.cat(rows)).unflatten(0, (-1, b)), targets)
        parts = {"dino": loss.detach()}
        health = dino_health(targets, loss, features[:b])
        if isinstance(self.dino_targets, Centering):
            health["center_norm"] = self.dino_targets.center.norm()
        if self.koleo_weight:
            koleo = torch.stack([self.koleo_loss(view) for view in tokens.unflatten(0, (g, b))]).sum()
            parts["koleo"], loss = koleo.detach(), loss + self.koleo_weight * koleo
        if self.ibot is not None and hidden is not None and of_patches is not None:
            health |= ibot_health(of_patches)
            if isinstance(self.ibot_targets, Centering):
                health["ibot_center_norm"] = self.ibot_targets.center.norm()
            logits = self.student.patch_logits(guessed)
            ibot = self.ibot_loss(logits, of_patches, hidden.weight(of_patches.dtype), g * b)
            parts["ibot"], loss = ibot.detach(), loss + self.ibot.weight * ibot
        return DINOOutput(loss, parts, health, statistics)

    def observe(self, output: DINOOutput) -> None:
        """Remembers what the next `update_centers` needs of a micro-batch."""
        for name, statistics in output.statistics.items():
            self._observed[name] = self._observed[name] + statistics if name in self._observed else statistics

    def forget(self) -> None:
        """Lets go of what `observe` remembered."""
        self._observed.clear()

    def update_centers(self) -> None:
        """Collective: moves the centres by all that was observed on all ranks since the last time."""
        for name, targets in (("dino", self.dino_targets), ("ibot", self.ibot_targets)):
            if isinstance(targets, Centering) and name in self._observed:
                targets.update(self._observed.pop(name))

    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher towards the student; not collective."""
        update_ema(self.teacher, self.student, momentum)

    @staticmethod
    def _statistics(name: str, targets: nn.Module, logits: Tensor) -> dict[str, Tensor]:
        return {name: targets.statistics(logits)} if isinstance(targets, Centering) else {}


def _targets(kind: Targets, prototypes: int, momentum: float) -> nn.Module:
    return Centering(prototypes, momentum) if kind == "centering" else SinkhornKnopp()


@torch.no_grad()
def init_encoder(encoder: Encoder) -> None:
    """Fills an encoder as DINO's authors do (truncated normal 0.02, a plain convolution); timm's stay as built."""
    if encoder.config.timm_name is not None:
        return
    encoder.init_weights()
    for part in encoder.trunk.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
    encoder.trunk.patch_embed.proj.reset_parameters()
    if encoder.trunk.cls_token is not None:
        nn.init.trunc_normal_(encoder.trunk.cls_token, std=0.02)
