"""The repeated parts of a model: compiled, or computed a second time instead of remembered, one at a time."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from tasks.drop_path import KeyedDropPath
from tasks.errors import TaskError

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


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): only what enters a block is kept.

    The backward pass computes the block once more, with the same draws. Parameters keep their names. To be called
    after `compile_forward`.

    Raises:
        TaskError: for BatchNorm, whose running statistics would count every batch twice.
    """
    for block in blocks:
        if any(isinstance(part, _BatchNorm) for part in block.modules()):
            raise TaskError(
                "activation_checkpointing computes a block twice, and BatchNorm would count the batch twice: take an "
                "encoder without BatchNorm, or a smaller data.device_batch_size"
            )
        block.forward = _twice(block)


def _twice(block: nn.Module) -> Callable[..., Any]:
    forward: Callable[..., Any] = block.forward
    paths = [part for part in block.modules() if isinstance(part, KeyedDropPath)]

    def with_noise(noise: list[Tensor | None], *args: Any, **kwargs: Any) -> Any:
        """By the time of the second pass, drop path has other keys or none."""
        before = [path.noise for path in paths]
        for path, value in zip(paths, noise, strict=True):
            path.noise = value
        try:
            return forward(*args, **kwargs)
        finally:
            for path, value in zip(paths, before, strict=True):
                path.noise = value

    @wraps(forward)
    def once_or_twice(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(with_noise, [path.noise for path in paths], *args, use_reentrant=False, **kwargs)

    return once_or_twice
