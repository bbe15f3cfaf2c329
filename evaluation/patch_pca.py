"""What the patches say: the first three principal components of patch tokens, as colours.

Axes: b = images, c = channels, h w = pixels, n = patches, d = width, r k = rows and columns of patches.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.normalize import normalize
from evaluation.errors import EvaluationError
from evaluation.pictures import picture
from tasks.encoders import Encoder

COMPONENTS = 3
CUT = 0.02


class PatchComponents(NamedTuple):
    """Images [b c h w] as given, coordinates of their patches float64 [b r k 3], and each one's share of the variance.

    The three shares are of the variance of all patches of all images.
    """

    images: Tensor
    values: Tensor
    shares: tuple[float, ...]


class PatchPicture(NamedTuple):
    """Data URIs: a photograph, its patches with the components as red, green and blue, and each component in grey."""

    image: str
    colours: str
    components: list[str]


@torch.no_grad()
def patch_components(encoder: Encoder, images: Tensor) -> PatchComponents:
    """Principal components of the last patch tokens (Oquab et al. 2023, arXiv:2304.07193, fig. 1, without its mask).

    All patches of all images share their axes, so a colour means the same in every image. A principal axis has no
    sign; here it points to where patches in the middle of the picture lie, in relation to those at its border, so
    that the pictures of two checkpoints, or of two seeds, are not each other's negatives by chance.

    Args:
        encoder: in evaluation mode, of any kind that has a feature map.
        images: [b c h w] in 0..255.

    Raises:
        EvaluationError: no feature map, or tokens that are not finite.
    """
    config = encoder.config
    patches = encoder.eval()(normalize(images, config.mean, config.std)).patches.double()
    rows, columns = patch_grid(encoder, images, patches.shape[1])
    if len(patches[0]) < 4 or encoder.width < COMPONENTS:
        raise EvaluationError(no_map(encoder, images))
    if not torch.isfinite(patches).all():
        raise EvaluationError("patch tokens are not finite, the encoder has diverged")
    x = patches.flatten(0, 1)
    x = x - x.mean(dim=0)
    variance, axes = torch.linalg.eigh(x.T @ x)  # ascending
    values = (x @ axes[:, -COMPONENTS:].flip(1)).reshape(len(images), rows, columns, -1)
    values = values * torch.where((values * _centrality(rows, columns, values)).sum((0, 1, 2)) < 0, -1.0, 1.0)
    shares = variance[-COMPONENTS:].flip(0) / variance.sum().clamp_min(1e-300)
    return PatchComponents(images, values, tuple(shares.tolist()))


def draw_patch_components(found: PatchComponents) -> list[PatchPicture]:
    """A picture for each image, one pixel a patch; black and white are a component's 2nd and 98th percentile."""
    values = found.values.cpu()
    ends = torch.quantile(values.flatten(0, 2), torch.tensor([CUT, 1 - CUT], dtype=values.dtype), dim=0)
    scaled = ((values - ends[0]) / (ends[1] - ends[0]).clamp_min(1e-300)).clamp(0, 1)
    shown = (255 * scaled).round().to(torch.uint8).permute(0, 3, 1, 2)
    return [
        PatchPicture(picture(image), picture(colours), [picture(component[None]) for component in colours])
        for image, colours in zip(found.images, shown, strict=True)
    ]


def patch_grid(encoder: Encoder, images: Tensor, count: int) -> tuple[int, int]:
    """Rows and columns of `count` patch tokens of images [b c h w]; EvaluationError where they lie in no grid."""
    rows, columns = (side // encoder.config.patch_size for side in images.shape[-2:])
    if rows * columns != count:  # some families round up, or have lost a stage
        rows = columns = math.isqrt(count)
    if rows * columns != count:
        raise EvaluationError(no_map(encoder, images))
    return rows, columns


def no_map(encoder: Encoder, images: Tensor) -> str:
    """Why there is no picture of patches."""
    return f"{encoder.config.arch} gives no map of patches for images of {images.shape[-1]} pixels"


def _centrality(rows: int, columns: int, like: Tensor) -> Tensor:
    """[r k 1], the less the farther from the middle, 0 in the mean."""
    row, column = (torch.linspace(-1, 1, side, dtype=like.dtype, device=like.device) ** 2 for side in (rows, columns))
    away = row[:, None] + column
    return (away.mean() - away)[:, :, None]
