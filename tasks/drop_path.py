"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382) whose draws follow from the samples' keys.

timm's draws belong to a place in a batch. These belong to the sample: they are the same however a batch is cut into
micro-batches and whichever rank has it, and a second forward pass drops what the first one dropped.

Axes: b = images, * = whatever one image has.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers import DropPath
from torch import Tensor, nn

from tasks.masks import random_noise


class KeyedDropPath(DropPath):  # type: ignore[misc]
    """timm's DropPath inside `drop_path_keys`, with draws by key; outside of it, timm's own draws.

    Args:
        drop_prob: share of the images for which the path is dropped.
        scale_by_keep: divide what is kept by 1 - drop_prob.
    """

    noise: Tensor | None = None  # [b], uniform in [0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b *] -> [b *]."""
        if not self.training or self.drop_prob == 0:
            return x
        if self.noise is None or len(self.noise) != len(x):  # some timm models drop parts of an image, such as windows
            return super().forward(x)  # type: ignore[no-any-return]
        kept = (self.noise >= self.drop_prob).to(x.dtype)
        if self.scale_by_keep:
            kept = kept / (1 - self.drop_prob)
        return x * kept.view(-1, *[1] * (x.ndim - 1))  # type: ignore[no-any-return]


def use_keyed_drop_path(module: nn.Module) -> None:
    """Puts a KeyedDropPath in the place of every DropPath of a module."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, DropPath)
    ]
    for parent, name, child in found:
        setattr(parent, name, KeyedDropPath(child.drop_prob or 0.0, child.scale_by_keep))


@contextmanager
def drop_path_keys(module: nn.Module, keys: Tensor | None) -> Iterator[None]:
    """Within it the module's KeyedDropPaths draw by `keys`, int64 [b]; None: as timm does."""
    paths = [part for part in module.modules() if isinstance(part, KeyedDropPath)] if keys is not None else []
    if keys is not None and paths:
        for path, noise in zip(paths, random_noise(keys, len(paths), "drop path").unbind(dim=1), strict=True):
            path.noise = noise
    try:
        yield
    finally:
        for path in paths:
            path.noise = None
