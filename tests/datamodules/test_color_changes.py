"""Both renderings of DINO's colour changes, for the device and for workers, against Pillow and torchvision v1.

The photographs are two that come with scikit-learn, and inet250 where it is at hand.
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torchvision.transforms import functional as F

from datamodules.color import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    ColorConfig,
)
from datamodules.color_batch import change_colors
from datamodules.color_opencv import change_color
from datamodules.errors import DataError

DATA = Path(os.environ.get("TRIVIT_BENCH_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
EDGE = 14  # Pillow repeats the edge anew in each of its three blurs, we once
NONE = np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)


def photographs():
    images = [Image.fromarray(image[:400, i : i + 400]) for image in load_sample_images().images for i in (0, 120, 240)]
    if (DATA / "inet250" / "images.tar").is_file():
        with tarfile.open(DATA / "inet250" / "images.tar") as tar:
            files = [member for member in tar if member.isfile()][::25]
            images += [Image.open(io.BytesIO(tar.extractfile(file).read())).convert("RGB") for file in files]
    return [image.resize((128, 128)) for image in images]


PHOTOGRAPHS = photographs()
PIXELS = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in PHOTOGRAPHS])


def reference(image, parameters):
    jitter = {BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation}
    for change in ORDERS[int(parameters[ORDER])]:
        if parameters[change] != NONE[change]:  # hue goes through 8-bit HSV, which is not exact even without a shift
            image = jitter.get(change, F.adjust_hue)(image, float(parameters[change]))
    if parameters[GRAY]:
        image = F.to_grayscale(image, 3)
    if parameters[SIGMA]:
        image = image.filter(ImageFilter.GaussianBlur(float(parameters[SIGMA])))
    return ImageOps.solarize(image) if parameters[SOLARIZE] else image


def on_device(parameters):
    return change_colors(PIXELS, parameters)


def in_workers(parameters):
    images = PIXELS.contiguous(memory_format=torch.channels_last)
    return torch.stack([change_color(*each) for each in zip(images, parameters, strict=True)]).float()


def parameters(column=None, low=0.0, high=0.0):
    rows = np.tile(NONE, (len(PHOTOGRAPHS), 1))
    if column is not None:
        rows[:, column] = np.linspace(low, high, len(rows))
    return rows


# The errors that the blueprint measured for OpenCV (mean, in grey levels) are the limits for both.
@pytest.mark.parametrize(
    ("name", "column", "low", "high", "device", "workers"),
    [
        ("nothing", None, 0, 0, 0, 0),
        ("brightness", BRIGHTNESS, 0.6, 1.4, 0.005, 0),
        ("contrast", CONTRAST, 0.6, 1.4, 0.005, 0.01),
        ("saturation", SATURATION, 0.8, 1.2, 0.005, 0.5),
        ("hue", HUE, -0.1, 0.1, 0.02, 0.4),
        ("grey", GRAY, 1, 1, 0, 0.005),
        ("blur", SIGMA, 0.1, 2.0, 0.5, 0.5),
        ("solarize", SOLARIZE, 1, 1, 0, 0),
    ],
)
def test_each_change_is_pillows(name, column, low, high, device, workers):
    rows = parameters(column, low, high)
    expected = torch.stack([F.pil_to_tensor(reference(*each)) for each in zip(PHOTOGRAPHS, rows, strict=True)]).float()
    for render, limit in ((on_device, device), (in_workers, workers)):
        error = (render(rows) - expected)[..., EDGE:-EDGE, EDGE:-EDGE] if name == "blur" else render(rows) - expected
        assert error.abs().mean() <= limit, render.__name__
        assert error.abs().mean((1, 2, 3)).max() <= 3 * limit, render.__name__
        if name == "blur":
            assert error.abs().max() <= 3


def test_all_changes_in_every_order_are_pillows():
    for start in range(0, 24, len(PHOTOGRAPHS)):
        rows = ColorConfig(jitter_probability=1).draw(np.arange(len(PHOTOGRAPHS)) * 977, 3, (0.5,), (0.3,))[0]
        rows[:, ORDER] = (start + np.arange(len(rows))) % 24
        expected = torch.stack([F.pil_to_tensor(reference(*each)) for each in zip(PHOTOGRAPHS, rows, strict=True)])
        for render, limit in ((on_device, 0.5), (in_workers, 1.0)):
            error = (render(rows) - expected)[..., EDGE:-EDGE, EDGE:-EDGE].abs().mean()
            assert error < limit, render.__name__


def test_an_image_is_changed_by_its_own_parameters_only():
    rows = ColorConfig().draw(np.arange(len(PHOTOGRAPHS)), 3, (0.5,), (0.3,))[0]
    whole = on_device(rows)
    for i in range(len(rows)):
        assert torch.equal(change_colors(PIXELS[i : i + 1], rows[i : i + 1])[0], whole[i])


def test_the_batch_itself_is_not_changed():
    before = PIXELS.clone()
    values = PIXELS.float()
    rows = parameters(BRIGHTNESS, 0.5, 0.6)
    change_colors(PIXELS, rows)
    change_colors(values, rows)
    assert torch.equal(PIXELS, before) and torch.equal(values, before.float())


def test_sixteen_bits_keep_their_precision():
    steps = torch.linspace(10, 12, 257).expand(2, 3, 5, 257).contiguous()
    rows = np.stack([NONE, NONE])
    rows[:, BRIGHTNESS] = 1.1
    assert torch.allclose(change_colors(steps, rows), steps * 1.1, atol=1e-4)
    rows[:, SIGMA] = 1.0
    assert change_colors(steps, rows).unique().numel() > 200
    with pytest.raises(DataError, match="color_on to device"):
        change_color(steps[0], rows[0])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels(channels):
    images = torch.randint(0, 256, (4, channels, 20, 24), dtype=torch.uint8)
    rows = ColorConfig(jitter_probability=1).draw(np.arange(4), 3, (1.0,), (0.5,))[0]
    rows[:, GRAY] = 1
    device = change_colors(images, rows)
    layout = images.contiguous(memory_format=torch.channels_last)
    workers = torch.stack([change_color(*each) for each in zip(layout, rows, strict=True)])
    assert device.shape == workers.shape == images.shape
    assert (device - workers).abs().max() <= 2
    assert not torch.equal(device, images.float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_same():
    rows = ColorConfig().draw(np.arange(len(PHOTOGRAPHS)), 3, (0.5,), (0.3,))[0]
    error = (change_colors(PIXELS.cuda(), rows).cpu() - on_device(rows)).abs()
    assert error.mean() < 0.01
