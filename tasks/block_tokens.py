"""Tokens after each of the last blocks, for probes that look below the top.

Axes: b = images, c = channels, h w = pixels, t = all tokens, p = prefix tokens, n = patches, d = width.
"""

from typing import Any

import torch
from torch import Tensor

from tasks.encoders import Encoder, Tokens
from tasks.errors import TaskError


def last_block_tokens(encoder: Encoder, images: Tensor, count: int) -> list[Tokens]:
    """What the last `count` blocks give, each after the encoder's final norm, the last block last.

    Args:
        encoder: any for the last block; for more a plain Vision Transformer.
        images: normalised, [b c h w].
        count: of blocks.

    Raises:
        TaskError: the encoder has no such blocks.
    """
    if count == 1:
        return [encoder(images)]
    if not encoder.maskable or not 1 <= count <= len(encoder.blocks):
        raise TaskError(
            f"{encoder.config.arch} does not have {count} blocks whose tokens could be looked at: ask for the last one"
        )
    found: list[Tensor] = []

    def remember(_: Any, __: Any, output: Tensor) -> None:
        found.append(output)

    hooks = [block.register_forward_hook(remember) for block in encoder.blocks[-count:]]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = [encoder.trunk.norm(x) for x in found]
    return [Tokens(*torch.split(x, [encoder.num_prefix, x.shape[1] - encoder.num_prefix], dim=1)) for x in tokens]
