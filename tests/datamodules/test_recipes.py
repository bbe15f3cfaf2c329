import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datamodules import rng
from datamodules.crops import NUMBERS, random_resized_crop_box
from datamodules.errors import DataError
from datamodules.recipes import MAERecipe


def images(n):
    generator = np.random.default_rng(0)
    sizes = generator.integers(20, 90, (n, 2))
    return [torch.from_numpy(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)).permute(2, 0, 1) for h, w in sizes]


KEYS = rng.sample_keys(3, 1, np.arange(20))


def test_shape_and_type():
    views = MAERecipe(crop_size=32)(images(20), KEYS)
    assert set(views) == {"image"}
    assert views["image"].shape == (20, 3, 32, 32) and views["image"].dtype == torch.uint8


def test_a_view_is_torchvisions_crop_of_the_same_box_and_flip():
    views = MAERecipe(crop_size=32, scale=(0.3, 0.9))(images(20), KEYS)["image"]
    numbers, flips = rng.uniform(KEYS, 1, NUMBERS), rng.uniform(KEYS, 2, 1)[:, 0] < 0.5
    assert 0 < flips.sum() < 20
    for view, image, row, flipped in zip(views, images(20), numbers, flips, strict=True):
        box = random_resized_crop_box(*image.shape[1:], row.tolist(), (0.3, 0.9), (3 / 4, 4 / 3))
        expected = F.resized_crop(image, *box, [32, 32], InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(view, F.horizontal_flip(expected) if flipped else expected)


def test_a_view_depends_on_its_key_only():
    recipe, pictures = MAERecipe(crop_size=32), images(20)
    whole = recipe(pictures, KEYS)["image"]
    assert torch.equal(whole[7:9], recipe(pictures[7:9], KEYS[7:9])["image"])
    assert not torch.equal(whole[7], recipe(pictures[7:8], KEYS[8:9])["image"][0])


def test_hflip_probability():
    picture = torch.arange(32 * 32, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(1, 32, 32).repeat(3, 1, 1)
    keys = rng.sample_keys(0, 0, np.arange(400))

    def flipped(p):
        views = MAERecipe(32, (1.0, 1.0), (1.0, 1.0), hflip=p)([picture] * 400, keys)["image"]
        assert all(torch.equal(view, picture) or torch.equal(view, picture.flip(-1)) for view in views)
        return sum(torch.equal(view, picture.flip(-1)) for view in views)

    assert flipped(0.0) == 0 and flipped(1.0) == 400 and 80 < flipped(0.3) < 160


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size 0"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.2, 1.5)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"hflip": 1.5}, "hflip 1.5"),
        ({"hflip": float("nan")}, "hflip nan"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(DataError, match=message):
        MAERecipe(**options)
