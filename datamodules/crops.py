"""Crops and resizing on pixels (uint8, or float32 in 0..255), with boxes that follow from given random numbers.

Images keep their channels innermost in memory (`channels_last`), as decoders leave them: resizing is a third faster so.

Axes: h, w = rows and columns of the image, s = side of the result.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TRIES = 10
NUMBERS = 2 * TRIES + 2
"""How many random numbers a crop box needs."""


class Box(NamedTuple):
    """A part of an image in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_resized_crop_box(
    height: int, width: int, numbers: Sequence[float], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw a box as torchvision's RandomResizedCrop does (Szegedy et al. 2015, arXiv:1409.4842, section 6).

    Args:
        height, width: of the image, pixels.
        numbers: `NUMBERS` uniform numbers in [0, 1): area and log aspect ratio of ten tries, then top and left.
        scale: range of the area, as a share of the image.
        ratio: range of width / height.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 2 * TRIES, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[i])
        aspect = math.exp(log_low + (log_high - log_low) * numbers[i + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(numbers[-2] * (height - h + 1)), int(numbers[-1] * (width - w + 1))
            return Box(top, left, h, w)
    # No try fitted, as for a panorama: the largest central box of an allowed ratio.
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop(image: Tensor, box: Box) -> Tensor:
    """Cut a box out; a view. [c h w] -> [c box.height box.width]."""
    return image[:, box.top : box.top + box.height, box.left : box.left + box.width]


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic resizing with antialiasing; the dtype stays. [c h w] -> [c height width], bytes channels innermost."""
    batch = image[None].contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(batch, (height, width), mode="bicubic", antialias=True)[0]
    # A bicubic kernel overshoots at edges. uint8 has been clamped already.
    return resized.clamp_(0, 255) if resized.is_floating_point() else resized


def flip(image: Tensor) -> Tensor:
    """Mirror left and right. [c h w] -> [c h w]."""
    # In this layout a pixel moves as a whole; flipping the last axis of [c h w] takes three times longer.
    return image.permute(1, 2, 0).flip(1).permute(2, 0, 1)


def resize_shorter_side(image: Tensor, size: int) -> Tensor:
    """Resize so that the shorter side becomes `size`, and the other one its rounded-down share, as torchvision does."""
    height, width = image.shape[1:]
    if min(height, width) == size:
        return image
    if height < width:
        return resize(image, size, int(size * width / height))
    return resize(image, int(size * height / width), size)


def center_crop(image: Tensor, size: int) -> Tensor:
    """Cut out the middle [c size size]; the image must not be smaller."""
    height, width = image.shape[1:]
    return crop(image, Box(round((height - size) / 2), round((width - size) / 2), size, size))
