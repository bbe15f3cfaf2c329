"""The usual augmentations, image by image with Pillow and torchvision v1, as the authors of each objective do it."""

import random
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T

from datamodules.normalize import IMAGENET_MEAN, IMAGENET_STD

_BICUBIC = T.InterpolationMode.BICUBIC


def to_numbers() -> list[Any]:
    """How all of them end."""
    return [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def mae(size: int) -> T.Compose:
    """MAE: a crop and a flip."""
    crop = T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=_BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), *to_numbers()])


def clip(size: int) -> T.Compose:
    """open_clip: a large crop."""
    return T.Compose([T.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=_BICUBIC), *to_numbers()])


class DINOAugmentation:
    """DINO: two global and eight local views, each with colours of its own."""

    def __init__(self, size: int = 224, local_size: int = 96, local_views: int = 8) -> None:
        def view(size: int, scale: tuple[float, float], blur: float, solarize: float = 0) -> T.Compose:
            return T.Compose([
                T.RandomResizedCrop(size, scale=scale, interpolation=_BICUBIC),
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(0.2),
                T.Lambda(_sometimes(blur, lambda im: im.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))),
                T.Lambda(_sometimes(solarize, ImageOps.solarize)),
                *to_numbers(),
            ])  # fmt: skip

        self.views = [view(size, (0.4, 1.0), 1.0), view(size, (0.4, 1.0), 0.1, 0.2)]
        self.views += [view(local_size, (0.05, 0.4), 0.5)] * local_views

    def __call__(self, image: Image.Image) -> list[Any]:
        """All views of one image."""
        return [view(image) for view in self.views]


def _sometimes(p: float, change: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
    return lambda image: change(image) if random.random() < p else image
