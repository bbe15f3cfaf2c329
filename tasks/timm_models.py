"""Any timm model as the trunk of an encoder: how to build it, and where it keeps what the encoder must know.

Axes: b = images, h w = rows and columns of a feature map, n = h * w, p = prefix tokens, d = width.
"""

import difflib
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
from timm.layers import LayerNorm2d, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tasks.encoder_config import EncoderConfig, Pool
from tasks.errors import TaskError

HUB_SECONDS = 3


def create_timm(name: str, *, image_size: int | None, pretrained: bool = False, **options: Any) -> Any:
    """The timm model without a classifier; for other image sizes too where its family can.

    Args:
        name: as timm.create_model takes it, `local-dir:/path` and `hf-hub:user/model` included.
        image_size: side of the training images in pixels; None: the model's own.
        pretrained: fetch timm's weights.
        options: further arguments of the model, such as drop_path_rate.

    Raises:
        TaskError: no such model, no such option, or weights that cannot be fetched.
    """
    size = {} if image_size is None else {"img_size": image_size}
    # Families differ in how they are told about the image size; convolutional ones need not be told.
    attempts = [{**size, "dynamic_img_size": True}, {**size, "strict_img_size": False}, size, {}]
    for attempt in attempts:
        try:
            with _no_waiting_for_a_hub() if pretrained else nullcontext():
                model = timm.create_model(name, pretrained=pretrained, num_classes=0, **attempt, **options)
        except TypeError as error:
            if attempt:
                continue
            raise TaskError(f"timm model {name} does not take {', '.join(options)}: {error}") from error
        except Exception as error:  # the hub, the network and the file system each have their own
            raise TaskError(_explain(name, error)) from error
        break
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool = None  # tokens are pooled here; parameters that never see a gradient would stop DDP
    if hasattr(getattr(model, "head", None), "fc1"):
        model.head = nn.Identity()  # what is left of a classifier with a hidden layer, whose norm is not of tokens
    return model


@contextmanager
def _no_waiting_for_a_hub() -> Iterator[None]:
    """Only weights that are here already, where the hub cannot be reached: it would be asked many times, in vain."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(url: str) -> bool:
    """Whether something listens there; taken for granted behind a proxy, which only the hub's own client can ask."""
    if getproxies():
        return True
    place = urlsplit(url)
    try:
        socket.create_connection((place.hostname, place.port or 443), HUB_SECONDS).close()
    except OSError:
        return False
    return True


def _explain(name: str, error: Exception) -> str:
    if "Unknown model" in str(error):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        return f"timm has no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        reason = "its weights are not on this machine, and the hub they come from cannot be reached"
    return f"timm cannot build {name!r}: {reason}"


def freeze_unused(trunk: Any, image_size: int, in_chans: int) -> None:
    """Parameters that no token depends on (layers before a classifier that is gone) get no gradient: DDP would wait.

    They are found on fake tensors, without computing anything.
    """
    trained = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
    if not trained:  # a teacher, or a locked encoder
        return
    training = trunk.training
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        image = torch.zeros(1, in_chans, image_size, image_size, dtype=trained[0].dtype, device=trained[0].device)
        try:
            tokens = torch.cat(map_tokens(trunk.eval().forward_features(image), trunk), dim=1)
            out = norm_pooled(trunk, tokens.mean(dim=1)).sum()
        except Exception:  # of an image size that does not fit, for one; whoever uses the encoder is told
            return
        finally:
            trunk.train(training)
        for parameter, gradient in zip(trained, torch.autograd.grad(out, trained, allow_unused=True), strict=True):
            parameter.requires_grad_(gradient is not None)


def is_maskable(trunk: Any) -> bool:
    """Whether single patches can be hidden: a plain ViT, whose patch embedding sees one patch at a time."""
    embed: Any = getattr(trunk, "patch_embed", None)
    return (
        type(trunk) is VisionTransformer
        and type(embed) is PatchEmbed
        and isinstance(embed.norm, nn.Identity)
        and embed.patch_size[0] == embed.patch_size[1]
    )


