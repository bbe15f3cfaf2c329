"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382) whose draws follow from the samples' keys.

timm's draws belong to a place in a batch. These belong to the sample: they are the same however a batch is cut into
micro-batches and whichever rank has it, and a second forward pass drops what the first one dropped. They are made
before the pass and for all paths at once, so that nothing in a block depends on its own share: torch.compile has one
graph for all blocks, where timm's drop path makes one for each.

Axes: b = images, p = paths, * = whatever one image has.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from tasks.masks import random_noise


class KeyedDropPath(DropPath):  # type: ignore[misc]
    """timm's DropPath inside `drop_path_keys`, with draws by key; outside of it, timm's own draws.

    Args:
        drop_prob: share of the images for which the path is dropped.
        scale_by_keep: divide what is kept by 1 - drop_prob.
    """

    noise: Tensor | None = None  # [b], what the path of an image is multiplied by

    def forward(self, x: Tensor) -> Tensor:
        """[b *] -> [b *]; or [b*k *], where a model has cut each image into k parts, which drop together."""
        if not self.training:
            return x
        if self.noise is None or len(x) % len(self.noise):
            return super().forward(x)  # type: ignore[no-any-return]
        noise = self.noise.to(x.dtype)
        if len(x) != len(noise):
            noise = noise.repeat_interleave(len(x) // len(noise))
        return x * noise.view(-1, *[1] * (x.ndim - 1))


def use_keyed_drop_path(module: nn.Module, share: float | None = None) -> None:
    """Puts a KeyedDropPath in the place of every DropPath of a module, and of what timm has for one that never drops.

    A module without drop path stays as it is.

    Args:
        module: whose parts are replaced.
        share: drop_prob of all of them; None: each keeps its own.
    """
    children = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    if not share and not any(isinstance(child, DropPath) and child.drop_prob for _, _, child in children):
        return
    for parent, name, child in children:
        if isinstance(child, DropPath):
            own = child.drop_prob or 0.0
            setattr(parent, name, KeyedDropPath(own if share is None else share, child.scale_by_keep))
        elif isinstance(child, nn.Identity) and name.startswith("drop_path"):
            setattr(parent, name, KeyedDropPath(share or 0.0))  # of first blocks, which now compute what the others do


@contextmanager
def drop_path_keys(module: nn.Module, keys: Tensor | None) -> Iterator[None]:
    """Within it the module's KeyedDropPaths draw by `keys`, int64 [b]; None: as timm does."""
    paths = [part for part in module.modules() if isinstance(part, KeyedDropPath) and part.training]
    if keys is None or not paths:
        yield
        return
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.get_default_dtype())
    for path, noise in zip(paths, _draw(paths, keys, dtype), strict=True):
        path.noise = noise
    try:
        yield
    finally:
        for path in paths:
            path.noise = None


def _draw(paths: list[KeyedDropPath], keys: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """p factors [b]: 0 where a path is dropped."""
    drops = [path.drop_prob or 0.0 for path in paths]
    scales = [1 / (1 - drop) if path.scale_by_keep else 1.0 for drop, path in zip(drops, paths, strict=True)]
    # from memory of the host's own: no device waits for it
    share, scale = torch.tensor([drops, scales], dtype=dtype).to(keys.device, non_blocking=True)
    noise: Tensor = (random_noise(keys, len(paths), "drop path") >= share) * scale
    return noise.unbind(dim=1)
