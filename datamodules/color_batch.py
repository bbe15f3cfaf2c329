"""Colour changes of a whole batch at once, on whatever device it is: what Pillow and torchvision v1 do image by image.

8-bit images are rounded after each change where Pillow rounds, so that the results agree with it; 16-bit ones (float
input) are not. The parameters stay on the host: which images are changed is known without waiting for the device.

Axes: b = images, c = channels, h, w = rows and columns, r = reach of a blur.
"""

import numpy as np
import torch
import torch.nn.functional as F
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

_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601-2, as Pillow rounds it


def change_colors(images: Tensor, parameters: NDArray[np.float32]) -> Tensor:
    """Apply each image's changes: uint8 or float in 0..255 [b c h w], parameters [b 8] -> float32 [b c h w] in 0..255.

    Saturation, hue and grey need three channels; on others they do nothing.
    """
    rounded = images.dtype == torch.uint8
    x = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    orders = ORDERS[parameters[:, ORDER].astype(np.int64)]  # [b 4]
    for stage in range(orders.shape[1]):
        x = _jitter(x, parameters, orders[:, stage], rounded)
    if x.shape[1] == 3 and (gray := np.flatnonzero(parameters[:, GRAY])).size:
        at = _indices(gray, x)
        x[at] = _luma(x[at], rounded).expand(-1, 3, -1, -1)
    if (blurred := np.flatnonzero(parameters[:, SIGMA])).size:
        at = _indices(blurred, x)
        values = _blur(x[at], blur_kernel(parameters[blurred, SIGMA]))
        x[at] = values.round_() if rounded else values
    if (solarized := np.flatnonzero(parameters[:, SOLARIZE])).size:
        at = _indices(solarized, x)
        x[at] = torch.where(x[at] < 128, x[at], 255 - x[at])
    return x


def _jitter(x: Tensor, parameters: NDArray[np.float32], change: NDArray[np.int64], rounded: bool) -> Tensor:
    """One of the four changes for each image: the one that is its turn."""
    known = (BRIGHTNESS, CONTRAST, SATURATION) if x.shape[1] == 3 else (BRIGHTNESS, CONTRAST)
    factor = np.where(np.isin(change, known), parameters[np.arange(len(change)), change.clip(max=SATURATION)], 1)
    if (blended := np.flatnonzero(factor != 1)).size:
        at, some = (slice(None), x) if blended.size == len(x) else (_indices(blended, x), None)
        some = x[at] if some is None else some
        luma = _luma(some, rounded)
        mean = luma.mean((2, 3), keepdim=True)
        mean = (mean + 0.5).floor_() if rounded else mean
        columns = np.stack([factor, change == CONTRAST, change == SATURATION])[:, blended].astype(np.float32)
        f, contrast, saturation = torch.from_numpy(columns).to(x.device, non_blocking=True)[:, :, None, None, None]
        some = torch.lerp(luma * saturation + mean * contrast, some, f).clamp_(0, 255)
        x[at] = some.floor_() if rounded else some
    turn = (change == HUE) & (parameters[:, HUE] != 0)
    if x.shape[1] == 3 and (shifted := np.flatnonzero(turn)).size:
        at = _indices(shifted, x)
        shift = torch.from_numpy(parameters[shifted, HUE]).to(x.device, non_blocking=True)[:, None, None]
        x[at] = _shift_hue(x[at], shift, rounded)
    return x


def _luma(x: Tensor, rounded: bool) -> Tensor:
    """Brightness of each pixel, [b c h w] -> [b 1 h w]: of colours as Pillow's mode L, of other channels their mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    r, g, b = x.unbind(1)
    luma = (r * _LUMA[0]).add_(g, alpha=_LUMA[1]).add_(b, alpha=_LUMA[2])[:, None]
    return luma.add_(0.5).floor_() if rounded else luma


def _shift_hue(x: Tensor, shift: Tensor, rounded: bool) -> Tensor:
    """Turn the hue by shares of the circle, [b 3 h w], [b 1 1] -> [b 3 h w], through hue, saturation and value."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = (value - low).clamp_(min=1e-6)
    sixths = torch.where(
        r == value, (g - b) / chroma, torch.where(g == value, (b - r) / chroma + 2, (r - g) / chroma + 4)
    ).remainder_(6)
    saturation = (value - low) / value.clamp(min=1e-6)
    if rounded:  # Pillow keeps each of the three in 8 bits
        hue = (sixths * (255 / 6)).floor_() + (shift * 255).trunc().remainder(256)
        sixths = hue.remainder_(256) * (6 / 255)
        saturation = (saturation * 255).floor_() / 255
    else:
        sixths = (sixths + 6 * shift).remainder_(6)
    channels = []
    for n in (5, 3, 1):
        k = (sixths + n).remainder_(6)
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp_(0, 1))
    shifted = torch.stack(channels, 1)
    return shifted.add_(0.5).floor_() if rounded else shifted


def _blur(x: Tensor, kernel: NDArray[np.float32]) -> Tensor:
    """Blur each image with its own kernel, edges repeated: [b c h w], [b 2r+1] -> [b c h w]."""
    reach = kernel.shape[1] // 2
    weights = torch.from_numpy(np.ascontiguousarray(kernel.T)).to(x.device, non_blocking=True)[:, :, None, None, None]
    for axis, padding in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        padded, length = F.pad(x, padding, mode="replicate"), x.shape[axis]
        x = padded.narrow(axis, 0, length) * weights[0]
        for i in range(1, 2 * reach + 1):  # 2r+1 multiply-adds: a convolution with one filter per image is slower
            x.addcmul_(padded.narrow(axis, i, length), weights[i])
    return x


def _indices(where: NDArray[np.int64], x: Tensor) -> Tensor:
    return torch.from_numpy(where).to(x.device, non_blocking=True)
