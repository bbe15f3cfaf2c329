"""What a masked autoencoder sees, and what it fills in.

Axes: b = images, c = channels, h w = pixels, n = patches, s = numbers of a patch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.contact_sheet import displayable
from datamodules.normalize import normalize
from evaluation.pictures import picture
from tasks.mae import MAE
from tasks.masks import random_noise

GREY = 127


class Reconstruction(NamedTuple):
    """The image, what the encoder saw (the rest grey), and that with these filled in; each as `displayable` gives."""

    image: Tensor
    masked: Tensor
    output: Tensor


@torch.inference_mode()
def reconstruct(mae: MAE, images: Tensor, seed: int = 0) -> Reconstruction:
    """Hide patches as in training (mask of a fixed seed per image) and fill them with the prediction.

    Images are [b c h w], uint8 or (of 16 bits) floating point in 0..255.

    With normalised targets (section 3.4 of arXiv:2111.06377) a prediction has lost the brightness and contrast of its
    patch; they are taken from the true patch, so only the structure inside of a patch is the model's own.
    """
    mae = mae.eval()
    config = mae.encoder.config
    x = normalize(images, config.mean, config.std)
    keys = torch.arange(len(x), dtype=torch.int64) + 1_000_003 * seed
    out = mae(x, random_noise(keys, mae.encoder.num_patches, "reconstruction").to(x.device))
    patches, pred, hidden = mae.patchify(x), out.pred.float(), out.mask[:, :, None].bool()
    if mae.norm_pix_loss:
        pred = pred * (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt() + patches.mean(dim=-1, keepdim=True)
    filled = _to_pixels(mae.unpatchify(torch.where(hidden, pred, patches)), config.mean, config.std)
    whole = mae.unpatchify(hidden.expand_as(patches).float()).bool()
    image = displayable(images)
    masked = torch.where(whole[:, : image.shape[1]], torch.full_like(image, GREY), image)
    return Reconstruction(image, masked, displayable(filled, like=images))


def draw_reconstructions(found: Reconstruction) -> list[list[tuple[str, str]]]:
    """For each image its three pictures as (name, data URI)."""
    names = ("input", "masked", "output")
    return [
        [(name, picture(part)) for name, part in zip(names, parts, strict=True)] for parts in zip(*found, strict=True)
    ]


def _to_pixels(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    offset, scale = (torch.tensor(v, device=x.device, dtype=x.dtype)[:, None, None] for v in (mean, std))
    return (x * scale + offset) * 255
