"""How many directions features use (RankMe, Garrido et al. 2023, arXiv:2210.02885).

Axes: n = images, d = channels of a feature vector.
"""

import torch
from torch import Tensor

EPSILON = 1e-7  # the paper's, for float32


def rankme(features: Tensor) -> float:
    """Effective rank of features [n d], a smooth count of the directions they use (eq. 1 and 2).

    1 if they all lie on one line through the origin (collapsed), min(n, d) if every direction is used alike. It can be
    compared between encoders of one width on the same images, not beyond. NaN for features that are not finite.
    """
    features = features.detach().cpu().double()
    if not features.isfinite().all():
        return float("nan")
    values = torch.linalg.svdvals(features)
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + EPSILON
    return float(torch.special.entr(share).sum().exp())
