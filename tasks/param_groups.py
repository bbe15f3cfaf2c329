"""Which parameters an optimiser decays, and how fast each layer learns."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch.nn import Parameter

Named = Iterable[tuple[str, Parameter]]


def weight_decay_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: vectors and biases without decay, the rest with; frozen parameters are in neither.

    As in MAE's pretraining, class and mask tokens, which are [1 1 d], are decayed.

    Args:
        named: (name, parameter) pairs.
        weight_decay: of the second group.
    """
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    plain = [parameter for name, parameter in trained if parameter.ndim <= 1 or name.endswith(".bias")]
    spared = {id(parameter) for parameter in plain}
    decayed = [parameter for _, parameter in trained if id(parameter) not in spared]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def layer_decay_groups(
    named: Named,
    depth: int,
    weight_decay: float,
    layer_decay: float,
    no_decay: Collection[str] = ("cls_token", "pos_embed"),
) -> list[dict[str, Any]]:
    """Groups for fine-tuning: a layer's rate is layer_decay^(layers above it) times the rate of the head (BEiT, MAE).

    Layer 0 is the embedding, layer i + 1 block i, and all that follows is layer depth + 1 with scale 1. Vectors and
    `no_decay` are not decayed. Each group has params, lr_scale and weight_decay, in the order of first appearance.

    Args:
        named: (name, parameter) pairs with timm's names; a prefix before `blocks.`, as in `trunk.blocks.`, may stay.
        depth: number of blocks.
        weight_decay: of matrices.
        layer_decay: factor per layer, 1 for none.
        no_decay: names, without prefix, that are not decayed whatever their shape.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("trunk.")
        layer = _layer(name, depth)
        decays = parameter.ndim > 1 and name not in no_decay
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layer(name: str, depth: int) -> int:
    if name in ("cls_token", "reg_token", "pos_embed") or name.startswith(("patch_embed.", "norm_pre.")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1
