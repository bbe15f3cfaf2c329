import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from datamodules import crops
from datamodules.crops import NUMBERS, Box, crop, flip, random_resized_crop_box, resize


class Given:
    """Stands for `torch` inside torchvision's transform and hands out given numbers instead of random ones."""

    log, exp, tensor = staticmethod(torch.log), staticmethod(torch.exp), staticmethod(torch.tensor)

    def __init__(self, numbers):
        self.tries, self.place, self.value = iter(numbers[:-2]), iter(numbers[-2:]), None

    def empty(self, _):
        return self

    def uniform_(self, low, high):
        return torch.tensor(float(low) + (float(high) - float(low)) * next(self.tries), dtype=torch.float64)

    def randint(self, low, high, size):
        return torch.tensor([low + int(next(self.place) * (high - low))])


unit = st.floats(0, 1, exclude_max=True, width=32)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 600), st.integers(1, 600), st.lists(unit, min_size=NUMBERS, max_size=NUMBERS),
    st.sampled_from([(0.2, 1.0), (0.08, 1.0), (0.05, 0.4), (1.0, 1.0)]), st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0)]),
)  # fmt: skip
@example(10, 600, [0.5] * NUMBERS, (0.2, 1.0), (3 / 4, 4 / 3))
@example(600, 10, [0.5] * NUMBERS, (0.2, 1.0), (3 / 4, 4 / 3))
def test_the_box_is_torchvisions(height, width, numbers, scale, ratio):
    from torchvision.transforms import transforms as v1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v1, "torch", Given(numbers))
        theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
    ours = random_resized_crop_box(height, width, numbers, scale, ratio)
    near_half = any(
        abs(math.sqrt(height * width * (scale[0] + (scale[1] - scale[0]) * a) * math.exp(sign * r)) % 1 - 0.5) < 1e-4
        for a, u in zip(numbers[:-2:2], numbers[1:-2:2], strict=True)
        for r in [math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u]
        for sign in (1, -1)
    )
    assert ours == theirs or near_half  # torchvision keeps the aspect ratio's logarithm in single precision
    assert ours.top >= 0 and ours.top + ours.height <= height and ours.height > 0
    assert ours.left >= 0 and ours.left + ours.width <= width and ours.width > 0


def photograph(height=90, width=120) -> torch.Tensor:
    y, x = np.mgrid[:height, :width]
    planes = [128 + 100 * np.sin(x / (5 + k) + y / 11) for k in range(3)]
    return torch.from_numpy(np.stack(planes, -1).astype(np.uint8)).permute(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(30, 40), (90, 120), (200, 150), (7, 300), (1, 1)])
def test_resize_agrees_with_pillow(height, width):
    image = photograph()
    ours = resize(image, height, width)
    theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    error = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int))
    assert error.mean() < 0.25 and error.max() <= 1


def test_resize_gives_the_same_pixels_for_every_memory_layout():
    image = crop(photograph(), Box(3, 5, 50, 60))
    assert torch.equal(resize(image, 32, 32), resize(image.contiguous(), 32, 32))
    assert resize(image, 32, 32).permute(1, 2, 0).is_contiguous()


def test_crop_and_flip():
    image = photograph()
    box = Box(3, 5, 50, 60)
    assert torch.equal(crop(image, box), TF.crop(image, *box))
    assert torch.equal(flip(image), TF.horizontal_flip(image))


@pytest.mark.parametrize(("height", "width"), [(90, 120), (121, 64), (64, 64), (65, 64), (33, 500)])
def test_evaluation_view_is_torchvisions(height, width):
    image = photograph(height, width)
    ours = crops.center_crop(crops.resize_shorter_side(image, 64), 56)
    theirs = TF.center_crop(TF.resize(image, [64], interpolation=transforms.InterpolationMode.BICUBIC), [56, 56])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1)])
def test_tiny_images_can_be_resized(height, width):
    assert resize(photograph(height, width), 16, 16).shape == (3, 16, 16)


def test_resizing_in_floating_point_is_that_of_bytes_before_rounding():
    image = photograph()
    fine = resize(image.float(), 30, 41)
    assert fine.dtype == torch.float32
    assert (fine - resize(image, 30, 41).float()).abs().max() <= 1.01  # torch's weights for bytes have 8 bits or so
    assert (fine - fine.round()).abs().max() > 0.1


def test_overshoot_stays_between_black_and_white():
    edge = torch.zeros(2, 16, 16)
    edge[:, :, 8:] = 255
    wide = torch.nn.functional.interpolate(edge[None], (40, 40), mode="bicubic", antialias=True)
    assert wide.min() < -5 and wide.max() > 260, "the case is real"
    ours = resize(edge, 40, 40)
    assert ours.min() == 0 and ours.max() == 255 and torch.equal(ours, wide[0].clamp(0, 255))


@pytest.mark.parametrize("channels", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_channels_are_treated_alike(channels, dtype):
    image = photograph()[:1].to(dtype)
    many = image.repeat(channels, 1, 1)
    for work in (
        lambda x: resize(crop(x, Box(3, 5, 50, 60)), 32, 32),
        flip,
        lambda x: crops.resize_shorter_side(x, 40),
    ):
        assert torch.equal(work(many), work(image).repeat(channels, 1, 1))
