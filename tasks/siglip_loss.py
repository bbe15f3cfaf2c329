"""SigLIP's loss over all ranks (Zhai et al. 2023, arXiv:2303.15343, eq. 1 and section 3.3).

Axes: b = pairs on this rank, r = rows of a block, w = ranks, e = joint width.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.clip_loss import at_least_float32
from tasks.collectives import rank, world_size

BLOCK = 2**22  # logits that exist at a time: 16 MiB in float32


class SigLIPLoss(nn.Module):
    """Sum over all pairs of an image and a text of -log sigmoid(z * logit), z = 1 if they belong together, else -1.

    Texts travel around the ring of ranks and take with them what each rank adds to their gradient, until they are at
    home again. A rank holds its own pairs, one visitor and one block of logits: its memory does not depend on the
    number of ranks, nor the logits' on the batch. Divided by the local batch, so that the mean over ranks is the whole
    batch's.

    The gradient is computed together with the loss. Ranks must scale their losses alike before the backward pass, as
    DDP needs anyway.
    """

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """Collective in the forward pass only: this rank's share of the loss, float32 or better.

        Args:
            image: of length 1, [b e], with the same b on all ranks.
            text: likewise, row i belongs to image i.
            scale: factor on the cosines (the inverse temperature), scalar.
            bias: added to the logits, scalar.
        """
        with torch.autocast(image.device.type, enabled=False):
            image, text, scale, bias = (at_least_float32(tensor) for tensor in (image, text, scale, bias))
            return _SigLIPLoss.apply(image, text, scale, bias)  # type: ignore[no-any-return]


class _SigLIPLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        loss = torch.zeros_like(scale)
        d_image, d_scale, d_bias = torch.zeros_like(image), torch.zeros_like(scale), torch.zeros_like(bias)
        visitor = torch.stack([text, torch.zeros_like(text)])  # features, and the gradient that they have met so far
        rows = max(1, BLOCK // len(text))
        for hop in range(world_size()):
            there, d_there = visitor.unbind()
            for start in range(0, len(image), rows):
                here = image[start : start + rows]
                cosines = here @ there.T
                signed = cosines * scale + bias
                ours = signed.diagonal(start) if hop == 0 else signed[:0, 0]  # of pairs that belong together
                signed.neg_()
                ours.neg_()  # now z * logit everywhere
                loss -= F.logsigmoid(signed).sum()
                slope = signed.neg_().sigmoid_()  # d loss / d logit = -z * sigmoid(-z * logit)
                ours.neg_()
                d_image[start : start + rows].addmm_(slope, there)
                d_there.addmm_(slope.T, here)
                d_scale += (slope * cosines).sum()
                d_bias += slope.sum()
            visitor = _pass_on(visitor)
        b = len(image)
        ctx.save_for_backward(d_image * (scale / b), visitor[1] * (scale / b), d_scale / b, d_bias / b)
        return loss / b

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient * saved for saved in ctx.saved_tensors)


def _pass_on(tensor: Tensor) -> Tensor:
    """Collective: send to the next rank, receive from the one before."""
    if world_size() == 1:
        return tensor
    received = torch.empty_like(tensor)
    to, source = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    exchange = [dist.P2POp(dist.isend, tensor.contiguous(), to), dist.P2POp(dist.irecv, received, source)]
    for request in dist.batch_isend_irecv(exchange):
        request.wait()
    return received
