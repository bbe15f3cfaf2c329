"""Twelve ways to spoil an image, in five severities, in the manner of ImageNet-C.

Hendrycks and Dietterich 2019 (arXiv:1903.12261): noise, blur, weather and digital corruptions of the test images.
Strengths of noise, defocus, fog, contrast, pixelation and JPEG are those of ImageNet-C for images of 224 px; motion
blur (a box, there a Gaussian), zoom, brightness (of RGB, there of HSV's value) and elastic are like them, not the
same. Lengths in pixels follow the image size. Glass blur, snow and frost are left out. So the numbers are not to be
set beside those on the files of ImageNet-C.

Axes: b = images, c = channels, s = side in pixels.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 224

Corruption = Callable[[Tensor, int, Generator], Tensor]


def corrupt(images: Tensor, kind: str, severity: int, seed: int) -> Tensor:
    """Images [b c s s] in [0, 1] -> the same, spoiled; what is drawn follows from the seed.

    Args:
        images: float, on any device.
        kind: one of CORRUPTIONS.
        severity: 1 (slight) to 5.
        seed: of the noise.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    return CORRUPTIONS[kind](images, severity - 1, generator).clamp(0, 1)


def _gaussian_noise(images: Tensor, level: int, generator: Generator) -> Tensor:
    return images + _normal(images, generator) * (0.08, 0.12, 0.18, 0.26, 0.38)[level]


def _shot_noise(images: Tensor, level: int, generator: Generator) -> Tensor:
    photons = (60, 25, 12, 5, 3)[level]
    return torch.poisson(images * photons, generator=generator) / photons


def _impulse_noise(images: Tensor, level: int, generator: Generator) -> Tensor:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    drawn = torch.rand(images.shape, generator=generator, device=images.device)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, images))


def _defocus_blur(images: Tensor, level: int, _: Generator) -> Tensor:
    radius = _pixels((3, 4, 6, 8, 10)[level], images)
    reach = math.ceil(radius)
    along = torch.arange(-reach, reach + 1, device=images.device)
    disk = (along[:, None].square() + along.square()).sqrt()
    return _filter(images, (radius + 0.5 - disk).clamp(0, 1))


def _motion_blur(images: Tensor, level: int, generator: Generator) -> Tensor:
    length = _pixels((10, 15, 20, 25, 30)[level], images)
    reach = max(1, math.ceil(length / 2))
    angles = torch.rand(len(images), generator=generator, device=images.device).tolist()
    blurred = []
    for image, angle in zip(images, angles, strict=True):
        kernel = torch.zeros(2 * reach + 1, 2 * reach + 1)
        for place in np.linspace(-length / 2, length / 2, 4 * reach + 1):
            x, y = place * math.cos(math.pi * angle), place * math.sin(math.pi * angle)
            kernel[reach + round(y), reach + round(x)] += 1
        blurred.append(_filter(image[None], kernel.to(images.device)))
    return torch.cat(blurred)


def _zoom_blur(images: Tensor, level: int, _: Generator) -> Tensor:
    most, side = (1.11, 1.16, 1.21, 1.26, 1.31)[level], images.shape[-1]
    zoomed = [images]
    for factor in np.linspace(1, most, 8)[1:]:
        large = F.interpolate(images, scale_factor=float(factor), mode="bilinear", align_corners=False)
        edge = (large.shape[-1] - side) // 2
        zoomed.append(large[..., edge : edge + side, edge : edge + side])
    return torch.stack(zoomed).mean(0)


def _fog(images: Tensor, level: int, generator: Generator) -> Tensor:
    thickness, roughness = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[level]
    clouds = torch.zeros(len(images), 1, *images.shape[-2:], device=images.device)
    cells, strength = 2, 1.0
    while cells <= images.shape[-1]:  # noise of ever smaller cells
        shape = (len(images), 1, cells, cells)
        noise = torch.rand(shape, generator=generator, device=images.device)
        clouds += strength * F.interpolate(noise, images.shape[-2:], mode="bilinear", align_corners=False)
        cells, strength = 2 * cells, strength / roughness
    clouds = (clouds - clouds.amin((-2, -1), True)) / (clouds.amax((-2, -1), True) - clouds.amin((-2, -1), True))
    brightest = images.amax((1, 2, 3), True)
    return (images + thickness * clouds) * brightest / (brightest + thickness)


def _brightness(images: Tensor, level: int, _: Generator) -> Tensor:
    return images + (0.1, 0.2, 0.3, 0.4, 0.5)[level]


def _contrast(images: Tensor, level: int, _: Generator) -> Tensor:
    mean = images.mean((-2, -1), keepdim=True)
    return (images - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def _elastic(images: Tensor, level: int, generator: Generator) -> Tensor:
    shift, smooth = ((12, 12), (14, 10), (16, 8), (18, 6), (20, 5))[level]
    side, sigma = images.shape[-1], max(1.0, _pixels(smooth, images))
    along = torch.arange(-math.ceil(2 * sigma), math.ceil(2 * sigma) + 1, device=images.device)
    bell = torch.exp(-along.square() / (2 * sigma**2))
    noise = torch.rand((len(images), 2, side, side), generator=generator, device=images.device) * 2 - 1
    field = _filter(noise, bell[:, None] * bell)
    field = field / field.abs().amax((1, 2, 3), True).clamp_min(1e-9) * (shift / _SIDE)
    lines = (torch.arange(side, device=images.device) * 2 + 1) / side - 1
    grid = torch.stack([lines.expand(side, side), lines[:, None].expand(side, side)], dim=-1)
    moved = grid + field.permute(0, 2, 3, 1)
    return F.grid_sample(images, moved, mode="bilinear", padding_mode="reflection", align_corners=False)


def _pixelate(images: Tensor, level: int, _: Generator) -> Tensor:
    side = images.shape[-1]
    few = max(1, round(side * (0.6, 0.5, 0.4, 0.3, 0.25)[level]))
    return F.interpolate(F.interpolate(images, (few, few), mode="area"), (side, side), mode="nearest-exact")


def _jpeg(images: Tensor, level: int, _: Generator) -> Tensor:
    quality, found = (25, 18, 15, 10, 7)[level], []
    for image in (images * 255).round().to(torch.uint8).cpu():
        file = io.BytesIO()
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels).save(file, "jpeg", quality=quality)
        with Image.open(file) as again:
            found.append(torch.from_numpy(np.array(again)).reshape(*image.shape[1:], len(image)).permute(2, 0, 1))
    return torch.stack(found).to(images.device, images.dtype) / 255


def _normal(images: Tensor, generator: Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator, device=images.device)


def _pixels(length: float, images: Tensor) -> float:
    """A length in images of 224 px, in these."""
    return length * images.shape[-1] / _SIDE


def _filter(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel with the same kernel, its weights summing to 1; edges are mirrored."""
    channels, (height, width) = images.shape[1], kernel.shape
    edges = (width // 2, width // 2, height // 2, height // 2)
    weight = (kernel / kernel.sum()).to(images.dtype).expand(channels, 1, height, width)
    kind = "reflect" if max(edges) < images.shape[-1] else "replicate"
    return F.conv2d(F.pad(images, edges, mode=kind), weight, groups=channels)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": _elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
