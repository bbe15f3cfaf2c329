import numpy as np
import pytest
from PIL import Image, ImageFilter

from datamodules import rng
from datamodules.color import (
    BRIGHTNESS,
    GRAY,
    HUE,
    MAX_SIGMA,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
    ColorConfig,
    blur_kernel,
)
from datamodules.errors import DataError

KEYS = rng.sample_keys(3, 1, np.arange(4000))


def test_ranges_and_probabilities():
    drawn = ColorConfig().draw(KEYS, 3, (1.0, 0.1, 0.5), (0.0, 0.2, 0.0))
    assert drawn.shape == (3, 4000, 8) and drawn.dtype == np.float32
    jittered = drawn[..., BRIGHTNESS] != 1
    assert abs(jittered.mean() - 0.8) < 0.02
    for column, strength in enumerate((0.4, 0.4, 0.2)):
        factors = drawn[..., column][jittered]
        assert factors.min() >= 1 - strength and factors.max() <= 1 + strength
        assert abs(factors.mean() - 1) < 0.01 and factors.std() > 0.5 * strength
        assert (drawn[..., column][~jittered] == 1).all()
    assert np.abs(drawn[..., HUE]).max() <= 0.1 and (drawn[..., HUE][~jittered] == 0).all()
    assert abs(drawn[..., GRAY].mean() - 0.2) < 0.02
    assert [round(share, 1) for share in (drawn[..., SIGMA] > 0).mean(1)] == [1.0, 0.1, 0.5]
    assert [round(share, 1) for share in drawn[..., SOLARIZE].mean(1)] == [0.0, 0.2, 0.0]
    sigma = drawn[0, :, SIGMA]
    assert 0.1 <= sigma.min() < 0.15 and 1.95 < sigma.max() <= 2.0
    counts = np.bincount(drawn[..., ORDER].astype(int).ravel(), minlength=24)
    assert len(counts) == 24 and counts.min() > 400


def test_the_columns_are_independent():
    drawn = ColorConfig(jitter_probability=1).draw(KEYS, 3, (0.5, 0.5), (0.5, 0.5))
    columns = drawn.transpose(0, 2, 1).reshape(16, -1)
    assert np.abs(np.corrcoef(columns) - np.eye(16)).max() < 0.08


def test_a_samples_changes_depend_on_its_key_only():
    config = ColorConfig()
    whole = config.draw(KEYS, 3, (1.0, 0.1), (0.0, 0.2))
    assert np.array_equal(whole[:, 70:90], config.draw(KEYS[70:90], 3, (1.0, 0.1), (0.0, 0.2)))
    assert not np.array_equal(whole, config.draw(KEYS, 4, (1.0, 0.1), (0.0, 0.2)))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0, MAX_SIGMA])
def test_the_kernel_is_pillows(sigma):
    """A single bright pixel, blurred by Pillow in 8 bits, is the kernel but for rounding."""
    point = np.zeros((61, 61), np.uint8)
    point[:, 30] = 255
    blurred = np.asarray(Image.fromarray(point).filter(ImageFilter.GaussianBlur(sigma)), np.float64)[30]
    (kernel,) = blur_kernel(np.array([sigma], np.float32))
    reach = len(kernel) // 2
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    assert np.abs(blurred[30 - reach : 31 + reach] - 255 * kernel).max() <= 2
    assert blurred.sum() == pytest.approx(blurred[30 - reach : 31 + reach].sum())
    assert (kernel * np.arange(-reach, reach + 1) ** 2).sum() == pytest.approx(sigma**2, rel=0.02)


def test_each_image_has_its_own_kernel():
    together = blur_kernel(np.array([0.5, 2.0], np.float32))
    (narrow,) = blur_kernel(np.array([0.5], np.float32))
    middle = together.shape[1] // 2
    assert np.allclose(together[0, middle - 3 : middle + 4], narrow[len(narrow) // 2 - 3 : len(narrow) // 2 + 4])
    assert together[1].max() < 0.3 < together[0].max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"brightness": -0.1}, "cannot be negative"),
        ({"hue": 0.6}, "hue is at most 0.5"),
        ({"jitter_probability": 1.1}, "between 0 and 1"),
        ({"gray_probability": float("nan")}, "between 0 and 1"),
        ({"sigma": (0.0, 1.0)}, "0 < first"),
        ({"sigma": (2.0, 1.0)}, "0 < first"),
        ({"sigma": (0.1, 9.0)}, "<= 4"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(DataError, match=message):
        ColorConfig(**options).check()


def test_strong_jitter_never_turns_negative():
    drawn = ColorConfig(brightness=2.0, jitter_probability=1).draw(KEYS, 3, (0.0,), (0.0,))
    assert 0 <= drawn[..., BRIGHTNESS].min() < 0.05 and drawn[..., BRIGHTNESS].max() <= 3
    assert drawn[..., SATURATION].min() >= 0.8
