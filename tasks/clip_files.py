"""Whole CLIPs from files, ours and open_clip's, and to open_clip.

What open_clip's own Vision Transformer can express is written in its layout: a class token, learned or fixed
positions, class-token or mean pooling; the bias of a patch embedding, which it has not, goes into the positions. Other
timm models are written for open_clip's timm tower. What is left is refused, and so is what open_clip would compute
differently.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tasks.clip import CLIP
from tasks.encoder_files import (
    FORMAT,
    checkpoint_path,
    config_from_dict,
    load_strictly,
    read_checkpoint,
    resize_positions,
)
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.open_clip_names import (
    CONFIG_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILES,
    State,
    described,
    is_open_clip,
    is_openai,
    our_names,
    text_config,
    their_name,
    weights,
)

_TRUNK = "encoder.trunk."
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
OPEN_CLIP_FILES = (WEIGHTS_FILES[0], CONFIG_FILE, VOCABULARY_FILE, _TOKENIZER_CONFIG_FILE)  # of an export


def load_clip(source: str | Path, *, image_size: int | None = None) -> CLIP:
    """A CLIP with its weights and tokenizer, on the CPU, in float32, in evaluation mode.

    Args:
        source: a CLIP run's directory, its checkpoint, or of open_clip: a folder with open_clip_config.json (as on the
            Hugging Face hub, or from `export_open_clip`), a state dict or a training checkpoint.
        image_size: side of the images it will see; the position table is resized. None: as it was trained.

    Raises:
        TaskError: nothing there, no CLIP, or keys that are missing or unexpected (all are listed).
    """
    path = checkpoint_path(source)
    content: Any = read_checkpoint(path)
    about = content.get("trivit") if isinstance(content, dict) else None
    if isinstance(about, dict):
        if about.get("objective") != "clip":
            raise TaskError(f"{source} was trained with {about.get('objective')}, not with CLIP: it knows no texts")
        config, settings = config_from_dict(about["encoder"], str(source)), dict(about["model"])
        state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    elif is_open_clip(content):
        theirs = weights(content)
        config, settings = described(theirs, Path(source), is_openai(content))
        state = our_names(theirs)
    else:
        raise TaskError(f"{source} holds no CLIP, neither of trivit nor of open_clip")
    text = text_config(settings.pop("text"))
    clip = CLIP(Encoder(config.at(image_size or config.image_size)), text, **settings)
    if image_size is not None and config.timm_name is None and config.positions != "rope":
        table = {"pos_embed": state[f"{_TRUNK}pos_embed"]}
        resize_positions(table, clip.encoder, config.image_size)
        state[f"{_TRUNK}pos_embed"] = table["pos_embed"]
    load_strictly(clip, state, str(source))
    return clip.eval()


def export_open_clip(clip: CLIP, folder: str | Path) -> None:
    """Writes a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads.

    A vocabulary other than CLIP's goes with it; open_clip needs the `transformers` package to read that.

    Raises:
        TaskError: open_clip has no place for what this CLIP is, or the folder cannot be written.
    """
    folder = Path(folder)
    config, state = _native(clip) if clip.encoder.config.timm_name is None else _timm(clip)
    state |= {f"text.{name}": value for name, value in clip.text.trunk.state_dict().items()}
    state["logit_scale"] = clip.logit_scale
    if clip.logit_bias is not None:
        state["logit_bias"] = clip.logit_bias
    _compare(clip, config, state)
    encoder = clip.encoder.config
    prepared = {"mean": list(encoder.mean), "std": list(encoder.std), "resize_mode": "shortest"}
    vocabulary = clip.text.tokenizer.content()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        told = {"model_cfg": config, "preprocess_cfg": prepared}
        if vocabulary is not None:
            pad = clip.text.tokenizer.word(clip.text.config.pad_id)
            (folder / VOCABULARY_FILE).write_text(vocabulary)
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}
            (folder / _TOKENIZER_CONFIG_FILE).write_text(json.dumps(about))
            config["text_cfg"]["hf_tokenizer_name"] = VOCABULARY_FILE  # not empty: open_clip looks into the folder
        metadata = {"format": "pt", "trivit": json.dumps({"format": FORMAT, "encoder": asdict(encoder)})}
        save_file({k: v.detach().contiguous() for k, v in state.items()}, folder / WEIGHTS_FILES[0], metadata)
        (folder / CONFIG_FILE).write_text(json.dumps(told, indent=1))
    except OSError as error:
        raise TaskError(f"cannot write {folder}: {error}") from error


@torch.no_grad()
def run_open_clip(folder: Path, images: Tensor, ids: Tensor) -> list[Tensor]:
    """Vectors of length 1 [b e] that open_clip's model of a folder gives images [b c h w] and texts [b t]."""
    from open_clip import create_model

    model = create_model(f"local-dir:{folder}").eval()
    return [model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True)]


