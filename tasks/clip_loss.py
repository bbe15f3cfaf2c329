"""CLIP's loss over all ranks (Radford et al. 2021, arXiv:2103.00020, figure 3; InfoNCE, arXiv:1807.03748, eq. 4).

Axes: b = pairs on this rank, w = ranks, B = w * b, e = joint width.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.collectives import rank, world_size


class CLIPLoss(nn.Module):
    """Mean of two cross-entropies: each image among all texts, each text among all images.

    A rank computes the logits of its own b rows and columns only, 2 [b B], and the gradient flows to the features of
    all ranks. So the mean over ranks of what the ranks return, and of their parameters' gradients, which is what DDP
    takes, are those of one process with the whole batch.
    """

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """Collective, also in the backward pass: this rank's share of the loss, float32 or better.

        Args:
            image: of length 1, [b e], with the same b on all ranks.
            text: likewise, row i belongs to image i.
            scale: factor on the cosines (the inverse temperature), scalar.
        """
        with torch.autocast(image.device.type, enabled=False):
            image, text, scale = (at_least_float32(tensor) for tensor in (image, text, scale))
            everything = all_rows(torch.cat([image, text], dim=1))  # one message instead of two
            images, texts = everything.chunk(2, dim=1)
            own = torch.arange(len(image), device=image.device) + rank() * len(image)
            of_images = F.cross_entropy(scale * image @ texts.T, own)
            of_texts = F.cross_entropy(scale * text @ images.T, own)
            return (of_images + of_texts) / 2


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is that already: 16 bits are too coarse for a softmax over a batch."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def all_rows(rows: Tensor) -> Tensor:
    """Collective, also in the backward pass: [b e] of every rank -> [B e] in the order of ranks, with gradients."""
    return rows if world_size() == 1 else _AllRows.apply(rows)


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """What all ranks want of this rank's rows, added up."""
        own = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own
