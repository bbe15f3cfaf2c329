"""KoLeo: features of different images keep a distance (Sablayrolles et al. 2019, arXiv:1806.03198, eq. 2; DINOv2).

Axes: b = images of this rank, d = width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.errors import TaskError


class KoLeoLoss(nn.Module):
    """Minus the mean logarithm of the distance to the nearest neighbour on the unit sphere (Kozachenko-Leonenko).

    It sees one micro-batch of one rank: more accumulation would change it, so a task refuses that.

    Args:
        eps: added to every component of a difference and to every distance.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """Class tokens [b d] of one view of each image -> scalar, float32 or better; TaskError for a single image."""
        if len(features) < 2:
            raise TaskError("KoLeo needs at least 2 images on a device: raise the batch, or set koleo_weight to 0")
        with torch.autocast(features.device.type, enabled=False):
            x = features.to(torch.promote_types(features.dtype, torch.float32))
            x = F.normalize(x, eps=self.eps, dim=-1)
            with torch.no_grad():
                nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
            distance = F.pairwise_distance(x, x[nearest], eps=self.eps)
            return -(distance + self.eps).log().mean()
