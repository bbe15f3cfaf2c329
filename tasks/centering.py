"""Centred and sharpened teacher targets (Caron et al. 2021, arXiv:2104.14294, section 3.1, eq. 4).

Axes: r = rows (views and images, or hidden patches), k = prototypes.
"""

import torch
from torch import Tensor, nn

from tasks.collectives import sum_over_ranks_
from tasks.soft_cross_entropy import blocks_of_rows


class Centering(nn.Module):
    """Softmax of the teacher's logits around a running mean of them, which keeps one prototype from winning everything.

    Args:
        prototypes: k.
        momentum: share of the old centre that an update keeps.
    """

    center: Tensor  # [1 k]

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float) -> Tensor:
        """Teacher logits [... k] -> targets [... k], in float32 or better; the centre stays as it is.

        Logits of that precision become the targets, in place: there may be a gigabyte of them.
        """
        targets = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
        for rows in blocks_of_rows(targets.view(-1, targets.shape[-1])):
            rows.sub_(self.center.to(rows.dtype)).div_(temp)
            rows.copy_(torch.softmax(rows, dim=-1))
        return targets

    @torch.no_grad()
    def statistics(self, logits: Tensor) -> Tensor:
        """What an update needs of logits [r k]: their sum and r, side by side [k+1]; micro-batches add up."""
        total = logits.sum(dim=0, dtype=torch.promote_types(logits.dtype, torch.float32))
        return torch.cat([total, total.new_full((1,), len(logits))])

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """Collective: moves the centre towards the mean over the rows of all ranks and micro-batches.

        The mean is over rows and not over ranks (DINOv2's iBOT averages ranks), so it is the same on any number of
        ranks. Without rows, or with rows that are not finite, the centre stays.

        Args:
            statistics: [k+1], the sum of `statistics` over the micro-batches of this rank; changed in place.
        """
        statistics = sum_over_ranks_(statistics)
        mean = statistics[:-1] / statistics[-1]
        moved = torch.lerp(mean[None].to(self.center.dtype), self.center, self.momentum)
        self.center.copy_(torch.where(mean.isfinite().all(), moved, self.center))  # no branch: a GPU need not wait
