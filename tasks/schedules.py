"""What changes over a run, as pure functions of the optimiser step."""

import math

from torch.optim import Optimizer


def warmup_cosine(step: int, total: int, warmup: float, peak: float, floor: float = 0.0) -> float:
    """Linear warm-up from 0, then half a cosine from `peak` to `floor` (SGDR, arXiv:1608.03983, eq. 5).

    As in MAE the first step has rate 0 when there is a warm-up, and `floor` would be reached one step after the last.

    Args:
        step: optimiser steps done so far.
        total: optimiser steps of the run.
        warmup: steps until `peak`, may be fractional, less than `total`.
        peak: largest value.
        floor: value at the end.
    """
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / (total - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Gives every parameter group its rate: `rate`, times the group's lr_scale where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
