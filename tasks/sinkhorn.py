"""Teacher targets by Sinkhorn-Knopp (Cuturi 2013, arXiv:1306.0895; SwAV, arXiv:2006.09882, section 3.1; DINOv2).

Axes: r = rows of this rank (views and images, or hidden patches), k = prototypes.
"""

import torch
from torch import Tensor, nn

from tasks.collectives import max_over_ranks_, sum_over_ranks_
from tasks.soft_cross_entropy import blocks_of_rows


class SinkhornKnopp(nn.Module):
    """Targets whose prototypes are used about equally often by the rows of all ranks together. It has no state.

    Args:
        iterations: rounds of normalising prototypes, then rows; at least 1.
    """

    def __init__(self, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float) -> Tensor:
        """Collective: teacher logits [... k] -> targets [... k], float32; ranks may hold different numbers of rows.

        Factors that all rows share (number of rows, number of prototypes, total mass) cancel and are left out. Logits
        in float32 become the targets, in place.
        """
        with torch.autocast(logits.device.type, enabled=False):
            matrix = _first_round(logits.float().contiguous().view(-1, logits.shape[-1]).div_(temp))
            # The result is diag(rows) matrix diag(columns): only two vectors change, by matrix-vector products.
            rows, columns = matrix.new_ones(len(matrix)), matrix.new_ones(matrix.shape[1])
            tiny = torch.finfo(torch.float32).tiny  # of a prototype that no row comes near
            for _ in range(self.iterations - 1):
                mass = sum_over_ranks_(matrix.T @ rows)
                columns = (mass / mass.mean()).clamp_(min=tiny).reciprocal_()  # relative, so that rows do not drift
                rows = (matrix @ columns).reciprocal_()
            return matrix.mul_(rows[:, None]).mul_(columns).view(logits.shape)


def _first_round(scaled: Tensor) -> Tensor:
    """exp(scaled [r k]) after one round, in place; by logarithms, since nothing bounds the exponents before."""
    largest = scaled.amax(dim=0) if len(scaled) else scaled.new_full(scaled.shape[1:], -torch.inf)
    largest = max_over_ranks_(largest)
    columns = torch.zeros_like(largest)
    for rows in blocks_of_rows(scaled):
        columns += (rows - largest).exp_().sum(dim=0)
    columns = sum_over_ranks_(columns).log_().add_(largest)
    for rows in blocks_of_rows(scaled):
        rows.sub_(columns)
        rows.sub_(rows.logsumexp(dim=1, keepdim=True)).exp_()
    return scaled
