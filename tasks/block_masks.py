"""Block-wise masks of iBOT (BEiT, arXiv:2106.08254, Alg. 1; iBOT, arXiv:2111.07832; DINOv2's settings).

Axes: b = images, v = global views, r = v * b views in view-major order, n = patches, m = hidden patches of all views.
A mask follows from the integer key of its image alone. A view's patches are the bits of one Python integer while its
blocks are tried: that is faster than tensors of all views at once, of which few are still at work after some tries.
"""

import math
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.masks import random_noise
from tasks.positions import Grid

MIN_BLOCK = 4  # patches
ASPECT = 0.3  # smallest height / width of a block; the largest is its inverse
TRIES = 10  # blocks that may fail in a row
_ROUND = 16  # tries for which random numbers are drawn at once; few views need more


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
    n = math.prod(grid)
    size = -(-n // 8)
    packed = bytearray()
    for view in range(views):
        chance, at = random_noise(rng, 2, f"ibot share {view}").double().unbind(1)
        share = ratio[0] + at * (ratio[1] - ratio[0])
        targets = torch.where(chance < probability, (n * share).floor(), 0).int()
        keys = rng[targets > 0]
        of_keys = zip(keys, _tries(keys, view, 0), strict=True)
        for target in targets.tolist():
            bits = _blocks(grid, target, _endless(*next(of_keys), view)) if target else 0
            packed += bits.to_bytes(size, "little")
    rows = np.frombuffer(packed, np.uint8).reshape(-1, size)
    mask = np.unpackbits(rows, axis=1, count=n, bitorder="little").view(bool)
    return Hidden(torch.from_numpy(mask), torch.from_numpy(np.flatnonzero(mask)))


def _tries(rng: Tensor, view: int, block: int) -> list[list[list[float]]]:
    """Random numbers [b 16 4] in [0, 1) for the tries number `block` and after: area, aspect, row and column."""
    return random_noise(rng, 4 * _ROUND, f"ibot block {view} {block}").view(len(rng), _ROUND, 4).tolist()


def _endless(key: Tensor, tries: list[list[float]], view: int) -> Iterator[list[float]]:
    """The first tries of an image, and those after them."""
    yield from tries
    for block in count(_ROUND, _ROUND):
        yield from _tries(key[None], view, block)[0]


def _blocks(grid: Grid, target: int, tries: Iterator[list[float]]) -> int:
    """Hidden patches of one view as the bits of an integer, the first patch the lowest: `target` of them or fewer."""
    rows, columns = grid
    mask = hidden = failures = 0
    while hidden < target and failures < TRIES:
        of_area, of_aspect, of_row, of_column = next(tries)
        wanted = min(target - hidden, rows * columns // 2)
        area = MIN_BLOCK + of_area * (wanted - MIN_BLOCK)
        aspect = ASPECT ** (1 - 2 * of_aspect)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if height >= rows or width >= columns:
            continue
        top, left = int(of_row * (rows - height + 1)), int(of_column * (columns - width + 1))
        first_column = ((1 << columns * height) - 1) // ((1 << columns) - 1)
        block = first_column * ((1 << width) - 1) << top * columns + left
        new = (block & ~mask).bit_count()
        if 0 < new <= wanted:
            mask, hidden, failures = mask | block, hidden + new, 0
    return mask
