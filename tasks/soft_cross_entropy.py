"""Cross-entropy with soft targets over many prototypes, whose memory is the logits and their gradient, nothing more.

Axes: v = views, b = rows of a view (images, or hidden patches), k = prototypes.

Written out naively, 65,536 prototypes are stored about five times over in float32 (cast, scaled, log-softmax, product
with each target, gradient). Here each block of rows passes through float32 once, and leaves only its gradient, in the
logits' own precision. The loss is linear in the target, so targets of several teacher views are added up beforehand.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**24  # numbers of a block of rows: 64 MiB in float32


def blocks_of_rows(matrix: Tensor) -> Sequence[Tensor]:
    """Views of some rows each of a matrix [r k], so that what is made of one at a time stays small."""
    return torch.split(matrix, _rows_at_once(matrix.shape[-1]))


def _rows_at_once(width: int) -> int:
    return max(1, BLOCK // width)


def soft_cross_entropy(
    logits: Tensor, targets: Sequence[Tensor], masses: Sequence[float], temp: float, weight: Tensor
) -> Tensor:
    """Sum over views and rows of weight_b * cross-entropy(target_vb, softmax(logits_vb / temp)), in float32 or better.

    Args:
        logits: [v b k]; the gradient flows to them only.
        targets: v tensors [b k], not negative; views may share one.
        masses: what each row of a target adds up to: how many teachers were added.
        temp: temperature of the logits.
        weight: [b].
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _SoftCrossEntropy.apply(logits, targets, masses, temp, weight)  # type: ignore[no-any-return]


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Sequence[Tensor], masses: Sequence[float], temp: float, weight: Tensor
    ) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weight = weight.to(dtype)
        keep = ctx.needs_input_grad[0]
        # weight / temp is applied in the backward pass, after a gradient scaler: float16 would lose such small numbers
        ctx.gradient = torch.empty_like(logits) if keep else None
        ctx.factor = (weight / temp)[:, None]
        loss = torch.zeros((), dtype=dtype, device=logits.device)
        rows = _rows_at_once(logits.shape[-1])
        for v, (target, mass) in enumerate(zip(targets, masses, strict=True)):
            for start in range(0, logits.shape[1], rows):
                part = slice(start, start + rows)
                goal = target[part].to(dtype)
                log_probs = torch.log_softmax(logits[v, part].to(dtype) / temp, dim=-1)
                loss -= weight[part] @ torch.linalg.vecdot(goal, log_probs)
                if keep:
                    ctx.gradient[v, part] = log_probs.exp_().mul_(mass).sub_(goal)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of soft_cross_entropy was spent by an earlier backward pass")
        return gradient.mul_(ctx.factor * grad), None, None, None, None
