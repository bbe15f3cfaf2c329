"""Augmentation recipes: decoded images to the uint8 views that an objective learns from, one class for each objective.

A recipe works on a whole batch, so that its random numbers are drawn at once and the views are written where the batch
will lie. All that is random follows from the samples' keys, and a purpose for each use.

Axes: b = images, h, w = rows and columns, s = crop size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datamodules import rng
from datamodules.batches import empty_images
from datamodules.crops import NUMBERS, crop, flip, random_resized_crop_box, resize
from datamodules.errors import DataError

# What a random number is for. Never renumber: a run resumed with a newer version must draw the same crops.
_CROP, _FLIP = 1, 2


class Recipe(ABC):
    """What the loader needs of every recipe; `crop_size` is the side of the encoder's (largest) input in pixels."""

    crop_size: int

    @abstractmethod
    def __call__(self, images: Iterable[Tensor], keys: NDArray[np.int64]) -> dict[str, Tensor]:
        """Turn images (uint8 [3 h w], any sizes, in the order of the keys [b]) into the views of a batch."""


class MAERecipe(Recipe):
    """One view: random resized crop, bicubic, and horizontal flip (He et al. 2021, arXiv:2111.06377, Table 8).

    Args:
        crop_size: side of the view, pixels.
        scale: range of the crop's area as a share of the image.
        ratio: range of the crop's width / height.
        hflip: probability of a flip.

    Raises:
        DataError: when a value is out of its range.
    """

    def __init__(
        self,
        crop_size: int = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
    ) -> None:
        check_crop(crop_size, scale, ratio)
        if not 0 <= hflip <= 1:
            raise DataError(f"hflip {hflip} is a probability: it must be between 0 and 1")
        self.crop_size, self.scale, self.ratio, self.hflip = crop_size, scale, ratio, hflip

    def __call__(self, images: Iterable[Tensor], keys: NDArray[np.int64]) -> dict[str, Tensor]:
        """Images uint8 [3 h w], keys int64 [b] -> {"image": uint8 [b 3 s s]}."""
        views = empty_images(len(keys), 3, self.crop_size, self.crop_size)
        numbers = rng.uniform(keys, _CROP, NUMBERS).tolist()
        flips = (rng.uniform(keys, _FLIP, 1)[:, 0] < self.hflip).tolist()
        for i, image in enumerate(images):
            box = random_resized_crop_box(image.shape[1], image.shape[2], numbers[i], self.scale, self.ratio)
            view = resize(crop(image, box), self.crop_size, self.crop_size)
            views[i] = flip(view) if flips[i] else view
        return {"image": views}


def check_crop(crop_size: int, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Refuse crops that cannot be drawn. DataError."""
    if crop_size < 1:
        raise DataError(f"crop_size {crop_size} must be at least 1 pixel")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise DataError(f"scale {list(scale)} must be two shares of the image with 0 < first <= second <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise DataError(f"ratio {list(ratio)} must be two width / height ratios with 0 < first <= second")
