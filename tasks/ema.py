"""The teacher is the student's running mean: how it moves."""

import torch
from torch import nn

from tasks.sharding import local


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for all parameters, frozen ones too; buffers stay.

    Not collective: ranks hold the same parameters, or, where they are sharded, the same shards of both.

    Args:
        teacher: a module with the parameters of `student`, in its order.
        student: what the teacher follows.
        momentum: share of the teacher that stays.
    """
    moved, towards = ([local(p.detach()) for p in module.parameters()] for module in (teacher, student))
    torch._foreach_lerp_(moved, towards, 1 - momentum)
