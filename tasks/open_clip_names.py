"""State dicts under open_clip's names (also OpenAI's): which model they describe, and what its parts are called here.

A native image tower keeps its parameters in a layout of its own; that of a timm model is timm's.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.encoder_config import SIZES, EncoderConfig
from tasks.errors import TaskError
from tasks.text_tower import TextConfig

State = dict[str, Tensor]

CONFIG_FILE = "open_clip_config.json"
VOCABULARY_FILE = "tokenizer.json"  # beside it, where it is not CLIP's
WEIGHTS_FILES = (  # of a folder; ours is the first
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # of the heads of a native tower unless its config says otherwise

_BLOCK = {
    "ln_1.": "norm1.", "ln_2.": "norm2.", "attn.in_proj_": "attn.qkv.", "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.", "ls_1.": "ls1.", "ls_2.": "ls2.",
}  # fmt: skip
_VISUAL = {
    "class_embedding": "encoder.trunk.cls_token", "positional_embedding": "encoder.trunk.pos_embed",
    "conv1.weight": "encoder.trunk.patch_embed.proj.weight", "ln_pre.": "encoder.trunk.norm_pre.",
    "ln_post.": "encoder.trunk.norm.", "proj": "image_head.weight",
}  # fmt: skip
_TIMM = {"trunk.attn_pool.": "image_head.", "trunk.": "encoder.trunk.", "head.proj.": "image_head."}
_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
# What a config may say; anything else that is not left at its default describes a tower that is not built here.
_VISION_KEYS = {
    "image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "ls_init_value", "no_ln_pre",
    "pool_type", "norm_kwargs", "patch_dropout", "pos_embed_type", "timm_model_name", "timm_model_pretrained",
    "timm_pool", "timm_proj", "timm_drop", "timm_drop_path",
}  # fmt: skip
_TEXT_KEYS = {
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id", "no_causal_mask",
    "pool_type", "proj_bias", "norm_kwargs", "hf_tokenizer_name", "tokenizer_kwargs",
}  # fmt: skip
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's files


def is_open_clip(content: Any) -> bool:
    """Whether what torch.load or safetensors gave is a CLIP of open_clip, perhaps inside a training checkpoint."""
    state = weights(content)
    return "logit_scale" in state and any(name.startswith("visual.") for name in state)


def weights(content: Any) -> State:
    """The state dict in a file's content; empty where there is none."""
    state = _state(content)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in _NOT_WEIGHTS}


def is_openai(content: Any) -> bool:
    """Whether it is one of OpenAI's own files, whose towers have QuickGELU: three numbers lie among the weights."""
    return any(name in _state(content) for name in _NOT_WEIGHTS)


def _state(content: Any) -> dict[str, Any]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        return {}
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def our_names(state: State) -> State:
    """A state dict of open_clip -> of `CLIP`; shapes change where the layouts differ, numbers never."""
    ours = {}
    for name, value in state.items():
        new = _our_name(name)
        if new.endswith("cls_token"):
            value = value.reshape(1, 1, -1)
        elif new.endswith("trunk.pos_embed") and value.ndim == 2:
            value = value[None]
        elif name == "visual.proj":
            value = value.t()
        elif name in ("logit_scale", "logit_bias"):
            value = value.reshape(())
        ours[new] = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if "visual.conv1.weight" in state and "visual.ln_pre.weight" not in state:  # open_clip has no bias there at all
        ours["encoder.trunk.patch_embed.proj.bias"] = torch.zeros(len(state["visual.conv1.weight"]))
    return ours


def their_name(name: str) -> str:
    """A parameter of a native tower's block or norm here -> in open_clip."""
    for theirs, ours in _BLOCK.items():
        name = name.replace(ours, theirs)
    return name.replace("blocks.", "transformer.resblocks.")


def _our_name(name: str) -> str:
    if not name.startswith("visual."):
        bare = name.removeprefix("text.")
        return f"text.trunk.{bare}" if bare.startswith(_TEXT) else name
    bare = name.removeprefix("visual.")
    if block := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", bare):
        inner = block[2]
        for theirs, ours in _BLOCK.items():
            if inner.startswith(theirs):
                return f"encoder.trunk.blocks.{block[1]}.{ours}{inner.removeprefix(theirs)}"
    for theirs, ours in (_TIMM if bare.startswith(("trunk.", "head.")) else _VISUAL).items():
        if bare == theirs or (theirs.endswith(".") and bare.startswith(theirs)):
            return ours + bare.removeprefix(theirs)
    return name


