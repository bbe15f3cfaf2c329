"""Weights of another run to start from: taken over only where the model here computes with them what it did there.

Names and shapes do not tell heads, activations, epsilons, image statistics or a vocabulary: those are compared, and
what differs is said with the options that make it the same. What a run may choose anew is not compared: image size (the
position table is resized in its authors' manner), how positions are stretched later, drop path, pooling of an encoder.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import nn

from tasks.clip import CLIP
from tasks.clip_files import load_clip
from tasks.dino import DINO
from tasks.dino_files import fill_dino, read_dino
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import config_from_dict, load_encoder, load_strictly
from tasks.encoders import Encoder
from tasks.errors import TaskError

_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
_STATISTICS_DIFFER = 1e-4  # published means are rounded to more digits than this


class Difference(NamedTuple):
    """A setting, its value in the file and here, and the option that makes the run like the file."""

    name: str
    theirs: Any
    ours: Any
    option: str


def take_encoder(own: Encoder, source: str) -> None:
    """Fills an encoder with the weights of another one.

    Args:
        own: of the run.
        source: whatever `load_encoder` takes; its position table is resized to the images of the run.

    Raises:
        TaskError: nothing there, or an encoder that computes something else; says what differs and what to set.
    """
    what, size = f"init_encoder {source}", own.config.image_size

    def compare(given: Encoder) -> None:
        refuse(what, encoder_differences(given, own))

    try:
        given = load_encoder(source, image_size=size)
    except TaskError:
        # Its patches may not divide these images, or only the run knows the heads of a file.
        heads = own.config.size.heads if own.config.timm_name is None else None
        compare(load_encoder(source, heads=heads))
        given = load_encoder(source, image_size=size, heads=heads)
    compare(given)
    load_strictly(own.trunk, given.trunk.state_dict(), what)


def take_clip(own: CLIP, source: str) -> None:
    """Fills a whole CLIP with the weights of another one.

    Args:
        own: of the run.
        source: whatever `load_clip` takes; its position table is resized to the images of the run.

    Raises:
        TaskError: nothing there, no CLIP, or one that computes something else; says what differs and what to set.
    """
    what = f"init_checkpoint {source}"
    try:
        given = load_clip(source, image_size=own.encoder.config.image_size)
    except TaskError:
        refuse(what, clip_differences(load_clip(source), own))
        raise
    refuse(what, clip_differences(given, own))
    load_strictly(own, given.state_dict(), what)


def take_dino(own: DINO, settings: Mapping[str, Any], source: str) -> None:
    """Fills student, teacher, heads and centres from another DINO.

    Args:
        own: of the run.
        settings: its arguments besides the encoder, as `DINOTask.model_settings` has them.
        source: whatever `read_dino` takes. The authors' files do not tell heads: they are taken for the run's.

    Raises:
        TaskError: nothing there, no whole DINO, or one that computes something else.
    """
    about, state = read_dino(source)
    if about is not None:
        with torch.device("meta"):
            given = Encoder(config_from_dict(about["encoder"], source))
        found, theirs = encoder_differences(given, own.student.encoder), about["model"]
        sizes = given.config.image_size, own.student.encoder.config.image_size
        if sizes[0] != sizes[1]:  # both branches and the centre are of one size; nothing is stretched here
            found.append(Difference("image_size", sizes[0], sizes[1], f"--data.recipe.crop_size {sizes[0]}"))
        found += _fields("head", theirs["head"], settings["head"])
        if theirs["targets"] == "sinkhorn":  # whose file has no centre
            found += _fields("", {"targets": "sinkhorn"}, settings)
        patches = [_patch_head(each["ibot"]) for each in (theirs, settings)]
        starts = theirs["ibot"] is None and settings["ibot"] is not None and settings["ibot"]["head"] is None
        if patches[0].name != patches[1].name and not starts:
            found.append(Difference("ibot", patches[0].name, patches[1].name, patches[0].option))
        refuse(f"init_checkpoint {source}", found)
    fill_dino(own, state, source)


def encoder_differences(given: Encoder, own: Encoder) -> list[Difference]:
    """What decides about the features of an image, besides the weights, and is not the same in two encoders."""
    theirs, ours = _described(given), _described(own)
    if theirs.keys() != ours.keys() or (own.config.timm_name is not None and _shape(theirs) != _shape(ours)):
        sides = given.config.arch, own.config.arch
        sizes = ("width", "depth", "heads") if given.config.timm_name is not None else ()  # which its name tells
        given_here = [f" --model.encoder.{name} null" for name in sizes if getattr(own.config, name) is not None]
        return [Difference("arch", sides[0], sides[1], f"--model.encoder.arch {sides[0]}{''.join(given_here)}")]
    options: dict[str, Callable[[Any], str]] = {
        "in_chans": lambda value: f"--data.channels {value}",
        "mean": lambda value: f"--data.mean {_told(value)}",
        "std": lambda value: f"--data.std {_told(value)}",
    }
    return [
        Difference(name, value, ours[name], options.get(name, _encoder_option(name))(value))
        for name, value in theirs.items()
        if not _same(name, value, ours[name])
    ]


def clip_differences(given: CLIP, own: CLIP) -> list[Difference]:
    """What decides about the vectors of images and texts, besides the weights, and is not the same in two CLIPs."""
    found = encoder_differences(given.encoder, own.encoder)
    sides = given.settings(), own.settings()
    if sides[0]["image_head"] == "linear" == sides[1]["image_head"]:  # attention does not ask how tokens are pooled
        found += _fields("encoder", *({"pool": clip.encoder.config.pool} for clip in (given, own)))
    heads = [{name: side[name] for name in ("joint_width", "loss", "image_head")} for side in sides]
    found += _fields("", *heads)
    texts = [asdict(clip.text.config) | {"vocab_size": clip.text.trunk.vocab_size} for clip in (given, own)]
    names = [text.pop("tokenizer") for text in texts]
    if sides[0]["tokenizer_json"] != sides[1]["tokenizer_json"]:
        here = names[1] if names[0] != names[1] else f"{names[1]} with other words in it"
        found.append(Difference("text.tokenizer", names[0], here, f"--model.text.tokenizer {names[0]}"))
    return found + _fields("text", *texts)


def refuse(what: str, found: list[Difference]) -> None:
    """TaskError in one line when there are differences: each with both values, then the options to set."""
    if not found:
        return
    told = "; ".join(f"{each.name} is {_told(each.theirs)} there, {_told(each.ours)} here" for each in found)
    options = " ".join(dict.fromkeys(each.option for each in found))
    raise TaskError(f"{what} does not fit: {told}. To start from it set {options}")


def _described(encoder: Encoder) -> dict[str, Any]:
    """Fields of EncoderConfig as the model itself has them, timm's too, by name."""
    config, trunk = encoder.config, encoder.trunk
    shown: dict[str, Any] = {"in_chans": config.in_chans, "mean": config.mean, "std": config.std}
    block = trunk.blocks[0] if encoder.maskable else None
    if not isinstance(block, Block):  # of another family, or with two branches side by side: its name says it all
        return {"arch": str(config.timm_name).split(".")[0], **shown}
    activation = type(block.mlp.act).__name__
    return {
        "patch_size": config.patch_size,
        "width": trunk.embed_dim,
        "depth": len(trunk.blocks),
        "heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / trunk.embed_dim,
        "positions": "rope" if trunk.pos_embed is None else _positions(config),
        "class_token": trunk.cls_token is not None,
        "registers": trunk.num_reg_tokens,
        "layer_scale": None if isinstance(block.ls1, nn.Identity) else config.layer_scale or 1.0,
        "norm_eps": getattr(block.norm1, "eps", None),
        "qkv_bias": block.attn.qkv.bias is not None,
        "pre_norm": not isinstance(trunk.norm_pre, nn.Identity),
        "activation": _ACTIVATIONS.get(activation, activation),
        **shown,
    }


