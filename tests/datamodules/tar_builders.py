"""Images, folders and tars for the tests of shards."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), kind: str = "JPEG") -> bytes:
    """The bytes of a small image, another one for each seed; size is (width, height)."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (3, 4, 3), np.uint8))
    out = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: object) -> Path:
    """A tar of regular files by Python's tarfile (`format=` and others pass through)."""
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def image_folders(root: Path, classes: Iterable[str] = ("cat", "dog", "owl"), per_class: int = 5) -> Path:
    """Class folders of JPEGs."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{name}_{i}.JPEG").write_bytes(picture(100 * c + i))
    return root
