"""Training views of fine-tuning: random resized crop, flip and RandAugment (timm's), drawn by the samples' keys.

Axes: b = images, c = channels, s = side of a view.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from datamodules.recipes import MAERecipe, Recipe
from evaluation.errors import EvaluationError


class FinetuneRecipe(Recipe):
    """One view of each image.

    Args:
        crop_size: side of the view, pixels.
        randaugment: in timm's words, `rand-m9-mstd0.5-inc1`; empty: none.
        mean: of the images in [0, 1], for what a rotation leaves bare.

    Raises:
        EvaluationError: timm does not know such a RandAugment.
    """

    views = ("image",)

    def __init__(self, crop_size: int, randaugment: str, mean: tuple[float, ...]) -> None:
        self.crop_size = crop_size
        self._crops = MAERecipe(crop_size, scale=(0.08, 1.0))
        self._augment: Any = None
        if randaugment:
            about = {
                "translate_const": int(0.45 * crop_size),
                "interpolation": Image.Resampling.BICUBIC,
                "img_mean": tuple(round(255 * value) for value in mean),
            }
            try:
                self._augment = rand_augment_transform(randaugment, about)
            except (AssertionError, ValueError, KeyError) as error:
                raise EvaluationError(f"finetune.randaugment {randaugment!r} is none that timm knows") from error
            for op in self._augment.ops:
                if getattr(op.aug_fn, "__name__", "") == "posterize":
                    op.aug_fn = _posterize

    def __call__(self, images: Iterable[Tensor], keys: NDArray[np.int64]) -> dict[str, Any]:
        """Images [c h w] uint8, keys int64 [b] -> {"image": uint8 [b c s s]}."""
        views = self._crops(images, keys)["image"]
        if self._augment is None:
            return {"image": views}
        for view, key in zip(views, keys.tolist(), strict=True):
            with seeded(key):
                changed = self._augment(Image.fromarray(view.permute(1, 2, 0).numpy()))
            view.copy_(torch.from_numpy(np.array(changed)).permute(2, 0, 1))
        return {"image": views}


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Timm may ask for 0 bits of each channel, as a black image once was; newer versions of Pillow refuse that."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Python's and numpy's global generators, which timm draws from, begin at `key`, and afterwards are as before."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(key)
    np.random.seed(key % (1 << 32))  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
