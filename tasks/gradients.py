"""Gradients between the backward pass and the optimiser's step: clipping by parts, and steps that must not happen."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from tasks.sharding import local, rows


class Measured(NamedTuple):
    """Parameters that have a gradient, and how long each one is."""

    parameters: list[Parameter]
    norms: Tensor  # [n]


def measure_gradients(parameters: Iterable[Parameter]) -> Measured:
    """Lengths of the gradients that there are; collective where they are sharded."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    return Measured(trained, gradient_norms([p.grad for p in trained if p.grad is not None]))


@torch.no_grad()
def clip_gradients(groups: Iterable[Sequence[Parameter]], limit: float, measured: Measured | None = None) -> Tensor:
    """Shrinks the gradient of every group of parameters to at most `limit` in length; returns the lengths before.

    With one parameter per group this is DINO's clipping, with one module per group DINOv2's. Parameters without a
    gradient are passed over, and groups without any have no entry in the result. Nothing waits for the device.
    Collective where gradients are sharded.

    Args:
        groups: parameters that are clipped together.
        limit: largest length; 0 or less: only measure.
        measured: of all these parameters, if that is known; None: it is found out.
    """
    clipped = [group for group in ([p for p in group if p.grad is not None] for group in groups) if group]
    flat = [parameter for group in clipped for parameter in group]
    if not flat:
        return torch.zeros(0)
    measured = measured or measure_gradients(flat)
    norms = dict(zip(measured.parameters, measured.norms.unbind(), strict=True))
    lengths = [[norms[parameter] for parameter in group] for group in clipped]
    total = torch.stack([each[0] if len(each) == 1 else torch.stack(each).norm() for each in lengths])
    if limit > 0:
        factor = (limit / (total + 1e-6)).clamp(max=1)
        factors = [f for f, group in zip(factor.unbind(), clipped, strict=True) for _ in group]
        torch._foreach_mul_([local(parameter.grad) for parameter in flat if parameter.grad is not None], factors)
    return total


@torch.no_grad()
def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Lengths of gradients [n]; collective where any is sharded: a length is that of all its rows."""
    if not gradients:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
    whole = [rows(gradient) is None for gradient in gradients]
    if all(whole):
        return norms
    squares = norms.double() ** 2  # of float32 no square overflows
    kept = torch.tensor(whole, device=norms.device)
    ours = squares.masked_fill(kept, 0)
    dist.all_reduce(ours)
    return torch.where(kept, squares, ours).sqrt().to(norms.dtype)


def skip_step_unless_finite(optimizer: Optimizer, norms: Tensor) -> bool:
    """Makes the next step of the optimiser do nothing if a gradient is NaN or infinite.

    A fused optimiser looks at `found_inf` on the device, so nothing waits; from others the gradients are taken away.

    Returns:
        Whether the step is known not to happen; of a fused optimiser's only the device knows.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    bad = ~norms.isfinite().all()
    if inner.defaults.get("fused"):
        inner.found_inf = bad.float()
        return False
    if not bad:
        return False
    for group in inner.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    return True
