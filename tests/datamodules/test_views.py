"""Whole views, from the bytes of a JPEG to the batch, against Pillow with the same boxes and flips.

The photographs are two that come with scikit-learn, and inet250 where it is at hand.
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from datamodules import rng
from datamodules.crops import NUMBERS, random_resized_crop_box
from datamodules.decode import decode_image
from datamodules.recipes import CLIPRecipe, DINORecipe, MAERecipe

DATA = Path(os.environ.get("TRIVIT_BENCH_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
RATIO = (3 / 4, 4 / 3)


def photographs() -> list[bytes]:
    files = []
    for image in load_sample_images().images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    if (DATA / "inet250" / "images.tar").is_file():
        with tarfile.open(DATA / "inet250" / "images.tar") as tar:
            files += [tar.extractfile(member).read() for member in [m for m in tar if m.isfile()][::12]]
    return files


FILES = photographs()
KEYS = rng.sample_keys(5, 2, np.arange(len(FILES)))


def with_pillow(data: bytes, numbers: list[float], flipped: bool, size: int, scale: tuple[float, float]) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, height, width = random_resized_crop_box(image.height, image.width, numbers, scale, RATIO)
    view = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else view
    return np.asarray(view, np.float64)


@pytest.mark.parametrize(
    ("recipe", "name", "views", "size", "scale", "purpose"),
    [
        (MAERecipe(224), "image", 1, 224, (0.2, 1.0), 1),
        (CLIPRecipe(224), "image", 1, 224, (0.9, 1.0), 1),
        (DINORecipe(color=None), "global_views", 2, 224, (0.4, 1.0), 1),
        (DINORecipe(color=None), "local_views", 8, 96, (0.05, 0.4), 4),
    ],
    ids=["MAE", "CLIP", "DINO global", "DINO local"],
)
def test_views_are_pillows(recipe, name, views, size, scale, purpose):
    batch = recipe([decode_image(data, "jpg") for data in FILES], KEYS)[name]
    ours = batch[None] if views == 1 else batch
    numbers = rng.uniform(KEYS, purpose, views * NUMBERS).reshape(len(FILES), views, NUMBERS)
    flips = rng.uniform(KEYS, purpose + 1, views) < (0 if isinstance(recipe, CLIPRecipe) else 0.5)
    errors = []
    for i, data in enumerate(FILES):
        for v in range(views):
            expected = with_pillow(data, numbers[i, v].tolist(), flips[i, v], size, scale)
            errors.append(np.abs(ours[v, i].permute(1, 2, 0).numpy() - expected).mean())
    assert np.mean(errors) < 0.05 and max(errors) < 0.5  # grey levels; the blueprint measured 0.03
