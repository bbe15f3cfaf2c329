"""Encoders from and to files: a run, a Lightning checkpoint, safetensors, timm, open_clip, the MAE and DINO authors.

Nothing is unpickled beyond tensors, plain values and argparse.Namespace, and every key must find its place.
"""

import argparse
import hashlib
import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.open_clip_names import CONFIG_FILE, WEIGHTS_FILES, is_open_clip
from tasks.original_files import encoder_config, encoder_state
from tasks.positions import resize_table
from tasks.sharded_files import ABOUT, read_sharded, whole
from tasks.sharding import fill, is_sharded
from tasks.timm_models import create_timm, pretrained_config

FORMAT = 1
TIMM_CONFIG_FILE, TIMM_WEIGHTS_FILE = "config.json", "model.safetensors"  # of a folder that timm reads


def save_encoder(encoder: Encoder, path: str | Path) -> None:
    """Writes an encoder alone: timm's parameter names, the config as JSON metadata; aside first, then renamed."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise TaskError(f"cannot write {path}: the name of an exported encoder ends in .safetensors")
    if not path.parent.is_dir():
        raise TaskError(f"cannot write {path}: the folder {path.parent} does not exist")
    _save(encoder.trunk.state_dict(), {"format": FORMAT, "encoder": asdict(encoder.config)}, path)


def save_whole(source: str | Path, path: Path) -> None:
    """Writes all that was trained in a run as safetensors; what reads the run's checkpoint reads that, too.

    Raises:
        TaskError: the source is no run or checkpoint of trivit's, or the file cannot be written.
    """
    content = None if str(source).startswith("timm:") else read_checkpoint(checkpoint_path(source))
    if not isinstance(content, dict) or "trivit" not in content:
        raise TaskError(f"{source} is no run or checkpoint of trivit, so there is no more than an encoder to write")
    state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    _save(state, content["trivit"], path)


def _save(state: dict[str, Tensor], about: dict[str, Any], path: Path) -> None:
    metadata = {"trivit": json.dumps(about), "format": "pt"}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(state, aside, metadata)
        aside.replace(path)
    except (SafetensorError, OSError) as error:
        raise TaskError(f"cannot write {path}: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def load_encoder(source: str | Path, *, image_size: int | None = None, heads: int | None = None) -> Encoder:
    """An encoder with its weights, on the CPU, in float32, in evaluation mode.

    Args:
        source: a run's directory, a Lightning checkpoint (.ckpt), an export (.safetensors, or a folder for timm),
            `timm:NAME` (also `timm:hf-hub:...` and `timm:local-dir:...`), a file of the MAE, DINO or DINOv2 authors
            (.pth), or a CLIP of open_clip (see `tasks.clip_files.load_clip`).
        image_size: side of the images it will see; the position table is resized in the manner of its authors.
            None: as it was trained.
        heads: attention heads of an original file whose size is not a published one.

    Raises:
        TaskError: nothing there, not an encoder, or keys that are missing or unexpected (all are listed).
    """
    name = str(source)
    if (ours := _our_folder(name)) is not None:
        source = ours
    elif name.startswith("timm:"):
        return _from_timm(name.removeprefix("timm:"), image_size).eval()
    path = checkpoint_path(source)
    content = read_checkpoint(path)
    if is_open_clip(content):
        from tasks.clip_files import load_clip  # which stands on this file

        return load_clip(source, image_size=image_size).encoder
    if isinstance(content, dict) and "trivit" in content:
        config, state = _read_lightning(content, path)
    elif path.suffix == ".safetensors":
        config, state = _exported_config(read_metadata(path), path), content
    else:
        state, author = encoder_state(content, name)
        config = encoder_config(state, author, name, heads)
    trained_size = config.image_size
    config = config.at(image_size or trained_size)
    encoder = Encoder(config)
    if image_size is not None and config.timm_name is None and config.positions != "rope":
        resize_positions(state, encoder, trained_size)
    load_strictly(encoder.trunk, state, name)
    return encoder.eval()


def checkpoint_path(source: str | Path) -> Path:
    """The file that a run's directory, a folder for open_clip or timm, or a path means; TaskError if not there."""
    path = Path(source)
    if (path / CONFIG_FILE).is_file():
        return next((path / name for name in WEIGHTS_FILES if (path / name).is_file()), path / WEIGHTS_FILES[0])
    if (path / TIMM_CONFIG_FILE).is_file() and (path / TIMM_WEIGHTS_FILE).is_file():
        return path / TIMM_WEIGHTS_FILE
    if path.is_dir() and not (path / ABOUT).is_file():
        path = path / "checkpoints" / "last.ckpt"
        if not path.exists() and (state := path.with_name("non_finite.ckpt")).exists():
            raise TaskError(f"{source} ended with NaN before its first checkpoint; {state} is its state just before")
        if not path.exists():
            before = path.with_name("previous.ckpt")
            left = f"; the one before is {before}" if before.exists() else ""
            raise TaskError(f"{source} is no finished or running trivit run: it has no checkpoints/last.ckpt{left}")
    if not path.exists():
        raise TaskError(f"no such checkpoint: {source}")
    return path


