"""An encoder, or all that was trained with it, as a file or folder for others.

Every export is written aside, read back by those who will read it, compared with the original on random images, and
only then gets its name. So what is there works, and nothing half-written stays.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tasks.clip import CLIP
from tasks.clip_files import OPEN_CLIP_FILES, export_open_clip, load_clip, run_open_clip
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import (
    TIMM_CONFIG_FILE,
    TIMM_WEIGHTS_FILE,
    checkpoint_path,
    load_encoder,
    read_checkpoint,
    read_metadata,
    save_encoder,
    save_whole,
)
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.onnx_files import need_onnx, onnx_of_trivit, run_onnx, write_onnx
from tasks.timm_files import run_timm, write_timm

Format = Literal["safetensors", "timm", "onnx", "open_clip"]
IMAGES = 4
TOLERANCE = 1e-4  # of the largest number compared: float32 in another order is off by 1e-6, a wrong epsilon by 1e-3
_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx"}  # the other formats are folders, of these files alone:
_FILES = {"timm": (TIMM_WEIGHTS_FILE, TIMM_CONFIG_FILE), "open_clip": OPEN_CLIP_FILES}  # the first one has the weights


class Exported(NamedTuple):
    """Where an export is, and how far it is from the original."""

    path: Path
    difference: float  # the largest absolute one
    what: str  # was compared


def export(source: str | Path, output: str | Path, format: Format = "safetensors", *, whole: bool = False) -> Exported:
    """Writes the encoder of `source` (DINO: the teacher's) for others to read, and reads it back.

    Args:
        source: whatever `tasks.load_encoder` takes; for open_clip whatever `load_clip` takes.
        output: a file that ends in .safetensors or .onnx, or a folder (timm, open_clip). An earlier export of ours is
            replaced, anything else that is there is refused.
        format: `safetensors` (for trivit), `timm` (a folder for timm.create_model), `onnx` (features and patch tokens;
            any batch, one image size), `open_clip` (a whole CLIP as a folder for open_clip.create_model).
        whole: safetensors of all that was trained: MAE with its decoder, DINO's student, teacher, heads and centres,
            both towers of a CLIP. What reads a run's checkpoint reads it, too.

    Raises:
        TaskError: the source cannot be read, the format cannot express it, the output cannot be written, or what was
            read back computes something else.
    """
    path = Path(output).resolve()
    _check_place(path, format)
    if whole and format != "safetensors":
        raise TaskError(f"--whole is for --format safetensors: {format} has its own idea of what belongs to a model")
    if format == "onnx":
        need_onnx()
    if format == "open_clip":
        return _export_clip(load_clip(source), path)
    encoder = load_encoder(source)
    images = _random_images(encoder.config)
    writers: dict[str, Callable[[Encoder, Path], None]] = {"timm": write_timm, "onnx": write_onnx}
    readers: dict[str, Callable[[Path, Tensor], Sequence[Tensor]]] = {"timm": run_timm, "onnx": run_onnx}
    with _aside(path) as aside:
        if whole:
            save_whole(source, aside)
            _check_whole(source, aside)
        else:
            writers.get(format, save_encoder)(encoder, aside)
        found = _read_back(readers.get(format, _run_ours), aside, images)
        difference = _difference(_outputs(encoder, images), found, format)
    return Exported(path, difference, f"features on {IMAGES} random images")


def _export_clip(clip: CLIP, path: Path) -> Exported:
    images = _random_images(clip.encoder.config)
    ids = torch.randint(
        clip.text.trunk.vocab_size,
        (IMAGES, clip.text.config.context_length),
        generator=torch.Generator().manual_seed(0),
    )
    with _aside(path) as aside:
        export_open_clip(clip, aside)
        with torch.no_grad():
            ours = [clip.encode_image(images), clip.encode_text(ids)]
        found = _read_back(lambda folder, images: run_open_clip(folder, images, ids), aside, images)
        difference = _difference(ours, found, "open_clip")
    return Exported(path, difference, f"vectors of {IMAGES} random images and texts")


def _random_images(config: EncoderConfig) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, config.in_chans, config.image_size, config.image_size, generator=draw)


@torch.no_grad()
def _outputs(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """Features [b f] and patch tokens [b n d] of normalised images [b c h w]."""
    tokens = encoder(images)
    return [encoder.pool(tokens), tokens.patches]


def _run_ours(path: Path, images: Tensor) -> list[Tensor]:
    return _outputs(load_encoder(path), images)


def _read_back(reader: Callable[[Path, Tensor], Sequence[Tensor]], path: Path, images: Tensor) -> Sequence[Tensor]:
    try:
        return reader(path, images)
    except Exception as error:  # timm, ONNX Runtime and open_clip each have their own
        reason = (str(error).strip() or type(error).__name__).splitlines()
        told = " ".join(line.strip() for line in reason[:2])
        raise TaskError(f"what was exported cannot be read back, so it was thrown away: {told}") from error


def _difference(ours: Sequence[Tensor], found: Sequence[Tensor], format: str) -> float:
    """The largest absolute difference of the first pair; TaskError when any pair differs by more than rounding."""
    differences = []
    for mine, theirs in zip(ours, found, strict=True):
        if mine.shape != theirs.shape:
            raise TaskError(
                f"{format} gives {tuple(theirs.shape)} where trivit gives {tuple(mine.shape)}: not exported"
            )
        difference, largest = float((mine - theirs).abs().max()), float(mine.abs().max())
        if not difference <= TOLERANCE * largest:  # not a number is no success either
            raise TaskError(
                f"{format} computes something else from these weights: a difference of {difference:.1e} where the "
                f"largest number is {largest:.1e}; not exported"
            )
        differences.append(difference)
    return differences[0]


def _check_whole(source: str | Path, path: Path) -> None:
    """TaskError unless every tensor of a run is in its export, bit by bit."""
    trained, found = (read_checkpoint(checkpoint_path(place))["state_dict"] for place in (source, path))
    wrong = [
        name
        for name, tensor in trained.items()
        if name.startswith("model.") and not (name in found and found[name].equal(tensor))
    ]
    if wrong:
        raise TaskError(f"{path.name} was written with other tensors than {source} has ({wrong[0]}): not exported")


def _check_place(path: Path, format: Format) -> None:
    """TaskError unless `path` is free for an export of that format, or holds an earlier one of ours."""
    if format not in get_args(Format):
        raise TaskError(f"unknown format {format!r}: use one of {', '.join(get_args(Format))}")
    suffix = _SUFFIXES.get(format)
    if suffix is not None and path.suffix != suffix:
        raise TaskError(f"cannot write {path}: the name of an export in this format ends in {suffix}")
    if suffix is None and path.suffix in _SUFFIXES.values():
        raise TaskError(f"cannot write {path}: --format {format} makes a folder, give it another name")
    if path.exists() and not _is_ours(path, format):
        raise TaskError(f"{path} exists and is no export to {format} by trivit: give another name, or remove it")


def _is_ours(path: Path, format: Format) -> bool:
    if format == "onnx":
        need_onnx()
        return path.is_file() and onnx_of_trivit(path)
    if format == "safetensors":
        return path.is_file() and _has_our_mark(path)
    if not path.is_dir():
        return False
    there = {entry.name for entry in path.iterdir()}
    return not there or (there <= set(_FILES[format]) and _has_our_mark(path / _FILES[format][0]))


def _has_our_mark(path: Path) -> bool:
    try:
        return "trivit" in read_metadata(path)
    except TaskError:
        return False


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A place to write `path` to, beside it; when all went well, everything written there takes its place."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True)
        yield folder / path.name
        for entry in folder.rglob("*"):
            if entry.is_file():  # safetensors writes for its owner's eyes only; who may read is the umask's to say
                entry.chmod(folder.stat().st_mode & 0o666)
        if path.is_dir():  # a folder cannot be replaced in one step: the old one leaves first
            path.rename(folder / "replaced")
        written = [entry for entry in folder.iterdir() if entry.name.startswith(path.name)]
        for entry in sorted(written, reverse=True):  # NAME.onnx.data before NAME.onnx
            entry.replace(path.with_name(entry.name))
    except OSError as error:
        raise TaskError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
