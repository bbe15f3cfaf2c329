"""Numbers that tell whether DINO learns, as detached scalars; `evaluation` puts them into words.

Axes: t = teacher views, b = images on this rank, k = prototypes, d = width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def dino_health(targets: Tensor, loss: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Health of one micro-batch on this rank.

    teacher_entropy: mean entropy of a target, in nats: 0 if one prototype gets everything, ln(k) if all get the same.
    kl: mean divergence of the student from the teacher, in nats: what is left to learn; 0 in either collapse.
    prototypes_used: exp(entropy of the mean target): 1 if all images share one prototype, up to k.
    feature_std: root of the total variance over images of the features at length 1: 0 if all point the same way, 1 if
        they point in all directions.

    Args:
        targets: [t b k], rows sum to 1.
        loss: DINO's loss, the mean cross-entropy from targets to students.
        features: the teacher's, of one view of each image [b d].
    """
    entropy = torch.special.entr(targets).sum(dim=-1).mean()
    used = torch.special.entr(targets.mean(dim=(0, 1))).sum().exp()
    spread = F.normalize(features.float(), dim=-1).var(dim=0, correction=0).sum().sqrt()
    return {"teacher_entropy": entropy, "kl": loss.detach() - entropy, "prototypes_used": used, "feature_std": spread}
