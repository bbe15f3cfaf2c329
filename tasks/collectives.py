"""Sums over ranks that do nothing where there is one process, so that losses need not ask."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among the ranks; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """Collective: the sum over all ranks, in place, without a gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks_(tensor: Tensor) -> Tensor:
    """Collective: the largest over all ranks, in place, without a gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor
