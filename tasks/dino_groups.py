"""Parameter groups of DINO: who decays, and how fast each layer learns."""

import re
from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter


def dino_groups(
    named: Iterable[tuple[str, Parameter]],
    depth: int,
    weight_decay: float,
    layer_decay: float = 1.0,
    patch_embed_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of trained parameters with params, lr_scale, decays and weight_decay, in the order of first appearance.

    Vectors and biases do not decay. A layer's rate is layer_decay^(layers above it): tokens, positions and patch
    embedding are layer 0, block i is layer i + 1, and the final norm and the heads come last, with scale 1.

    Args:
        named: (name, parameter) pairs of a student `Branch`.
        depth: blocks of the encoder.
        weight_decay: of those that decay.
        layer_decay: 1 for none.
        patch_embed_lr_scale: further factor of the patch embedding.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** (depth + 1 - _layer(name, depth))
        if "patch_embed" in name:
            scale *= patch_embed_lr_scale
        decays = parameter.ndim > 1 and not name.endswith(".bias")
        empty = {"params": [], "lr_scale": scale, "decays": decays, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((scale, decays), empty)["params"].append(parameter)
    return list(groups.values())


def _layer(name: str, depth: int) -> int:
    if name == "mask_token" or re.match(r"encoder\.trunk\.(cls_token|reg_token|pos_embed|patch_embed\.)", name):
        return 0
    block = re.match(r"encoder\.trunk\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1