def measured_config(config: EncoderConfig, trunk: Any) -> EncoderConfig:
    """The config with what the timm model itself decides: patch size (its total stride), class token, resizing."""
    patch_size = trunk.patch_embed.patch_size[0] if is_maskable(trunk) else trunk.feature_info[-1]["reduction"]
    if is_maskable(trunk) and config.image_size % patch_size:
        raise TaskError(f"{config.arch} has patches of {patch_size}, they do not divide image_size {config.image_size}")
    class_token = _has_class_token(trunk)
    return replace(config, patch_size=patch_size, class_token=class_token, position_resize="open_clip")


def pretrained_config(name: str, model: Any, image_size: int | None) -> EncoderConfig:
    """The config of a model that timm.create_model gave, with the image statistics and crop it was trained with."""
    cfg = model.pretrained_cfg
    arch = cfg.get("architecture") or name
    tag = cfg.get("tag")
    side = image_size or cfg["input_size"][-1]
    class_token = _has_class_token(model)
    pool: Pool = "cls" if class_token and getattr(model, "global_pool", "") == "token" else "mean"
    return EncoderConfig(
        arch=f"timm:{arch}.{tag}" if tag and timm.is_model(arch) and ":" not in name else f"timm:{arch}",
        image_size=side,
        in_chans=cfg["input_size"][0],
        pool=pool,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        eval_resize=round(side / (cfg.get("crop_pct") or 0.875)),
    )


def num_prefix_tokens(trunk: Any) -> int:
    """Tokens that `forward_features` puts before the patches; VOLO does not say that it has one."""
    if isinstance(trunk, VOLO):
        return int(trunk.post_network is not None)
    return int(getattr(trunk, "num_prefix_tokens", 0))


def _has_class_token(trunk: Any) -> bool:
    """Whether one comes out in front: PiT gives nothing else, so that its class token is what it has for patches."""
    return getattr(trunk, "cls_token", None) is not None and num_prefix_tokens(trunk) > 0


def map_tokens(features: Any, trunk: Any) -> tuple[Tensor, Tensor]:
    """What `forward_features` of any family gave -> prefix [b p d], patches [b n d]; TaskError if unknown."""
    if not isinstance(features, Tensor):
        raise TaskError(f"timm model {type(trunk).__name__} gives no single feature map: take another")
    width, p = trunk.num_features, num_prefix_tokens(trunk)
    if features.ndim == 4:
        channels_last = getattr(trunk, "output_fmt", "") == "NHWC" or features.shape[1] != width
        features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        p = 0
    elif features.ndim == 2:
        features = features[:, None]
        p = 0
    return features[:, :p], features[:, p:]


def norm_pooled(trunk: Any, pooled: Tensor) -> Tensor:
    """Pooled tokens [b d] through the norm that some models apply after pooling instead of before."""
    for owner, name in ((trunk, "fc_norm"), (getattr(trunk, "head", None), "norm")):
        norm = getattr(owner, name, None)
        if isinstance(norm, LayerNorm2d):
            return norm(pooled[:, :, None, None]).flatten(1)  # type: ignore[no-any-return]
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            return norm(pooled)  # type: ignore[no-any-return]
    return pooled


def repeated_parts(trunk: nn.Module) -> list[nn.Module]:
    """The blocks of a model in order, stage by stage where it has stages; its children where neither is found."""
    for name in ("blocks", "stages", "layers"):
        stages = getattr(trunk, name, None)
        if isinstance(stages, nn.ModuleList | nn.Sequential):
            inner = [getattr(stage, "blocks", None) for stage in stages]
            return [
                block
                for stage, blocks in zip(stages, inner, strict=True)
                for block in (blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else [stage])
            ]
    return [child for child in trunk.children() if any(True for _ in child.parameters())]
