"""DINO loss: cross-entropy from the teacher's targets to the student (Caron et al. 2021, arXiv:2104.14294, Alg. 1).

Axes: s = student views (those that the teacher saw come first), t = teacher views, b = images on this rank,
k = prototypes.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from tasks.soft_cross_entropy import soft_cross_entropy


class DINOLoss(nn.Module):
    """Mean cross-entropy over all pairs of a teacher view and another student view.

    Args:
        student_temp: temperature of the student.
    """

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        self.student_temp = student_temp

    def forward(self, student: Tensor, targets: Tensor, own: int | None = None) -> Tensor:
        """Student logits [s b k], teacher targets [t b k] (rows sum to 1) -> scalar, float32 or better.

        Args:
            student: logits.
            targets: from `Centering` or `SinkhornKnopp`.
            own: how many of the first student views are those of the teacher, in its order; a view never teaches
                itself. None: all t.
        """
        t, s, b = len(targets), len(student), student.shape[1]
        own = t if own is None else own
        with torch.no_grad():
            everyone = targets.sum(dim=0) if s > own else None
            none = [torch.zeros_like(targets[0])] if t == 1 else []  # a lone teacher has nothing to say to its own view
            others = [reduce(torch.add, none or [targets[j] for j in range(t) if j != i]) for i in range(own)]
        goals = [others[i] if i < own else everyone for i in range(s)]
        masses = [float(t - (i < own)) for i in range(s)]
        weight = torch.full((b,), 1 / (sum(masses) * b), dtype=targets.dtype, device=student.device)
        return soft_cross_entropy(student, goals, masses, self.student_temp, weight)  # type: ignore[arg-type]
