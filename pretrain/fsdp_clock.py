"""How long a rank of a sharded model waits for others: for weights that are gathered and gradients that are added up.

FSDP2 has no clock of its own as DDP has. Its groups of parameters do all of it in a few of their functions, which tell
ours when they begin and end. On a CPU these do the communication itself; an accelerator has streams of its own for it,
and what its computing queue spends between begin and end is the waiting for them, with some copying.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from pretrain.phases import COMMUNICATION, PhaseTimer

ON_CPU, ON_DEVICE = ("unshard", "post_backward"), ("wait_for_unshard", "post_backward")


def time_communication(model: nn.Module, phases: PhaseTimer, device: torch.device) -> bool:
    """Make the waiting of a sharded model a phase of its own; whether that is possible here.

    The functions are no part of torch's interface: a version that has others goes without.
    """
    groups, parts = list(_groups(model)), ON_CPU if device.type == "cpu" else ON_DEVICE
    if not groups or not all(hasattr(group, part) for group in groups for part in parts):
        return False
    for group in groups:
        for part in parts:
            setattr(group, part, _timed(getattr(group, part), phases))
    return True


def _groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            found = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            yield from (group for group in found if group is not None)


def _timed(function: Callable[..., Any], phases: PhaseTimer) -> Callable[..., Any]:
    @wraps(function)
    def timed(*arguments: Any, **more: Any) -> Any:
        with phases.profile(COMMUNICATION):
            return function(*arguments, **more)

    return timed
