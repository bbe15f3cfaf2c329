"""State dicts under the names of the MAE and DINO authors: what they hold, and which encoder they describe."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from tasks.encoder_config import SIZES, EncoderConfig
from tasks.errors import TaskError

State = dict[str, Tensor]


def encoder_state(content: Any, source: str) -> tuple[State, Literal["mae", "dino"]]:
    """The encoder's part of an original file, under timm's names, and whose file it is.

    MAE: {"model": ...}, whose decoder is left out. DINO: {"teacher": ...} with its head left out, or a backbone alone.

    Args:
        content: what torch.load gave.
        source: the file, for messages.

    Raises:
        TaskError: it is neither.
    """
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        state = {k: v for k, v in content["model"].items() if not k.startswith("decoder_") and k != "mask_token"}
        return _tensors(state, source), "mae"
    if isinstance(content, Mapping) and isinstance(content.get("teacher"), Mapping):
        names = {k: k.removeprefix("module.").removeprefix("backbone.") for k in content["teacher"]}
        state = {names[k]: v for k, v in content["teacher"].items() if not names[k].startswith("head.")}
        return _tensors(state, source), "dino"
    if isinstance(content, Mapping) and "patch_embed.proj.weight" in content:
        return _tensors(dict(content), source), "dino"
    raise TaskError(f"{source} holds neither a trivit encoder nor a checkpoint of the MAE or DINO authors")


def _tensors(state: Mapping[str, Any], source: str) -> State:
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise TaskError(f"{source} has entries that are not tensors: {', '.join(strange[:5])}")
    return dict(state)


def encoder_config(state: State, author: Literal["mae", "dino"], source: str, heads: int | None) -> EncoderConfig:
    """The config that shapes tell; heads, which they do not, from the published sizes unless given.

    Raises:
        TaskError: a tensor that every such file has is missing or misshapen, or heads are unknown.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in state]:
        raise TaskError(f"{source} lacks {', '.join(missing)}")
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    if side * side != state["pos_embed"].shape[1] - 1:
        raise TaskError(f"{source} has a position table of {state['pos_embed'].shape[1]} rows, which is no square grid")
    arch = next((name for name, size in SIZES.items() if size[:2] == (width, depth)), None)
    if arch is None and heads is None:
        raise TaskError(f"{source} is {width} wide and {depth} deep, no published size: say how many heads it has")
    return EncoderConfig(
        arch=arch or "vit_base",
        image_size=side * patch_size,
        patch_size=patch_size,
        width=None if arch else width,
        depth=None if arch else depth,
        heads=heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        in_chans=in_chans,
        positions="sincos2d" if author == "mae" else "learned",
        position_resize=author,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        pool="mean" if author == "mae" else "cls",
    )


def mae_names(state: State) -> State:
    """The whole MAE under the authors' flat names -> under ours."""
    ours = ("decoder_", "mask_token")
    return {name if name.startswith(ours) else f"encoder.trunk.{name}": value for name, value in state.items()}
