"""iBOT loss: the student guesses what the teacher says of hidden patches (Zhou et al. 2022, arXiv:2111.07832, eq. 2).

Axes: m = hidden patches of all images and views of this rank, k = prototypes.
"""

from torch import Tensor, nn

from tasks.soft_cross_entropy import soft_cross_entropy


class IBOTLoss(nn.Module):
    """Mean over images of the mean cross-entropy over an image's hidden patches; images without count as 0.

    Args:
        student_temp: temperature of the student.
    """

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        self.student_temp = student_temp

    def forward(self, student: Tensor, targets: Tensor, weight: Tensor, images: int) -> Tensor:
        """Student logits and teacher targets of hidden patches [m k] -> scalar, float32 or better.

        Args:
            student: logits.
            targets: rows sum to 1.
            weight: [m], 1 / (hidden patches of the same image).
            images: how many images (times views) there were, those without hidden patches too.
        """
        return soft_cross_entropy(student[None], [targets], [1.0], self.student_temp, weight) / images
