"""Augmentation recipes: decoded images to the uint8 views that an objective learns from, one class for each objective.

A recipe works on a whole batch, so that its random numbers are drawn at once and the views are written where the batch
will lie. All that is random follows from the samples' keys, and a purpose for each use.

Axes: b = images, c = channels, v = views, h, w = rows and columns, s, g, l = side of a crop, a global and a local view.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datamodules import rng
from datamodules.batches import empty_images
from datamodules.color import ColorConfig, check_probabilities
from datamodules.color_opencv import change_color, require_opencv
from datamodules.crops import NUMBERS, crop, flip, random_resized_crop_box, resize
from datamodules.errors import DataError
from datamodules.sample_captions import CaptionConfig

# What a random number is for. Never renumber: a run resumed with a newer version must draw the same crops.
_CROP, _FLIP, _COLOR, _LOCAL_CROP, _LOCAL_FLIP, _LOCAL_COLOR = 1, 2, 3, 4, 5, 6  # 7: see stream.py

Range = tuple[float, float]
RATIO: Range = (3 / 4, 4 / 3)


class Recipe(ABC):
    """What the loader needs of every recipe.

    `crop_size` is the side of the encoder's (largest) input in pixels, `views` the names of what is made of the images;
    with `captions` every sample must have one, too.
    """

    crop_size: int
    views: tuple[str, ...]
    captions: CaptionConfig | None = None

    @abstractmethod
    def __call__(self, images: Iterable[Tensor], keys: NDArray[np.int64]) -> dict[str, Any]:
        """Turn images (uint8, or float in 0..255, [c h w], any sizes, in the order of the keys [b]) into views.

        Colour changes that are left to the device come as "NAME_color", the parameters of `change_colors` [v b 8].
        """


class OneView(Recipe):
    """One random resized crop and a horizontal flip: what MAE and CLIP have in common."""

    views = ("image",)

    def __init__(self, crop_size: int, scale: Range, ratio: Range, hflip: float) -> None:
        self.crop_size = crop_size
        self._crops = _Crops(crop_size, scale, ratio, hflip, 1, (_CROP, _FLIP))

    def __call__(self, images: Iterable[Tensor], keys: NDArray[np.int64]) -> dict[str, Any]:
        """Images [c h w], keys int64 [b] -> {"image": uint8 [b c s s]}."""
        cuts = _Cuts(self._crops, keys)
        for image in images:
            cuts.add(image)
        return {"image": cuts.views[0]}


class MAERecipe(OneView):
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
        self, crop_size: int = 224, scale: Range = (0.2, 1.0), ratio: Range = RATIO, hflip: float = 0.5
    ) -> None:
        super().__init__(crop_size, scale, ratio, hflip)


class CLIPRecipe(OneView):
    """One view and its caption: a large random resized crop, bicubic, as in open_clip (LAION's runs).

    Args:
        crop_size: side of the view, pixels.
        scale: range of the crop's area as a share of the image.
        ratio: range of the crop's width / height.
        hflip: probability of a flip; captions may say left and right.
        captions: where they come from.

    Raises:
        DataError: when a value is out of its range.
    """

    def __init__(
        self,
        crop_size: int = 224,
        scale: Range = (0.9, 1.0),
        ratio: Range = RATIO,
        hflip: float = 0.0,
        captions: CaptionConfig = CaptionConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(crop_size, scale, ratio, hflip)
        captions.check()
        self.captions = captions


class DINORecipe(Recipe):
    """Two global and several local views with changed colours (Caron et al. 2021, arXiv:2104.14294, section 3.1).

    Args:
        crop_size: side of the global views, pixels.
        scale: range of their area as a share of the image.
        local_views: how many there are, also none.
        local_size: side of the local views, pixels.
        local_scale: range of their area.
        ratio: range of a crop's width / height.
        hflip: probability of a flip.
        color: how colours change; null: not at all, nor is anything blurred or solarized.
        blur_probability: of the first and the second global view, and of a local one.
        solarize_probability: likewise.
        color_on: where colours are changed: on the `device`, for whole batches, or in the loader's `workers`, with
            OpenCV, which is right when the model has no accelerator. The same changes, rounded a little differently.

    Raises:
        DataError: when a value is out of its range.
    """

    def __init__(
        self,
        crop_size: int = 224,
        scale: Range = (0.4, 1.0),
        local_views: int = 8,
        local_size: int = 96,
        local_scale: Range = (0.05, 0.4),
        ratio: Range = RATIO,
        hflip: float = 0.5,
        color: ColorConfig | None = ColorConfig(),  # noqa: B008 (frozen)
        blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5),
        solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0),
        color_on: Literal["device", "workers"] = "device",
    ) -> None:
        if local_views < 0:
            raise DataError(f"local_views {local_views} cannot be negative")
        check_probabilities("blur_probability", blur_probability)
        check_probabilities("solarize_probability", solarize_probability)
        self.crop_size, self.color, self._in_workers = crop_size, color, color_on == "workers"
        if color is not None:
            color.check()
            if self._in_workers:
                require_opencv()
        crops = _Crops(crop_size, scale, ratio, hflip, 2, (_CROP, _FLIP))
        self._kinds: list[tuple[str, _Crops, int, tuple[int, ...]]] = [("global_views", crops, _COLOR, (0, 1))]
        if local_views:
            local = _Crops(local_size, local_scale, ratio, hflip, local_views, (_LOCAL_CROP, _LOCAL_FLIP))
            self._kinds.append(("local_views", local, _LOCAL_COLOR, (2,) * local_views))
        self.views = tuple(name for name, *_ in self._kinds)
        self._blur, self._solarize = blur_probability, solarize_probability

    def __call__(self, images: Iterable[Tensor], keys: NDArray[np.int64]) -> dict[str, Any]:
        """Images [c h w], keys int64 [b] -> {"global_views": uint8 [2 b c g g], "local_views": uint8 [v b c l l]}."""
        colors: dict[str, NDArray[np.float32]] = {}
        if self.color is not None:
            for name, _, purpose, columns in self._kinds:
                blur, solarize = ([chances[i] for i in columns] for chances in (self._blur, self._solarize))
                colors[name] = self.color.draw(keys, purpose, blur, solarize)
        here, later = (colors, {}) if self._in_workers else ({}, colors)
        cuts = {name: _Cuts(crops, keys, here.get(name)) for name, crops, _, _ in self._kinds}
        for image in images:
            for views in cuts.values():
                views.add(image)
        return {name: views.views for name, views in cuts.items()} | {f"{name}_color": p for name, p in later.items()}


class _Crops:
    """Random resized crops of one size.

    Args:
        size: side of a crop, pixels.
        scale, ratio, hflip: see the recipes.
        views: crops of each image.
        purposes: of the random numbers for boxes and for flips.
    """

    def __init__(
        self, size: int, scale: Range, ratio: Range, hflip: float, views: int, purposes: tuple[int, int]
    ) -> None:
        check_crop(size, scale, ratio)
        if not 0 <= hflip <= 1:
            raise DataError(f"hflip {hflip} is a probability: it must be between 0 and 1")
        self.size, self.scale, self.ratio, self.hflip = size, scale, ratio, hflip
        self.count, self.purposes = views, purposes


class _Cuts:
    """The crops of one batch, written one by one straight into its memory.

    Args:
        crops: what to cut.
        keys: of the images, [b].
        colors: changes that are made here and now, [v b 8].
    """

    views: Tensor  # [v b c s s], there after the first image

    def __init__(self, crops: _Crops, keys: NDArray[np.int64], colors: NDArray[np.float32] | None = None) -> None:
        self.crops, self.colors, self.added = crops, colors, 0
        boxes, flips = crops.purposes
        numbers = rng.uniform(keys, boxes, crops.count * NUMBERS)
        self.numbers = numbers.reshape(len(keys), crops.count, NUMBERS).tolist()
        self.flips = (rng.uniform(keys, flips, crops.count) < crops.hflip).tolist()

    def add(self, image: Tensor) -> None:
        """Cut the next image, [c h w]."""
        crops, i = self.crops, self.added
        s, (channels, height, width) = crops.size, image.shape
        if i == 0:
            b = len(self.flips)
            self.views = empty_images(crops.count * b, channels, s, s, image.dtype).view(crops.count, b, channels, s, s)
        for v, (numbers, flipped) in enumerate(zip(self.numbers[i], self.flips[i], strict=True)):
            box = random_resized_crop_box(height, width, numbers, crops.scale, crops.ratio)
            view = resize(crop(image, box), s, s)
            view = flip(view) if flipped else view
            self.views[v, i] = view if self.colors is None else change_color(view, self.colors[v, i])
        self.added += 1


def check_crop(crop_size: int, scale: Range, ratio: Range) -> None:
    """Refuse crops that cannot be drawn. DataError."""
    if crop_size < 1:
        raise DataError(f"crop_size {crop_size} must be at least 1 pixel")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise DataError(f"scale {list(scale)} must be two shares of the image with 0 < first <= second <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise DataError(f"ratio {list(ratio)} must be two width / height ratios with 0 < first <= second")
