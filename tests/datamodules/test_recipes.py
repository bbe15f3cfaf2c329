import sys

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datamodules import rng
from datamodules.color import SIGMA, SOLARIZE, ColorConfig
from datamodules.color_batch import change_colors
from datamodules.color_opencv import change_color
from datamodules.crops import NUMBERS, random_resized_crop_box
from datamodules.errors import DataError
from datamodules.recipes import DINORecipe, MAERecipe


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


SMALL = {"crop_size": 32, "local_views": 3, "local_size": 16}


def test_dino_views():
    recipe = DINORecipe(**SMALL)
    batch = recipe(images(20), KEYS)
    assert recipe.views == ("global_views", "local_views")
    assert set(batch) == {"global_views", "local_views", "global_views_color", "local_views_color"}
    assert batch["global_views"].shape == (2, 20, 3, 32, 32) and batch["global_views"].dtype == torch.uint8
    assert batch["local_views"].shape == (3, 20, 3, 16, 16)
    assert batch["global_views_color"].shape == (2, 20, 8) and batch["local_views_color"].shape == (3, 20, 8)
    first, second = batch["global_views_color"]
    assert (first[:, SIGMA] > 0).all() and (second[:, SIGMA] > 0).sum() < 8
    assert not first[:, SOLARIZE].any() and 0 < second[:, SOLARIZE].sum() < 12
    assert not batch["local_views_color"][..., SOLARIZE].any()


def test_dino_without_local_views_or_color():
    batch = DINORecipe(crop_size=32, local_views=0, color=None)(images(20), KEYS)
    assert set(batch) == {"global_views"}


def test_every_dino_view_is_torchvisions_crop_of_its_own_box():
    batch = DINORecipe(**SMALL, color=None)(images(20), KEYS)
    kinds = (("global_views", 2, 32, (0.4, 1.0), 1), ("local_views", 3, 16, (0.05, 0.4), 4))
    for name, views, size, scale, purpose in kinds:
        numbers = rng.uniform(KEYS, purpose, views * NUMBERS).reshape(20, views, NUMBERS)
        flips = rng.uniform(KEYS, purpose + 1, views) < 0.5
        for v in range(views):
            for i, image in enumerate(images(20)):
                box = random_resized_crop_box(*image.shape[1:], numbers[i, v].tolist(), scale, (3 / 4, 4 / 3))
                expected = F.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
                assert torch.equal(batch[name][v, i], F.horizontal_flip(expected) if flips[i, v] else expected)
        assert 0 < flips.sum() < flips.size


def test_dino_depends_on_the_key_only():
    for color_on in ("device", "workers"):
        recipe = DINORecipe(**SMALL, color_on=color_on)
        whole, part = recipe(images(20), KEYS), recipe(images(20)[7:9], KEYS[7:9])
        assert all((whole[name][:, 7:9] == part[name]).all() for name in whole)


def test_colors_in_workers_are_those_of_the_device():
    on_device, in_workers = (DINORecipe(**SMALL, color_on=where)(images(20), KEYS) for where in ("device", "workers"))
    assert set(in_workers) == {"global_views", "local_views"}
    for name in ("global_views", "local_views"):
        views, rows = on_device[name], on_device[f"{name}_color"]
        changed = change_colors(views.flatten(0, 1), rows.reshape(-1, 8)).view(views.shape)
        error = (changed - in_workers[name]).abs()
        assert error.mean() < 1.5  # of noise, where 8-bit hue costs the most
        assert torch.equal(in_workers[name][1, 3], change_color(views[1, 3], rows[1, 3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_views": -1}, "local_views -1"),
        ({"local_size": 0}, "crop_size 0"),
        ({"local_scale": (0.0, 0.4)}, "scale"),
        ({"blur_probability": (1.0, 2.0, 0.5)}, "blur_probability"),
        ({"solarize_probability": (0.0, -0.1, 0.0)}, "solarize_probability"),
        ({"color": ColorConfig(hue=0.7)}, "hue"),
        ({"hflip": 1.5}, "hflip 1.5"),
    ],
)
def test_bad_dino_input(options, message):
    with pytest.raises(DataError, match=message):
        DINORecipe(**options)


def test_without_opencv_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    DINORecipe()
    with pytest.raises(DataError, match="pip install opencv-python-headless, or set"):
        DINORecipe(color_on="workers")


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_and_sixteen_bits(channels):
    pictures = [255 * torch.rand((channels, 40, 50)) for _ in range(3)]
    mae = MAERecipe(crop_size=16)(pictures, KEYS[:3])["image"]
    dino = DINORecipe(**SMALL)(pictures, KEYS[:3])["local_views"]
    assert mae.shape == (3, channels, 16, 16) and dino.shape == (3, 3, channels, 16, 16)
    assert mae.dtype == dino.dtype == torch.float32
