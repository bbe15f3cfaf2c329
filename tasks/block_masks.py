"""Block-wise masks of iBOT (BEiT, arXiv:2106.08254, Alg. 1; iBOT, arXiv:2111.07832; DINOv2's settings).

Axes: b = images, v = global views, r = v * b views in view-major order, n = patches, m = hidden patches of all views.
All images are drawn at once, and from their integer keys alone.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.masks import random_noise
from tasks.positions import Grid

MIN_BLOCK = 4  # patches
ASPECT = 0.3  # smallest height / width of a block; the largest is its inverse
TRIES = 10  # blocks that may fail in a row
_ROUND = 16  # blocks for which random numbers are drawn at once


class Hidden(NamedTuple):
    """Which patches the student does not see."""

    mask: Tensor  # bool [r n], True = hidden
    places: Tensor  # int64 [m], the hidden ones among [r n] flattened

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[m], 1 / (hidden patches of the same view)."""
        per_view = 1 / self.mask.sum(dim=1).clamp(min=1).to(dtype)
        return per_view[self.places // self.mask.shape[1]]


def hide_blocks(rng: Tensor, views: int, grid: Grid, ratio: tuple[float, float], probability: float) -> Hidden:
    """Hides rectangles of patches in some views, until a share drawn from `ratio` is hidden or no more block fits.

    Each block has between 4 and all patches that are still wanted, but at most half of the image. DINOv2 hides patches
    in a fixed number of the views of a device and spreads the shares evenly over them; here every view draws for
    itself, with the same probabilities, so that masks do not depend on the device batch.

    Args:
        rng: int64 [b] on the CPU, one key per image.
        views: v.
        grid: rows and columns of patches.
        ratio: smallest and largest share of hidden patches, uniform between them.
        probability: that a view has hidden patches at all.
    """
    rows, columns = grid
    n = rows * columns
    draws = torch.stack([random_noise(rng, 2, f"ibot share {view}") for view in range(views)]).flatten(0, 1).double()
    share = ratio[0] + draws[:, 1] * (ratio[1] - ratio[0])
    target = torch.where(draws[:, 0] < probability, n * share, 0.0).floor()
    mask = torch.zeros(len(target), rows, columns, dtype=torch.bool)
    count = torch.zeros_like(target)
    failures = torch.zeros_like(target)
    row, column = torch.arange(rows)[None, :, None], torch.arange(columns)[None, None, :]
    block = 0
    while (active := (count < target) & (failures < TRIES)).any():
        if block % _ROUND == 0:
            purpose = [f"ibot block {view} {block}" for view in range(views)]
            numbers = torch.stack([random_noise(rng, 4 * _ROUND, name) for name in purpose])
            numbers = numbers.double().view(len(target), _ROUND, 4)
        u = numbers[:, block % _ROUND].unbind(1)
        wanted = (target - count).clamp(max=n // 2)
        area = MIN_BLOCK + u[0] * (wanted - MIN_BLOCK)
        aspect = ((2 * u[1] - 1) * -math.log(ASPECT)).exp()
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top = (u[2] * (rows - height + 1)).floor()[:, None, None]
        left = (u[3] * (columns - width + 1)).floor()[:, None, None]
        inside = (row >= top) & (row < top + height[:, None, None])
        inside = inside & (column >= left) & (column < left + width[:, None, None])
        new = (inside & ~mask).sum(dim=(1, 2))
        accepted = active & (height < rows) & (width < columns) & (new > 0) & (new <= wanted)
        mask |= inside & accepted[:, None, None]
        count += torch.where(accepted, new, 0)
        failures = torch.where(accepted, 0.0, failures + 1)
        block += 1
    flat = mask.flatten(1)
    return Hidden(flat, flat.flatten().nonzero()[:, 0])
