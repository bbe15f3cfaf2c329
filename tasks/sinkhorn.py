"""Teacher targets by Sinkhorn-Knopp (Cuturi 2013, arXiv:1306.0895; SwAV, arXiv:2006.09882, section 3.1; DINOv2).

Axes: r = rows of this rank (views and images, or hidden patches), k = prototypes.
"""

import torch
from torch import Tensor, nn

from tasks.collectives import max_over_ranks_, sum_over_ranks_


class SinkhornKnopp(nn.Module):
    """Targets whose prototypes are used about equally often by the rows of all ranks together. It has no state.

    Args:
        iterations: rounds of normalising prototypes, then rows.
    """

    def __init__(self, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float) -> Tensor:
        """Collective: teacher logits [... k] -> targets [... k], float32; ranks may hold different numbers of rows.

        With M = exp(logits / temp) the result is diag(a) M diag(c): only the vectors a [r] and c [k] are iterated, by
        matrix-vector products. Every row of M is divided by its largest entry, which a brings back, so that nothing
        overflows. Factors that all rows share (number of rows, number of prototypes, total mass) cancel and are left
        out.
        """
        with torch.autocast(logits.device.type, enabled=False):
            return self._assign(logits, temp)

    def _assign(self, logits: Tensor, temp: float) -> Tensor:
        scaled = logits.flatten(0, -2).float() / temp
        largest = scaled.amax(dim=1, keepdim=True)
        matrix = scaled.sub_(largest).exp_()
        top = largest.max() if len(largest) else largest.new_tensor(-torch.inf)  # a rank may have no hidden patch
        rows = (largest[:, 0] - max_over_ranks_(top)).exp_()
        tiny = torch.finfo(torch.float32).tiny  # a prototype that no row comes near
        columns = rows.new_empty(0)
        for _ in range(self.iterations):
            columns = sum_over_ranks_(matrix.T @ rows).clamp_(min=tiny).reciprocal_()
            rows = (matrix @ columns).reciprocal_()
        return matrix.mul_(rows[:, None]).mul_(columns).view(logits.shape)
