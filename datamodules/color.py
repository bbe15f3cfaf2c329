"""Which colour changes a view gets: random numbers to the parameters of `color_batch` and `color_opencv`.

The changes are DINO's (Caron et al. 2021, arXiv:2104.14294, appendix C; BYOL's, arXiv:2006.07733, appendix B): jitter
of brightness, contrast, saturation and hue in random order, grey, Gaussian blur, solarize; in this sequence.

Axes: b = images, v = views.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from datamodules import rng
from datamodules.errors import DataError

BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, SIGMA, SOLARIZE = range(8)
"""Columns of the parameters: three factors (1: no change), hue as a share of the circle (0: no change), index into
`ORDERS`, 1 for grey, the blur's standard deviation in pixels (0: none), 1 for solarize."""

ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))))
_NUMBERS = 10


@dataclass(frozen=True)
class ColorConfig:
    """How often and how strongly colours change.

    Args:
        brightness, contrast, saturation: factors are drawn from 1 - x to 1 + x.
        hue: shifts are drawn from -x to x, in shares of the circle.
        jitter_probability: that those four are applied.
        gray_probability: that colour is taken away.
        sigma: range of the blur's standard deviation, pixels.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_probability: float = 0.8
    gray_probability: float = 0.2
    sigma: tuple[float, float] = (0.1, 2.0)

    def check(self) -> None:
        """DataError, one line, for what cannot work."""
        if not (min(self.brightness, self.contrast, self.saturation) >= 0 and 0 <= self.hue <= 0.5):
            raise DataError("color: brightness, contrast and saturation cannot be negative, and hue is at most 0.5")
        check_probabilities("color", (self.jitter_probability, self.gray_probability))
        if not 0 < self.sigma[0] <= self.sigma[1] <= MAX_SIGMA:
            raise DataError(
                f"color.sigma {list(self.sigma)} must be two lengths with 0 < first <= second <= {MAX_SIGMA:g}"
            )

    def draw(
        self, keys: NDArray[np.int64], purpose: int, blur: Sequence[float], solarize: Sequence[float]
    ) -> NDArray[np.float32]:
        """Parameters of each view, [b] -> float32 [v b 8]; `blur` and `solarize`: each view's probabilities, [v]."""
        numbers = rng.uniform(keys, purpose, len(blur) * _NUMBERS).reshape(len(keys), len(blur), _NUMBERS)
        u = numbers.transpose(2, 1, 0)  # [10 v b]
        jittered = u[0] < self.jitter_probability
        drawn = np.zeros((8, *u.shape[1:]), np.float32)
        for column, strength in (
            (BRIGHTNESS, self.brightness),
            (CONTRAST, self.contrast),
            (SATURATION, self.saturation),
        ):
            low = max(0.0, 1 - strength)
            drawn[column] = np.where(jittered, low + (1 + strength - low) * u[1 + column], 1)
        drawn[HUE] = np.where(jittered, self.hue * (2 * u[1 + HUE] - 1), 0)
        drawn[ORDER] = np.floor(u[5] * len(ORDERS))
        drawn[GRAY] = u[6] < self.gray_probability
        low, high = self.sigma
        drawn[SIGMA] = np.where(u[7] < np.array(blur)[:, None], low + (high - low) * u[8], 0)
        drawn[SOLARIZE] = u[9] < np.array(solarize)[:, None]
        return np.ascontiguousarray(drawn.transpose(1, 2, 0))


MAX_SIGMA = 4.0
"""Wider blurs are refused: the device's kernel is as long for all images as the widest of them needs."""


def check_probabilities(name: str, values: Sequence[float]) -> None:
    """DataError unless all are between 0 and 1."""
    if not all(0 <= value <= 1 for value in values):
        raise DataError(f"{name}: probabilities {list(values)} must be between 0 and 1")


def blur_kernel(sigma: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights of a Gaussian blur as Pillow approximates it, [b] -> float32 [b 2r+1], r the same for all.

    Pillow blurs three times with a box whose ends count in part, so wide that the variances add up to sigma^2 (Gwosdek
    et al. 2011, doi:10.1007/978-3-642-24785-9_38); this is the one kernel that the three together make.
    """
    variance = sigma.astype(np.float64) ** 2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max()) + 1
    distance = np.abs(np.arange(-reach, reach + 1))
    box = np.clip(whole[:, None] - distance + 1, 0, 1) + ends[:, None] * (distance == whole[:, None] + 1)
    box /= box.sum(1, keepdims=True)
    kernels = [np.convolve(np.convolve(row, row), row) for row in box]
    return np.stack(kernels).astype(np.float32)
