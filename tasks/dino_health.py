"""Numbers that tell whether DINO learns, detached; `evaluation` puts them into words.

Axes: t = teacher views, b = images on this rank, m = hidden patches, k = prototypes, d = width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ENOUGH = 256
"""Hidden patches that are looked at, or up to twice as many: all of a large batch would cost what the loss does."""


@torch.no_grad()
def dino_health(targets: Tensor, loss: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Health of one micro-batch on this rank.

    teacher_entropy: mean entropy of a target, in nats: 0 if one prototype gets everything, ln(k) if all get the same.
    kl: mean divergence of the student from the teacher, in nats: what is left to learn; 0 in either collapse.
    prototypes_used: exp(entropy of the mean target): 1 if all images share one prototype, up to k.
    feature_std: root of the total variance over images of the features at length 1: 0 if all point the same way, 1 if
        they point in all directions.
    micro_batch: b. Of few images the last two say little, and of one nothing.

    Args:
        targets: [t b k], rows sum to 1.
        loss: DINO's loss, the mean cross-entropy from targets to students.
        features: the teacher's, of one view of each image [b d].
    """
    entropy, used = _entropy_and_use(targets.flatten(0, 1))
    spread = F.normalize(features.float(), dim=-1).var(dim=0, correction=0).sum().sqrt()
    return {
        "teacher_entropy": entropy, "kl": loss.detach() - entropy, "prototypes_used": used, "feature_std": spread,
        "micro_batch": torch.tensor(float(len(features))),
    }  # fmt: skip


@torch.no_grad()
def ibot_health(targets: Tensor) -> dict[str, Tensor]:
    """teacher_entropy and prototypes_used, as of class tokens, of the patches' targets.

    Each as [value, 1], or [0, 0] where no patch is hidden: numerator and denominator of a mean over micro-batches.

    Args:
        targets: [m k], rows sum to 1.
    """
    names = ("ibot_teacher_entropy", "ibot_prototypes_used")
    if not len(targets):
        return dict.fromkeys(names, targets.new_zeros(2))
    found = _entropy_and_use(targets[:: max(1, len(targets) // ENOUGH)])
    return {name: torch.stack([value, torch.ones_like(value)]) for name, value in zip(names, found, strict=True)}


def _entropy_and_use(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of targets in rows: their mean entropy, and exp(entropy of their mean)."""
    entropy = torch.special.entr(targets).sum(dim=-1).mean()
    return entropy, torch.special.entr(targets.mean(dim=0)).sum().exp()
