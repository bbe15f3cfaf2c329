"""Pixels to numbers, on the device where the model is.

Axes: b = images, c = channels, h, w = rows and columns.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute (pixel / 255 - mean) / std for each channel: uint8 [b c h w] -> `dtype` [b c h w], contiguous."""
    computed_in = torch.promote_types(dtype, torch.float32)  # half precision only holds the result well
    offset, factor = _constants(tuple(mean), tuple(std), images.device, computed_in)
    # In place: on a CPU most of the time goes into memory that was never touched before.
    return images.to(computed_in, memory_format=torch.contiguous_format).sub_(offset).mul_(factor).to(dtype)


@lru_cache(maxsize=16)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What to subtract and to multiply with, [c 1 1]; kept on the device, since a copy there waits for its queue."""
    offset = torch.tensor(mean, dtype=torch.float64)[:, None, None] * 255
    factor = 1 / (torch.tensor(std, dtype=torch.float64)[:, None, None] * 255)
    return offset.to(device, dtype), factor.to(device, dtype)
