"""Gradients between the backward pass and the optimiser's step: clipping by parts, and steps that must not happen."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tasks.sharding import local, rows


@torch.no_grad()
def clip_gradients(groups: Iterable[Sequence[Parameter]], limit: float) -> Tensor:
    """Shrinks the gradient of every group of parameters to at most `limit` in length; returns the lengths before.

    With one parameter per group this is DINO's clipping, with one module per group DINOv2's. Parameters without a
    gradient are passed over, and groups without any have no entry in the result. Nothing waits for the device.
    Collective where gradients are sharded.

    Args:
        groups: parameters that are clipped together.
        limit: largest length; 0 or less: only measure.
    """
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    gradients = [group for group in gradients if group]
    if not gradients:
        return torch.zeros(0)
    flat = [gradient for group in gradients for gradient in group]
    norms = gradient_norms(flat).split([len(group) for group in gradients])  # type: ignore[no-untyped-call]
    total = torch.stack([norm[0] if len(norm) == 1 else norm.norm() for norm in norms])
    if limit > 0:
        factor = (limit / (total + 1e-6)).clamp(max=1)
        factors = [f for f, group in zip(factor.unbind(), gradients, strict=True) for _ in group]
        torch._foreach_mul_([local(gradient) for gradient in flat], factors)
    return total


@torch.no_grad()
def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Lengths of gradients [n]; collective where any is sharded: a length is that of all its rows."""
    norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
    whole = [rows(gradient) is None for gradient in gradients]
    if all(whole):
        return norms
    squares = norms.double() ** 2  # of float32 no square overflows
    kept = torch.tensor(whole, device=norms.device)
    ours = squares.masked_fill(kept, 0)
    dist.all_reduce(ours)
    return torch.where(kept, squares, ours).sqrt().to(norms.dtype)


def skip_step_unless_finite(optimizer: Optimizer, norms: Tensor) -> None:
    """Makes the next step of the optimiser do nothing if a gradient is NaN or infinite.

    A fused optimiser looks at `found_inf` on the device, so nothing waits; from others the gradients are taken away.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    bad = ~norms.isfinite().all()
    if inner.defaults.get("fused"):
        inner.found_inf = bad.float()
    elif bad:
        for group in inner.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
