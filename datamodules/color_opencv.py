"""Colour changes of single 8-bit images with OpenCV, for loader workers: Pillow's results in a fraction of its time.

Axes: c = channels, h, w = rows and columns.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.color import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    blur_kernel,
)  # fmt: skip
from datamodules.errors import DataError

_LEVELS = np.arange(256, dtype=np.float32)
_SOLARIZED = np.where(_LEVELS < 128, _LEVELS, 255 - _LEVELS).astype(np.uint8)


def require_opencv() -> Any:
    """The module cv2, using one thread. DataError when it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise DataError(
            "changing colours in the loader's workers needs OpenCV: pip install opencv-python-headless, "
            "or set data.recipe.color_on to device"
        ) from error
    cv2.setNumThreads(0)  # a worker is one of many
    return cv2


def change_color(image: Tensor, parameters: NDArray[np.float32]) -> Tensor:
    """Apply one image's changes: uint8 [c h w], channels innermost, parameters [8] -> uint8 [c h w].

    Saturation, hue and grey need three channels; on others they do nothing.
    """
    cv2 = require_opencv()
    if image.dtype != torch.uint8:
        raise DataError("colours of 16-bit images are changed on the device: set data.recipe.color_on to device")
    x: NDArray[np.uint8] = image.permute(1, 2, 0).numpy()
    channels = x.shape[2]
    for change in ORDERS[int(parameters[ORDER])]:
        factor = float(parameters[change])
        if change == HUE:
            if factor and channels == 3:
                hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV_FULL)
                hsv[..., 0] += np.uint8(int(factor * 255) % 256)
                x = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
        elif factor == 1:
            continue
        elif change == BRIGHTNESS:
            x = cv2.LUT(x, _blended(0, factor))
        elif change == CONTRAST:
            mean = cv2.mean(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY))[0] if channels == 3 else float(x.mean())
            x = cv2.LUT(x, _blended(int(mean + 0.5), factor))
        elif change == SATURATION and channels == 3:
            gray = cv2.cvtColor(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            x = cv2.addWeighted(x, factor, gray, 1 - factor, -0.5)  # Pillow cuts off where OpenCV rounds
    if parameters[GRAY] and channels == 3:
        x = cv2.cvtColor(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if parameters[SIGMA]:
        kernel = blur_kernel(parameters[SIGMA : SIGMA + 1])[0]
        x = cv2.sepFilter2D(x, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    if parameters[SOLARIZE]:
        x = cv2.LUT(x, _SOLARIZED)
    return torch.from_numpy(x.reshape(*x.shape[:2], channels)).permute(2, 0, 1)


def _blended(low: int, factor: float) -> NDArray[np.uint8]:
    """What Pillow's blending of a constant with an image gives for each level."""
    blended: NDArray[np.float32] = np.clip(np.float32(low) + np.float32(factor) * (_LEVELS - low), 0, 255)
    return blended.astype(np.uint8)
