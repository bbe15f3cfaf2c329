"""The class token alone: DINO looks at nothing else of a Vision Transformer, so the last block can leave out the rest.

Axes: b = images, c = channels, h w = pixels, k = visible patches, t = tokens, d = width.
"""

import torch
from torch import Tensor

from tasks.encoders import Encoder


def answers_alone(encoder: Encoder) -> bool:
    """Whether `class_token` can be asked: our own ViT with a class token, whose block answers for single tokens."""
    config = encoder.config
    return config.timm_name is None and config.class_token and config.positions != "rope"


def class_token(encoder: Encoder, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """What `encoder(images, keep).prefix[:, 0]` is, [b d], for a sixth of the last block: one token attends to all.

    Args:
        encoder: one that `answers_alone`.
        images: normalised, [b c h w], of any size.
        keep: int64 [b k], the patches to show; None shows all.
    """
    trunk = encoder.trunk
    x = encoder._embed(images, keep, None, None)
    for block in trunk.blocks[:-1]:
        x = block(x)
    x = torch.cat([x[:, 1:], x[:, :1]], dim=1)  # a block answers for the last tokens; attention does not mind the order
    return trunk.norm(trunk.blocks[-1](x, None, 1))[:, 0]  # type: ignore[no-any-return]
