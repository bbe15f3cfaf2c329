"""An encoder as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads: config and weights.

The weights are those of `save_encoder`, whose names are timm's already; the config says which of timm's models they
belong to, how it pools, and which pixels it was trained on. Images of another size: timm stretches a position table in
open_clip's manner.
"""

import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import TIMM_CONFIG_FILE, TIMM_WEIGHTS_FILE, save_encoder
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.timm_models import map_tokens

POOLS = {"cls": "token", "mean": "avg"}
# A config cannot tell a norm's epsilon, but timm's models differ in theirs; all other sizes it can tell.
_BY_SIZE = {
    "vit_tiny": "vit_tiny_patch16_224", "vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224", "vit_huge": "vit_huge_patch14_224",
}  # fmt: skip
_OF_CLIP = "vit_base_patch16_clip_224"


def write_timm(encoder: Encoder, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors` into a folder, which is made.

    Raises:
        TaskError: timm's models cannot express this encoder, or the folder cannot be written.
    """
    about = timm_config(encoder)
    try:
        folder.mkdir(exist_ok=True)
        (folder / TIMM_CONFIG_FILE).write_text(json.dumps(about, indent=1))
    except OSError as error:
        raise TaskError(f"cannot write {folder}: {error}") from error
    save_encoder(encoder, folder / TIMM_WEIGHTS_FILE)


@torch.no_grad()
def run_timm(folder: Path, images: Tensor) -> list[Tensor]:
    """What timm's model of a folder says about normalised images [b c h w]: features [b f], patch tokens [b n d]."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return [model(images), map_tokens(model.forward_features(images), model)[1]]


def timm_config(encoder: Encoder) -> dict[str, Any]:
    """The content of config.json; TaskError for what timm cannot express, all of it in one line."""
    config, trunk = encoder.config, encoder.trunk
    if config.pool not in POOLS:
        raise TaskError(f"timm cannot pool {config.pool}: take --format safetensors or onnx")
    own = config.timm_name is None
    if own:
        architecture, arguments = _vit(config)
        known: dict[str, Any] = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
    else:
        architecture, arguments = trunk.pretrained_cfg["architecture"], _arguments(config, trunk)
        kept = ("fixed_input_size", "first_conv", "classifier")
        known = {key: trunk.pretrained_cfg[key] for key in kept if key in trunk.pretrained_cfg}
    return {
        "architecture": architecture, "num_classes": 0, "num_features": trunk.num_features,
        "global_pool": POOLS[config.pool], "model_args": arguments,
        "pretrained_cfg": known | {
            "input_size": [config.in_chans, config.image_size, config.image_size], "num_classes": 0,
            "mean": list(config.mean), "std": list(config.std), "interpolation": "bicubic",
            "crop_pct": crop_share(config), "crop_mode": "center", "custom_load": False,
        },
    }  # fmt: skip


def crop_share(config: EncoderConfig) -> float:
    """timm's crop_pct: it resizes the shorter side to floor(image_size / crop_pct), which must be our `resize`."""
    share = config.image_size / config.resize
    if math.floor(config.image_size / share) == config.resize:
        return share
    return config.image_size / (config.resize + 0.5)


def _vit(config: EncoderConfig) -> tuple[str, dict[str, Any]]:
    """timm's model and its arguments for a Vision Transformer of ours."""
    problems = {
        "rotary positions": config.positions == "rope",
        f"norm_eps {config.norm_eps:g}": config.norm_eps not in (1e-5, 1e-6),
    }
    if wrong := [problem for problem, there in problems.items() if there]:
        raise TaskError(
            f"timm's Vision Transformer cannot express {', '.join(wrong)}: take --format safetensors or onnx"
        )
    width, depth, heads = config.size
    arguments: dict[str, Any] = {
        "img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.in_chans,
        "embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias, "class_token": config.class_token, "reg_tokens": config.registers,
        "no_embed_class": config.registers > 0, "pre_norm": config.pre_norm, "act_layer": config.activation,
        "global_pool": POOLS[config.pool], "fc_norm": False,
    }  # fmt: skip
    if config.layer_scale is not None:
        arguments["init_values"] = config.layer_scale
    return (_BY_SIZE[config.arch] if config.norm_eps == 1e-6 else _OF_CLIP), arguments


def _arguments(config: EncoderConfig, trunk: Any) -> dict[str, Any]:
    """What a model of timm's must be told to see images of our size, to pool so, and to keep its last norm in place."""
    pool = POOLS[config.pool]
    arguments: dict[str, Any] = {}
    if getattr(getattr(trunk, "patch_embed", None), "img_size", None) is not None:
        arguments["img_size"] = config.image_size
    if getattr(trunk, "global_pool", pool) != pool:
        arguments["global_pool"] = pool
        if isinstance(trunk, VisionTransformer):  # another pooling would move the norm
            arguments["fc_norm"] = not isinstance(trunk.fc_norm, nn.Identity)
    if getattr(trunk, "pool_include_prefix", False):
        arguments["pool_include_prefix"] = False
    return arguments