def _config(clip: CLIP, vision: dict[str, Any], activation: str) -> dict[str, Any]:
    text = clip.text.config
    if text.activation != activation and "timm_model_name" not in vision:
        raise TaskError("open_clip has one activation for both towers, this CLIP has two")
    told = {
        "context_length": text.context_length, "vocab_size": clip.text.trunk.vocab_size, "width": text.width,
        "heads": text.heads, "layers": text.depth, "mlp_ratio": text.mlp_ratio, "no_causal_mask": not text.causal,
        "pool_type": "argmax" if text.pool == "end" else "last", "proj_bias": text.projection_bias,
        "pad_id": text.pad_id, "norm_kwargs": {"eps": text.norm_eps}, "tokenizer_kwargs": {"clean": text.clean},
    }  # fmt: skip
    config = {
        "embed_dim": clip.settings()["joint_width"], "quick_gelu": text.activation == "quick_gelu",
        "custom_text": True, "vision_cfg": vision, "text_cfg": told,
    }  # fmt: skip
    return config | ({} if clip.logit_bias is None else {"init_logit_bias": -10.0})


def _native(clip: CLIP) -> tuple[dict[str, Any], State]:
    config, trunk = clip.encoder.config, clip.encoder.trunk
    problems = {
        "no class token": not config.class_token, "registers": config.registers > 0,
        "rotary positions": config.positions == "rope", "attention pooling": clip._attends,
        f"pooling {config.pool}": config.pool == "cls+mean", f"{config.in_chans} channels": config.in_chans != 3,
    }  # fmt: skip
    if wrong := [problem for problem, there in problems.items() if there]:
        raise TaskError(f"open_clip's Vision Transformer cannot express {', '.join(wrong)}")
    width, depth, heads = config.size
    vision = {
        "image_size": config.image_size, "layers": depth, "width": width, "head_width": width // heads,
        "patch_size": config.patch_size, "mlp_ratio": config.mlp_ratio, "ls_init_value": config.layer_scale,
        "no_ln_pre": not config.pre_norm, "pool_type": "tok" if config.pool == "cls" else "avg",
        "norm_kwargs": {"eps": config.norm_eps},
    }  # fmt: skip
    own = trunk.state_dict()
    positions = own.pop("pos_embed")[0].clone()
    bias = own.pop("patch_embed.proj.bias", None)
    if bias is not None:
        positions[1:] += bias
    state = {
        "visual.class_embedding": own.pop("cls_token").flatten(), "visual.positional_embedding": positions,
        "visual.conv1.weight": own.pop("patch_embed.proj.weight"),
        "visual.proj": clip.image_head.weight.t(),  # type: ignore[operator]
    }  # fmt: skip
    norms = {"norm_pre.": "ln_pre.", "norm.": "ln_post."}
    for name, value in own.items():
        norm = next((new + name.removeprefix(old) for old, new in norms.items() if name.startswith(old)), None)
        state[f"visual.{norm or their_name(name)}"] = value
    if not config.qkv_bias:
        zeros = {f"visual.transformer.resblocks.{i}.attn.in_proj_bias": torch.zeros(3 * width) for i in range(depth)}
        state |= zeros
    return _config(clip, vision, config.activation), state


def _timm(clip: CLIP) -> tuple[dict[str, Any], State]:
    config, attends = clip.encoder.config, clip._attends
    pools = {"cls": "token", "mean": "avg"}
    if not attends and config.pool not in pools:
        raise TaskError(f"open_clip's timm tower cannot express pooling {config.pool}")
    vision = {
        "timm_model_name": config.timm_name, "timm_model_pretrained": False, "image_size": config.image_size,
        "timm_pool": "map" if attends else pools[config.pool], "timm_proj": "none" if attends else "linear",
    }  # fmt: skip
    state = {f"visual.trunk.{name}": value for name, value in clip.encoder.trunk.state_dict().items()}
    head = "visual.trunk.attn_pool." if attends else "visual.head.proj."
    state |= {f"{head}{name}": value for name, value in clip.image_head.state_dict().items()}
    return _config(clip, vision, "gelu"), state


@torch.no_grad()
def _compare(clip: CLIP, config: dict[str, Any], state: State) -> None:
    """TaskError unless open_clip's model of that config takes the state and says the same about an image and a text."""
    from open_clip.model import CustomTextCLIP

    known = {key: value for key, value in config.items() if key != "custom_text"}
    try:
        theirs: Any = CustomTextCLIP(**known).eval()
        theirs.load_state_dict(state)
    except Exception as error:  # timm and torch each have their own
        reason = (str(error).strip() or type(error).__name__).splitlines()
        raise TaskError(f"open_clip cannot hold this CLIP: {' '.join(line.strip() for line in reason[:2])}") from error
    encoder, training = clip.encoder.config, clip.training
    side, draw = encoder.image_size, torch.Generator().manual_seed(0)
    images = torch.randn(2, encoder.in_chans, side, side, generator=draw)
    ids = torch.randint(clip.text.trunk.vocab_size, (2, clip.text.config.context_length), generator=draw)
    clip.eval()
    pairs: list[tuple[Tensor, Tensor]] = [
        (clip.encode_image(images), theirs.encode_image(images, normalize=True)),
        (clip.encode_text(ids), theirs.encode_text(ids, normalize=True)),
    ]
    clip.train(training)
    if any((ours - other).abs().max() > 1e-4 for ours, other in pairs):
        raise TaskError("open_clip computes something else from these weights: it cannot hold this CLIP")