def described(state: State, source: Path, openai: bool = False) -> tuple[EncoderConfig, dict[str, Any]]:
    """The encoder, and the further arguments of `CLIP`, that a folder's config or else the shapes of a state dict tell.

    Shapes do not tell the number of heads, the activation and the image statistics: without a config there are 64
    channels to a head (or as many as published), exact GELU (QuickGELU in OpenAI's files), and OpenAI's statistics.
    Images are resized to the encoder's size before the crop, as open_clip does.

    Raises:
        TaskError: a tower that cannot be built here.
    """
    told = _read_config(source)
    model = told.get("model_cfg", {})
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    prepared = told.get("preprocess_cfg", {})
    statistics: dict[str, Any] = {
        "mean": tuple(prepared.get("mean", CLIP_MEAN)),
        "std": tuple(prepared.get("std", CLIP_STD)),
    }
    quick = "quick_gelu" if model.get("quick_gelu", openai) else "gelu"
    unknown = [f"vision {key}" for key, value in vision.items() if value and key not in _VISION_KEYS]
    unknown += [f"text {key}" for key, value in text.items() if value and key not in _TEXT_KEYS]
    unknown += [f"tokenizer {key}" for key in text.get("tokenizer_kwargs") or {} if key != "clean"]
    unknown += [f"{key} {tower[key]}" for tower, key, known in (
        (vision, "pool_type", ("tok", "avg")), (text, "pool_type", ("argmax", "last")),
        (vision, "timm_pool", ("token", "avg", "map")), (vision, "timm_proj", ("linear", "none")),
    ) if tower.get(key, known[0]) not in known]  # fmt: skip
    if unknown or "token_embedding.weight" not in {name.removeprefix("text.") for name in state}:
        raise TaskError(f"{source} has a tower that trivit cannot build: {', '.join(unknown) or 'of transformers'}")
    if "timm_model_name" in vision:
        encoder = EncoderConfig(
            arch=f"timm:{vision['timm_model_name']}", image_size=int(vision.get("image_size", 224)),
            pool="cls" if vision.get("timm_pool") == "token" else "mean", **statistics,
        )  # fmt: skip
    elif "visual.conv1.weight" in state and "visual.class_embedding" in state:
        encoder = _native(state, vision, quick, statistics)
    else:
        raise TaskError(f"{source} has no Vision Transformer of open_clip's own, and no {CONFIG_FILE} beside it")
    settings = {
        "text": _text(state, text, quick, source),
        "joint_width": _joint_width(state),
        "loss": "sigmoid" if "logit_bias" in state else "softmax",
        "image_head": "map" if vision.get("timm_pool") == "map" else "linear",
    }
    return replace(encoder, eval_resize=encoder.image_size), settings


def _native(state: State, vision: dict[str, Any], activation: Any, statistics: Any) -> EncoderConfig:
    width, in_chans, patch_size, _ = state["visual.conv1.weight"].shape
    depth = _depth(state, "visual.transformer.resblocks.")
    arch = next((name for name, size in SIZES.items() if size[:2] == (width, depth)), None)
    side = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    if "head_width" in vision or arch is None:
        heads = width // vision.get("head_width", HEAD_WIDTH)
    else:
        heads = SIZES[arch].heads
    gain = state.get("visual.transformer.resblocks.0.ls_1.gamma")  # the config asks for its first value, which is past
    return EncoderConfig(
        arch=arch or "vit_base", image_size=side * patch_size, patch_size=patch_size, width=width, depth=depth,
        heads=heads, mlp_ratio=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        in_chans=in_chans, positions="learned", position_resize="open_clip",
        layer_scale=None if gain is None else 1.0,
        norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5), pre_norm="visual.ln_pre.weight" in state,
        activation=activation, pool="mean" if vision.get("pool_type") == "avg" else "cls", **statistics,
    )  # fmt: skip


def _text(state: State, told: dict[str, Any], activation: Any, source: Path) -> dict[str, Any]:
    bare = {name.removeprefix("text."): value for name, value in state.items() if not name.startswith("visual.")}
    vocab_size, width = bare["token_embedding.weight"].shape
    named = told.get("hf_tokenizer_name")
    beside = source / VOCABULARY_FILE
    return {
        "tokenizer": "clip" if not named else str(beside) if beside.is_file() else f"hf-hub:{named}",
        "context_length": len(bare["positional_embedding"]),
        "clean": (told.get("tokenizer_kwargs") or {}).get("clean", "whitespace" if named else "lower"),
        # SigLIP's tokenizers pad with the id of the end, which their configs do not say
        "pad_id": told.get("pad_id", 1 if named and told.get("pool_type") == "last" else 0),
        "vocab_size": vocab_size, "width": width, "depth": _depth(bare, "transformer.resblocks."),
        "heads": told.get("heads", max(1, width // HEAD_WIDTH)),
        "mlp_ratio": bare["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        "causal": not told.get("no_causal_mask", False), "pool": "last" if told.get("pool_type") == "last" else "end",
        "projection_bias": "text_projection.bias" in bare,
        "norm_eps": (told.get("norm_kwargs") or {}).get("eps", 1e-5), "activation": activation,
    }  # fmt: skip


def text_config(values: dict[str, Any]) -> TextConfig:
    """The config that asdict made plain; TaskError for fields that this version does not know."""
    try:
        return TextConfig(**values)
    except TypeError as error:
        raise TaskError(f"written by another version of trivit: {error}") from error


def _joint_width(state: State) -> int:
    bare = {name.removeprefix("text."): value for name, value in state.items()}
    linear = bare.get("text_projection.weight")
    return int(linear.shape[0]) if linear is not None else int(bare["text_projection"].shape[1])


def _depth(state: State, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _read_config(source: Path) -> dict[str, Any]:
    path = (source if source.is_dir() else source.parent) / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except ValueError as error:
        raise TaskError(f"{path} is damaged: {error}") from error
