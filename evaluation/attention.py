"""Where the class token looks: its attention to the patches, per layer and head, and pictures of it.

Axes: l = layers, b = images, a = attention heads, r k = rows and columns of patches, c = channels, h w = pixels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.normalize import normalize
from evaluation.errors import EvaluationError
from evaluation.patch_pca import patch_grid
from evaluation.pictures import picture
from tasks.attention_weights import attention_weights
from tasks.encoders import Encoder


class ClassAttention(NamedTuple):
    """Images [b c h w] as given, and their class token's attention to each patch, [l b a r k] in 0..1.

    What is missing to a sum of 1 goes to the class token itself and to registers.
    """

    images: Tensor
    weights: Tensor


class HeadPicture(NamedTuple):
    """One map as a data URI, brightest where the weight is largest, black where it is 0.

    `on_patches`: share of the attention that patches get; `spread`: how many of its `patches` that covers: as many
    as an even one of the same entropy, exp(entropy); `least` and `most` that a patch gets, 1 being an even share.
    """

    image: str
    on_patches: float
    spread: float
    patches: int
    least: float
    most: float


class AttentionPicture(NamedTuple):
    """A photograph as a data URI and the maps of the heads, layer by layer."""

    image: str
    layers: list[list[HeadPicture]]


def class_attention(encoder: Encoder, images: Tensor) -> ClassAttention:
    """The class token's attention in every layer and head (Caron et al. 2021, arXiv:2104.14294, fig. 1: the last one).

    Args:
        encoder: in evaluation mode.
        images: [b c h w] in 0..255, of any size.

    Raises:
        TaskError: the encoder is no plain Vision Transformer.
        EvaluationError: it has no class token, or its attention is not finite.
    """
    config = encoder.config
    if not config.class_token:
        raise EvaluationError(f"{config.arch} has no class token")
    x = normalize(images, config.mean, config.std)
    weights = torch.stack([layer[:, :, 0] for layer in attention_weights(encoder.eval(), x, queries=1)])
    check_finite(weights)
    weights = weights[..., encoder.num_prefix :]
    grid = patch_grid(encoder, images, weights.shape[-1])
    return ClassAttention(images, weights.reshape(*weights.shape[:3], *grid))


def one_by_one(encoder: Encoder, images: Tensor) -> Iterator[Tensor]:
    """Images [b c h w] in 0..255 as [1 c h w], normalised: whole attention of many at once would be too large."""
    config = encoder.eval().config
    for i in range(len(images)):
        yield normalize(images[i : i + 1], config.mean, config.std)


def check_finite(weights: Tensor) -> None:
    """EvaluationError for attention, or what was made of it, that is not finite."""
    if not torch.isfinite(weights).all():
        raise EvaluationError("attention weights are not finite, the encoder has diverged")


def draw_class_attention(found: ClassAttention) -> list[AttentionPicture]:
    """A picture for each image: one pixel a patch, each map by its own largest weight."""
    return [
        AttentionPicture(picture(image), [[_draw_head(head) for head in layer] for layer in found.weights[:, i]])
        for i, image in enumerate(found.images)
    ]


def _draw_head(weights: Tensor) -> HeadPicture:
    weights = weights.double().cpu()
    total = weights.sum()
    share = weights / total.clamp_min(1e-300)
    spread = torch.special.entr(share).sum().exp()
    grey = (255 * weights / weights.max().clamp_min(1e-300)).round().to(torch.uint8)
    least, most = (float(share.aminmax()[i]) * weights.numel() for i in (0, 1))
    return HeadPicture(picture(grey[None]), float(total), float(spread), weights.numel(), least, most)
