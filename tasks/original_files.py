"""State dicts under the names of the MAE, DINO and DINOv2 authors: what they hold, and which encoder they describe."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from tasks.encoder_config import SIZES, EncoderConfig
from tasks.errors import TaskError

State = dict[str, Tensor]
Author = Literal["mae", "dino", "dinov2"]


def encoder_state(content: Any, source: str) -> tuple[State, Author]:
    """The encoder's part of an original file, under timm's names, and whose file it is.

    MAE: {"model": ...}, whose decoder is left out. DINO and DINOv2: {"teacher": ...} with its heads left out, or a
    backbone alone.

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
        heads = ("head.", "dino_head.", "ibot_head.")
        state = {names[k]: v for k, v in content["teacher"].items() if not names[k].startswith(heads)}
        return _of_dino(_tensors(state, source), source)
    if isinstance(content, Mapping) and "patch_embed.proj.weight" in content:
        return _of_dino(_tensors(dict(content), source), source)
    raise TaskError(f"{source} holds neither a trivit encoder nor a checkpoint of the MAE, DINO or DINOv2 authors")


def _of_dino(state: State, source: str) -> tuple[State, Author]:
    """DINOv2 has LayerScale; with registers the place of its class token becomes part of the token."""
    names = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): name for name in state}  # in chunks, from FSDP
    if "blocks.0.ls1.gamma" not in names:
        return state, "dino"
    if "blocks.0.mlp.w12.weight" in names:
        raise TaskError(f"{source} has SwiGLU blocks (DINOv2's giant): use timm:vit_giant_patch14_dinov2.lvd142m")
    state = {name: state[old] for name, old in names.items() if name != "mask_token"}
    if "register_tokens" in state and {"cls_token", "pos_embed"} <= state.keys():
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state, "dinov2"


def _tensors(state: Mapping[str, Any], source: str) -> State:
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise TaskError(f"{source} has entries that are not tensors: {', '.join(strange[:5])}")
    return dict(state)


def encoder_config(state: State, author: Author, source: str, heads: int | None) -> EncoderConfig:
    """The config that shapes tell; heads, which they do not, from the published sizes unless given.

    Raises:
        TaskError: a tensor that every such file has is missing or misshapen, or heads are unknown.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in state]:
        raise TaskError(f"{source} lacks {', '.join(missing)}")
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    places = state["pos_embed"].shape[1] - (registers == 0)
    side = math.isqrt(places)
    if side * side != places:
        raise TaskError(f"{source} has a position table of {state['pos_embed'].shape[1]} rows, which is no square grid")
    arch = next((name for name, size in SIZES.items() if size[:2] == (width, depth)), None)
    if arch is None and heads is None:
        raise TaskError(
            f"{source} is {width} wide and {depth} deep, no published size: read it with "
            "tasks.load_encoder(FILE, heads=N), and keep that with tasks.encoder_files.save_encoder"
        )
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
        # DINOv2 stretches as DINO does, but its models with registers without the shift and with antialiasing.
        position_resize="open_clip" if registers else "mae" if author == "mae" else "dino",
        registers=registers,
        layer_scale=1e-5 if author == "dinov2" else None,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        pool="mean" if author == "mae" else "cls",
    )


def mae_names(state: State) -> State:
    """The whole MAE under the authors' flat names -> under ours."""
    ours = ("decoder_", "mask_token")
    return {name if name.startswith(ours) else f"encoder.trunk.{name}": value for name, value in state.items()}
