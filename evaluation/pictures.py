"""Single images of a data set by key, as an encoder sees them, and pictures that live inside a page.

Axes: b = images, c = channels, h w = pixels.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.contact_sheet import displayable
from datamodules.crops import center_crop, resize_shorter_side
from datamodules.image_set import evaluation_loader
from datamodules.manifest import Manifest
from datamodules.shard_reader import BadSampleError, ShardReader
from datamodules.tar_index import read_index
from evaluation.errors import EvaluationError
from tasks.encoder_config import EncoderConfig

LOSSLESS_SIDE = 96


def load_pictures(manifest: Manifest, keys: Sequence[str], config: EncoderConfig) -> Tensor:
    """The images "SHARD/KEY", resized and cropped as evaluation does it: [b c s s] in 0..255.

    Raises:
        EvaluationError: an image is not there (any more).
    """
    reader = ShardReader(manifest, channels=config.in_chans, bits=config.bits)
    names = [shard.name for shard in manifest.shards]
    places: dict[str, dict[str, int]] = {}
    images = []
    for full in keys:
        shard = next((name for name in names if full.startswith(f"{name}/")), None)
        if shard is None:
            raise EvaluationError(f"{full} is not in {manifest.root} any more")
        if shard not in places:
            index = read_index(manifest.root / shard)
            places[shard] = {index.key(i): i for i in range(len(index))}
        try:
            _, image = reader.image(names.index(shard), places[shard][full[len(shard) + 1 :]])
        except (KeyError, BadSampleError) as error:
            raise EvaluationError(f"{full} in {manifest.root} cannot be read any more") from error
        images.append(center_crop(resize_shorter_side(image, config.resize), config.image_size))
    return torch.stack(images)


def sample_images(root: Path, config: EncoderConfig, count: int) -> Tensor:
    """`count` images spread evenly over the set, as evaluation sees them: [b c s s] in 0..255."""
    loader = evaluation_loader(
        root, crop_size=config.image_size, resize=config.resize, batch_size=count, workers=0, limit=count,
        channels=config.in_chans, bits=config.bits,
    )  # fmt: skip
    images = [batch["image"] for batch in loader]
    if not images:
        raise EvaluationError(f"no image under {root} could be read")
    return torch.cat(images)


def spread(count: int, wanted: int, seed: int = 0) -> list[int]:
    """`wanted` of `count` places, drawn at random and the same every time, in ascending order."""
    rng = np.random.default_rng(seed)
    return sorted(rng.choice(count, size=min(wanted, count), replace=False).tolist())


def picture(image: Tensor) -> str:
    """[c h w], as `displayable` shows it -> a data URI: PNG when small, else WebP."""
    file = io.BytesIO()
    shown = displayable(image[None])[0].permute(1, 2, 0).contiguous().cpu().numpy()
    pixels = Image.fromarray(shown if shown.shape[2] == 3 else shown[:, :, 0])
    kind = "png" if max(pixels.size) <= LOSSLESS_SIDE else "webp"
    pixels.save(file, kind, **({"optimize": True} if kind == "png" else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
