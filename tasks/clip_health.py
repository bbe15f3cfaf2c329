"""Numbers that tell whether two towers learn to agree, as detached scalars; `evaluation` puts them into words.

Axes: b = pairs on this rank, m = pairs looked at, e = joint width.
"""

import math

import torch
from torch import Tensor

PAIRS = 256  # looked at; the logits of the loss cost more


@torch.no_grad()
def clip_health(image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Health of the first PAIRS pairs of a rank.

    alignment: mean squared distance of an image and its text (Wang and Isola 2020, arXiv:2005.10242, eq. 1), 0 to 4:
        2 if they have nothing to do with each other.
    uniformity: log of the mean of exp(-2 squared distance) over two images, and over two texts, mean of both (eq. 2):
        0 if all are the same, about -4 if they are spread evenly over the sphere.
    modality_gap: distance between the mean image and the mean text (Liang et al. 2022, arXiv:2203.02053, eq. 1).
    positive_similarity: mean cosine of an image and its text.
    hardest_negative: mean over images of the largest cosine with another text (among those looked at; a text that
        reads the same counts as another).

    Where a rank has one pair only, uniformity and hardest_negative, which need another, are left out.

    Args:
        image: of length 1, [b e].
        text: likewise, row i belongs to image i.
    """
    image, text = image[:PAIRS].float(), text[:PAIRS].float()
    cosines = image @ text.T
    positive = cosines.diagonal().mean()
    m = len(image)
    gap = (image.mean(dim=0) - text.mean(dim=0)).norm()
    health = {"alignment": 2 - 2 * positive, "modality_gap": gap, "positive_similarity": positive}
    if m < 2:
        return health
    others = torch.eye(m, dtype=torch.bool, device=image.device)
    hardest = cosines.masked_fill(others, -1).amax(dim=1).mean()
    spreads = [((x @ x.T - 1) * 4).masked_fill(others, -torch.inf).flatten().logsumexp(0) for x in (image, text)]
    return health | {
        "uniformity": torch.stack(spreads).mean() - math.log(m * (m - 1)),
        "hardest_negative": hardest,
    }
