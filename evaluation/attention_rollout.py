"""Attention rollout: through all layers at once, from which patches the features come.

Axes: b = images, a = attention heads, t = tokens (prefix first), r k = rows and columns of patches, c = channels,
h w = pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.attention import check_finite, one_by_one
from evaluation.patch_pca import patch_grid
from evaluation.pictures import picture
from tasks.attention_weights import visit_attention
from tasks.encoders import Encoder

SOURCES = {
    "cls": "the class token",
    "mean": "the mean of the patches",
    "cls+mean": "what features are (half class token, half mean of the patches)",
}


class Rollout(NamedTuple):
    """Images [b c h w] as given, and the share of each patch in what they are made into, [b r k] in 0..1.

    What is missing to a sum of 1 comes from class token, registers and distillation token. `source` says what was
    followed back.
    """

    images: Tensor
    weights: Tensor
    source: str


class RolloutPicture(NamedTuple):
    """Data URIs of a photograph and its map, black at the least share and white at the largest.

    `least` and `most` are these two shares as multiples of an even one.
    """

    image: str
    map: str
    least: float
    most: float


def attention_rollout(encoder: Encoder, images: Tensor) -> Rollout:
    """Product over all layers of (W + I) / 2 (Abnar & Zuidema 2020, arXiv:2005.00928, section 3).

    W is the attention of a layer, averaged over its heads; I stands for the residual connection. The rows that are
    looked at are those of what features are pooled from: the class token, the mean of the patches, or half of each.

    Args:
        encoder: in evaluation mode.
        images: [b c h w] in 0..255; one at a time goes through, for the sake of memory.

    Raises:
        TaskError: the encoder is no plain Vision Transformer.
        EvaluationError: its attention is not finite, or its patches lie in no grid.
    """
    prefix, pool = encoder.num_prefix, encoder.config.pool
    found = []
    for image in one_by_one(encoder, images):
        product = _product(encoder, image)
        of_class, of_mean = product[:, 0], product[:, prefix:].mean(dim=1)
        shares = {"cls": of_class, "mean": of_mean, "cls+mean": (of_class + of_mean) / 2}[pool]
        found.append(shares[:, prefix:])
    weights = torch.cat(found)
    check_finite(weights)
    grid = patch_grid(encoder, images, weights.shape[1])
    return Rollout(images, weights.reshape(-1, *grid), SOURCES[pool])


def _product(encoder: Encoder, image: Tensor) -> Tensor:
    """[1 t t] of a normalised image [1 c h w]."""
    product: Tensor | None = None

    def follow(weights: Tensor) -> None:
        nonlocal product
        mixed = weights.mean(dim=1)
        before = torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device) if product is None else product
        product = (mixed @ before + before) / 2

    visit_attention(encoder, image, follow)
    assert product is not None, "an encoder has blocks"
    return product


def draw_rollout(found: Rollout) -> list[RolloutPicture]:
    """A picture for each image, one pixel a patch."""
    return [
        RolloutPicture(picture(image), *_draw_map(weights))
        for image, weights in zip(found.images, found.weights, strict=True)
    ]


def _draw_map(weights: Tensor) -> tuple[str, float, float]:
    weights = weights.double().cpu()
    times = weights / weights.mean().clamp_min(1e-300)
    least, most = float(times.min()), float(times.max())
    grey = (255 * (times - least) / max(most - least, 1e-300)).round().to(torch.uint8)
    return picture(grey[None]), least, most
