"""The repeated parts of a model, compiled one at a time."""

from collections.abc import Iterable

import torch
from torch import nn

GRAPHS = 64
"""Of one kind of block: for student and teacher, sizes of views, stages of a model. torch gives up after 8."""


def compile_forward(blocks: Iterable[nn.Module]) -> None:
    """torch.compile for what each block computes, not for the hooks around it."""
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS)
    for block in blocks:
        block.forward = torch.compile(block.forward)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_forward` has been at parts of it."""
    return any(hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable") for part in model.modules())
