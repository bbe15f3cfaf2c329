"""Parameters, gradients and optimiser state spread over the ranks: FSDP2 (`fully_shard`, arXiv:2304.11277).

A sharded parameter is a DTensor: every rank holds some of its rows (along the first axis), in the order of ranks, as
torch.chunk cuts them. The gradients and the optimiser's averages are cut alike, so that a step needs no communication.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.modules.batchnorm import _BatchNorm


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    heads: Iterable[nn.Module],
    mesh: DeviceMesh,
    low: torch.dtype | None = None,
) -> None:
    """Shards each block and head by itself, and what is left of the model together, in place.

    A block's parameters are gathered when it is called and freed behind it, forwards and backwards; those outside of
    blocks and heads stay for the whole pass. With `low`, blocks are gathered in that precision and compute in it, their
    sums included, which autocast alone would keep in float32; the rest stays as it is, since logits and positions are
    sensitive, and gradients are added up in float32. A scalar (a temperature) cannot be cut: every rank keeps it, and
    `average_scalars` its gradient.

    Args:
        model: all of whose work begins in its `forward`; it may be on the meta device.
        blocks, heads: parts of it that are called as modules.
        mesh: one axis, the ranks.
        low: the 16 bits in which blocks compute; None: as all others do.
    """
    scalars = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                everywhere = DTensor.from_local(parameter.detach(), mesh, [Replicate()], run_check=False)
                setattr(module, name, nn.Parameter(everywhere, parameter.requires_grad))
                scalars.add(getattr(module, name))
    reduce = None if low is None else torch.float32
    rounded, exact = (MixedPrecisionPolicy(dtype, reduce, cast_forward_inputs=bool(dtype)) for dtype in (low, None))
    for block in blocks:
        normed = any(isinstance(part, _BatchNorm) for part in block.modules())  # its statistics are float32
        fully_shard(block, mesh=mesh, mp_policy=exact if normed else rounded, ignored_params=scalars)
    for head in heads:
        fully_shard(head, mesh=mesh, mp_policy=exact, ignored_params=scalars)
    fully_shard(model, mesh=mesh, mp_policy=exact, ignored_params=scalars)


def is_sharded(module: nn.Module) -> bool:
    """Whether a rank holds a part of the module only."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows(tensor: Tensor) -> slice | None:
    """The rows that this rank holds of a sharded tensor; None for one that it has whole."""
    if not isinstance(tensor, DTensor) or not isinstance(tensor.placements[0], Shard):
        return None
    count, ranks = tensor.shape[0], tensor.device_mesh.size()
    each = -(-count // ranks)
    start = min(tensor.device_mesh.get_local_rank() * each, count)
    return slice(start, min(start + each, count))


class Rows(Protocol):
    """What can be asked for some rows: a tensor, or one that lies in files."""

    def __getitem__(self, wanted: Any, /) -> Tensor:
        """The rows of a slice."""


@torch.no_grad()
def fill(tensor: Tensor, whole: Rows) -> None:
    """tensor <- whole, of the same shape: this rank's rows of it where it is sharded; not collective."""
    mine = rows(tensor)
    local(tensor).copy_(whole[...] if mine is None else whole[mine])


def average_scalars(model: nn.Module) -> None:
    """Collective: the gradients of what every rank keeps become their mean over the ranks, as `fully_shard`'s do.

    After each backward pass; what was averaged before stays as it is, so gradients may accumulate.
    """
    for parameter in model.parameters():
        if parameter.grad is not None and isinstance(parameter, DTensor) and rows(parameter) is None:
            gradient = local(parameter.grad)
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Collective: within it, parts of the model may be called that are neither blocks nor heads nor the whole."""
    root: Any = model if isinstance(model, FSDPModule) else None
    if root is not None:
        root.unshard()
    try:
        yield
    finally:
        if root is not None:
            root.reshard()


def materialize(model: nn.Module, whole: dict[str, Tensor] | None, device: torch.device) -> None:
    """Collective: gives a sharded model on the meta device the weights and buffers that the first rank has.

    So one rank alone builds the model in full, on the host, and nobody has more than one full tensor at a time on the
    device.

    Args:
        model: sharded, on the meta device.
        whole: on the first rank all parameters and buffers by name, as `everything` gives them; elsewhere None.
        device: where the shards will be.
    """
    model.to_empty(device=device)
    for name, tensor in everything(model).items():
        given = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if whole is not None:
            given.copy_(whole.pop(name))
        dist.broadcast(given, src=0)
        fill(tensor, given)


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that no checkpoint holds."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
