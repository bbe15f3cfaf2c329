"""Pixels to numbers, on the device where the model is.

Axes: b = images, c = channels, h, w = rows and columns.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from datamodules.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute (pixel / 255 - mean) / std for each channel -> `dtype` [... c h w], contiguous, in new memory.

    Args:
        images: [... c h w], uint8 or floating point, in 0..255 either way.
        mean, std: one per channel, in [0, 1].
        dtype: of the result.
    """
    computed_in = torch.promote_types(dtype, torch.float32)  # half precision only holds the result well
    offset, factor = _constants(tuple(mean), tuple(std), images.device, computed_in)
    # In place: on a CPU most of the time goes into memory that was never touched before.
    values = images.to(computed_in, memory_format=torch.contiguous_format, copy=True)
    return values.sub_(offset).mul_(factor).to(dtype)


def check_channels(channels: int, bits: int, mean: Sequence[float], std: Sequence[float], data: str = "DIR") -> None:
    """Refuse settings of the input that do not fit each other; `data` is named in the command that finds them.

    Raises:
        DataError: channels or bits out of range, or not one mean and one positive std for each channel.
    """
    if channels < 1:
        raise DataError(f"data.channels {channels} must be at least 1")
    if bits not in (8, 16):
        raise DataError(f"data.bits {bits} must be 8 or 16")
    if len(mean) == len(std) == channels and all(value > 0 for value in std):
        return
    find = f"`trivit shards stats {data} --channels {channels}{' --bits 16' if bits == 16 else ''}` finds them"
    if channels != 3 and tuple(mean) == IMAGENET_MEAN and tuple(std) == IMAGENET_STD:
        raise DataError(f"data.channels {channels} needs a data.mean and data.std of its own: {find}")
    raise DataError(
        f"data.mean {list(mean)} and data.std {list(std)} must be one number for each of {channels} channels, "
        f"std above 0: {find}"
    )


@lru_cache(maxsize=16)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What to subtract and to multiply with, [c 1 1]; kept on the device, since a copy there waits for its queue."""
    offset = torch.tensor(mean, dtype=torch.float64)[:, None, None] * 255
    factor = 1 / (torch.tensor(std, dtype=torch.float64)[:, None, None] * 255)
    return offset.to(device, dtype), factor.to(device, dtype)
