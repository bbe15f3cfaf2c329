"""How far, and how widely, each head of each layer looks: mean attention distance and entropy over depth.

Axes: l = layers, b = images, a = attention heads, t = tokens (prefix first), n = patches, c = channels, h w = pixels.
"""

import math
from collections.abc import Callable
from html import escape
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.attention import check_finite, one_by_one
from evaluation.patch_pca import patch_grid
from evaluation.svg import INK, SERIES, figure, to_svg
from tasks.attention_weights import visit_attention
from tasks.encoders import Encoder


class HeadNumbers(NamedTuple):
    """A number for each head of each layer, float64 [l a], and what attention that is even everywhere would give."""

    values: Tensor
    even: float


def attention_distance(encoder: Encoder, images: Tensor) -> HeadNumbers:
    """Mean distance in pixels from a patch to what it attends to (Dosovitskiy et al. 2021, arXiv:2010.11929, fig. 7).

    Distances between the middles of patches, weighted by attention, mean over patches and images. The class token,
    registers and a distillation token have no place: what goes to them and comes from them is left out.

    Args:
        encoder: in evaluation mode.
        images: [b c h w] in 0..255; one at a time goes through, for the sake of memory.

    Raises:
        TaskError: the encoder is no plain Vision Transformer.
        EvaluationError: its attention is not finite, or its patches lie in no grid.
    """
    distance = torch.zeros(0)

    def reach(weights: Tensor) -> Tensor:
        nonlocal distance
        among = weights[:, :, encoder.num_prefix :, encoder.num_prefix :]
        if not len(distance):
            distance = _distances(encoder, images, among.shape[-1]).to(among)
        return (among * distance).sum(-1) / among.sum(-1).clamp_min(torch.finfo(among.dtype).tiny)

    values = _mean_of_heads(encoder, images, reach)
    return HeadNumbers(values, float(distance.double().mean()))


def attention_entropy(encoder: Encoder, images: Tensor) -> HeadNumbers:
    """Mean entropy in nats of the attention of a token, all tokens as queries: from 0, one token alone, to ln(t).

    Arguments and errors are those of `attention_distance`.
    """
    tokens = 1

    def width(weights: Tensor) -> Tensor:
        nonlocal tokens
        tokens = weights.shape[-1]
        summands: Tensor = torch.special.entr(weights)
        return summands.sum(-1)

    values = _mean_of_heads(encoder, images, width)
    return HeadNumbers(values, math.log(tokens))


def draw_attention_distance(found: HeadNumbers) -> str:
    """A ring for each head, a line for their mean, layer by layer, as inline SVG; dashes: even attention."""
    return _draw(found, "Attention distance, pixels")


def draw_attention_entropy(found: HeadNumbers) -> str:
    """Entropy in the same manner; the dashes are at its ceiling, ln(t)."""
    return _draw(found, "Entropy of attention, nats")


def _mean_of_heads(encoder: Encoder, images: Tensor, number: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over images and queries of what `number` makes of weights [1 a t t] -> float64 [l a]."""
    found = []
    for image in one_by_one(encoder, images):
        layers: list[Tensor] = []
        visit_attention(encoder, image, _adder(layers, number))
        found.append(torch.stack(layers))
    values = torch.stack(found).mean(0)
    check_finite(values)
    return values


def _adder(layers: list[Tensor], number: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    return lambda weights: layers.append(number(weights).double().mean((0, 2)).cpu())


def _distances(encoder: Encoder, images: Tensor, count: int) -> Tensor:
    """Pixels between the middles of all pairs of patches [n n]."""
    rows, columns = patch_grid(encoder, images, count)
    height, width = (side / along for side, along in zip(images.shape[-2:], (rows, columns), strict=True))
    y, x = torch.meshgrid(torch.arange(rows) * height, torch.arange(columns) * width, indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], dim=1)
    found: Tensor = torch.linalg.vector_norm(place[:, None] - place[None], dim=-1)
    return found


def _draw(found: HeadNumbers, title: str) -> str:
    values, mean = found.values.tolist(), found.values.mean(1).tolist()
    depth = range(1, len(values) + 1)
    with figure(360, 215) as (drawing, axes):
        axes.axhline(found.even, color=INK, linewidth=1.2, linestyle=(0, (5, 3)))
        for head in zip(*values, strict=True):
            axes.plot(depth, head, linestyle="none", marker="o", markersize=5, markerfacecolor="none",
                      markeredgecolor=SERIES[0], markeredgewidth=1.3)  # fmt: skip
        axes.plot(depth, mean, color=SERIES[1])
        axes.set_ylim(0, 1.08 * max(found.even, float(found.values.max())))
        axes.set_xlim(0.5, len(values) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title, pad=10)
        axes.set_xlabel("layer")
        told = ", ".join(f"{each:.3g}" for each in mean)
        return to_svg(drawing, escape(f"{title}. Mean of the heads, layer by layer: {told}; even: {found.even:.3g}"))
