"""Where a patch is: fixed tables, their resizing in the manner of three authors, and rotary embeddings.

Axes: p = prefix tokens that have a row in the table (a class token), n = patches in row-major order, d = width,
c = channels of one head.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def sincos2d_table(width: int, grid: Grid, prefix: int = 0) -> Tensor:
    """Fixed 2-D sine-cosine table of MAE (He et al. 2022, arXiv:2111.06377, appendix A.1), float64 [p+n d].

    The first half of the channels encodes the column and the second the row; each half is [sin | cos] at
    frequencies 10000^(-i / (d/4)). Prefix rows are zero.

    Args:
        width: channels, divisible by 4.
        grid: rows and columns of patches.
        prefix: rows of zeros in front.
    """
    rate = torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4)
    frequency = 10000.0**-rate
    row, column = (torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * frequency for side in grid)
    row, column = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (row, column))
    rows, columns = grid
    table = torch.cat([column.repeat(rows, 1), row.repeat_interleave(columns, dim=0)], dim=1)
    return F.pad(table, (0, 0, prefix, 0))


def resize_table(
    table: Tensor, old: Grid, new: Grid, manner: Literal["mae", "dino", "open_clip"], *, square: bool | None = None
) -> Tensor:
    """A table [n d] of a grid stretched to another grid, [n' d]; differentiable, in float32 at least.

    `mae`: bicubic to the new size. `open_clip`: the same with antialiasing (also timm's manner). `dino`: bicubic by the
    factor (new + 0.1) / old, which shifts every sample point (github.com/facebookresearch/dino/issues/8), also where
    the number of patches is the same but the image is not square.

    Args:
        table: patch rows only, row-major.
        old: rows and columns of `table`.
        new: rows and columns wanted.
        manner: whose rule.
        square: whether the image is (only `dino` asks; 33 x 35 pixels can have a square grid); None: as `new` is.
    """
    square = new[0] == new[1] if square is None else square
    same = old == new if manner != "dino" else (old[0] * old[1] == new[0] * new[1] and square)
    if same:
        return table
    image = table.reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = image.float() if image.dtype in (torch.float16, torch.bfloat16) else image
    if manner == "dino":
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        image = F.interpolate(image, size=new, mode="bicubic", antialias=manner == "open_clip")
    return image.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype)


def rope_table(head_width: int, grid: Grid, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the rotary angles of every patch, float64 [n c] each (DINOv3, arXiv:2508.10104, section 3.2).

    Rows and columns are patch centres in [-1, 1] whatever the grid, so another resolution needs no resizing. The first
    quarter of the channels turns with the row, the second with the column, and both repeat for the other half.

    Args:
        head_width: channels of one head, divisible by 4.
        grid: rows and columns of patches.
        base: ratio of the longest period to the shortest, about.
    """
    period = base ** (torch.arange(head_width // 4, dtype=torch.float64, device="cpu") / (head_width / 4))
    row, column = ((2 * torch.arange(side, dtype=torch.float64, device="cpu") + 1) / side - 1 for side in grid)
    centre = torch.cartesian_prod(row, column)
    angle = (2 * math.pi * centre[:, :, None] / period).flatten(1).repeat(1, 2)
    return angle.sin(), angle.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turns channel pairs (i, i + c/2) of the last tokens of x [b heads p+n c] by the angles [n c] or [b 1 n c].

    Prefix tokens, which come first, have no place and stay as they are.
    """
    prefix, patches = x.tensor_split([x.shape[-2] - sin.shape[-2]], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
    return torch.cat([prefix, turned], dim=-2)