def _positions(config: EncoderConfig) -> str:
    return config.positions if config.timm_name is None else "learned"


def _shape(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a timm model's name decides."""
    return {name: value for name, value in fields.items() if name not in ("in_chans", "mean", "std", "layer_scale")}


def _same(name: str, theirs: Any, ours: Any) -> bool:
    if name in ("mean", "std"):
        pairs = zip(theirs, ours, strict=False)
        return len(theirs) == len(ours) and all(abs(a - b) < _STATISTICS_DIFFER for a, b in pairs)
    if name == "positions":  # a fixed table is as good a start for a learned one as any
        return bool(theirs == ours) or (theirs, ours) == ("sincos2d", "learned")
    if name == "layer_scale":  # its first value is past
        return (theirs is None) == (ours is None)
    return bool(theirs == ours)


def _encoder_option(name: str) -> Callable[[Any], str]:
    return lambda value: f"--model.encoder.{name} {_told(value)}"


def _fields(owner: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Difference]:
    """Plain fields of the same names that differ."""
    prefix = f"{owner}." if owner else ""
    return [
        Difference(f"{prefix}{name}", value, ours[name], f"--model.{prefix}{name} {_told(value)}")
        for name, value in theirs.items()
        if value != ours[name]
    ]


class _PatchHead(NamedTuple):
    name: str
    option: str


def _patch_head(ibot: Mapping[str, Any] | None) -> _PatchHead:
    """What iBOT adds to a DINO's parameters, and the option that makes a run have it."""
    if ibot is None:
        return _PatchHead("off", "--model.ibot null")
    if ibot["head"] is None:
        return _PatchHead("on, with the head of the class tokens", "--model.ibot.head null")
    sizes = ", ".join(f"{name}: {_told(value)}" for name, value in ibot["head"].items())
    return _PatchHead(f"on, with a head {{{sizes}}}", f'--model.ibot.head "{{{sizes}}}"')


def _told(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple | list):
        return f'"[{", ".join(map(str, value))}]"'
    return f"{value:g}" if isinstance(value, float) else str(value)