def checkpoint_hash(source: str | Path) -> str:
    """The first 16 hex digits of the SHA-256 of a checkpoint's bytes, for a protocol; `timm:NAME`: of its weights."""
    if str(source).startswith("timm:"):
        return weights_hash(load_encoder(source))
    path = checkpoint_path(source)
    if path.is_dir():  # of a sharded model
        digests = [_sha256(file) for file in sorted(path.iterdir())]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    return _sha256(path)[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(module: nn.Module) -> str:
    """The first 16 hex digits of the SHA-256 of an encoder's config and weights, or of any module's weights."""
    digest = hashlib.sha256(repr(getattr(module, "config", None)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def read_checkpoint(path: Path) -> Any:
    """What torch saved: tensors, plain values and argparse.Namespace; TaskError for anything else.

    The tensors of a .safetensors; from `save_whole` in the form of the checkpoint that they came from.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        about = json.loads(metadata.get("trivit", "{}"))
        if "objective" not in about:
            return tensors
        return {"trivit": about, "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}}
    if path.suffix == ".onnx":
        raise TaskError(
            f"{path} is for ONNX Runtime alone: give the run, or an export to safetensors, timm or open_clip"
        )
    try:
        if path.is_dir():  # of a sharded model; its optimiser's state stays on the disk
            return {name: part if "optimizer" in name else whole(part) for name, part in read_sharded(path).items()}
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = "it is damaged or not a checkpoint"
        if path.with_name("previous.ckpt").exists() and path.name == "last.ckpt":
            reason += f"; the one before is {path.with_name('previous.ckpt')}"
        if "weights_only" in str(error) and "Unsupported" in str(error):
            reason = "it holds Python objects besides tensors, which could run code"
        raise TaskError(f"cannot read {path}: {reason}") from error


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads a state dict whose keys and shapes must be the module's; TaskError lists what is not."""
    own = module.state_dict()
    wrong = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    if any(wrong.values()):
        parts = [f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
        raise TaskError(f"{source} does not fit; keys {'; '.join(parts)}")
    if is_sharded(module):
        for name, tensor in own.items():
            fill(tensor, state[name])
    else:
        module.load_state_dict(state)


def config_from_dict(values: dict[str, Any], source: str) -> EncoderConfig:
    """The config that asdict, JSON or YAML made plain; TaskError for fields that this version does not know."""
    try:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return EncoderConfig(**values)
    except TypeError as error:
        raise TaskError(f"{source} was written by another version of trivit: {error}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; TaskError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise TaskError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot read {path}: {error.strerror or error}"
    return f"cannot read {path}: it is damaged, cut off, or no safetensors file; export or download it anew ({error})"


def read_metadata(path: Path) -> dict[str, str]:
    """What a .safetensors says about itself; TaskError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TaskError(_unreadable(path, error)) from error


def _exported_config(metadata: dict[str, str], path: Path) -> EncoderConfig:
    if "trivit" not in metadata:
        raise TaskError(f"{path} was not written by trivit: it does not say which encoder it holds")
    return config_from_dict(json.loads(metadata["trivit"])["encoder"], str(path))


def _read_lightning(content: dict[str, Any], path: Path) -> tuple[EncoderConfig, dict[str, Tensor]]:
    about = content["trivit"]
    if not isinstance(about, dict) or not {"encoder", "encoder_prefix"} <= about.keys():
        raise TaskError(f"{path} does not say which encoder it holds: it is damaged, or of another version of trivit")
    prefix = f"{about['encoder_prefix']}trunk."
    state = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    return config_from_dict(about["encoder"], str(path)), state


def _our_folder(name: str) -> Path | None:
    """The weights in FOLDER of `timm:local-dir:FOLDER` if trivit wrote them: they say more than timm can tell."""
    weights = Path(name.removeprefix("timm:local-dir:")) / TIMM_WEIGHTS_FILE
    if name.startswith("timm:local-dir:") and weights.is_file() and "trivit" in read_metadata(weights):
        return weights
    return None


def _from_timm(name: str, image_size: int | None) -> Encoder:
    model = create_timm(name, image_size=image_size, pretrained=True)
    encoder = Encoder(pretrained_config(name, model, image_size))
    load_strictly(encoder.trunk, model.state_dict(), f"timm:{name}")
    return encoder


def resize_positions(state: dict[str, Tensor], encoder: Encoder, trained_size: int) -> None:
    """Stretches `pos_embed` of a state dict from images of `trained_size` to those of the encoder, in place."""
    config, table = encoder.config, state.get("pos_embed")
    side = trained_size // config.patch_size
    if table is None or table.shape[1] < side * side:
        return  # load_strictly says what is wrong
    prefix, patches = torch.split(table[0], [table.shape[1] - side * side, side * side])
    patches = resize_table(patches, (side, side), encoder.grid, config.position_resize)
    state["pos_embed"] = torch.cat([prefix, patches])[None]
