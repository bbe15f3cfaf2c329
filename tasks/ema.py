"""The teacher is the student's running mean: how it moves."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for all parameters, frozen ones too; buffers stay.

    Not collective: ranks hold the same parameters, or, where they are sharded, the same shards of both.

    Args:
        teacher: a module with the parameters of `student`, in its order.
        student: what the teacher follows.
        momentum: share of the teacher that stays.
    """
    torch._foreach_lerp_(_local(teacher), _local(student), 1 - momentum)


def _local(module: nn.Module) -> list[Tensor]:
    return [p.to_local() if isinstance(p, DTensor) else p.data for p in module.parameters()]
